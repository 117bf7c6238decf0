"""Machines that the doctor examines: a good one, and one for each known failure."""

from __future__ import annotations

from typing import Any

from cpm_bee.doctor.facts import Facts
from cpm_bee.doctor.report import FAULT, WARNING

GIB, MIB = 2**30, 2**20
H100 = {"name": "H100", "capability": [9, 0], "total": 80 * GIB, "free": 79 * GIB}
TORCH = {
    "version": "2.13.0+cu130", "cuda": "13.0", "hip": None, "threads": 16,
    "arch_list": ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"],
    "cuda_available": True, "warnings": [], "cudnn": 92000, "nccl": "2.29.3",
    "devices": [H100, H100],
}  # fmt: skip
SMI = {"name": "H100", "driver_version": "580.95.05", "memory.total": "81559",
       "memory.used": "4", "compute_mode": "Default", "mig.mode.current": "Disabled"}  # fmt: skip
PACKAGES = {"torch": "2.13.0", "numpy": "2.3", "safetensors": "0.6", "tqdm": "4.67",
            "triton": "3.6.0", "bitsandbytes": "0.50.2", "bmtrain": "1.0.1",
            "nvidia-nccl-cu13": "2.29.3"}  # fmt: skip
DISK = {"path": "/data", "error": "", "free": 500 * GIB, "noexec": False, "files_left": 10**6}
GOOD = Facts(
    torch=TORCH,
    packages=PACKAGES,
    bitsandbytes_cuda=("126", "130"),
    gpus=[SMI, SMI],
    driver="580.95.05",
    libcuda=True,
    device_files=True,
    compiler="/usr/bin/gcc",
    interfaces=("lo", "eth0"),
    cores=16,
    cores_reason="all of this machine",
    memory=100 * GIB,
    shm=32 * GIB,
    save=DISK,
    temporary=DISK,
)


def torch(**changes: Any) -> dict[str, Any]:
    return {"torch": {**TORCH, **changes}}


def smi(**changes: Any) -> dict[str, Any]:
    return {"gpus": [{**SMI, **{n.replace("_", "."): v for n, v in changes.items()}}, SMI]}


def variables(**values: str) -> dict[str, Any]:
    return {"variables": values}


def packages(**values: str | None) -> dict[str, Any]:
    merged = PACKAGES | {name.replace("_", "-"): v for name, v in values.items()}
    return {"packages": {n: v for n, v in merged.items() if v is not None}}


V100 = {"name": "Tesla V100", "capability": [7, 0], "total": 16 * GIB, "free": 15 * GIB}
T4 = {"name": "Tesla T4", "capability": [7, 5], "total": 15 * GIB, "free": 14 * GIB}
CPU_BUILD = {"version": "2.13.0+cpu", "cuda": None, "cuda_available": False, "threads": 16}
HIDDEN = {**TORCH, "cuda_available": False, "devices": []}

