"""Follows texts through the source to where they are written, for `error_sites`.

A text is followed through f-strings, conditional expressions, local variables, module constants,
parameters, and functions that return it. What cannot be followed is a hole, which stands for a
value.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterable, Iterator

from sources import Function, Module, Sources, bind, called, names_in, own_nodes

HOLE = "\0"
CUT = "\1"  # where a function calls itself: its other texts are all that it has
# Functions that print a text in the user's language, or return it so.
SAID = {"say", "said"}
# Functions that show a value, whatever it is.
SHOWS = {"shown", "describe", "quote", "command_line", "shown_bytes"}
_UNITS = re.compile(rf"({HOLE}|[\W\d]|bytes|[kMGT]i?B|s|min|h|days|\?)*")
_MOST_FORMS = 400  # of one text


class TextFlow:
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

    def _in(
        self, function: Function | None, module: Module, node: ast.AST | None = None
    ) -> TextFlow:
        active = self._active | {id(node)} if node else self._active
        return TextFlow(self.sources, function, module, active)

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
                return
            found = [text for function in is_text for text in self._returned(function)]
            # A function that writes a number with its unit shows a value.
            yield from [HOLE] if all(map(_UNITS.fullmatch, found)) else found

    def _returned(self, function: Function) -> Iterator[str]:
        flow = self._in(function, function.module, function.node)
        if id(function.node) in self._active:
            yield CUT
            return
        for node in own_nodes(function.node):
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
                    yield CUT
                    continue
                for inner in own_nodes(function.node):
                    if isinstance(inner, ast.Yield) and inner.value is not None:
                        yield from flow.texts(inner.value)
                    elif isinstance(inner, (ast.Return, ast.YieldFrom)) and inner.value is not None:
                        yield from flow.items(inner.value)
        elif isinstance(node, ast.Name) and self.function:
            for kind, value in self._bindings(node.id):
                if kind == "value":
                    yield from self.items(value)
            for inner in own_nodes(self.function.node):
                if isinstance(inner, ast.AugAssign) and names_in(inner.target) == [node.id]:
                    yield from self.items(inner.value)
                if (
                    isinstance(inner, ast.Call)
                    and called(inner) == "append"
                    and isinstance(inner.func, ast.Attribute)
                    and names_in(inner.func.value) == [node.id]
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
                    bind(target, node.value, bound)
                    if name in bound:
                        yield "value", bound[name]
                    elif isinstance(target, ast.Tuple) and name in names_in(target):
                        index = names_in(target).index(name)
                        yield f"part {index}", node.value
            elif isinstance(node, ast.AnnAssign) and node.value and names_in(node.target) == [name]:
                yield "value", node.value
            elif isinstance(node, ast.AugAssign) and names_in(node.target) == [name]:
                yield "added", node.value
            elif isinstance(node, ast.NamedExpr) and node.target.id == name:
                yield "value", node.value
            elif isinstance(node, (ast.For, ast.comprehension)):
                if names_in(node.target) == [name]:
                    yield "item", node.iter
                elif name in names_in(node.target):
                    yield f"item part {names_in(node.target).index(name)}", node.iter

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
                for node in own_nodes(function.node):
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
                for node in own_nodes(function.node):
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
    return [text for text in found if CUT not in text] or [CUT]


def _is_chained(call: ast.Call) -> bool:
    """Whether a method of a result is called, which is none of our functions."""
    return isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Call)


def _returns_text(function: Function) -> bool:
    returns = function.node.returns
    return returns is not None and "str" in ast.unparse(returns).replace("|", " ").split()
