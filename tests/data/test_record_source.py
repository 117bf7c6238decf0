import json

import pytest

from cpm_bee.data.record_source import read_located
from cpm_bee.errors import InputError


def write(path, lines):
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_records_of_a_file_with_fields_that_are_kept_from_the_model(tmp_path):
    lines = [{"id": 7, "input": "a", "<ans>": "b"}, {"input": "c", "<ans>": "", "source": ["x"]}]
    path = write(tmp_path / "a.jsonl", lines)
    found = read_located(path, keep=("id", "source"))
    assert [one.where for one in found] == [f"{path}:1", f"{path}:2"]
    assert [one.record for one in found] == [
        {"input": "a", "<ans>": "b"},
        {"input": "c", "<ans>": ""},
    ]
    assert [one.kept for one in found] == [{"id": 7}, {"source": ["x"]}]
    assert len(read_located(path, keep=("id", "source"), limit=1)) == 1


def test_a_field_that_is_not_kept_must_be_valid(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"id": 7, "input": "a", "<ans>": "b"}] * 2)
    with pytest.raises(InputError) as error:
        read_located(path)
    assert f"{path}:1" in str(error.value) and f"{path}:2" in str(error.value)


def test_plain_texts(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"input": "a < b", "<ans>": "<p>"}])
    assert read_located(path, escape=True)[0].record == {"input": "a << b", "<ans>": "<<p>"}


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match="holds no records"):
        read_located(str(path))
    with pytest.raises(InputError, match="no such file"):
        read_located(str(tmp_path / "b.jsonl"))
