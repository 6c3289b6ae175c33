"""From a plan and the device's examples to the frame it sends: repeatable to the bit, no network, no files.

Batches and rounding are addressed by (task seed, round, device), so a training that a crash cut short
gives the same frame when it is done again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from edge_client.activations import Activations
from edge_client.batches import Batches, address
from edge_client.bundle import Bundle, RuntimeName
from edge_client.examples import Examples
from edge_client.frozen_prefix import FrozenPrefix, least_depth
from edge_client.passes import PASSES, PassLimits, in_passes
from edge_client.private_steps import GaussianMechanism, Noise, PrivateGradient
from edge_client.runtime import Runtime
from edge_client.tokens import Batch, Tokens
from fedtt.adapter import AdapterSpec
from fedtt.algorithms import Gradient, LocalResult, Steps, drive
from fedtt.codec import compensate, encode_delta
from fedtt.errors import BundleError, ConfigError, DataError, WireError
from fedtt.layout import FactorLayout, LiveSet, Theta
from fedtt.manifest import Manifest
from fedtt.messages import Plan, Verdict
from fedtt.ranks import embedding
from fedtt.rng import Purpose, rng_for
from fedtt.wire import UpdateHeader, decode_theta, encode_theta, encode_update, layout_tag

if TYPE_CHECKING:
    from edge_client.judging import JudgingRequest

__all__ = [
    "LocalUpdate",
    "Trainer",
    "Training",
    "TrainingRequest",
    "train",
    "trained_adapter",
]


class LocalUpdate(Struct, frozen=True, kw_only=True):
    """What one local training gives."""

    frame: bytes
    residual: bytes  #: the next one, (P,) float32 little-endian; b"" without error feedback
    header: UpdateHeader
    cut_texts: int  #: texts longer than the graph allows, trained on their beginning
    depth: int | None = None  #: blocks that the step ran over a kept prefix; None for the whole step
    prefixes_computed: int = 0  #: rows whose prefix was computed
    prefixes_reused: int = 0  #: rows whose prefix was read from what was kept
    training_s: float = 0.0  #: it took, loading the graphs with it


def trained_adapter(plan: Plan, manifest: Manifest) -> AdapterSpec:
    """What a plan trains of a bundle's adapter: all of it, or its variant at a smaller rank.

    Raises BundleError for a rank the bundle does not have.
    """
    if plan.rank is None:
        return manifest.adapter
    try:
        return manifest.adapter.at_rank(plan.rank)
    except ConfigError as error:
        raise BundleError(f"the plan does not fit its bundle: {error}") from None


class TrainingRequest(Struct, frozen=True, eq=False, kw_only=True):
    """Everything a local training is made from."""

    plan: Plan
    device: str
    bundle: Bundle
    version: bytes  #: of the factors to start from, as the plan names them
    examples: Examples  #: read when training begins
    residual: bytes = b""  #: of error feedback
    activations: Activations | None = None  #: where what is frozen is kept between steps and rounds
    noise_key: bytes = b""  #: 32 bytes of a private training's noise
    time_limit_s: float | None = None  #: after which it ends without a result; None for as long as it takes


class Trainer(Protocol):
    """What trains for a device: on its own processor, or many devices at once in an emulator."""

    @property
    def runtime(self) -> RuntimeName:
        """Whose graphs it runs, as the device tells its server."""
        ...

    async def train(self, request: TrainingRequest) -> LocalUpdate:
        """Raises BundleError, DataError, LayoutError, RuntimeFailure, WireError, and Declined at the limit of
        time; cancelling keeps nothing.
        """
        ...

    async def judge(self, request: JudgingRequest) -> Verdict:
        """The same, without training; its request has a limit of its own."""
        ...


class Training:
    """One local training: its steps, and the frame made of what they yield.

    Raises DataError (too few or unusable examples), BundleError (rank) or LayoutError (live set) when it is
    made, WireError (the numbers are not finite) when it is packed.
    """

    def __init__(self, request: TrainingRequest, tokens: Tokens) -> None:
        self._request, plan = request, request.plan
        full = request.bundle.manifest.adapter
        self._adapter = trained_adapter(plan, request.bundle.manifest)
        self._layout, self._size = self._adapter.layout, full.layout.size
        self._places = None if plan.rank is None else embedding(self._adapter, full)
        self._live = LiveSet(self._layout, plan.live)
        examples = request.examples.read()
        if len(examples) < max(1, plan.min_examples):
            raise DataError(f"the task needs {plan.min_examples} examples, this device has {len(examples)}")
        self._examples = len(examples)
        self.batches = Batches(plan, request.device, request.bundle.manifest, tokens, examples)
        self.mechanism = self._mechanism()  #: of a private training; None where it is none

    def depth(self, depths: Sequence[int]) -> int | None:
        """The least of a runtime's depths that trains all that is live; None where the whole step must."""
        return least_depth(self._adapter, self._live, depths)

    def _mechanism(self) -> GaussianMechanism | None:
        privacy, live = self._request.plan.privacy, self._live.positions
        if privacy is None:
            return None
        positions = live if self._places is None else self._places[live]
        return GaussianMechanism(privacy, positions, self._size, Noise(self._request.noise_key))

    def steps(self) -> Steps[Batch]:
        plan = self._request.plan
        theta = decode_theta(self._request.version, self._layout, plan.version)
        steps = plan.method.client_step(self._adapter, theta, self._live, self.batches, plan.training)
        return steps if self._places is None else self._embedded(steps, self._places)

    def _embedded(self, steps: Steps[Batch], places: NDArray[np.intp]) -> Steps[Batch]:
        """The same training on the bundle's graph, of which a smaller rank is a corner; the rest is zero."""
        full = np.zeros(self._size, np.float32)
        try:
            theta, batch = next(steps)
            while True:
                full[places] = theta
                loss, gradient = yield full, batch
                theta, batch = steps.send((loss, gradient[places]))
        except StopIteration as end:
            result: LocalResult = end.value
            return result

    def pack(self, result: LocalResult) -> LocalUpdate:
        """What is sent of a result, and what is kept of it."""
        if not np.isfinite([result.loss_first, result.loss_last]).all():
            raise WireError("the training loss is not finite: lower the learning rate")
        payload, next_residual = self._encode(result.delta)
        private = self._request.plan.privacy is not None  # losses are not noisy, so they stay here
        header = UpdateHeader(
            layout=layout_tag(self._layout),
            examples=self._examples,
            steps=result.steps,
            loss_first=0.0 if private else result.loss_first,
            loss_last=0.0 if private else result.loss_last,
        )
        return LocalUpdate(
            frame=encode_update(header, payload),
            residual=next_residual,
            header=header,
            cut_texts=self.batches.cut_texts,
        )

    def _encode(self, delta: NDArray[np.float32]) -> tuple[bytes, bytes]:
        """Payload and next residual; the residual of factors that are not live stays as it is."""
        plan, live = self._request.plan, self._live
        if not plan.codec.error_feedback:
            rng = rng_for(plan.seed, Purpose.ROUNDING, plan.round, address(self._request.device))
            return encode_delta(plan.codec, live, delta, rng), b""
        carried = _residual(live.layout, self._request.residual)
        payload, rest = compensate(plan.codec, live, delta, carried[live.positions])
        carried[live.positions] = rest
        return payload, encode_theta(carried)


