"""What is so on this machine: collected without judging it, which `rules.py` does.

All values can be written as JSON. Whatever could hang or crash runs in a process of its own with a
time limit. Nothing here imports torch.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpm_bee.paths import existing_parent

SRC = Path(__file__).resolve().parents[2]
ROOT = SRC.parent

_PACKAGES = ("torch", "numpy", "safetensors", "tqdm", "triton", "bitsandbytes", "bmtrain")
_NCCL_WHEELS = ("nvidia-nccl-cu11", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CUDA_LAUNCH_BLOCKING", "LD_LIBRARY_PATH", "LD_PRELOAD",
    "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_SHM_DISABLE", "NCCL_P2P_DISABLE",
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "PYTORCH_CUDA_ALLOC_CONF",
    "BNB_CUDA_VERSION", "RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "CC", "CXX",
)  # fmt: skip
_SMI_FIELDS = ("name", "driver_version", "memory.total", "memory.used", "compute_mode",
               "mig.mode.current")  # fmt: skip
# Libraries that, found in LD_LIBRARY_PATH, are loaded instead of those that come with PyTorch.
_SHADOWING = ("libcudnn*.so*", "libnccl.so*", "libcublas*.so*", "libcudart.so*")
_QUICK, _PROBE = 20.0, 90.0  # seconds


@dataclass
class Facts:
    """The facts of a machine; None or "" where something does not exist."""

    system: str = "Linux"
    python: tuple[int, int, int] = (3, 11, 0)
    executable: str = "python"
    torch: dict[str, Any] = field(default_factory=dict)  # of `torch_probe`
    torch_error: str = ""
    packages: dict[str, str] = field(default_factory=dict)
    bitsandbytes_cuda: tuple[str, ...] = ()  # "130" for its library for CUDA 13.0
    bmtrain_error: str = ""  # of its import, tried where CUDA is available
    gpus: list[dict[str, str]] = field(default_factory=list)  # of nvidia-smi
    smi_error: str = ""  # of an nvidia-smi that exists but fails
    driver: str = ""
    libcuda: bool = False
    device_files: bool = False  # /dev/nvidia0 ...
    compiler: str = ""
    python_headers: bool = True
    nvcc: str = ""
    variables: dict[str, str] = field(default_factory=dict)
    shadowing: list[str] = field(default_factory=list)
    interfaces: tuple[str, ...] = ()
    own_address: bool = True  # whether this host's name resolves
    cores: float = 1.0  # that this process may use
    cores_reason: str = ""
    memory: int = 0  # bytes available
    shm: int = 0  # bytes of /dev/shm
    save: dict[str, Any] = field(default_factory=dict)  # of `_disk`
    temporary: dict[str, Any] = field(default_factory=dict)
    crlf_scripts: tuple[str, ...] = ()
    other_copy: str = ""  # another cpm_bee that Python would import
    encoding: str = "utf-8"


def collect(save: str, variables: dict[str, str] | None = None) -> Facts:
    """Collect the facts; takes seconds.

    Args:
        variables: the environment as the user has set it.
    """
    environment = dict(os.environ) if variables is None else variables
    facts = Facts(
        system=platform.system(),
        python=sys.version_info[:3],
        executable=sys.executable,
        packages=_versions([*_PACKAGES, *_NCCL_WHEELS]),
        libcuda=_loads("libcuda.so.1"),
        device_files=Path("/dev/nvidia0").exists() or Path("/dev/dxg").exists(),  # dxg: WSL
        compiler=next(filter(None, map(shutil.which, _compilers(environment))), ""),
        python_headers=Path(sysconfig.get_paths()["include"], "Python.h").is_file(),
        nvcc=_nvcc(environment),
        variables={name: environment[name] for name in _VARIABLES if name in environment},
        shadowing=_shadowing(environment.get("LD_LIBRARY_PATH", "")),
        interfaces=tuple(name for _, name in socket.if_nameindex()),
        own_address=_resolves(),
        shm=_size("/dev/shm"),
        save=_disk(Path(save)),
        temporary=_disk(Path(tempfile.gettempdir())),
        crlf_scripts=_crlf_scripts(),
        other_copy=_other_copy(),
        encoding=sys.stdout.encoding or "",
    )
    facts.cores, facts.cores_reason = usable_cores()
    facts.memory = _available_memory()
    facts.gpus, facts.smi_error = _nvidia_smi()
    facts.driver = facts.gpus[0]["driver_version"] if facts.gpus else ""
    facts.torch, facts.torch_error = _probe_torch()
    facts.bitsandbytes_cuda = _bitsandbytes_libraries()
    if facts.torch.get("cuda_available") and "bmtrain" in facts.packages:
        facts.bmtrain_error = _run([sys.executable, "-c", "import torch, bmtrain"], _PROBE)[1]
    return facts


def _run(command: Sequence[str], seconds: float) -> tuple[str, str]:
    """Returns a command's output and, if it failed, why; the last line of what it printed."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
            env={**os.environ, "PYTHONPATH": str(SRC)},
        )
    except subprocess.TimeoutExpired:
        return "", f"did not answer within {seconds:.0f} seconds"
    except OSError as error:
        return "", f"{error.strerror}"
    if done.returncode == 0:
        return done.stdout, ""
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    end = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
    return done.stdout, f"{lines[-1] if lines else 'no message'} (ended with {end})"


