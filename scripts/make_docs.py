"""Make the pages of docs/ that list flags, error codes or memory, in English and Chinese.

    python scripts/make_docs.py            write the pages
    python scripts/make_docs.py --check    exit with status 1 if a page is not up to date

docs/NAME.md is made from scripts/templates/docs/NAME.md.in. A line `<!-- flags of SCRIPT -->` is
replaced by the heading, description and tables of that script, from its options class; a line
`<!-- error codes -->` by the entries of src/cpm_bee/messages. The table of docs/memory.md is made
from scripts/templates/memory_table.json, which `python -m cpm_bee.train.plan.released` writes.
Needs neither torch nor numpy.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

# Works even if the project is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from cpm_bee import error_codes
from cpm_bee.checkpoint.options import ConvertOptions, MergeOptions
from cpm_bee.cli import ArgumentParser, run_command, shown_default
from cpm_bee.data.forms.options import ConvertDataOptions
from cpm_bee.data.inspect.options import InspectOptions
from cpm_bee.data.preprocess.options import PreprocessOptions
from cpm_bee.doctor.options import DoctorOptions
from cpm_bee.errors import RunError
from cpm_bee.evaluate.options import EvaluateOptions
from cpm_bee.files import atomic_file
from cpm_bee.generate.command_options import TextGenerationOptions
from cpm_bee.options import CONFIG, DEBUG, GENERAL, LANG, CommandOptions, Flag
from cpm_bee.serve.options import ServeOptions
from cpm_bee.train.options import Options
from cpm_bee.train.plan.options import PLAN, PlanOptions
from cpm_bee.train.replay_options import ReplayOptions

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "python scripts/make_docs.py"
TEMPLATES = Path("scripts", "templates")
MEMORY_TABLE = TEMPLATES / "memory_table.json"
SCRIPTS: dict[str, type[CommandOptions]] = {
    options.script: options
    for options in (
        Options,
        ReplayOptions,
        TextGenerationOptions,
        EvaluateOptions,
        ServeOptions,
        ConvertDataOptions,
        PreprocessOptions,
        InspectOptions,
        MergeOptions,
        ConvertOptions,
        DoctorOptions,
    )
}


@dataclass(frozen=True)
class Language:
    """The words of the tables in one language."""

    header: tuple[str, ...]
    required: str
    off: str
    separator: str  # between choices
    labels: tuple[str, ...]  # of the parts of an error's entry
    memory: tuple[str, ...]  # the header of the table of memory
    ways: dict[str, str]
    fits: str
    chinese: bool = False


ENGLISH = Language(
    ("Flag", "Default", "Meaning", "Choices"),
    "required",
    "off",
    ", ",
    ("Cause", "Fix", "Example", "Messages"),
    ("Model", "Training", "Weights", "Peak", "Peak, full"),
    {},
    "yes",
)
CHINESE = Language(
    ("参数", "默认值", "含义", "可选值"),
    "必填",
    "关",
    "、",
    ("原因", "解决办法", "示例", "消息"),
    ("模型", "训练方式", "权重", "峰值", "峰值，full"),
    {"full": "全参数"},
    "是",
    chinese=True,
)
# The tables of error codes, in the order of the page.
TOPICS = {
    "usage": ("Usage", "用法"),
    "files": ("Files", "文件"),
    "data": ("Data", "数据"),
    "model": ("Model, vocabulary and delta", "模型、词表与增量"),
    "training": ("Training", "训练"),
    "generation": ("Generation, evaluation and server", "生成、评测与服务"),
}


def shown(flag: Flag, language: Language) -> list[str]:
    """The cells of a flag's table row."""
    if flag.required:
        default = language.required
    elif flag.is_switch:
        default = language.off
    else:
        default = "–" if flag.default is None else f"`{shown_default(flag.default)}`"
    choices = language.separator.join(f"`{choice}`" for choice in flag.choices or ())
    return [f"`{flag.flag}`", default, flag.chinese if language.chinese else flag.help, choices]


def section(options: type[CommandOptions], language: Language) -> str:
    """The heading, the description, and a table for each group of flags."""
    text = options.chinese if language.chinese else options.description
    parts = [f"## {options.script}", text]
    flags = [*options.flags(), CONFIG, DEBUG, LANG]
    for group in (*options.groups, GENERAL):
        title = group.chinese if language.chinese else group.title.capitalize()
        rows = [list(language.header), ["---"] * len(language.header)]
        rows += [shown(flag, language) for flag in flags if flag.group == group]
        parts += [f"### {title}", "\n".join(f"| {' | '.join(row)} |" for row in rows)]
    return "\n\n".join(parts)


