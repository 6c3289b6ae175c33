"""A private training: its noise, what is sent of it, and what it spends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count, product
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from edge_client import events
from edge_client.allowance import spent_before, with_spent
from edge_client.journal import Leased, Trained
from edge_client.private_steps import GaussianMechanism, Noise, PrivateGradient, noise_key, noise_secret
from edge_client.tokens import Batch
from fedtt.codec import CodecSpec, decode_delta
from fedtt.layout import Theta
from fedtt.messages import FailureCode, Plan
from fedtt.optimiser import TrainingSpec
from fedtt.privacy import PrivacySpec, epsilon_of
from fedtt.wire import decode_update
from tests.support.device_world import SPEC, World, device_world
from tests.support.edge import MeanTarget
from tests.support.tiny import tiny_spec

PRIVACY = PrivacySpec(clip=2.0, noise_multiplier=1.5)
PRIVATE = replace(
    SPEC,
    privacy=PRIVACY,
    codec=CodecSpec(quantise="fp32"),
    training=TrainingSpec(optimiser="sgd", momentum=0.0, learning_rate=1.0, local_steps=1, batch_size=8),
)
SIZE = tiny_spec().layout.size
PLAN = Plan(
    task="t",
    seed=1,
    bundle="a" * 64,
    version="b" * 64,
    version_number=0,
    round=1,
    live=(0,),
    training=PRIVATE.training,
    codec=PRIVATE.codec,
    method=PRIVATE.method,
    min_examples=1,
    privacy=PRIVACY,
)


class Flat(MeanTarget):
    """No gradient at all: what comes out is noise alone."""

    def private_gradient(
        self, theta: Theta, batch: Batch, live: NDArray[np.float32], clip: float
    ) -> tuple[float, Theta]:
        self.batches.append(batch)
        return 0.5, np.zeros_like(theta)


class Death(BaseException):
    """Of the process, which nothing catches."""


def in_world(
    tmp_path: Path, test: Callable[[World], Awaitable[None]], privacy: PrivacySpec = PRIVACY
) -> None:
    async def run() -> None:
        async with device_world(tmp_path, replace(PRIVATE, privacy=privacy)) as world:
            world.runtime = Flat()
            await test(world)

    asyncio.run(run())


def trained(step: events.Step) -> bool:
    return isinstance(step, events.Trained)


def sent(frame: bytes) -> NDArray[np.float32]:
    _, payload = decode_update(frame)
    return decode_delta(PRIVATE.codec, tiny_spec().layout.everything, payload)


def test_the_noise_is_standard_normal_and_goes_on_where_it_stopped() -> None:
    key = noise_key(bytes(32), "a lease", PLAN, 0.0)
    drawn = Noise(key).draw(200_000)
    assert abs(drawn.mean()) < 4 / np.sqrt(200_000)
    assert drawn.std() == pytest.approx(1.0, abs=0.01)
    # quantiles of the standard normal at 2.5, 50 and 97.5 %
    np.testing.assert_allclose(np.quantile(drawn, [0.025, 0.5, 0.975]), [-1.96, 0, 1.96], atol=0.02)
    assert abs(np.corrcoef(drawn[:100_000], drawn[100_000:])[0, 1]) < 0.02
    noise = Noise(key)
    first, second = noise.draw(4), noise.draw(3)
    assert first.shape == (4,)
    assert second.shape == (3,)
    assert not np.intersect1d(first, second).size
    np.testing.assert_array_equal(Noise(key).draw(4), first)


def test_another_device_lease_version_or_training_draws_other_noise() -> None:
    numbers = count()
    secrets = [noise_secret(lambda: next(numbers) % 97 / 97) for _ in range(2)]
    plans = [PLAN, replace(PLAN, version="c" * 64)]
    keys = {noise_key(*each) for each in product(secrets, ("a", "b"), plans, (0.0, 0.5))}
    assert len(keys) == 16
    assert {len(key) for key in keys} == {32}


def test_a_server_that_gives_a_finished_lease_again_sees_no_noise_twice(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, _ = world.device()
        await device.run(lambda step: isinstance(step, events.Granted))
        leased, frames = device.journal.state.phase, []
        for _ in range(2):
            await device.run(trained)
            phase = device.journal.state.phase
            assert isinstance(phase, Trained)
            frames.append(sent(phase.frame))
            device.journal.drop("another one")
            device.journal.update(phase=leased)
        first, second = frames
        assert not np.intersect1d(first, second).size

    in_world(tmp_path, test)


def test_an_example_is_scaled_down_to_the_bound_over_its_live_numbers_and_no_further() -> None:
    live = np.arange(0, SIZE, 2)
    mechanism = GaussianMechanism(PRIVACY, live, SIZE, Noise(bytes(32)))
    steep = np.full(
        SIZE, 3.0 / 4, np.float32
    )  # of 4 rows: norm 3 √(SIZE / 2) on what is live, above the bound 2
    clipped = mechanism.clipped(steep, rows=4)
    assert np.linalg.norm(4 * clipped) == pytest.approx(2.0)
    assert not np.delete(clipped, live).any()
    flat = np.full(SIZE, 1e-3 / 4, np.float32)
    np.testing.assert_array_equal(mechanism.clipped(flat, rows=4)[live], flat[live])


def test_noise_falls_on_live_numbers_alone_in_proportion_to_bound_and_batch() -> None:
    live = np.arange(0, SIZE, 2)
    step = PrivateGradient(Flat(), GaussianMechanism(PRIVACY, live, SIZE, Noise(bytes(32))))
    batch = Batch(ids=np.zeros((6, 3), np.int64), mask=np.ones((6, 3), np.int64))
    _, gradient = step.gradient(np.zeros(SIZE, np.float32), batch)
    expected = 1.5 * 2.0 / 6 * Noise(bytes(32)).draw(len(live))
    np.testing.assert_allclose(gradient[live], expected, rtol=1e-6)
    assert not np.delete(gradient, live).any()


def test_a_batch_beyond_what_the_runtime_takes_goes_in_passes_under_one_noise() -> None:
    live, few, all_at_once = np.arange(0, SIZE, 2), Flat(), Flat()
    few.rows = 2
    batch = Batch(ids=np.zeros((5, 3), np.int64), mask=np.ones((5, 3), np.int64))
    found = []
    for runtime in (few, all_at_once):
        step = PrivateGradient(runtime, GaussianMechanism(PRIVACY, live, SIZE, Noise(bytes(32))))
        found.append(step.gradient(np.zeros(SIZE, np.float32), batch))
    assert [len(part.ids) for part in few.batches] == [2, 2, 1]
    assert found[0][0] == pytest.approx(found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])


def test_a_private_update_is_noisy_says_nothing_of_its_losses_and_is_counted(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, transport = world.device()
        step = await device.run(lambda step: isinstance(step, events.Acknowledged))
        ((_, frame),) = transport.frames
        header, _ = decode_update(frame)
        assert (header.loss_first, header.loss_last) == (0.0, 0.0)
        # 5 examples in one batch, σ C / B = 1.5 · 2 / 5 = 0.6 at a learning rate of 1
        assert sent(frame).std() == pytest.approx(0.6, rel=0.25)
        mu_squared = device.journal.state.privacy_spent[SPEC.name]
        assert mu_squared == pytest.approx(1 / 1.5**2)
        (event,) = [event for event in world.seen if isinstance(event, events.Trained)]
        assert event.epsilon == epsilon_of(mu_squared, 1e-5)
        assert isinstance(step, events.Acknowledged)

    in_world(tmp_path, test)


def test_a_training_repeated_after_a_crash_sends_the_same_noise_and_another_round_does_not(
    tmp_path: Path,
) -> None:
    async def test(world: World) -> None:
        class Crashing(Flat):
            def private_gradient(
                self, theta: Theta, batch: Batch, live: NDArray[np.float32], clip: float
            ) -> tuple[float, Theta]:
                raise Death("power cut")

        device, _ = world.device()
        await device.run(trained)
        whole = device.journal.state
        world.runtime = Crashing()
        await device.run(lambda step: isinstance(step, events.Granted))
        device, _ = world.device()
        leased = device.journal.state.phase
        assert isinstance(leased, Leased)
        with pytest.raises(Death):
            await device.run()
        world.runtime = Flat()
        device, _ = world.device()
        await device.run(lambda step: isinstance(step, events.Acknowledged))
        assert device.journal.state.noise_secret == whole.noise_secret
        frames = [frame for transport in world.transports for _, frame in transport.frames]
        first, second = (sent(frame) for frame in frames[:2])
        assert not np.array_equal(first, second)
        spent = whole.privacy_spent[SPEC.name]
        key = noise_key(whole.noise_secret, leased.work.lease, leased.work.plan, spent)
        noise = Noise(key).draw(SIZE)
        np.testing.assert_allclose(second, -0.6 * noise, atol=1e-5)

    in_world(tmp_path, test)


def test_what_tasks_spent_is_bounded_and_forgotten_by_none_that_comes_again() -> None:
    spent: dict[str, float] = {}
    for number in range(1000):
        before = spent_before(spent, f"task {number}")
        spent = with_spent(spent, f"task {number}", before + 0.5)
    assert len(spent) == 65
    assert spent_before(spent, "task 0") >= 0.5
    assert spent_before(spent, "task 999") == spent["task 999"]


def test_a_device_declines_before_more_is_spent_than_the_task_allows(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, transport = world.device()
        step = await device.run(lambda step: isinstance(step, events.GaveUp))
        assert isinstance(step, events.GaveUp)
        assert step.code is FailureCode.PRIVACY
        assert step.detail.startswith("with this training ε would be ")
        assert len(transport.frames) == 1
        assert device.journal.state.privacy_spent[SPEC.name] == pytest.approx(1 / 1.5**2)

    once = epsilon_of(1 / 1.5**2, 1e-5)
    in_world(tmp_path, test, replace(PRIVACY, epsilon=1.01 * once))
