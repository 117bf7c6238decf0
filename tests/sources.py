"""The source of the library, parsed: its functions, its calls, its constants."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

SRC = Path(__file__).resolve().parents[1] / "src"


@dataclass
class Function:
    """A function, where it stands."""

    node: ast.FunctionDef
    module: Module
    parent: ast.ClassDef | None

    @cached_property
    def parameters(self) -> list[str]:
        arguments = self.node.args
        return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]

    @cached_property
    def positional(self) -> list[str]:
        """The parameters as a caller counts them: without self."""
        names = [a.arg for a in (*self.node.args.posonlyargs, *self.node.args.args)]
        return names[1:] if names[:1] in (["self"], ["cls"]) else names


@dataclass
class Module:
    """A file."""

    path: Path
    tree: ast.Module

    @cached_property
    def constants(self) -> dict[str, ast.expr]:
        found: dict[str, ast.expr] = {}
        for node in self.tree.body:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    bind(target, node.value, found)
            elif (
                isinstance(node, ast.AnnAssign) and node.value and isinstance(node.target, ast.Name)
            ):
                found[node.target.id] = node.value
        return found

    @cached_property
    def imports(self) -> dict[str, tuple[str, str]]:
        """Local name -> module and name there."""
        return {
            alias.asname or alias.name: (node.module or "", alias.name)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }


def bind(target: ast.expr, value: ast.expr, found: dict[str, ast.expr]) -> None:
    if isinstance(target, ast.Name):
        found[target.id] = value
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for one, its in zip(target.elts, value.elts, strict=False):
            bind(one, its, found)


class Sources:
    """All of src/, with all functions and calls by name."""

    def __init__(self, root: Path = SRC) -> None:
        self.root = root
        self.modules: dict[str, Module] = {}
        self.functions: dict[str, list[Function]] = {}
        self.calls: dict[str, list[tuple[ast.Call, Function | None, Module]]] = {}
        for path in sorted(root.rglob("*.py")):
            if "egg-info" in str(path):
                continue
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            module = Module(path, ast.parse(path.read_text(encoding="utf-8")))
            self.modules[name.removesuffix(".__init__")] = module
            self._index(module, module.tree, None, None)

    def _index(
        self, module: Module, node: ast.AST, function: Function | None, parent: ast.ClassDef | None
    ) -> None:
        for child in ast.iter_child_nodes(node):
            inner, owner = function, parent
            if isinstance(child, ast.FunctionDef):
                inner = Function(child, module, parent)
                self.functions.setdefault(child.name, []).append(inner)
            elif isinstance(child, ast.ClassDef):
                owner = child
            elif isinstance(child, ast.Call):
                self.calls.setdefault(called(child), []).append((child, function, module))
            self._index(module, child, inner, owner)


def called(call: ast.Call) -> str:
    """The last name of what is called."""
    if isinstance(call.func, ast.Name):
        return call.func.id
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


def names_in(target: ast.expr) -> list[str]:
    if isinstance(target, ast.Name):
        return [target.id]
    if isinstance(target, (ast.Tuple, ast.List)):
        return [name for element in target.elts for name in names_in(element)]
    return []


def own_nodes(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of a function without those of functions inside it."""
    stack: list[ast.AST] = list(function.body)
    while stack:
        node = stack.pop(0)
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            stack[:0] = list(ast.iter_child_nodes(node))
