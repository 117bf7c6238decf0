"""Flags of other tools and misspelt ones get a hint that can be followed."""

from __future__ import annotations

import pytest
from support import run_script

from cpm_bee import hints
from cpm_bee.checkpoint.options import ConvertOptions, MergeOptions
from cpm_bee.cli import ArgumentParser, positive
from cpm_bee.data.forms.options import ConvertDataOptions
from cpm_bee.data.inspect.options import InspectOptions
from cpm_bee.data.preprocess.options import PreprocessOptions
from cpm_bee.doctor.options import DoctorOptions
from cpm_bee.errors import InputError
from cpm_bee.evaluate.options import EvaluateOptions
from cpm_bee.generate.command_options import TextGenerationOptions
from cpm_bee.options import CommandOptions, Group
from cpm_bee.serve.options import ServeOptions
from cpm_bee.train.options import Options
from cpm_bee.train.plan.options import PlanOptions
from cpm_bee.train.replay_options import ReplayOptions

SCRIPTS: list[type[CommandOptions]] = [Options, TextGenerationOptions, PreprocessOptions]
SCRIPTS += [EvaluateOptions, MergeOptions, ConvertOptions, DoctorOptions, ServeOptions]
SCRIPTS += [ConvertDataOptions, InspectOptions, ReplayOptions, PlanOptions]
TABLES = [hints.FINETUNE, hints.GENERATE, hints.PREPROCESS, hints.EVALUATE, hints.MERGE]
TABLES += [hints.CONVERT, hints.DOCTOR, hints.SERVE, hints.CONVERT_DATA, hints.INSPECT]
TABLES += [hints.VERIFY, hints.PLAN]
HINTS = [(o, theirs, ours) for o in SCRIPTS for theirs, ours in o.hints.items()]


def usage_error(options: type[CommandOptions], *arguments: str) -> str:
    with pytest.raises(InputError) as caught:
        options.parse(arguments)
    return str(caught.value)


def test_every_table_belongs_to_a_script() -> None:
    assert [o.hints for o in SCRIPTS] == TABLES


@pytest.mark.parametrize(
    ("options", "theirs", "ours"), HINTS, ids=[f"{o.script} {t}" for o, t, _ in HINTS]
)
def test_what_a_hint_names_exists(options: type[CommandOptions], theirs: str, ours: str) -> None:
    """As an argument of that script: the flag, and the value where the hint has one."""
    flags = {flag.flag: flag for flag in options.flags()}
    assert theirs not in flags, "the table hides nothing: a known flag gets no hint"
    name, _, value = ours.partition(" ")
    assert name in flags
    if value:
        assert value in (flags[name].choices or ()) or name == "--device"
    for spelling in (theirs, "--" + theirs[2:].replace("-", "_")):
        first, see = usage_error(options, spelling, "1").splitlines()
        assert first == f"unrecognized arguments: {spelling} (did you mean {ours}?)"
        assert see == f"see: python {options.script} --help"


@pytest.mark.parametrize(
    ("options", "theirs", "ours"),
    [
        (Options, "--learning_rate", "--lr"),
        (Options, "--num_train_epochs", "--epoch"),
        (Options, "--gradient_accumulation_steps", "--accumulate"),
        (Options, "--warmup_steps", "--warmup-iters"),
        (Options, "--output_dir", "--save"),
        (Options, "--lora_rank", "--delta-rank"),
        (Options, "--lora_alpha", "--delta-alpha"),
        (Options, "--lora_target_modules", "--delta-targets"),
        (Options, "--resume_from_checkpoint", "--resume"),
        (Options, "--per_device_train_batch_size", "--batch-size"),
        (Options, "--model_name_or_path", "--load"),
        (Options, "--load_in_4bit", "--quantize nf4"),
        (Options, "--gradient_checkpointing", "--checkpointing full"),
        (Options, "--max_grad_norm", "--clip-grad"),
        (Options, "--cutoff_len", "--max-length"),
        (Options, "--deepspeed", "--parallel fsdp"),
        (Options, "--bf16", "--dtype bf16"),
        (TextGenerationOptions, "--num_beams", "--beam-size"),
        (TextGenerationOptions, "--max_new_tokens", "--max-length"),
        (TextGenerationOptions, "--output_dir", "--output"),
        (PreprocessOptions, "--output_dir", "--output-path"),
        (MergeOptions, "--adapter", "--delta"),
        (ConvertOptions, "--max_shard_size", "--shard-size"),
    ],
)
def test_names_that_people_bring_along(
    options: type[CommandOptions], theirs: str, ours: str
) -> None:
    assert options.parser().hint(theirs) == ours


def test_names_of_other_scripts_are_not_offered() -> None:
    assert "--max-new-tokens" not in hints.FINETUNE  # its --max-length is that of a row
    assert Options.parser().hint("--num_beams") is None
    assert PreprocessOptions.parser().hint("--learning_rate") is None


@pytest.fixture
def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="tool.py", hints={"--width": "--beam-size"})
    for flag in ("--beam-size", "--eval-dataset", "--eval-interval"):
        parser.add_argument(flag)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--text", nargs="?")
    return parser


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("--width", "--beam-size"),
        ("--Width", "--beam-size"),
        ("--beamsize", "--beam-size"),
        ("--bem_size", "--beam-size"),
        ("--datset", "--dataset"),
        ("--eval", "--eval-dataset or --eval-interval"),
        ("--something", None),
        ("--x", None),
    ],
)
def test_aliases_abbreviations_and_misspellings(
    parser: ArgumentParser, given: str, hint: str | None
) -> None:
    assert parser.hint(given) == hint


def test_all_unknown_flags_are_named_even_if_a_required_one_is_missing(
    parser: ArgumentParser,
) -> None:
    with pytest.raises(InputError) as caught:
        parser.parse_args(["--width=3", "--foo", "1", "--beam_size", "2"])
    assert str(caught.value).splitlines() == [
        "unrecognized arguments: --width (did you mean --beam-size?), --foo",
        "see: python tool.py --help",
    ]


def test_text_is_not_taken_for_a_flag(parser: ArgumentParser) -> None:
    arguments = parser.parse_args(["--dataset=--foo", "--text", "--foo is no flag"])
    assert (arguments.dataset, arguments.text) == ("--foo", "--foo is no flag")
    with pytest.raises(InputError, match=r"^unrecognized arguments: -- --foo\n"):
        parser.parse_args(["--dataset", "x", "--", "--foo"])  # argparse's own message


def test_help_is_printed_in_spite_of_unknown_flags(
    parser: ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--foo", "--help"])
    assert caught.value.code == 0
    assert "usage: tool.py" in capsys.readouterr().out


def test_a_script_says_it_and_exits_with_2() -> None:
    done = run_script("src/finetune_cpm_bee.py", "--dataset", "x", "--learning_rate", "1e-4")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[0] == (
        "error: unrecognized arguments: --learning_rate (did you mean --lr?) (explain: E101)"
    )


def test_options_are_declared_with_their_parsers() -> None:
    """check_values applies to values that did not come from a command line."""
    group = Group("g", "组")
    assert group.option(1, "h", "帮", type=positive).metadata["type"] is positive
    with pytest.raises(InputError, match="--beam-size: 0 is less than 1"):
        TextGenerationOptions(input="-", output="-", beam_size=0)
