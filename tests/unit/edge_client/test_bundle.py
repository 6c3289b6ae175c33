"""What a directory must have to be opened as a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_client.bundle import open_bundle
from fedtt.errors import BundleError
from fedtt.manifest import MANIFEST
from tests.support.edge import write_small_bundle

_BASE_BYTES = 300_000


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / MANIFEST).unlink(), "is not a bundle: it has no manifest.json"),
        (lambda d: (d / "base.bin").unlink(), "base.bin is missing"),
        (lambda d: (d / "base.bin").write_bytes(b"x"), "base.bin has 1 bytes instead of 300000"),
        (lambda d: (d / "base.bin").write_bytes(bytes(_BASE_BYTES)), "base.bin does not match its sha256"),
        (lambda d: (d / MANIFEST).write_bytes(b"{"), "is not a bundle manifest"),
    ],
)
def test_a_local_bundle_that_is_incomplete_is_a_clear_error(
    tmp_path: Path, damage: object, message: str
) -> None:
    write_small_bundle(tmp_path, _BASE_BYTES)
    damage(tmp_path)  # type: ignore[operator]
    with pytest.raises(BundleError, match=message):
        open_bundle(tmp_path)


def test_a_bundle_of_another_format_names_both(tmp_path: Path) -> None:
    write_small_bundle(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"format": 9}))
    with pytest.raises(BundleError, match="has format 9, this program reads format 3"):
        open_bundle(tmp_path)


def test_a_bundle_without_graphs_for_the_runtime_says_which_it_has(tmp_path: Path) -> None:
    write_small_bundle(tmp_path)
    with pytest.raises(BundleError, match="no graphs for executorch: it was exported for onnxruntime"):
        open_bundle(tmp_path, "executorch")


def test_the_first_factors_are_not_needed_on_a_device(tmp_path: Path) -> None:
    write_small_bundle(tmp_path)
    (tmp_path / "factors.safetensors").unlink()
    open_bundle(tmp_path)
