"""Raw multiple-choice data -> CPM-Bee records: raw_data/*.jsonl -> bee_data/*.jsonl.

A raw line has one of two forms, with 2 to 26 options (without an answer, "<ans>" becomes ""):
  {"target": "1", "input": "[翻译]TEXT[0]OPTION[1]OPTION[答案]"}
  {"translation": "TEXT", "choices": ["OPTION", "OPTION"], "answer": 1}
Both become
  {"input": "TEXT", "options": {"<option_0>": "OPTION", "<option_1>": "OPTION"},
   "question": "QUESTION", "<ans>": "<option_1>"}

This script needs only Python's standard library, so you can copy and change it.
"""

import argparse
import contextlib
import errno
import fcntl
import glob
import io
import json
import os
import re
import shlex
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).absolute().parent
QUESTION = "这段话形容了哪句诗的意境？"
BEGIN, END = "[翻译]", "[答案]"
MARKER = re.compile(r"\[(0|[1-9][0-9]?)\]")
LEAST, MOST = 2, 26
MAX_LINE = 8 << 20  # bytes; far more than any record has
USED_KEYS = {"input", "target", "translation", "choices", "answer"}
# A path that cannot be what it was given as: not a failure, but a mistake.
WRONG_PATH = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENXIO),
}
# Converts a JSON array, or objects that span several lines, to one object per line.
TO_LINES = """import json, sys; d = json.JSONDecoder(); t = sys.stdin.read().strip()
while t:
 v, n = d.raw_decode(t); t = t[n:].lstrip()
 for r in v if isinstance(v, list) else [v]: print(json.dumps(r, ensure_ascii=False))"""


class BadInput(Exception):
    """An input or argument is wrong; the text says why."""


# ------------------------------------------------------------------ one record


def reformat(raw: Any, question: str = QUESTION) -> dict[str, Any]:
    """Convert a raw record to a CPM-Bee record. Raises `BadInput` with the reason."""
    if not isinstance(raw, dict):
        raise BadInput("expected a JSON object")
    tutorial, release = "input" in raw, "translation" in raw or "choices" in raw
    if tutorial == release:
        raise BadInput('expected either "input" or both "translation" and "choices"')
    text, options = split_input(raw["input"]) if tutorial else split_release(raw)
    if not LEAST <= len(options) <= MOST:
        raise BadInput(f"has {len(options)} options, expected {LEAST} to {MOST}")
    for name, part in [("text", text), *((f"option [{i}]", o) for i, o in enumerate(options))]:
        if not part.strip():
            raise BadInput(f"the {name} is empty")
        if any("\ud800" <= character <= "\udfff" for character in part):
            raise BadInput(f"the {name} contains half of a surrogate pair, which is not text")
    answer = find_answer(raw, len(options))
    return {
        "input": escape(text),
        "options": {f"<option_{i}>": escape(option) for i, option in enumerate(options)},
        "question": escape(question),
        "<ans>": "" if answer is None else f"<option_{answer}>",
    }


def escape(text: str) -> str:
    """Escape a text: `<` begins a special token of CPM-Bee, `<<` is a literal `<`."""
    return text.replace("<", "<<")


def split_input(line: Any) -> tuple[str, list[str]]:
    """Split "[翻译]TEXT[0]OPTION[1]OPTION[答案]" into the text and the options.

    From the first [0] on, every number in brackets is a marker and must be the next number;
    otherwise a wrong, missing or repeated marker would silently move text from one option to
    another. Brackets before the first [0], and other brackets, are text.
    """
    if not isinstance(line, str):
        raise BadInput('"input" is not a text')
    line = line.strip()
    if not line.startswith(BEGIN):
        raise BadInput(f'"input" does not begin with {BEGIN}')
    if not line.endswith(END):
        raise BadInput(f'"input" does not end with {END}')
    body = line[len(BEGIN) : -len(END)]
    for marker in (BEGIN, END):
        if marker in body:
            raise BadInput(f'"input" contains {marker} more than once')
    start = body.find("[0]")
    if start < 0:
        raise BadInput(f"there is no [0] between {BEGIN} and {END}")
    markers = [match for match in MARKER.finditer(body, start) if int(match[1]) <= MOST]
    for expected, match in enumerate(markers):
        if int(match[1]) != expected:
            raise BadInput(f"found {match[0]} where [{expected}] or {END} is expected")
    ends = [match.start() for match in markers[1:]] + [len(body)]
    return body[:start], [body[m.end() : end] for m, end in zip(markers, ends, strict=True)]


