"""What every runtime promises of the step that clips each example's gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_client.bundle import Bundle, open_bundle
from edge_client.executorch_runtime import ExecutorchRuntime
from edge_client.onnx_runtime import OnnxRuntime
from edge_client.runtime import Runtime
from edge_client.tokens import Batch
from fedtt.errors import RuntimeFailure
from fedtt.layout import Theta
from tests.contract.test_runtime import SHAPES, TOLERANCE, difference, random_batch, somewhere
from tests.support.torch_runtime import TorchOracle, TorchRuntime, adapted_model


@pytest.fixture(scope="module")
def bundle(private_bundle: Path) -> Bundle:
    return open_bundle(private_bundle)


@pytest.fixture(scope="module")
def oracle(bundle: Bundle, tiny_model: Path) -> TorchOracle:
    return TorchOracle(bundle, tiny_model)


def some_live(bundle: Bundle) -> NDArray[np.float32]:
    """Two thirds of theta, (P,)."""
    return (np.arange(bundle.manifest.adapter.layout.size) % 3 > 0).astype(np.float32)


def rows_of(batch: Batch) -> list[Batch]:
    """Each example by itself, without its padding."""
    assert batch.labels is not None
    found = []
    for row in range(len(batch.ids)):
        width = max(3, int(batch.mask[row].sum()))
        part = np.s_[row : row + 1, :width]
        found.append(Batch(ids=batch.ids[part], mask=batch.mask[part], labels=batch.labels[row : row + 1]))
    return found


def clipped(
    oracle: TorchOracle, theta: Theta, batch: Batch, live: NDArray[np.float32], clip: float
) -> tuple[float, NDArray[np.float64], list[float]]:
    """Loss, mean of clipped gradients and their norms before, example by example in float64."""
    losses, gradients, norms = [], [], []
    for row in rows_of(batch):
        loss, gradient, _ = oracle(theta, row)
        gradient = gradient * live
        norms.append(float(np.linalg.norm(gradient)))
        gradients.append(gradient * min(1.0, clip / norms[-1]))
        losses.append(loss)
    return float(np.mean(losses)), np.mean(gradients, axis=0), norms


class PrivateStepContract:
    """Tests of `Runtime.private_gradient`; a subclass makes the runtime."""

    @pytest.fixture(scope="class")
    @classmethod
    def runtime(cls) -> Runtime:
        raise NotImplementedError

    @pytest.mark.parametrize(("rows", "tokens"), SHAPES)
    def test_every_example_is_clipped_by_itself(
        self, rows: int, tokens: int, runtime: Runtime, bundle: Bundle, oracle: TorchOracle
    ) -> None:
        theta, batch, live = somewhere(bundle), random_batch(bundle, rows, tokens), some_live(bundle)
        *_, norms = clipped(oracle, theta, batch, live, 1.0)
        clip = float(np.median(norms))  # some are, some are not
        expected_loss, expected_gradient, _ = clipped(oracle, theta, batch, live, clip)
        loss, gradient = runtime.private_gradient(theta, batch, live, clip)
        assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
        assert difference(gradient, expected_gradient) <= TOLERANCE
        assert gradient.dtype == np.float32
        assert not gradient[live == 0].any()

    def test_without_a_bound_it_is_the_plain_step(self, runtime: Runtime, bundle: Bundle) -> None:
        theta, batch = somewhere(bundle), random_batch(bundle, 8, 7)
        loss, gradient = runtime.private_gradient(theta, batch, np.ones_like(theta), 1e6)
        plain_loss, plain_gradient = runtime.gradient(theta, batch)
        assert loss == pytest.approx(plain_loss, rel=TOLERANCE)
        assert difference(gradient, plain_gradient) <= TOLERANCE

    def test_one_example_moves_the_sum_by_no_more_than_the_bound(
        self, runtime: Runtime, bundle: Bundle
    ) -> None:
        theta, batch, live = 5 * somewhere(bundle), random_batch(bundle, 8, 7), some_live(bundle)
        other = random_batch(bundle, 8, 32)
        clip, size = 1e-2, len(batch.ids)
        _, before = runtime.private_gradient(theta, batch, live, clip)
        ids, mask = batch.ids.copy(), batch.mask.copy()
        ids[3], mask[3] = other.ids[5, :7], 1
        _, after = runtime.private_gradient(theta, Batch(ids=ids, mask=mask, labels=batch.labels), live, clip)
        moved = size * float(np.linalg.norm(after - before))
        assert 0 < moved <= 2 * clip * (1 + TOLERANCE)  # one taken out, another put in its place

    def test_an_example_without_a_gradient_stays_without_one(self, runtime: Runtime, bundle: Bundle) -> None:
        theta = somewhere(bundle)
        _, gradient = runtime.private_gradient(theta, random_batch(bundle, 3, 7), np.zeros_like(theta), 1.0)
        np.testing.assert_array_equal(gradient, np.zeros_like(theta))


class TestOnnxRuntime(PrivateStepContract):
    @pytest.fixture(scope="class")
    @classmethod
    def runtime(cls, bundle: Bundle) -> Runtime:
        return OnnxRuntime(bundle)


@pytest.mark.slow
class TestExecutorchRuntime(PrivateStepContract):
    @pytest.fixture(scope="class")
    @classmethod
    def runtime(cls, private_executorch_bundle: Path, executorch_library: Path) -> Runtime:
        return ExecutorchRuntime(
            open_bundle(private_executorch_bundle, "executorch"), library=executorch_library
        )


class TestTorchRuntime(PrivateStepContract):
    @pytest.fixture(scope="class")
    @classmethod
    def runtime(cls, bundle: Bundle, tiny_model: Path) -> Runtime:
        return TorchRuntime(adapted_model(bundle, tiny_model))


def test_a_bundle_without_the_step_says_how_to_get_one(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    theta = somewhere(bundle)
    with pytest.raises(RuntimeFailure, match="export it with --dp"):
        OnnxRuntime(bundle).private_gradient(theta, random_batch(bundle, 1, 3), theta, 1.0)
