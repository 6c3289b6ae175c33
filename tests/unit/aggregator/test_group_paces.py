"""How deep and how often groups train, from what the ledger shows."""

from __future__ import annotations

import itertools
import math

import pytest
from msgspec.structs import replace

from fedtt.messages import Receipt
from tests.support.groups import GroupedServer, grouped_task
from tests.unit.aggregator.test_grouping import group_of, last_blocks, set_groups, work_of


def a_period(
    server: GroupedServer, takes_s: tuple[float, float], losses: tuple[list[float], list[float]]
) -> None:
    """Both groups hold a round for every two losses, of its first local step and of its last."""
    for each in range(0, len(losses[0]), 2):
        work = work_of(server)
        for number in (1, 2):
            server.now += takes_s[number - 1] - (takes_s[0] if number == 2 else 0.0)
            for device, held in work.items():
                if group_of(server, device) == number:
                    first, last = losses[number - 1][each : each + 2]
                    assert isinstance(server.upload(device, held, 0.5, losses=(first, last)), Receipt)
            server.tick()


def best_by_all_pairs(server: GroupedServer, drops: tuple[float, float]) -> tuple[tuple[int, int], ...]:
    """(τ, d) of both groups after a round each at full depth, by every pair there is and time alone.

    a_g = drop / (h(τ) (d/D)^ρ), the most Σ a_g h(τ_g) (d_g/D)^ρ a second, unless (1, D) comes within a tenth.
    """
    report, round_s = server.versions()[-1].report, [group.round_s for group in server.task().groups]
    q, rho = min(report["agreement"], 0.99), report["depth_exponent"]

    def a_second(paces: tuple[tuple[int, int], ...]) -> float:
        gained = sum(
            a * sum(q**k for k in range(tau)) * (depth / 3) ** rho  # h(1) = (D/D)^ρ = 1, so a_g is the drop
            for a, (tau, depth) in zip(drops, paces, strict=True)
        )
        lasts = (s * tau * (1 + 2 * d / 3) / 3 for s, (tau, d) in zip(round_s, paces, strict=True))
        return float(gained / max(lasts))

    one = list(itertools.product(range(1, 5), range(1, 4)))
    best = max(itertools.product(one, repeat=2), key=a_second)
    held = ((1, 3), (1, 3))
    return held if a_second(best) < 1.1 * a_second(held) else best


def test_paces_follow_the_drops_of_loss_that_the_ledger_shows() -> None:
    """Two tasks alike but for whose loss fell: the quick group's, or the slow one's that it waits for."""
    found = []
    for drops in ((0.5, 0.001), (0.001, 0.5)):
        server = GroupedServer(grouped_task(method={"bytes_weight": 0.0}), devices=4)
        server.everyone()
        set_groups(server, frequency=1, depth=3)
        a_period(server, (5.0, 40.0), ([1.0, 1.0 - drops[0]], [1.0, 1.0 - drops[1]]))
        assert len(server.versions()) == 3
        paces = tuple((group.frequency, group.depth) for group in server.task().groups)
        assert paces == best_by_all_pairs(server, drops)
        found.append(paces)
    assert found[0][1][1] < found[1][1][1]  # for the quick group's sake the slow one trains shallower


def test_a_drop_goes_from_the_first_folds_first_steps_to_the_last_folds_last() -> None:
    server = GroupedServer(grouped_task(), devices=4)
    server.everyone()
    task = server.task()
    with server.store.transaction() as tx:
        groups = tuple(replace(g, depth=1 if g.number == 1 else 3, frequency=2) for g in task.groups)
        tx.put_task(replace(task, groups=groups))
        for group in groups:
            round_ = tx.latest_round(task.id, group.branch)
            assert round_ is not None
            tx.put_round(replace(round_, live=last_blocks(group.depth).indices))
    a_period(server, (5.0, 5.0), ([2.0, 1.75, 1.9, 1.5], [2.0, 1.8, 1.4, 1.0]))
    main = server.versions()
    assert len(main) == 3
    q = min(main[-1].report["agreement"], 0.99)
    x = [math.log(1 / 3), math.log(3 / 3)]
    y = [math.log(drop / (1 + q)) for drop in (2.0 - 1.5, 2.0 - 1.0)]
    x, y = [v - sum(x) / 2 for v in x], [v - sum(y) / 2 for v in y]
    slope = (sum(a * b for a, b in zip(x, y, strict=True)) + 0.5 * 0.5) / (sum(a * a for a in x) + 0.5)
    assert main[-1].report["depth_exponent"] == pytest.approx(slope)
