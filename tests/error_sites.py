"""Finds, in the source, the texts of all messages that a user can see as an error."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

from sources import Sources
from text_flow import CUT, HOLE, SAID, TextFlow

# Constructors whose first argument is a text for users. A ValueError's text is shown where another
# function puts it into an InputError.
ERRORS = {"InputError", "RunError", "DamagedFile", "InterruptedRun", "CpmBeeError", "BusyError"}
ERRORS |= {"MarkupError", "ArgumentTypeError", "ValueError", "UnpicklingError", "BadRow"}
# Functions that return reasons and are handed on, so that no call can be followed to them.
MAKE_REASONS = {"validate", "differences", "_changed_log"}
MAKE_MESSAGE = {"_message_of"}
# Functions that return lines, which are printed elsewhere.
MAKE_LINES = {"describe_run", "engine_line", "model_line", "data_lines", "schedule_warnings"}
MAKE_LINES |= {"checkpointing_line", "_step_lines", "_result_lines", "init_delta_line", "verdict"}
MAKE_LINES |= {"next_step", "generation_command"}
MAKE_LINES |= {"reasons_to_differ", "digest_lines", "compared_by_fingerprint"}
# Fixes that are commands and nothing else: they are the same in all languages.
_COMMAND = (
    r"pip (?:un)?install(?: [-\w.=⟨⟩]+)+|export(?: \w+=[^\s,;]+)+|unset(?: [A-Z_]+)+"
    r"|git config core.autocrlf input|sed -i \S+ \S+|sudo nvidia-smi -i \S+ -c DEFAULT"
    r"|docker run --gpus all|PYTHON=\S+ bash scripts/\w+\.sh"
)
COMMANDS = re.compile(rf"(?:{_COMMAND})(?:(?:; | && )(?:{_COMMAND}))*")


class Text(NamedTuple):
    """A text of the source, with holes for its values."""

    place: str  # file:line
    text: str
    is_error: bool  # or a result, a warning, a hint, a label


def texts(sources: Sources) -> Iterator[Text]:
    """All texts for users, as `InputError(...)`, `problems.add(...)` or `said(...)` gets them."""
    for name, calls in sources.calls.items():
        for call, function, module in calls:
            place = f"{module.path.relative_to(sources.root.parent)}:{call.lineno}"
            flow = TextFlow(sources, function, module)
            for found, is_error in ((_errors_of, True), (_lines_of, False)):
                for text in dict.fromkeys(found(name, call, flow)):
                    if CUT not in text:
                        yield Text(place, text, is_error)
    for name in sorted(MAKE_REASONS | MAKE_MESSAGE | MAKE_LINES):
        for function in sources.functions.get(name, []):
            place = (
                f"{function.module.path.relative_to(sources.root.parent)}:{function.node.lineno}"
            )
            call = ast.Call(ast.Name(name), [], [])
            flow = TextFlow(sources, None, function.module)
            for text in dict.fromkeys([*flow.items(call), *flow.texts(call)]):
                if text not in (HOLE, CUT):
                    yield Text(place, text, name not in MAKE_LINES)


def _errors_of(name: str, call: ast.Call, flow: TextFlow) -> Iterator[str]:
    keywords = {k.arg: k.value for k in call.keywords}
    if name in ERRORS and call.args:
        yield from flow.texts(call.args[0])
    elif name == "raise_if_any":
        for one in [*call.args, *filter(None, [keywords.get("remedy")])]:
            yield from flow.texts(one)
    elif name == "add" and _is_of(call, "problems"):
        where, reason = (flow.texts(a) for a in call.args)
        yield from (f"  {w}: {r}" for w, r in itertools.product(where, reason))
    elif name == "extend" and _is_of(call, "problems") and len(call.args) == 2:
        where, reasons = flow.texts(call.args[0]), flow.items(call.args[1])
        yield from (f"  {w}: {r}" for w, r in itertools.product(where, reasons))
    elif name == "error" and (_is_of(call, "self") or _is_of(call, "parser")):
        yield from flow.texts(call.args[0])


def _lines_of(name: str, call: ast.Call, flow: TextFlow) -> Iterator[str]:
    if name in SAID and call.args:
        yield from flow.texts(call.args[0])
    elif name == "Finding":
        yield from (text for argument in call.args[2:] for text in flow.texts(argument))
    elif name in ("Step", "TwoProcesses"):
        yield from flow.texts(call.args[1])
    elif name in ("info", "warning") and _is_of(call, "logger") and call.args:
        yield from (re.sub("%[sd]", HOLE, text) for text in flow.texts(call.args[0]))
    elif name == "line" and (_is_of(call, "reporter") or _is_of(call, "self")) and call.args:
        yield from flow.texts(call.args[0])


def _is_of(call: ast.Call, owner: str) -> bool:
    """Whether a method of a variable is called that has this name."""
    value = call.func.value if isinstance(call.func, ast.Attribute) else None
    name = value.attr if isinstance(value, ast.Attribute) else getattr(value, "id", "")
    return owner in str(name).lower()
