"""Make binary datasets from records: see `python preprocess_dataset.py --help` and docs/data.md."""

from __future__ import annotations

import shlex
from pathlib import Path

from cpm_bee.cli import run_command
from cpm_bee.data.preprocess.options import NO_VOCABULARY, PreprocessOptions
from cpm_bee.language import said
from cpm_bee.tokenizer import Tokenizer

CHECKPOINTS = Path(__file__).resolve().parent / "ckpts"
VOCABULARIES = CHECKPOINTS / "vocab.txt", CHECKPOINTS / "cpm-bee-tiny" / "vocab.txt"


def load_vocabulary(given: str | None) -> Tokenizer | None:
    """Load `--vocab`, by default the vocabulary of the base model in `src/ckpts`, if any."""
    usual = [path for path in VOCABULARIES if path.is_file()]
    if given == NO_VOCABULARY or (given is None and not usual):
        return None
    return Tokenizer.load(given or usual[0])


def main() -> None:
    options = PreprocessOptions.parse()
    from cpm_bee.data.forms.recognised import dataset_names, needs_conversion, record_files
    from cpm_bee.data.preprocess.pipeline import preprocess
    from cpm_bee.data.preprocess.places import check_destinations
    from cpm_bee.data.preprocess.workers import available_cores

    inputs, output_path = Path(options.input), Path(options.output_path)
    tokenizer = load_vocabulary(options.vocab)
    if needs_conversion(inputs, options):  # it may take long: what is wrong is said before
        names = dataset_names(inputs, options)
        check_destinations(output_path, options.output_name, names, options.overwrite)
    with record_files(
        inputs, output_path, options, seed=options.seed, escape=options.escape
    ) as files:
        datasets = preprocess(
            files.path,
            output_path,
            options.output_name,
            seed=options.seed,
            overwrite=options.overwrite,
            block_size=options.block_size,
            tokenizer=tokenizer,
            tokens_needed=options.vocab is not None,
            workers=options.workers or available_cores(),
            escape=options.escape and not files.shown,
            shown=files.shown,
        )
    for dataset in datasets:
        nbytes = sum(info.nbytes for info in dataset.files)
        print(said(f"{dataset.folder}: {len(dataset):,} records, {nbytes:,} bytes"))
    print(said(next_step([dataset.folder for dataset in datasets])))


def next_step(folders: list[Path]) -> str:
    """Returns the next step: the command that trains on the new datasets."""
    src = Path(__file__).absolute().parent
    by_name = {folder.name: folder.absolute() for folder in folders}
    training = by_name.get("train", folders[0].absolute())
    evaluation = by_name.get("eval", folders[-1].absolute())
    usual = (src.parent / "bin_data").resolve()
    if (training.resolve(), evaluation.resolve()) == (usual / "train", usual / "eval"):
        return "next, in src: bash scripts/finetune_cpm_bee.sh"
    variables = {"DATASET": str(training), "EVAL_DATASET": str(evaluation)}
    if training.parent.name not in ("", usual.name):  # a task's own name: results of others stay
        variables["SAVE_NAME"] = training.parent.name
    given = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    return f"next: cd {shlex.quote(str(src))} && {given} bash scripts/finetune_cpm_bee.sh"


if __name__ == "__main__":
    run_command(main)
