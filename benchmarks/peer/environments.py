"""Environments of their own for the peers, made by pip from exact pins (Python 3.11)."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.federated import WORK

__all__ = ["Missing", "main_pin", "python_of"]

_MAIN = {"flare": "nvflare==", "flower": "flwr==", "pfl": "pfl==", "superlink": "flwr=="}
_WITHOUT_TORCH = {"flare", "superlink"}
_TORCH = "torch==2.13.0"
_CPU_BUILDS = "https://download.pytorch.org/whl/cpu"


class Missing(Exception):
    """A peer cannot be installed here."""


def python_of(peer: str) -> Path:
    """The interpreter of a peer's environment under .bench/peers, made now if need be; raises Missing."""
    pins = _pins(peer)
    directory = WORK / "peers" / peer
    python, stamp = directory / "bin" / "python", directory / "made-from"
    wanted = hashlib.sha256(pins.read_bytes() + _TORCH.encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(directory, ignore_errors=True)
    directory.parent.mkdir(parents=True, exist_ok=True)
    _do(peer, sys.executable, "-m", "venv", str(directory))
    pip = (str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check")
    if peer not in _WITHOUT_TORCH:
        try:  # PyTorch's own index has the small CPU build
            _do(
                peer,
                *pip,
                "--retries",
                "0",
                "--timeout",
                "5",
                "--no-deps",
                "--index-url",
                _CPU_BUILDS,
                _TORCH,
            )
        except Missing:
            _do(peer, *pip, _TORCH)
    _do(peer, *pip, "-r", str(pins))
    stamp.write_text(wanted)
    return python


def main_pin(peer: str) -> str:
    """The peer's own release, as pip is told."""
    return next(line for line in _pins(peer).read_text().splitlines() if line.startswith(_MAIN[peer]))


def _pins(peer: str) -> Path:
    return Path(__file__).with_name(f"{peer}.txt")


def _do(peer: str, *command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["unknown reason"]
        raise Missing(f"{peer} cannot be installed: {lines[-1]}")
