"""The documents hold what the code does: flags, defaults, paths, messages, both languages alike."""

from __future__ import annotations

import argparse
import ast
import fnmatch
import hashlib
import json
import re
from pathlib import Path

import pytest
from support import ROOT, run_script

from cpm_bee import records
from cpm_bee.train.options import Options

parser = Options.parser

README = ROOT / "README.md"
TUTORIAL = ROOT / "tutorials" / "basic_task_finetune"
READMES = [README, ROOT / "README_zh.md"]
PAIRS = [(folder / "README.md", folder / "README_zh.md") for folder in (ROOT, TUTORIAL)]
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "docs/gpu-checklist.md")]
DOCUMENTS = [document for pair in PAIRS for document in pair] + OTHERS
SCRIPT = (ROOT / "scripts" / "finetune_cpm_bee.sh").read_text(encoding="utf-8")

# Where the commands of the documents are run from.
PLACES = [ROOT, ROOT / "src", TUTORIAL]
# What is not in a fresh clone: runs, stages and people make it.
GENERATED = [
    "bee_data/*.jsonl",
    "../bee_data/*.jsonl",
    "bee_data/NAME.jsonl",
    "bin_data/*",
    "../bin_data/*",
    "../tutorials/basic_task_finetune/bin_data/*",
    "meta.bin",
    "src/results*",
    "results/*",
    "*-previous/",
    "answers.jsonl",
    "cpm_bee_finetune-*.pt",
    "cpm_bee_finetune-*.json",
    "cpm_bee_finetune-*.jsonl",
    "src/ckpts/pytorch_model.bin",
    "ckpts/pytorch_model.bin",
    "pytorch_model.bin",
    "src/ckpts/vocab.txt",
    "ckpts/vocab.txt",
    "vocab.txt",
    "config.json",
    "ckpts/nothing.bin",
    "train.jsonl",
    "eval.jsonl",
    "../shared/golden",
    ".venv/bin/activate",
]
# Words with a slash or an ending that are no paths.
NOT_PATHS = {"alpha/r", "tokens/s", "token/max"}
NOT_PATHS |= {".bin", ".pt", ".json", "….index.json", "-log.jsonl", "*.jsonl"}
TORCHRUN = {"--nproc_per_node"}
# Of nvidia-smi, sbatch and pip.
COMMAND_LINE_TOOLS = {"--query-gpu", "--format", "--nodes", "--gpus-per-node", "--no-deps"}


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


documents = pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
readmes = pytest.mark.parametrize("document", READMES, ids=name_of)
pairs = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: name_of(pair[0]))


def code_blocks(document: Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text_of(document), re.M | re.S)


def prose(document: Path) -> str:
    return re.sub(r"^```.*?^```$", "", text_of(document), flags=re.M | re.S)


def headings(document: Path) -> list[str]:
    return re.findall(r"^#+ .*$", prose(document), re.M)


def tables(document: Path) -> list[list[list[str]]]:
    """The rows, without their header, of each table; every row a list of cells."""
    found = []
    for table in re.findall(r"(?:^\|.*\|\n)+", prose(document), re.M):
        cells = [row.strip("|").split("|") for row in table.splitlines()]
        found.append([[cell.strip() for cell in row] for row in cells[2:]])
    return found


def table_with(document: Path, first_cell: str) -> dict[str, list[str]]:
    """The table that has a row for `first_cell`, by first cells."""
    for table in tables(document):
        rows = {row[0].strip("`"): row[1:] for row in table}
        if first_cell in rows:
            assert len(rows) == len(table), f"{name_of(document)}: a row for {first_cell} twice"
            return rows
    raise AssertionError(f"{name_of(document)}: no table has a row for {first_cell}")


# ------------------------------------------------------------------ flags and variables


def flag_of(action: argparse.Action) -> str:
    return max(action.option_strings, key=len)


def finetune_actions() -> list[argparse.Action]:
    return [action for action in parser()._actions if flag_of(action) != "--help"]


def shown_default(action: argparse.Action, chinese: bool) -> str:
    """How a flag's default stands in a table."""
    value = action.default
    if action.required:
        return "必填" if chinese else "required"
    if action.nargs == 0:
        assert value is False
        return "关" if chinese else "off"
    if value is None:
        return "–"
    if isinstance(value, tuple):
        return f"`{','.join(value)}`"
    return f"`{str(value).removesuffix('.0')}`"


