"""The findings of the doctor are Chinese where Chinese is wanted, and English in its JSON."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from error_sites import COMMANDS
from machines import CPU_BUILD, DISK, GIB, GOOD, H100, KNOWN, TORCH, packages, torch, variables
from sources import SRC

from cpm_bee import error_codes, language
from cpm_bee.doctor import rules
from cpm_bee.doctor.checkpoint import check_checkpoint
from cpm_bee.doctor.facts import Facts
from cpm_bee.doctor.report import FAULT, NOT_RUN, OK, WARNING, Finding, as_json, summary, table
from cpm_bee.doctor.runner import StepResult
from cpm_bee.doctor.steps import STEPS
from cpm_bee.language import said, width

HAN = re.compile(r"[\u4e00-\u9fff]")
TINY = SRC / "ckpts" / "cpm-bee-tiny"
DOCTOR = [*(SRC / "cpm_bee" / "doctor").glob("*.py"), SRC / "doctor.py"]
# Texts without words of a language: names, versions, paths.
_NEUTRAL = re.compile(r"[\d.+a-z]*|[\d.+a-z]+, CUDA [\d.]+|[\d.]+ [GM]iB|[\d.]+ \(.*\)|/\S+")
# What a library or the system has said is no text of this project.
_FOREIGN = ("OSError: lib", "CUDA error", "undefined symbol")
OTHER_MACHINES: list[dict[str, Any]] = [
    {},
    {"gpus": [], "driver": "", "libcuda": False, "device_files": False, "torch": CPU_BUILD},
    {**packages(bmtrain=None), "python": (3, 10, 2)},
    {**packages(bmtrain=None), "python": (3, 13, 0), "nvcc": ""},
    {**packages(bmtrain=None), "python": (3, 13, 0), "nvcc": "/usr/bin/nvcc"},
    {**packages(numpy=None, tqdm=None)},
    {**packages(bmtrain="1.0.1"), "python": (3, 10, 2)},
    {"torch": {}, "torch_error": "no message (ended with signal 11)"},
    {"torch": {}, "torch_error": "no message (ended with status 1)"},
    {"torch": {}, "torch_error": "unexpected output: 'x y z'"},
    {"torch": {**TORCH, "cuda_available": False, "devices": []}},
    {**torch(threads=32), "cores_reason": "of 64"},
    {**torch(threads=99), **variables(OMP_NUM_THREADS="99")},
    {**torch(threads=None), **variables(OMP_WAIT_POLICY="PASSIVE")},
    variables(OMP_WAIT_POLICY="PASSIVE"),
    variables(CUDA_VISIBLE_DEVICES="0") | {"torch": {**TORCH, "devices": [H100]}},
    {"temporary": {**DISK, "files_left": 3}},
    {"temporary": {**DISK, "error": "/x/y is a file"}},
    {"cores": 0.5, "cores_reason": "a container's quota; 16 cores are visible"},
]


@pytest.fixture(autouse=True)
def _chinese() -> Iterator[None]:
    language.choose("zh")
    yield
    language.choose(None)


def _machines() -> Iterator[Facts]:
    for facts in [*(known[0] for known in KNOWN.values()), *OTHER_MACHINES]:
        yield replace(GOOD, **facts)


def _all_findings() -> Iterator[Finding]:
    for facts in _machines():
        yield from rules.findings(facts)
    for card in ({}, {"devices": [{"free": 2**20}]}):
        facts = Facts(memory=2**20, save={"free": 2**20}, torch=card)
        yield from check_checkpoint(str(TINY), "auto", None, facts)


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return list(_all_findings())


def test_texts_and_fixes_are_chinese(findings: list[Finding]) -> None:
    texts = {finding.text for finding in findings if not _NEUTRAL.fullmatch(finding.text)}
    texts = {text for text in texts if not any(words in text for words in _FOREIGN)}
    fixes = {f.fix for f in findings if f.fix and not COMMANDS.fullmatch(f.fix)}
    assert len(texts) > 60 and len(fixes) > 30
    english = [text for text in texts | fixes if not HAN.search(said(text))]
    assert not english, "add to src/cpm_bee/messages/doctor.json:\n" + "\n".join(english)


def test_values_stay(findings: list[Finding]) -> None:
    for finding in findings:
        for text in (finding.text, finding.fix):
            numbers = set(re.findall(r"\d+\.\d+|/[\w/.]+|--[\w-]+", text))
            assert {n for n in numbers if n not in said(text)} <= {"2.13"}, text


def test_words_of_english_are_gone(findings: list[Finding]) -> None:
    """No text is translated in part only: a reason inside of it, or one end of it."""
    left = re.compile(r"\b(the|this|that|is|are|needs|only|cannot|other|your|choose|cores)\b")
    for finding in findings:
        for text in (finding.name, finding.text, finding.fix):
            if any(words in text for words in _FOREIGN):
                continue
            assert not left.search(said(text)), said(text)


def _sources() -> str:
    """All texts of the doctor's source; holes of values are newlines."""
    found = []
    for path in DOCTOR:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "\n" for v in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n\n".join(found)


