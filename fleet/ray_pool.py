"""The trainer pool over several processes, here or on many machines (Ray).

What is outstanding together is cut into as many parts as there are workers, in order; part n always goes to
worker n. So the same plan and number of workers give the same bits, and other numbers agree to rounding.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import version
from itertools import pairwise
from typing import Any

from edge_client.bundle import Bundle, RuntimeName
from edge_client.trainer import TrainingRequest
from fedtt.errors import BundleError, ConfigError, FedttError, RuntimeFailure, Unreachable
from fleet.parcels import decode_answers, encode_work, update_of
from fleet.pool import Outstanding, PoolLost
from fleet.pools import settled
from fleet.ray_cluster import check_address, joined
from fleet.ray_worker import Opened, Worker, files_of

__all__ = ["RayPool", "check_workers", "fingerprint", "parts", "threads_each"]

_log = logging.getLogger("fedtt.fleet")
_START_S, _CLOSE_S = 120.0, 5.0
_TRIES = 4  #: of one part, each on a worker that was lost before it answered


class RayPool:
    """A Pool over Ray workers, each with a copy of `trainer`'s pool.

    threads: of each worker; where Ray is started here (`address` None) of all of them together.
    by_path: workers look for the bundle where it lies, before they are sent its files.
    Raises ConfigError or Unreachable where the workers cannot be had; then nothing is left behind.
    """

    def __init__(
        self,
        bundle: Bundle,
        trainer: str,
        *,
        workers: int = 2,
        threads: int = 1,
        model: str | None = None,
        address: str | None = None,
        by_path: bool = True,
    ) -> None:
        check_workers(workers, address)
        self.threads = threads_each(workers, threads, address)
        self._bundle, self._by_path = bundle, by_path
        self._trainer, self._model = trainer, model
        self._files: tuple[list[str], list[Any]] | None = None
        self._waiting: list[Outstanding] = []
        self.lost = 0  #: workers that were lost so far
        with ExitStack() as stack:
            self._ray = stack.enter_context(joined(address, workers * self.threads))
            self._make = self._maker(workers)
            self._workers = [self._make() for _ in range(workers)]
            self._open(self._workers)
            self._stack = stack.pop_all()

    @property
    def runtime(self) -> RuntimeName:
        return "onnxruntime"

    def submit(self, request: TrainingRequest) -> Outstanding:
        handle = Outstanding(self.compute, request)
        if request.bundle.digest == self._bundle.digest:
            self._waiting.append(handle)
        else:
            handle.fail(BundleError(f"these workers have another bundle than {request.bundle.digest[:12]}…"))
        return handle

    def compute(self) -> None:
        """Train all that wait; raises PoolLost where no worker is left to do it."""
        waiting, self._waiting = [handle for handle in self._waiting if handle.is_wanted], []
        cut = parts(waiting, len(self._workers))
        work = [encode_work([handle.request for handle in part]) for part in cut]
        for part, answers in zip(cut, self._done(work), strict=True):
            for handle, answer in zip(part, decode_answers(answers), strict=True):
                with handle.failing():
                    handle.finish(update_of(answer))

    def close(self) -> None:
        """End the workers, and Ray too where it was started here; harmless when repeated."""
        self._waiting = []
        workers, self._workers = self._workers, []
        if not workers:
            return  # without a cluster a call to Ray would start one
        with self._stack, suppress(self._ray.exceptions.RayError):
            self._ray.get([each.close.remote() for each in workers], timeout=_CLOSE_S)

    def _done(self, work: Sequence[bytes]) -> list[bytes]:
        """The answers to each piece of work, part n from worker n; what a lost one had is done again."""
        answers: dict[int, bytes] = {}
        for _ in range(_TRIES):
            asked = {n: self._workers[n].train.remote(work[n]) for n in range(len(work)) if n not in answers}
            if not asked:
                break
            lost = []
            for n, reference in asked.items():
                try:
                    answers[n] = self._ray.get(reference)
                except self._ray.exceptions.RayTaskError:
                    raise  # a fault of ours, with the worker's traceback
                except self._ray.exceptions.RayError:
                    lost.append(n)
            self._replace(lost)
        if len(answers) < len(work):
            raise PoolLost(f"Ray workers were lost {_TRIES} times in a row with the same work in hand")
        return [answers[n] for n in range(len(work))]

    def _replace(self, lost: Sequence[int]) -> None:
        """Start others in place of the lost; where that cannot be, those that are left take their parts."""
        left = [each for n, each in enumerate(self._workers) if n not in lost]
        for n in lost:
            self.lost += 1
            _log.warning("a Ray worker was lost: what it had in hand is done again")
            self._ray.kill(self._workers[n])
            self._workers[n] = self._make()
            try:
                self._open([self._workers[n]])
            except FedttError as refusal:
                self._ray.kill(self._workers[n])
                if not left:
                    raise PoolLost(f"no Ray worker is left, and none can be started: {refusal}") from None
                self._workers[n] = left[n % len(left)]

    def _maker(self, workers: int) -> Callable[[], Any]:
        """What starts a worker. Raises ConfigError where the cluster is too small for all of them."""
        there = self._ray.cluster_resources()
        if workers * self.threads > (cpus := int(there.get("CPU", 0))):
            most = f"at most {cpus // self.threads}"
            raise ConfigError(
                "--ray-workers", workers, f"{most}, with {cpus} CPUs and {self.threads} for each"
            )
        self.trainer = trainer = settled(self._trainer, self._bundle, self.threads, self._model)
        options = {"num_cpus": self.threads, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        if trainer == "batched-torch" and (gpus := int(there.get("GPU", 0))):
            options["num_gpus"] = 1 / math.ceil(workers / gpus)
        remote = self._ray.remote(Worker).options(**options)
        run = secrets.token_hex(8)
        return lambda: remote.remote(run, trainer, self.threads, self._model)

    def _open(self, actors: Sequence[Any]) -> None:
        """Have workers begin; raises RuntimeFailure or Unreachable where one cannot."""
        directory, digest = str(self._bundle.directory.resolve()), self._bundle.digest
        try:
            missing = list(actors)
            if self._by_path:
                opened = self._told([each.open.remote(directory, digest) for each in actors])
                missing = [each for each, said in zip(actors, opened, strict=True) if not said.has_bundle]
            if missing:
                names, contents = self._shipped()
                self._told([each.unpack.remote(names, *contents) for each in missing])
        except self._ray.exceptions.GetTimeoutError:
            raise Unreachable(
                f"a Ray worker did not start within {_START_S:.0f} s: is the cluster full?"
            ) from None
        except self._ray.exceptions.RayError as error:
            raise Unreachable(
                f"a Ray worker did not start (fedtt[fleet,ray] must be installed there): {_line(error)}"
            ) from None

    def _told(self, references: Sequence[Any]) -> list[Opened]:
        said: list[Opened] = self._ray.get(references, timeout=_START_S)
        ours = version("fedtt")
        for each in said:
            if each.release != ours:
                raise RuntimeFailure(
                    f"a Ray worker has fedtt {each.release}, here it is {ours}: install the same"
                )
            if each.refusal:
                raise RuntimeFailure(f"a Ray worker cannot train: {each.refusal}")
        return said

    def _shipped(self) -> tuple[list[str], list[Any]]:
        """The bundle's files in the object store, put there once."""
        if self._files is None:
            found = files_of(self._bundle)
            self._files = list(found), [self._ray.put(path.read_bytes()) for path in found.values()]
        return self._files


def check_workers(workers: int, address: str | None) -> None:
    """Raise what `RayPool` does for these, and start nothing."""
    if not 1 <= workers <= 10_000:
        raise ConfigError("--ray-workers", workers, "a number from 1 to 10000")
    check_address(address)


def threads_each(workers: int, threads: int, address: str | None) -> int:
    """Of one worker; where Ray is started here they share `threads`."""
    return max(1, threads // workers) if address is None else threads


def fingerprint(workers: int, threads: int, address: str | None) -> str:
    """Equal where two pools give the same bits."""
    return f"over {workers} Ray workers of {threads_each(workers, threads, address)} threads"


def parts(waiting: Sequence[Outstanding], workers: int) -> list[Sequence[Outstanding]]:
    """Runs of equal length or one apart, in order, at most one a worker and none empty."""
    count = min(workers, len(waiting))
    cuts = [n * len(waiting) // count for n in range(count + 1)] if count else [0]
    return [waiting[low:high] for low, high in pairwise(cuts)]


def _line(error: BaseException) -> str:
    """What it says at last: of an error in a worker that is what was raised there."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