def _probe_torch() -> tuple[dict[str, Any], str]:
    output, error = _run([sys.executable, "-m", "cpm_bee.doctor.torch_probe"], _PROBE)
    if error:
        return {}, error
    try:
        return json.loads(output.splitlines()[-1]), ""
    except (ValueError, IndexError):
        return {}, f"unexpected output: {output[-200:]!r}"


def _nvidia_smi() -> tuple[list[dict[str, str]], str]:
    if shutil.which("nvidia-smi") is None:
        return [], ""
    query = f"--query-gpu={','.join(_SMI_FIELDS)}"
    output, error = _run(["nvidia-smi", query, "--format=csv,noheader,nounits"], _QUICK)
    if error:
        return [], error
    rows = [[cell.strip() for cell in line.split(",")] for line in output.splitlines() if line]
    return [dict(zip(_SMI_FIELDS, row, strict=False)) for row in rows], ""


def _versions(names: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _bitsandbytes_libraries() -> tuple[str, ...]:
    try:
        files = importlib.metadata.files("bitsandbytes") or []
    except importlib.metadata.PackageNotFoundError:
        return ()
    names = [file.name for file in files if file.name.startswith("libbitsandbytes_cuda")]
    return tuple(sorted(n.removeprefix("libbitsandbytes_cuda").partition(".")[0] for n in names))


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _compilers(environment: dict[str, str]) -> list[str]:
    # As triton looks for one.
    return [environment["CC"]] if environment.get("CC") else ["gcc", "clang", "cc"]


def _nvcc(environment: dict[str, str]) -> str:
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    places = [Path(home, "bin", "nvcc")] if home else [Path("/usr/local/cuda/bin/nvcc")]
    return next((str(p) for p in places if p.is_file()), "") or shutil.which("nvcc") or ""


def _shadowing(search_path: str) -> list[str]:
    folders = [Path(part) for part in search_path.split(":") if part]
    return sorted({str(p) for f in folders if f.is_dir() for g in _SHADOWING for p in f.glob(g)})


def _resolves() -> bool:
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        return False
    return True


def usable_cores(root: Path = Path("/sys/fs/cgroup")) -> tuple[float, str]:
    """Returns the number of cores that this process may use, and what limits it.

    A container's quota (control groups v2 and v1) may be smaller than the set of cores on which
    the process may run, and may be a fraction.
    """
    affinity = hasattr(os, "sched_getaffinity")
    allowed = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
    quota = _quota(root)
    if quota is not None and quota < allowed:
        return quota, f"a container's quota; {allowed} cores are visible"
    total = os.cpu_count() or allowed
    return allowed, f"of {total}" if allowed < total else "all of this machine"


def _quota(root: Path) -> float | None:
    try:
        if (root / "cpu.max").is_file():
            limit, period = (root / "cpu.max").read_text().split()
        else:
            limit = (root / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text().strip()
        return int(limit) / int(period) if int(limit) > 0 else None
    except (OSError, ValueError):  # "max" is no limit
        return None


def _available_memory() -> int:
    from_kernel = {
        line.split(":")[0]: int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.endswith("kB")
    }
    limits = [from_kernel["MemAvailable"]]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(name).read_text()))
        except (OSError, ValueError):
            continue
    return min(limits)


def _size(folder: str) -> int:
    try:
        return shutil.disk_usage(folder).total
    except OSError:
        return 0


def _disk(folder: Path) -> dict[str, Any]:
    """The free space where a folder is or would be made, and whether files can be made there."""
    folder = folder.absolute()
    place = existing_parent(folder)
    found: dict[str, Any] = {"path": str(folder), "error": "", "free": 0, "noexec": False}
    try:
        status = os.statvfs(place)
        found["free"] = status.f_bavail * status.f_frsize
        found["files_left"] = status.f_favail if status.f_files else None  # btrfs has no limit
        found["noexec"] = bool(status.f_flag & getattr(os, "ST_NOEXEC", 0))
        if not place.is_dir():
            found["error"] = f"{place} is a file"
        else:
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(b"\0" * 4096)
    except OSError as error:
        found["error"] = f"{place}: {(error.strerror or str(error)).lower()}"
    return found


def _crlf_scripts() -> tuple[str, ...]:
    scripts = sorted((ROOT / "scripts").glob("*.sh"))
    return tuple(f"scripts/{path.name}" for path in scripts if b"\r\n" in path.read_bytes())


def _other_copy() -> str:
    """Another cpm_bee that `python -c "import cpm_bee"` would find outside of src/."""
    code = "import sys; sys.path.pop(0); import cpm_bee; print(cpm_bee.__file__)"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            encoding="utf-8",
            timeout=_QUICK,
            cwd="/",
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = done.stdout.strip()
    return found if done.returncode == 0 and Path(found).resolve().parents[1] != SRC else ""