def test_no_entry_is_dead(findings: list[Finding]) -> None:
    """Each entry is used by a finding that was played here, or all its words are in the source."""
    used: set[str] = set()

    def read(text: str) -> None:
        for begin in [0, *(match.end() for match in re.finditer(": ", text))]:
            if first := next(error_codes.matches(text[begin:], lines=True), None):
                used.add(first[0].words.en)
                for name, value in first[1].items():
                    if name.startswith("reason"):
                        read(value)
                return

    for finding in findings:
        for text in (finding.name, finding.text, finding.fix):
            read(text)
    sources, dead = _sources(), []
    table = json.loads((error_codes.TABLES / "doctor.json").read_text(encoding="utf-8"))
    for english, chinese in (pair for pairs in table.values() for pair in pairs):
        holes = [set(re.findall(r"\{\w+\}", text)) for text in (english, chinese)]
        assert holes[0] == holes[1], english
        assert HAN.search(chinese) or re.search("^pip|; or|^source", english), english
        words = re.sub(r"\{\w+\}", "\n", english).strip("\n")
        if english not in used and words not in sources:
            dead.append(english)
    assert not dead, "remove from src/cpm_bee/messages/doctor.json:\n" + "\n".join(dead)


def test_titles_and_reasons_of_steps() -> None:
    reasons = ["ended with status 1", "died by signal SIGSEGV", "the step has checked nothing"]
    reasons.append("Killed (died by signal SIGKILL)".partition("(")[2][:-1])
    reasons.append("not run: the 600 seconds of all steps are over")
    reasons.append("still running after its limit of 60 seconds, and was ended")
    assert [text for text in reasons if not HAN.search(said(text))] == []
    for step in STEPS:
        assert HAN.search(said(step.title)), step.title
        lines = [{"what": "a", "verdict": verdict, "text": "b"} for verdict in (OK, *NOT_RUN)]
        result = StepResult(step, OK, lines=lines, seconds=2)
        expected = "1 项正常, 1 项需要 CUDA, 1 项需要 2 个 GPU, 1 项不可用 (2 s)"
        assert result.finding(said).text == f"{said(step.title)}: {expected}"
        assert result.finding().text.startswith(f"{step.title}: 1 ok, 1 needs CUDA")


def test_columns_of_a_table() -> None:
    fix, why = "choose another folder with --save", "compiled kernels cannot be loaded"
    findings = [
        Finding("threads", OK, "300.0 GiB available"),
        Finding("disk of --save", FAULT, "0.1 GiB free in /a/b", fix),
        Finding("memory", WARNING, f"{'/long' * 12} is mounted noexec: {why}"),
    ]
    lines = table(findings).splitlines()
    begin = width("正常  --save 所在磁盘  ")
    assert lines[0] == "正常  线程             可用 300.0 GiB"
    assert lines[1].startswith("故障  --save 所在磁盘  /a/b 剩余")
    assert lines[2] == " " * begin + "解决办法: 请用 --save 选择另一个文件夹"
    assert len(lines) == 5 and all(width(line) <= 100 for line in lines)
    assert summary(findings) == "1 项正常, 1 项警告, 1 项故障"
    assert table(findings[2:], translate_names=False).startswith("警告  memory  /long")


def test_the_json_stays_english() -> None:
    found = rules.findings(replace(GOOD, memory=GIB // 2))
    table(found)
    text = json.dumps(as_json(found), ensure_ascii=False)
    assert "0.5 GiB available" in text and not HAN.search(text)
