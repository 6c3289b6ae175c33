"""Other servers that take as many results of the same size as ours in the same run, on the same cores.

Each lives in an environment of its own, made on the first run, with a load of its own process beside it,
as ours has. How each is driven, and what is left out of its time, stands at the top of `in_flower.py` and
`in_flare.py`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.harness import ROOT
from benchmarks.peer.environments import Missing, main_pin, python_of
from benchmarks.serving.part import Measured, Part
from benchmarks.serving.uploads import CONNECTIONS, taken

__all__ = ["flare", "flower"]

_LIMIT_S = 1200.0
_RESULT_BYTES = 10_000


async def flower(part: Part) -> Measured:
    return await _beside_ours(part, "flower", "superlink")


async def flare(part: Part) -> Measured:
    return await _beside_ours(part, "flare", "flare")


async def _beside_ours(part: Part, name: str, environment: str) -> Measured:
    """Theirs first, then ours, the same count over as many connections."""
    results, connections = (200, 50) if part.quick else (2000, CONNECTIONS)
    try:
        python = await asyncio.to_thread(python_of, environment)
    except Missing as error:
        return Measured(skipped=str(error))
    job = {
        "folder": str(part.directory / name),
        "results": results,
        "connections": connections,
        "result_bytes": _RESULT_BYTES,
    }
    theirs = await _in_its_environment(name, python, job, part.directory)
    part.report.line(part=name, **theirs)
    if theirs["results"] != results or theirs["counted"] != results:
        raise RuntimeError(f"{name} took {theirs['counted']} of {results} results")
    database = part.directory / "data" / "fedtt.db"
    ours, our_cpu_s = await taken(part, database, f"beside_{name}", updates=results, connections=connections)
    rate = results / theirs["seconds"]
    return Measured(
        figures={
            f"{name}_results_ratio": round(results / ours.seconds / rate, 2),
            f"{name}_results_per_s": round(rate, 1),
            f"{name}_p99_ms": round(theirs["p99_ms"], 1),
            f"{name}_server_cpu_us_per_result": round(1e6 * theirs["server_cpu_s"] / results, 1),
            f"ours_beside_{name}_per_s": round(results / ours.seconds, 1),
            f"ours_beside_{name}_cpu_us_per_result": round(1e6 * our_cpu_s / results, 1),
        },
        against={
            f"{name}_results_ratio": f"ours over {main_pin(environment)}, at least 10: {results} results of "
            f"{_RESULT_BYTES} bytes over {connections} connections; ours signed and on disk, theirs in memory"
        },
    )


async def _in_its_environment(
    name: str, python: Path, job: dict[str, Any], directory: Path
) -> dict[str, Any]:
    """Run `benchmarks.serving.in_NAME`; raises RuntimeError with the end of its log where it fails."""
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
        raise RuntimeError(f"{name} failed (exit {process.returncode}):\n{tail}")
    measured: dict[str, Any] = msgspec.json.decode(answer.read_bytes())
    return measured
