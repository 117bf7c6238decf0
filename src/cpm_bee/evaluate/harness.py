"""Results in the layout of lm-evaluation-harness: `results_DATE.json`, `samples_TASK_DATE.jsonl`.

Tools that read its results (leaderboards, `lm_eval`'s own tables, notebooks) find the names they
know: `results[TASK]["exact_match,none"]` with `..._stderr,none`, `higher_is_better`, `n-samples`,
and per sample `doc`, `target`, `resps`, `filtered_resps` and the figures. Figures are shares from
0 to 1, apart from BLEU and chrF (0 to 100, as sacrebleu has them).
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpm_bee import __version__
from cpm_bee.evaluate.bootstrap import Comparison, Interval, Statistics
from cpm_bee.evaluate.figures import Figures, Outcome, text_of
from cpm_bee.files import atomic_file
from cpm_bee.records import ANSWER, Record

TASK_VERSION = 1  # of the meaning of the figures


def write_results(
    folder: Path,
    task: str,
    figures: Figures,
    bounds: Sequence[tuple[Interval, float]],
    comparisons: Sequence[Comparison],
    counts: Mapping[str, int],
    settings: Mapping[str, Any],
    samples: Sequence[dict[str, Any]],
) -> tuple[Path, Path]:
    """Write both files; returns their paths.

    Args:
        bounds: the interval and the standard error of each figure.
        counts: "original" and "effective" number of records, and the reasons for the difference.
        settings: what was evaluated: model, delta, dataset, flags.
        samples: see `samples_of`.
    """
    now = datetime.datetime.now().astimezone()
    date = now.strftime("%Y-%m-%dT%H-%M-%S.%f")
    name = re.sub(r"[^\w.-]", "_", task)
    results: dict[str, Any] = {"alias": task}
    for own, (interval, error) in zip(figures.statistics, bounds, strict=True):
        results[f"{own.key},none"] = _finite(own.figure)
        results[f"{own.key}_stderr,none"] = _finite(error)
        results[f"{own.key}_interval,none"] = [*map(_finite, interval)]
    for comparison in comparisons:
        results[f"{comparison.statistics.key}_difference,none"] = _finite(comparison.difference)
        results[f"{comparison.statistics.key}_difference_interval,none"] = [
            *map(_finite, comparison.interval)
        ]
    summary = {
        "results": {task: results},
        "group_subtasks": {task: []},
        "configs": {task: {"task": task, "output_type": "generate_until", **settings}},
        "versions": {task: TASK_VERSION},
        "n-shot": {task: 0},
        "higher_is_better": {task: {s.key: s.higher_is_better for s in figures.statistics}},
        "n-samples": {task: dict(counts)},
        "config": {"model": "cpm_bee", "model_args": dict(settings), "batch_size": "auto"},
        "signatures": figures.signatures,
        "cpm_bee_version": __version__,
        "date": now.timestamp(),
    }
    result_path = folder / f"results_{date}.json"
    sample_path = folder / f"samples_{name}_{date}.jsonl"
    with atomic_file(sample_path) as file:
        file.writelines(json.dumps(s, ensure_ascii=False) + "\n" for s in samples)
    with atomic_file(result_path) as file:
        file.write(json.dumps(summary, ensure_ascii=False, indent=2) + "\n")
    return result_path, sample_path


def samples_of(
    records: Sequence[Record],
    where: Sequence[str],
    outcome: Outcome,
    statistics: Sequence[Statistics],
) -> list[dict[str, Any]]:
    """A line for each record: what was asked, the right answer, the model's, and its figures."""
    keys = [s for s in statistics if s.rows.shape[1] == 2 and s.key != "perplexity"]
    lines = []
    for i, record in enumerate(records):
        target, written = text_of(record[ANSWER]), text_of(outcome.answers[i])
        prompt = json.dumps({**record, ANSWER: ""}, ensure_ascii=False)
        own = {s.key: s.rows[i, 0] / s.rows[i, 1] for s in keys if s.rows[i, 1]}
        lines.append(
            {
                "doc_id": i,
                "doc": record,
                "target": target,
                "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": {"until": []}}},
                "resps": [[written]],
                "filtered_resps": [written],
                "filter": "none",
                "metrics": list(own),
                "doc_hash": _digest(json.dumps(record, ensure_ascii=False)),
                "prompt_hash": _digest(prompt),
                "target_hash": _digest(target),
                "where": where[i],
                "loss": outcome.scores.losses[i] / outcome.scores.targets[i],
                "choice": outcome.choices[i],
                **own,
            }
        )
    return lines


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