@readmes
def test_finetuning_flags_with_their_defaults(document: Path) -> None:
    chinese = document.stem.endswith("_zh")
    rows = table_with(document, "--model-config")
    expected = {flag_of(a): shown_default(a, chinese) for a in finetune_actions()}
    assert {flag: cells[0] for flag, cells in rows.items()} == expected


@readmes
def test_all_choices_of_a_flag_are_named(document: Path) -> None:
    rows = table_with(document, "--model-config")
    for action in finetune_actions():
        for choice in action.choices or ():
            assert f"`{choice}`" in " ".join(rows[flag_of(action)]), (flag_of(action), choice)


def help_of(script: str) -> str:
    result = run_script(script, "--help")
    assert result.returncode == 0, result.stderr
    return result.stdout


def flags_in_help(script: str) -> set[str]:
    listed = re.findall(r"^  (-.*?)(?:  |$)", help_of(script), re.M)
    flags = {flag for line in listed for flag in re.findall(r"--[a-z][a-z-]*", line)}
    return {flag.replace("_", "-") for flag in flags} - {"--help"}


@readmes
def test_generation_flags_with_their_defaults(document: Path) -> None:
    rows = table_with(document, "--beam-size")
    assert set(rows) == flags_in_help("src/text_generation.py")
    options = " ".join(help_of("src/text_generation.py").partition("options:")[2].split())
    entries = [e.strip() for e in re.split(r"(?=--[a-z])", options)]
    matches = [re.match(r"(--\S+) .*\(default: (\S+)\)", entry) for entry in entries]
    defaults = {match[1]: match[2] for match in matches if match and match[2] != "all"}
    assert len(defaults) == 8
    for flag, default in defaults.items():
        assert rows[flag][0] == f"`{default}`", flag


@readmes
@pytest.mark.parametrize(
    "script", ["src/preprocess_dataset.py", "tutorials/basic_task_finetune/data_reformat.py"]
)
def test_flags_of_the_data_stages_are_named(document: Path, script: str) -> None:
    flags = flags_in_help(script)
    assert "--input" in flags
    underscored = {flag: flag.replace("-", "_") for flag in flags}
    text = text_of(document)
    assert not [f for f in flags if not re.search(rf"{f}\b|--{underscored[f][2:]}\b", text)]


def script_variables() -> dict[str, set[str]]:
    """Each variable of finetune_cpm_bee.sh with its literal defaults: the usual and the tiny's."""
    found: dict[str, set[str]] = {}
    for name, default in re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", SCRIPT):
        found.setdefault(name, set()).update({default} if default and "$" not in default else ())
    found["LOAD"].update(re.findall(r"^ +LOAD=(\S+)$", SCRIPT, re.M))
    return found


@readmes
def test_variables_of_the_script_with_their_defaults(document: Path) -> None:
    rows = table_with(document, "GPUS_PER_NODE")
    expected = script_variables()
    assert set(rows) == set(expected)
    for name, defaults in expected.items():
        shown = set(re.findall(r"`([^`]+)`", " ".join(rows[name][:2])))
        if name in ("MASTER_PORT", "GPUS_PER_NODE"):
            continue  # computed; said in words
        assert shown >= defaults, (name, defaults)
        assert len(shown) <= max(1, len(defaults)), (name, shown)


@readmes
def test_variables_of_the_tiny_model_stand_in_their_column(document: Path) -> None:
    block = SCRIPT[SCRIPT.index("= cpm-bee-tiny ]") :].partition("\nfi\n")[0]
    tiny = dict(re.findall(r"\b([A-Z_]+)=\"\$\{[A-Z_]+:-([^}]*)\}\"", block))
    assert len(tiny) >= 3
    rows = table_with(document, "GPUS_PER_NODE")
    tiny["LOAD"] = "ckpts/cpm-bee-tiny"
    column = {name: cells[1].strip("`") for name, cells in rows.items() if cells[1]}
    assert column == tiny


@readmes
def test_variables_of_the_quickstart_are_named(document: Path) -> None:
    script = text_of(ROOT / "scripts" / "quickstart.sh") + text_of(ROOT / "scripts" / "venv.sh")
    names = set(re.findall(r"\$\{([A-Z_]+):-", script)) - {"VIRTUAL_ENV"}
    assert "RAW_DATA" in names
    assert not [name for name in names if f"`{name}`" not in prose(document)]


