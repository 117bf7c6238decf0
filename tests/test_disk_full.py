"""A disk that is full, in every stage that writes.

Each stage runs with room for k bytes, for several k, after one that was complete. It must fail with
exit status 1 and a message that names the file; what was there before must still be there, no part
of a file may have a final name; and the same command must succeed once there is room.

The disk is a tmpfs. Where that cannot be mounted, and besides, the kernel limits each file.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import disk_support
import forked
import pytest
import torch
import train_support
from disk_support import SCRIPTS, room_in_a_file, room_on_disk, run_here
from support import ROOT
from train_support import TOKENS, Run, Workspace

from cpm_bee import disk
from cpm_bee.checkpoint.reader import load_tensors
from cpm_bee.data.bin_dataset import frame
from cpm_bee.data.preprocess.pipeline import preprocess
from cpm_bee.data.record_pickle import encode
from cpm_bee.json_lines import parse_line, read_lines
from cpm_bee.quantize.cache import cache_path
from cpm_bee.quantize.formats import FORMATS
from cpm_bee.records import Record
from cpm_bee.train.options import Options
from cpm_bee.train.receipt import Receipt
from cpm_bee.train.receipt_reader import read_receipt

# Before a stage: what is on its disk, and which of it must be whole afterwards.
Snapshot = dict[str, bytes]
FULL = ("No space left on device", "File too large")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """On the ordinary disk: what the stages read."""
    folder = tmp_path_factory.mktemp("data") / "all"
    workspace = train_support.make_workspace(folder)
    (folder / "raw").mkdir()
    line = '{"translation": "%s", "choices": ["b", "c"], "answer": 0}\n'
    (folder / "raw" / "train.jsonl").write_text("".join(line % ("a" * i) for i in range(1, 200)))
    (folder / "bee").mkdir()
    train_support.write_jsonl(folder / "bee" / "train.jsonl", train_support.records(300, 1))
    few: list[Record] = [{"input": "ab" * 150, "<ans>": "a"}] * 25
    train_support.write_jsonl(folder / "few.jsonl", few)
    with train_support.one_thread():
        tuned = workspace.flags(folder / "tuned", use_delta=True, max_steps=1)
        assert run_here("finetune_cpm_bee", *tuned).status == 0
    return workspace


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with train_support.one_thread():
        yield


def whole(path: Path) -> None:
    """Assert that a file under a final name can be read to its end."""
    if path.suffix == ".jsonl":
        assert all(parse_line(line)[1] is None for _, line in read_lines(path)), path
        assert path.read_bytes()[-1:] in (b"\n", b""), path
    elif path.suffix == ".pt":
        load_tensors(path, "weights")
    elif path.name.endswith("-receipt.json"):
        assert read_receipt(path)["format"] == 1
    elif path.suffix == ".yaml":
        Options.parse(["--config", str(path)])


@dataclass(frozen=True)
class Stage:
    """A command that writes to a folder, after it has succeeded there once.

    Attributes:
        script, flags: the command, given the inputs and the folder.
        kept: a name that may be left, unfinished, for a run that goes on after it.
    """

    script: str
    flags: Callable[[Workspace, Path], list[object]]
    kept: str = ""


def training_flags(data: Workspace, folder: Path, **more: object) -> list[object]:
    flags = {"use_delta": True, "eval_dataset": data.eval, "eval_interval": 2, "max_steps": 4}
    flags["keep_runs"] = 9  # or finished runs are removed as they should be
    return list(data.flags(folder / "results", **{**flags, **more}))


STAGES = {
    "data_reformat": Stage(
        "data_reformat",
        lambda data, folder: ["--input", data.folder / "raw", "--output", folder / "bee"],
    ),
    "data conversion": Stage(
        "convert_data",
        lambda data, folder: [
            *("--input", data.folder / "raw", "--output", folder / "records"),
            *("--overwrite", "--eval-share", 0.2),
        ],
    ),
    "conversion and preprocessing": Stage(
        "preprocess_dataset",
        lambda data, folder: [
            *("--input", data.folder / "raw", "--output_path", folder / "raw_bin"),
            *("--output_name", "data", "--vocab", data.vocabulary, "--overwrite"),
        ],
    ),
    "inspection": Stage(
        "inspect_data",
        lambda data, folder: [
            *("--input", data.folder / "bee", "--vocab", data.vocabulary),
            *("--html", folder / "page.html", "--picture", folder / "lengths.png"),
        ],
    ),
    "preprocess": Stage(
        "preprocess_dataset",
        lambda data, folder: [
            *("--input", data.folder / "bee", "--output_path", folder / "bin"),
            *("--output_name", "data", "--vocab", data.vocabulary, "--overwrite"),
        ],
    ),
    "delta": Stage("finetune_cpm_bee", training_flags),
    "full": Stage(
        "finetune_cpm_bee",
        lambda data, folder: training_flags(data, folder, use_delta=False, max_steps=2),
    ),
    "generation": Stage(
        "text_generation",
        lambda data, folder: [
            *("--input", data.folder / "few.jsonl", "--output", folder / "out.jsonl"),
            *("--load", data.model, "--max-length", 2, "--beam-size", 1, "--device", "cpu"),
        ],
        kept=".partial",
    ),
    "evaluation": Stage(
        "evaluate",
        lambda data, folder: [
            *("--dataset", data.folder / "few.jsonl", "--output", folder / "evaluation"),
            *("--load", data.model, "--max-length", 2, "--device", "cpu"),
        ],
    ),
    "merging": Stage(
        "merge_delta",
        lambda data, folder: [
            *("--load", data.model, "--delta", tuned_delta(data)),
            *("--output", folder / "merged", "--overwrite"),
        ],
    ),
    "conversion": Stage(
        "convert_checkpoint",
        lambda data, folder: [
            *("--input", data.model, "--to", "huggingface", "--shard-size", 1e-5),
            *("--output", folder / "converted", "--overwrite"),
        ],
    ),
    "adapter": Stage(
        "convert_checkpoint",
        lambda data, folder: [
            *("--input", tuned_delta(data), "--to", "peft"),
            *("--output", folder / "adapter", "--overwrite"),
        ],
    ),
}


def tuned_delta(data: Workspace) -> Path:
    return data.folder / "tuned" / "cpm_bee_finetune-delta-last.pt"


def contents(folder: Path) -> Snapshot:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def run_full(
    stage: Stage,
    data: Workspace,
    folder: Path,
    limit: contextlib.AbstractContextManager[None],
) -> bool:
    """Run a stage with little room and check how it fails; returns whether it failed."""
    before = contents(folder)
    flags = [*stage.flags(data, folder), *going_on(stage, folder)]
    with limit:
        done = run_here(stage.script, *flags)
    if done.status == 0:
        return False
    before, after = (
        {name: c for name, c in found.items() if not (stage.kept and stage.kept in name)}
        for found in (before, contents(folder))
    )
    assert done.status == 1, done
    lines = done.errors.splitlines()
    (line,) = [line for line in lines if line.startswith("error: ")]
    assert any(reason in line for reason in FULL), done
    assert str(folder) in line, "the message names the file"
    assert "Traceback" not in done.errors
    assert set(before.values()) <= set(after.values()), "all results of before are there"
    for name in after:
        assert not name.rpartition("/")[2].startswith("."), f"{name} is a leftover"
        whole(folder / name)
    return True


def check_stage(
    stage: Stage,
    data: Workspace,
    folder: Path,
    limit: Callable[[Path, int], contextlib.AbstractContextManager[None]],
    sizes: list[int],
) -> None:
    flags = stage.flags(data, folder)
    assert run_here(stage.script, *flags).status == 0
    failed = [run_full(stage, data, folder, limit(folder, size)) for size in sizes]
    assert any(failed), "there was room for everything: the test shows nothing"
    done = run_here(stage.script, *flags, *going_on(stage, folder))
    assert done.status == 0, done


def going_on(stage: Stage, folder: Path) -> list[str]:
    """The flag that goes on after what is kept, if there is something."""
    return ["--resume"] if stage.kept and list(folder.glob(f"*{stage.kept}")) else []


@pytest.fixture
def no_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have stages find out themselves, instead of looking at the free space beforehand."""
    monkeypatch.setattr(disk, "free_space", lambda folder: 1 << 60)


