"""Judges the facts about cards, driver, NCCL, and packages that only a GPU needs; see `rules`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cpm_bee.doctor.facts import Facts
from cpm_bee.doctor.report import FAULT, OK, WARNING, Finding

GIB, MIB = 2**30, 2**20
INSTALL_TORCH = "pip uninstall -y torch && pip install torch -c constraints.txt"
_BMTRAIN, _BMTRAIN_PYTHONS = "1.0.1", ((3, 10), (3, 11))
_LEAST_SHM = 256 * MIB
# The first driver series for each major version of CUDA (NVIDIA's minor version compatibility).
_DRIVERS = {11: 450, 12: 525, 13: 580}


def driver(facts: Facts) -> Iterator[Finding]:
    cuda = facts.torch.get("cuda")
    if facts.smi_error:
        fix = "reboot after an update of the driver; otherwise install the driver again"
        yield Finding("driver", FAULT, f"nvidia-smi fails: {facts.smi_error}", fix)
    elif not facts.gpus and not facts.device_files:
        yield Finding("driver", OK, "no NVIDIA GPU on this machine: everything runs on the CPU")
        return
    elif not facts.libcuda:
        text = (
            "there is a GPU, but libcuda.so.1 cannot be loaded: the driver is not in this container"
        )
        fix = (
            "docker run --gpus all, with NVIDIA_DRIVER_CAPABILITIES=compute,utility; outside of "
            "containers, install the driver's compute libraries"
        )
        yield Finding("driver", FAULT, text, fix)
        return
    elif not facts.device_files:
        text = (
            "the driver's library is there, but no /dev/nvidia0: the card is not in this container"
        )
        yield Finding("driver", FAULT, text, "docker run --gpus all")
        return
    if facts.driver and cuda:
        needed = _DRIVERS.get(numbers(cuda)[0])
        if needed is not None and numbers(facts.driver)[0] < needed:
            text = f"{facts.driver} is too old for PyTorch's CUDA {cuda}, which needs {needed}"
            fix = f"update the driver to {needed} or later, or install PyTorch for an older CUDA"
            yield Finding("driver", FAULT, text, fix)
        else:
            yield Finding("driver", OK, f"{facts.driver}, for CUDA {cuda}")
    elif facts.driver:
        yield Finding("driver", OK, facts.driver)


def gpus(facts: Facts) -> Iterator[Finding]:
    hidden = facts.variables.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    unusable = facts.torch.get("cuda") and not facts.torch.get("cuda_available")
    if facts.gpus and unusable and not hidden:
        reason = next(iter(facts.torch.get("warnings", [])), "PyTorch gives no reason")
        fix = "nvidia-smi; the line on the driver above; sudo modprobe nvidia_uvm; reboot"
        yield Finding("GPU", FAULT, f"PyTorch cannot use the GPU: {reason}", fix)
    for i, device in enumerate(facts.torch.get("devices", [])):
        yield _gpu(f"GPU {i}", device, facts.torch.get("arch_list", []))
    for i, card in enumerate(facts.gpus):
        if card.get("compute_mode", "") == "Prohibited":
            fix = f"sudo nvidia-smi -i {i} -c DEFAULT"
            yield Finding(f"card {i}", FAULT, "its compute mode is Prohibited", fix)
        if card.get("mig.mode.current") == "Enabled":
            text = "MIG is enabled: a process sees one slice, and NCCL cannot join several"
            yield Finding(f"card {i}", WARNING, text, "train with one process, or disable MIG")
        used, total = (_number(card.get(f"memory.{k}")) for k in ("used", "total"))
        if total and used > 0.1 * total:
            text = f"other processes use {used / 1024:.1f} of {total / 1024:.1f} GiB"
            fix = "see nvidia-smi; end them, or choose other cards with CUDA_VISIBLE_DEVICES"
            yield Finding(f"card {i}", WARNING, text, fix)


def _gpu(name: str, device: dict[str, Any], arch_list: list[str]) -> Finding:
    major, minor = device["capability"]
    text = f"{device['name']}, {device['total'] / GIB:.0f} GiB, capability {major}.{minor}"
    if not _has_kernels(major, minor, arch_list):
        text += f": this PyTorch has no kernels for it (only {', '.join(arch_list)})"
        return Finding(name, FAULT, text, "install a PyTorch whose CUDA supports the card")
    if major < 8:
        text += ": no bf16 and no FlexAttention"
        return Finding(name, WARNING, text, "none needed: --dtype auto is fp16 there")
    return Finding(name, OK, text)


def _has_kernels(major: int, minor: int, arch_list: list[str]) -> bool:
    """Whether a PyTorch for these architectures runs on a card.

    Binary code runs on later minor versions of the same major one, PTX on all later ones, and what
    ends in "a" on that very architecture.
    """
    for arch in arch_list:
        kind, _, number = arch.partition("_")
        digits = "".join(c for c in number if c.isdigit())
        own = (int(digits[:-1]), int(digits[-1]))
        if number.endswith("a"):
            fits = own == (major, minor)
        elif kind == "sm":
            fits = own[0] == major and own[1] <= minor
        else:
            fits = own <= (major, minor)
        if fits:
            return True
    return not arch_list


def visibility(facts: Facts) -> Iterator[Finding]:
    given = facts.variables.get("CUDA_VISIBLE_DEVICES")
    if given is None or not facts.gpus:
        return
    visible = len(facts.torch.get("devices", []))
    if visible == 0 and given.strip() in ("", "-1"):
        text = f"CUDA_VISIBLE_DEVICES={given!r} hides all {len(facts.gpus)} cards"
        yield Finding("visible cards", WARNING, text, "unset CUDA_VISIBLE_DEVICES")
    elif visible < len(facts.gpus):
        text = f"CUDA_VISIBLE_DEVICES={given} shows {visible} of {len(facts.gpus)} cards"
        yield Finding("visible cards", OK, text)
    if facts.variables.get("CUDA_LAUNCH_BLOCKING", "0") == "1":
        text = "CUDA_LAUNCH_BLOCKING=1 makes every kernel wait: training is slow"
        yield Finding("CUDA", WARNING, text, "unset CUDA_LAUNCH_BLOCKING")


def nccl(facts: Facts) -> Iterator[Finding]:
    wheels = [n for n in facts.packages if n.startswith("nvidia-nccl-")]
    if len(wheels) > 1:
        # Both put libnccl.so.2 into the same place; bmtrain asks for that of cu11.
        own = f"nvidia-nccl-cu{(facts.torch.get('cuda') or '13').split('.')[0]}"
        others = " ".join(w for w in wheels if w != own)
        text = f"{' and '.join(wheels)} overwrite each other's libnccl.so.2"
        fix = f"pip uninstall -y {others} && pip install --force-reinstall --no-deps {own}"
        yield Finding("NCCL", FAULT, text, fix)
    elif "nccl" in facts.torch:
        yield Finding("NCCL", OK, facts.torch["nccl"])
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        given = facts.variables.get(name, "")
        wanted = [part for part in given.lstrip("^=").split(",") if part]
        found = any(i.startswith(part) for part in wanted for i in facts.interfaces)
        if given and not given.startswith("^") and not found:
            text = f"{name}={given}: this machine has only {', '.join(facts.interfaces)}"
            yield Finding("network", FAULT, text, f"unset {name}, or name one of these")
    if not facts.own_address:
        text = "this host's own name has no address: several processes may not find each other"
        fix = "add it to /etc/hosts, or export GLOO_SOCKET_IFNAME=lo on one machine"
        yield Finding("network", WARNING, text, fix)
    if facts.shadowing:
        shown = ", ".join(facts.shadowing[:3]) + (" ..." if len(facts.shadowing) > 3 else "")
        text = f"LD_LIBRARY_PATH has libraries that PyTorch brings itself: {shown}"
        fix = "unset LD_LIBRARY_PATH, if cuDNN, cuBLAS or NCCL reports an error"
        yield Finding("libraries", WARNING, text, fix)


def shared_memory(facts: Facts) -> Iterator[Finding]:
    text = f"{facts.shm / GIB:.1f} GiB" if facts.shm >= GIB else f"{facts.shm / MIB:.0f} MiB"
    several = len(facts.torch.get("devices", [])) > 1
    if facts.shm < _LEAST_SHM and facts.variables.get("NCCL_SHM_DISABLE") != "1":
        fix = "docker run --shm-size=8g (or --ipc=host), or export NCCL_SHM_DISABLE=1"
        text += ": too little for NCCL between several cards (Docker's default is 64 MiB)"
        yield Finding("/dev/shm", FAULT if several else WARNING, text, fix)
    else:
        yield Finding("/dev/shm", OK, text)


def bmtrain(facts: Facts) -> Iterator[Finding]:
    version = facts.packages.get("bmtrain")
    install = f"pip install --no-deps bmtrain=={_BMTRAIN}"
    if version is None:
        if facts.python[:2] in _BMTRAIN_PYTHONS:
            yield Finding(
                "bmtrain", OK, f"not installed; only --engine bmtrain needs it ({install})"
            )
        else:
            builds = (
                "pip would build it" if facts.nvcc else "pip would build it, which needs CUDA_HOME"
            )
            text = f"not installed; it has wheels for Python 3.10 and 3.11 only, here {builds}"
            yield Finding("bmtrain", OK, text)
    elif version != _BMTRAIN:
        # Older ones have no wheels: pip builds them, which needs CUDA_HOME and an older torch.
        text = f"{version} is not supported, and does not work with torch 2"
        yield Finding("bmtrain", FAULT, text, f"pip uninstall -y bmtrain && {install}")
    elif facts.python[:2] not in _BMTRAIN_PYTHONS:
        fix = "use Python 3.10 or 3.11, or --engine torch"
        yield Finding(
            "bmtrain", WARNING, f"{version} has wheels for Python 3.10 and 3.11 only", fix
        )
    elif facts.bmtrain_error:
        fix = f"pip uninstall -y bmtrain && {install}; or --engine torch"
        yield Finding("bmtrain", FAULT, f"{version}: {facts.bmtrain_error}", fix)
    else:
        yield Finding("bmtrain", OK, version)


def bitsandbytes(facts: Facts) -> Iterator[Finding]:
    version, cuda = facts.packages.get("bitsandbytes"), facts.torch.get("cuda")
    if version is None or not cuda or not facts.torch.get("cuda_available"):
        return
    major = str(numbers(cuda)[0])
    override = facts.variables.get("BNB_CUDA_VERSION")
    if override and override != cuda.replace(".", ""):
        text = f"BNB_CUDA_VERSION={override}, but PyTorch has CUDA {cuda}"
        yield Finding("bitsandbytes", WARNING, text, "unset BNB_CUDA_VERSION")
    elif not any(library.startswith(major) for library in facts.bitsandbytes_cuda):
        text = f"{version} has no library for CUDA {cuda}: --quantize nf4 uses the slower own code"
        fix = "pip install -U bitsandbytes, or pip uninstall -y bitsandbytes"
        yield Finding("bitsandbytes", WARNING, text, fix)
    else:
        yield Finding("bitsandbytes", OK, version)


def compiler(facts: Facts) -> Iterator[Finding]:
    if not facts.torch.get("cuda_available"):
        return
    needs = "FlexAttention and --compile cannot be used"
    if "triton" not in facts.packages:
        yield Finding("triton", WARNING, f"not installed: {needs}", INSTALL_TORCH)
    if not facts.compiler:
        fix = "apt-get install gcc (or export CC=...)"
        yield Finding("C compiler", WARNING, f"none found: {needs}", fix)
    elif not facts.python_headers:
        fix = "apt-get install python3-dev (of this Python's version)"
        yield Finding("C compiler", WARNING, f"Python.h is missing: {needs}", fix)
    else:
        yield Finding("C compiler", OK, facts.compiler)


def _number(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:  # "[N/A]"
        return 0.0


def numbers(version: str) -> tuple[int, ...]:
    parts = version.partition("+")[0].split(".")
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


PARTS = (driver, gpus, visibility, nccl, shared_memory, bmtrain, bitsandbytes, compiler)
