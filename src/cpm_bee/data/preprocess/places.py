"""Where preprocessing reads and writes, checked before it begins."""

from __future__ import annotations

from pathlib import Path

from cpm_bee.data.bin_checksums import CHECKSUMS
from cpm_bee.data.bin_meta import META
from cpm_bee.errors import InputError
from cpm_bee.paths import not_a_file, not_a_file_or_folder, unwritable_folder


def input_files(inputs: Path) -> list[Path]:
    """The files of records of a folder, or the one file.

    Raises:
        InputError: there are none.
    """
    if not_a_file(inputs) is None:
        return [inputs]
    reformat = "python data_reformat.py (in tutorials/basic_task_finetune) makes them from raw_data"
    if reason := not_a_file_or_folder(inputs, "file or folder"):
        raise InputError(f"{inputs}: {reason}; expected *.jsonl files of records\n{reformat}")
    # Hidden files are those that editors and other systems leave behind.
    files = [p for p in inputs.glob("*.jsonl") if p.is_file() and not p.name.startswith(".")]
    if not files:
        raise InputError(f"{inputs}: looked for *.jsonl files of records, found none\n{reformat}")
    return sorted(files)


def check_destinations(
    output_path: Path, output_name: str, names: list[str], overwrite: bool
) -> None:
    """Check that the datasets `output_path/NAME` can be written.

    Raises:
        InputError: they cannot.
    """
    taken = ("", META, CHECKSUMS)
    if Path(output_name).name != output_name or output_name in taken or output_name[0] == ".":
        raise InputError(
            f"--output_name {output_name!r}: expected a file name other than {META} and "
            f"{CHECKSUMS} that does not begin with a dot"
        )
    if output_path.is_file():
        raise InputError(f"{output_path}: --output_path is a folder, this is a file")
    if reason := unwritable_folder(output_path):
        raise InputError(f"--output_path {output_path}: {reason}")
    folders = [output_path / name for name in names]
    existing = [folder for folder in folders if folder.exists()]
    if existing and not overwrite:
        raise InputError(
            f"ValueError: Dataset name exists: {', '.join(map(str, existing))}\n"
            "replace it with --overwrite, or give another --output_path or another name to the "
            "input file"
        )
    for folder in existing:
        if not folder.is_dir() or (any(folder.iterdir()) and not (folder / META).is_file()):
            raise InputError(f"{folder}: not a dataset, so --overwrite does not replace it")