KNOWN: dict[str, tuple[dict[str, Any], str, str, str, str]] = {
    # name of the failure: facts, name of the line, verdict, in its text, in its fix
    "Windows": ({"system": "Windows"}, "system", FAULT, "not supported", "WSL"),
    "a terminal in latin-1": ({"encoding": "latin-1"}, "terminal", WARNING, "latin-1", "utf-8"),
    "an old Python": ({"python": (3, 9, 1)}, "Python", FAULT, "older than Python 3.10", "PYTHON="),
    "nothing installed": (
        packages(torch=None),
        "torch",
        FAULT,
        "not installed",
        ".venv/bin/activate",
    ),
    "another copy": ({"other_copy": "/x/cpm_bee"}, "cpm_bee", WARNING, "/x", "pip uninstall"),
    "an old torch": (
        torch(version="2.1.0+cu121"),
        "torch",
        FAULT,
        "older than 2.13",
        "pip install",
    ),
    "a CPU build of torch on a GPU machine": (
        {"torch": CPU_BUILD},
        "torch",
        FAULT,
        "CPU build, but this machine has",
        "pip uninstall -y",
    ),
    "ROCm": (torch(cuda=None, hip="6.4"), "torch", WARNING, "ROCm", "--device cpu"),
    "torch that cannot load a library": (
        {"torch": {}, "torch_error": "OSError: libcudart.so.12: cannot open"},
        "torch",
        FAULT,
        "libcudart",
        "LD_LIBRARY_PATH",
    ),
    "a card in use": (
        {"torch": {}, "torch_error": "AcceleratorError: CUDA error: device is busy"},
        "torch",
        FAULT,
        "busy",
        "nvidia-smi",
    ),
    "torch that hangs": (
        {"torch": {}, "torch_error": "did not answer within 90 seconds"},
        "torch",
        FAULT,
        "did not answer",
        "nvidia-smi",
    ),
    "an old driver": ({"driver": "535.104.05"}, "driver", FAULT, "needs 580", "update the driver"),
    "a driver that was updated without a reboot": (
        {"gpus": [], "smi_error": "Driver/library version mismatch"},
        "driver",
        FAULT,
        "mismatch",
        "reboot",
    ),
    "no libcuda": ({"libcuda": False}, "driver", FAULT, "libcuda.so.1", "--gpus all"),
    "no device files": ({"device_files": False}, "driver", FAULT, "/dev/nvidia0", "--gpus all"),
    "an unusable GPU": (
        {"torch": {**HIDDEN, "warnings": ["CUDA unknown error"]}},
        "GPU",
        FAULT,
        "CUDA unknown error",
        "nvidia_uvm",
    ),
    "V100": (torch(devices=[V100]), "GPU 0", FAULT, "no kernels", "install a PyTorch"),
    "T4 without bf16": (torch(devices=[T4]), "GPU 0", WARNING, "no bf16", "--dtype auto"),
    "a card of another user": (
        smi(memory_used="40000"),
        "card 0",
        WARNING,
        "39.1 of 79.6 GiB",
        "CUDA_VISIBLE_DEVICES",
    ),
    "MIG": (
        {"gpus": [SMI, {**SMI, "mig.mode.current": "Enabled"}]},
        "card 1",
        WARNING,
        "MIG",
        "MIG",
    ),
    "a forbidden card": (
        {"gpus": [{**SMI, "compute_mode": "Prohibited"}]},
        "card 0",
        FAULT,
        "Prohibited",
        "-c DEFAULT",
    ),
    "hidden cards": (
        {"torch": HIDDEN, **variables(CUDA_VISIBLE_DEVICES="")},
        "visible cards",
        WARNING,
        "hides all 2",
        "unset",
    ),
    "blocking launches": (
        variables(CUDA_LAUNCH_BLOCKING="1", CUDA_VISIBLE_DEVICES="0,1"),
        "CUDA",
        WARNING,
        "slow",
        "unset",
    ),
    "two copies of NCCL": (
        packages(nvidia_nccl_cu11="2.21.5"),
        "NCCL",
        FAULT,
        "overwrite",
        "uninstall -y nvidia-nccl-cu11",
    ),
    "an interface that is not there": (
        variables(NCCL_SOCKET_IFNAME="ib0"),
        "network",
        FAULT,
        "lo, eth0",
        "unset NCCL_SOCKET_IFNAME",
    ),
    "a host without an address": (
        {"own_address": False},
        "network",
        WARNING,
        "no address",
        "/etc/hosts",
    ),
    "libraries that shadow": (
        {"shadowing": ["/usr/local/cuda/lib64/libcudnn.so.8"]},
        "libraries",
        WARNING,
        "libcudnn.so.8",
        "unset LD_LIBRARY_PATH",
    ),
    "docker's /dev/shm with two cards": (
        {"shm": 64 * MIB},
        "/dev/shm",
        FAULT,
        "64 MiB",
        "--shm-size",
    ),
    "bmtrain for torch 1": (
        packages(bmtrain="0.2.3"),
        "bmtrain",
        FAULT,
        "torch 2",
        "bmtrain==1.0.1",
    ),
    "bmtrain on a new Python": (
        {"python": (3, 13, 0)},
        "bmtrain",
        WARNING,
        "3.10 and 3.11",
        "torch",
    ),
    "bmtrain that cannot be loaded": (
        {"bmtrain_error": "ImportError: undefined symbol"},
        "bmtrain",
        FAULT,
        "undefined",
        "--no-deps",
    ),
    "bitsandbytes for another CUDA": (
        {"bitsandbytes_cuda": ("118", "126")},
        "bitsandbytes",
        WARNING,
        "CUDA 13.0",
        "pip install -U",
    ),
    "a forced CUDA of bitsandbytes": (
        variables(BNB_CUDA_VERSION="118"),
        "bitsandbytes",
        WARNING,
        "118",
        "unset BNB_CUDA_VERSION",
    ),
    "no triton": (packages(triton=None), "triton", WARNING, "FlexAttention", "pip"),
    "no compiler": ({"compiler": ""}, "C compiler", WARNING, "none found", "gcc"),
    "no Python.h": ({"python_headers": False}, "C compiler", WARNING, "Python.h", "python3-dev"),
    "a container's quota": (
        {"cores": 2.5, "cores_reason": "a container's quota; 16 cores are visible"},
        "threads",
        WARNING,
        "2.5 cores (a container's quota",
        "OMP_NUM_THREADS=2",
    ),
    "spinning threads": (
        variables(OMP_WAIT_POLICY="active"),
        "threads",
        WARNING,
        "spin",
        "PASSIVE",
    ),
    "little memory": ({"memory": 300 * MIB}, "memory", WARNING, "0.3 GiB", "limit"),
    "a full disk": (
        {"save": {**DISK, "free": 100 * MIB}},
        "disk of --save",
        WARNING,
        "0.1 GiB",
        "--save",
    ),
    "a read-only disk": (
        {"save": {**DISK, "error": "/data: read-only file system"}},
        "disk of --save",
        FAULT,
        "read-only",
        "--save",
    ),
    "no inodes": ({"save": {**DISK, "files_left": 3}}, "disk of --save", FAULT, "inodes", "delete"),
    "a full TMPDIR": ({"temporary": {**DISK, "free": 0}}, "TMPDIR", WARNING, "0.0 GiB", "TMPDIR="),
    "a TMPDIR without exec": (
        {"temporary": {**DISK, "noexec": True}},
        "TMPDIR",
        WARNING,
        "noexec",
        "TMPDIR=",
    ),
    "Windows line ends": (
        {"crlf_scripts": ("scripts/venv.sh",)},
        "scripts",
        FAULT,
        "scripts/venv.sh",
        "autocrlf",
    ),
    "RANK of another run": (
        variables(RANK="0", WORLD_SIZE="2"),
        "environment",
        FAULT,
        "RANK",
        "unset RANK WORLD_SIZE",
    ),
}
