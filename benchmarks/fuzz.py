"""Coverage-guided fuzzing of every decoder of foreign bytes: a value, or a WireError, in bounded time.

Needs atheris (pip install atheris), libFuzzer for Python, which is no dependency of ours. Each target
runs in a process of its own, from an empty corpus and a few sound inputs; whatever else it raises, a hang of
ten seconds or a gigabyte of memory ends it and is reported with the input.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType

import numpy as np

from benchmarks.harness import Report, arguments, reporting
from fedtt import codec, wire
from fedtt.codec import CodecSpec, coded, decode_delta, difference, encode_delta, plain, quantise, range_coder
from fedtt.codec.difference import decode_difference, encode_difference
from fedtt.errors import WireError
from fedtt.layout import Factor, FactorLayout
from fedtt.wire import UpdateHeader, decode_update, encode_update

LIVE = FactorLayout([Factor("a", (5, 8, 5)), Factor("b", (40,)), Factor("c", (7,))]).everything
DELTA = np.random.default_rng(0).laplace(0, 0.03, LIVE.size).astype(np.float32)
HELD = (np.rint(128 * DELTA) / 128 + 0.0).astype("<f4").tobytes()
CODECS = {
    "fp32": CodecSpec(quantise="fp32"),
    "int8": CodecSpec(quantise="int8"),
    "int3": CodecSpec(quantise="int3", block=64),
    "int8-coded": CodecSpec(quantise="int8", coding="range"),
    "ternary-coded": CodecSpec(quantise="ternary", coding="range"),
    "sign-coded": CodecSpec(quantise="sign", coding="range", block=32),
    "rms-coded": CodecSpec(quantise="rms", coding="range", block=32),
}
LONGEST_BYTES = 4096


def _delta(spec: CodecSpec) -> tuple[Callable[[bytes], None], list[bytes]]:
    def target(data: bytes) -> None:
        found = decode_delta(spec, LIVE, data)
        assert found.shape == (LIVE.size,)
        assert np.isfinite(found).all()

    return target, [encode_delta(spec, LIVE, DELTA, np.random.default_rng(0))]


def _difference(data: bytes) -> None:
    assert len(decode_difference(HELD, data)) == len(HELD)


def _update(data: bytes) -> None:
    header, payload = decode_update(data)
    assert encode_update(header, payload)


def targets() -> dict[str, tuple[Callable[[bytes], None], list[bytes]]]:
    """name -> what reads bytes, and sound ones to begin with."""
    moved = (np.frombuffer(HELD, "<f4") + np.float32(1 / 128)).astype("<f4").tobytes()
    exact = DELTA.astype("<f4").tobytes()
    header = UpdateHeader(layout=bytes(8), examples=3, steps=2, loss_first=1.0, loss_last=0.5)
    return {name: _delta(spec) for name, spec in CODECS.items()} | {
        "difference": (_difference, [encode_difference(HELD, moved), encode_difference(HELD, exact)]),
        "update": (_update, [encode_update(header, b"payload")]),
    }


def decoders() -> list[FunctionType]:
    """The functions whose branches guide the fuzzer."""
    found: list[FunctionType] = []
    for module in (codec, coded, difference, plain, quantise, range_coder, wire):
        for value in vars(module).values():
            members = vars(value).values() if isinstance(value, type) else [value]
            found += [m for m in members if isinstance(m, FunctionType) and m.__module__ == module.__name__]
    return found


def fuzz(name: str, corpus: Path, seconds: int) -> None:
    """In a process of its own: libFuzzer ends it."""
    atheris = import_module("atheris")

    target, _ = targets()[name]

    def run(data: bytes) -> None:
        try:
            target(data)
        except WireError:
            return

    options = [f"-max_total_time={seconds}", f"-max_len={LONGEST_BYTES}", "-timeout=10", "-rss_limit_mb=1024"]
    options += ["-print_final_stats=1", f"-artifact_prefix={corpus}/found-", "-seed=1"]
    for function in decoders():
        atheris.instrument_func(function)
    atheris.Setup([sys.argv[0], *options, str(corpus)], run)
    atheris.Fuzz()


def measured(name: str, seconds: int) -> dict[str, int]:
    """Inputs tried and edges reached; ends the program with the input that broke a decoder."""
    with tempfile.TemporaryDirectory() as directory:
        for i, data in enumerate(targets()[name][1]):
            (Path(directory) / f"sound-{i}").write_bytes(data)
        command = [sys.executable, "-m", "benchmarks.fuzz", "--target", name, "--corpus", directory]
        done = subprocess.run(
            [*command, "--seconds", str(seconds)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            found = [path.read_bytes().hex() for path in Path(directory).glob("found-*")]
            raise SystemExit(f"{name}: {done.stderr[-2000:]}\ninput: {found}")
    tried = re.findall(r"stat::number_of_executed_units:\s+(\d+)", done.stderr)
    edges = re.findall(r"cov: (\d+)", done.stderr)
    return {"inputs": int(tried[-1]), "edges": int(edges[-1])}


def run_all(report: Report, seconds: int) -> None:
    found = {}
    for name in targets():
        found[name] = measured(name, seconds)
        report.line(target=name, **found[name], broken=0)
    figures = {f"{name}_inputs": row["inputs"] for name, row in found.items()}
    report.summary(figures | {"broken": 0, "seconds_each": seconds}, {"broken": 0})


def main() -> None:
    parser = arguments("fuzz", __doc__ or "")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--target", help="only this one, in this process")
    parser.add_argument("--corpus", type=Path, help="where inputs that reach more are kept")
    args = parser.parse_args()
    if find_spec("atheris") is None:
        print("SKIPPED: fuzzing needs atheris: pip install atheris")
        return
    if args.target:
        fuzz(args.target, args.corpus, args.seconds)
        return
    with reporting("fuzz", args.out) as report:
        run_all(report, 4 if args.quick else args.seconds)


if __name__ == "__main__":
    main()
