"""Let a model write the answers of records: a file of records in, the same records out.

Whatever stands under "<ans>" is replaced by the model's text (null where it wrote too much before
it came to that answer). Where the input has answers, the share written alike is printed.
"""

from __future__ import annotations

import argparse
import sys

from cpm_bee import quantize
from cpm_bee.cli import ArgumentParser, positive, real_number, run_command


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", required=True, metavar="FILE.jsonl", help="records, one a line; - is stdin")
    add("--output", required=True, metavar="FILE.jsonl", help="where to write; - is stdout")
    add(
        "--load",
        default="ckpts/pytorch_model.bin",
        metavar="FILE",
        help="checkpoint of the base model (default: %(default)s)",
    )
    add(
        "--model-config",
        default="auto",
        metavar="FILE",
        help="config of the model; auto reads it off the checkpoint (default: %(default)s)",
    )
    add("--vocab", metavar="FILE", help="vocabulary (default: vocab.txt beside the checkpoint)")
    add("--delta", metavar="FILE", help="what delta tuning saved (default: the base model alone)")
    add(
        "--quantize",
        choices=quantize.CHOICES,
        default=quantize.NONE,
        help="hold the base in 4 or 8 bit, kept beside the checkpoint (default: %(default)s)",
    )
    add("--beam-size", type=positive, default=3, help="hypotheses kept (default: %(default)s)")
    add(
        "--max-length",
        type=positive,
        default=100,
        help="about the most tokens written for a record (default: %(default)s)",
    )
    add(
        "--repetition-penalty",
        type=real_number(0, exclusive=True),
        default=1.0,
        help="above 1, what was written before is less likely again (default: %(default)s)",
    )
    add("--repetition-window", type=positive, help="tokens that this looks back (default: all)")
    add("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="compute type")
    add("--device", default="auto", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    # Imported late, with torch: --help and wrong usage answer at once.
    from cpm_bee import delta, pretrained
    from cpm_bee.generate.beam_search import GenerationOptions, Generator
    from cpm_bee.generate.jsonl import STANDARD, generate_file, read_records

    names = ("beam_size", "max_length", "repetition_penalty", "repetition_window")
    options = GenerationOptions(**{name: getattr(arguments, name) for name in names})
    records = read_records(arguments.input)
    device = pretrained.choose_device(arguments.device)
    dtype = pretrained.choose_dtype(arguments.dtype, device)
    model = (arguments.load, arguments.model_config, arguments.vocab)
    loaded = pretrained.load_pretrained(*model, dtype, device, quantize=arguments.quantize)
    if arguments.delta is not None:
        delta.load(loaded.model, arguments.delta, loaded.fingerprint)
    generator = Generator(loaded.model, loaded.tokenizer)
    score = generate_file(generator, records, options, arguments.output)
    messages = sys.stderr if arguments.output == STANDARD else sys.stdout
    print(f"{len(records):,} records written", file=messages)
    if score.answered:
        print(score, file=messages)


if __name__ == "__main__":
    run_command(main)
