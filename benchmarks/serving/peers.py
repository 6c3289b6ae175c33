"""Other servers that take as many results of the same size as ours in the same run, on the same cores.

Each lives in an environment of its own, made on the first run, with a load of its own process beside it,
as ours has. How each is driven, and what is left out of its time, stands at the top of `in_flower.py` and
`in_flare.py`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.harness import ROOT
from benchmarks.peer.environments import Missing, main_pin, python_of
from benchmarks.serving.load import Answers
from benchmarks.serving.part import Measured, Part
from benchmarks.serving.uploads import CONNECTIONS, Cpu, taken

__all__ = ["flare", "flower"]


class PeerFailed(Exception):
    """Another server could not be run to the end here."""


_LIMIT_S = 1200.0  #: of one run of a peer, its start and end included
_RESULT_BYTES = 10_000
_PROCESSES = 2  #: of ours


async def flower(part: Part) -> Measured:
    """Over gRPC, at which Flower is fastest; and a fourth of the results over HTTP, its default."""
    found = await _beside_ours(part, "flower", "superlink", transport="grpc")
    return await _also(part, found, "flower", "superlink", "http", transport="http")


async def flare(part: Part) -> Measured:
    """Changes of a model, which are averaged; and a fourth of the results as numbers with unread text."""
    found = await _beside_ours(part, "flare", "flare", adds="models")
    return await _also(part, found, "flare", "flare", "numbers", adds="numbers")


async def _also(part: Part, found: Measured, name: str, environment: str, kind: str, **more: str) -> Measured:
    """With the rate of another way to drive it, against ours of before."""
    if found.skipped:
        return found
    results, connections = _counts(part)
    results //= 4
    try:
        theirs = await _theirs(part, name, environment, results, connections, **more)
    except PeerFailed as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return found
    rate = results / theirs["seconds"]
    added = {
        f"{name}_{kind}_results_ratio": round(found.figures[f"ours_beside_{name}_per_s"] / rate, 2),
        f"{name}_{kind}_results_per_s": round(rate, 1),
    }
    return msgspec.structs.replace(found, figures={**found.figures, **added})


def _counts(part: Part) -> tuple[int, int]:
    """Results, and connections that they come over."""
    return (200, 50) if part.quick else (2000, CONNECTIONS)


async def _beside_ours(part: Part, name: str, environment: str, **more: str) -> Measured:
    """Theirs first, then ours, the same count over as many connections: two processes, and one."""
    results, connections = _counts(part)
    try:
        theirs = await _theirs(part, name, environment, results, connections, **more)
    except (Missing, PeerFailed) as error:
        return Measured(skipped=str(error))
    one, _ = await _ours(part, f"beside_{name}_alone", processes=1)
    ours, our_cpu = await _ours(part, f"beside_{name}", processes=_PROCESSES)
    rate, our_rate = results / theirs["seconds"], results / ours.seconds
    return Measured(
        figures={
            f"{name}_results_ratio": round(our_rate / rate, 2),
            f"{name}_results_ratio_one_process": round(results / one.seconds / rate, 2),
            f"{name}_results_per_s": round(rate, 1),
            f"{name}_p99_ms": round(theirs["p99_ms"], 1),
            f"{name}_server_cpu_us_per_result": round(1e6 * theirs["server_cpu_s"] / results, 1),
            f"ours_beside_{name}_per_s": round(our_rate, 1),
            f"ours_beside_{name}_cpu_us_per_result": round(1e6 * our_cpu.servers_s / results, 1),
        },
        against={
            f"{name}_results_ratio": f"ours over {main_pin(environment)}, at least 10: {results} results of "
            f"{_RESULT_BYTES} bytes over {connections} connections on the same two cores; ours in "
            f"{_PROCESSES} processes on one SQLite file, signed and on disk, theirs in memory"
        },
    )


async def _ours(part: Part, name: str, *, processes: int) -> tuple[Answers, Cpu]:
    results, connections = _counts(part)
    own = msgspec.structs.replace(part, directory=part.directory / name)
    database = own.directory / "data" / "fedtt.db"
    return await taken(own, database, name, updates=results, connections=connections, processes=processes)


async def _theirs(
    part: Part, name: str, environment: str, results: int, connections: int, **more: str
) -> dict[str, Any]:
    """What the other server took; raises Missing or PeerFailed."""
    python = await asyncio.to_thread(python_of, environment)
    folder = part.directory / "-".join((name, *more.values()))
    job = {
        "folder": str(folder),
        "results": results,
        "connections": connections,
        "result_bytes": _RESULT_BYTES,
    }
    theirs = await _in_its_environment(name, python, job | more, part.directory)
    part.report.line(part=name, **more, **theirs)
    if theirs["results"] != results or theirs["counted"] != results:
        raise PeerFailed(f"{name} counted {theirs['counted']} of {results} results")
    return theirs


async def _in_its_environment(
    name: str, python: Path, job: dict[str, Any], directory: Path
) -> dict[str, Any]:
    """Run `benchmarks.serving.in_NAME`; raises PeerFailed with the end of its log where it fails."""
    shutil.rmtree(job["folder"], ignore_errors=True)
    Path(job["folder"]).mkdir()
    asked, answer = directory / f"{name}.json", directory / f"{name}-answer.json"
    asked.write_bytes(msgspec.json.encode(job))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "FLWR_HOME": str(Path(job["folder"]) / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
    }
    with (directory / f"{name}.log").open("w") as log:
        process = await asyncio.create_subprocess_exec(
            *(str(python), "-m", f"benchmarks.serving.in_{name}", str(asked), str(answer)),
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            async with asyncio.timeout(_LIMIT_S):
                await process.wait()
        except TimeoutError:
            process.terminate()
            await process.wait()
    if process.returncode or not answer.is_file():
        tail = "\n".join((directory / f"{name}.log").read_text(errors="replace").splitlines()[-15:])
        raise PeerFailed(f"{name} failed (exit {process.returncode}):\n{tail}")
    measured: dict[str, Any] = msgspec.json.decode(answer.read_bytes())
    return measured
