"""Where the emulated devices' local training is computed.

A device hands in its request when it begins to train and asks for the result when its virtual time of
training is over. In between other devices hand in theirs, so a pool that waits for the first question can
compute all of them in one pass: which those are follows from virtual time alone, and so does the batch plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import numpy as np

from edge_client.batches import address
from edge_client.bundle import RuntimeName
from edge_client.runtime import Runtimes
from edge_client.tokens import Tokens
from edge_client.trainer import LocalUpdate, TrainingRequest, train, trained_adapter
from fedtt.codec import encode_delta
from fedtt.errors import DataError, FedttError
from fedtt.layout import LiveSet
from fedtt.messages import Plan
from fedtt.rng import Purpose, rng_for
from fedtt.wire import UpdateHeader, encode_update, layout_tag

__all__ = ["Handle", "NoopPool", "OneByOnePool", "Outstanding", "Pool", "PoolLost"]


class PoolLost(Exception):
    """Nothing trains any more, which is no device's fault: it ends the run, and the message says why."""


class Handle(Protocol):
    """One training that was handed in."""

    def result(self) -> LocalUpdate:
        """Its update, computed now if it was not yet: may block for as long as training takes.

        Raises what `Trainer.train` does: DataError, LayoutError, RuntimeFailure or WireError; or PoolLost.
        """
        ...

    def cancel(self) -> None:
        """Nobody will ask; harmless after `result` and when repeated."""
        ...


class Pool(Protocol):
    """Computes trainings, all that are outstanding together when the first of them is needed.

    Called from one thread at a time, in the order of virtual time. Handles are computed in the order they
    were handed in, so that the same calls give the same batches and the same bits.
    """

    @property
    def runtime(self) -> RuntimeName:
        """Whose graphs it runs, as devices tell their server."""
        ...

    def submit(self, request: TrainingRequest) -> Handle:
        """Take a request; an unusable one raises from its `result`, never from here."""
        ...

    def close(self) -> None:
        """Let go of workers and memory; nothing is asked afterwards."""
        ...


class Outstanding:
    """A Handle of a pool that computes all that wait when one is asked for; its outcome is asked for once.

    compute: gives every Outstanding its outcome that is wanted and has none.
    """

    def __init__(self, compute: Callable[[], None], request: TrainingRequest) -> None:
        self._compute, self.request = compute, request
        self.is_wanted = True
        self._outcome: LocalUpdate | FedttError | None = None

    def result(self) -> LocalUpdate:
        if not self.is_wanted:
            raise RuntimeError("this training was cancelled or has been asked for before")
        if self._outcome is None:
            self._compute()
        outcome = self._outcome
        self.cancel()
        if isinstance(outcome, FedttError):
            raise outcome
        if outcome is None:
            raise RuntimeError("the pool was closed before this training was asked for")
        return outcome

    def cancel(self) -> None:
        self.is_wanted, self._outcome = False, None

    def finish(self, update: LocalUpdate) -> None:
        self._outcome = update

    def fail(self, error: FedttError) -> None:
        self._outcome = error

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Take an error of the block as the outcome: it is this device's alone."""
        try:
            yield
        except FedttError as error:
            self.fail(error)


class OneByOnePool:
    """The device's own trainer, one request after another: what batched pools are compared with."""

    def __init__(self, runtimes: Runtimes) -> None:
        self._runtimes = runtimes
        self._tokens: dict[tuple[str, int | None], Tokens] = {}

    @property
    def runtime(self) -> RuntimeName:
        return self._runtimes.name

    def submit(self, request: TrainingRequest) -> Handle:
        return _Deferred(partial(self._train, request))

    def close(self) -> None:
        self._tokens.clear()

    def _train(self, request: TrainingRequest) -> LocalUpdate:
        key = (request.bundle.digest, request.plan.training.max_tokens)
        if key not in self._tokens:
            self._tokens[key] = Tokens(request.bundle, request.plan.training.max_tokens)
        return train(request, self._tokens[key], self._runtimes.open(request.bundle))


class NoopPool:
    """No training at all: a fixed small delta in a real frame, to measure everything around it.

    The delta of each plan is drawn once and coded for each device; error feedback keeps no residual.
    """

    def __init__(self, runtime: RuntimeName = "onnxruntime") -> None:
        self._runtime: RuntimeName = runtime
        self._plan: Plan | None = None
        self._live: LiveSet | None = None
        self._delta = np.zeros(0, np.float32)
        self._layout = b""

    @property
    def runtime(self) -> RuntimeName:
        return self._runtime

    def submit(self, request: TrainingRequest) -> Handle:
        return _Deferred(partial(self._answer, request))

    def close(self) -> None:
        self._plan = self._live = None

    def _answer(self, request: TrainingRequest) -> LocalUpdate:
        plan, examples = request.plan, request.examples.count()
        if examples < max(1, plan.min_examples):
            raise DataError(f"the task needs {plan.min_examples} examples, this device has {examples}")
        live = self._prepared(request)
        stochastic = plan.codec.rounding == "stochastic"
        device = address(request.device) if stochastic else 0
        rng = rng_for(plan.seed, Purpose.ROUNDING, plan.round, device) if stochastic else _NO_NOISE
        header = UpdateHeader(
            layout=self._layout,
            examples=examples,
            steps=plan.training.local_steps,
            loss_first=1.0,
            loss_last=1.0,
        )
        frame = encode_update(header, encode_delta(plan.codec, live, self._delta, rng))
        return LocalUpdate(frame=frame, residual=b"", header=header, cut_texts=0)

    def _prepared(self, request: TrainingRequest) -> LiveSet:
        """The plan's live set, with its delta ready; plans come in long runs of equal ones."""
        plan = request.plan
        if self._live is None or (self._plan is not plan and self._plan != plan):
            layout = trained_adapter(plan, request.bundle.manifest).layout
            live = layout.live_set(plan.live)
            noise = rng_for(plan.seed, Purpose.INITIAL, plan.round).standard_normal(live.size, np.float32)
            self._plan, self._live, self._layout = plan, live, layout_tag(layout)
            self._delta = np.float32(1e-3) * noise
        return self._live


_NO_NOISE = np.random.default_rng(0)  #: what rounding to nearest never draws from


class _Deferred:
    """Computed when asked, and only then."""

    def __init__(self, compute: Callable[[], LocalUpdate]) -> None:
        self._compute: Callable[[], LocalUpdate] | None = compute

    def result(self) -> LocalUpdate:
        if self._compute is None:
            raise RuntimeError("this training was cancelled or has been asked for before")
        compute, self._compute = self._compute, None
        return compute()

    def cancel(self) -> None:
        self._compute = None
