"""Bundle directories: read with every file checked, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from fedtt.errors import BundleError, ConfigError, StorageError
from fedtt.manifest import MANIFEST, FileEntry, Manifest, decode_manifest

__all__ = ["check_target", "file_entries", "read_bundle", "staged"]


def read_bundle(directory: Path) -> Manifest:
    """The manifest, after every file has been found as it says; raises BundleError naming what differs."""
    try:
        manifest = decode_manifest((directory / MANIFEST).read_bytes(), str(directory / MANIFEST))
    except OSError as error:
        reason = error.strerror or error
        raise BundleError(f"{directory} is not a bundle: {MANIFEST} cannot be read ({reason})") from None
    for name, expected in manifest.files.items():
        try:
            found = _entry(directory / name)
        except OSError as error:
            reason = error.strerror or error
            raise BundleError(f"{directory / name} cannot be read ({reason}); export again") from None
        if found != expected:
            raise BundleError(f"{directory / name} differs from its sha256 in {MANIFEST}; export again")
    return manifest


def file_entries(directory: Path) -> dict[str, FileEntry]:
    """Size and sha256 of every file, sorted by name."""
    return {path.name: _entry(path) for path in sorted(directory.iterdir())}


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(digest, path.stat().st_size)


def check_target(out: Path, *, force: bool) -> None:
    """Raise ConfigError unless `out` is free, empty, or a bundle that may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST).is_file():
        raise ConfigError("out", str(out), "a new directory; this one exists and holds something else")
    if not force:
        raise ConfigError("out", str(out), "a new directory; add --force to replace the bundle in it")


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A directory beside `out` that takes its place when the block ends well, and vanishes when not."""
    stage, old = (out.with_name(f".{out.name}.{uuid4().hex[:8]}") for _ in range(2))
    try:
        stage.mkdir(parents=True)
        yield stage
        if out.exists():
            out.rename(old)
        stage.rename(out)
    except OSError as error:
        raise StorageError(f"{out}: cannot be written ({error.strerror or error}); choose another") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
