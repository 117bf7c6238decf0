"""Each form that people have, in its published layout, becomes the records of docs/format.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import run_script

from cpm_bee import records
from cpm_bee.data.forms.convert import convert_data
from cpm_bee.data.forms.options import ConversionOptions
from cpm_bee.errors import InputError
from cpm_bee.json_lines import parse_line, read_lines

Rows = list[Any]


def write(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def converted(path: Path, **flags: Any) -> list[records.Record]:
    """The records of one data file."""
    output = path.parent / "records"
    convert_data(path, output, ConversionOptions(**flags), seed=0, overwrite=True)
    return [parse_line(line)[0] for _, line in read_lines(output / f"{path.stem}.jsonl")]


def of(tmp_path: Path, *rows: Any, **flags: Any) -> list[records.Record]:
    return converted(write(tmp_path / "data.jsonl", list(rows)), **flags)


def error(tmp_path: Path, *rows: Any, **flags: Any) -> str:
    with pytest.raises(InputError) as caught:
        of(tmp_path, *rows, **flags)
    return str(caught.value)


# ------------------------------------------------------------------ Alpaca


def test_alpaca(tmp_path: Path) -> None:
    """tatsu-lab/alpaca, and LLaMA-Factory's alpaca_zh_demo with system and history."""
    assert of(
        tmp_path,
        {
            "instruction": "识别并解释给定列表中的两个科学理论",
            "input": "细胞理论",
            "output": "细胞理论是……",
        },
        {"instruction": "Give three tips", "input": "", "output": "1. Sleep\n2. Eat < 3 sweets"},
        {
            "instruction": "那上海呢？",
            "input": "",
            "output": "下雨。",
            "system": "你是天气助手。",
            "history": [["北京天气？", "晴。"], ["广州呢？", "多云。"]],
        },
    ) == [
        {
            "prompt": "识别并解释给定列表中的两个科学理论",
            "input": "细胞理论",
            "<ans>": "细胞理论是……",
        },
        {"prompt": "Give three tips", "<ans>": "1. Sleep\n2. Eat << 3 sweets"},
        {
            "system": "你是天气助手。",
            "history": {
                "1": {"user": "北京天气？"},
                "2": {"assistant": "晴。"},
                "3": {"user": "广州呢？"},
                "4": {"assistant": "多云。"},
            },
            "prompt": "那上海呢？",
            "<ans>": "下雨。",
        },
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "问", "response": "答"},  # ms-swift
        {"query": "问", "response": "答"},
        {"query": "问", "solution": "答"},
        {"problem": "问", "solution": "答"},
        {"prompt": "问", "completion": "答"},  # OpenAI
        {"question": "问", "response": "答"},
        {"Instruction": "问", "Output": "答", "id": 3},
        {"instruction": "问", "input": None, "output": "答"},
    ],
)
def test_names_of_llama_factory_and_ms_swift(tmp_path: Path, row: dict[str, Any]) -> None:
    assert of(tmp_path, row) == [{"prompt": "问", "<ans>": "答"}]


def test_a_row_without_a_key_of_the_first_is_bad_and_an_empty_answer_is_not(tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "output": "b"},
        {"instruction": "c"},
        {"instruction": "", "output": ""},
    ]
    assert error(tmp_path, *rows).splitlines() == [
        f"{tmp_path}/data.jsonl: 2 bad lines, nothing was written",
        f"  {tmp_path}/data.jsonl:2: has no 'output'; its keys: 'instruction'",
        f"  {tmp_path}/data.jsonl:3: 'instruction' is empty",
        "fix them, or leave them out with --skip-bad",
    ]
    assert not (tmp_path / "records").exists()
    rows[2] = {"instruction": "d", "output": None}
    assert of(tmp_path, *rows, skip_bad=True) == [
        {"prompt": "a", "<ans>": "b"},
        {"prompt": "d", "<ans>": ""},
    ]


# ------------------------------------------------------------------ dialogues

