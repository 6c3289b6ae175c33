from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from export.bundle import check_target, file_entries, read_bundle, staged
from fedtt.errors import BundleError, ConfigError, StorageError
from fedtt.manifest import MANIFEST, Manifest, encode_manifest
from tests.support.tiny import tiny_manifest


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Files that hold their names, and a manifest that says so."""
    directory = tmp_path / "bundle"
    directory.mkdir()
    for name in tiny_manifest().files:
        (directory / name).write_text(name)
    manifest = msgspec.structs.replace(tiny_manifest(), files=file_entries(directory))
    (directory / MANIFEST).write_bytes(encode_manifest(manifest))
    return directory


def test_an_untouched_bundle_reads_back(bundle: Path) -> None:
    assert isinstance(read_bundle(bundle), Manifest)


def test_one_flipped_bit_in_any_file_is_found(bundle: Path) -> None:
    for name in tiny_manifest().files:
        path, intact = bundle / name, (bundle / name).read_bytes()
        path.write_bytes(bytes([intact[0] ^ 1]) + intact[1:])
        with pytest.raises(BundleError, match=f"{name} differs from its sha256"):
            read_bundle(bundle)
        path.write_bytes(intact)


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / "base.bin").unlink()
    with pytest.raises(BundleError, match=r"base\.bin cannot be read"):
        read_bundle(bundle)


def test_a_directory_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        read_bundle(tmp_path)


def test_a_bundle_is_replaced_only_when_told_to(bundle: Path) -> None:
    with pytest.raises(ConfigError, match="--force"):
        check_target(bundle, force=False)
    check_target(bundle, force=True)


def test_a_directory_with_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="holds something else"):
        check_target(tmp_path, force=True)
    with pytest.raises(ConfigError, match="holds something else"):
        check_target(tmp_path / "thesis.txt", force=True)


def test_new_and_empty_targets_are_free(tmp_path: Path) -> None:
    check_target(tmp_path, force=False)
    check_target(tmp_path / "new", force=False)


def test_a_staged_directory_replaces_the_old_one_when_all_is_well(bundle: Path) -> None:
    with staged(bundle) as stage:
        (stage / "new").write_text("new")
        assert (bundle / MANIFEST).exists()
    assert [path.name for path in bundle.iterdir()] == ["new"]
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def _fail(out: Path) -> None:
    with staged(out) as stage:
        (stage / "half").write_text("half")
        raise ZeroDivisionError


def test_a_failure_leaves_the_old_bundle_and_nothing_else(bundle: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        _fail(bundle)
    read_bundle(bundle)
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_target_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"), staged(tmp_path / "file" / "bundle"):
        pytest.fail("a stage was made below a file")
