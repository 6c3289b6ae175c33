"""Bundle directories: read with every file checked, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import msgspec
from msgspec import Struct

from fedtt.errors import BundleError, ConfigError, StorageError
from fedtt.manifest import MANIFEST, MANIFEST_LIMIT_BYTES, FileEntry, Manifest, decode_manifest

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


class _OfAnyRelease(Struct):
    """What the manifests of all formats have in common."""

    format: int
    files: dict[str, FileEntry]


_ANY_MANIFEST = msgspec.json.Decoder(_OfAnyRelease)


def check_target(out: Path, *, force: bool) -> None:
    """Raise ConfigError unless `out` is free, empty, or a bundle that may be replaced."""
    if not out.exists():
        return
    if Path.cwd().is_relative_to(out.resolve()):
        allowed = "another directory than the one you are in: it is replaced as a whole"
        raise ConfigError("out", str(out), allowed)
    if not out.is_dir():
        raise ConfigError("out", str(out), "a new directory; it is a file")
    if not any(out.iterdir()):
        return
    if other := _not_of_a_bundle(out):
        allowed = f"a new directory; this one exists and holds something else ({other})"
        raise ConfigError("out", str(out), allowed)
    if not force:
        raise ConfigError("out", str(out), "a new directory; add --force to replace the bundle in it")


def _not_of_a_bundle(out: Path) -> str:
    """The name of something in `out` that is no part of a bundle, of whatever release; "" if all is."""
    known = {MANIFEST} if (out / MANIFEST).is_file() else set()
    if known and (out / MANIFEST).stat().st_size <= MANIFEST_LIMIT_BYTES:
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            known |= _ANY_MANIFEST.decode((out / MANIFEST).read_bytes()).files.keys()
    others = (path.name for path in sorted(out.iterdir()) if path.name not in known or not path.is_file())
    return next(others, "" if len(known) > 1 else MANIFEST)


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A directory beside `out` that takes its place when the block ends well, and vanishes when not."""
    out = Path(os.path.realpath(out))  # a link stays one, and another working directory changes nothing
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
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(stage, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
