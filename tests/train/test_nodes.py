"""Two machines: two torchrun agents through scripts/finetune_cpm_bee.sh do what one process does.

Each agent has a network of its own (a namespace of the kernel) where this machine allows it; else
they meet on the loopback address.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import train_support
from support import ROOT
from train_support import Run, Samples, Workspace, free_port, train

from cpm_bee.distributed import rendezvous
from cpm_bee.distributed.rendezvous import rendezvous_flags
from cpm_bee.errors import InputError, RunError

SCRIPT = ROOT / "scripts" / "finetune_cpm_bee.sh"
SETTINGS = {
    "BATCH_SIZE": "1", "MAX_LENGTH": "48", "EPOCH": "9", "LR": "0.01", "WARMUP_ITERS": "0",
    "LR_DECAY_STYLE": "constant", "EVAL_INTERVAL": "5", "GPUS_PER_NODE": "2", "NNODES": "2",
}  # fmt: skip
FLAGS = ["--device", "cpu", "--seed", "7", "--checkpointing", "none"]
SLOW = pytest.mark.slow


class Nodes:
    """Two machines; `prefixes` are what a command on each begins with."""

    def __init__(self, prefixes: list[list[str]], **settings: str) -> None:
        self._prefixes = prefixes
        self._settings = settings

    def start(self, workspace: Workspace, save: Path, *flags: str) -> list[subprocess.Popen[str]]:
        venv = Path(sys.executable).parent
        settings = {
            **SETTINGS, **self._settings, "LOAD": str(workspace.model), "SAVE": str(save),
            "DATASET": str(workspace.train), "EVAL_DATASET": str(workspace.eval),
            "VIRTUAL_ENV": str(venv.parent), "PATH": f"{venv}{os.pathsep}{os.environ['PATH']}",
            "MASTER_PORT": str(free_port()), "TMPDIR": str(save.parent),
        }  # fmt: skip
        command = ["bash", str(SCRIPT), *FLAGS, *flags]
        return [
            train_support.start([*prefix, *command], save.parent, **settings)
            for prefix in self._prefixes
        ]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def _namespaces() -> Iterator[Nodes]:
    names = [f"cpm-bee-{os.getpid()}-{side}" for side in "ab"]
    with contextlib.ExitStack() as stack:
        for name in names:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
        pair = ["link", "add", "bee0", "netns", names[0], "type", "veth"]
        _ip(*pair, "peer", "name", "bee0", "netns", names[1])
        for number, name in enumerate(names, 1):
            _ip("-n", name, "addr", "add", f"10.231.77.{number}/24", "dev", "bee0")
            for link in ("lo", "bee0"):
                _ip("-n", name, "link", "set", link, "up")
        prefixes = [["ip", "netns", "exec", name] for name in names]
        yield Nodes(prefixes, MASTER_ADDR="10.231.77.1", GLOO_SOCKET_IFNAME="bee0")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(_namespaces())
        except (OSError, subprocess.CalledProcessError):
            made = Nodes([[], []], MASTER_ADDR="127.0.0.1")
        yield made


@SLOW
def test_two_nodes_train_as_one_process_does(
    nodes: Nodes, workspace: Workspace, tmp_path: Path
) -> None:
    flags: dict[str, Any] = {"eval_dataset": workspace.eval, "eval_interval": 5, "seed": 7}
    flags |= {"max_length": 48, "epoch": 9, "max_steps": 8, "use_delta": True}
    flags |= {"batch_size": 4, "checkpointing": "none"}
    one = train(workspace, tmp_path / "one", **flags)
    started = nodes.start(workspace, tmp_path / "two", "--parallel", "fsdp", "--max-steps", "8")
    for process in started:
        status, _, errors = train_support.finish(process)
        assert status == 0, errors
    two = Run(tmp_path / "two")
    assert two.of("start")[0]["world_size"] == 4
    assert two.column("tokens") == one.column("tokens")
    Samples.of(one, workspace, **flags).check(two)


def workers(of: subprocess.Popen[str]) -> dict[int, int]:
    """The processes of finetune_cpm_bee.py below a process, by rank."""
    found = {}
    waiting = [of.pid]
    while waiting:
        number = waiting.pop()
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
            waiting += map(int, children)
            values = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
            ranks = [v.removeprefix(b"RANK=") for v in values if v.startswith(b"RANK=")]
            if ranks:
                found[int(ranks[0])] = number
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@SLOW
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_all_nodes_end_with_the_rank_that_was_killed(
    nodes: Nodes, workspace: Workspace, tmp_path: Path, way: str
) -> None:
    save = tmp_path / "run"
    flags = ["--parallel", way, "--save-interval", "2", "--early-stop-patience", "1000"]
    started = nodes.start(workspace, save, *flags, "--epoch", "1000")
    log = save / "cpm_bee_finetune-log.jsonl"
    wait_for(lambda: log.is_file() and '"step": 5' in log.read_text())
    below = [workers(process) for process in started]
    assert sorted(rank for ranks in below for rank in ranks) == [0, 1, 2, 3]
    # The second one of a machine without rank 0.
    victim = 3 if 3 in below[1] else max(below[0])
    before = time.monotonic()
    os.kill({**below[0], **below[1]}[victim], signal.SIGKILL)
    for process in started:
        status, output, errors = train_support.finish(process, 70)
        assert status == 1, output
        assert errors.count("error: ") == 1
        assert f"rank {victim} of this run has ended" in errors
        assert str(ROOT / "src" / "cpm_bee") not in errors  # as in a traceback of ours
    assert time.monotonic() - before < 60
    names = sorted(path.name for path in save.iterdir())
    # The curves are drawn by a process of their own, which may not have come so far.
    names = [name for name in names if not re.search(r"-state-\d+\.pt$|-loss\.png$", name)]
    assert names == [
        f"cpm_bee_finetune-{kind}"
        for kind in (
            "config.yaml", "delta-best.json", "delta-best.pt", "delta-last.json",
            "delta-last.pt", "log.jsonl", "receipt.json", "report.html", "state.pt",
        )
    ]  # fmt: skip
    for which in ("best", "last"):
        assert Run(save).weights(which)
    train_support.load_tensors(save / "cpm_bee_finetune-state.pt", "a state")


def test_several_machines_need_the_address_of_the_first(tmp_path: Path) -> None:
    environment = {**os.environ, "NNODES": "2"}
    environment.pop("MASTER_ADDR", None)
    venv = Path(sys.executable).parent
    environment["PATH"] = f"{venv}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(SCRIPT)], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 2
    assert "NNODES=2 needs MASTER_ADDR" in done.stderr


def own_address() -> str:
    """An address of this machine that is no loopback one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no network")
        return str(probe.getsockname()[0])