def split_release(raw: dict[str, Any]) -> tuple[str, list[str]]:
    text, choices = raw.get("translation"), raw.get("choices")
    if not isinstance(text, str):
        raise BadInput('"translation" is missing or not a text')
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise BadInput('"choices" is missing or not a list of texts')
    return text, choices


def find_answer(raw: dict[str, Any], count: int) -> int | None:
    given = {key: raw[key] for key in ("target", "answer") if raw.get(key) not in (None, "")}
    if not given:
        return None
    if len(given) > 1:
        raise BadInput('has both "target" and "answer"')
    [(key, value)] = given.items()
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value):
        value = int(value)
    if type(value) is not int:  # isinstance would accept a bool
        raise BadInput(f'"{key}" is not the number of an option: {json.dumps(value)[:40]}')
    if not 0 <= value < count:
        raise BadInput(f'"{key}" is {value}, the options are [0] to [{count - 1}]')
    return value


# ------------------------------------------------------------------ files


@dataclass
class Converted:
    """The result of converting a file; `bad` has `file:line: reason` for each bad line."""

    good: int = 0
    unanswered: int = 0
    unused_keys: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def warning(self) -> str | None:
        """A warning about records without an answer, which are useless for training."""
        if not self.unanswered:
            return None
        unused = ", ".join(json.dumps(k, ensure_ascii=False) for k in sorted(self.unused_keys))
        keys = f"; keys that were not used: {unused}" if unused else ""
        return (
            f"{self.unanswered:,} of {self.good:,} records have no answer "
            f'("target" or "answer" in the raw data){keys}'
        )


def convert(source: Path, target: Path, question: str) -> Converted:
    """Write the good records of `source` to the temporary file beside `target`."""
    check_is_lines(source)
    result = Converted()
    with (
        naming(target),  # in an error of writing
        open(source, "rb") as lines,
        open(temporary_beside(target), "w", encoding="utf-8", newline="\n") as out,
    ):
        for number, line in enumerate(lines, start=1):
            try:
                raw = parse(line, source, is_first=number == 1)
                record = None if raw is None else reformat(raw, question)
            except BadInput as error:
                result.bad.append(f"{source}:{number}: {error}")
            else:
                if record is not None:
                    out.write(json.dumps(record, ensure_ascii=False) + "\n")
                    result.good += 1
                    if not record["<ans>"]:
                        result.unanswered += 1
                        result.unused_keys.update(raw.keys() - USED_KEYS)
            if number % 100_000 == 0 and sys.stderr.isatty():
                print(f"\r{source}: {number:,} lines read", end="", file=sys.stderr)
        out.flush()
        os.fsync(out.fileno())
    return result


