"""Small disks, mounted in memory, and how to fill one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["fill", "mounted", "remount"]


@contextmanager
def mounted(directory: Path, options: str) -> Iterator[Path]:
    """A file system of its own in memory; skips where this user may not mount one."""
    directory.mkdir()
    if os.geteuid() or _run("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)):
        pytest.skip("only root may mount a small or read-only disk: this test did NOT run")
    try:
        yield directory
    finally:
        _run("umount", "--lazy", str(directory))


def remount(disk: Path, options: str) -> None:
    """The same with other options, a larger size say."""
    assert _run("mount", "-o", f"remount,{options}", str(disk)) == 0


def fill(disk: Path) -> None:
    """Take all the room that is left, as the file `filler`."""
    with (disk / "filler").open("ab", buffering=0) as filler:
        size = 1 << 16
        while size:
            try:
                filler.write(bytes(size))
            except OSError:
                size //= 2


def _run(program: str, *arguments: str) -> int:
    command = [shutil.which(program) or program, *arguments]
    return subprocess.run(command, check=False, capture_output=True).returncode
