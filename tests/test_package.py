"""Importing the library stays light, --help answers at once, and nothing imports upwards."""

from __future__ import annotations

import ast
import pkgutil
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT, run_script

import cpm_bee

MODULES = [m.name for m in pkgutil.walk_packages(cpm_bee.__path__, "cpm_bee.")]


def test_no_module_imports_bmtrain_or_matplotlib() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n"
    code += "".join(f"import {name}\n" for name in MODULES)
    code += "assert not {'bmtrain', 'matplotlib'} & {name.split('.')[0] for name in sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "script",
    [
        "finetune_cpm_bee.py",
        "text_generation.py",
        "evaluate.py",
        "preprocess_dataset.py",
        "convert_data.py",
        "inspect_data.py",
        "merge_delta.py",
        "convert_checkpoint.py",
        "doctor.py",
        "serve.py",
        "verify.py",
        "plan.py",
    ],
)
def test_help_is_quick(script: str) -> None:
    """Under a second on an idle machine; the best of three allows for a busy one."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = run_script(f"src/{script}", "--help")
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0 and "usage:" in done.stdout
    assert min(seconds) < 1
    loads = f"import sys; sys.argv = [{script!r}, '--help']\n"
    loads += (
        f"import runpy\ntry: runpy.run_path({str(ROOT / 'src' / script)!r}, run_name='__main__')\n"
    )
    loads += "except SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", loads], check=True, capture_output=True, cwd=ROOT / "src")


def test_data_reformat_runs_without_anything_installed() -> None:
    """The first step of the tutorial, and a file that people copy: -S and -I find no package."""
    script = ROOT / "tutorials" / "basic_task_finetune" / "data_reformat.py"
    subprocess.run([sys.executable, "-S", "-I", script, "--help"], check=True, capture_output=True)


# ------------------------------------------------------------------ the import graph

# From the ground up. Modules of one floor may import each other where there is no circle.
# `rank` imports nothing of ours: it reads the environment, and all messages need it.
FLOORS = [
    [
        "errors",
        "error_codes",
        "language",
        "checksums",
        "disk",
        "paths",
        "temporary_files",
        "files",
        "progress",
        "html_pages",
        "cli",
        "config_file",
        "options",
        "hints",
        "distributed.rank",
    ],
    ["json_lines", "records", "tokenizer", "extension", "segments", "encoding"],
    ["data"],
    ["checkpoint", "model", "delta", "quantize", "pretrained"],
    ["distributed"],
    ["engine"],
    ["train", "generate", "report"],
    ["evaluate", "doctor", "serve"],
]


def floor_of(module: str) -> int:
    """The floor whose entry names the module, or the folder that it is in, most exactly."""
    name = module.removeprefix("cpm_bee.")
    entries = [(entry, i) for i, floor in enumerate(FLOORS) for entry in floor]
    found = [(e, i) for e, i in entries if name == e or name.startswith(e + ".")]
    assert found, f"{module} is on no floor: add it to FLOORS"
    return max(found, key=lambda entry: len(entry[0]))[1]


def source_of(module: str) -> ast.Module:
    path = ROOT / "src" / Path(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_names(tree: ast.AST) -> list[str]:
    """Whole names of all that a module imports anywhere, late imports included."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def import_graph() -> dict[str, set[str]]:
    """Which of our modules each of them imports."""
    known = set(MODULES)
    graph = {}
    for module in MODULES:
        names = imported_names(source_of(module))
        # `from package import x`: a module x, or something of the package's own.
        targets = {n if n in known else n.rpartition(".")[0] for n in names}
        graph[module] = (targets & known) - {module}
    return graph


def test_nothing_imports_upwards() -> None:
    upward = [
        f"{module} imports {target}"
        for module, targets in import_graph().items()
        for target in targets
        if floor_of(target) > floor_of(module)
    ]
    assert upward == []


def test_imports_have_no_circle() -> None:
    graph = import_graph()
    assert sum(map(len, graph.values())) > 100  # or nothing is seen
    while graph:
        free = [module for module, targets in graph.items() if not targets & graph.keys()]
        assert free, f"a circle among {sorted(graph)}"
        for module in free:
            del graph[module]


def modules_that_import(package: str, *, late: bool = True) -> set[str]:
    """Our modules that import a package anywhere or, unless `late`, at their own import."""
    found = set()
    for module in MODULES:
        tree = source_of(module)
        parts: list[ast.AST] = [tree] if late else list(tree.body)
        if not late:
            parts = [node for node in parts if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = [name for part in parts for name in imported_names(part)]
        if any(name == package or name.startswith(package + ".") for name in names):
            found.add(module)
    return found


def test_two_packages_know_torch_distributed_and_one_file_bmtrain() -> None:
    using = modules_that_import("torch.distributed")
    assert {module.split(".")[1] for module in using} == {"distributed", "engine"}
    assert modules_that_import("bmtrain") == {"cpm_bee.engine.bmtrain_engine"}
    assert modules_that_import("bmtrain", late=False) == set()


def test_no_code_asks_which_engine_it_has() -> None:
    """Whatever is asked of an engine is in the protocol."""
    asking = [
        path.name
        for path in (ROOT / "src").rglob("*.py")
        if re.search(r"isinstance\([^)]*(Engine|Strategy)\b", path.read_text(encoding="utf-8"))
    ]
    assert asking == []


def test_options_name_the_ways_that_engines_have() -> None:
    from cpm_bee.engine import parallel_strategy, select
    from cpm_bee.train.options import Options

    choices = {flag.name: flag.choices for flag in Options.flags()}
    ways = (parallel_strategy.AUTO, parallel_strategy.DDP, parallel_strategy.FSDP)
    assert choices["parallel"] == ways
    assert choices["engine"] == (select.AUTO, select.TORCH, select.BMTRAIN)