def parse(line: bytes, source: Path, *, is_first: bool) -> Any:
    """The JSON value of a line; None for a blank line. Raises `BadInput` with the reason."""
    if len(line) > MAX_LINE:
        raise BadInput(f"has {len(line)} bytes; a line may have up to {MAX_LINE}")
    try:
        text = line.decode("utf-8-sig" if is_first else "utf-8")
        return json.loads(text, object_pairs_hook=unique) if text.strip("\0 \r\n\t") else None
    except UnicodeDecodeError as error:
        hint = other_encoding(line, source)
        raise BadInput(f"not UTF-8 text (at byte {error.start}{hint})") from None
    except json.JSONDecodeError as error:
        hint = other_encoding(line, source) if b"\0" in line else ""
        reason = f"not valid JSON ({error.msg}, column {error.colno}{hint})"
        raise BadInput(reason) from None
    except (ValueError, RecursionError):  # a huge number, or nested too deeply
        raise BadInput("not valid JSON") from None


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object from its items; refuse repeated keys, of which only the last would be kept."""
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        key = json.dumps(next(k for k, n in counts.items() if n > 1), ensure_ascii=False)
        raise BadInput(f"the key {key} appears twice; only one of its values could be kept")
    return found


def other_encoding(line: bytes, source: Path) -> str:
    """A hint: the probable encoding of a line that is not UTF-8, and the command to convert it."""
    if line.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in line:
        encoding, name = "UTF-16", "UTF-16"
    else:
        try:
            line.decode("gb18030")
        except UnicodeDecodeError:
            return ""
        encoding, name = "GB18030", "GBK"
    new = shlex.quote(f"{source.stem}.utf8{source.suffix}")
    return f"; it looks like {name}: iconv -f {encoding} -t UTF-8 {quoted(source)} > {new}"


def check_is_lines(source: Path) -> None:
    """Refuse a JSON array, or objects that span several lines, with one message for the file."""
    with open(source, "rb") as file:
        head = next((line for raw in file if (line := raw.strip(b"\xef\xbb\xbf \t\r\n"))), b"")
    if head.startswith(b"[") or head == b"{":
        form = "a JSON array" if head.startswith(b"[") else "JSON over several lines"
        new = shlex.quote(f"{source.stem}.lines.jsonl")
        raise BadInput(
            f"{source}: is {form}; one record per line is expected. This command converts it:\n"
            f"python -c {shlex.quote(TO_LINES)} < {quoted(source)} > {new}"
        )


def quoted(path: Path) -> str:
    return shlex.quote(str(path))


def find_sources(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    try:
        path.stat()  # raises for a loop of links, or a name that is too long
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            reason = f"is a link to {os.readlink(path)}, which does not exist"
        else:
            reason = "no such file or folder (--input is a folder with *.jsonl files)"
        raise BadInput(f"{path}: {reason}") from None
    if not path.is_dir():
        raise BadInput(f"{path}: this is a pipe or a device; a file or a folder is needed")
    if not os.access(path, os.R_OK | os.X_OK):
        raise BadInput(f"{path}: no permission to read it")
    found = [p for p in path.glob("*.jsonl") if p.is_file() and not p.name.startswith(".")]
    if not found:
        raise BadInput(f"{path}: looked for *.jsonl files, found none")
    return sorted(found)


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Put the name of a file into an `OSError` that lacks one, as those of writing do."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def folder_for_output(folder: Path) -> Iterator[None]:
    """Make a folder and its parents; after an exception, remove those it made."""
    if folder.exists() and not folder.is_dir():
        found = "a file" if folder.is_file() else "a pipe or a device"
        raise BadInput(f"{folder}: --output is a folder, this is {found}")
    folder = Path(os.path.realpath(folder))  # it may be a link to a folder that is to be made
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadInput(f"{folder}: no permission to write in it")
    try:
        yield
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


HOST = re.sub(r"[^\w.]", "_", socket.gethostname(), flags=re.ASCII)[:32]


def temporary_beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial-{os.getpid()}-{HOST}")


@contextlib.contextmanager
def shared_folder(folder: Path, targets: list[Path]) -> Iterator[None]:
    """Remove what killed processes left beside the targets, if no other process writes there.

    All processes that write there share a lock, which the kernel drops when one is killed.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # another one writes, or a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for target in targets:
                for left in folder.glob(f".{glob.escape(target.name)}.partial-*-{HOST}"):
                    left.unlink()
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def reformat_files(source: Path, output: Path, question: str, skip_bad: bool) -> None:
    """Convert all files and print the results; nothing is written if anything is wrong."""
    sources = find_sources(source)
    targets = [output / f"{path.stem}.jsonl" for path in sources]
    for path, target in zip(sources, targets, strict=True):
        if target.exists() and target.samefile(path):
            raise BadInput(f"{target}: this is the raw file itself, give another --output")
        if target.is_dir():
            raise BadInput(f"{target}: this is a folder, expected a file")
    with folder_for_output(output), shared_folder(output, targets):
        try:
            results = [
                convert(path, target, question)
                for path, target in zip(sources, targets, strict=True)
            ]
            refuse(sources, results, skip_bad)
            for target in targets:
                os.replace(temporary_beside(target), target)
        finally:
            for target in targets:
                temporary_beside(target).unlink(missing_ok=True)
    for target, result in zip(targets, results, strict=True):
        skipped = f", {len(result.bad):,} bad lines skipped" if result.bad else ""
        print(f"{target}: {result.good:,} records{skipped}")
        if warning := result.warning():
            print(f"warning: {target}: {warning}", file=sys.stderr)
    print(next_step(output))


