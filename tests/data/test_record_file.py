"""Records that are read when they are asked for: the same as in memory, and none of them held."""

import io
import json
import os
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from cpm_bee.data.record_file import JsonLines, Mapped
from cpm_bee.data.record_source import read_records
from cpm_bee.errors import InputError
from cpm_bee.generate import jsonl
from cpm_bee.generate.options import GenerationOptions

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.just("a"), inner, max_size=2),
    max_leaves=4,
)
ends = st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"])


@pytest.mark.property
@examples(30)
@given(st.lists(st.tuples(values, ends), max_size=6), st.booleans(), st.booleans())
def test_lines_in_any_order_are_those_of_the_file(items, has_last_end, has_mark):
    content = "".join(json.dumps(value) + end for value, end in items)
    content = content if has_last_end else content.rstrip()
    lines = JsonLines(io.BytesIO((b"\xef\xbb\xbf" if has_mark else b"") + content.encode()), "f")
    texts = list(lines.texts())
    wanted = [value for value, _ in items]
    assert [json.loads(text) for _, text in texts] == wanted
    assert [where for where, _ in lines] == [where for where, _ in texts]
    assert [value for _, value in lines] == wanted
    for i in reversed(range(len(wanted))):
        assert lines[i][1] == wanted[i] and lines[i - len(wanted)][1] == wanted[i]
    assert [value for _, value in lines[1:5:2]] == wanted[1:5:2]
    assert Mapped(lambda line: line[1], lines) == wanted


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_a_line_that_is_changed_is_an_error_and_one_that_is_appended_is_not_seen(tmp_path):
    far = " " * io.DEFAULT_BUFFER_SIZE  # a line is not in the buffer with the next one
    given_records = [{"input": text + far, "<ans>": ""} for text in ("one", "two", "six")]
    path = tmp_path / "in.jsonl"
    write(path, given_records)
    path.write_bytes(path.read_bytes().rstrip())
    records = read_records(str(path))
    with open(path, "a") as file:
        file.write('\n{"input": "seven", "<ans>": ""}\n')
    assert [one.given for one in records] == given_records
    path.write_bytes(path.read_bytes().replace(b"two", b"too"))
    assert records[0].given == given_records[0] and records[2].given == given_records[2]
    with pytest.raises(InputError, match=r"in\.jsonl:2: was changed while the file was read"):
        list(records)


def test_a_file_that_is_replaced_is_read_to_its_end(tmp_path):
    given_records = [{"input": text, "<ans>": ""} for text in ("one", "two")]
    path = write(tmp_path / "in.jsonl", given_records)
    records = read_records(path)
    os.replace(write(tmp_path / "new.jsonl", [{"input": "x", "<ans>": ""}]), path)
    assert [one.given for one in records] == given_records


class Echo:
    """Answers each record with its input."""

    def __init__(self, encoder):
        self.encoder = encoder

    def stream(self, records, options, max_tokens, numbers):
        return ({**record, "<ans>": record["input"][:3]} for record in records)


@pytest.mark.slow
def test_no_step_holds_the_file_not_even_resuming(tmp_path, monkeypatch):
    """2 MB of records; reading, answering, a stop after most of them, and going on."""
    count, size, bound = 1000, 2000, 500_000
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(path, ({"id": i, "input": f"{i:04}" + "a" * size, "<ans>": ""} for i in range(count)))
    monkeypatch.setattr(jsonl, "check_vocabulary", lambda inputs, encoder: None)

    def generate(resume):
        records = read_records(str(path), keep=("id",))
        return jsonl.generate_file(
            Echo(None),
            records,
            str(output),
            jsonl.FileOptions(GenerationOptions(), resume=resume),
        )

    generate(False)  # imports
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert [json.loads(line)["id"] for line in lines] == list(range(count))
    (tmp_path / "out.jsonl.partial").write_bytes(b"".join(lines[: count - 10]) + lines[-10][:7])
    (tmp_path / "out.jsonl.partial.json").write_text("{}")
    del lines
    for resume in (True, False):
        output.unlink()
        tracemalloc.start()
        generate(resume)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert output.read_bytes() == whole
        assert peak < bound, f"resume={resume}"