def sizes_below(most: int, seed: str) -> list[int]:
    """Some sizes, small ones more often, so that nothing fits, or the first files do."""
    rng = random.Random(seed)
    return sorted({0, *(int(most ** rng.uniform(0.5, 1)) for _ in range(3)), most * 3 // 4})


@pytest.mark.parametrize("name", STAGES)
def test_a_full_disk(name: str, data: Workspace, tmp_path: Path, no_forecast: None) -> None:
    with disk_support.tmpfs(tmp_path / "disk") as folder:
        stage = STAGES[name]
        assert run_here(stage.script, *stage.flags(data, folder)).status == 0
        size = sum(map(len, contents(folder).values()))
        check_stage(stage, data, folder, room_on_disk, sizes_below(size, name))


@pytest.mark.parametrize("name", STAGES)
def test_a_limit_of_file_sizes(name: str, data: Workspace, tmp_path: Path) -> None:
    stage = STAGES[name]
    assert run_here(stage.script, *stage.flags(data, tmp_path)).status == 0
    largest = max(map(len, contents(tmp_path).values()))
    check_stage(stage, data, tmp_path, room_in_a_file, sizes_below(largest, name))


# ------------------------------------------------------------------ what goes on, and with what


def result(folder: Path) -> list[object]:
    """The weights of a run, and its log without times."""
    run = Run(folder / "results")
    weights = [torch.cat([t.flatten() for t in run.weights(w).values()]) for w in ("best", "last")]
    return [w.tolist() for w in weights] + [
        run.column("step"),
        run.losses,
        run.column("loss", "eval"),
    ]


def test_resuming_after_a_full_disk(data: Workspace, tmp_path: Path, no_forecast: None) -> None:
    flags = [*training_flags(data, tmp_path), "--max-steps", 6]
    assert run_here("finetune_cpm_bee", *flags).status == 0
    expected = result(tmp_path)
    size = sum(map(len, contents(tmp_path).values()))
    resumed = 0
    with disk_support.tmpfs(tmp_path / "disk") as folder:
        flags = [*training_flags(data, folder), "--max-steps", 6]
        for share in (1.1, 1.3, 1.5):
            with room_on_disk(folder, int(size * share)):
                failed = run_here("finetune_cpm_bee", *flags)
            saved = re.search(r"the state saved after (\d+) steps is kept", failed.errors)
            assert (failed.status == 0) != ("cannot be written: No space" in failed.errors), failed
            if saved:
                resumed += 1
                done = run_here("finetune_cpm_bee", *flags, "--resume")
                assert done.status == 0 and f"resumed after step {saved[1]}" in done.output, done
                assert result(folder) == expected
            shutil.rmtree(folder / "results")
    assert resumed, "no run had saved a state when the disk became full"


def test_a_token_index_that_does_not_fit(data: Workspace, tmp_path: Path) -> None:
    with disk_support.tmpfs(tmp_path / "disk") as folder:
        shutil.copytree(data.train, folder / "train", ignore=lambda *_: ["token_index*"])
        for left in folder.glob("train/token_index*"):
            shutil.rmtree(left)
        before = contents(folder)
        flags = [*training_flags(data, tmp_path), "--dataset", folder / "train"]
        for room in (0, 8 << 10, 20 << 10):
            with room_on_disk(folder, room):
                done = run_here("finetune_cpm_bee", *flags)
            assert done.status == 1
            assert f"error: {folder}/train/token_index" in done.errors
            assert "cannot be written: No space left on device; this run had not" in done.errors
            assert contents(folder) == before
        assert run_here("finetune_cpm_bee", *flags).status == 0


def test_a_quantized_base_that_does_not_fit_is_made_in_memory(tmp_path: Path) -> None:
    config = replace(
        train_support.CONFIG, dim_model=64, dim_ff=64, dim_head=32, vocab_size=len(TOKENS)
    )
    data = train_support.make_workspace(tmp_path / "data")
    with disk_support.tmpfs(tmp_path / "disk") as folder:
        train_support.make_model(folder / "model", config)
        cache = cache_path(folder / "model" / "pytorch_model.bin", FORMATS["nf4"])
        quantized = ["--quantize", "nf4", "--max-steps", 2, "--load", folder / "model"]
        flags = [*training_flags(data, tmp_path), *quantized]
        with room_on_disk(folder, 8 << 10):
            done = run_here("finetune_cpm_bee", *flags)
        assert done.status == 0
        assert f"warning: {cache} cannot be written (no space left on device: the" in done.errors
        assert "in memory" in done.errors and not cache.exists()
        assert run_here("finetune_cpm_bee", *flags).status == 0
        assert cache.is_file()


def test_a_replay_without_room_for_its_log(
    data: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt = data.folder / "tuned" / "cpm_bee_finetune-receipt.json"
    with disk_support.tmpfs(tmp_path / "disk") as folder:
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        with room_on_disk(folder, 0):
            done = run_here("verify", receipt)
        assert done.status == 1 and f"error: {folder}/" in done.errors, done
        assert any(reason in done.errors for reason in FULL)
        assert contents(folder) == {}
        assert run_here("verify", receipt).status == 0


def test_a_run_whose_receipt_cannot_be_written_has_finished(
    data: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(self: Receipt, status: str, reason: str = "") -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(self._place))

    monkeypatch.setattr(Receipt, "end", end)
    done = run_here("finetune_cpm_bee", *training_flags(data, tmp_path, max_steps=1))
    receipt = tmp_path / "results" / "cpm_bee_finetune-receipt.json"
    assert done.status == 1
    assert done.errors == (
        f"error: {receipt}: cannot be written: No space left on device; the run has finished, and "
        "its weights are saved (explain: E205)\n"
    )
    assert Run(tmp_path / "results").of("end")[0]["finished"]
    assert read_receipt(receipt)["status"] == "running"


# ------------------------------------------------------------------ known beforehand


def test_results_that_do_not_fit_are_refused(data: Workspace, tmp_path: Path) -> None:
    with disk_support.tmpfs(tmp_path / "disk") as folder:
        flags = training_flags(data, folder)
        assert run_here("finetune_cpm_bee", *flags).status == 0
        before = contents(folder)
        for more in ([], ["--dry-run"], ["--resume"]):
            with room_on_disk(folder, 4 << 10):
                done = run_here("finetune_cpm_bee", *flags, *more)
            assert done.status == 1 and contents(folder) == before
            amounts = (
                r"-state\.pt: no space left on device: .* will take [\d.]+ kB, but only [\d.]+ kB"
            )
            assert re.search(amounts, done.errors), done
        assert run_here("finetune_cpm_bee", *flags, "--resume").status == 0


def test_datasets_that_do_not_fit_are_refused_early(tmp_path: Path) -> None:
    (tmp_path / "bee").mkdir()
    train_support.write_jsonl(tmp_path / "bee" / "train.jsonl", train_support.records(40_000, 1))
    with disk_support.tmpfs(tmp_path / "disk", size=4 << 20) as folder:
        flags = ["--input", tmp_path / "bee", "--output_path", folder / "bin", "--output_name", "d"]
        done = run_here("preprocess_dataset", *flags, "--vocab", "none", "--workers", 1)
        assert done.status == 1 and contents(folder) == {}
    assert "no space left on device: making the datasets will take" in done.errors, done


# ------------------------------------------------------------------ standard output, events


NO_SPACE = "cannot be written: No space left on device"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("data_reformat", f"error: standard output: {NO_SPACE}\n"),  # which has no codes
        ("preprocess", f"error: standard output: {NO_SPACE} (explain: E205)\n"),
        ("generation", f"error: standard output: {NO_SPACE} (explain: E205)\n"),
        ("delta", "warning: standard output cannot be written: No space left on device"),
    ],
)
def test_a_full_standard_output(name: str, expected: str, data: Workspace, tmp_path: Path) -> None:
    stage = STAGES[name]
    flags = stage.flags(data, tmp_path)
    if name == "generation":
        flags += ["--output", "-"]
    with open("/dev/full", "w") as full:
        done = forked.run(
            [sys.executable, str(SCRIPTS[stage.script]), *map(str, flags)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=train_support.environment(),
        )
    if name == "delta":  # its results are files: the run goes on
        assert done.returncode == 0 and done.stderr.startswith(expected)
        assert Run(tmp_path / "results").of("end")[0]["finished"]
    else:
        assert (done.returncode, done.stderr) == (1, expected)


def test_an_output_device_that_is_full(data: Workspace, tmp_path: Path) -> None:
    flags = [*STAGES["generation"].flags(data, tmp_path), "--output", "/dev/full"]
    done = run_here("text_generation", *flags)
    assert done.status == 1
    assert done.errors == f"error: /dev/full: {NO_SPACE} (explain: E205)\n"


def test_events_that_do_not_fit(data: Workspace, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with disk_support.tmpfs(tmp_path / "disk") as folder, room_on_disk(folder, 0):
        flags = [*training_flags(data, tmp_path), "--tensorboard", folder / "events"]
        done = run_here("finetune_cpm_bee", *flags)
    assert done.status == 1
    assert f"{folder}/events" in done.errors and "No space left on device" in done.errors, done


def test_a_dataset_can_be_read_on_a_full_disk(tmp_path: Path) -> None:
    """Also where the records of a block end with a page: reading a hole would end the process."""
    page = os.sysconf("SC_PAGE_SIZE")
    code = (
        "import sys; from cpm_bee.data.bin_dataset import BinaryDataset\n"
        "print(sum(1 for _ in BinaryDataset(sys.argv[1])))"
    )
    (tmp_path / "bee").mkdir()
    line: Record = {"input": "a" * 1000, "<ans>": "a"}
    line["input"] = "a" * (1000 + page - len(frame(encode(line))))
    assert len(frame(encode(line))) == page
    train_support.write_jsonl(tmp_path / "bee" / "train.jsonl", [line] * 5)
    with disk_support.tmpfs(tmp_path / "disk") as folder:
        # Two records a block, of three pages.
        preprocess(tmp_path / "bee", folder, "data", seed=0, overwrite=False, block_size=3 * page)
        with room_on_disk(folder, 0):
            done = forked.run(
                [sys.executable, "-c", code, str(folder / "train")],
                env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
                capture_output=True,
                text=True,
                check=False,
            )
    assert (done.returncode, done.stdout) == (0, "5\n"), done


# ------------------------------------------------------------------ all places that write

# What is not a result: a file that torchrun reads, whose lack is no failure, a record within an
# archive whose file has a name, and /dev/null. The doctor's files are temporary and its steps' own.
NOT_NAMED = {
    ("distributed/rank.py", "write_text"),
    ("checkpoint/writer.py", "open"),
}


def test_all_writing_goes_through_named_files() -> None:
    """Anything else would be an error without the name of the file, or a SIGBUS (memmap)."""
    library = ROOT / "src" / "cpm_bee"
    found = set()
    for path in sorted(library.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).rpartition(".")[2]
                first = 0 if isinstance(node.func, ast.Attribute) else 1  # path.open(mode)
                modes = [a.value for a in node.args[first:] if isinstance(a, ast.Constant)]
                writes = name == "open" and any(set(str(mode)) & set("wax+") for mode in modes)
                if writes or name in ("write_text", "write_bytes", "memmap", "tofile"):
                    found.add((str(path.relative_to(library)), name))
    assert {(path, name) for path, name in found if not path.startswith("doctor/")} == NOT_NAMED
