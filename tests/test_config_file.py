"""`--config FILE`: the file and the command line mean the same, and mistakes are named by line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import properties
import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from support import ROOT

from cpm_bee.checkpoint.options import MergeOptions
from cpm_bee.cli import not_negative, positive, whole_number
from cpm_bee.data.preprocess.options import PreprocessOptions
from cpm_bee.errors import InputError
from cpm_bee.evaluate.options import EvaluateOptions
from cpm_bee.generate.command_options import TextGenerationOptions
from cpm_bee.options import CommandOptions, Flag
from cpm_bee.train.model_options import probabilities
from cpm_bee.train.options import Options


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def parse(folder: Path, text: str, *arguments: str, script: Any = Options) -> Any:
    return script.parse(["--config", write(folder, text), *arguments])


def mistakes(folder: Path, text: str, script: Any = Options) -> list[str]:
    """The lines of the message, without the path of the file."""
    with pytest.raises(InputError) as caught:
        parse(folder, text, script=script)
    return str(caught.value).replace(str(folder / "run.yaml"), "FILE").splitlines()


# ------------------------------------------------------------------ a file means what flags mean

_texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
# Words that YAML takes for something else.
_words = st.sampled_from(
    ["no", "null", "1e-4", "true", "~", "0x10", "2024-01-01", "- a", "a: b", "#"]
)


def values_of(flag: Flag) -> st.SearchStrategy[Any]:
    """Values that the command line can give a flag of fine-tuning."""
    if flag.is_switch:
        return st.booleans()
    if flag.choices is not None:
        return st.sampled_from(list(flag.choices))
    if flag.name == "report_to":
        return st.just(()) | st.just(("tensorboard", "wandb"))
    if flag.type is probabilities:
        return st.sampled_from([(1.0,), (0.7, 0.2, 0.1), (1e-5, 0.99999), (0.0, 0.0, 1.0)])
    if flag.is_list:
        items = st.text("abc_0\u6625", min_size=1, max_size=4)
        return st.lists(items, max_size=3).map(tuple)
    if flag.type in (positive, not_negative):
        return st.integers(1, 10**12)
    if flag.type is whole_number:
        return st.integers(-(10**12), 10**12)
    if flag.type is not None:
        return st.floats(1.001, 1e30) | st.sampled_from([1e16, 2.0])
    return _texts | _words


@st.composite
def training_options(draw: st.DrawFn) -> Options:
    values = {}
    for flag in Options.flags():
        value = values_of(flag)
        values[flag.name] = draw(st.none() | value if flag.default is None else value)
    return Options(**values)


@given(options=training_options())
@properties.examples(60, HealthCheck.function_scoped_fixture)
def test_any_options_written_and_read_back_are_equal(tmp_path: Path, options: Options) -> None:
    text = options.as_config(["a note"])
    assert parse(tmp_path, text) == options
    plain = yaml.safe_load(text)  # other readers of YAML take the same from it
    assert set(plain) == {flag.flag[2:] for flag in Options.flags()}
    assert (plain["lr"], plain["save"]) == (options.lr, options.save)


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        ("lr: 1e-4", ["--lr", "1e-4"]),
        ("lr: 1E4", ["--lr", "1E4"]),
        ("lr: .5", ["--lr", ".5"]),
        ("lr: '1e-4'", ["--lr", "1e-4"]),
        ("max_steps: 1.", ["--max-steps", "1."]),
        ("max-steps: ~", []),
        ("vocab:", []),
        ("use-delta: true", ["--use-delta"]),
        ("use_delta: yes", ["--use-delta"]),
        ("use_delta: off", []),
        ("quantize: none", ["--quantize", "none"]),
        ("report: none", ["--report", "none"]),
        ("resume: true", ["--resume"]),
        ("resume: false", []),
        ("resume: auto", ["--resume", "auto"]),
        ("resume: a/b.pt", ["--resume", "a/b.pt"]),
        ("delta-targets: w_0, w_1", ["--delta-targets", "w_0,w_1"]),
        ("delta-targets: [w_0, w_1]", ["--delta-targets", "w_0,w_1"]),
        ("delta-targets:\n- w_0\n- w_1", ["--delta-targets", "w_0,w_1"]),
        ("report-to: []", []),
        ("save-name: 123", ["--save-name", "123"]),
        ("save-name: no", ["--save-name", "no"]),
        ("save-name: 'true'", ["--save-name", "true"]),
        ("task-name: 2024-01-01", ["--task-name", "2024-01-01"]),
        ("load: 春天 # a comment", ["--load", "春天"]),
    ],
)
def test_a_line_means_what_its_flag_means(tmp_path: Path, line: str, flags: list[str]) -> None:
    assert parse(tmp_path, f"dataset: x\n{line}\n") == Options.parse(["--dataset", "x", *flags])


@pytest.mark.parametrize(
    ("script", "text", "flags"),
    [
        (TextGenerationOptions, "choices: true", ["--choices"]),
        (TextGenerationOptions, "choices: average-orders 3", ["--choices", "average-orders", "3"]),
        (TextGenerationOptions, "choices: [average-orders, 3]", ["--choices=average-orders", "3"]),
        (TextGenerationOptions, "choices: no", []),
        (EvaluateOptions, "keep: [id, source]", ["--keep", "id,source"]),
        (PreprocessOptions, "columns: {question: q}", ["--columns", "question=q"]),
        (PreprocessOptions, "workers: 2\nescape: on", ["--workers", "2", "--escape"]),
        (MergeOptions, "delta: a.pt=0.5", ["--delta", "a.pt=0.5"]),
        (MergeOptions, "delta: [a.pt, b.pt=2]", ["--delta", "a.pt", "--delta", "b.pt=2"]),
    ],
)
def test_flags_of_other_scripts(
    tmp_path: Path, script: type[CommandOptions], text: str, flags: list[str]
) -> None:
    required = [part for f in script.flags() if f.required and f.flag not in flags
                for part in (f.flag, "x")]  # fmt: skip
    if flags[:1] == ["--choices=average-orders"]:
        flags = ["--choices", "average-orders", "3"]
    assert parse(tmp_path, text, *required, script=script) == script.parse([*required, *flags])


# ------------------------------------------------------------------ with the command line


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    text = "dataset: x\nlr: 2\nuse-delta: true\nreport-to: [wandb]\nresume: true\n"
    options = parse(tmp_path, text, "--lr", "3", "--report-to=tensorboard", "--resume", "never")
    assert (options.lr, options.report_to, options.resume) == (3, ("tensorboard",), "never")
    assert (options.dataset, options.use_delta) == ("x", True)
    merge = "delta: [a.pt, b.pt]\nload: x\noutput: y\n"
    deltas = parse(tmp_path, merge, "--delta", "c.pt", script=MergeOptions).delta
    assert [delta.path for delta in deltas] == ["c.pt"]


def test_required_flags_may_be_in_the_file_and_an_empty_one_is_no_mistake(tmp_path: Path) -> None:
    assert parse(tmp_path, "dataset: x").dataset == "x"
    assert parse(tmp_path, "# nothing\n", "--dataset", "y").dataset == "y"
    with pytest.raises(InputError, match="--dataset"):
        parse(tmp_path, "lr: 1")
    with pytest.raises(InputError, match=r"--learning_rate \(did you mean --lr\?\)"):
        parse(tmp_path, "dataset: x", "--learning_rate", "1")


def test_the_last_file_counts(tmp_path: Path) -> None:
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("dataset: x\nlr: 2")
    second.write_text("dataset: y")
    options = Options.parse(["--config", str(first), f"--config={second}"])
    assert (options.dataset, options.lr) == ("y", 1e-4)


# ------------------------------------------------------------------ mistakes


def test_all_mistakes_are_named_at_once_with_their_lines(tmp_path: Path) -> None:
    text = """\
