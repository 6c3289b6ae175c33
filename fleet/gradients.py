"""The gradients of many devices, from passes over the rows of all their batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_client.passes import Pass, PassLimits, padded_tokens, plan_passes
from edge_client.private_steps import GaussianMechanism
from edge_client.tokens import Batch
from fedtt.layout import Theta
from fedtt.manifest import Tokenization
from fleet.activations import Activations, Hidden
from fleet.backends import Backend, Losses

__all__ = ["Ask", "Counts", "Gradients"]

Ids = NDArray[np.int64]
T = TypeVar("T")


class Ask(NamedTuple):
    """What one training waits for: the loss and gradient (P,) of a batch under its factors."""

    theta: Theta  #: (P,)
    batch: Batch
    mechanism: GaussianMechanism | None = None  #: of a private training: clips each example's gradient

    def clipped(self, gradient: Theta) -> Theta:
        """The part of one owner's rows in the batch's gradient."""
        return self.mechanism.clipped(gradient, len(self.batch.ids)) if self.mechanism else gradient

    def noisy(self, gradient: Theta) -> Theta:
        return self.mechanism.noisy(gradient, len(self.batch.ids)) if self.mechanism else gradient


@dataclass
class Counts:
    """What has been computed."""

    device_steps: int = 0
    passes: int = 0
    tokens: int = 0  #: of the rows trained on
    padded_tokens: int = 0  #: those and padding
    activations_computed: int = 0  #: rows that went through the frozen lower part
    activations_reused: int = 0  #: rows of which it was remembered

    @property
    def padding_share(self) -> float:
        """Of the tokens computed, those that were padding."""
        return 1 - self.tokens / max(1, self.padded_tokens)


class Gradients:
    """Answers what trainings ask, all at once."""

    def __init__(
        self,
        backend: Backend,
        tokenization: Tokenization,
        limits: PassLimits,
        activations: Activations,
        counts: Counts,
    ) -> None:
        self._backend, self._limits = backend, limits
        self._least, self._pad_id = tokenization.min_tokens, tokenization.pad_id
        self._activations, self._counts = activations, counts
        self._threads: ThreadPoolExecutor | None = None

    def of(self, asks: Sequence[Ask], *, at_once: int | None = None) -> list[tuple[float, Theta]]:
        """For each device its loss and gradient (P,); a private one's with noise.

        at_once: passes that may run at a time; None for as many as the backend says.
        """
        at_once = at_once or self._backend.passes_at_once
        rows = _Rows(asks)
        losses = np.zeros(len(asks), np.float64)
        gradients = np.zeros((len(asks), len(asks[0].theta)), np.float32)
        hidden = self._hidden(rows, at_once) if self._backend.cut else None
        passes = plan_passes(rows.lengths, self._limits, least=self._least)

        def step(part: Pass) -> tuple[list[int], Losses, NDArray[np.float32]]:
            inputs = rows.inputs(part, self._pad_id)
            owners, inputs["device"] = np.unique(rows.owner[part.rows], return_inverse=True)
            devices = rows.device[owners].tolist()
            inputs["theta"] = np.stack([asks[device].theta for device in devices])
            if hidden is not None:
                inputs["hidden"] = _stacked([hidden[row] for row in part.rows], part.width)
            return devices, *self._backend.step(inputs)

        for part, (devices, loss, gradient) in zip(passes, self._beside(step, passes, at_once), strict=True):
            np.add.at(losses, rows.device[part.rows], loss)
            for device, own in zip(devices, gradient, strict=True):
                gradients[device] += asks[device].clipped(own)
        self._count(rows, passes, devices=len(asks))
        noisy = [ask.noisy(own) for ask, own in zip(asks, gradients, strict=True)]
        return list(zip(losses.tolist(), noisy, strict=True))

    def _hidden(self, rows: _Rows, at_once: int) -> list[Hidden]:
        """What enters the step of each row, (S, H), computed where it is not remembered."""
        found = [self._activations.get(ids) for ids in rows.ids]
        first = {rows.ids[n].tobytes(): n for n in reversed(range(len(found))) if found[n] is None}
        missing = np.array(sorted(first.values()), np.intp)
        computed: dict[bytes, Hidden] = {}
        passes = [
            Pass(missing[part.rows], part.width)
            for part in plan_passes(rows.lengths[missing], self._limits, least=self._least)
        ]

        def prefix(part: Pass) -> Hidden:
            inputs = rows.inputs(part, self._pad_id)
            return self._backend.hidden(inputs["ids"], inputs["mask"])

        for part, states in zip(passes, self._beside(prefix, passes, at_once), strict=True):
            for n, state in zip(part.rows, states, strict=True):
                ids = rows.ids[n]
                computed[ids.tobytes()] = self._activations.put(ids, state[: len(ids)])
        self._counts.activations_computed += len(missing)
        self._counts.activations_reused += len(found) - len(missing)
        return [computed[ids.tobytes()] if h is None else h for ids, h in zip(rows.ids, found, strict=True)]

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None

    def _beside(self, function: Callable[[Pass], T], passes: Sequence[Pass], at_once: int) -> Iterator[T]:
        """What it gives of each pass, in order: sums have the same bits however many run at a time.

        One pass more than may run waits, so that memory is bounded. Where one fails, all have ended before
        its error is raised.
        """
        if at_once == 1 or len(passes) == 1:
            yield from map(function, passes)
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._backend.passes_at_once, "fedtt-pass")
        running: deque[Future[T]] = deque()
        try:
            for part in passes:
                running.append(self._threads.submit(function, part))
                if len(running) > at_once:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
            wait(running)

    def _count(self, rows: _Rows, passes: list[Pass], *, devices: int) -> None:
        self._counts.device_steps += devices
        self._counts.passes += len(passes)
        self._counts.tokens += int(rows.lengths.sum())
        self._counts.padded_tokens += padded_tokens(passes)


class _Rows:
    """The rows of several devices' batches under one another, without their padding.

    Rows of one owner share a gradient: all of a device, or of a private training each by itself.
    """

    def __init__(self, asks: Sequence[Ask]) -> None:
        batches = [ask.batch for ask in asks]
        self.lengths = np.concatenate([batch.mask.sum(1) for batch in batches]).astype(np.intp)  #: (n,)
        self.device = np.repeat(np.arange(len(batches)), [len(batch.ids) for batch in batches])  #: (n,)
        alone = np.array([ask.mechanism is not None for ask in asks])[self.device]
        rows = np.arange(len(self.device))
        self.owner = np.where(alone, rows, np.searchsorted(self.device, self.device))  #: (n,): its first row
        every = [row for batch in batches for row in batch.ids]
        self.ids: list[Ids] = [row[:length] for row, length in zip(every, self.lengths, strict=True)]
        self._weight = np.concatenate([_weights(ask) for ask in asks])
        labels = [batch.labels for batch in batches if batch.labels is not None]
        self._labels = np.concatenate(labels) if labels else None

    def inputs(self, part: Pass, pad_id: int) -> dict[str, NDArray[Any]]:
        """What a backend needs of the rows of a pass beside their factors."""
        shape = (len(part.rows), part.width)
        mask = (np.arange(part.width) < self.lengths[part.rows, None]).astype(np.int64)
        ids = np.full(shape, pad_id, np.int64)
        for place, n in zip(ids, part.rows, strict=True):
            place[: len(self.ids[n])] = self.ids[n]
        inputs: dict[str, NDArray[Any]] = {"ids": ids, "mask": mask, "weight": self._weight[part.rows]}
        if self._labels is not None:
            inputs["labels"] = self._labels[part.rows]
        return inputs


def _weights(ask: Ask) -> NDArray[np.float32]:
    """What each row counts in its batch's mean, (B,): over rows, or over tokens that follow others.

    Of a private training every row counts alike, and its tokens in its own mean.
    """
    batch, rows = ask.batch, len(ask.batch.ids)
    if batch.labels is not None:
        return np.full(rows, 1 / rows, np.float32)
    follow = batch.mask[:, 1:].sum(1)
    if ask.mechanism is not None:
        return np.asarray(1 / (rows * np.maximum(1, follow)), np.float32)
    return np.full(rows, 1 / max(1, int(follow.sum())), np.float32)


def _stacked(rows: list[Hidden], width: int) -> Hidden:
    """Rows (S, H) of different lengths as (N, width, H), zero where they end."""
    stacked = np.zeros((len(rows), width, rows[0].shape[1]), np.float32)
    for place, row in zip(stacked, rows, strict=True):
        place[: len(row)] = row
    return stacked
