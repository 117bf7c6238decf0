"""inspect_data.py: each figure on data in which it is known, and the page in a browser."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import browser, screenshot, watched_page
from disk_support import run_here

from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.inspect.figures import Figures, Inspector
from cpm_bee.data.inspect.page import html_page
from cpm_bee.data.inspect.report import histogram, lines_of, overlap_lines, show_record, text_report
from cpm_bee.data.inspect.tokens import segments_of
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.encoding import Encoder
from cpm_bee.records import Record
from cpm_bee.tokenizer import Tokenizer

TINY = Path(__file__).resolve().parents[3] / "src" / "ckpts" / "cpm-bee-tiny" / "vocab.txt"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(Tokenizer.load(TINY))


def choice(text: str, answer: int | None) -> Record:
    options: Record = {"<option_0>": "天", "<option_1>": "海"}
    return {
        "input": text,
        "options": options,
        "<ans>": "" if answer is None else f"<option_{answer}>",
    }


def inspected(encoder: Encoder, *sets: list[Record], **sizes: int) -> tuple[list[Figures], Any]:
    sizes = {"batch_size": 2, "max_length": 64, "seed": 0, **sizes}
    inspector = Inspector(encoder, **sizes)  # type: ignore[arg-type]
    found = [
        inspector.inspect(f"set{i}", ((f"set{i}:{n}", r) for n, r in enumerate(records, start=1)))
        for i, records in enumerate(sets)
    ]
    return found, inspector.compare(found)


def test_lengths_targets_and_answers(encoder: Encoder) -> None:
    records = [
        choice("月亮照着大海。", 1),
        choice("春" * 100, 0),
        choice("天上", None),
        choice("海", 1),
    ]
    ((figures,), _) = inspected(encoder, records)
    encoded = [encoder.encode(record) for record in records]
    assert figures.lengths.tolist() == [len(e) for e in encoded]
    assert figures.num_targets.tolist() == [int((~e.context).sum()) for e in encoded]
    assert (figures.too_long.count, figures.too_long.first) == (1, ["set0:2"])
    assert (figures.unanswered.count, figures.unanswered.first) == (1, ["set0:3"])
    assert figures.labels == {"海": 2, "天": 1}
    assert figures.positions == {"<option_1>": 2, "<option_0>": 1}
    used = int(figures.lengths[[0, 3]].sum())
    assert figures.rows == 2 and figures.fill == pytest.approx(used / (2 * 64))


def test_characters_that_the_vocabulary_lacks(encoder: Encoder) -> None:
    records: list[Record] = [
        {"input": "龘龘海𠮷", "<ans>": "天"},
        {"input": "海", "<ans>": "龘"},  # generation cannot write it
        {"input": "海", "<ans>": "天"},
    ]
    ((figures,), _) = inspected(encoder, records)
    assert figures.missing == {"龘": 2, "𠮷": 1}
    assert figures.with_missing == 2
    assert figures.unwritable.first == ["set0:2"]


def test_duplicates_within_and_between(encoder: Encoder) -> None:
    long = "春天的花园里有很多颜色鲜艳的花朵和忙碌的蜜蜂在飞舞"
    train = [
        choice(long, 0),
        choice(long, 0),
        choice(long, 1),
        choice("完全不同的另外一句话在这里", 1),
    ]
    held = [choice(long, 0), choice(long + "！？", 1), choice("与训练集毫无关系的第三句", 0)]
    (first, second), overlap = inspected(encoder, train, held)
    assert (first.same.first, first.contradicting.first) == (["set0:2"], ["set0:3"])
    assert first.near.first == ["set0:2", "set0:3"]
    assert second.same.count == 0 and second.near.first == ["set1:2"]
    assert overlap.same.first == ["set1:1"]
    assert overlap.near.first == ["set1:1", "set1:2"]


def test_many_different_answers_are_no_labels(encoder: Encoder) -> None:
    records: list[Record] = [{"input": "海", "<ans>": f"{i}"} for i in range(40)]
    ((figures,), _) = inspected(encoder, records)
    assert (
        not figures.labels and "answers" not in text_report([figures], None).split("generated")[1]
    )


def test_the_histogram_has_every_record_once() -> None:
    lengths = np.random.default_rng(0).integers(20, 300, size=500)
    for max_length in (10, 19, 20, 128, 299, 1000):
        bins = histogram(lengths, max_length)
        assert sum(count for _, _, count in bins) == 500
        assert len(bins) <= 17
        over = sum(count for begin, _, count in bins if begin > max_length)
        assert over == int((lengths > max_length).sum())


def test_a_record_as_the_model_sees_it(encoder: Encoder) -> None:
    record: Record = {"input": "云龘<mask_0>\n海", "<ans>": {"<mask_0>": "天<<"}}
    segments = segments_of(record, encoder)
    assert [(s.depth, s.is_target) for s in segments] == [
        (0, False), (1, False), (2, False), (1, False), (2, False), (3, True),
    ]  # fmt: skip
    assert [t.text for t in segments[2].tokens] == [
        "<s>",
        "云",
        "龘:0",
        "<mask_0>:0",
        "\n",
        "海",
        "</s>",
    ]
    assert [t.kind for t in segments[2].tokens][1:4] == ["text", "unknown", "special"]
    assert [t.text for t in segments[5].tokens] == ["<s>", "天", "<"]
    assert sum(len(s.tokens) for s in segments) == len(encoder.encode(record))
    plain = show_record("f:1", segments, color=False)
    assert plain.splitlines()[3] == r"    2     <s>|云|龘:0|<mask_0>:0|\n|海|</s>"
    assert plain.splitlines()[6] == ">   5       <s>|天|<"
    assert "\x1b" not in plain
    colored = show_record("f:1", segments, color=True)
    assert "\x1b[31;1m龘:0\x1b[0m" in colored and ";7m天" in colored
    assert re.sub(r"\x1b\[[\d;]*m", "", colored) == plain


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def test_the_script_on_records_forms_and_datasets(tmp_path: Path) -> None:
    """The same data in three forms has the same figures; those of the token index are ours."""
    rows = [{"question": f"第{i}个问题是什么意思", "answer": "天"} for i in range(30)]
    write(tmp_path / "form.jsonl", rows)
    write(tmp_path / "records.jsonl", [{"question": r["question"], "<ans>": "天"} for r in rows])
    flags = ["--output_path", tmp_path / "bin", "--output_name", "d", "--workers", 1]
    assert run_here("preprocess_dataset", "--input", tmp_path / "form.jsonl", *flags).status == 0
    outputs = []
    for name in ("form.jsonl", "records.jsonl", "bin/form"):
        done = run_here("inspect_data", "--input", tmp_path / name, "--vocab", TINY)
        assert done.status == 0, done
        outputs.append([line for line in done.output.splitlines() if " at " not in line][1:])
    assert outputs[0] == outputs[1] == outputs[2]
    dataset = BinaryDataset(tmp_path / "bin" / "form")
    index = TokenIndex.open_existing(dataset, Tokenizer.load(TINY))
    assert index is not None
    assert f"{index.lengths.sum():,}, of them {index.num_targets.sum():,} targets" in outputs[0][1]


def test_problems_of_data_are_all_named(tmp_path: Path) -> None:
    rows = [{"input": "a", "<ans>": ""}, {"input": 1, "<ans>": ""}, {"input": "b"}]
    done = run_here("inspect_data", "--input", write(tmp_path / "a.jsonl", rows), "--vocab", TINY)
    assert done.status == 2 and done.output == ""
    assert "a.jsonl:2: " in done.errors and 'a.jsonl:3: there is no "<ans>"' in done.errors


def test_wrong_outputs(tmp_path: Path) -> None:
    flags = [
        "--input",
        write(tmp_path / "a.jsonl", [{"input": "a", "<ans>": "b"}]),
        "--vocab",
        TINY,
    ]
    done = run_here("inspect_data", *flags, "--picture", tmp_path / "x.bmp")
    assert done.status == 2 and "expected .png, .svg, .pdf" in done.errors
    done = run_here("inspect_data", *flags, "--html", tmp_path)
    assert done.status == 2 and "this is a folder" in done.errors
    empty = tmp_path / "e.jsonl"
    empty.write_text("")
    done = run_here("inspect_data", "--input", empty, "--vocab", TINY)
    assert done.status == 2 and "holds no rows" in done.errors


def test_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [
        "--input",
        write(tmp_path / "a.jsonl", [{"input": "a", "<ans>": "b"}]),
        "--vocab",
        TINY,
    ]
    picture = tmp_path / "new" / "lengths.png"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run_here("inspect_data", *flags, "--picture", picture)
    assert done.status == 2 and "pip install -e '.[report]'" in done.errors and not picture.exists()
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert run_here("inspect_data", *flags, "--picture", picture).status == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


ENGLISH = ("Data before training", "longer than 64", "set1 compared with set0", "The option that",
           "median", "Records as the model sees them", "target")  # fmt: skip
CHINESE = ("训练前的数据", "长于 64", "set1 与 set0 的比较", "哪个选项是答案", "中位数",
           "模型看到的记录", "预测")  # fmt: skip


def test_every_figure_has_both_languages(encoder: Encoder) -> None:
    """Nothing of one language is left in the other, but what comes from the data."""
    records = [choice("月" * 80, 1), choice("龘", None), choice("海", 0), choice("海", 0)]
    figures, overlap = inspected(encoder, records, records)
    for lines in (lines_of(figures[0]), overlap_lines(overlap, figures[1])):
        for what, value in lines:
            assert re.search("[\u4e00-\u9fff]", what.chinese) and what.english.isascii()
            assert not re.search("[a-z]{4}", re.sub("token|set", "", value.chinese))


@pytest.mark.slow
def test_the_page_in_a_browser(encoder: Encoder, tmp_path: Path) -> None:
    """No fault, no network, all texts as texts, nothing wider than a phone; light and dark, in
    both languages."""
    evil = "<script>alert(1)</script>&龘"
    records = [choice(evil.replace("<", "<<"), 1), choice("月" * 80, 0)]
    figures, overlap = inspected(encoder, records, records[:1])
    shown = [("set0:1", segments_of(records[0], encoder))]
    path = tmp_path / "page.html"
    path.write_text(html_page(figures, overlap, shown), "utf-8")
    backgrounds = set()
    with browser() as own:
        for dark in (False, True):
            page, faults = watched_page(own, width=390 if dark else 1280, dark=dark)
            page.goto(path.as_uri())
            assert page.title() == "set0 · CPM-Bee"
            for language, names, hidden in (
                ("zh", CHINESE, ENGLISH),
                ("en", ENGLISH, CHINESE),
            ):
                page.locator(f"label[for={language}]").click()
                text = page.inner_text("body")
                assert [name for name in names if name not in text] == []
                assert [name for name in hidden if name in text] == []
                assert page.evaluate("document.documentElement.lang").startswith(language)
                assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
                screenshot(page, tmp_path / f"{dark}-{language}.png")
            assert "".join(evil) in page.inner_text(".record").replace("\n", "").replace(":0", "")
            assert page.locator(".target").count() == 1
            assert page.locator(".token.unknown").inner_text() == "龘:0"
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            assert faults == []
    assert len(backgrounds) == 2, "dark is another page"
