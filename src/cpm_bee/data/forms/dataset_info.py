"""Reads the description of data that LLaMA-Factory has: dataset_info.json beside the files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpm_bee.data.forms import recognition
from cpm_bee.data.forms.dialogue import TAGS
from cpm_bee.data.forms.names import COLUMNS
from cpm_bee.data.forms.rows import DATASET_INFO
from cpm_bee.errors import InputError
from cpm_bee.json_lines import parse_line
from cpm_bee.paths import not_a_file

_FORMS = {"alpaca": recognition.ALPACA, "sharegpt": recognition.DIALOGUE}


@dataclass(frozen=True)
class Description:
    """What dataset_info.json says of a file.

    Attributes:
        form: the form of its rows; None if it is not described.
        columns: role -> key.
        tags: see `dialogue.messages_of`.
    """

    form: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


def describe(path: Path) -> Description:
    """Returns what the dataset_info.json beside a file says of it.

    Raises:
        InputError: it says what cannot be, or that the data is of preferences.
    """
    info = path.parent / DATASET_INFO
    if not_a_file(info):
        return Description()
    try:
        text = info.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{info}: not UTF-8 text ({error.reason})") from None
    value, reason = parse_line(text)
    if reason or not isinstance(value, dict):
        raise InputError(f"{info}: {reason or 'expected an object'}")
    for name, entry in value.items():
        if isinstance(entry, dict) and entry.get("file_name") == path.name:
            return _description(f"{info}: {name!r}", entry)
    return Description()


def _description(where: str, entry: dict[str, Any]) -> Description:
    if entry.get("ranking"):
        raise InputError(
            f"{where}: is a data set of preferences (ranking), which have no form as records; "
            "--transform can choose the better answer of each row"
        )
    formatting = entry.get("formatting", "alpaca")
    if formatting not in _FORMS:
        raise InputError(f"{where}: formatting {formatting!r}; known: {', '.join(_FORMS)}")
    columns, tags = entry.get("columns", {}), entry.get("tags", {})
    for what, given in (("columns", columns), ("tags", tags)):
        if not isinstance(given, dict) or not all(isinstance(v, str) for v in given.values()):
            raise InputError(f"{where}: {what} are not an object of texts")
    known = {"role_tag", "content_tag", *TAGS}
    if unknown := sorted(set(tags) - known):
        raise InputError(
            f"{where}: unknown tags {', '.join(unknown)}; known: {', '.join(sorted(known))}"
        )
    form = _FORMS[formatting]
    used = recognition.USED[form]
    roles = {COLUMNS[name]: key for name, key in columns.items() if name in COLUMNS}
    return Description(form, {role: key for role, key in roles.items() if role in used}, tags)
