from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from edge_client import batches
from edge_client.batches import Batches, batch_rows
from edge_client.examples import Example, Shard
from edge_client.runtime import Runtime
from edge_client.tokens import Batch, Tokens
from edge_client.trainer import LocalUpdate, TrainingRequest, train
from fedtt.algorithms import FedTT
from fedtt.codec import CodecSpec, decode_delta
from fedtt.errors import DataError, LayoutError, RuntimeFailure, WireError
from fedtt.layout import Theta
from fedtt.messages import Plan
from fedtt.optimiser import TrainingSpec
from fedtt.wire import decode_update, encode_theta, layout_tag, version_digest
from tests.support.edge import MeanTarget, small_bundle
from tests.support.tiny import tiny_spec

LAYOUT = tiny_spec().layout
VERSION = encode_theta(np.zeros(LAYOUT.size, np.float32))
EXAMPLES = [Example(f"lights {'on' if n % 2 else 'off'}", n % 2, f"row {n}") for n in range(7)]
DEVICE = "0123456789abcdef" * 2
PLAN = Plan(
    task="t",
    seed=1,
    bundle="0" * 64,
    version=version_digest(VERSION),
    version_number=0,
    round=1,
    live=tuple(range(len(LAYOUT.factors))),
    training=TrainingSpec(optimiser="sgd", momentum=0.0, learning_rate=0.5, local_steps=3, batch_size=4),
    codec=CodecSpec(quantise="fp32"),
    method=FedTT(),
    min_examples=1,
)
INT4 = CodecSpec(quantise="int4", error_feedback=True)


def run(
    tmp_path: Path,
    plan: Plan = PLAN,
    *,
    device: str = DEVICE,
    runtime: Runtime | None = None,
    examples: list[Example] = EXAMPLES,
    residual: bytes = b"",
    go_on: Callable[[], None] = lambda: None,
) -> LocalUpdate:
    bundle = small_bundle(tmp_path)
    request = TrainingRequest(
        plan=plan,
        device=device,
        bundle=bundle,
        version=VERSION,
        examples=Shard(examples),
        residual=residual,
    )
    return train(request, Tokens(bundle), runtime or MeanTarget(), go_on)


def delta_of(update: LocalUpdate, plan: Plan = PLAN) -> Theta:
    _, payload = decode_update(update.frame)
    return decode_delta(plan.codec, LAYOUT.everything, payload)


def test_batches_are_shuffled_epochs_with_a_short_last_batch() -> None:
    rows = list(batch_rows(5, 2, 5, np.random.default_rng(0)))
    assert [len(r) for r in rows] == [2, 2, 1, 2, 2]
    assert sorted(np.concatenate(rows[:3]).tolist()) == [0, 1, 2, 3, 4]
    assert len(set(np.concatenate(rows[3:]).tolist())) == 4


def test_batches_larger_than_the_data_hold_all_of_it() -> None:
    assert [sorted(r.tolist()) for r in batch_rows(3, 10, 2, np.random.default_rng(0))] == [[0, 1, 2]] * 2


def test_the_frame_says_what_was_trained(tmp_path: Path) -> None:
    runtime = MeanTarget()
    update = run(tmp_path, runtime=runtime)
    header, _ = decode_update(update.frame)
    assert header == update.header
    assert (header.layout, header.examples, header.steps) == (layout_tag(LAYOUT), 7, 3)
    assert header.loss_last < header.loss_first
    assert [len(batch.ids) for batch in runtime.batches] == [4, 3, 4]
    theta = np.zeros(LAYOUT.size, np.float32)
    for batch in runtime.batches:  # plain SGD by hand: θ ← θ - ½ (θ - t)
        theta = theta - np.float32(0.5) * (theta - runtime.target(batch))
    np.testing.assert_allclose(delta_of(update), theta, rtol=1e-6)


def test_labels_travel_with_their_texts(tmp_path: Path) -> None:
    runtime = MeanTarget()
    run(tmp_path, runtime=runtime)
    for batch in runtime.batches:
        assert batch.labels is not None
        assert [3 if label else 4 for label in batch.labels] == batch.ids[:, 1].tolist()  # on = 3, off = 4


@pytest.mark.parametrize("codec", [CodecSpec(quantise="int4", rounding="stochastic"), INT4])
def test_the_same_training_twice_gives_the_same_bytes(tmp_path: Path, codec: CodecSpec) -> None:
    plan = replace(PLAN, codec=codec)
    assert run(tmp_path, plan) == run(tmp_path, plan)


@pytest.mark.parametrize("change", [{"seed": 2}, {"round": 2}])
def test_another_seed_or_round_gives_another_order(tmp_path: Path, change: dict[str, int]) -> None:
    assert run(tmp_path, replace(PLAN, **change)).frame != run(tmp_path).frame


def test_another_device_gives_another_order(tmp_path: Path) -> None:
    assert run(tmp_path, device="f" * 32).frame != run(tmp_path).frame


