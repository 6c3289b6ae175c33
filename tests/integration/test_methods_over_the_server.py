"""Methods that average factors, some of them in turns: real devices, the real service, one factor model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pytest

from aggregator.folding import server_state
from edge_client import events
from edge_client.events import Step
from edge_client.tokens import Batch
from fedtt.adapter import AdapterSpec
from fedtt.algorithms import ExactFedTT, FedTT, FedTTPlus, Method
from fedtt.codec import decode_delta, payload_bytes
from fedtt.layout import LiveSet, Theta
from fedtt.messages import Code
from fedtt.wire import decode_update, update_limit_bytes
from tests.support.adapters import small_adapter
from tests.support.federations import Federation, federation
from tests.support.ranks import TowardsProducts, lora_adapter
from tests.support.trains import TowardsMatrices, long_adapter

ADAPTER = long_adapter()
TASK = """
name = "lights"
seed = 5
[rounds]
count = {rounds}
cohort = 3
deadline_s = 1000
retry_s = 10
{more}
[training]
learning_rate = 0.03
local_steps = 10
batch_size = 2
[codec]
error_feedback = {feedback}
[method]
{method}
"""


def text_of(method: str, *, rounds: int = 6, feedback: bool = True, more: str = "") -> str:
    return TASK.format(method=method, rounds=rounds, feedback=str(feedback).lower(), more=more)


CASES: dict[str, tuple[str, Method]] = {
    "fedtt": ('name = "fedtt"', FedTT()),
    "fedtt-plus": ('name = "fedtt-plus"', FedTTPlus()),
    "fedtt-plus, whole head": ('name = "fedtt-plus"\nwhole_head = true', FedTTPlus(whole_head=True)),
    "exact": ('name = "exact-fedtt"', ExactFedTT()),
    "exact by norm": ('name = "exact-fedtt"\nschedule = "norm"', ExactFedTT(schedule="norm")),
    "exact sweep": ('name = "exact-fedtt"\nschedule = "sweep"', ExactFedTT(schedule="sweep")),
    "exact up and down": (
        'name = "exact-fedtt"\nschedule = "alternate"\nepoch_rounds = 2',
        ExactFedTT(schedule="alternate", epoch_rounds=2),
    ),
    "exact, orthogonal": ('name = "exact-fedtt"\northogonal = true', ExactFedTT(orthogonal=True)),
    "exact, orthogonal, whole head": (
        'name = "exact-fedtt"\northogonal = true\nwhole_head = true',
        ExactFedTT(orthogonal=True, whole_head=True),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rounds_train_what_their_turn_is_in_four_bits_and_leave_the_rest(case: str, tmp_path: Path) -> None:
    toml, method = CASES[case]

    async def run() -> None:
        async with federation(tmp_path, text_of(toml, feedback=method.residual_lasts), ADAPTER) as fleet:
            assert fleet.spec.method == method
            for _ in range(6):
                await fleet.round()
            await check(fleet, method)

    asyncio.run(run())


async def check(fleet: Federation, method: Method) -> None:
    versions, rounds = fleet.ledger()
    assert [version.updates for version in versions] == [0, 3, 3, 3, 3, 3, 3]
    lives = [round_.live for round_ in rounds]
    if method == FedTT():
        assert set(lives) == {ADAPTER.layout.everything.indices}
    else:
        assert len(set(lives)) >= 3
        assert all(len(live) < len(ADAPTER.layout.factors) for live in lives)
    states = [server_state(fleet.service.blobs, version) for version in versions]
    assert lives == [method.live(ADAPTER, t, state).indices for t, state in enumerate(states[:6], 1)]
    exact = {"exact_mean": 1.0} if isinstance(method, ExactFedTT) else {}
    assert all(version.report == exact for version in versions[1:])
    losses = [version.loss_last for version in versions[1:]]
    assert losses[-1] is not None
    assert losses[0] is not None
    assert losses[-1] < 0.8 * losses[0]

    whole = 4 * ADAPTER.layout.size
    for before, after, live in zip(versions, versions[1:], lives, strict=False):
        changed = np.flatnonzero(fleet.theta(before) != fleet.theta(after))
        positions = LiveSet(ADAPTER.layout, live).positions
        assert set(changed) <= set(positions)
        assert len(changed) > 0.4 * len(positions)
        body = await fleet.service.version(after.sha256, before.sha256)
        assert not hasattr(body, "code"), body
        share = len(positions) / ADAPTER.layout.size
        assert len(body.data) < whole * (0.1 + share)
    check_devices(fleet, lives, feedback=method.residual_lasts)


def check_devices(fleet: Federation, lives: list[tuple[int, ...]], *, feedback: bool) -> None:
    for world, device in zip(fleet.worlds, fleet.devices, strict=True):
        assert [type(event) for event in world.seen if isinstance(event, Step)].count(events.Trained) == 6
        assert not any(isinstance(event, events.GaveUp | events.Dropped) for event in world.seen)
        (transport,) = world.transports
        for (_, frame), live in zip(transport.frames, lives, strict=True):
            payload = payload_bytes(fleet.spec.codec, LiveSet(fleet.adapter.layout, live))
            assert payload < len(frame) <= update_limit_bytes(payload)
        residuals = list(device.journal.state.residuals.values())
        assert len(residuals) == (1 if feedback else 0)
        if feedback:
            left = np.frombuffer(residuals[0].data, "<f4")
            assert np.count_nonzero(left) > 0.5 * LiveSet(fleet.adapter.layout, lives[-1]).size


class Baseline(NamedTuple):
    method: str
    adapter: AdapterSpec
    frozen: Callable[[int], Collection[int]] = lambda round_number: ()  #: factors that a round leaves


def lora(method: str, *frozen: Literal["a", "b"]) -> Baseline:
    """frozen: of every pair, in rounds 1, 2, ... and again."""
    adapter = lora_adapter()

    def of_round(round_number: int) -> list[int]:
        return [getattr(pair, frozen[(round_number - 1) % len(frozen)]) for pair in adapter.lora_pairs]

    return Baseline(method, adapter, of_round if frozen else lambda round_number: ())


BASELINES = {
    "fedlora": lora('name = "fedlora"'),
    "ffa-lora": lora('name = "ffa-lora"', "a"),
    "rolora": lora('name = "rolora"', "a", "b"),
    "rolora, turns of two rounds": lora('name = "rolora"\nepoch_rounds = 2', "a", "a", "b", "b"),
    "dense-adapter": Baseline(
        'name = "dense-adapter"', small_adapter("dense", hidden=12, layers=1, head="tt", labels=5)
    ),
    "head-only": Baseline(
        'name = "head-only"', small_adapter("none", hidden=12, layers=1, head="dense", labels=5)
    ),
    "fedavg": lora('name = "fedavg"'),
}


class TowardsEverything(TowardsProducts):
    """Its loss, and ½ Σ (θ_i − t_i)² over the numbers of no LoRA pair, t by the batch's mean label."""

    def __init__(self, adapter: AdapterSpec) -> None:
        super().__init__(adapter)
        pairs = {index for pair in adapter.lora_pairs for index in (pair.a, pair.b)}
        others = [i for i in adapter.layout.everything.indices if i not in pairs]
        self._others = LiveSet(adapter.layout, others).positions

    def gradient(self, theta: Theta, batch: Batch) -> tuple[float, Theta]:
        assert batch.labels is not None
        loss, grad = super().gradient(theta, batch)
        goal = np.linspace(-2, 2, len(self._others), dtype=np.float32)
        away = theta[self._others] - goal - np.float32(batch.labels.mean() / 4)
        grad[self._others] = away
        return loss + 0.5 * float(away @ away), grad