def codes(language: Language) -> str:
    """The entries of all error codes, by topic."""
    index = int(language.chinese)
    parts = []
    for topic, titles in TOPICS.items():
        parts.append(f"## {titles[index]}")
        for entry in error_codes.entries().values():
            if entry.topic == topic:
                parts.append(f"### {entry.code}: {_plain(entry.title[index])}")
                cause, fix, example, messages = language.labels
                parts.append(f"**{cause}**: {_plain(entry.cause[index])}")
                parts.append(f"**{fix}**: {_plain(entry.fix[index])}")
                parts.append(f"**{example}**:\n\n```text\n{entry.example[index]}\n```")
                shown_messages = (f"- ``{words[index]}``" for words in entry.messages)
                parts.append("\n".join([f"**{messages}**:\n", *shown_messages]))
    return "\n\n".join(parts)


def _plain(text: str) -> str:
    """A text for Markdown in which nothing is markup."""
    return re.sub(r"([<*_\[\]|`])", r"\\\1", text)


def own_flags(language: Language) -> str:
    """The table of the flags of plan.py that finetune_cpm_bee.py does not have."""
    rows = [list(language.header), ["---"] * len(language.header)]
    rows += [shown(flag, language) for flag in PlanOptions.flags() if flag.group == PLAN]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def memory_table(root: Path, language: Language) -> str:
    """The predicted memory of the released sizes, in GiB, and the cards that are large enough."""
    rows = json.loads((root / MEMORY_TABLE).read_text(encoding="utf-8"))["rows"]
    header = [*language.memory, *(f"{card} GB" for card in rows[0]["cards"])]
    signs = {None: "–", "none": language.fits, "full": "full"}
    lines = [header, ["---"] * len(header)]
    for row in rows:
        sizes = [f"{row[name] / 2**30:.1f}" for name in ("weights", "peak", "peak_full")]
        cards = [signs[need] for need in row["cards"].values()]
        lines.append([row["size"], language.ways.get(row["way"], row["way"]), *sizes, *cards])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pages(root: Path) -> dict[Path, str]:
    """The path of each page, relative to `root`, and the text that it should have."""
    made = {}
    for template in sorted((root / TEMPLATES).rglob("*.md.in")):
        source = template.relative_to(root)
        language = CHINESE if template.parent.name == "zh" else ENGLISH
        text = re.sub(
            r"<!-- flags of (\S+) -->",
            lambda match, language=language: section(SCRIPTS[match[1]], language),  # type: ignore[misc]
            template.read_text(encoding="utf-8"),
        )
        text = text.replace("<!-- error codes -->", codes(language))
        tokens = json.loads((root / MEMORY_TABLE).read_text(encoding="utf-8"))["tokens"]
        text = text.replace("<!-- flags of plan.py alone -->", own_flags(language))
        text = text.replace("<!-- tokens of memory_table -->", f"{tokens:,}")
        text = text.replace("<!-- memory_table -->", memory_table(root, language))
        note = f"<!-- Made by `{COMMAND}` from {source} and src/cpm_bee. -->"
        made[template.relative_to(root / TEMPLATES).with_suffix("")] = f"{note}\n\n{text}"
    return made


def stale_pages(root: Path) -> dict[Path, str]:
    """The pages that are missing or out of date, and the text that they should have."""
    return {
        path: text
        for path, text in pages(root).items()
        if not (root / path).is_file() or (root / path).read_text(encoding="utf-8") != text
    }


def make(root: Path, *, check: bool) -> None:
    """Write the stale pages.

    Raises:
        RunError: `check` is true and pages are stale; nothing is written.
    """
    stale = stale_pages(root)
    if check and stale:
        names = "\n".join(f"  {path}" for path in stale)
        raise RunError(
            f"not up to date with flags, error codes or template:\n{names}\nrun: {COMMAND}"
        )
    for path, text in stale.items():
        with atomic_file(root / path) as file:
            file.write(text)
        print(f"written: {path}")


def main() -> None:
    parser = ArgumentParser(
        prog="scripts/make_docs.py",
        description="Make the pages of docs/ that list flags and error codes.",
    )
    parser.add_argument("--check", action="store_true", help="only list the stale pages")
    make(ROOT, check=parser.parse_args().check)


if __name__ == "__main__":
    run_command(main)