TURNS = [
    {"role": "system", "content": "你是助手。"},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "您好！"},
    {"role": "user", "content": "1 < 2？"},
    {"role": "assistant", "content": "是。"},
]
TURN_RECORDS = [
    {"system": "你是助手。", "input": "你好", "<ans>": "您好！"},
    {
        "system": "你是助手。",
        "history": {"1": {"user": "你好"}, "2": {"assistant": "您好！"}},
        "input": "1 << 2？",
        "<ans>": "是。",
    },
]


def sharegpt(turns: list[dict[str, str]]) -> dict[str, Any]:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return {
        "id": "x_0",
        "conversations": [{"from": names[t["role"]], "value": t["content"]} for t in turns],
    }


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"messages": TURNS[1:], "system": "你是助手。"},
        sharegpt(TURNS),
        {**sharegpt(TURNS[1:]), "system": "你是助手。", "tools": ""},
        {"conversations": TURNS},
        {
            "system": "你是助手。",
            "conversation": [
                {"human": "你好", "assistant": "您好！"},
                {"human": "1 < 2？", "assistant": "是。"},
            ],
        },
        {"messages": json.dumps(TURNS)},
        {"messages": [{**t, "content": [{"type": "text", "text": t["content"]}]} for t in TURNS]},
    ],
    ids=[
        "openai",
        "system-column",
        "sharegpt",
        "llama-factory",
        "mixed",
        "ms-swift",
        "json",
        "parts",
    ],
)
def test_dialogues(tmp_path: Path, row: dict[str, Any]) -> None:
    assert of(tmp_path, row) == TURN_RECORDS
    assert of(tmp_path, row, turns="last") == TURN_RECORDS[1:]


def test_tools_and_replies_that_are_not_to_be_learnt(tmp_path: Path) -> None:
    """OpenAI's fine-tuning format: tool_calls, tool results, and weight 0."""
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    row = {
        "tools": [{"type": "function", "function": {"name": "weather"}}],
        "messages": [
            {"role": "user", "content": "天气？"},
            {"role": "assistant", "content": "等等。", "weight": 0},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "晴", "tool_call_id": "1"},
            {"role": "assistant", "content": "是晴天。"},
        ],
    }
    first, second = of(tmp_path, row)
    assert json.loads(str(first["<ans>"])) == [call]
    assert json.loads(str(first["tools"])) == row["tools"]
    assert first["history"] == {"1": {"user": "天气？"}, "2": {"assistant": "等等。"}}
    assert "input" not in first and second["observation"] == "晴"
    assert list(second["history"]["3"]) == ["function_call"]  # type: ignore[index,arg-type]
    assert second["<ans>"] == "是晴天。"


def test_a_dialogue_without_a_reply_is_a_question(tmp_path: Path) -> None:
    assert of(tmp_path, {"messages": TURNS[:2]}) == [
        {"system": "你是助手。", "input": "你好", "<ans>": ""}
    ]


def test_bad_dialogues(tmp_path: Path) -> None:
    rows: Rows = [
        {"messages": TURNS},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": []},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}]},
        {"messages": [{"text": "x"}]},
        {"messages": "x"},
    ]
    text = error(tmp_path, *rows)
    assert "data.jsonl:2: message 1 has the role 'wizard'; known: user, human" in text
    assert "data.jsonl:3: the messages are a list of 0, expected a list of messages" in text
    assert "data.jsonl:4: has no reply that follows a message" in text
    assert "data.jsonl:5: message 1 has a part of type 'image_url'; only text is possible" in text
    assert 'data.jsonl:6: message 1 has no role; its keys: "text"' in text
    assert "data.jsonl:7: the messages are text" in text


# ------------------------------------------------------------------ choices

POEM = {
    "input": "月亮照着大海。",
    "options": {"<option_0>": "大漠孤烟直", "<option_1>": "海上生明月"},
    "question": "这段话形容了哪句诗的意境？",
    "<ans>": "<option_1>",
}


