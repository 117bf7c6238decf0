"""What the doctor finds: lines with a verdict and a fix, as a table for people and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cpm_bee.language import is_chinese, said, width, wrapped

OK, WARNING, FAULT = "ok", "warning", "fault"
# Verdicts of what could not be checked here. They are never counted as "ok".
NEEDS_CUDA, NEEDS_GPUS, NOT_AVAILABLE = "needs CUDA", "needs 2 GPUs", "not available"
NOT_RUN = (NEEDS_CUDA, NEEDS_GPUS, NOT_AVAILABLE)

_WIDTH = 100


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, the verdict, what was found, and how to fix it."""

    name: str
    verdict: str
    text: str
    fix: str = ""


def worst(verdicts: Iterable[str]) -> str:
    """The verdict of several together: the worst one; of those that say "not run", the first."""
    given = list(verdicts)
    for verdict in (FAULT, WARNING, OK):
        if verdict in given:
            return verdict
    return given[0] if given else NOT_AVAILABLE


def table(findings: Sequence[Finding], *, translate_names: bool = True) -> str:
    """Returns the lines of a table in the user's language; long texts go on below themselves.

    Args:
        translate_names: False where names are those of steps, which people type.
    """
    verdicts = [said(f.verdict) for f in findings]
    names = [said(f.name) if translate_names else f.name for f in findings]
    columns = [max(map(width, column), default=0) for column in (verdicts, names)]
    indent = sum(columns) + 4
    lines = []
    for finding, verdict, name in zip(findings, verdicts, names, strict=True):
        first = f"{padded(verdict, columns[0])}  {padded(name, columns[1])}  "
        lines += _wrapped(first, said(finding.text), indent)
        if finding.fix:
            lines += _wrapped(" " * indent, f"{said('fix')}: {said(finding.fix)}", indent)
    return "\n".join(line.rstrip() for line in lines)


def padded(text: str, columns: int) -> str:
    """A text with spaces behind it, as wide as so many columns of a terminal."""
    return text + " " * (columns - width(text))


def _wrapped(first: str, text: str, indent: int) -> list[str]:
    most = max(_WIDTH, indent + 40)
    if is_chinese():
        begin, *rest = wrapped(text, most - indent)
        return [first + begin, *(" " * indent + line for line in rest)]
    return textwrap.wrap(
        text,
        most,
        initial_indent=first,
        subsequent_indent=" " * indent,
        break_long_words=False,  # paths and commands stay whole
        break_on_hyphens=False,
    ) or [first]


def summary(findings: Sequence[Finding]) -> str:
    """Returns a sentence that counts the verdicts."""
    counts = {v: sum(f.verdict == v for f in findings) for v in (OK, WARNING, FAULT, *NOT_RUN)}
    plurals = {OK: "ok", WARNING: "warnings", FAULT: "faults"}
    parts = []
    for verdict, count in counts.items():
        if count or verdict == FAULT:
            word = verdict if count == 1 else plurals.get(verdict, verdict)
            parts.append(f"{count} {word}")
    return ", ".join(map(said, parts))


def exit_status(findings: Iterable[Finding]) -> int:
    return int(any(f.verdict == FAULT for f in findings))


def as_json(findings: Sequence[Finding], **more: Any) -> dict[str, Any]:
    return {"findings": [asdict(f) for f in findings], **more}