def test_sent_plus_residual_is_what_was_trained_plus_the_old_residual(tmp_path: Path) -> None:
    plan = replace(PLAN, codec=INT4)
    old = np.linspace(-0.1, 0.1, LAYOUT.size, dtype=np.float32)
    update = run(tmp_path, plan, residual=encode_theta(old))
    rest = np.frombuffer(update.residual, "<f4")
    np.testing.assert_allclose(delta_of(update, plan) + rest, delta_of(run(tmp_path)) + old, atol=1e-6)
    assert np.abs(rest).max() > 0


def test_only_live_factors_are_sent_and_other_residuals_stay(tmp_path: Path) -> None:
    plan = replace(PLAN, codec=INT4, live=(1, 2))
    old = np.full(LAYOUT.size, 0.25, np.float32)
    update = run(tmp_path, plan, residual=encode_theta(old))
    rest = np.frombuffer(update.residual, "<f4")
    start, end = LAYOUT.slices[1].start, LAYOUT.slices[2].stop
    assert (rest[:start] == 0.25).all()
    assert (rest[end:] == 0.25).all()
    assert (rest[start:end] != 0.25).any()


def test_without_error_feedback_nothing_is_kept(tmp_path: Path) -> None:
    assert run(tmp_path).residual == b""


def test_texts_longer_than_the_graph_are_counted(tmp_path: Path) -> None:
    examples = [Example("on " * 20, 1), Example("off", 0)]
    assert run(tmp_path, examples=examples).cut_texts == 3  # one of the two in each of 3 batches of both


def test_too_few_examples_are_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the task needs 8 examples, this device has 7"):
        run(tmp_path, replace(PLAN, min_examples=8))
    with pytest.raises(DataError, match="this device has 0"):
        run(tmp_path, replace(PLAN, min_examples=0), examples=[])


def test_a_label_of_another_task_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 9: label 'dim' is not among the task's 2 labels: no, yes"):
        run(tmp_path, examples=[Example("x", "dim", "row 9")])


def test_a_live_set_of_another_layout_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="a live set needs indices"):
        run(tmp_path, replace(PLAN, live=(10_000,)))


def test_a_diverged_training_is_a_clear_error(tmp_path: Path) -> None:
    plan = replace(PLAN, training=replace(PLAN.training, learning_rate=10.0, local_steps=200))
    with pytest.raises(WireError, match="not finite"):
        run(tmp_path, plan)


def test_a_graph_that_fails_is_a_clear_error(tmp_path: Path) -> None:
    class Broken(MeanTarget):
        def gradient(self, theta: Theta, batch: Batch) -> tuple[float, Theta]:
            raise RuntimeFailure("step.onnx did not run")

    with pytest.raises(RuntimeFailure, match=r"step\.onnx did not run"):
        run(tmp_path, runtime=Broken())


def test_training_stops_between_batches_when_asked(tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    runtime = MeanTarget()

    def go_on() -> None:
        if runtime.batches:
            raise Enough

    with pytest.raises(Enough):
        run(tmp_path, runtime=runtime, go_on=go_on)
    assert len(runtime.batches) == 1


def test_training_stops_between_the_passes_of_a_batch_when_asked(tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    runtime = MeanTarget()
    runtime.rows = 1

    def go_on() -> None:
        if runtime.batches:
            raise Enough

    with pytest.raises(Enough):
        run(tmp_path, runtime=runtime, go_on=go_on)
    assert len(runtime.batches) == 1, "of the four of its first batch"


def test_before_the_first_step_each_row_is_looked_at_once_however_many_steps_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Enough(Exception):
        pass

    dealt = list[int]()

    def counted(*args: Any) -> Iterator[NDArray[np.intp]]:
        for rows in batch_rows(*args):
            dealt.extend(rows.tolist())
            yield rows

    def go_on() -> None:
        raise Enough

    monkeypatch.setattr(batches, "batch_rows", counted)
    training = replace(PLAN.training, local_steps=100_000, batch_size=3)
    with pytest.raises(Enough):
        run(tmp_path, replace(PLAN, training=training), go_on=go_on)
    assert sorted(dealt) == list(range(7))


def test_the_batches_ahead_have_each_row_once(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path)
    training = replace(PLAN.training, local_steps=100, batch_size=3)
    plan = replace(PLAN, training=training)
    found = Batches(plan, DEVICE, bundle.manifest, Tokens(bundle), EXAMPLES)
    ahead = list(found.ahead())
    assert [len(batch.ids) for batch in ahead] == [3, 3, 1]
    for early, batch in zip(ahead, found, strict=False):
        assert (early.ids == batch.ids).all()
    assert len(list(found)) == 100
    short = replace(plan, training=replace(training, local_steps=2))
    assert len(list(Batches(short, DEVICE, bundle.manifest, Tokens(bundle), EXAMPLES).ahead())) == 2


def test_a_pass_has_no_more_rows_than_the_runtime_takes(tmp_path: Path) -> None:
    runtime, everything = MeanTarget(), MeanTarget()
    runtime.rows = 2
    update, expected = run(tmp_path, runtime=runtime), run(tmp_path, runtime=everything)
    assert [len(batch.ids) for batch in runtime.batches] == [2, 2, 2, 1, 2, 2]  # batches of 4, 3 and 4
    np.testing.assert_allclose(delta_of(update), delta_of(expected), rtol=1e-5)