@documents
def test_every_flag_that_is_mentioned_exists(document: Path) -> None:
    known = {flag_of(action) for action in parser()._actions} | TORCHRUN | COMMAND_LINE_TOOLS
    for script in (
        "src/text_generation.py",
        "src/preprocess_dataset.py",
        "tutorials/basic_task_finetune/data_reformat.py",
        "benchmarks/gpu_memory.py",
    ):
        known |= flags_in_help(script)
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", text_of(document)))
    wrong = {f for f in mentioned if f.replace("_", "-") not in known and f not in known}
    assert not wrong


# ------------------------------------------------------------------ paths and links


def candidates(document: Path) -> set[str]:
    """All that looks like a path: words with a slash or with an ending that files here have."""
    text = re.sub(r"\]\([^)]*\)", "]", text_of(document))  # links have their own test
    text = "\n".join(line for line in text.splitlines() if not line.startswith("|  "))
    words = re.findall(r"(?<![\w/.<{$-])[.\w*…-]+(?:/[.\w*…-]+)*/?", text, re.A)
    endings = re.compile(r"\.(py|sh|md|jsonl?|txt|toml|bin|pt)$")
    found = {w for w in words if ("/" in w or endings.search(w)) and re.search("[a-z]", w)}
    return {w.rstrip(".") for w in found} - NOT_PATHS


def stands_somewhere(path: str, document: Path) -> bool:
    if any(fnmatch.fnmatchcase(path, pattern) for pattern in GENERATED):
        return True
    return any(any(place.glob(path)) if "*" in path else (place / path).exists()
               for place in [document.parent, *PLACES])  # fmt: skip


@documents
def test_paths_exist(document: Path) -> None:
    prepared = candidates(document)
    assert len(prepared) > 2 or document.name == "CHANGELOG.md"
    by_name = {path.name for path in ROOT.glob("src/**/*.py")} | {
        path.name for path in [*TUTORIAL.iterdir(), *(ROOT / "scripts").iterdir()]
    }
    missing = [
        path
        for path in sorted(prepared)
        if not stands_somewhere(path, document) and path not in by_name
    ]
    assert not missing, f"{name_of(document)} names what is not there"


def slug(heading: str) -> str:
    """The anchor that a heading gets: lower case, punctuation dropped, spaces to hyphens."""
    title = heading.lstrip("#").strip().lower()
    return re.sub(r"[^\w\- ]", "", title).replace(" ", "-")


@documents
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        path, _, anchor = target.partition("#")
        linked = document.parent / path if path else document
        assert linked.exists(), f"{name_of(document)}: {target}"
        if anchor:
            assert anchor in map(slug, headings(linked)), f"{name_of(document)}: {target}"


@documents
def test_scripts_that_are_run_exist(document: Path) -> None:
    commands = re.findall(
        r"\b(?:bash|python3?) ((?:[\w.-]+/)*[\w.-]+\.(?:sh|py))", text_of(document)
    )
    assert commands or document.name == "CHANGELOG.md"
    for script in commands:
        assert any((place / script).is_file() for place in PLACES), f"{name_of(document)}: {script}"


@pytest.mark.parametrize("document", READMES, ids=name_of)
def test_file_map_names_every_module(document: Path) -> None:
    (tree,) = [body for language, body in code_blocks(document) if "src/cpm_bee/" in body]
    top = {p.name for p in (ROOT / "src" / "cpm_bee").iterdir()} - {"__init__.py", "__pycache__"}
    named = {match.rstrip("/") for match in re.findall(r"^src/cpm_bee/(\S+)", tree, re.M)}
    assert named == top


# ------------------------------------------------------------------ both languages


def bare(language: str, body: str) -> list[str]:
    """What both languages must share of a block: commands, data, the paths of a file map."""
    if language == "text" and "src/cpm_bee/" in body:
        return re.findall(r"^(?:\S+, )?\S+", body, re.M)
    return body.splitlines()


@pairs
def test_both_languages_have_the_same_outline(pair: tuple[Path, Path]) -> None:
    outlines = [[len(h) - len(h.lstrip("#")) for h in headings(page)] for page in pair]
    assert outlines[0] == outlines[1]
    assert len(outlines[0]) > 8


@pairs
def test_both_languages_have_the_same_code_and_data(pair: tuple[Path, Path]) -> None:
    english, chinese = ([(lang, bare(lang, b)) for lang, b in code_blocks(p)] for p in pair)
    assert len(english) > 8
    assert english == chinese


@pairs
def test_both_languages_have_tables_of_the_same_rows(pair: tuple[Path, Path]) -> None:
    english, chinese = (
        [[re.findall("`[^`]+`", row[0]) for row in table] for table in tables(page)]
        for page in pair
    )
    assert english == chinese


