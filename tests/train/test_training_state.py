"""--metric-for-best: which evaluation is the best one, and that a resumed run keeps the metric."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from train_support import Workspace, train

from cpm_bee.checkpoint.reader import load_tensors, save_tensors
from cpm_bee.errors import InputError
from cpm_bee.train import trainer
from cpm_bee.train.evaluation import Evaluation
from cpm_bee.train.log import best_loss_of
from cpm_bee.train.training_state import TrainingState


def test_the_best_by_each_metric() -> None:
    figures = [(2.0, 0.1), (1.0, 0.3), (1.5, 0.3), (0.9, 0.2), (0.8, 0.3), (3.0, 0.4)]
    for metric, expected in (
        ("loss", [True, True, False, True, True, False]),
        ("exact_match", [True, True, False, False, True, True]),
    ):
        state = TrainingState()
        assert [state.add_evaluation(*pair, metric) for pair in figures] == expected
        last = max(i for i, best in enumerate(expected) if best)
        assert (state.best_loss, state.best_exact_match) == figures[last]
        assert state.evaluations_without_gain == len(figures) - 1 - last
        state.forget_best()
        assert math.isinf(state.best_loss) and state.evaluated_step == -1
        assert state.add_evaluation(9.0, 0.0, metric)


def test_the_best_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert math.isinf(best_loss_of(log, "loss"))
    pairs = [(2.0, 0.1), (1.0, 0.5), (0.5, 0.25)]
    events = [{"event": "eval", "step": 1, "loss": a, "exact_match": b} for a, b in pairs]
    log.write_text("".join(json.dumps(e) + "\n" for e in events))
    assert best_loss_of(log, "loss") == 0.5
    assert best_loss_of(log, "exact_match") == 1.0


def figures(monkeypatch: pytest.MonkeyPatch, *pairs: tuple[float, float]) -> None:
    rest = iter(pairs)

    def evaluate(*_: Any) -> Evaluation:
        loss, exact_match = next(rest)
        return Evaluation(loss, 0.5, exact_match, 20)

    monkeypatch.setattr(trainer, "evaluate", evaluate)


def test_early_stopping_by_exact_match(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures(monkeypatch, (5.0, 0.1), (4.0, 0.5), (3.0, 0.4), (2.0, 0.3))
    run = train(
        workspace, tmp_path, use_delta=True, eval_dataset=workspace.eval, eval_interval=1,
        metric_for_best="exact_match", early_stop_patience=2,
    )  # fmt: skip
    assert run.reason == "early stop: 2 evaluations in a row without a higher exact match"
    assert run.column("step", "eval") == [0, 1, 2, 3]
    best = load_tensors(tmp_path / "cpm_bee_finetune-delta-best.pt", "weights")
    assert best.keys()
    short = train(workspace, tmp_path / "short", use_delta=True, max_steps=1)
    weights, expected = run.weights("best"), short.weights("last")
    assert all((weights[name] - expected[name]).abs().max() < 1e-6 for name in expected)


def test_another_metric_is_told_when_resuming(workspace: Workspace, tmp_path: Path) -> None:
    flags = {"use_delta": True, "eval_dataset": workspace.eval}
    train(workspace, tmp_path, max_steps=1, **flags)
    told = "--metric-for-best: exact_match, it was 'loss'"
    with pytest.raises(InputError, match=told):
        train(workspace, tmp_path, resume=True, metric_for_best="exact_match", **flags)
    # A state of an earlier version has neither the metric nor the exact match.
    path = tmp_path / "cpm_bee_finetune-state.pt"
    state = load_tensors(path, "a training state")
    assert state.pop("metric_for_best") == "loss"
    assert state["progress"].pop("best_exact_match") >= 0
    save_tensors(path, state)
    with pytest.raises(InputError, match=told):
        train(workspace, tmp_path, resume=True, metric_for_best="exact_match", **flags)
    run = train(workspace, tmp_path, resume=True, max_steps=2, **flags)
    assert run.column("step") == [1, 2]


def test_the_state_holds_all_of_it() -> None:
    assert set(asdict(TrainingState())) >= {"best_loss", "best_exact_match"}
