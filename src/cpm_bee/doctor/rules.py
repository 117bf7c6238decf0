"""Judges the facts of a machine: a line for each part, and the known failures of this field.

Each function takes `Facts` alone and returns findings, so that a test can play any machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cpm_bee.doctor import gpu_rules
from cpm_bee.doctor.facts import Facts
from cpm_bee.doctor.gpu_rules import GIB, INSTALL_TORCH, numbers
from cpm_bee.doctor.report import FAULT, OK, WARNING, Finding

_OLDEST_PYTHON, _OLDEST_TORCH = (3, 10), (2, 13)
_LEAST_DISK, _LEAST_TEMPORARY = 2 * GIB, GIB


def findings(facts: Facts) -> list[Finding]:
    """All findings, with the foundations first."""
    parts = (system, python, torch, *gpu_rules.PARTS, threads, memory, disk, scripts, leftovers)
    return [finding for part in parts for finding in part(facts)]


def system(facts: Facts) -> Iterator[Finding]:
    if facts.system != "Linux":
        yield Finding(
            "system", FAULT, f"{facts.system} is not supported", "use Linux, for example WSL 2"
        )
    if facts.encoding.lower().replace("-", "") not in ("utf8", ""):
        text = f"this terminal is {facts.encoding}: Chinese appears as \\u escapes"
        yield Finding("terminal", WARNING, text, "export PYTHONIOENCODING=utf-8 LC_ALL=C.UTF-8")


def python(facts: Facts) -> Iterator[Finding]:
    version = ".".join(map(str, facts.python))
    if facts.python[:2] < _OLDEST_PYTHON:
        fix = "PYTHON=python3.12 bash scripts/quickstart.sh"
        yield Finding("Python", FAULT, f"{version} is older than Python 3.10", fix)
    else:
        yield Finding("Python", OK, f"{version} ({facts.executable})")
    missing = [n for n in ("numpy", "safetensors", "tqdm") if n not in facts.packages]
    if missing:
        fix = "source .venv/bin/activate, or pip install -e . -c constraints.txt"
        yield Finding("packages", FAULT, f"not installed: {', '.join(missing)}", fix)
    if facts.other_copy:
        text = f"Python imports another copy of cpm_bee: {facts.other_copy}"
        yield Finding("cpm_bee", WARNING, text, "pip uninstall cpm_bee, then pip install -e .")


def torch(facts: Facts) -> Iterator[Finding]:
    if "torch" not in facts.packages:
        fix = "source .venv/bin/activate, or pip install -e . -c constraints.txt"
        yield Finding("torch", FAULT, "PyTorch is not installed for this Python", fix)
        return
    if facts.torch_error:
        reason = facts.torch_error
        if "did not answer" in reason:
            fix = "the driver hangs: run nvidia-smi; reboot, or restart the container"
        elif "CUDA" in reason:
            fix = "nvidia-smi: is the card in use, or in another mode? Otherwise reboot"
        elif ".so" in reason:
            fix = f"unset LD_LIBRARY_PATH, which mixes installations; or {INSTALL_TORCH}"
        else:
            fix = INSTALL_TORCH
        yield Finding("torch", FAULT, f"{facts.packages['torch']}: {reason}", fix)
        return
    version, cuda = facts.torch["version"], facts.torch["cuda"]
    build = f"CUDA {cuda}" if cuda else "ROCm" if facts.torch.get("hip") else "CPU build"
    if numbers(version)[:2] < _OLDEST_TORCH:
        fix = "pip install -e . -c constraints.txt"
        yield Finding("torch", FAULT, f"{version} is older than 2.13, which this needs", fix)
    elif facts.torch.get("hip"):
        text = f"{version} is a ROCm build: AMD cards are not tested"
        yield Finding("torch", WARNING, text, "use an NVIDIA card, or --device cpu")
    elif not cuda and (facts.gpus or facts.device_files):
        # Both the +cpu wheels and a mirror's default index lead here.
        text = f"{version} is a CPU build, but this machine has an NVIDIA GPU: it is not used"
        fix = f"{INSTALL_TORCH}, with no --index-url that ends in /cpu"
        yield Finding("torch", FAULT, text, fix)
    else:
        yield Finding("torch", OK, f"{version}, {build}")


def threads(facts: Facts) -> Iterator[Finding]:
    cores = f"{facts.cores:g}"
    given = facts.variables.get("OMP_NUM_THREADS")
    count = facts.torch.get("threads") or 0
    if count > max(1, facts.cores):
        source = f"OMP_NUM_THREADS={given}" if given else f"PyTorch uses {count} threads"
        text = f"{source}, but this process may use {cores} cores ({facts.cores_reason}): it stalls"
        fix = f"export OMP_NUM_THREADS={max(1, int(facts.cores))}"
        yield Finding("threads", WARNING, text, fix)
    else:
        policy = facts.variables.get("OMP_WAIT_POLICY", "unset")
        number = f"{count or 'unknown number of'} thread(s) on {cores} cores"
        yield Finding("threads", OK, f"{number} ({facts.cores_reason}), OMP_WAIT_POLICY={policy}")
    spinning = [
        f"{name}={value}"
        for name, value in facts.variables.items()
        if (name == "OMP_WAIT_POLICY" and value.upper() == "ACTIVE")
        or (name == "KMP_BLOCKTIME" and value not in ("0", ""))
    ]
    if spinning:
        text = f"{', '.join(spinning)}: waiting threads spin, and stall beside other work"
        yield Finding(
            "threads", WARNING, text, "export OMP_WAIT_POLICY=PASSIVE; unset KMP_BLOCKTIME"
        )


def memory(facts: Facts) -> Iterator[Finding]:
    text = f"{facts.memory / GIB:.1f} GiB available"
    if facts.memory < GIB:
        yield Finding("memory", WARNING, text, "end other programs, or raise the container's limit")
    else:
        yield Finding("memory", OK, text)


def disk(facts: Facts) -> Iterator[Finding]:
    yield _disk("disk of --save", facts.save, _LEAST_DISK, "choose another folder with --save")
    yield _disk("TMPDIR", facts.temporary, _LEAST_TEMPORARY, "export TMPDIR=/another/folder")
    if facts.temporary.get("noexec") and facts.torch.get("cuda_available"):
        text = f"{facts.temporary['path']} is mounted noexec: compiled kernels cannot be loaded"
        yield Finding("TMPDIR", WARNING, text, "export TMPDIR=/another/folder")


def _disk(name: str, found: dict[str, Any], least: int, fix: str) -> Finding:
    if found.get("error"):
        return Finding(name, FAULT, f"files cannot be written: {found['error']}", fix)
    text = f"{found['free'] / GIB:.1f} GiB free in {found['path']}"
    if found["free"] < least:
        return Finding(name, WARNING, text, f"free some space, or {fix}")
    if found.get("files_left") is not None and found["files_left"] < 1000:
        return Finding(name, FAULT, f"{text}, but no free inodes", f"delete files, or {fix}")
    return Finding(name, OK, text)


def scripts(facts: Facts) -> Iterator[Finding]:
    if facts.crlf_scripts:
        text = f"Windows line ends in {', '.join(facts.crlf_scripts)}: bash cannot run them"
        fix = r"git config core.autocrlf input; sed -i 's/\r$//' scripts/*.sh"
        yield Finding("scripts", FAULT, text, fix)


def leftovers(facts: Facts) -> Iterator[Finding]:
    names = [n for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if n in facts.variables]
    if names and "TORCHELASTIC_RUN_ID" not in facts.variables:
        text = (
            f"{', '.join(names)} set in this shell: a run would wait for processes that never come"
        )
        yield Finding("environment", FAULT, text, f"unset {' '.join(names)}")