learning_rate: 3
lr: 1
use_delta: 1
load-in-4bit: true
batch-size: x
report-to: [tensorboard, foo]
eval: 3
use-delta: true
dtype: fp8
max-length:
debug: true
something: 1
[a]: 2
load: [x]
vocab: {a: b}
delta-targets: [[a]]
seed: true
save: true
--epoch: 2
quantize: !!python/name:os.system
lr: 2
lang: zh
"""
    assert mistakes(tmp_path, text) == [
        "--config FILE: these settings cannot be used:",
        "  FILE:1: unknown setting 'learning_rate' (did you mean lr?)",
        "  FILE:3: use_delta: '1' is neither true nor false",
        "  FILE:4: unknown setting 'load-in-4bit' (did you mean quantize: nf4?)",
        "  FILE:5: batch-size: 'x' is not a whole number",
        "  FILE:6: report-to: 'foo' is no logger; there are tensorboard, wandb, swanlab, trackio",
        "  FILE:7: unknown setting 'eval' (did you mean eval-dataset or eval-interval?)",
        "  FILE:8: use-delta is also in line 3; keep one of them",
        "  FILE:9: dtype: 'fp8' is none of auto, fp32, bf16, fp16",
        "  FILE:10: max-length: has no value; leave out the line for the default",
        "  FILE:11: debug: --debug is given on the command line",
        "  FILE:12: unknown setting 'something'",
        "  FILE:13: the name of a flag is expected before the colon",
        "  FILE:14: load: is a list; expected one value",
        "  FILE:15: vocab: is a mapping; expected one value",
        "  FILE:16: delta-targets: expected single values in it",
        "  FILE:17: seed: is true; expected a value, or text in quotes",
        "  FILE:18: save: is true; expected a value, or text in quotes",
        "  FILE:19: unknown setting '--epoch' (did you mean epoch?)",
        "  FILE:20: quantize: the tag 'tag:yaml.org,2002:python/name:os.system' is not allowed",
        "  FILE:21: lr is also in line 2; keep one of them",
        "  FILE:22: lang: --lang is given on the command line",
        "see: python finetune_cpm_bee.py --help",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: [1", "--config FILE:1: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("lr: 1\n\tepoch: 2", "--config FILE:2: not YAML: "),
        ("lr: *nothing", "--config FILE:1: not YAML: found undefined alias 'nothing'"),
        ("a: 1\n---\nb: 2", "--config FILE:2: not YAML: but found another document"),
        ("lr: \x07", "--config FILE: not YAML: unacceptable character"),
        ("[" * 5000, "--config FILE: nested too deeply"),
        ("- lr", "--config FILE: expected lines of the form FLAG: VALUE, such as lr: 1e-4"),
        ("lr", "--config FILE: expected lines of the form FLAG: VALUE, such as lr: 1e-4"),
        ("#" * (2 << 20), "--config FILE: has 2,097,152 bytes; "),
    ],
    ids=lambda value: value[:12],
)
def test_what_is_no_file_of_settings(tmp_path: Path, text: str, message: str) -> None:
    assert mistakes(tmp_path, text)[0].startswith(message)


def test_wrong_encoding_and_no_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("save: 春".encode("gbk"))
    for given_file, message in ((path, "not UTF-8 text"), (tmp_path / "no", "no such config file")):
        with pytest.raises(InputError, match=message):
            Options.parse(["--config", str(given_file)])


def test_a_tagged_value_runs_nothing(tmp_path: Path) -> None:
    target = tmp_path / "made"
    text = f"save: !!python/object/apply:os.mkdir ['{target}']\ndataset: x"
    assert "is a list" in mistakes(tmp_path, text)[1]
    assert not target.exists()


def test_the_config_of_a_model_is_recognised(root: Path) -> None:
    path = root / "config" / "cpm-bee-tiny.json"
    with pytest.raises(InputError) as caught:
        Options.parse(["--config", str(path)])
    assert str(caught.value).endswith(f"is given with --model-config {path}")


# ------------------------------------------------------------------ quick


@pytest.mark.parametrize("with_file", [True, False])
def test_yaml_is_imported_only_for_a_file(tmp_path: Path, with_file: bool) -> None:
    flags = ["--config", write(tmp_path, "dataset: x")] if with_file else ["--dataset", "x"]
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n"
        "from cpm_bee.train.options import Options\n"
        f"assert Options.parse({flags!r}).dataset == 'x'\n"
        "print([name in sys.modules for name in ('yaml', 'torch')])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == f"[{with_file}, False]\n"
