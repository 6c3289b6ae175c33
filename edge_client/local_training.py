"""The work of one lease: download what its plan names, and have it trained."""

from __future__ import annotations

from contextlib import AbstractContextManager

from edge_client.activations import Activations
from edge_client.aside import Aside, beside
from edge_client.bundle import Bundle
from edge_client.bundle_cache import Bundles
from edge_client.examples import Examples
from edge_client.journal import residual_key
from edge_client.judging import JudgingRequest
from edge_client.trainer import LocalUpdate, Trainer, TrainingRequest, trained_adapter
from edge_client.version_cache import Held, VersionCache, zeros
from fedtt.errors import BundleError, Declined, FedttError, Refused, Unreachable, WireError
from fedtt.layout import FactorLayout
from fedtt.messages import Code, Judge, Plan, Verdict
from fedtt.seams import Transport, VersionBody

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
        activations: Activations | None = None,
        aside: Aside = beside,
    ) -> None:
        self._device, self._transport, self._examples = device, transport, examples
        self._bundles, self._versions, self._trainer = bundles, versions, trainer
        self._activations, self._aside = activations, aside

    def using(self, work: Plan | Judge) -> AbstractContextManager[None]:
        """For as long as what is fetched of it is worked with: the bundle stays."""
        return self._bundles.using(work.bundle)

    async def fetch(
        self, plan: Plan, release_key: bytes | None = None, limit_bytes: int | None = None
    ) -> tuple[Bundle, bytes]:
        """The plan's bundle and the bytes of its version, both checked.

        release_key: that must have signed the bundle; None asks for no signature.
        limit_bytes: of both, as far as they are not here; None for any number.
        Raises Declined beyond the limit, Unreachable where another attempt may help, BundleError where not,
        Refused for the rest.
        """
        try:
            bundle = await self._bundles.ensure(self._transport, plan.bundle, release_key, limit_bytes)
            layout = trained_adapter(plan, bundle.manifest).layout
            return bundle, await self._version(plan.task, plan.version, layout, limit_bytes)
        except (Refused, WireError) as error:
            raise _of_download(error) from None

    async def fetch_question(
        self, question: Judge, release_key: bytes | None = None, limit_bytes: int | None = None
    ) -> JudgingRequest:
        """All that a verdict is made from, checked; raises what `fetch` does."""
        try:
            bundle = await self._bundles.ensure(self._transport, question.bundle, release_key, limit_bytes)
            layout = bundle.manifest.adapter.layout
            before, after = [
                await self._version(question.task, sha256, layout, limit_bytes)
                for sha256 in (question.before, question.version)
            ]
        except (Refused, WireError) as error:
            raise _of_download(error) from None
        return JudgingRequest(
            question=question,
            device=self._device,
            bundle=bundle,
            before=before,
            after=after,
            examples=self._examples,
        )

    async def judge(self, request: JudgingRequest) -> Verdict:
        """Answer a question; raises what `Trainer.judge` does."""
        return await self._trainer.judge(request)

    async def _version(self, task: str, sha256: str, layout: FactorLayout, limit_bytes: int | None) -> bytes:
        """The version held if it is the wanted one, else what comes, from a difference where that serves."""
        key, size_bytes = residual_key(task, layout.digest), 4 * layout.size
        held = await self._aside(self._versions.get, key, size_bytes)
        if held is not None and held.sha256 == sha256:
            return held.data
        if limit_bytes is not None and size_bytes > limit_bytes:
            raise Declined(f"a version has {size_bytes} bytes, {limit_bytes} may be downloaded", "traffic")
        if held is None:
            held = await self._aside(zeros, size_bytes)
        body = await self._transport.version(sha256, size_bytes, held.sha256)
        version = await self._aside(self._keep, key, body, held, sha256)
        if version is None and body.difference:
            body = await self._transport.version(sha256, size_bytes)
            version = await self._aside(self._keep, key, body, None, sha256)
        if version is None:
            raise BundleError(f"version {sha256[:12]}… does not match its sha256")
        return version

    def _keep(self, key: str, body: VersionBody, held: Held | None, sha256: str) -> bytes | None:
        """Unpack a version and keep it; None where the bytes are another's."""
        version = self._versions.unpack(body, held, sha256)
        if version is not None:
            self._versions.put(key, Held(sha256, version))
        return version

    async def run(
        self,
        plan: Plan,
        bundle: Bundle,
        version: bytes,
        residual: bytes,
        *,
        noise_key: bytes = b"",
        time_limit_s: float | None = None,
    ) -> LocalUpdate:
        """Train by a plan; raises what `Trainer.train` does."""
        return await self._trainer.train(
            TrainingRequest(
                plan=plan,
                device=self._device,
                bundle=bundle,
                version=version,
                examples=self._examples,
                residual=residual,
                activations=self._activations,
                noise_key=noise_key,
                time_limit_s=time_limit_s,
            )
        )


def _of_download(error: Refused | WireError) -> FedttError:
    """What went wrong with a download, as what a device can do about it."""
    if isinstance(error, WireError):
        return Unreachable(f"the download broke off: {error}")
    if error.problem.code is Code.NOT_FOUND:
        return BundleError(f"the server has lost what its plan names: {error}")
    return error
