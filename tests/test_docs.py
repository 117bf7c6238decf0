"""What the documents tell a user to type or open exists; English and Chinese pages agree."""

from __future__ import annotations

import ast
import fnmatch
import functools
import hashlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import train_support
from support import ROOT, run_script

from cpm_bee import records

README, README_ZH = ROOT / "README.md", ROOT / "README_zh.md"
TUTORIAL = ROOT / "tutorials" / "basic_task_finetune"
PAGES, PAGES_ZH = ROOT / "docs", ROOT / "docs" / "zh"
# Made from the option classes; scripts/make_docs.py --check compares both languages with them.
GENERATED_PAGES = {"training.md", "errors.md"}
ENGLISH_ONLY = {"format.md", "architecture.md", "gpu-checklist.md"}
TUTORIALS = [TUTORIAL, ROOT / "tutorials" / "own_task"]
PAIRS = [(README, README_ZH), *((t / "README.md", t / "README_zh.md") for t in TUTORIALS)]
TRANSLATED = {page.name for page in PAGES_ZH.glob("*.md")}
PAIRS += [(PAGES / name, PAGES_ZH / name) for name in sorted(TRANSLATED - GENERATED_PAGES)]
DOCUMENTS = [document for pair in PAIRS for document in pair]
DOCUMENTS += [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")]
DOCUMENTS += [ROOT / "scripts" / "tiny_base" / "README.md"]
# docs/format.md has a test of its own.
DOCUMENTS += [p for p in PAGES.glob("*.md") if p.name in ENGLISH_ONLY - {"format.md"}]

# Where the commands of the documents are run from.
PLACES = [ROOT, ROOT / "src", TUTORIAL]
# What is not in a fresh clone: runs, stages and people make it.
GENERATED = [
    "../bee_data/*", "*bee_data/*.jsonl", "bee_data/NAME", "*bin_data/*", "meta.bin",
    "checksums.json",
    "*vocab.txt", "bee.txt", "config.json", "*pytorch_model.bin", "ckpts/nothing.bin",
    "src/results*", "results/*", "cpm_bee_finetune-*", "answers.jsonl*", "train.jsonl",
    "valid.jsonl", "examples.jsonl", "chosen.jsonl", "FILE.jsonl", "FILE.py",
    "SAVE_NAME-report.html", "SAVE_NAME-loss.png", "SAVE_NAME-receipt.json", "run.yaml",
    "eval.jsonl", "*my_records*", "../shared/golden", ".venv/bin/*",
    "*my_data*", "mine.py", "data.html", "../bin_data/my_task", "../bin_data/mine",
    "../bin_data/general", "data.json", "data.jsonl",
    "dataset_info.json", "doctor.json", "plan.json", "results_DATE.json",
    "samples_NAME_DATE.jsonl", "results/*-report.html", "src/ckpts/pytorch_model.bin",
    "first.pt", "second.pt", "adapter_config.json", "model.safetensors.index.json",
    # Of the original repository, in docs/moving.md.
    "requirements.txt", "dataset.json", "tmp/", "quantize_state_dict.py",
    "finetune_cpm_bee_qlora.py", "text_generation_hf.py", "pretrain_cpm_bee.sh",
]  # fmt: skip
# Words with a slash or an ending that are no paths.
NOT_PATHS = {
    "alpha/r", "tokens/s", "token/max", "records/s", "Tokens/s", "Records/s", "MB/s", "br/",
    "GB/s", "GFLOP/s", "requests/s", "Requests/s", "application/json", "record-steps/s",
    "Record-steps/s", ".bin", ".pt", ".json", ".jsonl",
    ".safetensors", "….index.json", "-log.jsonl", "*.jsonl", "*.py",
    "openbmb/cpm-bee-10b", "openbmb/cpm-bee-5b", "openbmb/cpm-bee-2b", "openbmb/cpm-bee-1b",
}  # fmt: skip
# Flags of torchrun, nvidia-smi, sbatch and pip; a name that another tool has for a flag of ours.
FOREIGN_FLAGS = {
    "--nproc_per_node", "--query-gpu", "--format", "--nodes", "--gpus-per-node", "--no-deps",
    "--learning_rate", "--hypothesis-seed", "--requeue", "--shm-size", "--ipc",
}  # fmt: skip
# Of other software; what the scripts do with OMP_WAIT_POLICY has a section of its own.
FOREIGN_VARIABLES = {
    "CUDA_VISIBLE_DEVICES", "TORCH_LOGS", "ATEN_CPU_CAPABILITY", "OMP_WAIT_POLICY",
    "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "HYPOTHESIS_PROFILE",
    "WANDB_MODE", "SWANLAB_MODE",
}  # fmt: skip

FINETUNE_SH = (ROOT / "scripts" / "finetune_cpm_bee.sh").read_text(encoding="utf-8")
# The entry script that gets the flags of a script.
FINETUNE, REFORMAT = "src/finetune_cpm_bee.py", "tutorials/basic_task_finetune/data_reformat.py"
TAKES_FLAGS = {
    "finetune_cpm_bee.py": FINETUNE, "finetune_cpm_bee.sh": FINETUNE, "quickstart.sh": FINETUNE,
    "slurm_finetune.sh": FINETUNE, "data_reformat.py": REFORMAT,
    "preprocess_dataset.py": "src/preprocess_dataset.py",
    "text_generation.py": "src/text_generation.py", "merge_delta.py": "src/merge_delta.py",
    "convert_data.py": "src/convert_data.py", "inspect_data.py": "src/inspect_data.py",
    "convert_checkpoint.py": "src/convert_checkpoint.py", "doctor.py": "src/doctor.py",
    "evaluate.py": "src/evaluate.py", "serve.py": "src/serve.py", "verify.py": "src/verify.py",
    "plan.py": "src/plan.py",
}  # fmt: skip


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


documents = pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
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


# ------------------------------------------------------------------ commands


def commands(document: Path) -> list[tuple[str, str, str]]:
    """(variables, script, arguments) of each command in blocks and in the text."""
    typed = [line for language, body in code_blocks(document) if language == "bash"
             for line in body.splitlines()]  # fmt: skip
    typed += re.findall("`([^`\n]+)`", prose(document))
    # The command lines of benchmarks/README.md are indented.
    typed += re.findall(r"^    (python .*?)(?:  +#.*)?$", prose(document), re.M)
    command = re.compile(
        r"((?:\b[A-Z_]+=\S* )*)(?:bash|python3?|sbatch|torchrun)\b[^;|&]*?"
        r"((?:[\w.-]+/)*[\w.-]+\.(?:sh|py))\b([^;|&]*)"
    )
    return [match for line in typed for match in command.findall(line)]


@functools.cache
def flags_of(script: str) -> set[str]:
    """The flags that a script's --help lists; those of a benchmark as its source has them."""
    if script.startswith("benchmarks/"):
        return set(re.findall(r'"(--[a-z-]+)"', text_of(ROOT / script)))
    done = run_script(script, "--help")
    assert done.returncode == 0, done.stderr
    listed = re.findall(r"^  (-.*?)(?:  |$)", done.stdout, re.M)
    flags = {flag for line in listed for flag in re.findall(r"--[a-z][a-z_-]*", line)}
    return {flag.replace("_", "-") for flag in flags}


def variables_of(*scripts: str) -> set[str]:
    text = "".join(text_of(ROOT / "scripts" / script) for script in scripts)
    found = set(re.findall(r"\$\{([A-Z_]+):-", text)) - {"VIRTUAL_ENV"}
    return found | (set(settings_of("defaults=(")) if "finetune_cpm_bee.sh" in scripts else set())


def settings_of(begin: str) -> dict[str, str]:
    """The variables of finetune_cpm_bee.sh that are flags, with their defaults."""
    block = FINETUNE_SH.partition(begin)[2].partition("\n)\n" if "+" not in begin else ")\n")[0]
    found = re.findall(r"(?:^|\s)([a-z-]+)=(\S+)", re.sub(r"\s#.*", "", block))
    return {flag.replace("-", "_").upper(): value for flag, value in found}


@documents
def test_commands_can_be_run(document: Path) -> None:
    """The script exists, and so do its flags, their values and the variables before it."""
    known = FOREIGN_VARIABLES | variables_of("finetune_cpm_bee.sh", "quickstart.sh", "venv.sh")
    for variables, script, arguments in commands(document):
        command = f"{name_of(document)}: {variables}{script}{arguments}"
        found = any((place / script).is_file() for place in PLACES)
        assert found, command
        assert set(re.findall(r"([A-Z_]+)=", variables)) <= known, command
        target = TAKES_FLAGS.get(Path(script).name, script.removeprefix("../"))
        if target not in TAKES_FLAGS.values() and not target.startswith("benchmarks/"):
            continue
        arguments = arguments.replace('"', "") if arguments.count('"') % 2 else arguments
        given = re.findall(r"(?<![\w-])--[a-z][a-z_-]*", arguments)
        assert {f.replace("_", "-") for f in given} <= flags_of(target), command
        if "$" not in arguments and target.startswith("src/"):
            # --help at the end keeps the script from doing more than reading its arguments.
            done = run_script(target, *shlex.split(arguments), "--help")
            assert done.returncode == 0, command + done.stderr


@documents
def test_flags_in_the_text_exist(document: Path) -> None:
    known = FOREIGN_FLAGS
    known = known.union(*map(flags_of, [*TAKES_FLAGS.values(), "scripts/make_docs.py"]))
    known = known.union(*(flags_of(name_of(p)) for p in (ROOT / "benchmarks").glob("*.py")))
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", text_of(document)))
    assert not {f for f in mentioned if f.replace("_", "-") not in known and f not in known}


@documents
def test_blocks_can_be_parsed(document: Path) -> None:
    """Bash and JSON; what has an answer is a valid record."""
    for language, body in code_blocks(document):
        if language == "bash":
            done = subprocess.run(["bash", "-n"], input=body, capture_output=True, encoding="utf-8")
            assert done.returncode == 0, (name_of(document), body, done.stderr)
        for line in body.splitlines() if language == "json" else ():
            value = json.loads(line)
            record = records.without_marks(value)
            assert records.ANSWER not in value or records.validate(record) == []


@pytest.mark.parametrize("page", [PAGES / "scripts.md", PAGES_ZH / "scripts.md"], ids=name_of)
def test_table_of_variables(page: Path) -> None:
    """Each variable of finetune_cpm_bee.sh, with its defaults: the usual and the tiny model's."""
    rows = table_with(page, "GPUS_PER_NODE")
    assert set(rows) == variables_of("finetune_cpm_bee.sh")
    tiny = {"LOAD": "ckpts/cpm-bee-tiny", **settings_of("defaults+=(")}
    assert {name: cells[1].strip("`") for name, cells in rows.items() if cells[1]} == tiny
    usual = dict(re.findall(r"\$\{([A-Z_]+):-([^}$]+)\}", FINETUNE_SH))
    usual |= settings_of("defaults=(")
    for name in usual.keys() - {"MASTER_PORT"}:  # computed; said in words
        assert rows[name][0] == f"`{usual[name]}`", name
    own = variables_of("quickstart.sh", "venv.sh") - set(rows) - FOREIGN_VARIABLES
    assert own <= set(table_with(page, "RAW_DATA"))


@pytest.mark.parametrize("page", [PAGES / "data.md", PAGES_ZH / "data.md"], ids=name_of)
def test_flags_of_the_data_stages(page: Path) -> None:
    assert set(table_with(page, "--skip-bad")) == flags_of(REFORMAT) - {"--help"}
    general = {"--help", "--debug", "--lang", "--config"}
    preprocessing = flags_of("src/preprocess_dataset.py") - general
    assert preprocessing <= set(re.findall(r"--[a-z-]+", text_of(page)))


# ------------------------------------------------------------------ paths and links


def candidates(document: Path) -> set[str]:
    """All that looks like a path: words with a slash or with an ending that files here have."""
    text = re.sub(r"\]\([^)]*\)", "]", text_of(document))  # links have their own test
    text = "\n".join(line for line in text.splitlines() if not line.startswith("|  "))
    text = re.sub(r"\b\d+/\d+\b", "", text)
    text = re.sub(r"https?://[^\s`'\")]+", "", text)
    words = re.findall(r"(?<![\w/.<{$-])[.\w*…-]+(?:/[.\w*…-]+)*/?", text, re.A)
    endings = re.compile(r"\.(py|sh|md|jsonl?|txt|toml|bin|pt)$")
    found = {w for w in words if ("/" in w or endings.search(w)) and re.search("[a-z]", w)}
    return {w.rstrip(".") for w in found} - NOT_PATHS


def exists_somewhere(path: str, document: Path) -> bool:
    if any(fnmatch.fnmatchcase(path, pattern) for pattern in GENERATED):
        return True
    # docs/architecture.md is about the library, and names its files from there.
    library = [ROOT / "src" / "cpm_bee"] if document.name == "architecture.md" else []
    return any(any(place.glob(path)) if "*" in path else (place / path).exists()
               for place in [document.parent, *PLACES, *library])  # fmt: skip


@documents
def test_paths_exist(document: Path) -> None:
    by_name = {path.name for path in ROOT.glob("src/**/*.py")}
    folders = [TUTORIAL, ROOT / "scripts", PAGES]
    by_name |= {path.name for folder in folders for path in folder.iterdir()}
    missing = {p for p in candidates(document) if not exists_somewhere(p, document)} - by_name
    assert not missing, f"{name_of(document)} names what is not there"


def slug(heading: str) -> str:
    """The anchor that a heading gets: lower case, punctuation dropped, spaces to hyphens."""
    title = heading.lstrip("#").strip().lower()
    return re.sub(r"[^\w\- ]", "", title).replace(" ", "-")


@documents
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        path, _, anchor = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.exists(), f"{name_of(document)}: {target}"
        if anchor:
            anchors = {*map(slug, headings(linked)), *re.findall(r'<a id="(.+?)"', text_of(linked))}
            assert anchor in anchors, f"{name_of(document)}: {target}"


# ------------------------------------------------------------------ both languages


def shared(language: str, body: str) -> list[str]:
    """What both languages must share of a block: commands, data, paths, the edges of a graph."""
    if language == "mermaid":
        return re.sub(r'\["[^"]*"\]', "", body).splitlines()
    if "src/cpm_bee/" in body:
        return re.findall(r"^(?:\S+, )?\S+", body, re.M)
    return body.splitlines()


def test_every_page_is_there_in_chinese_or_said_to_be_english_only() -> None:
    assert {page.name for page in PAGES.glob("*.md")} - ENGLISH_ONLY == TRANSLATED
    for name in (*ENGLISH_ONLY, "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"):
        assert name in text_of(README_ZH).partition("只有英文版")[2], name


@pairs
def test_both_languages_have_the_same_headings_and_code(pair: tuple[Path, Path]) -> None:
    outlines = [[len(h) - len(h.lstrip("#")) for h in headings(page)] for page in pair]
    assert outlines[0] == outlines[1]
    english, chinese = ([(lang, shared(lang, b)) for lang, b in code_blocks(p)] for p in pair)
    assert english == chinese


@pairs
def test_both_languages_name_the_same_things(pair: tuple[Path, Path]) -> None:
    rows = [
        [[re.findall("`[^`]+`", row[0]) for row in table] for table in tables(page)]
        for page in pair
    ]
    assert rows[0] == rows[1]
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


def test_readmes_are_short_and_begin_with_the_two_commands() -> None:
    for document, limit in ((README, 10_000), (README_ZH, 12_000)):
        assert len(document.read_bytes()) <= limit
        first = ("bash", "bash scripts/quickstart.sh\nbash scripts/test.sh\n")
        assert code_blocks(document)[0] == first


def test_the_tutorial_word_for_word() -> None:
    for document in (README, README_ZH, TUTORIAL / "README.md", TUTORIAL / "README_zh.md"):
        assert ("bash", FIVE) in code_blocks(document), name_of(document)


def test_raw_examples_become_the_shown_record(tmp_path: Path) -> None:
    lines = [line for language, body in code_blocks(TUTORIAL / "README.md") if language == "json"
             for line in body.splitlines()]  # fmt: skip
    raw = [line for line in lines if "target" in line or "translation" in line]
    assert len(raw) == 2
    (tmp_path / "raw.jsonl").write_text("\n".join(raw), encoding="utf-8")
    result = run_script(REFORMAT, "--input", tmp_path / "raw.jsonl", "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    made = (tmp_path / "out" / "raw.jsonl").read_text(encoding="utf-8").splitlines()
    assert made[0] == made[1]
    assert made[0] in lines


def messages_of_the_sources() -> str:
    """The texts of all sources, with `…` where a value is put in, and those of the scripts."""
    parts = [text_of(path) for path in (ROOT / "scripts").glob("*.sh")]
    for path in [*ROOT.glob("src/**/*.py"), *TUTORIAL.glob("*.py")]:
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.JoinedStr):
                pieces = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                parts.append("".join(map(str, pieces)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts.append(node.value)
    return "\n".join(parts)


def test_messages_in_troubleshooting_are_those_of_the_code() -> None:
    messages = messages_of_the_sources()
    # The last table has messages of the original.
    *ours, theirs = tables(PAGES / "troubleshooting.md")
    assert any("CUDA_HOME" in row[0] for row in theirs)
    rows = [row for table in ours for row in table]
    quoted = [m for row in rows for m in re.findall("`([^`]+)`", row[0]) if " " in m]
    assert len(quoted) > 15
    for message in quoted:
        for piece in message.replace("'torch'", "…").split("…"):
            assert piece.strip() in messages, message


def test_log_examples_have_the_fields_of_a_log() -> None:
    log = text_of(ROOT / "scripts" / "tiny_base" / "training-log.jsonl")
    real = {e["event"]: e for e in map(json.loads, log.splitlines())}
    real["end"]["finished"] = True  # that log was written before there was this field
    (example,) = [b for _, b in code_blocks(PAGES / "files.md") if '"event"' in b]
    shown = {e["event"]: e for e in map(json.loads, example.splitlines())}
    assert list(shown.pop("samples")) == train_support.SAMPLES_FIELDS  # newer than that log
    assert list(shown.pop("digest")) == train_support.DIGEST_FIELDS  # likewise
    assert {e: list(fields) for e, fields in shown.items()} == {e: list(f) for e, f in real.items()}
    assert set(shown["start"]["options"]) <= set(real["start"]["options"])


def test_licence_is_the_text_of_apache_2() -> None:
    # sha256 of the text as it is published, with its first empty line and the appendix.
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert 'license = { text = "Apache-2.0" }' in text_of(ROOT / "pyproject.toml")


def test_map_of_the_repository() -> None:
    """It names all that stands at the root."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, encoding="utf-8")
    if listed.returncode or not listed.stdout:
        pytest.skip("this is no git repository")
    (body,) = [b for _, b in code_blocks(PAGES / "files.md") if "src/cpm_bee/" in b]
    shown = {path.partition("/")[0] for line in re.findall(r"^(?:\S+, )*\S+", body, re.M)
             for path in line.split(", ")}  # fmt: skip
    assert {path.partition("/")[0] for path in listed.stdout.splitlines()} == shown
