"""docs/moving.md: each flag that it names exists, and each mapping is that of our hints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import ROOT

from cpm_bee.checkpoint.options import MergeOptions
from cpm_bee.data.forms.options import ConvertDataOptions
from cpm_bee.data.preprocess.options import PreprocessOptions
from cpm_bee.generate.command_options import TextGenerationOptions
from cpm_bee.options import CommandOptions
from cpm_bee.train.options import Options

PAGES = [ROOT / "docs" / "moving.md", ROOT / "docs" / "zh" / "moving.md"]
SCRIPTS: dict[str, type[CommandOptions]] = {
    options.script: options
    for options in (
        Options,
        TextGenerationOptions,
        PreprocessOptions,
        ConvertDataOptions,
        MergeOptions,
    )
}
# All flags of the original's fine-tuning, as its own parser declares them.
# First those without a default there, or with another one here, as the page says.
WITHOUT_DEFAULT = ["model-config", "load", "dataset", "eval_dataset", "save", "save-name"]
WITHOUT_DEFAULT += ["tensorboard"]
# The others, with their defaults there.
ORIGINAL_DEFAULTS = {
    "inspect-iters": 1000, "batch-size": 32, "clip-grad": 1.0, "train-iters": 1000000,
    "max-length": 512, "seed": 1234, "lr": 1e-4, "weight-decay": 1e-2, "loss-scale": 1048576,
    "loss-scale-factor": 2, "loss-scale-steps": 512, "warmup-iters": 100,
    "lr-decay-style": "noam", "lr-decay-iters": None, "start-step": 0, "epoch": 1,
    "task-name": "task", "use-delta": False, "drop-last": False, "eval-interval": 500,
    "early-stop-patience": 5,
}  # fmt: skip

pages = pytest.mark.parametrize("page", PAGES, ids=["english", "chinese"])


def flags_of(options: type[CommandOptions]) -> dict[str, object]:
    return {flag.flag: flag for flag in options.flags()}


def mappings(page: Path) -> list[tuple[str, str, str]]:
    """(script, foreign name, ours) of each row of the tables that are marked."""
    text = page.read_text(encoding="utf-8")
    found = []
    for script, table in re.findall(r"<!-- hints: (\S+) -->\n((?:\|.*\n)+)", text):
        for row in table.splitlines()[2:]:
            theirs, ours = (re.findall("`([^`]+)`", cell) for cell in row.split("|")[1:3])
            found += [(script, name, ours[0]) for name in theirs]
    return found


@pages
def test_each_mapping_is_that_of_the_hints(page: Path) -> None:
    found = mappings(page)
    assert {script for script, _, _ in found} == set(SCRIPTS)
    assert len(found) > 40
    for script, theirs, ours in found:
        hint = SCRIPTS[script].hints.get("--" + theirs.replace("_", "-"))
        assert hint == ours, f"{script}: {theirs}"


@pages
def test_flags_of_equal_name_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    (sentence,) = re.findall(r"^`eval_dataset`.*?\n\n", text, re.M | re.S)
    names = [n for n in re.findall("`([^`]+)`", sentence) if not n.startswith("-")]
    assert len(names) == 6
    for name in names:
        flag = "--" + name.replace("_", "-")
        assert flag in sentence and flag in flags_of(Options)
    (sentence,) = re.findall(r"^`temperature`.*?\n\n", text, re.M | re.S)
    for name in re.findall(r"`([a-z_]+)`", sentence):
        assert "--" + name.replace("_", "-") in flags_of(TextGenerationOptions)


@pages
def test_all_flags_of_the_original_are_here(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    (sentence,) = re.findall(r"`--model-config`[,、]\s.*?`--early-stop-patience`", text, re.S)
    original = {*WITHOUT_DEFAULT, *ORIGINAL_DEFAULTS}
    assert {name[2:] for name in re.findall("`([^`]+)`", sentence)} == original
    flags = flags_of(Options)
    for name in original:
        assert "--" + name.replace("_", "-") in flags, name


def test_their_defaults_are_those_of_the_original() -> None:
    options = Options.parse(["--dataset", "x"])
    for name, value in ORIGINAL_DEFAULTS.items():
        assert getattr(options, name.replace("-", "_")) == value, name
