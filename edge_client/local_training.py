"""The work of one lease: download what its plan names, and have it trained."""

from __future__ import annotations

from edge_client.bundle import Bundle
from edge_client.bundle_cache import Bundles
from edge_client.examples import Examples
from edge_client.journal import residual_key
from edge_client.trainer import LocalUpdate, Trainer, TrainingRequest, trained_adapter
from edge_client.version_cache import Held, VersionCache
from fedtt.errors import BundleError, Refused, Unreachable, WireError
from fedtt.messages import Code, Plan
from fedtt.seams import Transport

__all__ = ["LocalTraining"]


class LocalTraining:
    """Fulfils plans for one device; keeps nothing between them but what its caches do."""

    def __init__(
        self,
        device: str,
        transport: Transport,
        examples: Examples,
        bundles: Bundles,
        versions: VersionCache,
        trainer: Trainer,
    ) -> None:
        self._device, self._transport, self._examples = device, transport, examples
        self._bundles, self._versions, self._trainer = bundles, versions, trainer

    async def fetch(self, plan: Plan, release_key: bytes | None = None) -> tuple[Bundle, bytes]:
        """The plan's bundle and the bytes of its version, both checked.

        release_key: that must have signed the bundle; None asks for no signature.
        Raises Unreachable where another attempt may help, BundleError where not, Refused for the rest.
        """
        try:
            bundle = await self._bundles.ensure(self._transport, plan.bundle, release_key)
            version = await self._version(plan, bundle)
        except WireError as error:
            raise Unreachable(f"the download broke off: {error}") from None
        except Refused as error:
            if error.problem.code is Code.NOT_FOUND:
                raise BundleError(f"the server has lost what its plan names: {error}") from None
            raise
        return bundle, version

    async def _version(self, plan: Plan, bundle: Bundle) -> bytes:
        """The version held if it is the plan's, else what comes, from a difference where that serves."""
        layout = trained_adapter(plan, bundle.manifest).layout
        key, size_bytes = residual_key(plan.task, layout.digest), 4 * layout.size
        held = self._versions.get(key, size_bytes)
        if held is not None and held.sha256 == plan.version:
            return held.data
        body = await self._transport.version(plan.version, size_bytes, held.sha256 if held else None)
        version = self._versions.unpack(body, held, plan.version)
        if version is None and body.difference:
            body = await self._transport.version(plan.version, size_bytes)
            version = self._versions.unpack(body, None, plan.version)
        if version is None:
            raise BundleError(f"version {plan.version[:12]}… does not match its sha256")
        self._versions.put(key, Held(plan.version, version))
        return version

    async def run(self, plan: Plan, bundle: Bundle, version: bytes, residual: bytes) -> LocalUpdate:
        """Train by a plan; raises what `Trainer.train` does."""
        return await self._trainer.train(
            TrainingRequest(
                plan=plan,
                device=self._device,
                bundle=bundle,
                version=version,
                examples=self._examples,
                residual=residual,
            )
        )
