"""Finds, in the source, the texts of all messages that a user can see as an error.

The texts are followed to where they are written: through f-strings, conditional expressions, local
variables, module constants, parameters, and functions that return a reason. What cannot be followed
is a hole (`HOLE`), which stands for a value.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

HOLE = "\0"
_CUT = "\1"  # where a function calls itself: the other texts are all there are
SRC = Path(__file__).resolve().parents[1] / "src"

# Constructors whose first argument is a text for users. A ValueError's text is shown where another
# function puts it into an InputError.
ERRORS = {"InputError", "RunError", "DamagedFile", "InterruptedRun", "CpmBeeError", "BusyError"}
ERRORS |= {"MarkupError", "ArgumentTypeError", "ValueError", "UnpicklingError", "BadRow"}
# Functions that print a text in the user's language.
SAID = {"say", "said"}
# Functions that show a value, whatever it is.
SHOWS = {"shown", "describe", "quote", "command_line", "shown_bytes"}
# Functions that return reasons and are handed on, so that no call can be followed to them.
MAKE_REASONS = {"validate"}
MAKE_MESSAGE = {"_message_of"}
_MOST_FORMS = 400  # of one text


class Text(NamedTuple):
    """A text of the source: a message with holes for its values."""

    place: str  # file:line
    text: str


@dataclass
class Function:
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
    path: Path
    tree: ast.Module

    @cached_property
    def constants(self) -> dict[str, ast.expr]:
        found: dict[str, ast.expr] = {}
        for node in self.tree.body:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    _bind(target, node.value, found)
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


def _bind(target: ast.expr, value: ast.expr, found: dict[str, ast.expr]) -> None:
    if isinstance(target, ast.Name):
        found[target.id] = value
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for one, its in zip(target.elts, value.elts, strict=False):
            _bind(one, its, found)


class Sources:
    """All of src/, parsed."""

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

    def messages(self) -> Iterator[Text]:
        """All texts of errors, as `InputError(...)` or `problems.add(...)` gets them."""
        for name, calls in self.calls.items():
            for call, function, module in calls:
                place = f"{module.path.relative_to(self.root.parent)}:{call.lineno}"
                flow = _Flow(self, function, module)
                for text in dict.fromkeys(self._texts_of(name, call, flow)):
                    if _CUT not in text:
                        yield Text(place, text)
        for name in sorted(MAKE_REASONS | MAKE_MESSAGE):
            for function in self.functions.get(name, []):
                line = function.node.lineno
                place = f"{function.module.path.relative_to(self.root.parent)}:{line}"
                call = ast.Call(ast.Name(name), [], [])
                flow = _Flow(self, None, function.module)
                for text in flow.items(call) if name in MAKE_REASONS else flow.texts(call):
                    yield Text(place, text)

    def _texts_of(self, name: str, call: ast.Call, flow: _Flow) -> Iterator[str]:
        keywords = {k.arg: k.value for k in call.keywords}
        if name in ERRORS and call.args:
            yield from flow.texts(call.args[0])
        elif name == "raise_if_any":
            header = flow.texts(call.args[0])
            remedy = [*call.args[1:], *filter(None, [keywords.get("remedy")])]
            yield from header
            for one in remedy:
                yield from flow.texts(one)
        elif name == "add" and _is_of(call, "problems"):
            where, reason = (flow.texts(a) for a in call.args)
            yield from (f"  {w}: {r}" for w, r in itertools.product(where, reason))
        elif name == "extend" and _is_of(call, "problems") and len(call.args) == 2:
            where, reasons = flow.texts(call.args[0]), flow.items(call.args[1])
            yield from (f"  {w}: {r}" for w, r in itertools.product(where, reasons))
        elif (name == "error" and (_is_of(call, "self") or _is_of(call, "parser"))) or (
            name in SAID and call.args
        ):
            yield from flow.texts(call.args[0])


def _is_of(call: ast.Call, owner: str) -> bool:
    """Whether a method of a variable is called that has this name."""
    value = call.func.value if isinstance(call.func, ast.Attribute) else None
    name = value.attr if isinstance(value, ast.Attribute) else getattr(value, "id", "")
    return owner in str(name)


def called(call: ast.Call) -> str:
    """The last name of what is called."""
    if isinstance(call.func, ast.Name):
        return call.func.id
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


class _Flow:
    """Where the texts of expressions in one function come from."""

    def __init__(
        self,
        sources: Sources,
        function: Function | None,
        module: Module,
        active: frozenset[int] = frozenset(),
    ) -> None:
        self.sources, self.function, self.module = sources, function, module
        self._active = active  # what is being followed: a function may call itself

    def texts(self, node: ast.expr) -> list[str]:
        """All forms that the text of an expression can have."""
        if id(node) in self._active:
            return [HOLE]
        deeper = self._in(self.function, self.module, node)
        return _without_cuts(deeper._texts(node))[:_MOST_FORMS]

    def _in(self, function: Function | None, module: Module, node: ast.AST | None = None) -> _Flow:
        active = self._active | {id(node)} if node else self._active
        return _Flow(self.sources, function, module, active)

    def _texts(self, node: ast.expr) -> Iterator[str]:
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str):
                yield node.value
            elif node.value is not None:
                yield HOLE
        elif isinstance(node, ast.JoinedStr):
            parts = [
                [str(p.value)] if isinstance(p, ast.Constant) else self._formatted(p)
                for p in node.values
            ]
            for text in map("".join, itertools.islice(itertools.product(*parts), _MOST_FORMS)):
                yield re.sub(f"{HOLE}+", HOLE, text)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            both = itertools.product(self.texts(node.left), self.texts(node.right))
            yield from (a + b for a, b in both)
        elif isinstance(node, ast.IfExp):
            yield from self.texts(node.body) + self.texts(node.orelse)
        elif isinstance(node, ast.BoolOp):
            for value in node.values:
                yield from self.texts(value)
        elif isinstance(node, ast.NamedExpr):
            yield from self.texts(node.value)
        elif isinstance(node, ast.Call):
            yield from self._of_call(node)
        elif isinstance(node, ast.Name):
            yield from self._of_name(node.id)
        elif isinstance(node, ast.Subscript):
            yield from self._of_subscript(node)
        else:
            yield HOLE

    def _formatted(self, part: ast.expr) -> list[str]:
        assert isinstance(part, ast.FormattedValue)
        if part.format_spec is not None or part.conversion == ord("r"):
            return [HOLE]
        texts = self.texts(part.value)
        return texts

    def _of_call(self, node: ast.Call) -> Iterator[str]:
        name = called(node)
        if name == "join" and isinstance(node.func, ast.Attribute) and node.args:
            # One item stands for all.
            yield from self.items(node.args[0])
        elif name in ("rstrip", "strip", "lower", "removesuffix") and isinstance(
            node.func, ast.Attribute
        ):
            yield from self.texts(node.func.value)
        elif name == "format" and isinstance(node.func, ast.Attribute):
            for text in self.texts(node.func.value):
                yield re.sub(r"\{[^{}]*\}", HOLE, text)
        elif name in ("str", *SAID) and node.args:
            yield from self.texts(node.args[0])
        elif name in SHOWS or _is_chained(node):
            yield HOLE
        else:
            functions = self.sources.functions.get(name, [])
            here = [f for f in functions if f.module is self.module]
            functions = here or functions
            is_text = [f for f in functions if _returns_text(f)]
            if not is_text or len(functions) > 3:
                yield HOLE
            for function in is_text if len(functions) <= 3 else []:
                yield from self._returned(function)

    def _returned(self, function: Function) -> Iterator[str]:
        flow = self._in(function, function.module, function.node)
        if id(function.node) in self._active:
            yield _CUT
            return
        for node in _own(function.node):
            if isinstance(node, ast.Return) and node.value is not None:
                yield from flow.texts(node.value)

    def items(self, node: ast.expr) -> list[str]:
        """The texts of the items of an iterable."""
        if id(node) in self._active:
            return [HOLE]
        deeper = self._in(self.function, self.module, node)
        return _without_cuts(deeper._items(node))

    def _items(self, node: ast.expr) -> Iterator[str]:
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            for element in node.elts:
                if isinstance(element, ast.Starred):
                    yield from self.items(element.value)
                else:
                    yield from self.texts(element)
        elif isinstance(node, (ast.ListComp, ast.GeneratorExp)):
            yield from self.texts(node.elt)
        elif isinstance(node, ast.BinOp):
            yield from self.items(node.left) + self.items(node.right)
        elif isinstance(node, ast.IfExp):
            yield from self.items(node.body) + self.items(node.orelse)
        elif isinstance(node, ast.Call) and called(node) in ("filter", "map") and node.args[1:]:
            yield from self.items(node.args[1])
        elif isinstance(node, ast.BoolOp):
            for value in node.values:
                yield from self.items(value)
        elif isinstance(node, ast.Call) and called(node) in ("list", "sorted", "tuple", "islice"):
            yield from self.items(node.args[0])
        elif isinstance(node, ast.Call):
            functions = self.sources.functions.get(called(node), [])
            functions = [f for f in functions if f.module is self.module] or functions
            for function in functions[:3]:
                flow = self._in(function, function.module, function.node)
                if id(function.node) in self._active:
                    yield _CUT
                    continue
                for inner in _own(function.node):
                    if isinstance(inner, ast.Yield) and inner.value is not None:
                        yield from flow.texts(inner.value)
                    elif isinstance(inner, (ast.Return, ast.YieldFrom)) and inner.value is not None:
                        yield from flow.items(inner.value)
        elif isinstance(node, ast.Name) and self.function:
            for kind, value in self._bindings(node.id):
                if kind == "value":
                    yield from self.items(value)
            for inner in _own(self.function.node):
                if isinstance(inner, ast.AugAssign) and _names(inner.target) == [node.id]:
                    yield from self.items(inner.value)
                if (
                    isinstance(inner, ast.Call)
                    and called(inner) == "append"
                    and isinstance(inner.func, ast.Attribute)
                    and _names(inner.func.value) == [node.id]
                ):
                    yield from self.texts(inner.args[0])

    def _bindings(self, name: str) -> Iterator[tuple[str, ast.expr]]:
        """How a name gets its values in this function: ("value" or "item", expression)."""
        if self.function is None:
            return
        for node in ast.walk(self.function.node):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    bound: dict[str, ast.expr] = {}
                    _bind(target, node.value, bound)
                    if name in bound:
                        yield "value", bound[name]
                    elif isinstance(target, ast.Tuple) and name in _names(target):
                        index = _names(target).index(name)
                        yield f"part {index}", node.value
            elif isinstance(node, ast.AnnAssign) and node.value and _names(node.target) == [name]:
                yield "value", node.value
            elif isinstance(node, ast.AugAssign) and _names(node.target) == [name]:
                yield "added", node.value
            elif isinstance(node, ast.NamedExpr) and node.target.id == name:
                yield "value", node.value
            elif isinstance(node, (ast.For, ast.comprehension)):
                if _names(node.target) == [name]:
                    yield "item", node.iter
                elif name in _names(node.target):
                    yield f"item part {_names(node.target).index(name)}", node.iter

    def _of_name(self, name: str) -> Iterator[str]:
        bindings = list(self._bindings(name))
        if bindings:
            added = [value for kind, value in bindings if kind == "added"]
            for kind, value in bindings:
                if kind == "value":
                    for text in self.texts(value):
                        yield text
                        yield from (text + more for one in added for more in self.texts(one))
                elif kind == "item":
                    yield from self.items(value)
                elif kind.startswith("part"):
                    yield from self._tuple_part(value, int(kind.split()[-1]))
                elif kind.startswith("item part"):
                    yield from self._item_part(value, int(kind.split()[-1]))
            return
        if self.function and name in self.function.parameters:
            yield from self._of_parameter(name)
            return
        yield from self._of_constant(name)

    def _of_constant(self, name: str) -> Iterator[str]:
        module, value = self.module, self.module.constants.get(name)
        if value is None and name in self.module.imports:
            where, original = self.module.imports[name]
            if where in self.sources.modules:
                module = self.sources.modules[where]
                value = module.constants.get(original)
        if value is None:
            yield HOLE
        else:
            yield from self._in(None, module).texts(value)

    def _of_parameter(self, name: str) -> Iterator[str]:
        """The texts that callers give; a hole if there are none that are literal."""
        assert self.function is not None
        function = self.function
        arguments = function.node.args
        positional = [*arguments.posonlyargs, *arguments.args]
        first = len(positional) - len(arguments.defaults)
        with_default = [*zip(positional[first:], arguments.defaults, strict=True)]
        with_default += [
            (argument, default)
            for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
            if default is not None
        ]
        defaults = {argument.arg: default for argument, default in with_default}
        if name in defaults:
            yield from self.texts(defaults[name])
        own = function.node.name
        if own == "__init__" and function.parent:
            own = function.parent.name
        for call, caller, module in self.sources.calls.get(own, []):
            flow = self._in(caller, module)
            given = {k.arg: k.value for k in call.keywords}
            if name in function.positional and len(call.args) > function.positional.index(name):
                given[name] = call.args[function.positional.index(name)]
            if name in given and not isinstance(given[name], ast.Starred):
                yield from flow.texts(given[name])

    def _tuple_part(self, value: ast.expr, index: int) -> Iterator[str]:
        if isinstance(value, ast.IfExp):
            yield from self._tuple_part(value.body, index)
            yield from self._tuple_part(value.orelse, index)
        elif isinstance(value, ast.Tuple) and index < len(value.elts):
            yield from self.texts(value.elts[index])
        elif isinstance(value, ast.Call):
            functions = self.sources.functions.get(called(value), [])
            functions = [f for f in functions if f.module is self.module] or functions
            for function in functions[:2]:
                flow = self._in(function, function.module)
                for node in _own(function.node):
                    if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
                        yield from flow._tuple_part(node.value, index)
        else:
            yield HOLE

    def _item_part(self, value: ast.expr, index: int) -> Iterator[str]:
        if isinstance(value, ast.Name) and not list(self._bindings(value.id)):
            constant = self.module.constants.get(value.id)
            value = constant if constant is not None else value
        if isinstance(value, ast.Name):
            for kind, bound in self._bindings(value.id):
                if kind == "value" and not isinstance(bound, ast.Name):
                    yield from self._item_part(bound, index)
            return
        if isinstance(value, ast.Call) and called(value) == "items" and index == 1:
            inner = value.func.value if isinstance(value.func, ast.Attribute) else None
            if isinstance(inner, ast.Name):
                bound_values = [b for _, b in self._bindings(inner.id)]
                bound_values += filter(None, [self.module.constants.get(inner.id)])
                for one in bound_values:
                    if isinstance(one, ast.DictComp):
                        yield from self.texts(one.value)
                    if isinstance(one, ast.Dict):
                        for element in one.values:
                            yield from self.texts(element)
            elif isinstance(inner, ast.Dict):
                for element in inner.values:
                    yield from self.texts(element)
        elif isinstance(value, (ast.ListComp, ast.GeneratorExp)):
            yield from self._tuple_part(value.elt, index)
        elif isinstance(value, (ast.Tuple, ast.List)):
            for element in value.elts:
                if isinstance(element, ast.Tuple) and index < len(element.elts):
                    yield from self.texts(element.elts[index])
        elif isinstance(value, ast.Call):
            for function in self.sources.functions.get(called(value), [])[:2]:
                flow = self._in(function, function.module)
                for node in _own(function.node):
                    if isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple):
                        yield from flow._tuple_part(node.value, index)
                    if isinstance(node, ast.Return) and node.value is not None:
                        yield from flow._item_part(node.value, index)

    def _of_subscript(self, node: ast.Subscript) -> Iterator[str]:
        value = node.value
        if isinstance(value, ast.Name):
            value = self.module.constants.get(value.id, value)
        if isinstance(value, ast.Dict):
            for one in value.values:
                yield from self.texts(one)
        else:
            yield HOLE


def _without_cuts(texts: Iterable[str]) -> list[str]:
    """The texts, or a hole if there are none; one cut is left where all are."""
    found = list(dict.fromkeys(texts)) or [HOLE]
    return [text for text in found if _CUT not in text] or [_CUT]


def _is_chained(call: ast.Call) -> bool:
    """Whether a method of a result is called, which is none of our functions."""
    return isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Call)


def _returns_text(function: Function) -> bool:
    returns = function.node.returns
    return returns is not None and "str" in ast.unparse(returns).replace("|", " ").split()


def _names(target: ast.expr) -> list[str]:
    if isinstance(target, ast.Name):
        return [target.id]
    if isinstance(target, (ast.Tuple, ast.List)):
        return [name for element in target.elts for name in _names(element)]
    return []


def _own(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of a function without those of functions inside it."""
    stack: list[ast.AST] = list(function.body)
    while stack:
        node = stack.pop(0)
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            stack[:0] = list(ast.iter_child_nodes(node))
