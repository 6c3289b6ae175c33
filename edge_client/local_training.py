"""The work of one lease: download what its plan names, and train beside the event loop."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Executor

from edge_client.bundle import Bundle
from edge_client.bundle_cache import BundleCache
from edge_client.examples import Examples
from edge_client.runtime import Runtimes
from edge_client.tokens import Tokens
from edge_client.trainer import LocalUpdate, train
from fedtt.errors import BundleError, Refused, Unreachable, WireError
from fedtt.messages import Code, Plan
from fedtt.seams import Transport

__all__ = ["LocalTraining"]


class LocalTraining:
    """Fulfils plans for one device; keeps nothing between them but what bundles and runtimes cache."""

    def __init__(
        self,
        device: str,
        transport: Transport,
        examples: Examples,
        bundles: BundleCache,
        runtimes: Runtimes,
        executor: Executor | None,
    ) -> None:
        self._device, self._transport, self._examples = device, transport, examples
        self._bundles, self._runtimes, self._executor = bundles, runtimes, executor

    async def fetch(self, plan: Plan) -> tuple[Bundle, bytes]:
        """The plan's bundle and the bytes of its version, both checked.

        Raises Unreachable where another attempt may help, BundleError where not, Refused for the rest.
        """
        try:
            bundle = await self._bundles.ensure(self._transport, plan.bundle)
            version = await self._transport.version(plan.version, 4 * bundle.manifest.adapter.layout.size)
        except WireError as error:
            raise Unreachable(f"the download broke off: {error}") from None
        except Refused as error:
            if error.problem.code is Code.NOT_FOUND:
                raise BundleError(f"the server has lost what its plan names: {error}") from None
            raise
        if hashlib.sha256(version).hexdigest() != plan.version:
            raise BundleError(f"version {plan.version[:12]}… does not match its sha256")
        return bundle, version

    async def run(self, plan: Plan, bundle: Bundle, version: bytes, residual: bytes) -> LocalUpdate:
        """Train on the executor; raises what `train` does. Cancelling waits for the batch in progress."""

        def work(stop: threading.Event) -> LocalUpdate:
            return train(
                plan=plan,
                device=self._device,
                manifest=bundle.manifest,
                tokens=Tokens(bundle, plan.training.max_tokens),
                runtime=self._runtimes.open(bundle),
                version=version,
                examples=self._examples.read(),
                residual=residual,
                stop=stop,
            )

        return await self._in_thread(work)

    async def _in_thread(self, work: Callable[[threading.Event], LocalUpdate]) -> LocalUpdate:
        stop = threading.Event()
        future = asyncio.get_running_loop().run_in_executor(self._executor, work, stop)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            stop.set()
            await asyncio.wait([future])
            future.exception()  # seen: it is Interrupted, or came too late to matter
            raise
