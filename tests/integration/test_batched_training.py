"""Batched pools against the device's own trainer, on real graphs."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from edge_client.bundle import Bundle, open_bundle
from edge_client.examples import Example, Shard
from edge_client.onnx_runtime import onnx_runtimes
from edge_client.passes import PassLimits
from edge_client.runtime import Runtimes
from edge_client.trainer import LocalUpdate, TrainingRequest
from export import ExportRequest, export_bundle
from fedtt.adapter import initial_theta
from fedtt.codec import CodecSpec
from fedtt.errors import BundleError, ConfigError, DataError, RuntimeFailure, WireError
from fedtt.layout import Theta
from fedtt.optimiser import TrainingSpec
from fedtt.privacy import PrivacySpec
from fedtt.wire import encode_theta, version_digest
from fleet.activations import Activations
from fleet.backends import Inputs, Losses, OnnxBackend, TorchBackend
from fleet.batched import BatchedPool, onnx_pool, torch_pool
from fleet.fastest import fastest_pool
from fleet.pool import OneByOnePool, Pool
from tests.support.models import WORDS, save_tiny_model
from tests.support.requests import SGD, delta_of, requests_of
from tests.support.torch_runtime import TorchRuntime, adapted_model

pytestmark = pytest.mark.slow

COUNTS = (3, 9, 1, 5, 14, 2)  #: examples of each device; batches of 4, so most end with a short one
TOLERANCE = 1e-5
ADAMW = TrainingSpec(local_steps=3, batch_size=4)


@pytest.fixture(scope="module")
def tiny(tiny_bundle: Path, tiny_emulation: Path, tiny_model: Path) -> tuple[Bundle, str]:
    return open_bundle(tiny_bundle), str(tiny_model)


@pytest.fixture(scope="module", params=["classifier", "upper-half", "decoder"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, str]:
    """A bundle and its model: BERT at full depth, BERT with its lower block cached, Llama likewise."""
    if request.param == "classifier":
        tiny: tuple[Bundle, str] = request.getfixturevalue("tiny")
        return tiny
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "decoder":
        model = save_tiny_model(directory / "model", "llama")
        wanted = ExportRequest(
            model=str(model), task="causal-lm", bottleneck=8, rank=2, depth=1, depths=(), max_tokens=32
        )
    else:
        model = save_tiny_model(directory / "model")
        wanted = ExportRequest(
            model=str(model),
            labels=("a", "b", "c"),
            bottleneck=8,
            rank=2,
            depth=1,
            depths=(),
            max_tokens=32,
        )
    export_bundle(wanted, directory / "bundle", verify=False)
    return open_bundle(directory / "bundle"), str(model)


def _updates(pool: Pool, requests: list[TrainingRequest]) -> list[LocalUpdate]:
    handles = [pool.submit(request) for request in requests]
    updates = [handle.result() for handle in handles]
    pool.close()
    return updates


def _difference(
    requests: list[TrainingRequest], found: list[LocalUpdate], wanted: list[LocalUpdate]
) -> float:
    """The largest relative one of any device's delta or loss."""
    worst = 0.0
    for request, ours, theirs in zip(requests, found, wanted, strict=True):
        a, b = delta_of(request, ours), delta_of(request, theirs)
        losses = [abs(ours.header.loss_last / theirs.header.loss_last - 1)]
        worst = max(worst, float(np.linalg.norm(a - b) / np.linalg.norm(b)), *losses)
        assert ours.header.examples == theirs.header.examples
        assert ours.header.steps == theirs.header.steps == request.plan.training.local_steps
        assert ours.cut_texts == theirs.cut_texts
    return worst


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Where torch computes; what needs a GPU says so where there is none."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("THIS MACHINE HAS NO GPU: batched training on CUDA is NOT tested by this run")
    return str(request.param)


def test_torch_gives_each_device_its_own_update_on_cpu_and_gpu(case: tuple[Bundle, str], device: str) -> None:
    """On a GPU products are summed in another order: norm-relative to 1e-4."""
    bundle, model = case
    requests = requests_of(bundle, WORDS, COUNTS)
    alone = _updates(OneByOnePool(onnx_runtimes()), requests)
    backend = TorchBackend(bundle, model=model, device=device)
    assert backend.device.type == device
    together = _updates(BatchedPool(bundle, backend), requests)
    assert _difference(requests, together, alone) < (1e-4 if device == "cuda" else TOLERANCE)


