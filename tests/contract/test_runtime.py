"""What every runtime promises, in one class; each runtime inherits it whole."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_client.bundle import Bundle, open_bundle
from edge_client.executorch_runtime import ExecutorchRuntime
from edge_client.onnx_runtime import OnnxRuntime
from edge_client.passes import PASSES, PassLimits, in_passes
from edge_client.runtime import Runtime
from edge_client.tokens import Batch, Tokens
from fedtt.adapter import initial_theta
from fedtt.errors import LayoutError, RuntimeFailure
from fedtt.layout import LiveSet, Theta
from tests.support.torch_runtime import TorchOracle, TorchRuntime, adapted_model

TOLERANCE = 1e-5  #: of ‖found - expected‖ / ‖expected‖
SHAPES = [(batch, tokens) for batch in (1, 3, 8) for tokens in (3, 7, 32)]
THREADS = 2


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def oracle(bundle: Bundle, tiny_model: Path) -> TorchOracle:
    return TorchOracle(bundle, tiny_model)


def somewhere(bundle: Bundle, seed: int = 0) -> Theta:
    """A theta at which every factor has a gradient."""
    theta = initial_theta(bundle.manifest.adapter, seed)
    noise = np.random.default_rng(seed).normal(0.0, 0.05, theta.shape)
    return theta + noise.astype(np.float32)


def random_batch(bundle: Bundle, rows: int, tokens: int) -> Batch:
    """Random tokens; the first row is full, the others end anywhere; the same for the same shape."""
    rng = np.random.default_rng([rows, tokens])
    lengths = [tokens, *rng.integers(1, tokens, rows - 1, endpoint=True)]
    vocabulary, labels = bundle.manifest.model.vocabulary, len(bundle.manifest.labels)
    texts = [rng.integers(0, vocabulary, length).tolist() for length in lengths]
    return Tokens(bundle).padded(*texts, labels=rng.integers(0, labels, rows).tolist())


def difference(found: NDArray[np.floating], expected: NDArray[np.floating]) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def last_of_up(bundle: Bundle) -> NDArray[np.bool_]:
    """Where theta holds the cores that start at zero and so make each adapter the identity, (P,)."""
    spec = bundle.manifest.adapter
    last = [indices[-1] for prefix, _, indices in spec.tt_matrices if prefix.endswith(".up")]
    found = np.zeros(spec.layout.size, np.bool_)
    found[LiveSet(spec.layout, last).positions] = True
    return found


def below_last(bundle: Bundle) -> int:
    """How many numbers of theta are of blocks below the last."""
    return bundle.manifest.adapter.size_below(1)


class RuntimeContract:
    """Tests of `edge_client.runtime.Runtime`; a subclass makes the runtime."""

    @pytest.fixture(scope="class")
    @classmethod
    def runtime(cls) -> Runtime:
        raise NotImplementedError

    # numbers

    @pytest.mark.parametrize(("rows", "tokens"), SHAPES)
    def test_loss_gradient_and_logits_are_those_of_backpropagation_in_float64(
        self, rows: int, tokens: int, runtime: Runtime, bundle: Bundle, oracle: TorchOracle
    ) -> None:
        theta, batch = somewhere(bundle), random_batch(bundle, rows, tokens)
        expected_loss, expected_gradient, expected_logits = oracle(theta, batch)
        loss, gradient = runtime.gradient(theta, batch)
        logits = runtime.logits(theta, batch)
        assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
        assert difference(gradient, expected_gradient) <= TOLERANCE
        assert difference(logits, expected_logits) <= TOLERANCE
        assert logits.shape == (rows, 4)
        assert {gradient.dtype, logits.dtype} == {np.dtype(np.float32)}

    def test_at_its_first_values_an_adapter_is_the_identity(self, runtime: Runtime, bundle: Bundle) -> None:
        """So the first version predicts what the frozen base does, whatever the random cores are."""
        batch, spec = random_batch(bundle, 3, 7), bundle.manifest.adapter
        one, other = (initial_theta(spec, seed) for seed in (0, 1))
        assert not np.array_equal(one, other)
        np.testing.assert_array_equal(runtime.logits(one, batch), runtime.logits(other, batch))
        assert runtime.gradient(one, batch)[0] == runtime.gradient(other, batch)[0]

    def test_at_the_identity_only_the_cores_at_zero_can_move_an_adapter(
        self, runtime: Runtime, bundle: Bundle
    ) -> None:
        spec = bundle.manifest.adapter
        _, gradient = runtime.gradient(initial_theta(spec, 0), random_batch(bundle, 8, 7))
        adapters = np.concatenate([np.full(f.size, f.name.startswith("block.")) for f in spec.layout.factors])
        moving = last_of_up(bundle)
        assert gradient[moving].all()
        assert not gradient[adapters & ~moving].any()

    def test_a_step_down_the_gradient_lowers_the_loss(self, runtime: Runtime, bundle: Bundle) -> None:
        theta, batch = initial_theta(bundle.manifest.adapter, 0), random_batch(bundle, 8, 7)
        loss, gradient = runtime.gradient(theta, batch)
        lower, _ = runtime.gradient(theta - np.float32(0.01) * gradient, batch)
        # to first order the loss falls by η ‖g‖²
        assert loss - lower == pytest.approx(0.01 * float(gradient @ gradient), rel=0.1)

    def test_a_text_is_read_alike_alone_and_in_company(self, runtime: Runtime, bundle: Bundle) -> None:
        tokens, theta = Tokens(bundle), somewhere(bundle)
        rows = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15, 16, 17, 18]]
        together = runtime.logits(theta, tokens.padded(*rows))
        alone = np.concatenate([runtime.logits(theta, tokens.padded(row)) for row in rows])
        assert difference(together, alone) <= TOLERANCE

    @pytest.mark.parametrize("overhead_tokens", [0, 3])
    def test_a_batch_in_passes_of_like_length_gives_what_it_gives_in_one_piece(
        self, overhead_tokens: int, runtime: Runtime, bundle: Bundle
    ) -> None:
        theta, batch = somewhere(bundle), random_batch(bundle, 8, 32)
        loss, gradient = runtime.gradient(theta, batch)
        widths = []

        def one(part: Batch) -> tuple[float, Theta]:
            widths.append(part.ids.shape)
            return runtime.gradient(theta, part)

        limits = PassLimits(tokens=100, overhead_tokens=overhead_tokens)
        found_loss, found = in_passes(batch, limits, one, least=3, by_tokens=False)
        assert found_loss == pytest.approx(loss, rel=TOLERANCE)
        assert difference(found, gradient) <= TOLERANCE
        assert len(widths) > 2
        assert sum(rows * width for rows, width in widths) < batch.ids.size
        assert max(rows * width for rows, width in widths) <= 100

    def test_a_batch_of_more_rows_than_memory_was_planned_for_goes_in_several_passes(
        self, runtime: Runtime, bundle: Bundle, oracle: TorchOracle
    ) -> None:
        theta, batch = somewhere(bundle), random_batch(bundle, 40, 3)
        limits, passes = replace(PASSES, rows=runtime.rows), list[int]()

        def one(part: Batch) -> tuple[float, Theta]:
            passes.append(len(part.ids))
            return runtime.gradient(theta, part)

        loss, gradient = in_passes(batch, limits, one, least=3, by_tokens=False)
        expected_loss, expected, _ = oracle(theta, batch)
        assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
        assert difference(gradient, expected) <= TOLERANCE
        assert max(passes) <= (runtime.rows or 40)
        assert sum(passes) == 40

    # the step over a kept prefix

    @pytest.mark.parametrize(("rows", "tokens"), SHAPES)
    def test_a_step_over_its_prefix_gives_what_the_whole_step_does_above_the_cut(
        self, rows: int, tokens: int, runtime: Runtime, bundle: Bundle, oracle: TorchOracle
    ) -> None:
        theta, batch, below = somewhere(bundle), random_batch(bundle, rows, tokens), below_last(bundle)
        expected_loss, expected_gradient, _ = oracle(theta, batch)
        assert runtime.depths == (1,)
        hidden = runtime.prefix(theta, batch, 1)
        loss, gradient = runtime.gradient_above(theta, hidden, batch, 1)
        assert hidden.shape == (rows, tokens, 2 * 32)  # what enters the block, what its attention gives
        assert {hidden.dtype, gradient.dtype} == {np.dtype(np.float32)}
        assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
        assert difference(gradient[below:], expected_gradient[below:]) <= TOLERANCE
        assert not gradient[:below].any()

    def test_a_prefix_reads_the_factors_below_the_cut_alone(self, runtime: Runtime, bundle: Bundle) -> None:
        theta, batch, below = somewhere(bundle), random_batch(bundle, 3, 7), below_last(bundle)
        hidden = runtime.prefix(theta, batch, 1)
        above, lower = theta.copy(), theta.copy()
        above[below:] += 1
        lower[:below] += 1
        np.testing.assert_array_equal(runtime.prefix(above, batch, 1), hidden)
        assert difference(runtime.prefix(lower, batch, 1), hidden) > TOLERANCE

    def test_what_stands_for_padding_in_a_prefix_does_not_matter(
        self, runtime: Runtime, bundle: Bundle
    ) -> None:
        theta, batch = somewhere(bundle), random_batch(bundle, 8, 7)
        hidden = runtime.prefix(theta, batch, 1)
        loss, gradient = runtime.gradient_above(theta, hidden, batch, 1)
        blank = hidden * batch.mask[:, :, None].astype(np.float32)
        assert not np.array_equal(blank, hidden)
        blank_loss, blank_gradient = runtime.gradient_above(theta, blank, batch, 1)
        assert blank_loss == pytest.approx(loss, rel=TOLERANCE)
        assert difference(blank_gradient, gradient) <= TOLERANCE

    # behaviour

    def test_the_same_inputs_give_the_same_bits_whatever_ran_between(
        self, runtime: Runtime, bundle: Bundle
    ) -> None:
        theta, batch = somewhere(bundle), random_batch(bundle, 3, 7)
        loss, gradient = runtime.gradient(theta, batch)
        logits = runtime.logits(theta, batch)
        gradient_copy, logits_copy = gradient.copy(), logits.copy()
        runtime.gradient(somewhere(bundle, 1), random_batch(bundle, 8, 32))
        runtime.logits(somewhere(bundle, 1), random_batch(bundle, 8, 32))
        np.testing.assert_array_equal(gradient, gradient_copy, "a later call wrote into an earlier answer")
        np.testing.assert_array_equal(logits, logits_copy, "a later call wrote into an earlier answer")
        runtime.release()
        loss_again, gradient_again = runtime.gradient(theta, batch)
        assert loss_again == loss
        np.testing.assert_array_equal(gradient_again, gradient)
        np.testing.assert_array_equal(runtime.logits(theta, batch), logits)

    def test_theta_and_batch_are_left_as_they_were(self, runtime: Runtime, bundle: Bundle) -> None:
        theta, batch = somewhere(bundle), random_batch(bundle, 3, 7)
        assert batch.labels is not None
        given = (theta, batch.ids, batch.mask, batch.labels)
        before = [array.copy() for array in given]
        runtime.gradient(theta, batch)
        runtime.logits(theta, batch)
        for array, copy in zip(given, before, strict=True):
            np.testing.assert_array_equal(array, copy)

    def test_threads_at_once_get_what_one_gets_by_itself(self, runtime: Runtime, bundle: Bundle) -> None:
        jobs = [(somewhere(bundle, seed), random_batch(bundle, 1 + seed, 7)) for seed in range(8)]
        expected = [(*runtime.gradient(*job), runtime.logits(*job)) for job in jobs]
        together = threading.Barrier(THREADS, timeout=10)

        def work(jobs: list[tuple[Theta, Batch]]) -> list[tuple[float, Theta, NDArray[np.float32]]]:
            together.wait()
            return [(*runtime.gradient(*job), runtime.logits(*job)) for job in jobs]

        with ThreadPoolExecutor(THREADS) as pool:
            forwards, backwards = pool.map(work, [jobs, jobs[::-1]])
        for found in (forwards, backwards[::-1]):
            for (loss, gradient, logits), wanted in zip(found, expected, strict=True):
                assert loss == wanted[0]
                np.testing.assert_array_equal(gradient, wanted[1])
                np.testing.assert_array_equal(logits, wanted[2])

    # refusals

    def test_a_theta_of_another_size_does_not_fit_the_layout(self, runtime: Runtime, bundle: Bundle) -> None:
        theta, batch = somewhere(bundle), random_batch(bundle, 3, 7)
        for wrong in (theta[:-1], np.append(theta, theta[:1]), theta[None, :], theta[:0]):
            for call in (runtime.gradient, runtime.logits):
                with pytest.raises(LayoutError, match=r"theta has shape .* needs \(428,\)"):
                    call(wrong, batch)

    def test_a_token_beyond_the_vocabulary_is_a_failure_in_one_line(
        self, runtime: Runtime, bundle: Bundle
    ) -> None:
        batch = Tokens(bundle).padded([5, bundle.manifest.model.vocabulary, 6], labels=[0])
        for call in (runtime.gradient, runtime.logits):
            with pytest.raises(RuntimeFailure) as caught:
                call(somewhere(bundle), batch)
            assert "\n" not in str(caught.value)


class TestOnnxRuntime(RuntimeContract):
    @pytest.fixture(scope="class")
    @classmethod
    def runtime(cls, bundle: Bundle) -> Runtime:
        return OnnxRuntime(bundle)


@pytest.mark.slow
class TestExecutorchRuntime(RuntimeContract):
    @pytest.fixture(scope="class")
    @classmethod
    def runtime(cls, executorch_bundle: Path, executorch_library: Path) -> Runtime:
        return ExecutorchRuntime(open_bundle(executorch_bundle, "executorch"), library=executorch_library)


class TestTorchRuntime(RuntimeContract):
    @pytest.fixture(scope="class")
    @classmethod
    def runtime(cls, bundle: Bundle, tiny_model: Path) -> Runtime:
        return TorchRuntime(adapted_model(bundle, tiny_model), depths=(1,))
