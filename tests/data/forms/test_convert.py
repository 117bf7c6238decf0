"""convert_data.py: whole files or nothing, the split, transforms, and what preprocessing takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from disk_support import run_here
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.forms.convert import convert_data
from cpm_bee.data.forms.converter import Converter
from cpm_bee.data.forms.options import ConversionOptions, ConvertDataOptions
from cpm_bee.data.forms.transform import load_transform
from cpm_bee.data.near_duplicates import between
from cpm_bee.errors import InputError
from cpm_bee.json_lines import parse_line, read_lines
from cpm_bee.records import Record
from cpm_bee.tokenizer import Tokenizer, unescape


def lines(path: Path) -> list[Record]:
    return [parse_line(line)[0] for _, line in read_lines(path)]


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def convert(data: Path, output: Path, *, seed: int = 0, **flags: Any) -> None:
    convert_data(data, output, ConversionOptions(**flags), seed=seed, overwrite=True)


# ------------------------------------------------------------------ the script


def test_the_script(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b", "id": 7}, {"instruction": "c", "output": ""}]
    data = write(tmp_path / "my data" / "train.jsonl", rows)
    flags = ["--input", data, "--output", tmp_path / "out"]
    done = run_here("convert_data", *flags)
    assert done.status == 0, done
    assert done.output.splitlines()[:2] == [
        f"{data}: alpaca, 2 records; not used: id",
        f"{tmp_path}/out/train.jsonl: 2 records",
    ]
    assert "1 of 2 records have no answer, the first one at" in done.errors
    again = run_here("convert_data", *flags)
    assert again.status == 2 and "exists already; replace it with --overwrite" in again.errors
    assert run_here("convert_data", *flags, "--overwrite").status == 0


def test_a_sheet_of_an_excel_file(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(["notes"])
    book.active.append(["made by me"])
    book.create_sheet("data").append(["question", "answer"])
    book["data"].append(["天是什么颜色？", "蓝"])
    path = tmp_path / "t.xlsx"
    book.save(path)
    flags = ["--input", path, "--output", tmp_path / "out"]
    done = run_here("convert_data", *flags)
    assert done.status == 2 and "convert_data.py --sheet NAME" in done.errors
    assert "'data': question, answer" in done.errors and not (tmp_path / "out").exists()
    assert run_here("convert_data", *flags, "--sheet", "data").status == 0
    assert lines(tmp_path / "out" / "t.jsonl") == [{"question": "天是什么颜色？", "<ans>": "蓝"}]
    done = run_here("convert_data", *flags, "--sheet", "Data", "--overwrite")
    assert done.status == 2 and "no sheet 'Data'" in done.errors
    data = write(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(InputError, match="--sheet x: only Excel files have sheets"):
        convert(data, tmp_path / "out", sheet="x")


def test_the_next_command_can_be_followed(tmp_path: Path) -> None:
    data = write(
        tmp_path / "train.jsonl", [{"text": "好", "label": "1"}, {"text": "坏", "label": "0"}]
    )
    done = run_here("convert_data", "--input", data, "--output", tmp_path / "out")
    command = done.output.splitlines()[-1].split()
    assert command[:2] == ["next:", "python"]
    assert run_here("preprocess_dataset", *command[3:], "--workers", 1).status == 0
    assert len(BinaryDataset(tmp_path / "out_bin" / "train")) == 2


def test_nothing_is_written_if_one_file_of_several_is_bad(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.jsonl", [{"question": "a", "answer": "b"}])
    write(
        tmp_path / "in" / "b.jsonl",
        [{"question": "a", "answer": "b"}, {"question": 1, "answer": "b"}],
    )
    (tmp_path / "in" / "c.jsonl").write_text("")
    with pytest.raises(InputError, match=r"c\.jsonl: holds no rows"):
        convert(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "c.jsonl").unlink()
    with pytest.raises(InputError, match=r"b\.jsonl:2: 'question' is a number"):
        convert(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(tmp_path / "in", tmp_path / "out", skip_bad=True)
    assert [len(lines(tmp_path / "out" / f"{name}.jsonl")) for name in "ab"] == [1, 1]


def test_skipping_all_rows_is_refused(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", [{"question": 1, "answer": "b"}])
    with pytest.raises(InputError, match="holds no records, all of its 1 rows are bad"):
        convert(data, tmp_path / "out", skip_bad=True)


def test_the_data_itself_is_no_output(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(InputError, match="this is the data itself"):
        convert(data, tmp_path)
    assert lines(data) == [{"question": "a", "answer": "b"}]


@pytest.mark.parametrize(
    ("flag", "value", "reason"),
    [
        ("--columns", "text", "'text': expected ROLE=COLUMN,ROLE=COLUMN"),
        ("--columns", "body=a", "'body' is none of instruction, input"),
        ("--columns", "text=a,text=b", "text is given twice"),
        ("--label-names", "1=a", "expected two or more labels with different names"),
        ("--label-names", "1=a,2=a", "expected two or more labels with different names"),
        ("--encoding", "klingon", "'klingon' is no encoding"),
        ("--eval-share", "1", "1 leaves nothing to train on"),
        ("--eval-share", "0", "0 is not above 0"),
    ],
)
def test_wrong_flags(flag: str, value: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        ConvertDataOptions.parse(["--input", "x", "--output", "y", flag, value])
    assert f"argument {flag}: {reason}" in str(caught.value)


# ------------------------------------------------------------------ the split

WORDS = [
    "春天",
    "花园",
    "大海",
    "城市",
    "老师",
    "火车",
    "音乐",
    "山峰",
    "月亮",
    "咖啡",
    "图书",
    "河流",
]


def poems(count: int, twins: int) -> list[dict[str, str]]:
    """Questions that differ, each with some twins that do so in a character only."""
    rows = []
    for i in range(count):
        text = "".join(
            WORDS[(i * 7 + j * j * (i + 3)) % len(WORDS)] + f"{i * 31 + j}" for j in range(8)
        )
        rows += [{"question": text + "。" * (k > 0), "answer": f"{i}"} for k in range(twins)]
    return rows


def test_no_twin_is_on_the_other_side(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", poems(60, 3))
    for seed in range(3):
        convert(data, tmp_path / str(seed), eval_share=0.2, seed=seed)
        train, held = (lines(tmp_path / str(seed) / f"{n}.jsonl") for n in ("train", "eval"))
        assert len(train) + len(held) == 180 and len(held) == 36
        assert between(held, train) == []
        assert not {r["<ans>"] for r in train} & {r["<ans>"] for r in held}
    first, second = (lines(tmp_path / n / "eval.jsonl") for n in "01")
    assert first != second, "the seed chooses"
    convert(data, tmp_path / "again", eval_share=0.2, seed=1)
    assert lines(tmp_path / "again" / "eval.jsonl") == second


def test_the_replies_of_a_dialogue_stay_together(tmp_path: Path) -> None:
    def dialogue(i: int) -> dict[str, Any]:
        turns = []
        for j in range(3):
            text = WORDS[(i + j) % 12] * 3 + WORDS[(i * 5 + j * 7) % 12] * 2 + f"{i * 17 + j}" * 4
            turns += [{"role": "user", "content": text}, {"role": "assistant", "content": f"{i}"}]
        return {"messages": turns}

    data = write(tmp_path / "a.jsonl", [dialogue(i) for i in range(30)])
    convert(data, tmp_path / "out", eval_share=0.3)
    train, held = (lines(tmp_path / "out" / f"{n}.jsonl") for n in ("train", "eval"))
    assert held and not {r["<ans>"] for r in train} & {r["<ans>"] for r in held}


def test_short_texts_with_the_same_long_options_are_no_twins(tmp_path: Path) -> None:
    labels = [f"一个相当长的类别名称之{word}" for word in WORDS]
    rows = [{"text": f"{WORDS[i % 12]}{i}", "label": labels[i % 12]} for i in range(100)]
    convert(write(tmp_path / "a.jsonl", rows), tmp_path / "out", eval_share=0.1)
    assert len(lines(tmp_path / "out" / "eval.jsonl")) == 10


def test_data_that_cannot_be_split(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", [{"question": "同一个问题", "answer": "答"}] * 5)
    with pytest.raises(InputError, match="form 1 groups of near-duplicates, the largest of 5"):
        convert(data, tmp_path / "out", eval_share=0.5)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ transforms

TRANSFORM = """
def joined(row):
    if row["n"] == 2:
        return None
    if row["n"] == 3:
        return [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
    return {"question": row["title"] + "？", "answer": 1 / row["n"] and row["body"]}

def wrong(row):
    return 3
"""


def test_a_transform(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(TRANSFORM, "utf-8")
    rows = [{"n": n, "title": "问", "body": "答"} for n in (1, 2, 3)]
    data = write(tmp_path / "a.jsonl", rows)
    convert(data, tmp_path / "out", transform=f"{script}:joined")
    assert [r["question"] for r in lines(tmp_path / "out" / "a.jsonl")] == ["问？", "a", "c"]
    write(data, [*rows, {"n": 0, "title": "问", "body": ""}, {"n": 1}])
    with pytest.raises(InputError) as caught:
        convert(data, tmp_path / "out", transform=f"{script}:joined")
    assert f"{data}:4: joined failed: ZeroDivisionError: division by zero ({script}:7)" in str(
        caught.value
    )
    assert f"{data}:5: joined failed: KeyError: 'title' ({script}:7)" in str(caught.value)
    with pytest.raises(InputError, match=r"a\.jsonl:1: wrong returned int, expected a dictionary"):
        convert(data, tmp_path / "out", transform=f"{script}:wrong")


def test_wrong_transforms(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(TRANSFORM, "utf-8")
    for given_, reason in (
        (f"{script}", "expected FILE.py:FUNCTION"),
        (f"{script}:a b", "expected FILE.py:FUNCTION"),
        (f"{tmp_path}/no.py:f", "no such file"),
        (f"{tmp_path}:f", "this is a folder"),
        (f"{script}:other", "has no function other; it has joined, wrong"),
    ):
        with pytest.raises(InputError, match=reason):
            load_transform(given_)
    script.write_text("x = 1\ndef f(:\n")
    with pytest.raises(InputError, match=rf"cannot be run: SyntaxError: .* \({script}:2\)"):
        load_transform(f"{script}:f")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"expected a Python file"):
        load_transform(f"{tmp_path}/notes.txt:f")


def test_data_cannot_name_code(tmp_path: Path) -> None:
    """A transform comes from the command line alone."""
    script = tmp_path / "evil.py"
    script.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef f(row): return row\n")
    rows = [
        {"question": "a", "answer": "b", "transform": f"{script}:f", "--transform": f"{script}:f"}
    ]
    info = {"x": {"file_name": "a.jsonl", "transform": f"{script}:f", "columns": {}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"y": info["x"] | {"file_name": "b"}}))
    convert(write(tmp_path / "a.jsonl", rows), tmp_path / "out")
    assert lines(tmp_path / "out" / "a.jsonl") == [{"question": "a", "<ans>": "b"}]
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------ any text

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)


@given(question=texts, answer=texts)
@examples(100)
def test_any_text_comes_back_from_its_record(
    small_vocabulary: Tokenizer, question: str, answer: str
) -> None:
    """Text in, record, text: an escaped record is valid, and unescaping gives the text."""
    row = {"question": question, "answer": answer}
    (record,) = Converter("x:1", row, ConversionOptions()).convert(row)
    back = {key: unescape(str(text)) for key, text in record.items()}
    assert back == {"question": question, "<ans>": answer}
    assert small_vocabulary.encode(str(record["question"])), "the tokenizer reads it"


@given(st.lists(texts, min_size=2, max_size=6))
@examples(60)
def test_any_dialogue_comes_back_from_its_records(parts: list[str]) -> None:
    parts = parts[: len(parts) // 2 * 2]
    turns = [
        {"from": "human" if i % 2 == 0 else "gpt", "value": text} for i, text in enumerate(parts)
    ]
    row = {"conversations": turns}
    found = Converter("x:1", row, ConversionOptions()).convert(row)
    last = found[-1]
    history = last.get("history", {})
    assert isinstance(history, dict)
    said = [text for message in history.values() for text in message.values()]  # type: ignore[union-attr]
    said = [*said, last["input"], last["<ans>"]]
    assert [unescape(str(text)) for text in said] == parts
    assert len(found) == len(parts) // 2


# ------------------------------------------------------------------ preprocessing


def preprocess(data: Path, output: Path, *flags: object) -> tuple[int, str, str]:
    given_ = ["--input", data, "--output_path", output, "--output_name", "d", "--workers", 1]
    return run_here("preprocess_dataset", *given_, *flags)


def dataset(folder: Path) -> list[Record]:
    found = BinaryDataset(folder)
    return [found.read(file, offset) for file, offset, _ in found]


def test_preprocessing_recognises_forms(tmp_path: Path) -> None:
    """And makes the same datasets as after convert_data.py."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.csv").write_text("text,label\n好 < 坏,p\n坏,n\n", "utf-8")
    write(tmp_path / "in" / "eval.json", [{"text": "中", "label": "p"}])
    status, output, _ = preprocess(tmp_path / "in", tmp_path / "bin")
    assert status == 0 and f"{tmp_path}/bin/train: 2 records" in output
    convert(tmp_path / "in", tmp_path / "out")
    assert preprocess(tmp_path / "out", tmp_path / "bin2")[0] == 0
    for name in ("train", "eval"):
        ours, theirs = dataset(tmp_path / "bin" / name), dataset(tmp_path / "bin2" / name)
        assert ours == theirs and len(ours) == {"train": 2, "eval": 1}[name]
    assert sorted(p.name for p in (tmp_path / "bin").iterdir()) == ["eval", "train"]