@pairs
def test_both_languages_name_the_same_things(pair: tuple[Path, Path]) -> None:
    english, chinese = (set(re.findall("`([^`\n]+)`", prose(page))) for page in pair)
    assert english == chinese


# ------------------------------------------------------------------ what the documents say


FIVE = (
    "cd tutorials/basic_task_finetune\n"
    "python data_reformat.py\n"
    "python ../../src/preprocess_dataset.py --input bee_data --output_path bin_data "
    "--output_name ccpm_data\n"
    "cd ../../src\n"
    "bash scripts/finetune_cpm_bee.sh\n"
)


@pytest.mark.parametrize("document", [p for pair in PAIRS for p in pair], ids=name_of)
def test_the_tutorial_word_for_word(document: Path) -> None:
    assert ("bash", FIVE) in code_blocks(document)


@readmes
def test_the_two_commands_come_first(document: Path) -> None:
    assert code_blocks(document)[0] == (
        "bash",
        "bash scripts/quickstart.sh\nbash scripts/test.sh\n",
    )


@documents
def test_json_examples(document: Path) -> None:
    """They parse, and those with an answer are valid records."""
    for language, body in code_blocks(document):
        for line in body.splitlines() if language == "json" else ():
            value = json.loads(line)
            if records.ANSWER in value:
                assert records.validate(value) == []


def test_raw_examples_become_the_shown_record(tmp_path: Path) -> None:
    lines = [line for language, body in code_blocks(TUTORIAL / "README.md") if language == "json"
             for line in body.splitlines()]  # fmt: skip
    raw = [line for line in lines if "target" in line or "translation" in line]
    assert len(raw) == 2
    (tmp_path / "raw.jsonl").write_text("\n".join(raw), encoding="utf-8")
    script = "tutorials/basic_task_finetune/data_reformat.py"
    result = run_script(script, "--input", tmp_path / "raw.jsonl", "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    made = (tmp_path / "out" / "raw.jsonl").read_text(encoding="utf-8").splitlines()
    assert made[0] == made[1]
    assert made[0] in lines


def messages_of_the_sources() -> str:
    """The texts of all sources, with `…` where a value is put in, and those of the scripts."""
    parts = []
    for path in [*ROOT.glob("src/**/*.py"), *TUTORIAL.glob("*.py")]:
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.JoinedStr):
                parts.append(
                    "".join(
                        v.value if isinstance(v, ast.Constant) and isinstance(v.value, str) else "…"
                        for v in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts.append(node.value)
    parts += [text_of(path) for path in (ROOT / "scripts").glob("*.sh")]
    return "\n".join(parts)


@readmes
def test_messages_in_troubleshooting_are_those_of_the_code(document: Path) -> None:
    messages = messages_of_the_sources()
    (table,) = [t for t in tables(document) if any("`ValueError" in row[0] for row in t)]
    quoted = [m for row in table for m in re.findall("`([^`]+)`", row[0]) if " " in m]
    assert len(quoted) > 10
    for message in quoted:
        for piece in message.replace("'torch'", "…").split("…"):
            assert piece.strip() in messages, message


def test_log_examples_have_the_fields_of_the_log() -> None:
    loop = text_of(ROOT / "src" / "cpm_bee" / "train" / "loop.py")
    blocks = [b for language, b in code_blocks(README) if language == "json" and '"event"' in b]
    events = {e["event"]: e for block in blocks for e in map(json.loads, block.splitlines())}
    assert set(events) == {"start", "eval", "train", "end"}
    values = loop[loop.index("values = {") :]
    fields = re.findall(r'^ +"(\w+)":', values[: values.index("}\n")], re.M)
    assert list(events["train"]) == ["event", *fields]
    names = {action.dest for action in parser()._actions}
    assert set(events["start"]["options"]) <= names


def test_measured_figures_are_filled_in() -> None:
    left = [name_of(d) for d in DOCUMENTS if re.search(r"@[A-Z_]{3,}@", text_of(d))]
    assert not left, "figures of the sample task are still missing"


def test_changelog_tells_what_is_unreleased() -> None:
    text = text_of(ROOT / "CHANGELOG.md")
    unreleased = text.partition("\n## [Unreleased]\n")[2].partition("\n## ")[0]
    assert len(re.findall(r"^- \S", unreleased, re.M)) >= 5
    assert "### Added" in unreleased


def test_licence_is_the_text_of_apache_2() -> None:
    # sha256 of the text as it is published, with its first empty line and the appendix.
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert 'license="Apache-2.0"' in text_of(ROOT / "setup.py")
