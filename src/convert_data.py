"""Make records from data of other tools: see `python convert_data.py --help` and docs/data.md."""

from __future__ import annotations

import shlex
from pathlib import Path

from cpm_bee.cli import run_command
from cpm_bee.data.forms.options import ConvertDataOptions
from cpm_bee.language import said


def main() -> None:
    options = ConvertDataOptions.parse()
    from cpm_bee.data.forms.convert import convert_data

    results, written = convert_data(
        Path(options.input),
        Path(options.output),
        options,
        seed=options.seed,
        escape=options.escape,
        overwrite=options.overwrite,
    )
    for result in results:
        skipped = f", {result.skipped:,} bad lines skipped" if result.skipped else ""
        unused = f"; not used: {', '.join(sorted(result.unused))}" if result.unused else ""
        print(said(f"{result.source}: {result.form}, {result.records:,} records{skipped}{unused}"))
    for path, count in written.items():
        print(said(f"{path}: {count:,} records"))
    output = Path(options.output).absolute()
    script = Path(__file__).absolute().with_name("preprocess_dataset.py")
    binary = output.with_name(f"{output.name}_bin")
    flags = ["--input", str(output), "--output_path", str(binary), "--output_name", "data"]
    print(said(f"next: {shlex.join(['python', str(script), *flags])}"))


if __name__ == "__main__":
    run_command(main)
