"""Groups over the coordinator: branches, what is put together, and what goes with whom."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from aggregator import admin
from aggregator.service import Service
from fedtt.algorithms import HierFedTT
from fedtt.label_counts import encode_label_counts
from fedtt.layout import LiveSet
from fedtt.messages import Problem, Receipt, UpdateState, Wait, Work
from fedtt.server_optimiser import ServerSpec
from storage.records import MAIN, DeviceState, Group, RoundState, TaskState
from tests.support.clock import VirtualClock
from tests.support.groups import ADAPTER, GroupedServer, grouped_task


@pytest.fixture
def server() -> GroupedServer:
    """After the warm-up: four devices measured, two groups."""
    server = GroupedServer(grouped_task())
    assert server.everyone() == 4
    return server


def group_of(server: GroupedServer, device: str) -> int | None:
    with server.store.reading() as tx:
        return tx.group_of(server.task_id, device)


def set_groups(server: GroupedServer, **changes: Any) -> None:
    """Have every group do as told from its next round on; open rounds are taken back."""
    task = server.task()
    groups = tuple(replace(group, **changes) for group in task.groups)
    with server.store.transaction() as tx:
        tx.put_task(replace(task, groups=groups))
        for group in groups:
            round_ = tx.latest_round(task.id, group.branch)
            assert round_ is not None
            live = last_blocks(group.depth).indices
            tx.put_round(replace(round_, live=live))


def last_blocks(depth: int) -> LiveSet:
    return HierFedTT().live_at(ADAPTER, depth)


def work_of(server: GroupedServer) -> dict[str, Work]:
    answers = {device: server.check_in(device) for device in server.devices}
    return {device: answer for device, answer in answers.items() if isinstance(answer, Work)}


def test_the_warm_up_ends_in_groups_whose_branches_begin_with_its_version(server: GroupedServer) -> None:
    task, main = server.task(), server.versions()
    assert [group.number for group in task.groups] == [1, 2]
    for group in task.groups:
        (first,) = server.versions(group.branch)
        assert (first.number, first.sha256, first.parents) == (0, main[1].sha256, (main[1].sha256,))
        assert (group.cohort, group.buffer, group.quorum, group.round_s) == (2, 2, 1, 5.0)
    check_labels(server)


def check_labels(server: GroupedServer) -> None:
    with server.store.reading() as tx:
        members = tx.members(server.task_id)
        labels = {p.device_id: p.label_counts for p in tx.participants(server.task_id)}
    assert len(members) == 4
    for number in (1, 2):  # of each kind of labels one
        assert len({labels[d] for d, group in members.items() if group == number}) == 2


def test_groups_have_all_labels_also_where_these_are_estimated_from_updates() -> None:
    server = GroupedServer(grouped_task(method={"label_epsilon": None, "label_source": "updates"}))
    work = work_of(server)
    assert {held.plan.label_epsilon for held in work.values()} == {None}
    server.everyone()
    check_labels(server)
    with server.store.reading() as tx:
        found = {p.label_counts for p in tx.participants(server.task_id)}
    assert found == {encode_label_counts((5, 0)), encode_label_counts((0, 5))}  # of five examples each


def test_a_device_that_is_in_no_group_yet_joins_one_and_stays(server: GroupedServer) -> None:
    (new, *_) = [device for device in server.devices if group_of(server, device) is None]
    server.check_in(new)
    joined = group_of(server, new)
    assert joined == 2  # the slowest
    server.check_in(new)
    assert group_of(server, new) == joined


def test_a_measured_device_without_a_group_joins_the_one_that_lacks_its_labels(server: GroupedServer) -> None:
    members = [device for device in server.devices if group_of(server, device)]
    with server.store.transaction() as tx:
        tx.put_members(server.task_id, dict.fromkeys(members[:1], 9))  # a group that is no more
        of_one = tx.participation(server.task_id, members[0])
    assert of_one is not None
    assert of_one.label_counts is not None
    server.check_in(members[0])
    with server.store.reading() as tx:
        labels = {p.device_id: p.label_counts for p in tx.participants(server.task_id)}
        group = tx.group_of(server.task_id, members[0])
        other = [labels[d] for d, g in tx.members(server.task_id).items() if g == group and d != members[0]]
    assert of_one.label_counts not in other


def test_devices_train_the_last_blocks_on_the_branch_of_their_group(server: GroupedServer) -> None:
    set_groups(server, depth=2)
    for device, work in work_of(server).items():
        with server.store.reading() as tx:
            lease = tx.lease(work.lease)
        assert lease is not None
        assert lease.branch == f"group-{group_of(server, device)}"
        blocks = {ADAPTER.block_of(index) for index in work.plan.live}
        assert blocks == {1, 2, None}
        assert work.plan.version == server.versions(lease.branch)[-1].sha256


def test_groups_hold_their_rounds_then_wait_and_are_put_together_once() -> None:
    server = GroupedServer(grouped_task(), devices=4)
    server.everyone()
    set_groups(server, frequency=2)
    work = work_of(server)
    fast = [device for device in work if group_of(server, device) == 1]
    for device in fast:
        assert isinstance(server.upload(device, work[device], 0.5), Receipt)
    server.tick()
    for device in fast:
        again = server.check_in(device)
        assert isinstance(again, Work)
        assert again.plan.version == server.versions("group-1")[1].sha256
        assert isinstance(server.upload(device, again, 0.5), Receipt)
    server.tick()
    assert [g.ended for g in server.task().groups] == [2, 0]
    answer = server.check_in(fast[0])
    assert isinstance(answer, Wait)
    assert answer.reason == "its group waits for the others"
    assert len(server.versions()) == 2
    for _ in range(2):
        for device, held in work_of(server).items():
            assert isinstance(server.upload(device, held, -0.25), Receipt)
        server.tick()
    main, (before, *_) = server.versions(), server.versions("group-1")
    assert len(main) == 3
    groups = [server.versions(f"group-{number}") for number in (1, 2)]
    assert [len(versions) for versions in groups] == [4, 4]
    assert main[2].parents == (before.sha256, groups[0][2].sha256, groups[1][2].sha256)
    assert main[2].updates == 8
    assert {versions[3].sha256 for versions in groups} == {main[2].sha256}
    assert all(versions[3].parents == (main[2].sha256,) for versions in groups)
    # (1.0 + -0.5) / 2 of equal weights
    live = last_blocks(1)
    moved = server.theta(main[2]) - server.theta(main[1])
    np.testing.assert_allclose(live.gather(moved), 0.25, rtol=1e-6)
    assert not np.delete(moved, live.positions).any()
    assert main[2].report["agreement"] == pytest.approx(0.25**2 / ((1 + 0.25) / 2))


def test_blocks_below_a_groups_depth_come_down_to_it_when_others_changed_them(server: GroupedServer) -> None:
    shallow, deep = 1, 2
    task = server.task()
    with server.store.transaction() as tx:
        groups = tuple(replace(g, depth=1 if g.number == shallow else 3, frequency=1) for g in task.groups)
        tx.put_task(replace(task, groups=groups))
        for group in groups:
            round_ = tx.latest_round(task.id, group.branch)
            assert round_ is not None
            live = last_blocks(group.depth).indices
            tx.put_round(replace(round_, live=live))
    for device, work in work_of(server).items():
        server.upload(device, work, 1.0 if group_of(server, device) == deep else 0.5)
    server.tick()
    before, after = server.versions(f"group-{shallow}")[0], server.versions(f"group-{shallow}")[-1]
    moved = ADAPTER.layout.unflatten(server.theta(after) - server.theta(before))
    for name, change in moved.items():
        # block 2 and the head: the mean of both; below it the deep group alone
        expected = 0.75 if name.startswith(("block.2", "head")) else 1.0
        np.testing.assert_allclose(change, expected, rtol=1e-6)


def test_a_groups_weight_is_that_of_one_of_its_folds(server: GroupedServer) -> None:
    set_groups(server, frequency=1)
    work = work_of(server)
    alone = next(device for device in work if group_of(server, device) == 1)
    for device, held in work.items():
        if device == alone or group_of(server, device) == 2:
            server.upload(device, held, 3.0 if device == alone else 0.0)
    server.now += 101.0
    server.tick()
    live = last_blocks(1)
    main = server.versions()
    moved = live.gather(server.theta(main[2]) - server.theta(main[1]))
    np.testing.assert_allclose(moved, 1.0, rtol=1e-6)  # (5 · 3 + 10 · 0) / (5 + 10)


def test_the_server_optimiser_takes_the_global_step_alone() -> None:
    spec = replace(grouped_task(), server=ServerSpec(learning_rate=0.5))
    server = GroupedServer(spec)
    server.everyone(1.0)
    np.testing.assert_allclose(server.theta(server.versions()[1]), 0.5, rtol=1e-6)  # a warm-up is ordinary
    set_groups(server, frequency=1, depth=3)
    server.everyone(1.0)
    for branch in ("group-1", "group-2"):
        np.testing.assert_allclose(server.theta(server.versions(branch)[1]), 1.5, rtol=1e-6)
    np.testing.assert_allclose(server.theta(server.versions()[2]), 1.0, rtol=1e-6)


def test_a_group_nobody_comes_for_holds_up_the_others_for_a_deadline_only(server: GroupedServer) -> None:
    set_groups(server, frequency=1)
    for device, work in work_of(server).items():
        if group_of(server, device) == 1:
            server.upload(device, work, 1.0)
    given = [work.lease for work in work_of(server).values()]
    with server.store.transaction() as tx:  # the other group's leases are all given back
        for lease in map(tx.lease, given):
            assert lease is not None
            server.coordinator.fail(tx, lease.device_id, lease.id)
    server.tick()
    server.now += 100.0
    server.tick()
    assert len(server.versions()) == 3
    assert server.versions()[2].report["groups_folded"] == 1
    with server.store.reading() as tx:
        states = [r.state for r in tx.rounds(server.task_id) if r.branch == "group-2"]
    assert RoundState.ABANDONED in states


def test_a_group_without_a_device_is_left_out() -> None:
    server = GroupedServer(grouped_task(), devices=4)
    server.everyone()
    set_groups(server, frequency=1)
    for device in server.devices:
        if group_of(server, device) == 2:
            with server.store.transaction() as tx:
                server.coordinator.leave(tx, device, erase=False)
    for _ in range(3):
        server.everyone()
        server.now += 100.0
        server.tick()
    task = server.task()
    assert [group.number for group in task.groups] == [1]
    assert task.groups[0].cohort == 4
    assert len(server.versions()) > 3


def test_where_no_group_folds_anything_the_period_begins_again_and_at_last_the_task_pauses(
    server: GroupedServer,
) -> None:
    for _ in range(6):
        work_of(server)
        server.now += 101.0
        server.tick()
    task = server.task()
    assert task.state is TaskState.PAUSED
    assert "rounds in a row were abandoned" in task.reason
    assert len(server.versions()) == 2
    assert len(server.versions("group-1")) == 1
    with server.store.transaction() as tx:
        server.coordinator.lifecycle.set_active(tx, 0.0, "groups", TaskState.ACTIVE, "")
    for _ in range(3):
        server.everyone()
    assert len(server.versions()) > 2


def test_a_sum_of_groups_that_is_not_finite_begins_the_period_again_from_the_version_before() -> None:
    server = GroupedServer(replace(grouped_task(), server=ServerSpec(learning_rate=10.0)))
    server.everyone(0.0)
    set_groups(server, frequency=1)
    server.everyone(3e38)
    main = server.versions()
    assert len(main) == 2
    for group in server.task().groups:
        versions = server.versions(group.branch)
        assert [v.number for v in versions] == [0, 1, 2]
        assert versions[2].sha256 == main[1].sha256
        assert (group.version_number, group.ended) == (2, 0)
    with server.store.reading() as tx:
        reasons = [r.reason for r in tx.rounds(server.task_id) if r.branch == MAIN]
    assert "is not finite" in reasons[0]


def test_groups_are_formed_anew_every_so_often() -> None:
    server = GroupedServer(grouped_task({"count": 9}, {"regroup_every": 2}), devices=8)
    server.everyone()
    with server.store.reading() as tx:
        assert len(tx.members(server.task_id)) == 4
    for _ in range(8):
        server.everyone()
    assert len(server.versions()) >= 5
    with server.store.reading() as tx:
        members, measured = tx.members(server.task_id), tx.participants(server.task_id)
    assert len(measured) == 8
    sizes = [list(members.values()).count(number) for number in (1, 2)]
    assert sizes == [4, 4]


def test_stopping_ends_the_rounds_of_all_groups(server: GroupedServer) -> None:
    work = work_of(server)
    device, held = next(iter(work.items()))
    server.upload(device, held, 0.1)
    with server.store.transaction() as tx:
        server.coordinator.lifecycle.stop(tx, server.now, "groups", "enough")
    with server.store.reading() as tx:
        assert all(r.state is not RoundState.OPEN for r in tx.rounds(server.task_id))
        receipt = server.coordinator.receipt(tx, device, held.lease)
    assert isinstance(receipt, Receipt)
    assert receipt.state is UpdateState.DISCARDED
    server.tick()
    assert len(server.versions()) == 2


def test_an_update_of_the_warm_up_that_comes_after_it_is_refused() -> None:
    server = GroupedServer(grouped_task({"buffer": 3}))
    work = work_of(server)
    late, *others = work
    for device in others:
        server.upload(device, work[device], 0.1)
    server.tick()
    assert server.task().groups
    answer = server.upload(late, work[late], 0.1)
    assert isinstance(answer, Problem)
    assert answer.code.value == "stale"


def test_labels_are_asked_for_until_they_are_told_and_go_with_an_erased_device(server: GroupedServer) -> None:
    told = next(device for device in server.devices if group_of(server, device))
    new = next(device for device in server.devices if not group_of(server, device))
    found = {device: work.plan.label_epsilon for device, work in work_of(server).items()}
    assert found[told] is None
    assert found.get(new, 1.0) == 1.0
    with server.store.transaction() as tx:
        server.coordinator.leave(tx, told, erase=True)
        part, device = tx.participation(server.task_id, told), tx.device(told)
    assert part is not None
    assert device is not None
    assert (part.label_counts, device.state) == (None, DeviceState.ERASED)
    assert group_of(server, told) is None


def test_labels_are_kept_when_a_later_update_does_not_repeat_them(server: GroupedServer) -> None:
    work = work_of(server)
    device = next(iter(work))
    with server.store.reading() as tx:
        before = tx.participation(server.task_id, device)
    server.upload(device, work[device], 0.1)
    with server.store.reading() as tx:
        after = tx.participation(server.task_id, device)
    assert before is not None
    assert after is not None
    assert before.label_counts in {encode_label_counts((1, 9)), encode_label_counts((9, 1))}
    assert after.label_counts == before.label_counts
    assert before.work == 1.0
    assert after.work == pytest.approx((1 + 2 * 1 / 3) / 3)


def test_a_waiting_group_is_one_that_has_held_its_rounds() -> None:
    group = Group(
        number=3, version_number=0, frequency=2, depth=1, cohort=1, buffer=1, quorum=1, round_s=1.0, ended=1
    )
    assert not group.waits
    assert replace(group, ended=2).waits
    assert group.branch == "group-3"


def test_an_operator_sees_groups_their_rounds_and_what_waits_in_all_of_them() -> None:
    grouped = GroupedServer(grouped_task())
    service = Service(grouped.store, grouped.blobs, VirtualClock(), inline=True)
    shown = asyncio.run(admin.show_task(service, "groups"))
    assert not isinstance(shown, Problem)
    assert shown.groups == []
    grouped.everyone()
    for device, work in list(work_of(grouped).items())[:3]:
        grouped.upload(device, work, 0.1)
    shown = asyncio.run(admin.show_task(service, "groups"))
    rounds = asyncio.run(admin.list_rounds(service, "groups", 10))
    assert not isinstance(shown, Problem)
    assert isinstance(rounds, list)
    assert [row.number for row in shown.groups] == [1, 2]
    assert sum(row.devices for row in shown.groups) >= 4
    assert shown.updates_in_round == 3
    assert {row.branch for row in rounds} == {"main", "group-1", "group-2"}
