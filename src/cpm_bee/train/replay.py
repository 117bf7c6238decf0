"""Repeats the first steps of a run by its receipt, and compares them bit for bit.

The replay is one process on the CPU, which does what the run did: the same plan of steps, seeds and
number of threads. It neither evaluates nor saves, which changes no weight. A run of several ranks
is repeated with as many micro-batches, which are the batches of its ranks.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cpm_bee.checkpoint.reader import files_of, load_tensors
from cpm_bee.checkpoint.sidecar import METADATA
from cpm_bee.checkpoint.verification import verify_file
from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.mixture import Mixture
from cpm_bee.distributed.rank import RankInfo
from cpm_bee.errors import CpmBeeError, DamagedFile, InputError
from cpm_bee.paths import not_a_file, not_a_folder
from cpm_bee.progress import progress_bar
from cpm_bee.train import replay_report
from cpm_bee.train.checks import Inputs, check
from cpm_bee.train.display import Display
from cpm_bee.train.environment import code_of, environment_of
from cpm_bee.train.hashes import STORED_CRC32, STORED_SHA256
from cpm_bee.train.input_hashes import InputHashes
from cpm_bee.train.log import log_lines
from cpm_bee.train.options import Options
from cpm_bee.train.receipt_reader import read_receipt
from cpm_bee.train.replay_options import ReplayOptions
from cpm_bee.train.replay_settings import replay_settings
from cpm_bee.train.setup import set_up
from cpm_bee.train.trainer import Trainer

_MOST_THREADS, _MOST_RANKS = 1024, 1 << 16
# Settings that change nothing in the steps themselves.
_WITHOUT_EFFECT = {
    *("save", "save_name", "save_interval", "save_minutes", "save_total_limit", "keep_runs"),
    *("resume", "report", "log_interval", "report_to", "task_name", "tensorboard", "dry_run"),
    *("inspect_iters", "verify", "eval_dataset", "eval_interval", "early_stop_patience"),
    *("metric_for_best", "epoch", "max_steps", "init_delta"),
}


class _Log:
    """The steps and digests of a log."""

    def __init__(self, path: Path) -> None:
        if reason := not_a_file(path, "log"):
            raise InputError(f"{path}: {reason}; it has the losses that a replay is compared with")
        self.steps: dict[int, dict[str, Any]] = {}
        self.digests: dict[int, str] = {}
        for _, event in log_lines(path):
            step = event.get("step") if isinstance(event, dict) else None
            if isinstance(step, int) and event.get("event") == "train":
                self.steps[step] = event
            elif isinstance(step, int) and event.get("event") == "digest":
                self.digests[step] = str(event.get("sha256"))


class _Replay(NamedTuple):
    """What a replay did: the part of a receipt that describes it, its log, the trained tensors."""

    part: dict[str, Any]
    log: _Log
    tensors: dict[str, torch.Tensor]


class _Bar(Display):
    """Shows the steps of a replay as a bar, after two seconds."""

    def __init__(self, steps: int) -> None:
        self._bar = progress_bar(total=steps, description="replaying", unit="steps", delay=2)

    def step(self, values: dict[str, Any], **rest: Any) -> None:
        self._bar.update(1)

    def line(self, text: str) -> None:
        pass

    def close(self) -> None:
        self._bar.close()


def verify(options: ReplayOptions) -> tuple[str, int]:
    """Compare a run with its replay; returns a text for people, and 0 if they agree, else 1.

    Raises:
        InputError: the receipt cannot be used, or files of the run cannot be found or read.
        RunError: the replay failed.
    """
    if RankInfo.of_this_process().world_size > 1:
        raise InputError("verify.py is one process: start it without torchrun")
    receipt = read_receipt(options.receipt)
    path, part = Path(options.receipt), first_part(receipt, options.receipt)
    log_path = path.with_name(path.name.removesuffix("-receipt.json") + "-log.jsonl")
    log = _Log(log_path)
    steps = min(options.steps, _replayable(receipt["parts"], max(log.steps, default=0)))
    if steps < 1:
        raise InputError(f"{log_path}: there are no steps in it to compare with")
    threads = options.threads or part["environment"]["threads"]
    with tempfile.TemporaryDirectory(prefix="cpm_bee-replay-") as folder, _threads(threads):
        again = replay_settings(part, options, steps, folder)
        inputs = check(again, saves=False)
        found = [*_changed_log(receipt, log_path), *_damaged_data(inputs)]
        with _naming(found):
            replay = _replay(again, inputs, part, options)
    found += [*_damaged_base(replay.part), *replay_report.differences(part, replay.part)]
    lines = [
        f"{path}: {_status(receipt)}; {steps} steps done again on the CPU",
        *(f"different beforehand: {line}" for line in found),
        *replay_report.compared_by_fingerprint(part, replay.part),
    ]
    if not found:
        lines.append("beforehand, inputs, code and environment are those of the run")
    different = replay_report.compare_steps(log.steps, replay.log.steps, steps)
    lines += different or [
        "loss, gradient norm, learning rate and tokens: equal bit for bit in all steps"
    ]
    agreeing, first = replay_report.compare_digests(log.digests, replay.log.digests)
    amount = ""
    if first is not None and steps == _last_step(receipt):
        amount = _distance(receipt, path, replay.tensors)
    lines += replay_report.digest_lines(agreeing, first, amount)
    if not different and first is None:
        lines.append(f"agrees: the first {steps} steps are those of the run, bit for bit")
        return "\n".join(lines), 0
    dropout = again.delta_dropout > 0 or inputs.pretrained.model.config.dropout_p > 0
    reasons = replay_report.reasons_to_differ(part, dropout=dropout)
    lines += [f"bit equality is not to be expected: {reason}" for reason in reasons]
    return "\n".join([*lines, "differs"]), 1


def first_part(receipt: dict[str, Any], path: str) -> dict[str, Any]:
    """The part of a receipt that has how the first steps were done.

    Raises:
        InputError: there is none, or it cannot be repeated.
    """
    part = next(iter(receipt["parts"]), None)
    if part is None or part["steps_before"] > 0:
        raise InputError(
            f"{path}: how the first steps of this run were done is not in it: they were done "
            "before it had a receipt"
        )
    for name, most in (("threads", _MOST_THREADS), ("ranks", _MOST_RANKS)):
        if not 0 < part["environment"][name] <= most:
            raise InputError(
                f"{path}: a run with {part['environment'][name]} {name} cannot be repeated"
            )
    return dict(part)


def _status(receipt: dict[str, Any]) -> str:
    step = _last_step(receipt)
    return str(receipt["status"]) + (f" after {step} steps" if step is not None else "")


def _last_step(receipt: dict[str, Any]) -> int | None:
    step = (receipt.get("result") or {}).get("step")
    return step if isinstance(step, int) else None


def _replayable(parts: list[dict[str, Any]], last: int) -> int:
    """The steps that were done as the first ones: later parts may have other settings."""
    first = parts[0]

    def what_counts(part: dict[str, Any]) -> Any:
        settings = {k: v for k, v in part["settings"].items() if k not in _WITHOUT_EFFECT}
        return settings, part["environment"], part["code"].get("source")

    for part in parts[1:]:
        if what_counts(part) != what_counts(first):
            return min(last, int(part["steps_before"]))
    return last


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _naming(found: list[str]) -> Iterator[None]:
    """Have an error of the replay name what differs beforehand, which may be its reason."""
    try:
        yield
    except CpmBeeError as error:
        if not found:
            raise
        text = "\n".join(f"  {line}" for line in found)
        raise type(error)(f"{error}\nthese differ from the run:\n{text}") from error


def _changed_log(receipt: dict[str, Any], path: Path) -> list[str]:
    noted = (receipt.get("result") or {}).get("log") or {}
    size = noted.get("bytes")
    if not isinstance(size, int):
        return []  # a run that was killed
    with open(path, "rb") as file:
        now = hashlib.sha256(file.read(size)).hexdigest()
    return [] if now == noted.get("sha256") else [f"log: {path} has changed since the run ended"]


def _damaged_data(inputs: Inputs) -> list[str]:
    """Names data with other bytes than its own checksums say, which no stored hash tells."""
    found = []
    data = inputs.datasets["--dataset"]
    for dataset in data.datasets if isinstance(data, Mixture) else [data]:
        try:
            dataset.compare_all()
        except DamagedFile as error:
            found.append(f"data: {str(error).splitlines()[0]}")
    return found


def _damaged_base(now: dict[str, Any]) -> Iterator[str]:
    path = now["base"]["path"]
    files = [] if path is None else files_of(Path(path))
    for file, known in zip(files, now["base"]["files"], strict=True):
        if known.get("kind") in (STORED_CRC32, STORED_SHA256):
            try:
                verify_file(file)
            except DamagedFile as error:
                yield f"base: {str(error).splitlines()[0]}"


def _replay(
    options: Options, inputs: Inputs, part: dict[str, Any], given: ReplayOptions
) -> _Replay:
    evaluation = part["data"].get("eval-dataset")
    datasets: dict[str, BinaryDataset | Mixture] = dict(inputs.datasets)
    folder = given.eval_dataset or (evaluation[0]["path"] if evaluation else None)
    if folder is not None and not_a_folder(folder) is None:
        datasets["--eval-dataset"] = BinaryDataset(folder)
    hashes = InputHashes(options, replace(inputs, datasets=datasets))
    hashes.background.wait()
    steps = options.max_steps or 0
    with set_up(options, inputs, _Bar(steps)) as run:
        trainer = Trainer(
            run.model, run.engine, run.training, None, options, run.files, run.reporter, run.state,
            digests=run.digests,
        )  # fmt: skip
        trainer.replay()
        environment = environment_of(run.engine, run.model)
        tensors = run.engine.trained_tensors()
        log = _Log(run.files.log)
    now = {**hashes.current(), "code": code_of(), "environment": environment}
    return _Replay(now, log, tensors)


def _distance(receipt: dict[str, Any], path: Path, tensors: dict[str, torch.Tensor]) -> str:
    """How far trained tensors are from the last weights of the run, where these are beside it."""
    name = ((receipt["result"].get("weights") or {}).get("last") or {}).get("file")
    if not isinstance(name, str) or Path(name).name != name or not path.with_name(name).is_file():
        return ""
    saved = load_tensors(path.with_name(name), "weights")
    saved.pop(METADATA, None)
    if saved.keys() != tensors.keys() or any(saved[n].shape != t.shape for n, t in tensors.items()):
        return ""
    gaps = {n: (saved[n].float() - t.float()).abs().max().item() for n, t in tensors.items()}
    worst = max(gaps, key=lambda name: gaps[name])
    return f", at most by {gaps[worst]:.3g} ({worst})"