def test_preprocessing_splits(tmp_path: Path) -> None:
    data = write(
        tmp_path / "all.jsonl", [{"input": r["question"], "<ans>": "x"} for r in poems(20, 2)]
    )
    status, output, _ = preprocess(data, tmp_path / "bin", "--eval-share", 0.25)
    assert status == 0, output
    assert len(dataset(tmp_path / "bin" / "train")) == 30
    assert len(dataset(tmp_path / "bin" / "eval")) == 10


def test_preprocessing_says_what_is_wrong_before_it_converts(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", [{"question": "a", "answer": 1}])
    (tmp_path / "bin" / "a").mkdir(parents=True)
    assert "Dataset name exists" in preprocess(data, tmp_path / "bin")[2]
    status, _, errors = preprocess(data, tmp_path / "bin2")
    assert status == 2 and f"{data}:1: 'answer' is a number, expected text" in errors
    assert not (tmp_path / "bin2").exists()


def test_preprocessing_names_near_forms(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", [{"text": "a", "lable": "b"}])
    status, _, errors = preprocess(data, tmp_path / "bin")
    assert status == 2 and 'there is no "<ans>"' in errors
    assert "'lable' is similar: --columns label=lable" in errors
    flags = ["--columns", "label=lable,text=text"]
    assert preprocess(data, tmp_path / "bin", *flags)[0] == 0


def test_records_are_preprocessed_as_before(tmp_path: Path) -> None:
    """Without a conversion: a stray table beside them changes nothing."""
    write(tmp_path / "in" / "train.jsonl", [{"input": "a", "<ans>": "b"}])
    (tmp_path / "in" / "notes.csv").write_text("x,y\n1,2\n")
    assert preprocess(tmp_path / "in", tmp_path / "bin")[0] == 0
    assert [p.name for p in (tmp_path / "bin").iterdir()] == ["train"]


@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_an_array_of_records_is_preprocessed(tmp_path: Path, name: str) -> None:
    records = [{"input": "a << b", "<ans>": "x"}, {"input": "c", "<ans>": ""}]
    (tmp_path / name).write_text(json.dumps(records, indent=1), "utf-8")
    assert preprocess(tmp_path / name, tmp_path / "bin")[0] == 0
    key = lambda r: r["input"]  # noqa: E731
    assert sorted(dataset(tmp_path / "bin" / "train"), key=key) == records
