"""Compares whole checkpoint files with checksums: those in the file, or those of its release.

A `torch.save` file has a CRC-32 for each tensor. The safetensors format has no checksums; for such
a file, the SHA-256 that its release has is taken from where it can lie on this machine:

    NAME.sha256                                 what `sha256sum NAME` printed
    .cache/huggingface/download/NAME.metadata   where Hugging Face's client has downloaded a folder
    the target of the link NAME                 where it keeps files in its cache, by their SHA-256
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable
from pathlib import Path

from cpm_bee.checkpoint.torch_file import check_before_loading
from cpm_bee.errors import DamagedFile
from cpm_bee.progress import progress_bar

logger = logging.getLogger(__name__)

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_AT_ONCE = 1 << 20  # bytes
_REPLACE = "put an intact copy there"
_MAX_NOTE = 1 << 12  # bytes of a file that contains a checksum


def verify_file(path: Path) -> None:
    """Compare all of a file with its checksums, and log the result or that it has none.

    Raises:
        DamagedFile: the file has other bytes than those that the checksums are of.
    """
    if path.suffix != ".safetensors":
        try:
            if check_before_loading(path, verify=True):
                logger.info(f"{path}: verified, by its CRC-32 checksums")
                return
        except Exception as error:  # a damaged file can raise nearly anything
            raise DamagedFile(f"{path}: damaged: {error}; {_REPLACE}") from None
    if (expected := sha256_of_release(path)) is None:
        logger.warning(
            f"{path}: has not been verified: there are no checksums in it, and no "
            f"{path.name}.sha256 beside it (a line of sha256sum) to compare it with"
        )
        return
    if (actual := sha256_of(path, f"verifying {path.name}")) != expected:
        raise DamagedFile(
            f"{path}: damaged: its SHA-256 is {actual}, that of the release is {expected}; "
            f"{_REPLACE}"
        )
    logger.info(f"{path}: verified, by the SHA-256 of its release")


def sha256_of_release(path: Path) -> str | None:
    """The SHA-256 that the release of a file has, from where it can lie; None if there is none."""
    notes = [
        path.with_name(f"{path.name}.sha256"),
        path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata",
    ]
    for note in notes:
        if note.is_file():
            with open(note, encoding="utf-8", errors="replace") as file:
                words = file.read(_MAX_NOTE).split()
            # Shorter digests are those of commits, or of small files.
            if digests := [word.lower() for word in words if _SHA256.fullmatch(word)]:
                return digests[0]
    target = path.resolve().name
    return target.lower() if path.is_symlink() and _SHA256.fullmatch(target) else None


def sha256_of(path: Path, description: str, *, is_stopped: Callable[[], bool] = bool) -> str:
    """The SHA-256 of a file; shows a progress bar after two seconds.

    Args:
        description: of the bar; "" for none.
        is_stopped: asked between pieces of the file; if true, the rest is left out.
    """
    digest = hashlib.sha256()
    bar = progress_bar(
        total=path.stat().st_size,
        description=description,
        unit="B",
        delay=2,
        quiet=not description,
    )
    with open(path, "rb") as file, bar:
        while (data := file.read(_AT_ONCE)) and not is_stopped():
            digest.update(data)
            bar.update(len(data))
    return digest.hexdigest()
