"""What differs between a run and its replay: beforehand, and in the steps."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from cpm_bee.errors import shown

# What may change how results are rounded, by its name in the environment of a receipt.
_ENVIRONMENT = {
    "torch": "PyTorch",
    "threads": "threads",
    "cpu_capability": "instruction set",
    "cpu": "CPU",
    "numpy": "NumPy",
    "python": "Python",
    "variables": "variables",
}
_COLUMNS = {"loss": "loss", "grad_norm": "gradient norm", "lr": "learning rate", "tokens": "tokens"}

Events = Mapping[int, Mapping[str, Any]]  # by step


def differences(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Yields what differs beforehand between the parts of two receipts."""
    for kind, title in (("dataset", "data"), ("eval-dataset", "evaluation data")):
        sets = [part["data"].get(kind) or [] for part in (then, now)]
        if sets[0] and not sets[1]:  # only that of evaluation can be missing
            yield f"{title}: {sets[0][0]['path']} is not there, so it has not been compared"
        elif len(sets[0]) != len(sets[1]):
            yield f"{title}: {len(sets[0])} datasets then, {len(sets[1])} now"
        for before, after in zip(*sets, strict=False):
            yield from _of_dataset(title, before, after)
    before, after = then["vocabulary"], now["vocabulary"]
    if before["fingerprint"] != after["fingerprint"]:
        yield f"vocabulary: {after['path']} has other tokens than the one of the run"
    yield from _of_base(then["base"], now["base"])
    deltas = [(part.get("init_delta") or {}).get("sha256") for part in (then, now)]
    if deltas[0] != deltas[1]:
        yield "--init-delta: another file than that of the run"
    yield from _of_code(then["code"], now["code"])
    for name, label in _ENVIRONMENT.items():
        before, after = then["environment"].get(name), now["environment"].get(name)
        if before != after:
            yield f"{label}: {_named(before)} then, {_named(after)} now"


def _named(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)


def _of_dataset(title: str, then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    if then.get("weight", 1.0) != now["weight"]:
        yield f"{title}: {now['path']} has weight {now['weight']:g}, {then['weight']:g} then"
    if then.get("fingerprint") != now["fingerprint"] or not _agree(then, now):
        count = f"{then.get('records')} records then, {now['records']} now"
        yield f"{title}: {now['path']} is not what the run read ({count})"


def _agree(then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two hashes agree; those of different kinds cannot be compared."""
    return then.get("kind") != now.get("kind") or then.get("value") == now.get("value")


def _of_base(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    where = now["path"] or "its random values"
    pairs = list(zip(then["files"], now["files"], strict=False))
    changed = [after["name"] for before, after in pairs if not _agree(before, after)]
    if then["fingerprint"] != now["fingerprint"]:
        yield f"base: {where} has other weights than the base of the run"
    elif changed:
        inside = os.path.dirname(where)
        yield f"base: {', '.join(changed)} in {inside} has other bytes than in the run"


def _of_code(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    if then.get("source") == now["source"]:
        return
    commits = [
        "" if not code.get("commit") else code["commit"][:12] + "+" * bool(code.get("changed"))
        for code in (then, now)
    ]
    about = f" (commit {commits[0] or 'unknown'} then, {commits[1] or 'unknown'} now)"
    yield f"code: the source of cpm_bee has changed{about if any(commits) else ''}"


def compared_by_fingerprint(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names what one of both has no hash of, or a hash of another kind."""
    pairs = list(zip(then["base"]["files"], now["base"]["files"], strict=False))
    pairs += zip(then["data"]["dataset"], now["data"]["dataset"], strict=False)
    return [
        f"compared by its fingerprint only: {after.get('path') or after.get('name')}"
        for before, after in pairs
        if before.get("kind") != after.get("kind") or before.get("kind") is None
    ]


def reasons_to_differ(part: dict[str, Any], *, dropout: bool) -> list[str]:
    """Why one process on a CPU cannot be expected to repeat a run bit for bit; [] if it can.

    Args:
        part: of its receipt.
        dropout: whether it has dropout, in the model or in the delta.
    """
    environment, found = part["environment"], []
    ranks = environment["ranks"]
    if environment["device"] != "cpu":
        gpu = environment.get("gpu") or environment["device"]
        found.append(f"it was made on {gpu} in {environment['dtype']}: a CPU rounds differently")
    if ranks > 1 and dropout:
        found.append(f"each of its {ranks} ranks had dropout masks of its own")
    # Two ranks with one batch each add up two gradients, in whatever order.
    has_single_batches = (
        part["settings"].get("accumulate") == 1
        and part["settings"].get("max_tokens") is None
        and len(part["data"]["dataset"]) == 1
    )
    if ranks > 2 or (ranks == 2 and not has_single_batches):
        found.append(
            f"its {ranks} ranks added up the gradients of their batches in another order than "
            "one process does, which rounds differently"
        )
    if environment["sharded"]:
        found.append("its weights were sharded, and norms summed in parts")
    return found


def compare_steps(then: Events, now: Events, steps: int) -> list[str]:
    """Returns what differs in the first steps; [] if they agree bit for bit."""
    found = []
    for name, title in _COLUMNS.items():
        pairs = [
            (step, then.get(step, {}).get(name), now.get(step, {}).get(name))
            for step in range(1, steps + 1)
        ]
        different = [pair for pair in pairs if pair[1] != pair[2]]
        if different:
            found.append(f"{title}: {_described(different, len(pairs))}")
    return found


def _described(different: list[tuple[int, Any, Any]], steps: int) -> str:
    step, before, after = different[0]
    gaps = [
        (abs(b - a), s)
        for s, a, b in different
        if isinstance(a, (int, float)) and isinstance(b, (int, float))
    ]
    text = f"differs from step {step} on: {before!r} in the run, {after!r} here"
    if not gaps:
        return text
    if gaps[0][1] == step:
        text += f", by {gaps[0][0]:.3g}"
    largest, where = max(gaps)
    return (
        text
        + f"; {len(different)} of {steps} steps differ, at most by {largest:.3g} (step {where})"
    )


def compare_digests(
    then: Mapping[int, str], now: Mapping[int, str]
) -> tuple[list[int], int | None]:
    """Returns the steps after which trained tensors agree, and the first one where they do not."""
    both = sorted(then.keys() & now.keys())
    first = next((step for step in both if then[step] != now[step]), None)
    return [step for step in both if first is None or step < first], first


def digest_lines(agreeing: list[int], first: int | None, amount: str) -> list[str]:
    """Returns what digests say of the trained tensors.

    Args:
        agreeing, first: see `compare_digests`.
        amount: by how much they differ, if that is known.
    """
    lines = []
    if agreeing:
        after = ", ".join(map(str, agreeing))
        lines.append(f"trained tensors: equal bit for bit after {after} steps")
    if first is not None:
        lines.append(f"trained tensors: different after {first} steps{amount}")
    return lines or ["trained tensors: not compared, the log has no digest of them"]
