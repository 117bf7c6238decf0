"""Runs entry scripts in forked processes, which need not load torch again: a kill test needs many.

Each line of input is a JSON list: a script or `module:function`, and its arguments. Two lines
answer it: the process id of the child, and its exit status. The id remains that of the child until
the next line of input, so that a kill that comes too late meets no other process.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

import torch

import cpm_bee.data.preprocess.pipeline
import cpm_bee.train.setup  # noqa: F401 - loaded for the children
from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.pretrained import load_pretrained
from cpm_bee.tokenizer import Tokenizer


def make_index(dataset: str, vocabulary: str) -> None:
    TokenIndex.of(BinaryDataset(dataset), Tokenizer.load(vocabulary))


def quantize(checkpoint: str, kind: str) -> None:
    load_pretrained(checkpoint, "auto", None, torch.float32, torch.device("cpu"), quantize=kind)


def _run(target: str, arguments: list[str]) -> int:
    if target.endswith(".py"):
        sys.argv = [target, *arguments]
        try:
            runpy.run_path(target, run_name="__main__")
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        return 0
    module, name = target.split(":")
    getattr(importlib.import_module(module), name)(*arguments)
    return 0


def main() -> None:
    torch.set_num_threads(1)
    output = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    child = 0
    for line in sys.stdin:
        if child:
            os.waitpid(child, 0)
        target, *arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            os.dup2(output, 1)
            os.dup2(output, 2)
            status = 70
            try:
                status = _run(target, arguments)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        print(child, flush=True)
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        print(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
