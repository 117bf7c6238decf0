"""`meta.bin`: the data files of a binary dataset, one JSON object per line (docs/format.md §9)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cpm_bee import json_lines
from cpm_bee.disk import open_to_write
from cpm_bee.errors import InputError, Problems, shown
from cpm_bee.files import is_usable_name
from cpm_bee.paths import not_a_file, not_a_folder

META = "meta.bin"


@dataclass(frozen=True)
class FileInfo:
    """One line of `meta.bin`; the field names are those of the format."""

    file_name: str
    block_begin: int
    block_end: int
    nbytes: int
    nlines: int
    mask: bool
    block_size: int


def _preprocess_command(folder: Path) -> str:
    return (
        f"python preprocess_dataset.py --input bee_data --output_path {folder.parent} "
        "--output_name ccpm_data"
    )


def remedy(folder: Path) -> str:
    """The command that repairs a damaged dataset, for messages."""
    return f"make {folder} again from its records: {_preprocess_command(folder)} --overwrite"


def write_meta(folder: Path, info: FileInfo) -> None:
    with open_to_write(folder / META, "x") as file:
        file.write(json.dumps(asdict(info)) + "\n")


def read_meta(folder: Path) -> list[FileInfo]:
    """The data files of a dataset.

    Raises:
        InputError: `meta.bin` is missing or invalid; all problems are listed.
    """
    path = folder / META
    if wrong := not_a_file(path):
        reason = f"its {META}: {wrong}" if path.exists() else f"it holds no {META}"
        raise InputError(
            f"{folder}: expected a binary dataset, a folder with {META} and data files: "
            f"{not_a_folder(folder) or reason}"
            f"\nmake one with: {_preprocess_command(folder)}"
        )
    problems = Problems()
    files = []
    for number, line in json_lines.read_lines(path):
        value, bad = json_lines.parse_line(line)
        found = [bad] if bad else _info_problems(value)
        problems.extend(f"{path}:{number}", found)
        if not found:
            files.append(FileInfo(**{field.name: value[field.name] for field in fields(FileInfo)}))
    if not files and not problems.count:
        problems.add(str(path), "lists no data files")
    problems.raise_if_any(f"{folder}: {META} is not valid", remedy(folder))
    return files


def _info_problems(value: Any) -> list[str]:
    if not isinstance(value, dict):
        return ["expected a JSON object"]
    missing = [field.name for field in fields(FileInfo) if field.name not in value]
    if missing:
        return [f"lacks {', '.join(missing)}"]
    found = []
    name = value["file_name"]
    # Otherwise a dataset from elsewhere could make us read files outside its folder.
    if (
        not isinstance(name, str)
        or not name
        or Path(name).is_absolute()
        or ".." in Path(name).parts
        or not is_usable_name(name)
    ):
        found.append(f"file_name: expected the name of a file in the folder, this is {shown(name)}")
    if not isinstance(value["mask"], bool):
        found.append(f"mask: expected true or false, this is {shown(value['mask'])}")
    for key in ("block_begin", "block_end", "nbytes", "nlines", "block_size"):
        least = 1 if key == "block_size" else 0
        if type(value[key]) is not int or not least <= value[key] < 2**63:
            found.append(f"{key}: expected a number from {least}, this is {shown(value[key])}")
    if not found and value["block_end"] < value["block_begin"]:
        found.append("block_end is less than block_begin")
    return found


def size_problems(folder: Path, info: FileInfo) -> list[str]:
    """Problems with the existence or size of a data file; none if it is masked."""
    path = folder / info.file_name
    if info.mask:
        return []
    if not path.is_file():
        return [not_a_file(path) or "no such file"]
    expected = (info.block_end - info.block_begin) * info.block_size
    size = path.stat().st_size
    if size != expected:
        return [
            f"has {size} bytes, {META} says {expected}" + (": cut off" if size < expected else "")
        ]
    if info.nlines > size:
        return [f"cannot hold {info.nlines} records, as {META} says, in {size} bytes"]
    return []
