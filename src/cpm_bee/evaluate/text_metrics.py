"""Figures for free text: BLEU over characters, chrF, and ROUGE-L over jieba's words.

BLEU and chrF are sacrebleu's (Post 2018), so that figures can be compared with published ones;
their signatures are part of the results. ROUGE-L is the F-measure of the longest common
subsequence (Lin 2004) of words, averaged over records.

`lcs_length` is the bit-parallel algorithm of Hyyrö (2004): bit i of `row` is 0 if the longest
common subsequence of the words so far grows at word i of `a`. A step for each word of `b` is a few
operations on integers as long as `a`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from cpm_bee.errors import InputError
from cpm_bee.evaluate.bootstrap import Statistics, share

_PACKAGES = "figures for free text need the packages sacrebleu and jieba: pip install -e '.[eval]'"


def text_statistics(
    written: Sequence[str], expected: Sequence[str], counts: Sequence[bool]
) -> tuple[list[Statistics], dict[str, str]]:
    """The figures of texts, and the signatures of sacrebleu's.

    Args:
        written: the text of the model for each record.
        expected: the right text of each.
        counts: whether each record counts.

    Raises:
        InputError: sacrebleu or jieba is not installed.
    """
    try:
        import jieba
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise InputError(_PACKAGES) from None
    jieba.setLogLevel(logging.WARNING)
    # `_extract_corpus_statistics` and `_compute_score_from_stats` are what sacrebleu's own
    # bootstrap is made of; a test compares the result with `corpus_score`.
    bleu, chrf = BLEU(tokenize="char"), CHRF()
    figures = []
    signatures = {}
    for name, key, metric in (("BLEU (characters)", "bleu", bleu), ("chrF", "chrf", chrf)):
        rows = np.array(metric._extract_corpus_statistics(list(written), [list(expected)]))
        rows = rows.astype(np.float64) * np.asarray(counts)[:, None]
        figures.append(Statistics(name, key, rows, _value_of(metric), is_share=False))
        signatures[key] = str(metric.get_signature())
    rouge = np.zeros((len(written), 2))
    for i, counted in enumerate(counts):
        if counted:
            rouge[i] = rouge_l(jieba.lcut(written[i]), jieba.lcut(expected[i])), 1
    figures.append(Statistics("ROUGE-L (words)", "rouge_l", rouge, share))
    return figures, signatures


def _value_of(metric: Any) -> Any:
    def value(sums: np.ndarray) -> float:
        return float(metric._compute_score_from_stats([round(s) for s in sums.tolist()]).score)

    return value


def rouge_l(written: Sequence[str], expected: Sequence[str]) -> float:
    """The F-measure of the longest common subsequence of two lists of words, from 0 to 1."""
    if not written or not expected:
        return float(not written and not expected)
    common = lcs_length(written, expected)
    precision, recall = common / len(written), common / len(expected)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence of two sequences."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    all_ones = (1 << len(a)) - 1
    row = all_ones
    for word in b:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & all_ones
    return len(a) - row.bit_count()
