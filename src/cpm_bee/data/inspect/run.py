"""Inspects data: reads it, and makes the report, the picture and the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.bin_meta import META
from cpm_bee.data.forms.convert import read_records
from cpm_bee.data.forms.options import ConversionOptions
from cpm_bee.data.inspect.figures import Figures, Inspector
from cpm_bee.data.inspect.options import InspectOptions
from cpm_bee.data.inspect.page import html_page
from cpm_bee.data.inspect.report import histogram, show_record, text_report, use_color
from cpm_bee.data.inspect.tokens import segments_of
from cpm_bee.data.record_pickle import decode
from cpm_bee.encoding import Encoder
from cpm_bee.errors import InputError
from cpm_bee.files import atomic_file
from cpm_bee.paths import unwritable_file
from cpm_bee.progress import progress_bar
from cpm_bee.records import Record
from cpm_bee.tokenizer import Tokenizer

_PICTURES = ("png", "svg", "pdf")


def inspect_data(options: InspectOptions, tokenizer: Tokenizer) -> str:
    """Returns the report, and writes the files that are asked for.

    Raises:
        InputError: data cannot be read, or a file cannot be written.
    """
    _check_outputs(options)
    encoder = Encoder(tokenizer)
    inspector = Inspector(
        encoder,
        batch_size=options.batch_size,
        max_length=options.max_length,
        seed=options.seed,
    )
    shown: list[tuple[str, Record]] = []
    sets: list[Figures] = []
    for name in filter(None, [options.input, options.eval]):
        records = _records(Path(name), options.escape)
        bar = progress_bar(records, description=name, unit="records", delay=2)
        keep = options.show if not sets else 0
        sets.append(inspector.inspect(name, _keeping(bar, shown, keep)))
        if not sets[-1].records:
            raise InputError(f"{name}: holds no records")
    overlap = inspector.compare(sets)
    between = overlap if len(sets) > 1 else None
    seen = [(where, segments_of(record, encoder)) for where, record in shown]
    if options.picture:
        _write_picture(Path(options.picture), sets)
    if options.html:
        with atomic_file(options.html) as file:
            file.write(html_page(sets, between, seen))
    parts = [text_report(sets, between)]
    parts += [show_record(where, segments, color=use_color()) for where, segments in seen]
    return "\n".join(parts).rstrip()


def _keeping(
    records: Iterator[tuple[str, Record]], shown: list[tuple[str, Record]], count: int
) -> Iterator[tuple[str, Record]]:
    """Yields records, and keeps the first of them."""
    for pair in records:
        if len(shown) < count:
            shown.append(pair)
        yield pair


def _records(path: Path, escape: bool) -> Iterator[tuple[str, Record]]:
    """The records of a dataset, or of files of any form, with their places."""
    if (path / META).is_file():
        dataset = BinaryDataset(path)
        for file, offset, payload in dataset:
            yield dataset.where(file, offset), decode(payload)
    else:
        yield from read_records(path, ConversionOptions(), escape=escape)


def _check_outputs(options: InspectOptions) -> None:
    for flag, name in (("--picture", options.picture), ("--html", options.html)):
        if name is not None and (reason := unwritable_file(name)):
            raise InputError(f"{flag} {name}: {reason}")
    if options.picture is not None:
        if _format_of(Path(options.picture)) not in _PICTURES:
            raise InputError(f"--picture {options.picture}: expected .{', .'.join(_PICTURES)}")
        _figure_class()


def _format_of(path: Path) -> str:
    """The format of a picture; a name without an ending has the first."""
    return path.suffix[1:].lower() or _PICTURES[0]


def _figure_class():  # type: ignore[no-untyped-def]
    """matplotlib's Figure, which draws without a display."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            "--picture needs the package matplotlib: pip install -e '.[report]' -c constraints.txt"
        ) from None
    return Figure


def _write_picture(path: Path, sets: Sequence[Figures]) -> None:
    figure = _figure_class()(figsize=(8, 3.2 * len(sets)), layout="constrained")
    axes = figure.subplots(len(sets), squeeze=False)[:, 0]
    for axis, figures in zip(axes, sets, strict=True):
        bins = histogram(figures.lengths, figures.max_length)
        colors = ["tab:red" if a > figures.max_length else "tab:blue" for a, _, _ in bins]
        axis.bar([f"{a}–{b}" for a, b, _ in bins], [n for _, _, n in bins], color=colors)
        axis.set(title=Path(figures.name).name, xlabel="tokens", ylabel="records")
        axis.tick_params("x", rotation=45)
    with atomic_file(path, "wb") as file:
        figure.savefig(file, format=_format_of(path), dpi=120)