def test_torch_takes_a_gpu_where_there_is_one(tiny: tuple[Bundle, str]) -> None:
    import torch

    bundle, model = tiny
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert TorchBackend(bundle, model=model).device.type == expected


@pytest.mark.parametrize("training", [SGD, ADAMW], ids=lambda training: training.optimiser)
def test_every_device_sends_what_it_would_have_sent_alone(
    case: tuple[Bundle, str], training: TrainingSpec
) -> None:
    bundle, model = case
    requests = requests_of(bundle, WORDS, COUNTS, training=training)
    alone = _updates(OneByOnePool(onnx_runtimes()), requests)
    pools: list[Callable[[], Pool]] = [
        lambda: onnx_pool(bundle, model=model),
        lambda: torch_pool(bundle, model=model),
        lambda: BatchedPool(bundle, OnnxBackend(bundle, model=model), limits=PassLimits(tokens=40)),
        lambda: BatchedPool(bundle, OnnxBackend(bundle, model=model), devices=2),
        lambda: BatchedPool(
            bundle, TorchBackend(bundle, model=model), activations=Activations(limit_bytes=0)
        ),
    ]
    for open_pool in pools:
        assert _difference(requests, _updates(open_pool(), requests), alone) < TOLERANCE


def test_adamw_differs_where_a_gradient_is_rounding_alone_and_nowhere_else(tiny: tuple[Bundle, str]) -> None:
    """It divides a gradient by its size: what cancels, as of one row of each label at the start, moves by η
    this way or that. The gradients themselves agree, as SGD shows."""
    bundle, model = tiny
    theta = encode_theta(initial_theta(bundle.manifest.adapter, 0))

    def deltas(pool: Pool, training: TrainingSpec) -> Theta:
        """(D, P), after one step from the first version."""
        asked = requests_of(bundle, WORDS, COUNTS, training=replace(training, local_steps=1))
        asked = [
            replace(each, version=theta, plan=replace(each.plan, version=version_digest(theta)))
            for each in asked
        ]
        return np.stack([delta_of(r, u) for r, u in zip(asked, _updates(pool, asked), strict=True)])

    def alone() -> Pool:
        return OneByOnePool(onnx_runtimes())

    gradient = deltas(alone(), SGD) / -SGD.learning_rate
    clear = np.abs(gradient) > 1e-5  # a thousand times AdamW's ε
    assert 0.1 < clear.mean() < 1
    of_adamw = deltas(alone(), ADAMW)
    for open_pool in (onnx_pool, torch_pool):
        of_sgd = deltas(open_pool(bundle, model=model), SGD) / -SGD.learning_rate
        np.testing.assert_allclose(of_sgd, gradient, atol=TOLERANCE * float(np.linalg.norm(gradient)))
        apart = np.abs(deltas(open_pool(bundle, model=model), ADAMW) - of_adamw) / ADAMW.learning_rate
        assert apart[clear].max() < 1e-4
        assert apart.max() <= 2


def test_private_trainings_clip_each_example_and_add_the_noise_of_their_device(
    case: tuple[Bundle, str],
) -> None:
    bundle, model = case
    private = requests_of(bundle, WORDS, COUNTS, privacy=PrivacySpec(clip=0.5, noise_multiplier=0.05))
    plain = requests_of(bundle, WORDS, COUNTS)
    mixed = [*private[:3], *plain[3:]]  # those of another task share passes with them
    step = TorchRuntime(adapted_model(bundle, Path(model)))  # the one that `--dp` compiles
    alone = _updates(OneByOnePool(Runtimes(lambda bundle: step)), mixed)
    for pool in (onnx_pool(bundle, model=model), torch_pool(bundle, model=model)):
        for request, ours, theirs in zip(mixed, _updates(pool, mixed), alone, strict=True):
            a, b = delta_of(request, ours), delta_of(request, theirs)
            assert float(np.linalg.norm(a - b) / np.linalg.norm(b)) < TOLERANCE


def _before_and_after(
    open_pool: Callable[[], BatchedPool], requests: list[TrainingRequest]
) -> tuple[list[LocalUpdate], list[LocalUpdate]]:
    """Of a new pool; and of one that has trained each alone, so that its frozen blocks computed every row
    in a pass of other rows and another width."""
    pool = open_pool()
    for request in reversed(requests):
        pool.submit(request).result()
    return _updates(open_pool(), requests), _updates(pool, requests)


