"""Steps of doctor.py that go wrong; tests/doctor/test_runner.py runs each in a process."""

from __future__ import annotations

import os
import signal
import subprocess
import time

from cpm_bee.doctor.child import Context


def good(context: Context) -> None:
    context.check("one", True, "as it should be")
    context.needs_cuda("another")


def wrong(context: Context) -> None:
    context.check("one", True, "as it should be")
    context.check("two", False, "3 instead of 2")


def raises(context: Context) -> None:
    context.check("one", True, "as it should be")
    raise ValueError("the reason of this failure")


def dies(context: Context) -> None:
    context.check("one", True, "as it should be")
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(context: Context) -> None:
    """Also starts a process, and neither of the two ends when asked to."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    context.check("started", True, "as it should be")
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    context.check("sleeping", True, str(child.pid))
    time.sleep(600)


def checks_nothing(context: Context) -> None:
    pass
