"""Training on the device's own processor, beside the event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import TypeVar

from msgspec.structs import replace

from edge_client.aside import settled
from edge_client.bundle import RuntimeName, open_bundle
from edge_client.judging import JudgingRequest, judge
from edge_client.runtime import Runtimes
from edge_client.tokens import KeptTokens
from edge_client.trainer import LocalUpdate, TrainingRequest, train
from fedtt.errors import ConfigError, Declined, FedttError, RuntimeFailure
from fedtt.messages import Verdict

__all__ = ["Interrupted", "LocalTrainer"]

T = TypeVar("T")

_log = logging.getLogger("fedtt.edge_client")


class Interrupted(Exception):
    """Training or judging was asked to stop between two batches; nothing was kept of it."""


class LocalTrainer:
    """A Trainer that runs the bundle's graph in a thread; one may serve all devices of a process.

    keeps_tokenizers: reading one holds up all threads of the process (`read_tokenizer`); without, each is
    read again for new texts, and lies in memory beside no graph.
    """

    def __init__(
        self, runtimes: Runtimes, executor: Executor | None = None, *, keeps_tokenizers: bool = True
    ) -> None:
        self._runtimes, self._executor = runtimes, executor
        self._tokens = KeptTokens(keeps=keeps_tokenizers)

    @property
    def runtime(self) -> RuntimeName:
        return self._runtimes.name

    def read_tokenizer(self, directory: Path, max_tokens: int | None = None) -> None:
        """Read and keep the tokenizer of a bundle: for an app that knows it, before its event loop runs.

        directory: of the bundle, as exported or as a cache has it (HOME/bundles/NAME), which is checked.
        max_tokens: at which its task cuts texts; None as judging does. Raises BundleError for another, and
        ConfigError where this trainer keeps none.
        """
        if not self._tokens.keeps:
            raise ConfigError("keeps_tokenizers", False, "True, where one is to be read beforehand")
        self._tokens.open(open_bundle(directory, self.runtime), max_tokens).read()

    async def train(self, request: TrainingRequest) -> LocalUpdate:
        """Train on the executor; raises what `train` does, and Declined at the first text or batch after
        the request's limit of time. Cancelling waits for the one in progress.
        """
        stop = threading.Event()
        return await self._aside(partial(self._train, request, stop), stop)

    async def judge(self, request: JudgingRequest) -> Verdict:
        """Judge on the executor; raises what `judge` does, and Declined at its limit of time. Cancelling as
        in `train`.
        """
        stop = threading.Event()
        return await self._aside(partial(self._judge, request, stop), stop)

    async def _aside(self, work: Callable[[], T], stop: threading.Event) -> T:
        """`work` on the executor; `stop` is set when this is cancelled."""
        future = asyncio.get_running_loop().run_in_executor(self._executor, _contained, work)
        await settled(future, stop.set)
        return future.result()

    def _train(self, request: TrainingRequest, stop: threading.Event) -> LocalUpdate:
        began = time.monotonic()
        go_on = _until(stop, began, request.time_limit_s, "training")
        tokens = self._tokens.open(request.bundle, request.plan.training.max_tokens)
        update = train(request, tokens, self._runtimes.open(request.bundle), go_on)
        return replace(update, training_s=time.monotonic() - began)

    def _judge(self, request: JudgingRequest, stop: threading.Event) -> Verdict:
        go_on = _until(stop, time.monotonic(), request.time_limit_s, "judging")
        tokens = self._tokens.open(request.bundle)
        return judge(request, self._runtimes.open(request.bundle), tokens, go_on)


def _until(stop: threading.Event, began: float, limit_s: float | None, what: str) -> Callable[[], None]:
    """What work calls again and again: raises Interrupted once `stop` is set, Declined after its limit."""

    def go_on() -> None:
        if stop.is_set():
            raise Interrupted
        if limit_s is not None and time.monotonic() - began > limit_s:
            raise Declined(f"{what} has taken the {limit_s:g} s that it may", "time")

    return go_on


def _contained(work: Callable[[], T]) -> T:
    """`work`, whose bundle may be anyone's: what it makes a library raise is a RuntimeFailure, no more."""
    try:
        return work()
    except (FedttError, Interrupted):
        raise
    except Exception as error:
        _log.exception("a bundle made training or judging fail in a way that no check foresaw")
        kind, text = type(error).__name__, " ".join(str(error).split())[:200]
        raise RuntimeFailure(f"training or judging failed with {kind}: {text}") from error