def test_the_same_requests_give_the_same_bits_whatever_the_pool_did_before(case: tuple[Bundle, str]) -> None:
    """ONNX Runtime sums what it gives of a row in one order, whatever lies beside it."""
    bundle, model = case
    requests = requests_of(bundle, WORDS, COUNTS)
    first, again = _before_and_after(lambda: onnx_pool(bundle, model=model), requests)
    assert [update.frame for update in first] == [update.frame for update in again]


def test_torch_gives_them_to_rounding_whatever_its_frozen_blocks_computed_before(
    case: tuple[Bundle, str],
) -> None:
    """It chooses among its products by the rows and the width of a pass."""
    bundle, model = case
    requests = requests_of(bundle, WORDS, COUNTS)
    first, again = _before_and_after(lambda: torch_pool(bundle, model=model), requests)
    assert _difference(requests, again, first) < TOLERANCE


def test_passes_beside_one_another_give_the_bits_of_one_after_another(case: tuple[Bundle, str]) -> None:
    bundle, model = case
    private = requests_of(bundle, WORDS, COUNTS, privacy=PrivacySpec(clip=0.5, noise_multiplier=0.05))
    mixed = [*private[:3], *requests_of(bundle, WORDS, COUNTS)[3:]]
    found = []
    for threads in (1, 4):
        backend = OnnxBackend(bundle, model=model, threads=threads)
        updates = _updates(BatchedPool(bundle, backend, limits=PassLimits(tokens=40)), mixed)
        found.append([update.frame for update in updates])
    assert found[0] == found[1]


def test_what_lies_below_the_adapters_is_computed_once_an_example(case: tuple[Bundle, str]) -> None:
    bundle, model = case
    training = replace(SGD, local_steps=12)
    requests = requests_of(bundle, WORDS, COUNTS, training=training)
    pool = onnx_pool(bundle, model=model)
    _updates(pool, requests)
    counts = pool.counts
    assert counts.device_steps == 12 * len(COUNTS)
    assert counts.padding_share < 0.25
    if bundle.manifest.adapter.depth == 2:
        assert (counts.activations_computed, counts.activations_reused) == (0, 0)
    else:
        texts = {e.text for request in requests for e in request.examples.read()}
        assert counts.activations_computed == len(texts)
        assert counts.activations_reused > 3 * len(texts)


def test_error_feedback_and_coarse_codes_are_those_of_the_device(tiny: tuple[Bundle, str]) -> None:
    bundle, model = tiny
    requests = requests_of(bundle, WORDS, COUNTS, codec=CodecSpec(quantise="int4", error_feedback=True))
    updates = _updates(onnx_pool(bundle, model=model), requests)
    alone = _updates(OneByOnePool(onnx_runtimes()), requests)
    for ours, theirs in zip(updates, alone, strict=True):
        assert len(ours.frame) == len(theirs.frame)
        assert len(ours.residual) == 4 * bundle.manifest.adapter.layout.size


def test_a_device_that_cannot_train_harms_no_other(tiny: tuple[Bundle, str]) -> None:
    bundle, model = tiny
    requests = requests_of(bundle, WORDS, COUNTS)
    wanted = _updates(onnx_pool(bundle, model=model), requests[:2])
    foreign = replace(requests[2], examples=Shard([Example("lights on", "no such label")]))
    empty = replace(requests[3], examples=Shard([]))
    hot = replace(requests[4].plan, training=replace(SGD, learning_rate=10, momentum=0.99, local_steps=60))
    diverging = replace(requests[4], plan=hot)
    pool = onnx_pool(bundle, model=model)
    good = [pool.submit(requests[0])]
    bad = [pool.submit(request) for request in (foreign, empty, diverging)]
    good.append(pool.submit(requests[1]))
    for handle, error in zip(bad, (DataError, DataError, WireError), strict=True):
        with pytest.raises(error):
            handle.result()
    for request, handle, expected in zip(requests, good, wanted, strict=False):
        found = delta_of(request, handle.result())
        np.testing.assert_allclose(found, delta_of(request, expected), rtol=1e-3, atol=1e-6)


def test_a_cancelled_training_is_not_computed(tiny: tuple[Bundle, str]) -> None:
    bundle, model = tiny
    pool = onnx_pool(bundle, model=model)
    first, second = (pool.submit(request) for request in requests_of(bundle, WORDS, (4, 4)))
    first.cancel()
    first.cancel()
    second.result()
    second.cancel()
    assert pool.counts.device_steps == SGD.local_steps
    with pytest.raises(RuntimeError):
        first.result()


