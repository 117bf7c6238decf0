from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT

from cpm_bee.cli import (
    ArgumentParser,
    comma_list,
    not_negative,
    positive,
    real_number,
    run_command,
    whole_number,
)
from cpm_bee.errors import InputError, Problems, RunError


@pytest.fixture
def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="tool.py")
    parser.add_argument("--eval-dataset")
    parser.add_argument("--use-delta", action="store_true")
    parser.add_argument("--batch-size", type=positive, default=2)
    return parser


@pytest.mark.parametrize(
    "arguments",
    [
        ["--eval-dataset", "a_b", "--use-delta", "--batch-size", "3"],
        ["--eval_dataset", "a_b", "--use_delta", "--batch_size", "3"],
        ["--eval_dataset=a_b", "--use_delta", "--batch_size=3."],
    ],
)
def test_hyphens_and_underscores(parser: ArgumentParser, arguments: list[str]) -> None:
    parsed = parser.parse_args(arguments)
    assert (parsed.eval_dataset, parsed.use_delta, parsed.batch_size) == ("a_b", True, 3)
    assert parsed.debug is False


@pytest.mark.parametrize(
    "arguments", [["--eval", "x"], ["--batch-size", "0"], ["--batch-size", "x"], ["--none"]]
)
def test_wrong_usage_exits_with_2_and_one_clear_message(
    parser: ArgumentParser, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: len(vars(parser.parse_args(arguments))))
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "see: python tool.py --help" in message


@given(st.integers())
def test_whole_number_reads_any_integer_exactly(value: int) -> None:
    assert whole_number(str(value)) == value


@pytest.mark.parametrize(
    ("text", "value"), [("1.", 1), ("1.0", 1), ("-3.0", -3), ("1e3", 1000), ("+7", 7)]
)
def test_whole_number_accepts_what_copied_scripts_hold(text: str, value: int) -> None:
    assert whole_number(text) == value


@pytest.mark.parametrize("text", ["", "1.5", "x", "nan", "inf", "1,000", "--1"])
def test_whole_number_refuses(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="not a whole number"):
        whole_number(text)


def test_ranges() -> None:
    assert positive("1") == 1
    assert not_negative("0") == 0
    assert real_number(0.0)("0") == 0.0
    assert real_number(0.0, exclusive=True)("1e-9") == 1e-9
    for parse, text in [
        (positive, "0"),
        (not_negative, "-1"),
        (real_number(0.0), "-0.1"),
        (real_number(0.0), "nan"),
        (real_number(0.0), "inf"),
        (real_number(0.0), "x"),
        (real_number(0.0, exclusive=True), "0"),
    ]:
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            parse(text)


def test_comma_list() -> None:
    assert tuple(comma_list(" a, b,,c ")) == ("a", "b", "c")


def test_problems_counts_all_and_shows_the_first() -> None:
    problems = Problems(max_shown=2)
    problems.raise_if_any("nothing is wrong")
    problems.add("f:1", "bad")
    problems.extend("f:2", ["worse", "worst"])
    with pytest.raises(InputError) as caught:
        problems.raise_if_any("f is broken", "mend it")
    assert str(caught.value).split("\n") == [
        "f is broken", "  f:1: bad", "  f:2: worse", "  ... and 1 more", "mend it",
    ]  # fmt: skip


FULL = "cannot be written: No space"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("bad input"), 2, "error: bad input\n"),
        (RunError("bad luck"), 1, "error: bad luck\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "error: x: no such file (explain: E201)\n"),
        (OSError(5, "Input error"), 1, "error: input error\n"),
        (OSError(28, "No space"), 1, f"error: standard output: {FULL} (explain: E205)\n"),
        (OSError(28, "No space", "x"), 1, f"error: x: {FULL} (explain: E205)\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_run_command_reports_errors_of_people_without_traceback(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == status
    assert capsys.readouterr().err == message


def test_run_command_passes_the_status_on_and_bugs_through() -> None:
    values: dict[int | None, int] = {None: 0, 0: 0, 3: 3}
    for value, status in values.items():
        with pytest.raises(SystemExit) as caught:
            run_command(functools.partial(max, [value]))
        assert caught.value.code == status
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        raise InputError("bad input")

    monkeypatch.setattr(sys, "argv", ["tool.py", "--debug"])
    with pytest.raises(InputError):
        run_command(main)


@pytest.mark.parametrize("lines", [10, 100_000])
def test_a_reader_that_goes_away_is_no_traceback(root: Path, tmp_path: Path, lines: int) -> None:
    # 10 lines stay in the buffer until the end, 100,000 do not.
    script = tmp_path / "tool.py"
    script.write_text(
        "from cpm_bee.cli import run_command\n"
        f"run_command(lambda: [print(i) for i in range({lines})] and None)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, str(script)],
        stdout=writer,
        stderr=subprocess.PIPE,
        env={**environment, "PYTHONPATH": str(root / "src")},
        timeout=200,
    )
    os.close(writer)
    assert result.stderr == b""
    assert result.returncode == 1


def openmp_settings(code: str, **settings: str) -> dict[str, str]:
    """What OpenMP prints about its settings when it is loaded."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "OMP_DISPLAY_ENV": "verbose", **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(re.findall(r"^ *(?:\[\w+\] )?(\w+) = '(.*)'$", result.stderr, re.M))


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", ["finetune_cpm_bee.py", "text_generation.py", "preprocess_dataset.py"]
)
def test_waiting_threads_sleep_unless_the_user_has_chosen(root: Path, script: str) -> None:
    path = root / "src" / script
    code = f"import sys; sys.path.insert(0, {str(path.parent)!r})\n"
    code += f"import runpy; runpy.run_path({str(path)!r})\n"
    code += "assert 'torch' not in sys.modules\nimport torch"
    assert openmp_settings("import torch")["GOMP_SPINCOUNT"] != "0"
    assert openmp_settings(code)["GOMP_SPINCOUNT"] == "0"
    assert openmp_settings(code, OMP_WAIT_POLICY="ACTIVE")["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize("chosen", [None, "ACTIVE"])
def test_waiting_threads_in_shell_scripts(root: Path, chosen: str | None) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if chosen:
        environment["OMP_WAIT_POLICY"] = chosen
    command = f"source {root}/scripts/venv.sh; printenv OMP_WAIT_POLICY"
    result = subprocess.run(
        ["bash", "-euc", command], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout == f"{chosen or 'PASSIVE'}\n"
    sources = [p for p in (root / "scripts").glob("*.sh") if p.name != "slurm_finetune.sh"]
    for path in sources:  # slurm_finetune.sh calls finetune_cpm_bee.sh
        assert path.name == "venv.sh" or "/venv.sh" in path.read_text(encoding="utf-8")


# ------------------------------------------------------------------ messages of the library


MESSAGES = """
import logging
from cpm_bee.cli import run_command

def main():
    logging.getLogger("cpm_bee.some.module").info("made 数据 once")
    logging.getLogger("cpm_bee.some.module").warning("it is too small")

run_command(main)
"""


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_messages_of_the_library_are_printed_once_and_never_fail(rank: int | None) -> None:
    ranks = {} if rank is None else {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(
        [sys.executable, "-c", MESSAGES],
        env={**environment, **{name: str(value) for name, value in ranks.items()}},
        capture_output=True, text=True,
    )  # fmt: skip
    expected = "made \\u6570\\u636e once\nwarning: it is too small\n"
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == ("" if rank == 1 else expected)
