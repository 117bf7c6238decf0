"""Importing the library stays light, and its entry scripts answer --help at once."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
import time

import pytest
from support import ROOT, run_script

import cpm_bee

MODULES = [m.name for m in pkgutil.walk_packages(cpm_bee.__path__, "cpm_bee.")]


def test_no_module_imports_bmtrain_or_matplotlib() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n"
    code += "".join(f"import {name}\n" for name in MODULES)
    code += "assert not {'bmtrain', 'matplotlib'} & {name.split('.')[0] for name in sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "script", ["finetune_cpm_bee.py", "text_generation.py", "preprocess_dataset.py"]
)
def test_help_is_quick(script: str) -> None:
    """Under a second on an idle machine; the best of three allows for a busy one."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = run_script(f"src/{script}", "--help")
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0 and "usage:" in done.stdout
    assert min(seconds) < 1
    loads = f"import sys; sys.argv = [{script!r}, '--help']\n"
    loads += (
        f"import runpy\ntry: runpy.run_path({str(ROOT / 'src' / script)!r}, run_name='__main__')\n"
    )
    loads += "except SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", loads], check=True, capture_output=True, cwd=ROOT / "src")


def test_data_reformat_runs_without_anything_installed() -> None:
    """The first step of the tutorial, and a file that people copy: -S and -I find no package."""
    script = ROOT / "tutorials" / "basic_task_finetune" / "data_reformat.py"
    subprocess.run([sys.executable, "-S", "-I", script, "--help"], check=True, capture_output=True)