def test_ccpm_in_both_of_its_forms(tmp_path: Path) -> None:
    tutorial = {"target": "1", "input": "[翻译]月亮照着大海。[0]大漠孤烟直[1]海上生明月[答案]"}
    release = {
        "translation": "月亮照着大海。",
        "choices": ["大漠孤烟直", "海上生明月"],
        "answer": 1,
    }
    assert of(tmp_path, tutorial) == [POEM]
    assert of(tmp_path, release) == [POEM]
    del release["answer"]  # the public test split
    assert of(tmp_path, release) == [{**POEM, "<ans>": ""}]


def test_ccpm_is_what_the_tutorial_makes_of_it(shared: Path, tmp_path: Path) -> None:
    script = "tutorials/basic_task_finetune/data_reformat.py"
    given = ["--input", str(shared / "ccpm" / "eval.jsonl"), "--output", str(tmp_path / "tutorial")]
    assert run_script(script, *given).returncode == 0
    convert_data(shared / "ccpm" / "eval.jsonl", tmp_path / "ours", ConversionOptions(), seed=0)
    ours, theirs = (tmp_path / name / "eval.jsonl" for name in ("ours", "tutorial"))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"question": "Q", "choices": ["x", "y", "z"], "answer": 2}, 2),
        ({"question": "Q", "choices": ["x", "y", "z"], "answer": "B"}, 1),
        ({"question": "Q", "options": ["x", "y", "z"], "answer": "z"}, 2),
        ({"question": "Q", "options": {"A": "x", "B": "y", "C": "z"}, "answer": "A"}, 0),
        ({"question": "Q", "A": "x", "B": "y", "C": "z", "answer": "C"}, 2),  # C-Eval, CMMLU
        ({"id": 1, "question": "Q", "A": "x", "B": "y", "C": "z", "answer": ""}, None),
        (  # ARC
            {
                "question": "Q",
                "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]},
                "answerKey": "2",
            },
            1,
        ),
        ({"question": "Q", "choices": '["x", "y", "z"]', "answer": "(c)"}, 2),  # a cell of a table
    ],
)
def test_choices(tmp_path: Path, row: dict[str, Any], answer: int | None) -> None:
    (record,) = of(tmp_path, row)
    assert record == {
        "options": {"<option_0>": "x", "<option_1>": "y", "<option_2>": "z"},
        "question": "Q",
        "<ans>": "" if answer is None else f"<option_{answer}>",
    }


def test_clue_c3(tmp_path: Path) -> None:
    """An array of [passage lines, questions, id]."""
    data = [
        [
            ["女：今天真冷。", "男：是啊。"],
            [
                {"question": "天气怎么样？", "choice": ["热", "冷"], "answer": "冷"},
                {"question": "谁先说话？", "choice": ["男的", "女的"], "answer": "女的"},
            ],
            "14-1",
        ]
    ]
    path = tmp_path / "d-train.json"
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1), "utf-8")
    assert [r["<ans>"] for r in converted(path)] == ["<option_1>", "<option_1>"]
    assert converted(path)[0]["input"] == "女：今天真冷。\n男：是啊。"


def test_answers_that_name_no_option_or_two(tmp_path: Path) -> None:
    row = {"question": "1 + 1", "choices": ["1", "2", "0"], "answer": "1"}
    text = error(tmp_path, row)
    assert "the answer '1' could be the number of option 1 or the text of option 0" in text
    assert of(tmp_path, row, answer_as="text")[0]["<ans>"] == "<option_0>"
    assert of(tmp_path, row, answer_as="number")[0]["<ans>"] == "<option_1>"
    assert of(tmp_path, row, answer_as="number-from-1")[0]["<ans>"] == "<option_0>"
    for answer in ("D", 3, -1, "x", True, 1.5):
        assert "data.jsonl:1: the answer " in error(tmp_path, {**row, "answer": answer})
    assert "has only one option" in error(tmp_path, {**row, "choices": ["1"]})
    assert "option B is empty" in error(tmp_path, {**row, "choices": ["1", " "]})
    marked = {"target": "0", "input": "[翻译]a[0]b[2]c[答案]"}
    assert "'input' has [2] where [1] or [答案] is expected" in error(tmp_path, marked)


