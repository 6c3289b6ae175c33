"""Training on the device's own processor, beside the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import TypeVar

from edge_client.bundle import RuntimeName
from edge_client.judging import JudgingRequest, judge
from edge_client.runtime import Runtimes
from edge_client.tokens import Tokens
from edge_client.trainer import LocalUpdate, TrainingRequest, train
from fedtt.messages import Verdict

__all__ = ["LocalTrainer"]

T = TypeVar("T")


class LocalTrainer:
    """A Trainer that runs the bundle's graph in a thread; one may serve all devices of a process."""

    def __init__(self, runtimes: Runtimes, executor: Executor | None = None) -> None:
        self._runtimes, self._executor = runtimes, executor

    @property
    def runtime(self) -> RuntimeName:
        return self._runtimes.name

    async def train(self, request: TrainingRequest) -> LocalUpdate:
        """Train on the executor; raises what `train` does. Cancelling waits for the batch in progress."""
        stop = threading.Event()
        return await self._aside(partial(self._train, request, stop), stop)

    async def judge(self, request: JudgingRequest) -> Verdict:
        """Judge on the executor; raises what `judge` does. Cancelling waits for its end."""
        return await self._aside(lambda: judge(request, self._runtimes.open(request.bundle)))

    async def _aside(self, work: Callable[[], T], stop: threading.Event | None = None) -> T:
        """`work` on the executor; `stop` is set when this is cancelled."""
        future = asyncio.get_running_loop().run_in_executor(self._executor, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if stop is not None:
                stop.set()
            await asyncio.wait([future])
            future.exception()  # seen: it is Interrupted, or came too late to matter
            raise

    def _train(self, request: TrainingRequest, stop: threading.Event) -> LocalUpdate:
        tokens = Tokens(request.bundle, request.plan.training.max_tokens)
        return train(request, tokens, self._runtimes.open(request.bundle), stop)
