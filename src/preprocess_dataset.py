"""Make binary datasets of records: INPUT/NAME.jsonl -> OUTPUT_PATH/NAME/{meta.bin, OUTPUT_NAME}.

Every record is checked before anything is written; the records are shuffled. Their tokens are
made in the same pass (the token index beside the data), so that training can begin at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cpm_bee.cli import ArgumentParser, positive, whole_number
from cpm_bee.data.bin_dataset import BLOCK_SIZE
from cpm_bee.data.preprocess.pipeline import preprocess
from cpm_bee.data.preprocess.workers import available_cores
from cpm_bee.errors import run_command
from cpm_bee.tokenizer import Tokenizer

CHECKPOINTS = Path(__file__).resolve().parent / "ckpts"
VOCABULARIES = CHECKPOINTS / "vocab.txt", CHECKPOINTS / "cpm-bee-tiny" / "vocab.txt"
NONE = "none"


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input", type=Path, required=True, help="folder with *.jsonl files, or one file"
    )
    parser.add_argument("--output-path", type=Path, required=True, help="folder of the datasets")
    parser.add_argument("--output-name", required=True, help="name of the data file in a dataset")
    parser.add_argument(
        "--vocab", help="vocabulary of the model, for the token index; none makes no index "
        "(default: that of the base model in src/ckpts)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=positive, help="processes (default: the cores this process may use)"
    )
    parser.add_argument(
        "--seed", type=whole_number, default=1234, help="of the shuffling (default: 1234)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace datasets that exist")
    parser.add_argument(
        "--block-size", type=positive, default=BLOCK_SIZE,
        help="bytes, the limit of a record's size (default: 16 MiB)",
    )  # fmt: skip
    return parser.parse_args()


def load_vocabulary(given: str | None) -> Tokenizer | None:
    """The tokenizer of `--vocab`; by default of the model that finetune_cpm_bee.sh would load."""
    usual = [path for path in VOCABULARIES if path.is_file()]
    if given == NONE or (given is None and not usual):
        return None
    return Tokenizer.load(given or usual[0])


def main() -> None:
    arguments = parse_arguments()
    datasets = preprocess(
        arguments.input,
        arguments.output_path,
        arguments.output_name,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
        block_size=arguments.block_size,
        tokenizer=load_vocabulary(arguments.vocab),
        tokens_needed=arguments.vocab is not None,
        workers=arguments.workers or available_cores(),
    )
    for dataset in datasets:
        nbytes = sum(info.nbytes for info in dataset.files)
        print(f"{dataset.folder}: {len(dataset):,} records, {nbytes:,} bytes")
    print("next, in src: bash scripts/finetune_cpm_bee.sh")


if __name__ == "__main__":
    run_command(main)
