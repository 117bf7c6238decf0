"""Write a native checkpoint (fp16) with random weights, of any size, using little memory.

    python benchmarks/random_checkpoint.py --config config/cpm-bee-10b.json --output FOLDER

Weights are drawn from N(0, 1), the embedding too, and norms are 1 (docs/format.md §5). Writes
pytorch_model.bin and config.json to the folder.
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
    """Write the checkpoint, atomically; returns its path."""
    config = ModelConfig.load(config_path)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in CPMBee(config).named_parameters()}
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / "pytorch_model.bin", folder / ".pytorch_model.bin.partial"
    # torch.save only reserves space for the values; no pages of these tensors are allocated.
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
            drop_pages(tensor)  # values are kept in the file, because the mapping is shared
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
