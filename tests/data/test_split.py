"""The split: groups of near-duplicates, what records share, and which groups are chosen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from cpm_bee.data.near_duplicates import DuplicateGroups, between
from cpm_bee.data.split import Template, choose
from cpm_bee.records import Record

POEM = "春眠不觉晓处处闻啼鸟夜来风雨声花落知多少白日依山尽黄河入海流欲穷千里目更上一层楼"


def record(text: str) -> Record:
    return {"input": text, "<ans>": "x"}


def groups_of(texts: list[str]) -> list[list[int]]:
    groups = DuplicateGroups()
    for text in texts:
        groups.add(record(text))
    return groups.groups()


def test_groups_join_twins_of_twins() -> None:
    """The first and the last are too different, but both are near the second."""
    texts = [POEM, POEM[3:], "完全不同的一句话与诗无关", POEM[6:], POEM[9:]]
    assert between([record(texts[4])], [record(texts[0])]) == []
    assert groups_of(texts) == [[0, 1, 3, 4], [2]]
    assert groups_of([]) == []


def test_records_of_one_row_are_together() -> None:
    groups = DuplicateGroups()
    first = groups.add(record(POEM))
    groups.add(record("另外一段没有关系的文字内容"), together_with=first)
    groups.add(record("第三段也没有任何关系的文字"))
    assert groups.groups() == [[0, 1], [2]]


@given(
    st.lists(st.sampled_from([POEM, POEM[::-1], POEM * 2 + "尾", "短", "别的短句"]), max_size=12)
)
@examples(40)
def test_same_texts_are_always_one_group(texts: list[str]) -> None:
    found = groups_of(texts)
    assert sorted(n for group in found for n in group) == list(range(len(texts)))
    for text in set(texts):
        assert sum(any(texts[n] == text for n in group) for group in found) == 1


def test_what_most_records_share_is_left_out() -> None:
    options: Record = {"<option_0>": "很长很长的第一个选项", "<option_1>": "很长很长的第二个选项"}
    records: list[Record] = [
        {"input": f"第{i}句", "options": options, "question": "哪个？", "<ans>": f"{i}"}
        for i in range(10)
    ]
    template = Template(records)
    assert template.without(records[3]) == {"0": "第3句"}
    same: list[Record] = [{"input": "一样", "<ans>": "x"}] * 3
    assert Template(same).without(same[0]) == {"0": "一样"}, "nothing else is left"
    assert Template(records[:1]).without(records[0])["0"] == "第0句"


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=20),
    st.floats(0.05, 0.95),
    st.integers(0, 9),
)
@examples(60)
def test_groups_are_chosen_whole_and_never_too_many(
    sizes: list[int], share: float, seed: int
) -> None:
    ends = np.cumsum(sizes)
    groups = [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    chosen = choose(groups, share, seed)
    assert len(chosen) == sum(sizes)
    assert all(len({bool(chosen[n]) for n in group}) == 1 for group in groups)
    wanted = max(1, round(share * sum(sizes)))
    assert chosen.sum() <= wanted
    # What is missing is less than the smallest group that was left out.
    left = [len(group) for group in groups if not chosen[group[0]]]
    assert not left or wanted - chosen.sum() < min(left)
    assert chosen.tolist() == choose(groups, share, seed).tolist()


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_single_records_give_the_very_share(share: float) -> None:
    assert choose([[i] for i in range(200)], share, 1).sum() == 200 * share
