"""Write a native checkpoint (fp16) of random weights, of any size, in little memory.

    python benchmarks/random_checkpoint.py --config config/cpm-bee-10b.json --output FOLDER

Weights are N(0, 1), norms 1 (docs/format.md §5; the embedding too, so that logits have a spread).
The folder gets pytorch_model.bin and config.json.
"""

from __future__ import annotations

import argparse
import mmap
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch

from cpm_bee.checkpoint.loading import drop_pages
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.network import CPMBee
from cpm_bee.progress import progress_bar


def write_checkpoint(config_path: Path, folder: Path, seed: int = 0) -> Path:
    """The file's path; it takes its name when it is whole."""
    config = ModelConfig.load(config_path)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in CPMBee(config).named_parameters()}
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / "pytorch_model.bin", folder / ".pytorch_model.bin.partial"
    # torch.save leaves room for the values alone; these tensors never get any pages.
    with torch.serialization.skip_data():
        torch.save({n: torch.empty(s, dtype=torch.float16) for n, s in shapes.items()}, partial)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        tensors = torch.load(partial, mmap=True, weights_only=True)
    generator = torch.Generator().manual_seed(seed)
    total = sum(t.numel() for t in tensors.values())
    with progress_bar(total=total, description="writing", unit="values") as bar:
        for name, tensor in tensors.items():
            if "layernorm" in name:
                tensor.fill_(1)
            else:
                tensor.normal_(generator=generator)
            bar.update(tensor.numel())
            drop_pages(tensor)  # to the file: the mapping is a shared one
    del tensors, tensor
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    shutil.copyfile(config_path, folder / "config.json")
    os.replace(partial, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    path = write_checkpoint(arguments.config, arguments.output, arguments.seed)
    print(f"{path}: {path.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
