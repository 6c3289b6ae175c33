"""Coverage-guided fuzzing of decoders of foreign bytes: a value, or a refusal, in bounded time.

Needs atheris (pip install atheris), libFuzzer for Python, which is no dependency of ours. Each target
(`benchmarks.fuzz_targets`: payloads, differences, updates, messages, label counts, signatures, delegations,
factors, manifests, configs, graphs, programs, weights, tokenizers) runs in a process of its own, from a few
sound inputs; whatever else it raises, a hang of ten seconds or a gigabyte of memory ends it and is reported
with the input.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from benchmarks.fuzz_targets import decoders, targets
from benchmarks.harness import Report, arguments, reporting

LONGEST_BYTES = 4096


def fuzz(name: str, corpus: Path, seconds: int) -> None:
    """In a process of its own: libFuzzer ends it."""
    atheris = import_module("atheris")

    target = targets()[name]

    def run(data: bytes) -> None:
        try:
            target.take(data)
        except target.refusal:
            return

    options = [f"-max_total_time={seconds}", f"-max_len={LONGEST_BYTES}", "-timeout=10", "-rss_limit_mb=1024"]
    options += ["-print_final_stats=1", f"-artifact_prefix={corpus}/found-", "-seed=1"]
    for function in decoders():
        atheris.instrument_func(function)
    atheris.Setup([sys.argv[0], *options, str(corpus)], run)
    atheris.Fuzz()


def measured(name: str, seconds: int) -> dict[str, int | str]:
    """Inputs tried, edges reached, and the input that broke the decoder; to have tried none is broken too."""
    target = targets()[name]
    with tempfile.TemporaryDirectory() as directory:
        for i, data in enumerate(target.sound):
            (Path(directory) / f"sound-{i}").write_bytes(data)
        command = [sys.executable, "-m", "benchmarks.fuzz", "--target", name, "--corpus", directory]
        done = subprocess.run(
            [*command, "--seconds", str(seconds * target.share)], capture_output=True, text=True, check=False
        )
        found = [path.read_bytes().hex() for path in Path(directory).glob("found-*")]
    inputs = _last(r"stat::number_of_executed_units:\s+(\d+)", done.stderr)
    broken = bool(done.returncode or found or not inputs)  # a unit too slow is found, and ends with 0
    if broken:
        print(f"BROKEN {name}: {done.stderr[-2000:]}", file=sys.stderr)
    return {
        "inputs": inputs,
        "edges": _last(r"cov: (\d+)", done.stderr),
        "broken": int(broken),
        **({"found": found[0]} if found else {}),
    }


def _last(number: str, text: str) -> int:
    found = re.findall(number, text)
    return int(found[-1]) if found else 0


def run_all(report: Report, seconds: int) -> bool:
    """Whether every target held."""
    figures: dict[str, int] = {}
    broken = 0
    for name in targets():
        row = measured(name, seconds)
        report.line(target=name, **row)
        figures[f"{name}_inputs"] = int(row["inputs"])
        broken += int(row["broken"])
    report.summary({"broken": broken, "seconds_each": seconds, **figures}, {"broken": 0})
    return broken == 0


def main() -> None:
    parser = arguments("fuzz", __doc__ or "")
    parser.add_argument("--seconds", type=int, default=60, help="for each target, thrice for a slow one")
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
        held = run_all(report, 4 if args.quick else args.seconds)
    sys.exit(not held)


if __name__ == "__main__":
    main()
