"""What the report of a run knows besides the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cpm_bee.html_pages import Text


class Setting(NamedTuple):
    flag: str
    value: str
    is_default: bool


class DataFigure(NamedTuple):
    """A figure of the training set and of the evaluation set."""

    name: Text
    values: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """Facts of a run.

    Attributes:
        name: of the run.
        metric: `--metric-for-best`.
        sets: the paths of the data sets, the training set first.
        data: figures of each of them.
        commands: what to do with the result, and the command.
        folder: where the commands are to be run.
        summary: lines that describe the run.
        environment: names of software and machine, and their values.
        files: the files of the result, and what they are.
    """

    name: str
    metric: str
    sets: Sequence[str]
    data: Sequence[DataFigure]
    settings: Sequence[Setting]
    commands: Sequence[tuple[Text, str]]
    folder: str
    summary: Sequence[str]
    environment: Sequence[tuple[Text, str]]
    files: Sequence[tuple[str, Text]]