# ------------------------------------------------------------------ classification, questions


def test_clue_classification(tmp_path: Path) -> None:
    """TNEWS: label_desc is better than label. All labels of the data are options, sorted."""
    rows = [
        {"label": "102", "label_desc": "news_entertainment", "sentence": "江疏影", "keywords": ""},
        {"label": "103", "label_desc": "news_sports", "sentence": "女排 3<4", "keywords": ""},
    ]
    options = {"<option_0>": "news_entertainment", "<option_1>": "news_sports"}
    assert of(tmp_path, *rows, question="哪一类？") == [
        {"input": "江疏影", "options": options, "question": "哪一类？", "<ans>": "<option_0>"},
        {"input": "女排 3<<4", "options": options, "question": "哪一类？", "<ans>": "<option_1>"},
    ]


def test_clue_pairs_and_label_names(tmp_path: Path) -> None:
    """AFQMC; names in the order of the flag, for numbers too."""
    rows: Rows = [
        {"sentence1": "花呗逾期", "sentence2": "花呗还款", "label": "0"},
        {"sentence1": "借呗", "sentence2": "蚂蚁借呗", "label": 1},
    ]
    found = of(tmp_path, *rows, label_names={"1": "相同", "0": "不同"})
    assert found[0] == {
        "sentence1": "花呗逾期",
        "sentence2": "花呗还款",
        "options": {"<option_0>": "相同", "<option_1>": "不同"},
        "<ans>": "<option_1>",
    }
    assert found[1]["<ans>"] == "<option_0>"
    text = error(tmp_path, *rows, label_names={"1": "相同", "2": "不同"})
    assert "data.jsonl:1: the label '0' is none of --label-names: 1, 2" in text


