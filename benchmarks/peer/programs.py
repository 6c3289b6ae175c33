"""Running the compared programs, each as a process of its own that has the machine to itself."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.federated import WORK
from benchmarks.harness import ROOT
from benchmarks.peer.environments import python_of
from benchmarks.peer.job import Answer, Job, PrefixKind, Products, read_answer, write
from benchmarks.peer.preparation import RealJob

__all__ = ["Failed", "Program", "start"]


class Failed(Exception):
    """A program did not do its job."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """What is started: ours or a peer, and how it uses its processors."""

    name: str  #: of `benchmarks.peer.__main__`
    python: Path
    prefix: PrefixKind = "none"  #: of real training

    @classmethod
    def ours(cls, name: str = "ours") -> Program:
        return cls(name=name, python=Path(sys.executable))

    @classmethod
    def peer(cls, name: str, prefix: PrefixKind = "none") -> Program:
        """Raises Missing where it cannot be installed."""
        return cls(name=name, python=python_of(name), prefix=prefix)

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("ours")

    @property
    def products(self) -> Products:
        """In which the frozen matrices are multiplied."""
        return "int8" if self.name == "ours-int8" else "fp32"

    def command(self, job: Job) -> list[str]:
        launcher: tuple[str, ...] = ()
        if self.name == "pfl" and job.processes > 1:
            launcher = ("torch.distributed.run", "--standalone", f"--nproc-per-node={job.processes}", "-m")
        files = (str(job.scratch / "job.json"), str(job.scratch / "answer.json"))
        return [str(self.python), "-m", *launcher, "benchmarks.peer", self.name, *files]


_ENDS_S = 30.0  #: for a program that was told to end, Flower's actors with it


def start(program: Program, job: Job, real: RealJob | None = None, *, limit_s: float) -> Answer:
    """Run it in its scratch directory, which is emptied first.

    Raises Failed with the end of its log, also where it takes longer than `limit_s`: it is ended then.
    """
    scratch = WORK / "peers" / "runs" / program.name
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    job = msgspec.structs.replace(job, scratch=scratch)
    if real is not None:
        job = real.add_to(job, program.prefix, program.products)
    write(scratch / "job.json", job)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with (scratch / "log.txt").open("w") as log:
        process = subprocess.Popen(
            program.command(job), cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        ended = _ended(process, limit_s)
    if process.returncode or not (scratch / "answer.json").is_file():
        tail = "\n".join((scratch / "log.txt").read_text(errors="replace").splitlines()[-15:])
        how = f"exit {process.returncode}" if ended else f"not done after {limit_s:.0f} s"
        raise Failed(f"{program.name} failed ({how}):\n{tail}")
    return read_answer(scratch / "answer.json")


def _ended(process: subprocess.Popen[bytes], limit_s: float) -> bool:
    """Whether it ends in time; what does not, or is interrupted with us, is ended with all it started."""
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return False
    else:
        return True
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_ENDS_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