@pytest.mark.parametrize("case", BASELINES)
def test_versions_of_a_baseline_are_the_means_of_what_devices_sent(case: str, tmp_path: Path) -> None:
    method, adapter, frozen = BASELINES[case]

    async def run() -> None:
        async with federation(tmp_path, text_of(method), adapter, runtime=TowardsEverything) as fleet:
            for _ in range(6):
                await fleet.round()
            versions, rounds = fleet.ledger()
            assert [version.updates for version in versions] == [0, 3, 3, 3, 3, 3, 3]
            for number, (before, after, round_) in enumerate(
                zip(versions, versions[1:], rounds, strict=False), 1
            ):
                left = frozen(number)
                everything = adapter.layout.everything.indices
                assert round_.live == tuple(i for i in everything if i not in left)
                check_mean(fleet, number, fleet.theta(before), fleet.theta(after))
            losses = [version.loss_last for version in versions[1:]]
            assert losses[-1] is not None
            assert losses[0] is not None
            assert losses[-1] < 0.8 * losses[0]
            check_devices(fleet, [round_.live for round_ in rounds], feedback=True)

    asyncio.run(run())


def check_mean(fleet: Federation, number: int, before: Theta, after: Theta) -> None:
    """Devices hold four examples each, so the mean is the plain one; what is not live stays bit by bit."""
    live = LiveSet(fleet.adapter.layout, fleet.ledger()[1][number - 1].live)
    frames = [world.transports[0].frames[number - 1][1] for world in fleet.worlds]
    deltas = [decode_delta(fleet.spec.codec, live, decode_update(frame)[1]) for frame in frames]
    mean = np.mean(np.array(deltas, np.float64), axis=0)
    np.testing.assert_allclose(live.gather(after), live.gather(before) + mean, rtol=1e-5, atol=1e-6)
    assert np.abs(mean).max() > 1e-3
    others = np.setdiff1d(np.arange(fleet.adapter.layout.size), live.positions)
    assert np.array_equal(after[others], before[others])


@pytest.mark.parametrize("method", ["exact-fedtt", "rolora"])
@pytest.mark.parametrize(("epoch_rounds", "is_taken"), [(1, False), (3, True)])
def test_a_late_update_counts_within_its_epoch_and_is_dropped_by_the_device_after_it(
    method: str, epoch_rounds: int, is_taken: bool, tmp_path: Path
) -> None:
    lines = f'name = "{method}"\nepoch_rounds = {epoch_rounds}'
    lines += "\northogonal = true" if method == "exact-fedtt" else ""
    text = text_of(lines, feedback=False, more="buffer = 2\nmax_staleness = 5")
    of_trains = method == "exact-fedtt"
    adapter, runtime = (ADAPTER, TowardsMatrices) if of_trains else (lora_adapter(), TowardsProducts)

    async def run() -> None:
        async with federation(tmp_path, text, adapter, runtime=runtime) as fleet:
            late, *quick = fleet.devices
            await late.run(until=lambda step: isinstance(step, events.Trained))
            for device in quick:
                await device.run(until=lambda step: isinstance(step, events.Acknowledged))
            step = await late.step()
            if is_taken:
                assert isinstance(step, events.Acknowledged)
            else:
                assert isinstance(step, events.Dropped)
                assert Code.STALE.value in step.reason
                assert "trained other factors" in step.reason
            # and life goes on
            await late.run(until=lambda step: isinstance(step, events.Acknowledged))

    asyncio.run(run())
