"""docs/architecture.md against the code: files and names exist, the diagram is the import order."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from support import ROOT
from test_package import FLOORS

LIBRARY = ROOT / "src" / "cpm_bee"
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.M | re.S)
SPANS = sorted(set(re.findall(r"`([^`\n]+)`", PROSE)))
PATH = r"[\w./-]*/|(?:[\w./-]+/)?[\w-]+\.(?:py|sh|md|jsonl|toml)"
# A class, function or constant. Lower-case words without a dot or an underscore are other things.
NAME = r"(?=.*[A-Z._])[A-Za-z_]\w*(?:\.\w+)?"
# What a run makes, and what other packages have.
NOT_OURS = {"meta.bin", "OUTPUT", "OUTPUT.partial", "torch.distributed"}
NOT_OURS |= {"scaled_dot_product_attention", "torch.save"}

Members = dict[str, set[str]]


def found_at(path: str) -> Path | None:
    """Paths of the page begin at the root of the repository or in the library."""
    return next((place / path for place in (ROOT, LIBRARY) if (place / path).exists()), None)


def defined_by(statement: ast.stmt) -> list[str]:
    if isinstance(statement, (ast.ClassDef, ast.FunctionDef)):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    targets = [statement.target] if isinstance(statement, ast.AnnAssign) else targets
    return [target.id for target in targets if isinstance(target, ast.Name)]


def members_of(path: Path) -> Members:
    """The names that a module defines; for each class, those that it defines."""
    found: Members = {}
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        body = statement.body if isinstance(statement, ast.ClassDef) else []
        for name in defined_by(statement):
            found[name] = {member for inner in body for member in defined_by(inner)}
    return found


def is_defined(name: str, modules: list[Members]) -> bool:
    owner, _, member = name.partition(".")
    return any(owner in m and (not member or member in m[owner]) for m in modules)


def test_paths_exist() -> None:
    paths = [span for span in SPANS if re.fullmatch(PATH, span)]
    assert len(paths) > 100
    assert [path for path in paths if found_at(path) is None] == []


def test_names_exist() -> None:
    names = [s for s in SPANS if re.fullmatch(NAME, s) and not re.fullmatch(PATH, s)]
    names = [name for name in names if name not in NOT_OURS]
    modules = [members_of(p) for p in [*LIBRARY.rglob("*.py"), *ROOT.glob("tests/*.py")]]
    assert len(names) > 50
    assert [name for name in names if not is_defined(name, modules)] == []


def test_names_are_in_the_file_beside_them() -> None:
    """`name` (`file`), `name` in `file` and `name` of `file`."""
    beside = re.findall(rf"`([\w.]+)`\s(?:\(|in\s|of\s)`({PATH})`", PROSE)
    beside = [(name, path) for name, path in beside if path.endswith(".py")]
    assert len(beside) > 30
    wrong = []
    for name, path in beside:
        file = found_at(path)
        if name not in NOT_OURS and (file is None or not is_defined(name, [members_of(file)])):
            wrong.append((name, path))
    assert wrong == []


def test_every_folder_is_named() -> None:
    """The library's folders and its single modules, and the entry scripts."""
    folders = [path.parent.relative_to(ROOT) for path in LIBRARY.rglob("*/__init__.py")]
    modules = [path.name for path in LIBRARY.glob("*.py") if path.name != "__init__.py"]
    scripts = [path.relative_to(ROOT) for path in ROOT.glob("src/*.py")]
    assert len(folders) > 8 and len(modules) > 8 and len(scripts) >= 5
    expected = [*(f"{folder}/" for folder in folders), *modules, *map(str, scripts)]
    assert [path for path in expected if path not in SPANS] == []


def test_the_first_diagram_is_the_import_order() -> None:
    diagram = TEXT.split("```mermaid\n")[1].split("```")[0]
    labels = dict(re.findall(r'^ +(\w+)\["([^"]+)"\]$', diagram, re.M))
    (chain,) = re.findall(r"^ +(\w+(?: --> \w+)+)$", diagram, re.M)
    shown = [labels[node].split(", ") for node in chain.split(" --> ")]
    assert [sorted(box) for box in shown] == [sorted(floor) for floor in FLOORS]