def test_labels_agree_between_files_and_too_many_are_no_options(tmp_path: Path) -> None:
    write(
        tmp_path / "in" / "train.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "z"}]
    )
    write(tmp_path / "in" / "eval.jsonl", [{"text": "c", "label": "y"}])
    convert_data(tmp_path / "in", tmp_path / "out", ConversionOptions(), seed=0)
    (line,) = (tmp_path / "out" / "eval.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["options"] == {"<option_0>": "x", "<option_1>": "y", "<option_2>": "z"}
    many = of(tmp_path, *({"text": f"t{i}", "label": f"l{i}"} for i in range(21)))
    assert many[3] == {"input": "t3", "<ans>": "l3"}


def test_questions(tmp_path: Path) -> None:
    assert of(tmp_path, {"question": "问？", "answer": "答", "context": "文。"}) == [
        {"input": "文。", "question": "问？", "<ans>": "答"}
    ]
    # CMRC and SQuAD on the Hugging Face Hub
    squad = {
        "context": "文。",
        "question": "问？",
        "answers": {"text": ["答", "另"], "answer_start": [0, 1]},
    }
    assert of(tmp_path, squad)[0]["<ans>"] == "答"
    # SQuAD as published: one object
    whole = {
        "version": "1",
        "data": [
            {
                "paragraphs": [
                    {
                        "context": "文。",
                        "qas": [
                            {
                                "id": "1",
                                "question": "问？",
                                "answers": [{"text": "答", "answer_start": 0}],
                            },
                            {"id": "2", "question": "无？", "answers": []},
                        ],
                    }
                ]
            }
        ],
    }
    path = tmp_path / "train.json"
    path.write_text(json.dumps(whole, ensure_ascii=False, indent=2), "utf-8")
    assert converted(path) == [
        {"input": "文。", "question": "问？", "<ans>": "答"},
        {"input": "文。", "question": "无？", "<ans>": ""},
    ]


# ------------------------------------------------------------------ records, numbers, lists


def test_records_stay_as_they_are(tmp_path: Path) -> None:
    record = {"input": "<mask_0>海 a<<b", "<ans>": {"<mask_0>": "大"}}
    assert of(tmp_path, record) == [record]


def test_numbers_and_lists_become_text_where_that_is_asked(tmp_path: Path) -> None:
    row = {"question": "几？", "answer": 3, "context": ["a", "b"]}
    text = error(tmp_path, row)
    assert "'context' is a list of 2 of text, expected text (--join-lists SEPARATOR makes" in text
    text = error(tmp_path, {**row, "context": ""})
    assert "'answer' is a number, expected text (--numbers-as-text writes it as text)" in text
    assert of(tmp_path, row, numbers_as_text=True, join_lists="\\n") == [
        {"input": "a\nb", "question": "几？", "<ans>": "3"}
    ]
    record = {"n": 1, "list": ["a", 2.5, True], "<ans>": "x"}
    assert of(tmp_path, record, numbers_as_text=True, join_lists="、") == [
        {"n": "1", "list": "a、2.5、true", "<ans>": "x"}
    ]


def test_columns_name_what_is_not_known(tmp_path: Path) -> None:
    row = {"标题": "问", "正文": "答", "question": "no"}
    assert of(tmp_path, row, columns={"instruction": "标题", "output": "正文"}) == [
        {"prompt": "问", "<ans>": "答"}
    ]
    assert of(tmp_path, row, columns={"text": "标题", "label": "正文"}) == [
        {"input": "问", "<ans>": "答"}
    ]
    text = error(tmp_path, row, columns={"instruction": "标题", "output": "内容"})
    assert "there is no output" in text


def test_an_unknown_form_says_what_was_seen_and_what_is_near(tmp_path: Path) -> None:
    text = error(tmp_path, {"instructon": "a", "outputs": 3, "tags": ["x"]})
    assert f"{tmp_path}/data.jsonl:1: the data is of no known form" in text
    assert "'instructon' (text), 'outputs' (a number), 'tags' (a list of 1 of text)" in text
    assert (
        "alpaca: there is no instruction ('instructon' is similar: --columns instruction=" in text
    )
    text = error(tmp_path, {"text": "only"})
    assert "classification: text is 'text'; there is no label" in text
    text = error(tmp_path, {"zzz": 1})
    assert all(form in text for form in ("alpaca", "dialogue", "choices", "question-answer"))
    assert "its first record is text, expected an object" in error(tmp_path, "x")


def test_forms_can_be_named(tmp_path: Path) -> None:
    """Data to generate for has no answers, so that only the flag tells its form."""
    assert of(tmp_path, {"instruction": "a"}, form="alpaca") == [{"prompt": "a", "<ans>": ""}]
    assert of(tmp_path, {"question": "a"}, form="question-answer") == [
        {"question": "a", "<ans>": ""}
    ]


# ------------------------------------------------------------------ dataset_info.json


def test_dataset_info_of_llama_factory(tmp_path: Path) -> None:
    info = {
        "mine": {
            "file_name": "data.jsonl",
            "columns": {"prompt": "q", "query": "more", "response": "a", "history": "h"},
        },
        "chat": {
            "file_name": "chat.json",
            "formatting": "sharegpt",
            "columns": {"messages": "talk"},
            "tags": {
                "role_tag": "who",
                "content_tag": "says",
                "user_tag": "U",
                "assistant_tag": "A",
            },
        },
        "better": {"file_name": "rank.json", "ranking": True},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), "utf-8")
    assert of(tmp_path, {"q": "问", "more": "文", "a": "答"}) == [
        {"prompt": "问", "input": "文", "<ans>": "答"}
    ]
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps([{"talk": [{"who": "U", "says": "a"}, {"who": "A", "says": "b"}]}]))
    assert converted(chat) == [{"input": "a", "<ans>": "b"}]
    (tmp_path / "rank.json").write_text("[]")
    with pytest.raises(InputError, match="'better': is a data set of preferences"):
        converted(tmp_path / "rank.json")
