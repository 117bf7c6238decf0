"""Messages, help and results are in the language of the user."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from support import ROOT

from cpm_bee import language
from cpm_bee.checkpoint.options import ConvertOptions, MergeOptions
from cpm_bee.cli import last_value, run_command
from cpm_bee.data.forms.options import ConvertDataOptions
from cpm_bee.data.inspect.options import InspectOptions
from cpm_bee.data.preprocess.options import PreprocessOptions
from cpm_bee.distributed.rank import report_error
from cpm_bee.doctor.options import DoctorOptions
from cpm_bee.errors import InputError
from cpm_bee.evaluate.options import EvaluateOptions
from cpm_bee.generate.command_options import TextGenerationOptions
from cpm_bee.options import CommandOptions
from cpm_bee.serve.options import ServeOptions
from cpm_bee.train.options import Options

HAN = re.compile(r"[\u4e00-\u9fff]")
SCRIPTS: list[type[CommandOptions]] = [
    Options, TextGenerationOptions, PreprocessOptions, EvaluateOptions, MergeOptions,
    ConvertOptions, DoctorOptions, ServeOptions, ConvertDataOptions, InspectOptions,
]  # fmt: skip


@pytest.fixture(autouse=True)
def _language_is_forgotten() -> Iterator[None]:
    yield
    language.choose(None)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_TW"}, "zh"),
        ({"LANG": "en_US.UTF-8"}, "en"),
        ({"LANG": "C"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_MESSAGES": "en_US.UTF-8"}, "en"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C.UTF-8"}, "en"),
        ({"LC_ALL": "zh_CN.UTF-8", "LC_MESSAGES": "en_US.UTF-8"}, "zh"),
        ({"LC_ALL": "", "LANG": "zh_CN.UTF-8"}, "zh"),
    ],
)
def test_the_locale_decides(environment: dict[str, str], expected: str) -> None:
    assert language.of_environment(environment) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], None),
        (["--lang", "zh"], "zh"),
        (["--lang=en"], "en"),
        (["--lang", "zh", "--lang", "en"], "en"),
        (["--lang", "auto"], None),
        (["--lang"], None),
        (["--lang", "klingon"], None),  # argparse refuses it
        (["--", "--lang", "zh"], None),
        (["--language", "zh"], None),
    ],
)
def test_the_flag_is_read_before_the_command_line_is_parsed(
    arguments: list[str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for locale, otherwise in (("C.UTF-8", "en"), ("zh_CN.UTF-8", "zh")):
        monkeypatch.setenv("LC_ALL", locale)
        language.choose(last_value(arguments, "--lang"))
        assert language.current() == (expected or otherwise)


def test_the_flag_wins_over_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    language.choose(None)
    assert language.current() == "zh"
    language.choose("en")
    assert language.current() == "en"
    language.choose("auto")
    assert language.current() == "zh"


@pytest.mark.parametrize("options", SCRIPTS, ids=lambda o: o.script)
def test_help_is_chinese(options: type[CommandOptions]) -> None:
    language.choose("zh")
    text = options.parser().format_help()
    lines = text.splitlines()
    assert lines[0].startswith("用法：") and "选项:" in lines
    plain = re.sub(r"\s", "", text)
    for flag in options.flags():
        assert HAN.search(flag.chinese), flag.flag
        chinese = re.sub(r"[\s`]", "", flag.chinese)
        assert flag.flag in text and chinese in plain, flag.flag
    assert re.sub(r"[\s`]", "", options.chinese) in plain
    assert "`" not in text
    long = [line for line in lines if language.width(line) > 80 and HAN.search(line)]
    assert not long, "\n".join(long)
    assert not re.search(r"\(default: |show this help|^options:|^usage:", text, re.M)


@pytest.mark.parametrize("options", SCRIPTS, ids=lambda o: o.script)
def test_help_is_english_without_the_flag(options: type[CommandOptions]) -> None:
    text = options.parser().format_help()
    assert text.startswith("usage:") and "选项" not in text


@pytest.mark.parametrize(
    ("text", "columns", "expected"),
    [
        ("", 10, [""]),
        ("一二三四五", 6, ["一二三", "四五"]),
        ("一二三，四五", 6, ["一二", "三，四", "五"]),  # no line begins with a comma
        ("用 --output 给出", 11, ["用 --output", "给出"]),  # words are not broken
        ("a  b\nc", 10, ["a b c"]),
        ("--a-very-long-flag 是", 6, ["--a-very-long-flag", "是"]),
    ],
)
def test_lines_of_chinese(text: str, columns: int, expected: list[str]) -> None:
    assert language.wrapped(text, columns) == expected


def run(arguments: list[str], options: type[CommandOptions]) -> None:
    def main() -> None:
        options.parse()

    sys.argv = [options.script, *arguments]
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "错误: 缺少必需的参数：--dataset（说明：E102）\n参见：python finetune"),
        (["--learning-rate", "1"], "错误: 无法识别的参数：--learning-rate（是否想用 --lr"),
        (["--dataset", "x", "--batch-size", "0"], "错误: 参数 --batch-size: 0 小于 1（说明："),
        (["--dataset"], "错误: 参数 --dataset: "),
        (["--dataset", "x", "--lr"], "错误: 参数 --lr: 需要一个取值（说明：E103）"),
        (["--dataset", "x", "--dtype", "x"], "错误: 参数 --dtype: 无效的取值 'x'（可选："),
    ],
)  # fmt: skip
def test_wrong_usage_in_chinese(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    run(["--lang", "zh", *arguments], Options)
    assert capsys.readouterr().err.startswith(message)


def test_an_error_and_its_label(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, expected in (("zh", "错误: x\n"), ("en", "error: x\n")):
        language.choose(flag)
        report_error("x")
        assert capsys.readouterr().err == expected


def test_a_message_of_an_error_in_chinese(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise InputError("a.jsonl: holds no records")

    monkeypatch.setattr(sys, "argv", ["x.py", "--lang", "zh"])
    with pytest.raises(SystemExit):
        run_command(main)
    assert capsys.readouterr().err == "错误: a.jsonl: 没有任何记录（说明：E308）\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "a/x-receipt.json: finished after 6 steps; 4 steps done again on the CPU",
            "a/x-receipt.json: 已完成（第 6 步后）；在 CPU 上重做了 4 步",
        ),
        ("different beforehand: threads: 2 then, 1 now", "事先就不同：线程数: 当时为 2，现在为 1"),
        (
            "different beforehand: base: m has other weights than the base of the run",
            "事先就不同：基座: m 的权重与该运行的基座不同",
        ),
        (
            "different beforehand: data: m: no space left on device",
            "事先就不同：数据: m: 磁盘空间不足",
        ),
        (
            "bit equality is not to be expected: "
            "its weights were sharded, and norms summed in parts",
            "不能期望逐位相同：它的权重是分片的，范数分段求和",
        ),
        (
            "trained tensors: different after 6 steps, at most by 0.1 (a.b)",
            "训练的张量：在第 6 步后不同，最多相差 0.1（a.b）",
        ),
        ("data: 12 records", "data: 12 条记录"),  # a path
    ],
)
def test_a_report_of_verify(text: str, expected: str) -> None:
    language.choose("zh")
    assert language.said(text) == expected


HELP = """
import runpy, sys
sys.argv = ["finetune_cpm_bee.py", "--lang", "zh", "--help"]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as end:
    print(end.code, [n for n in ("torch", "numpy", "matplotlib", "bmtrain") if n in sys.modules])
"""


def test_help_in_chinese_loads_no_torch() -> None:
    code = HELP.format(script=str(ROOT / "src" / "finetune_cpm_bee.py"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("用法：") and done.stdout.endswith("\n0 []\n")
