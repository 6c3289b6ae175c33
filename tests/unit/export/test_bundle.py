from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from export.bundle import check_target, file_entries, read_bundle, staged
from export.emulation_files import emulation_directory
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
    with pytest.raises(ConfigError, match=r"thesis\.txt.*it is a file"):
        check_target(tmp_path / "thesis.txt", force=True)


def test_nor_is_one_with_another_kind_of_manifest(tmp_path: Path) -> None:
    (tmp_path / "background.js").write_text("years of work")
    extension: tuple[object, ...] = ({"manifest_version": 3, "name": "mine"}, {"format": 3, "files": {}}, [])
    for manifest in (*map(msgspec.json.encode, extension), b"\xff", b"{" * 100_000, bytes(2 << 20)):
        (tmp_path / MANIFEST).write_bytes(manifest)
        with pytest.raises(ConfigError, match="holds something else"):
            check_target(tmp_path, force=True)


def test_nor_is_a_bundle_beside_whose_files_there_are_others(bundle: Path) -> None:
    (bundle / "notes.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"holds something else \(notes\.txt\)"):
        check_target(bundle, force=True)
    (bundle / "notes.txt").unlink()
    (bundle / "base.bin").unlink()
    (bundle / "base.bin").mkdir()
    with pytest.raises(ConfigError, match=r"holds something else \(base\.bin\)"):
        check_target(bundle, force=True)


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_a_bundle_of_any_release_may_be_replaced(bundle: Path, version: int) -> None:
    files = msgspec.to_builtins(file_entries(bundle))
    del files[MANIFEST]
    (bundle / MANIFEST).write_bytes(msgspec.json.encode({"format": version, "files": files, "of": "then"}))
    check_target(bundle, force=True)


@pytest.mark.parametrize("out", [".", "..", "../bundle"])
def test_the_directory_that_one_is_in_is_not_replaced(
    tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bundle").mkdir()
    monkeypatch.chdir(tmp_path / "bundle")
    for force in (False, True):
        with pytest.raises(ConfigError, match="another directory than the one you are in"):
            check_target(Path(out), force=force)


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


def test_a_bundle_whose_place_cannot_be_taken_stays_there(bundle: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written"), staged(bundle) as stage:
        stage.rename(bundle.parent / "elsewhere")  # so that it cannot move to its place in the end
    read_bundle(bundle)
    assert {path.name for path in bundle.parent.iterdir()} == {"bundle", "elsewhere"}


def test_a_link_to_a_bundle_stays_one(bundle: Path, tmp_path: Path) -> None:
    (link := tmp_path / "link").symlink_to(bundle)
    with staged(link) as stage:
        (stage / "new").write_text("new")
    assert [path.name for path in bundle.iterdir()] == ["new"]
    assert link.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "link"}


def test_the_graphs_of_many_devices_are_beside_a_bundle_that_one_is_in(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle)
    assert emulation_directory(Path()) == bundle.with_name("bundle.emulation")


def test_a_relative_target_is_one_of_where_the_block_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with staged(Path("bundle")) as stage:
        (stage / "new").write_text("new")
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert (tmp_path / "bundle" / "new").exists()


def test_a_target_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"), staged(tmp_path / "file" / "bundle"):
        pytest.fail("a stage was made below a file")
