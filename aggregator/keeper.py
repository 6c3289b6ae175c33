"""Rounds go on by themselves: leases expire, rounds close, sums are made and published, payloads wiped."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from aggregator.claims import Claims
from aggregator.folding import sum_round
from aggregator.inline import Aside, InlineWriter
from aggregator.metrics import Metrics
from aggregator.releases import Releases
from aggregator.tracing import Tracer
from aggregator.writer import Writer
from fedtt.errors import StorageError, WireError
from fedtt.seams import Clock
from storage.blobs import BlobStore
from storage.records import MAIN, Round, Version, VersionState
from storage.store import Store, Transaction

__all__ = ["Keeper"]

T = TypeVar("T")
_log = logging.getLogger("fedtt.aggregator")
_TICKS_APART_S = 0.02  #: however fast updates arrive


class Keeper:
    """What a server does that nobody asks it for.

    aside: runs what takes long, off the caller's thread where that is not to wait.
    """

    def __init__(
        self,
        store: Store,
        blobs: BlobStore,
        clock: Clock,
        lifecycle: Releases,
        writer: Writer | InlineWriter,
        *,
        aside: Aside,
        tracer: Tracer,
        metrics: Metrics,
    ) -> None:
        self._store, self._blobs, self._clock, self._lifecycle = store, blobs, clock, lifecycle
        self._writer, self._aside, self._tracer, self._metrics = writer, aside, tracer, metrics
        self._claims = Claims(store, lifecycle, clock)
        self._news = asyncio.Event()

    def wake(self) -> None:
        """Something has come that a round may have waited for."""
        self._news.set()

    async def tick(self) -> None:
        """Expire leases, close rounds that are due, sum and publish what waits, wipe what is settled.

        Raises the first mistake of ours that a sum met, once all else is done.
        """
        for mistake in await self._tick():
            raise mistake

    async def _tick(self) -> list[Exception]:
        """Returns the mistakes that sums met; each was said where it happened, and its round pauses."""
        mistakes: list[Exception] = []
        if any(round_.branch != MAIN for round_ in await self._advance(mistakes)):
            await self._advance(mistakes)  # the last group's fold may be what the sum of all groups waits for
        await self._writer.maintain()  # where a reader is in the way the next tick tries again
        return mistakes

    async def _advance(self, mistakes: list[Exception]) -> list[Round]:
        """Returns the rounds that waited for their sums; one that cannot be made keeps no other waiting."""

        def change(tx: Transaction) -> tuple[list[Round], list[Version]]:
            decided: list[Version] = []
            return self._lifecycle.advance(tx, self._clock.now(), decided.append), decided

        waiting, decided = await self._move_on(change)
        for version in decided:
            self._metrics.versions_decided.labels(version.state.value).inc()
            with self._tracer.span("release" if version.state is VersionState.RELEASED else "hold") as span:
                span.set({"fedtt.version": version.number, "fedtt.state": version.state.value})
        folding = self._claims.due(waiting)
        for round_ in folding:
            try:
                with self._tracer.span("fold") as span:
                    span.set({"fedtt.branch": round_.branch, "fedtt.round": round_.number})
                    await self._fold(round_)
            except Exception as error:
                self._metrics.fold_failures.inc()
                if not (known := isinstance(error, StorageError)):
                    self._claims.failed(round_)
                    mistakes.append(error)
                _log.error("round %d waits for its sum: %s", round_.number, error, exc_info=not known)
        return folding

    async def _move_on(self, change: Callable[[Transaction], T]) -> T:
        """Run a change that may claim rounds: their sums are this server's to make."""
        answer, claimed = await self._writer.run(self._claims.noting(change))
        self._claims.noted(claimed)
        return answer

    async def _fold(self, round_: Round) -> None:
        started = time.perf_counter()
        try:
            fold = await self._aside(sum_round, self._store, self._blobs, self._lifecycle, round_)
        except WireError as error:  # the same updates would fail in the same way for ever
            why = str(error)
            await self._move_on(lambda tx: self._lifecycle.give_up_fold(tx, self._clock.now(), round_, why))
            return
        with self._tracer.span("release") as span:
            version = await self._move_on(lambda tx: self._lifecycle.publish(tx, self._clock.now(), fold))
            if version is not None:
                span.set({"fedtt.version": version.number, "fedtt.state": version.state.value})
        if version is not None:
            self._metrics.folded(version.updates, time.perf_counter() - started)
            _log.info(
                "round %d folded %d updates into version %d", round_.number, version.updates, version.number
            )

    async def run(self, interval_s: float = 0.5) -> None:
        """Tick for ever: whenever an update arrives, and every `interval_s` for deadlines."""
        while True:
            try:
                await self._tick()
            except StorageError as error:
                _log.error("rounds wait: %s", error)
                await self._clock.sleep(interval_s)
            except Exception:
                _log.exception("a tick failed; the ledger is as before and the next tick tries again")
                await self._clock.sleep(interval_s)
            await self._clock.sleep(_TICKS_APART_S)
            try:
                async with asyncio.timeout(interval_s):
                    await self._news.wait()
                self._news.clear()
            except TimeoutError:
                pass
