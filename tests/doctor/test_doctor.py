"""doctor.py as a user runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, run_script

from cpm_bee.doctor.checkpoint import check_checkpoint
from cpm_bee.doctor.facts import Facts
from cpm_bee.doctor.options import DoctorOptions
from cpm_bee.doctor.report import FAULT, NEEDS_CUDA, OK
from cpm_bee.doctor.steps import STEPS
from cpm_bee.errors import InputError

SCRIPT = "src/doctor.py"
TINY = ROOT / "src" / "ckpts" / "cpm-bee-tiny"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the tiny model."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def findings(tmp_path: Path, *arguments: object, status: int = 0) -> dict[str, dict[str, str]]:
    """The findings of a run, by name."""
    file = tmp_path / "doctor.json"
    done = run_script(SCRIPT, "--json", file, "--save", tmp_path / "results", *arguments)
    assert done.returncode == status, done.stdout + done.stderr
    report = json.loads(file.read_text(encoding="utf-8"))
    for finding in report["findings"]:
        assert finding["name"] in done.stdout and finding["verdict"] in done.stdout
    return {finding["name"]: finding for finding in report["findings"]}


def test_environment_and_a_good_checkpoint(tmp_path: Path) -> None:
    found = findings(tmp_path, "--load", TINY)
    for name in ("Python", "torch", "/dev/shm", "threads", "disk of --save", "TMPDIR"):
        assert found[name]["verdict"] in (OK, "warning")
    assert "1,570,048 parameters" in found["checkpoint"]["text"]
    assert found["vocabulary"]["text"].startswith("8,403 tokens")
    assert not (tmp_path / "results").exists()


def test_a_vocabulary_of_another_model(model: Path) -> None:
    vocabulary = model / "vocab.txt"
    text = vocabulary.read_text(encoding="utf-8")
    vocabulary.write_text(text.rstrip("\n").rpartition("\n")[0], encoding="utf-8")
    (finding,) = check_checkpoint(str(model), "auto", None, Facts())
    assert finding.verdict == FAULT
    assert "has 8402 tokens, the model has 8403" in finding.text


def test_a_git_lfs_pointer(model: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (model / "pytorch_model.bin").write_text(pointer)
    (finding,) = check_checkpoint(str(model), "auto", None, Facts())
    assert finding.verdict == FAULT and "git lfs pull" in finding.text


def test_a_model_that_is_too_large() -> None:
    """For the card, and for full fine-tuning on this disk."""
    facts = Facts(memory=2**20, save={"free": 2**20})
    found = list(check_checkpoint(str(TINY), "auto", None, facts))
    verdicts = {finding.name: finding.verdict for finding in found}
    assert verdicts["size"] == verdicts["disk of --save"] == "warning"
    card = {"devices": [{"free": 2**20}]}
    facts = Facts(memory=2**40, save={"free": 2**40}, torch=card)
    assert "--quantize nf4" in list(check_checkpoint(str(TINY), "auto", None, facts))[2].fix


def test_no_gpu_and_a_disk_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "file").write_text("")
    found = findings(tmp_path, "--gpu", "--save", tmp_path / "file" / "results", status=1)
    assert found["disk of --save"]["verdict"] == FAULT
    assert found["--gpu"]["verdict"] == FAULT and "--device cpu" in found["--gpu"]["fix"]
    assert "sdpa" not in found


def test_list() -> None:
    done = run_script(SCRIPT, "--list")
    assert [line.split()[0] for line in done.stdout.splitlines()] == [s.name for s in STEPS]


@pytest.mark.parametrize(
    "arguments",
    ["--steps sdpa", "--gpu --steps sdpb", "--gpu --device tpu", "--vocab vocab.txt", "--gpus"],
)
def test_wrong_usage(arguments: str) -> None:
    done = run_script(SCRIPT, *arguments.split())
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_options() -> None:
    assert DoctorOptions.parse(["--gpu", "--steps", "fp32,sdpa"]).steps == ("fp32", "sdpa")
    with pytest.raises(InputError, match="cpu, cuda and cuda:N"):
        DoctorOptions.parse(["--device", "cuda:x"])


def test_nothing_heavy_before_the_flags_are_read() -> None:
    """Not even with --list: it answers at once."""
    code = f"import runpy, sys\nsys.path.insert(0, {str(ROOT / 'src')!r})\n"
    code += "sys.argv = ['doctor.py', '--list']\n"
    code += f"try: runpy.run_path({str(ROOT / SCRIPT)!r}, run_name='__main__')\n"
    code += "except SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.slow
def test_all_steps_on_a_cpu(tmp_path: Path) -> None:
    """The whole of --gpu, with what can run on a CPU; what cannot is never called "ok"."""
    file = tmp_path / "doctor.json"
    command = [sys.executable, ROOT / SCRIPT, "--gpu", "--device", "cpu", "--json", file]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=590)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(file.read_text(encoding="utf-8"))
    verdicts = {step["step"]: step["verdict"] for step in report["steps"]}
    needs_cuda = {"flex", "bmtrain"}
    expected = {s.name: NEEDS_CUDA if s.name in needs_cuda else OK for s in STEPS}
    assert verdicts == expected
    lines = [(s["step"], line) for s in report["steps"] for line in s["lines"]]
    not_run = {(step, line["what"]) for step, line in lines if line["verdict"] == NEEDS_CUDA}
    assert not_run == {
        ("checkpointing", "less memory"),
        ("prefetch", "page-locked memory and streams"),
        ("quantize", "bitsandbytes' kernels"),
        ("compile", "code generation"),
        ("memory", "a layer of the 10B"),
        ("fsdp", "offload"),
    }
    # Every comparison of numbers says what it allows.
    errors = [line for _, line in lines if "error" in line["text"] and "rank" not in line["text"]]
    assert len(errors) > 40
    assert all("allowed" in line["text"] for line in errors)
