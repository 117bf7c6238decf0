"""The pages that list flags hold all flags in both languages, and stale ones are found."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from support import ROOT, run_script

from cpm_bee import delta
from cpm_bee.checkpoint.options import ConvertOptions, MergeOptions
from cpm_bee.data.forms.options import ConvertDataOptions
from cpm_bee.data.inspect.options import InspectOptions
from cpm_bee.data.preprocess.options import PreprocessOptions
from cpm_bee.doctor.options import DoctorOptions
from cpm_bee.errors import RunError
from cpm_bee.evaluate.options import EvaluateOptions
from cpm_bee.generate.command_options import TextGenerationOptions
from cpm_bee.options import CommandOptions
from cpm_bee.serve.options import ServeOptions
from cpm_bee.train.options import Options
from cpm_bee.train.replay_options import ReplayOptions

SCRIPT = "scripts/make_docs.py"
SCRIPTS: list[type[CommandOptions]] = [Options, TextGenerationOptions, PreprocessOptions]
SCRIPTS += [EvaluateOptions, MergeOptions, ConvertOptions, DoctorOptions, ServeOptions]
SCRIPTS += [ConvertDataOptions, InspectOptions, ReplayOptions]
ENGLISH, CHINESE = "docs/training.md", "docs/zh/training.md"

both_pages = pytest.mark.parametrize("page", [ENGLISH, CHINESE])
all_scripts = pytest.mark.parametrize("options", SCRIPTS, ids=lambda o: o.script)


@pytest.fixture(scope="module")
def make_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_docs"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def rows(page: str, options: type[CommandOptions]) -> dict[str, list[str]]:
    """The cells after the flag of each row in a script's section; each flag stands there once."""
    text = (ROOT / page).read_text(encoding="utf-8")
    section = text.partition(f"\n## {options.script}\n")[2].partition("\n## ")[0]
    found: dict[str, list[str]] = {}
    for line in re.findall(r"^\| `(?:--|RECEIPT).*\|$", section, re.M):
        flag, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        assert flag not in found
        found[flag.strip("`")] = cells
    return found


def test_the_committed_pages_are_up_to_date() -> None:
    done = run_script(SCRIPT, "--check")
    assert (done.returncode, done.stderr) == (0, "")


@all_scripts
@both_pages
def test_every_flag_with_its_default_and_choices(page: str, options: type[CommandOptions]) -> None:
    """Compared with the parser, which reads the command line."""
    actions = {
        (a.option_strings or [a.metavar])[0]: a
        for a in options.parser()._actions
        if a.dest != "help"
    }
    table = rows(page, options)
    assert set(table) == set(actions)
    for flag, action in actions.items():
        default, _, choices = table[flag]
        words = {"required": "必填", "off": "关"} if page == CHINESE else {}
        if action.required:
            assert default == words.get("required", "required")
        elif action.nargs == 0:
            assert default == words.get("off", "off")
        elif action.default is None:
            assert default == "–"
        else:
            typed = action.type(default.strip("`")) if callable(action.type) else default.strip("`")
            assert typed == action.default
        assert re.findall("`([^`]+)`", choices) == list(action.choices or ())


@all_scripts
def test_meanings_in_both_languages(options: type[CommandOptions]) -> None:
    english, chinese = rows(ENGLISH, options), rows(CHINESE, options)
    assert list(english) == list(chinese)
    for flag in english:
        meaning, translation = english[flag][1], chinese[flag][1]
        assert re.search("[\u4e00-\u9fff]", translation), flag
        assert re.search("[a-z]{3}", meaning) and not re.search("[\u3000-\u9fff]", meaning), flag
        # Code is the same in every language.
        code = [sorted(re.findall("`([^`]+)`", text)) for text in (meaning, translation)]
        assert code[0] == code[1], flag


@all_scripts
def test_help_has_what_the_page_has(options: type[CommandOptions]) -> None:
    text = " ".join(options.parser().format_help().split())
    for flag, (_, meaning, _) in rows(ENGLISH, options).items():
        assert flag in text
        # argparse may break a line after a hyphen.
        plain = meaning.replace("`", "").replace(" ", "")
        assert plain in text.replace(" ", ""), flag
    assert "`" not in text


def test_help_texts_name_all_layers_that_take_a_delta() -> None:
    for page in (ENGLISH, CHINESE):
        meaning = rows(page, Options)["--delta-targets"][1]
        assert re.findall("`([^`]+)`", meaning.partition(";")[0].partition("；")[0]) == list(
            delta.TARGETS
        )


def copy_of(root: Path) -> Path:
    for name in ("scripts/templates", "docs"):
        shutil.copytree(ROOT / name, root / name)
    return root


@pytest.mark.parametrize(
    ("page", "before", "after"),
    [
        (ENGLISH, "| `128` |", "| `64` |"),
        (ENGLISH, "# Flags", "# All flags"),
        (CHINESE, "必填", "必须"),
    ],
)
def test_a_stale_page_is_named_with_the_command(
    make_docs: ModuleType, tmp_path: Path, page: str, before: str, after: str
) -> None:
    root = copy_of(tmp_path)
    text = (root / page).read_text(encoding="utf-8").replace("| `32` |", "| `128` |")
    (root / page).write_text(text.replace(before, after), encoding="utf-8")
    with pytest.raises(RunError) as caught:
        make_docs.make(root, check=True)
    message = str(caught.value)
    assert message.splitlines()[1:] == [f"  {page}", "run: python scripts/make_docs.py"]
    assert (root / page).read_text(encoding="utf-8") != (ROOT / page).read_text(encoding="utf-8")
    make_docs.make(root, check=False)
    make_docs.make(root, check=True)
    assert (root / page).read_text(encoding="utf-8") == (ROOT / page).read_text(encoding="utf-8")


def test_a_missing_page_and_a_changed_template_are_stale(
    make_docs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copy_of(tmp_path)
    (root / CHINESE).unlink()
    template = root / "scripts" / "templates" / f"{ENGLISH}.in"
    template.write_text(template.read_text(encoding="utf-8") + "\nMore.\n", encoding="utf-8")
    assert set(map(str, make_docs.stale_pages(root))) == {ENGLISH, CHINESE}
    make_docs.make(root, check=False)
    assert capsys.readouterr().out == f"written: {ENGLISH}\nwritten: {CHINESE}\n"
    assert (root / ENGLISH).read_text(encoding="utf-8").endswith("\nMore.\n")


def test_it_is_quick_and_needs_no_package() -> None:
    """Without site packages; the best of three, since the machine may be busy."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-S", "-I", str(ROOT / SCRIPT), "--check"], check=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 2


def test_ci_checks_the_pages() -> None:
    assert "\npython scripts/make_docs.py --check\n" in (ROOT / ".ci" / "run").read_text()
