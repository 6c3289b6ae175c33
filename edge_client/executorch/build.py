"""Build the ExecuTorch library: `python -m edge_client.executorch.build [--wheel]`.

It compiles `shim.cpp` against the C++ SDK in the `executorch` wheel and puts it beside copies of the few
libraries it needs, so that no device installs `executorch` itself. For another machine, point --sdk at the
folder `executorch` of its unpacked wheel and CXX at a compiler for it.
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
from pathlib import Path

from fedtt.errors import ConfigError, FedttError, RuntimeFailure

__all__ = ["VERSION", "build", "pack"]

VERSION = "1.5.1"  #: of the SDK, and of what bundles are lowered with
HERE = Path(__file__).parent
NAME = "libfedtt_executorch.so"

_LIBRARIES = (
    "executorch",
    "executorch_kernels_optimized",
    "executorch_backend_xnnpack",
    "executorch_threadpool",
)
_TIMEOUT_S = 600


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


def build(out: Path, sdk: Path | None = None) -> Path:
    """Compile the library into `out`, with what it needs beside it; raises RuntimeFailure where it cannot."""
    sdk = sdk or _installed_sdk()
    if (found := _sdk_version(sdk)) != VERSION:
        raise ConfigError(
            "sdk", f"{sdk.name} {found}", f"executorch {VERSION}: pip install executorch=={VERSION}"
        )
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise RuntimeFailure(f"there is no C++ compiler {compiler!r}: install g++ or clang, or set CXX")
    out.mkdir(parents=True, exist_ok=True)
    for name in _LIBRARIES:
        shutil.copy2(sdk / "lib" / f"lib{name}.so", out)
    include = sdk / "include"
    command = [
        *(compiler, "-O2", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden"),
        *("-DC10_USING_CUSTOM_GENERATED_MACROS", "-DET_USE_THREADPOOL"),
        f'-DFEDTT_EXECUTORCH_VERSION="{VERSION}"',
        *("-isystem", str(include), "-isystem", str(include / "executorch/runtime/core/portable_type/c10")),
        *(str(HERE / "shim.cpp"), "-o", str(out / NAME), f"-L{out}", "-Wl,--no-as-needed"),
        *(f"-l{name}" for name in _LIBRARIES),
        "-Wl,-rpath,$ORIGIN",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)  # noqa: S603
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise RuntimeFailure(f"the ExecuTorch library does not compile: {first.strip()}")
    return out / NAME


def pack(directory: Path, platform: str) -> Path:
    """A wheel of the library and those beside it, in `directory`: no Python but its name."""
    tag = f"py3-none-{platform}"
    info = f"fedtt_executorch-{VERSION}.dist-info"
    files = {f"fedtt_executorch/{path.name}": path.read_bytes() for path in sorted(directory.glob("*.so"))}
    files["fedtt_executorch/__init__.py"] = b'"""Shared libraries for edge_client.executorch_runtime."""\n'
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: fedtt-executorch\nVersion: {VERSION}\n"
        "Summary: ExecuTorch's runtime for fedtt's edge client\nLicense: Apache-2.0 AND BSD-3-Clause\n"
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
