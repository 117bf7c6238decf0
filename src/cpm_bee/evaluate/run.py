"""Evaluates a model, and a baseline if wanted, from flags to a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpm_bee.data import near_duplicates
from cpm_bee.data.record_source import LocatedRecord, read_located
from cpm_bee.errors import InputError, Problems
from cpm_bee.evaluate import report
from cpm_bee.evaluate.bootstrap import (
    Comparison,
    compare,
    interval,
    standard_error,
    weights_of_samples,
)
from cpm_bee.evaluate.classes import Confusion
from cpm_bee.evaluate.figures import Figures, Kinds, Outcome, classes_given, figures_of, text_of
from cpm_bee.evaluate.harness import samples_of, write_results
from cpm_bee.evaluate.options import EvaluateOptions
from cpm_bee.generate.choices import choose
from cpm_bee.generate.examples import example_settings, read_examples
from cpm_bee.generate.generator import Generator
from cpm_bee.generate.loaded_model import LoadedModel, load_base
from cpm_bee.generate.options import GenerationOptions
from cpm_bee.generate.scoring import MAX_TOKENS, score_records
from cpm_bee.language import said
from cpm_bee.progress import progress_bar
from cpm_bee.records import ANSWER, Record, has_answer

_MOST_DUPLICATES = 5  # shown


def evaluate(options: EvaluateOptions) -> str:
    """Evaluate; returns the report as text, and writes the result files if wanted.

    Raises:
        InputError: flags, model or records are wrong; a package is not installed.
    """
    located = read_located(
        options.dataset, keep=options.keep, escape=options.escape, limit=options.limit
    )
    answered = [one for one in located if has_answer(one.record[ANSWER])]
    if not answered:
        raise InputError(
            f'{options.dataset}: none of its {len(located):,} records has an answer ("<ans>" is '
            "empty everywhere), so there is nothing to compare with"
        )
    _check_field(options, answered)
    records = [one.record for one in answered]
    read_examples(options.examples, escape=options.escape)  # before the model: it may be wrong
    kinds = Kinds.of(records)
    loaded = load_base(options)
    baseline = None
    if options.baseline:
        baseline = figures_of(records, kinds, run_model(loaded, answered, options))
    if options.delta is not None:
        loaded.add_delta(options.delta, options.delta_alpha)
    outcome = run_model(loaded, answered, options)
    settings = {**loaded.settings, **example_settings(options.examples)}
    evaluation = Evaluated(options, located, answered, kinds, outcome, settings)
    return evaluation.report(figures_of(records, kinds, outcome), baseline)


def run_model(
    loaded: LoadedModel, located: Sequence[LocatedRecord], options: EvaluateOptions
) -> Outcome:
    """Score, answer and, where there are options, choose, for each record."""
    model, tokenizer = loaded.base.model, loaded.base.tokenizer
    examples = read_examples(options.examples, escape=options.escape)
    generator = Generator(model, tokenizer, examples)
    records = [one.record for one in located]
    limits = GenerationOptions(beam_size=1, max_length=options.max_length)
    max_tokens = options.max_tokens or MAX_TOKENS
    scores = score_records(model, generator.encoder, records, max_tokens=max_tokens)
    choices = choose(model, generator.encoder, records, max_tokens=max_tokens)
    outputs = progress_bar(
        generator.search(records, limits, options.max_tokens),
        total=len(records),
        description="answering",
        unit="records",
    )
    answers, ended = [], []
    for output in outputs:
        answers.append(output.filled()[ANSWER])
        ended.append(not output.was_cut)
    best = [choice and choice.best for choice in choices]
    return Outcome(scores, answers, np.array(ended, dtype=bool), best)


@dataclass(frozen=True)
class Evaluated:
    """A model's outcome on the answered records of a dataset."""

    options: EvaluateOptions
    located: list[LocatedRecord]  # all
    answered: list[LocatedRecord]
    kinds: Kinds
    outcome: Outcome
    settings: dict[str, Any]

    def report(self, figures: Figures, baseline: Figures | None) -> str:
        """Returns the report; writes the result files if `--output` is given."""
        statistics = figures.statistics
        weights = weights_of_samples(len(self.answered), self.options.seed)
        intervals = [interval(own, weights) for own in statistics]
        comparisons = (
            [compare(*pair, weights) for pair in zip(statistics, baseline.statistics, strict=True)]
            if baseline
            else []
        )
        blocks = [(self._title(), report.figure_lines(statistics, intervals, comparisons))]
        if baseline:
            blocks.append(("", [self._conclusion(comparisons)]))
        if any(right is not None for right in self.kinds.right):
            blocks.append(("classes:", report.class_lines(self._confusion())))
        if self.options.by is not None:
            blocks.append((f"by {self.options.by}:", self._by_field(figures)))
        if self.options.errors:
            blocks.append(("largest losses:", self._largest_losses()))
        if self.options.train_dataset is not None:
            blocks.append(("", self._duplicates(self.options.train_dataset)))
        if self.options.output is not None:
            bounds = [
                (bound, standard_error(own, weights))
                for own, bound in zip(statistics, intervals, strict=True)
            ]
            paths = self._write(Path(self.options.output), figures, bounds, comparisons)
            blocks.append(("", [said(f"written: {path}") for path in paths]))
        return report.joined(blocks)

    def _title(self) -> str:
        model = self.options.load + (f" + {self.options.delta}" if self.options.delta else "")
        left_out = len(self.located) - len(self.answered)
        more = f" ({left_out:,} without an answer left out)" if left_out else ""
        cut = int((~self.outcome.ended).sum())
        lines = [f"{model} on {len(self.answered):,} records of {self.options.dataset}{more}"]
        if cut:
            lines.append(f"{cut:,} answers were cut off at --max-length {self.options.max_length}")
        return "\n".join(lines)

    def _conclusion(self, comparisons: Sequence[Comparison]) -> str:
        first = comparisons[1 if self.kinds.choices.all() else 0]
        about = said(f"{said(first.statistics.name)} against the base model")
        return f"{about}: {report.sentence(first)}"

    def _confusion(self) -> Confusion:
        given = classes_given(self.outcome, self.kinds)
        pairs = [
            (right, own or "")
            for right, own in zip(self.kinds.right, given, strict=True)
            if right is not None
        ]
        return Confusion([right for right, _ in pairs], [own for _, own in pairs])

    def _by_field(self, figures: Figures) -> list[str]:
        values = [text_of(_field(one, self.options.by)) for one in self.answered]
        exact = figures.statistics[0]
        rows = [[said(word) for word in ("value", "exact match", "95 % interval", "records")]]
        for value in sorted(set(values)):
            at = np.array([own == value for own in values])
            own = exact.of(at)
            weights = weights_of_samples(int(at.sum()), self.options.seed)
            bounds = report.shown_interval(interval(own, weights), True)
            rows.append([value, report.shown(own.figure, True), bounds, f"{own.counted:,}"])
        return report.table(rows)

    def _largest_losses(self) -> list[str]:
        scores = self.outcome.scores
        means = scores.losses / scores.targets
        lines = []
        for i in np.argsort(-means, kind="stable")[: self.options.errors].tolist():
            where, record = self.answered[i].where, self.answered[i].record
            written = self.outcome.choices[i] or text_of(self.outcome.answers[i])
            lines += [
                said(f"{where}: loss {means[i]:.2f} per token"),
                said(f"  right answer {text_of(record[ANSWER])!r}, the model's {written!r}"),
            ]
        return lines

    def _duplicates(self, path: str) -> list[str]:
        training = read_located(path, keep=self.options.keep, escape=self.options.escape)
        found = near_duplicates.between(
            (one.record for one in self.answered), (one.record for one in training)
        )
        if not found:
            return [said(f"no near-duplicates of records of {path}")]
        lines = [
            said(
                f"warning: {len(found):,} records ({len(found) / len(self.answered):.1%}) are "
                f"near-duplicates of records of {path}: their figures say little about new texts"
            )
        ]
        lines += [
            f"  {self.answered[own].where} {said('and')} {training[other].where} ({similarity:.0%})"
            for own, other, similarity in found[:_MOST_DUPLICATES]
        ]
        more = len(found) - _MOST_DUPLICATES
        return lines + ([said(f"  ... and {more:,} more")] if more > 0 else [])

    def _write(
        self,
        folder: Path,
        figures: Figures,
        bounds: Sequence[Any],
        comparisons: Sequence[Comparison],
    ) -> tuple[Path, Path]:
        records: list[Record] = [one.record for one in self.answered]
        where = [one.where for one in self.answered]
        counts = {
            "original": len(self.located),
            "effective": len(self.answered),
            "unanswered": len(self.located) - len(self.answered),
            "cut": int((~self.outcome.ended).sum()),
        }
        task = Path(self.options.dataset).stem
        samples = samples_of(records, where, self.outcome, figures.statistics)
        settings = {"--dataset": self.options.dataset, **self.settings}
        return write_results(folder, task, figures, bounds, comparisons, counts, settings, samples)


def _field(one: LocatedRecord, name: str | None) -> Any:
    value = one.kept.get(name, one.record.get(name or "")) if name else None
    return value if isinstance(value, (str, dict)) or value is None else str(value)


def _check_field(options: EvaluateOptions, located: Sequence[LocatedRecord]) -> None:
    if options.by is None:
        return
    problems = Problems(max_shown=5)
    for one in located:
        if options.by not in one.kept and options.by not in one.record:
            problems.add(one.where, "has no such field")
    problems.raise_if_any(f"--by {options.by}:", "a field that is not for the model: --keep FIELD")
