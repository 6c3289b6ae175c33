"""A bundle on disk: a checked manifest and the files a device needs of it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edge_client.files import file_digest, storage_errors
from fedtt.errors import BundleError, UnavailableError
from fedtt.factor_file import decode_factors
from fedtt.layout import Theta
from fedtt.manifest import (
    MANIFEST,
    MANIFEST_LIMIT_BYTES,
    FileEntry,
    Graphs,
    Manifest,
    bundle_digest,
    decode_manifest,
)

__all__ = [
    "Bundle",
    "RuntimeName",
    "check_there",
    "file_fault",
    "needed_files",
    "open_bundle",
    "reading",
]

RuntimeName = Literal["onnxruntime", "executorch"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Bundle:
    """A bundle whose needed files were checked when it was opened."""

    directory: Path
    digest: str  #: its name
    manifest: Manifest

    def graphs(self, runtime: RuntimeName) -> Graphs:
        return _graphs(self.manifest, runtime, str(self.directory))

    def path(self, name: str) -> Path:
        return self.directory / name

    def first_theta(self) -> Theta:
        """(P,), of a bundle as exported, where devices download none; checked against its sha256 here."""
        name = self.manifest.initial
        _check(self.directory, name, self.manifest.files[name])
        with storage_errors(path := self.path(name)):
            data = path.read_bytes()
        return decode_factors(data, self.manifest.adapter.layout, str(path), "export the bundle again")


_PASSING = {errno.ENOENT, errno.ESTALE, errno.EIO}  #: beside want of open files


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """As `storage_errors`, and UnavailableError where a bundle's file is gone or cannot be read now: whoever
    shares the cache may remove a bundle behind its check, and it can be tried, or downloaded, again.
    """
    with storage_errors(path):
        try:
            yield
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            raise UnavailableError(f"{path} cannot be used ({error.strerror}): it is had again") from None


def check_there(*paths: Path) -> None:
    """Raise UnavailableError where one of a bundle's files cannot be read, which is why a library failed."""
    for path in paths:
        with reading(path), path.open("rb") as file:
            file.read(1)


def _graphs(manifest: Manifest, runtime: RuntimeName, where: str) -> Graphs:
    if runtime not in manifest.graphs:
        raise BundleError(
            f"{where} has no graphs for {runtime}: it was exported for {', '.join(manifest.graphs)}"
        )
    return manifest.graphs[runtime]


def needed_files(manifest: Manifest, runtime: RuntimeName, where: str = MANIFEST) -> dict[str, FileEntry]:
    """The files a device with this runtime reads: neither first factors nor what other runtimes alone do."""
    own = _graphs(manifest, runtime, where).files
    others = (name for graphs in manifest.graphs.values() for name in graphs.files)
    unneeded = {manifest.initial, *others} - set(own)
    return {name: entry for name, entry in sorted(manifest.files.items()) if name not in unneeded}


def file_fault(path: Path, entry: FileEntry) -> str | None:
    """What is wrong with a file, or None."""
    if not path.is_file():
        return "is missing"
    if (found := path.stat().st_size) != entry.bytes:
        return f"has {found} bytes instead of {entry.bytes}"
    return None if file_digest(path) == entry.sha256 else "does not match its sha256"


def open_bundle(directory: Path, runtime: RuntimeName = "onnxruntime") -> Bundle:
    """Open a bundle that lies in a directory, checking every needed file against the manifest."""
    path = directory / MANIFEST
    if not path.is_file():
        raise BundleError(f"{directory} is not a bundle: it has no {MANIFEST}; export or download it first")
    with storage_errors(path), path.open("rb") as file:
        data = file.read(MANIFEST_LIMIT_BYTES + 1)
    manifest = decode_manifest(data, str(path))
    for name, entry in needed_files(manifest, runtime, str(directory)).items():
        _check(directory, name, entry)
    return Bundle(directory=directory, digest=bundle_digest(data), manifest=manifest)


def _check(directory: Path, name: str, entry: FileEntry) -> None:
    if fault := file_fault(directory / name, entry):
        raise BundleError(f"{directory / name} {fault}: export or download the bundle again")
