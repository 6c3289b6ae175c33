"""Build the ExecuTorch library: `python -m edge_client.executorch.build [--wheel]`.

It compiles `shim.cpp` against the C++ SDK in the `executorch` wheel and puts it beside copies of the few
libraries it needs and of their licence, so that no device installs `executorch` itself. For another machine,
point --sdk at the folder `executorch` of its unpacked wheel and CXX at a compiler for it.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from edge_client.files import storage_errors
from fedtt.errors import ConfigError, FedttError, RuntimeFailure

__all__ = ["VERSION", "build", "main", "pack"]

VERSION = "1.5.1"  #: of the SDK, and of what bundles are lowered with
HERE = Path(__file__).parent

_NAME = "fedtt_executorch"
_LIBRARIES = (
    "executorch",
    "executorch_kernels_optimized",
    "executorch_backend_xnnpack",
    "executorch_threadpool",
)
#: By how an SDK's libraries end, those of Linux and of macOS: what links ours to the ones beside it.
_LINKED = {
    "so": ("-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN"),
    "dylib": ("-Wl,-rpath,@loader_path",),
}
_LICENCE = f"LICENSE.executorch-{VERSION}"
_TIMEOUT_S = 600.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m edge_client.executorch.build", description=__doc__)
    parser.add_argument("--sdk", type=Path, help="the folder executorch of a wheel; the installed one")
    parser.add_argument("--out", type=Path, default=HERE / "build", help="directory to write (%(default)s)")
    parser.add_argument("--wheel", metavar="PLATFORM", help="pack a wheel too, as manylinux_2_28_aarch64")
    args = parser.parse_args(arguments)
    try:
        library = build(args.out, args.sdk)
        print(pack(args.out, args.wheel) if args.wheel else library)
    except FedttError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def build(out: Path, sdk: Path | None = None, *, timeout_s: float = _TIMEOUT_S) -> Path:
    """Compile the library into `out`, with what it needs beside it, in `timeout_s` at most.

    Raises RuntimeFailure where it cannot, ConfigError for another SDK, StorageError where `out` takes none.
    """
    sdk = sdk or _installed_sdk()
    if (found := _sdk_version(sdk)) != VERSION:
        raise ConfigError(
            "sdk", f"{sdk.name} {found}", f"executorch {VERSION}: pip install executorch=={VERSION}"
        )
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise RuntimeFailure(f"there is no C++ compiler {compiler!r}: install g++ or clang, or set CXX")
    suffix = _suffix(sdk)
    libraries = [sdk / "lib" / f"lib{name}.{suffix}" for name in _LIBRARIES]
    licence = sdk.parent / f"executorch-{VERSION}.dist-info" / "licenses" / "LICENSE"
    for path in (*libraries, licence):
        if not path.is_file():
            raise RuntimeFailure(f"the SDK has no {path}: install or unpack executorch {VERSION} again")
    library = out / f"lib{_NAME}.{suffix}"
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for path in libraries:
            shutil.copy2(path, out)
        shutil.copy2(licence, out / _LICENCE)
    include = sdk / "include"
    command = [
        *(compiler, "-O2", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden"),
        *("-DC10_USING_CUSTOM_GENERATED_MACROS", "-DET_USE_THREADPOOL"),
        f'-DFEDTT_EXECUTORCH_VERSION="{VERSION}"',
        *("-isystem", str(include), "-isystem", str(include / "executorch/runtime/core/portable_type/c10")),
        *(str(HERE / "shim.cpp"), "-o", str(library), *_LINKED[suffix]),
        *(str(out / path.name) for path in libraries),
    ]
    _compile(command, timeout_s)
    return library


def _suffix(sdk: Path) -> str:
    """How the libraries of the SDK's platform end; RuntimeFailure where it has none of ours."""
    for suffix in _LINKED:
        if (sdk / "lib" / f"lib{_LIBRARIES[0]}.{suffix}").is_file():
            return suffix
    kinds = " or ".join(f"lib{_LIBRARIES[0]}.{suffix}" for suffix in _LINKED)
    raise RuntimeFailure(
        f"{sdk / 'lib'} has no {kinds}: the wheels of executorch {VERSION} for Linux and macOS have one, "
        "that for Windows has none"
    )


def _compile(command: list[str], timeout_s: float) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise RuntimeFailure(
            f"{command[0]} did not compile the ExecuTorch library within {timeout_s:g} s: "
            "has this machine too little memory? build on another, with --wheel"
        ) from None
    except OSError as error:
        raise RuntimeFailure(
            f"{command[0]} cannot be started ({error.strerror}): install g++ or clang, or set CXX"
        ) from None
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise RuntimeFailure(f"the ExecuTorch library does not compile: {first.strip()}")


def pack(directory: Path, platform: str) -> Path:
    """A wheel of what `build` left in `directory`, the libraries and licences, written there: no Python but
    its name. Raises StorageError where it cannot be read or written."""
    with storage_errors(directory):
        return _packed(directory, f"py3-none-{platform}")


def _packed(directory: Path, tag: str) -> Path:
    info = f"fedtt_executorch-{VERSION}.dist-info"
    libraries = [path for suffix in _LINKED for path in sorted(directory.glob(f"*.{suffix}"))]
    files = {f"{_NAME}/{path.name}": path.read_bytes() for path in libraries}
    files[f"{_NAME}/__init__.py"] = b'"""Shared libraries for edge_client.executorch_runtime."""\n'
    licences = {"LICENSE": _own_licence(), _LICENCE: (directory / _LICENCE).read_bytes()}
    files |= {f"{info}/licenses/{name}": text for name, text in licences.items()}
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.4\nName: fedtt-executorch\nVersion: {VERSION}\n"
        "Summary: ExecuTorch's runtime for fedtt's edge client\n"
        "License-Expression: Apache-2.0 AND BSD-3-Clause\n"
        + "".join(f"License-File: {name}\n" for name in licences)
    ).encode()
    files[f"{info}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: fedtt\nRoot-Is-Purelib: false\nTag: {tag}\n".encode()
    )
    record = "".join(f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    wheel = directory / f"fedtt_executorch-{VERSION}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return wheel


def _own_licence() -> bytes:
    """That of shim.cpp, which is fedtt's."""
    with suppress(PackageNotFoundError):
        if text := distribution("fedtt").read_text("licenses/LICENSE"):
            return text.encode()
    raise RuntimeFailure("the licence of fedtt is not where it was installed: install fedtt again")


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _installed_sdk() -> Path:
    found = importlib.util.find_spec("executorch")
    if found is None or not found.submodule_search_locations:
        raise RuntimeFailure(
            f"the executorch package is not installed here: pip install --no-deps executorch=={VERSION} "
            "on the machine that builds, or name its folder with --sdk"
        )
    return Path(next(iter(found.submodule_search_locations)))


def _sdk_version(sdk: Path) -> str:
    try:
        text = (sdk / "version.py").read_text()
    except OSError:
        raise ConfigError("sdk", str(sdk), "the folder executorch of its wheel") from None
    found = re.search(r'__version__ = "([0-9.]+)', text)
    return found.group(1) if found else "unknown"


if __name__ == "__main__":
    sys.exit(main())