def test_the_machine_with_the_address_hosts_the_rendezvous() -> None:
    address, port = own_address(), free_port()
    flags = f"--rdzv_conf=is_host=1,join_timeout=60 --local_addr={address}"
    assert rendezvous_flags(address, port, 2, 60.0) == flags
    # Several agents on one machine: torch decides.
    assert rendezvous_flags("127.0.0.1", port, 2, 0.0) == ""
    assert rendezvous_flags(address, port, 1, 60.0) == ""


def test_a_taken_port_is_refused_at_once() -> None:
    address = own_address()
    for listener in (address, "127.0.0.1"):
        with socket.create_server((listener, 0)) as server:
            port = server.getsockname()[1]
            for num_nodes in (1, 2):
                with pytest.raises(InputError, match=f"MASTER_PORT={port}: address.*in use") as e:
                    rendezvous_flags(address, port, num_nodes, 60.0)
            other = int(str(e.value).rpartition("MASTER_PORT=")[2])
            assert rendezvous_flags(address, other, 1, 60.0) == ""  # as the message says
        assert rendezvous_flags(address, port, 1, 60.0) == ""
    with pytest.raises(InputError, match="MASTER_PORT=0"):
        rendezvous_flags(address, 0, 2, 60.0)
    assert rendezvous_flags("localhost", 0, 1, 60.0) == ""  # any free port


def test_other_machines_wait_for_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address, port = own_address(), free_port()
    monkeypatch.setattr(rendezvous, "_is_own", lambda number: False)
    with pytest.raises(RunError, match=f"no answer from {address}:{port} within 1 seconds"):
        rendezvous_flags(address, port, 2, 1.0)
    assert f"waiting up to 1 seconds for {address}:{port}" in capsys.readouterr().err
    with socket.create_server((address, port)):
        flags = f"--rdzv_conf=is_host=0,join_timeout=5 --local_addr={address}"
        assert rendezvous_flags(address, port, 2, 5.0) == flags


def test_an_unknown_name_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="MASTER_ADDR=no-such-machine"):
        rendezvous_flags("no-such-machine.invalid", 12345, 2, 60.0)


SRUN = """#!/bin/sh
# What SLURM would start on each node, here once.
while [ "${1#--}" != "$1" ]; do echo "srun $1"; shift; done
exec "$@"
"""
TORCHRUN = """#!/bin/sh
echo torchrun "$@"
"""


def test_slurm_starts_one_torchrun_a_node(workspace: Workspace, tmp_path: Path) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    scontrol = '#!/bin/sh\n[ "$3" = "node[1-2]" ] && printf "%s\\n" localhost node2\n'
    for name, text in (("srun", SRUN), ("scontrol", scontrol), ("torchrun", TORCHRUN)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    script = tmp_path / "slurm_script"  # SLURM runs a copy
    script.write_bytes((ROOT / "scripts" / "slurm_finetune.sh").read_bytes())
    venv = Path(sys.executable).parent
    environment = {
        "PATH": os.pathsep.join([str(commands), str(venv), os.environ["PATH"]]),
        "VIRTUAL_ENV": str(venv.parent), "SLURM_JOB_ID": "777", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "8",
        "SLURM_SUBMIT_DIR": str(ROOT / "src"), "LOAD": str(workspace.model),
        "DATASET": str(workspace.train), "EVAL_DATASET": str(workspace.eval),
    }  # fmt: skip
    command = ["bash", str(script), "--delta-rank", "4"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert "srun --ntasks=2" in done.stdout and "srun --ntasks-per-node=1" in done.stdout
    line = [text for text in done.stdout.splitlines() if text.startswith("torchrun")][-1]
    for part in (
        "--nnodes=2", "--nproc_per_node=8", "--rdzv_id=777", "--rdzv_endpoint=localhost:20777",
        f"--load {workspace.model}", "--use-delta --delta-rank 4",
    ):  # fmt: skip
        assert part in line
    del environment["SLURM_JOB_ID"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 2 and "sbatch --nodes=2" in done.stderr