def train(
    request: TrainingRequest,
    tokens: Tokens,
    runtime: Runtime,
    go_on: Callable[[], None] = lambda: None,
) -> LocalUpdate:
    """Train here and now; raises what `Training` does, RuntimeFailure (graph) and what `go_on` does, which
    is called before each text that is read, each batch ahead and each pass.
    """
    training = Training(request, tokens)
    if not training.batches.are_known:
        runtime.release()  # a tokenizer comes, and does not lie in memory beside a graph
    training.batches.read(go_on)
    mechanism, manifest = training.mechanism, request.bundle.manifest
    depth, prefix = None if mechanism else training.depth(runtime.depths), None
    if depth is not None:
        ahead = _checked(training.batches.ahead(), go_on)
        prefix = FrozenPrefix(runtime, request.bundle, depth, request.activations, ahead)
    limits = dataclasses.replace(PASSES, rows=runtime.rows)
    gradient = _short(prefix or runtime, manifest, limits, go_on)
    if mechanism is not None:
        gradient = PrivateGradient(runtime, mechanism, manifest.tokenization.min_tokens, go_on).gradient
    with np.errstate(over="ignore", invalid="ignore"):  # what diverges is refused when it is packed
        result = drive(training.steps(), gradient)
    update = training.pack(result)
    if prefix is None:
        return update
    return replace(update, depth=depth, prefixes_computed=prefix.computed, prefixes_reused=prefix.reused)


def _checked(batches: Iterable[Batch], go_on: Callable[[], None]) -> Iterator[Batch]:
    for batch in batches:
        go_on()
        yield batch


def _short(
    step: FrozenPrefix | Runtime, manifest: Manifest, limits: PassLimits, go_on: Callable[[], None]
) -> Gradient[Batch]:
    """The gradients of a step, with hardly any padding computed."""
    least, by_tokens = manifest.tokenization.min_tokens, not manifest.labels

    def gradient(theta: Theta, batch: Batch) -> tuple[float, Theta]:
        def one(part: Batch) -> tuple[float, Theta]:
            go_on()
            return step.gradient(theta, part)

        return in_passes(batch, limits, one, least=least, by_tokens=by_tokens)

    return gradient


def _residual(layout: FactorLayout, data: bytes) -> Theta:
    """A stored residual as a vector of its own, (P,); zero where there is none yet."""
    return np.frombuffer(data, "<f4").astype(np.float32) if data else np.zeros(layout.size, np.float32)
