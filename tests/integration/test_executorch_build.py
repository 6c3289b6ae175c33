"""Building ExecuTorch's library from a real SDK, whole or not, and the wheel that is made of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_client.executorch.build import build, main, pack
from fedtt.errors import ConfigError, RuntimeFailure, StorageError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="SKIPPED: the SDK that is changed here is Linux's"),
]


@pytest.fixture
def sdk(tmp_path: Path) -> Path:
    """The installed SDK by links, to be changed."""
    executorch = pytest.importorskip("executorch", reason="SKIPPED: executorch is not installed here")
    installed = Path(next(iter(executorch.__path__)))
    copy = tmp_path / "sdk" / "executorch"
    (copy / "lib").mkdir(parents=True)
    shutil.copy2(installed / "version.py", copy)
    (copy / "include").symlink_to(installed / "include")
    for library in (installed / "lib").glob("*.so"):
        (copy / "lib" / library.name).symlink_to(library)
    info = next(installed.parent.glob("executorch-*.dist-info"))
    (copy.parent / info.name).symlink_to(info)
    return copy


def test_a_wheel_holds_the_library_what_it_needs_and_their_licences(
    executorch_library: Path, tmp_path: Path
) -> None:
    wheel = pack(executorch_library.parent, "linux_x86_64")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target"]
    subprocess.run([*command, str(tmp_path), str(wheel)], check=True)
    found = {path.name for path in (tmp_path / "fedtt_executorch").iterdir()}
    assert executorch_library.name in found
    assert len([name for name in found if name.endswith(".so")]) == 5
    assert wheel.stat().st_size < 14e6
    info = tmp_path / "fedtt_executorch-1.5.1.dist-info"
    licences = {path.name: path.read_text() for path in (info / "licenses").iterdir()}
    assert "Apache License" in licences.pop("LICENSE")
    theirs = licences.pop("LICENSE.executorch-1.5.1")
    assert "Copyright (c) Meta Platforms" in theirs
    assert "Redistributions in binary form must reproduce the above copyright notice" in theirs
    assert not licences
    assert "License-File: LICENSE.executorch-1.5.1\n" in (info / "METADATA").read_text()


def test_an_sdk_of_macos_gives_libraries_by_its_names(sdk: Path, tmp_path: Path) -> None:
    """Linux's libraries by the names of macOS's: what is copied, linked and packed is told by these."""
    for library in (sdk / "lib").iterdir():
        library.rename(library.with_suffix(".dylib"))
    library = build(tmp_path / "out", sdk)
    assert library == tmp_path / "out" / "libfedtt_executorch.dylib"
    wheel = pack(tmp_path / "out", "macosx_14_0_arm64")
    shutil.unpack_archive(wheel, tmp_path / "unpacked", "zip")
    names = [path.name for path in (tmp_path / "unpacked" / "fedtt_executorch").glob("*.dylib")]
    assert library.name in names
    assert len(names) == 5


def without(name: str) -> Callable[[Path], None]:
    return lambda sdk: (sdk / name).unlink()


def without_libraries(sdk: Path) -> None:
    shutil.rmtree(sdk / "lib")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (without("lib/libexecutorch_threadpool.so"), r"the SDK has no .*/libexecutorch_threadpool\.so: "),
        (without("../executorch-1.5.1.dist-info"), "the SDK has no .*/licenses/LICENSE: install or unpack"),
        (without_libraries, r"has no libexecutorch\.so or libexecutorch\.dylib: the wheels of executorch 1"),
        (without("include"), "the ExecuTorch library does not compile: .*executorch"),
    ],
)
def test_an_sdk_that_is_not_whole_is_one_line(
    sdk: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(sdk)
    with pytest.raises(RuntimeFailure, match=complaint):
        build(tmp_path / "out", sdk)
    assert main(["--sdk", str(sdk), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_a_compiler_that_takes_too_long_is_ended_and_said(sdk: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailure, match=r"did not compile the ExecuTorch library within 0\.01 s: "):
        build(tmp_path / "out", sdk, timeout_s=0.01)


def test_a_compiler_that_cannot_be_started_is_said(
    sdk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/nowhere/at/all\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(RuntimeFailure, match=r"cannot be started \(.*\): install g\+\+ or clang, or set CXX"):
        build(tmp_path / "out", sdk)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeFailure, match=r"there is no C.. compiler 'no-such-compiler'"):
        build(tmp_path / "out", sdk)


def test_a_place_that_takes_no_files_is_said(sdk: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StorageError, match="a file stands where a directory should be"):
        build(tmp_path / "out", sdk)


def test_another_sdk_is_refused(tmp_path: Path) -> None:
    (tmp_path / "version.py").write_text('__version__ = "1.4.0"\n')
    with pytest.raises(ConfigError, match=r"executorch 1\.5\.1"):
        build(tmp_path / "out", tmp_path)


def test_no_wheel_is_made_where_the_licence_of_fedtt_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(RuntimeFailure, match="licence of fedtt is not where it was installed"):
        pack(tmp_path, "linux_x86_64")
