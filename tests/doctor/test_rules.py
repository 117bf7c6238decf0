"""Each known failure of this field is seen in the facts of a machine, by name and with a fix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from machines import CPU_BUILD, GOOD, H100, KNOWN, MIB, torch, variables

from cpm_bee.doctor import rules
from cpm_bee.doctor.report import FAULT, OK, WARNING, Finding, exit_status, summary, table


def found(**changes: Any) -> list[Finding]:
    """The findings of a good machine with two H100, with some facts changed."""
    return [f for f in rules.findings(replace(GOOD, **changes)) if f.verdict != OK]


def test_a_good_machine_has_no_warning() -> None:
    assert found() == []
    names = [finding.name for finding in rules.findings(GOOD)]
    expected = ["Python", "torch", "driver", "GPU 0", "GPU 1", "NCCL", "/dev/shm", "bmtrain"]
    expected += ["bitsandbytes", "C compiler", "threads", "memory", "disk of --save", "TMPDIR"]
    assert names == expected


@pytest.mark.parametrize("failure", KNOWN)
def test_known_failures(failure: str) -> None:
    """The failure has a line with its fix, and there is no other complaint."""
    facts, name, verdict, text, fix = KNOWN[failure]
    (finding,) = [f for f in found(**facts) if f.name == name]
    assert finding.verdict == verdict
    assert text in finding.text
    assert fix in finding.fix
    assert len(found(**facts)) <= 2
    assert exit_status(found(**facts)) == (1 if verdict == FAULT else 0)


def test_a_machine_without_a_gpu_is_fine() -> None:
    facts = {"gpus": [], "driver": "", "libcuda": False, "device_files": False, "torch": CPU_BUILD}
    assert found(**facts, compiler="", shm=256 * MIB) == []


def test_nccl_needs_no_shared_memory_where_it_is_told_so() -> None:
    assert found(shm=64 * MIB, **variables(NCCL_SHM_DISABLE="1")) == []
    (finding,) = found(shm=64 * MIB, **torch(devices=[H100]))
    assert finding.verdict == WARNING  # one card


def test_a_run_under_torchrun_is_no_leftover() -> None:
    assert found(**variables(RANK="0", WORLD_SIZE="2", TORCHELASTIC_RUN_ID="1")) == []


@pytest.mark.parametrize(
    ("capability", "arch_list", "known"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_90"], True),  # binary code of a lower minor version
        ((7, 5), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_80", "compute_90"], True),  # PTX
        ((10, 3), ["sm_90a", "sm_100a"], False),
        ((10, 0), ["sm_90a", "sm_100a"], True),
    ],
)
def test_kernels_for_a_card(capability: Any, arch_list: list[str], known: bool) -> None:
    card = {**H100, "capability": list(capability)}
    faults = [f for f in found(**torch(devices=[card], arch_list=arch_list)) if f.verdict == FAULT]
    assert bool(faults) is not known


def test_table_and_summary() -> None:
    findings = [Finding("a", OK, "fine"), Finding("longer", FAULT, "word " * 40, "do this")]
    lines = table(findings).splitlines()
    assert lines[0] == "ok     a       fine"
    assert lines[1].startswith("fault  longer  word")
    assert lines[-1] == "               fix: do this"
    assert max(map(len, lines)) <= 100
    assert summary(findings) == "1 ok, 1 fault"
    assert summary(findings[:1] * 2) == "2 ok, 0 faults"