def next_step(output: Path) -> str:
    """The command of the next step, with the paths of this run."""
    if output.resolve() == (HERE / "bee_data").resolve():
        return (
            "next, in tutorials/basic_task_finetune: python ../../src/preprocess_dataset.py "
            "--input bee_data --output_path bin_data --output_name ccpm_data"
        )
    script = HERE.parent.parent / "src" / "preprocess_dataset.py"
    command = quoted(script) if script.is_file() else script.name  # this file may be a copy
    output = output.absolute()
    binary = quoted(output.with_name(f"{output.name}_bin"))
    return (
        f"next: python {command} --input {quoted(output)} --output_path {binary} --output_name data"
    )


def refuse(sources: list[Path], results: list[Converted], skip_bad: bool) -> None:
    bad = [line for result in results for line in result.bad]
    if bad and not skip_bad:
        raise BadInput(
            "\n".join(bad) + f"\n{len(bad)} bad lines, nothing was written "
            "(fix them, or leave them out with --skip-bad)"
        )
    for source, result in zip(sources, results, strict=True):
        if not result.good:
            lines = len(result.bad)
            detail = f", all of its {lines} lines are bad" if lines else ", it is empty"
            raise BadInput(f"{source}: holds no records{detail}; nothing was written")


def main() -> int:
    for stream in (sys.stdout, sys.stderr):
        # Do not fail if the terminal's encoding is not UTF-8.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--input",
        type=Path,
        default=HERE / "raw_data",
        help="folder with *.jsonl files, or one file (default: raw_data beside this script)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=HERE / "bee_data",
        help="folder of the results (default: bee_data beside this script)",
    )
    parser.add_argument("--question", default=QUESTION, help=f"(default: {QUESTION})")
    parser.add_argument(
        "--skip-bad", "--skip_bad", action="store_true", help="leave out bad lines and count them"
    )
    parser.add_argument(
        "--escape",
        action="store_true",
        help="write each literal < in a text as <<; always done here, because raw texts are plain "
        "(accepted because preprocess_dataset.py and text_generation.py have this flag)",
    )
    arguments = parser.parse_args()
    if any("\ud800" <= character <= "\udfff" for character in arguments.question):
        parser.error("--question is not UTF-8 text")
    try:
        reformat_files(arguments.input, arguments.output, arguments.question, arguments.skip_bad)
        with naming("standard output"):
            sys.stdout.flush()
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = f"cannot be written: {error.strerror}" if full else error.strerror
        print(f"error: {error.filename or 'standard output'}: {reason}", file=sys.stderr)
        drop_unwritten_output()
        return 2 if error.errno in WRONG_PATH else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def drop_unwritten_output() -> None:
    """Have Python not report the failure of stdout again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
