from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import forked
import pytest

from cpm_bee import files
from cpm_bee.errors import InputError
from cpm_bee.files import atomic_file, atomic_folder, exclusive, remove_lock_files
from cpm_bee.temporary_files import temporary_name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with atomic_file(path) as file:
        file.write("春\n")
        assert not path.exists()
        assert names(path.parent) == [temporary_name("a.txt")]
    assert path.read_bytes() == "春\n".encode()
    assert names(path.parent) == ["a.txt"]


def test_a_failed_file_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path, "wb") as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]
    with pytest.raises(ValueError, match="x"), atomic_file(tmp_path / "b" / "c" / "d.txt") as file:
        raise ValueError("x")
    assert names(tmp_path) == ["a.bin"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "real" / "a.txt")
    with atomic_file(link) as file:
        file.write("x")
    assert link.is_symlink()
    assert (tmp_path / "real" / "a.txt").read_text() == "x"


def test_a_device_is_written_to_not_replaced(tmp_path: Path) -> None:
    with atomic_file(Path(os.devnull)) as file:
        file.write("x")
    assert Path(os.devnull).is_char_device()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with atomic_file(pipe, "wb") as file:
        file.write(b"x")
    assert os.read(reader, 10) == b"x"
    os.close(reader)
    assert names(tmp_path) == ["pipe"]


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="this is a folder"), atomic_file(tmp_path):
        pass


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "set"
    with atomic_folder(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("x")
        assert not path.exists()
    assert names(path.parent) == ["set"]
    assert (path / "sub" / "a").read_text() == "x"


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"), atomic_folder(tmp_path / "a" / "set") as temporary:
        (temporary / "part").write_text("x")
        raise ValueError("x")
    assert names(tmp_path) == []


def test_an_existing_folder_is_refused_or_replaced_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "set"
    path.mkdir()
    (path / "old").write_text("")
    with pytest.raises(InputError, match="already exists"), atomic_folder(path):
        pass
    with pytest.raises(ValueError, match="x"), atomic_folder(path, replace=True) as temporary:
        (temporary / "new").write_text("")
        raise ValueError("x")
    assert names(path) == ["old"]
    with atomic_folder(path, replace=True) as temporary:
        (temporary / "new").write_text("")
        assert names(path) == ["old"]
    assert names(path) == ["new"]
    assert names(tmp_path) == ["set"]


def test_leavings_of_a_killed_run_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".set.partial" / "sub").mkdir(parents=True)
    (tmp_path / ".set.partial" / "half").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("x")
    (tmp_path / ".set.partial" / "link").symlink_to(tmp_path / "elsewhere")
    with atomic_folder(tmp_path / "set") as temporary:
        assert names(temporary) == []
    assert names(tmp_path) == ["elsewhere", "set"]
    assert names(tmp_path / "elsewhere") == ["precious"]


def test_a_run_killed_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / ".set.old").mkdir()
    (tmp_path / ".set.old" / "precious").write_text("x")
    with pytest.raises(ValueError, match="x"), atomic_folder(tmp_path / "set", replace=True):
        raise ValueError("x")
    assert names(tmp_path) == ["set"]
    assert names(tmp_path / "set") == ["precious"]


def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "set") as temporary:
        (temporary / "first").write_text("x")
        with (
            pytest.raises(InputError, match="another process"),
            atomic_folder(tmp_path / "set"),
        ):
            pass
        assert names(temporary) == ["first"]
    assert names(tmp_path / "set") == ["first"]


def test_kill_9_leaves_no_folder_and_the_next_run_works(root: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from cpm_bee.files import atomic_folder\n"
        f"with atomic_folder({str(tmp_path / 'set')!r}) as folder:\n"
        "    (folder / 'half').write_text('x'); print('ready', flush=True); sys.stdin.read()\n"
    )
    process = forked.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root / "src")},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert names(tmp_path) == [".set.partial"]
    with atomic_folder(tmp_path / "set") as temporary:
        (temporary / "whole").write_text("x")
    assert names(tmp_path) == ["set"]
    assert names(tmp_path / "set") == ["whole"]


def test_the_lock_files_of_a_process_that_ends_at_once_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with exclusive(path, "is busy"):
        assert path.exists()
        remove_lock_files()
        assert not path.exists()
    remove_lock_files()


def test_a_temporary_folder_is_empty_locked_and_removed(tmp_path: Path) -> None:
    left = tmp_path / "new" / ".x.partial"
    left.mkdir(parents=True)
    (left / "of-a-killed-run").write_text("")
    with files.temporary_folder(tmp_path / "new" / "x") as folder:
        assert folder == left and list(folder.iterdir()) == []
        (folder / "file").write_text("")
        with pytest.raises(files.BusyError), files.temporary_folder(tmp_path / "new" / "x"):
            pass
        assert (folder / "file").exists()
    assert not left.exists()
    with pytest.raises(KeyError), files.temporary_folder(tmp_path / "other" / "x"):
        raise KeyError
    assert not (tmp_path / "other").exists()
