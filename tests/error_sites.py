"""Finds, in the source, the texts of all messages that a user can see as an error."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from sources import Sources
from text_flow import CUT, SAID, TextFlow

# Constructors whose first argument is a text for users. A ValueError's text is shown where another
# function puts it into an InputError.
ERRORS = {"InputError", "RunError", "DamagedFile", "InterruptedRun", "CpmBeeError", "BusyError"}
ERRORS |= {"MarkupError", "ArgumentTypeError", "ValueError", "UnpicklingError", "BadRow"}
# Functions that return reasons and are handed on, so that no call can be followed to them.
MAKE_REASONS = {"validate"}
MAKE_MESSAGE = {"_message_of"}


class Text(NamedTuple):
    """A text of the source: a message with holes for its values."""

    place: str  # file:line
    text: str


def messages(sources: Sources) -> Iterator[Text]:
    """All texts of errors, as `InputError(...)` or `problems.add(...)` gets them."""
    for name, calls in sources.calls.items():
        for call, function, module in calls:
            place = f"{module.path.relative_to(sources.root.parent)}:{call.lineno}"
            flow = TextFlow(sources, function, module)
            for text in dict.fromkeys(_texts_of(name, call, flow)):
                if CUT not in text:
                    yield Text(place, text)
    for name in sorted(MAKE_REASONS | MAKE_MESSAGE):
        for function in sources.functions.get(name, []):
            line = function.node.lineno
            place = f"{function.module.path.relative_to(sources.root.parent)}:{line}"
            call = ast.Call(ast.Name(name), [], [])
            flow = TextFlow(sources, None, function.module)
            for text in flow.items(call) if name in MAKE_REASONS else flow.texts(call):
                yield Text(place, text)


def _texts_of(name: str, call: ast.Call, flow: TextFlow) -> Iterator[str]:
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