def test_only_what_is_outstanding_together_is_computed_together(tiny: tuple[Bundle, str]) -> None:
    bundle, model = tiny
    one, two, three = requests_of(bundle, WORDS, (4, 4, 4))
    pool = onnx_pool(bundle, model=model)
    handles = [pool.submit(one), pool.submit(two)]
    assert pool.counts.device_steps == 0
    handles[1].result()
    assert pool.counts.device_steps == 2 * SGD.local_steps
    handles.append(pool.submit(three))
    handles[0].result()
    assert pool.counts.device_steps == 2 * SGD.local_steps
    handles[2].result()
    assert pool.counts.device_steps == 3 * SGD.local_steps


def test_without_graphs_and_model_the_pool_says_what_it_needs(
    tiny: tuple[Bundle, str], tmp_path: Path
) -> None:
    bundle = dataclasses.replace(tiny[0], directory=tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="model"):
        OnnxBackend(bundle)


def test_another_bundle_than_the_pools_is_refused(tiny: tuple[Bundle, str]) -> None:
    bundle, model = tiny
    (request,) = requests_of(bundle, WORDS, (4,))
    other = dataclasses.replace(bundle, digest="0" * 64)
    handle = onnx_pool(bundle, model=model).submit(replace(request, bundle=other))
    with pytest.raises(BundleError, match="000000000000"):
        handle.result()


def test_the_fastest_backend_of_a_bundle_is_one_of_both(tiny: tuple[Bundle, str]) -> None:
    bundle, model = tiny
    pool = fastest_pool(bundle, model=model)
    assert isinstance(pool.backend, OnnxBackend | TorchBackend)
    requests = requests_of(bundle, WORDS, COUNTS)
    alone = _updates(OneByOnePool(onnx_runtimes()), requests)
    assert _difference(requests, _updates(pool, requests), alone) < TOLERANCE


def test_devices_that_do_not_fit_together_are_trained_alone_and_only_who_fails_then_fails(
    tiny: tuple[Bundle, str],
) -> None:
    bundle, model = tiny

    class Small(OnnxBackend):
        def step(self, inputs: Inputs) -> tuple[Losses, NDArray[np.float32]]:
            if len(inputs["theta"]) > 1 or len(inputs["ids"]) == 3:
                raise RuntimeFailure("no memory")
            return super().step(inputs)

    requests = requests_of(bundle, WORDS, (4, 3, 4))
    pool = BatchedPool(bundle, Small(bundle, model=model))
    handles = [pool.submit(request) for request in requests]
    wanted = _updates(onnx_pool(bundle, model=model), requests)
    with pytest.raises(RuntimeFailure, match="no memory"):
        handles[1].result()
    for number in (0, 2):
        found = delta_of(requests[number], handles[number].result())
        expected = delta_of(requests[number], wanted[number])
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_devices_are_trained_alone_once_all_passes_of_a_failed_step_have_ended(
    tiny: tuple[Bundle, str],
) -> None:
    bundle, model = tiny
    one_at_a_time, overlaps = threading.Lock(), []

    class Crowded(OnnxBackend):
        def step(self, inputs: Inputs) -> tuple[Losses, NDArray[np.float32]]:
            if not one_at_a_time.acquire(blocking=False):
                overlaps.append(len(inputs["theta"]))
                raise RuntimeFailure("no memory")
            try:
                time.sleep(0.01)
                return super().step(inputs)
            finally:
                one_at_a_time.release()

    pool = BatchedPool(bundle, Crowded(bundle, model=model), limits=PassLimits(tokens=40))
    requests = requests_of(bundle, WORDS, (4, 4, 4, 4))
    assert len(_updates(pool, requests)) == len(requests)
    assert overlaps


def test_a_graph_that_does_not_run_fails_every_training_in_it(tiny: tuple[Bundle, str]) -> None:
    bundle, model = tiny

    class Broken(OnnxBackend):
        def step(self, inputs: Inputs) -> tuple[Losses, NDArray[np.float32]]:
            return super().step({**inputs, "ids": inputs["ids"] + 10**6})

    pool = BatchedPool(bundle, Broken(bundle, model=model))
    handles = [pool.submit(request) for request in requests_of(bundle, WORDS, (4, 4))]
    for handle in handles:
        with pytest.raises(RuntimeFailure):
            handle.result()
