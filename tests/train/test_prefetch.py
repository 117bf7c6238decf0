from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import tiny
import torch

from cpm_bee.data.batch import Batch, collate
from cpm_bee.train import prefetch as module
from cpm_bee.train.prefetch import prefetch

CPU = torch.device("cpu")
BATCH = collate(tiny.encode([{"input": "ab", "<ans>": "a"}]), tiny.TOKENIZER)


def make(step: int) -> Sequence[Batch | None]:
    return [BATCH, None][: step % 3]


@pytest.mark.parametrize("background", [False, True, None])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_steps_come_in_order_with_their_batches(background: bool | None, count: int) -> None:
    found = list(prefetch(iter(range(count)), make, CPU, background=background))
    assert [step for step, _ in found] == list(range(count))
    for step, batches in found:
        assert [b is None for b in batches] == [b is None for b in make(step)]
        assert all(torch.equal(b.ids, BATCH.ids) for b in batches if b is not None)


def test_a_cpu_has_no_thread_and_makes_a_step_when_it_is_due() -> None:
    made: list[tuple[int, int]] = []

    def note(step: int) -> list[Batch | None]:
        made.append((step, threading.get_ident()))
        return []

    steps = prefetch(iter(range(3)), note, CPU)
    next(steps)
    assert made == [(0, threading.get_ident())]


def test_the_next_step_is_made_in_another_thread_while_one_computes() -> None:
    advanced: list[int] = []
    threads = set()
    second_is_made = threading.Event()

    def steps() -> Iterator[int]:
        for step in range(3):
            advanced.append(threading.get_ident())
            yield step

    def note(step: int) -> list[Batch | None]:
        threads.add(threading.get_ident())
        if step == 1:
            second_is_made.set()
        return []

    found = prefetch(steps(), note, CPU, background=True)
    assert next(found)[0] == 0
    assert second_is_made.wait(60)  # we are computing step 0
    assert len(advanced) == 2  # one ahead, not more
    assert [step for step, _ in found] == [1, 2]
    # What exchanges with other ranks does so in one thread, in one order.
    assert set(advanced) == {threading.get_ident()} and len(threads) == 1
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("broken", [0, 1, 3])
def test_an_error_while_making_surfaces_at_its_step(background: bool, broken: int) -> None:
    def breaking(step: int) -> list[Batch | None]:
        if step == broken:
            raise ValueError(f"step {step}")
        return []

    found = []
    with pytest.raises(ValueError, match=f"step {broken}"):
        for step, _ in prefetch(iter(range(4)), breaking, CPU, background=background):
            found.append(step)
    assert found == list(range(broken))


@pytest.mark.parametrize("background", [False, True])
def test_an_error_of_the_steps_surfaces(background: bool) -> None:
    def steps() -> Iterator[int]:
        yield 0
        raise ValueError("a rank is gone")

    with pytest.raises(ValueError, match="a rank is gone"):
        list(prefetch(steps(), make, CPU, background=background))


@pytest.mark.parametrize("by_error", [False, True])
def test_leaving_early_ends_the_thread(by_error: bool) -> None:
    before = threading.active_count()
    found = prefetch(iter(range(1000)), make, CPU, background=True)
    next(found)
    assert threading.active_count() == before + 1
    if by_error:
        with pytest.raises(KeyboardInterrupt):
            found.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    else:
        found.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_on_a_gpu_copies_go_by_pinned_memory_and_a_stream_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The order of calls alone; docs/gpu-checklist.md has the check on a real one."""
    calls: list[str] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name if isinstance(name, str) else "side"

        def record_event(self) -> str:
            calls.append(f"record on {self.name}")
            return "copied"

        def wait_event(self, event: str) -> None:
            calls.append(f"{self.name} waits for {event}")

        def __enter__(self) -> None:
            calls.append(f"enter {self.name}")

        def __exit__(self, *_: object) -> None:
            calls.append(f"leave {self.name}")

    def pin_memory(batch: Batch) -> Batch:
        calls.append("pin")
        return batch

    def to(batch: Batch, device: torch.device) -> Batch:
        calls.append(f"copy to {device}")
        return batch

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("current"))
    monkeypatch.setattr(Batch, "pin_memory", pin_memory)
    monkeypatch.setattr(Batch, "to", to)
    recorded: list[str] = []
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: recorded.append(stream.name)
    )
    copier = module._Copier(torch.device("cuda:0"))
    sent = copier.send([BATCH, None])
    assert calls == ["enter side", "pin", "copy to cuda:0", "record on side", "leave side"]
    assert not recorded
    assert copier.receive(sent) == [BATCH, None]
    assert calls[5:] == ["current waits for copied"]
    assert recorded == ["current"] * len(BATCH.tensors())
