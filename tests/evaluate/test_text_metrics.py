import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_bee.evaluate.text_metrics import lcs_length, rouge_l, text_statistics

sacrebleu = pytest.importorskip("sacrebleu")

WRITTEN = ["今天天气很好", "他去北京了", "", "the cat sat"]
EXPECTED = ["今天的天气很好", "他去了北京", "没有", "the cat sat"]

words = st.lists(st.sampled_from("甲乙丙丁"), max_size=12)


def slow_lcs(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
            )
    return table[-1][-1]


@given(words, words)
def test_lcs_is_that_of_the_textbook(a, b):
    assert lcs_length(a, b) == slow_lcs(a, b) == lcs_length(b, a)


def test_lcs_of_long_texts_is_quick_and_right():
    assert lcs_length("ab" * 5000, "ba" * 5000) == 9999


def test_rouge_l_of_empty_texts():
    assert rouge_l([], []) == 1
    assert rouge_l(["a"], []) == rouge_l([], ["a"]) == rouge_l(["a"], ["b"]) == 0


@given(words, words)
def test_rouge_l_is_that_of_the_rouge_score_package(a, b):
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")

    class Words:
        def tokenize(self, text):
            return text.split()

    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=Words())
    if a and b:
        expected = scorer.score(" ".join(b), " ".join(a))["rougeL"].fmeasure
        assert rouge_l(a, b) == pytest.approx(expected, rel=1e-12)


def test_bleu_and_chrf_are_those_of_sacrebleu():
    found, signatures = text_statistics(WRITTEN, EXPECTED, [True] * 4)
    by_key = {s.key: s for s in found}
    bleu, chrf = sacrebleu.metrics.BLEU(tokenize="char"), sacrebleu.metrics.CHRF()
    assert by_key["bleu"].figure == bleu.corpus_score(WRITTEN, [EXPECTED]).score
    assert by_key["chrf"].figure == chrf.corpus_score(WRITTEN, [EXPECTED]).score
    assert "tok:char" in signatures["bleu"] and "nc:6" in signatures["chrf"]


def test_only_the_records_that_count_are_counted():
    counts = [True, False, False, True]
    some = [[t for t, c in zip(texts, counts, strict=True) if c] for texts in (WRITTEN, EXPECTED)]
    for whole, part in zip(
        text_statistics(WRITTEN, EXPECTED, counts)[0],
        text_statistics(*some, [True, True])[0],
        strict=True,
    ):
        assert whole.figure == part.figure
        assert whole.counted == 2


def test_rouge_l_counts_words_not_characters():
    (rouge,) = [
        s for s in text_statistics(["天气很好"], ["天气不好"], [True])[0] if s.key[:2] == "ro"
    ]
    assert np.isclose(rouge.figure, rouge_l(["天气", "很", "好"], ["天气", "不好"]))
