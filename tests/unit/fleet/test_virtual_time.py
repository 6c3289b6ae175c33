from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtt.errors import Declined
from fleet.virtual_time import VirtualTime, at_once


def forever() -> bool:
    return False


@given(st.lists(st.lists(st.floats(0, 100), max_size=5), max_size=8))
def test_everybody_sleeps_for_as_long_as_asked_and_time_never_goes_back(plans: list[list[float]]) -> None:
    time = VirtualTime(1000.0)
    seen: list[float] = []
    slept: dict[int, float] = {}

    async def life(number: int, plan: list[float]) -> None:
        begun = time.now()
        for seconds in plan:
            await time.sleep(seconds)
            seen.append(time.now())
        slept[number] = time.now() - begun

    for number, plan in enumerate(plans):
        time.start(life(number, plan))
    time.run(forever)
    assert seen == sorted(seen)
    assert slept == pytest.approx({number: sum(plan) for number, plan in enumerate(plans)})


def test_who_wakes_at_the_same_time_runs_in_the_order_of_going_to_sleep() -> None:
    time, seen = VirtualTime(), []

    async def life(name: str, naps: tuple[float, ...]) -> None:
        for nap in naps:
            await time.sleep(nap)
        seen.append(name)

    time.start(life("two naps", (1.0, 1.0)))
    time.start(life("one nap", (2.0,)))
    time.start(life("another", (2.0,)))
    time.run(forever)
    assert seen == ["one nap", "another", "two naps"]


def test_time_stops_at_the_end_asked_for_and_goes_on_from_there() -> None:
    time, seen = VirtualTime(), []
    time.call_at(5.0, lambda: seen.append(time.now()))
    time.run(forever, 3.0)
    assert (time.now(), seen) == (3.0, [])
    time.run(forever)
    assert (time.now(), seen) == (5.0, [5.0])


def test_a_killed_life_runs_its_finally_blocks_alone_and_a_stopped_one_is_cancelled() -> None:
    time, seen = VirtualTime(), []

    async def life(name: str) -> None:
        try:
            await time.sleep(10)
            seen.append(f"{name} woke")
        except asyncio.CancelledError:
            seen.append(f"{name} cancelled")
            raise
        finally:
            seen.append(f"{name} over")

    killed, stopped = time.start(life("killed")), time.start(life("stopped"))
    killed.kill()
    stopped.stop()
    time.run(forever)
    assert seen == ["killed over", "stopped cancelled", "stopped over"]
    assert killed.over
    assert stopped.over


def test_what_a_life_raises_comes_out_of_the_run_and_the_others_go_on() -> None:
    time, seen = VirtualTime(), []

    async def fails() -> None:
        await time.sleep(1)
        raise KeyError("a bug")

    async def lives() -> None:
        await time.sleep(2)
        seen.append("lives")

    time.start(fails())
    time.start(lives())
    with pytest.raises(KeyError, match="a bug"):
        time.run(forever)
    time.run(forever)
    assert seen == ["lives"]


def test_awaiting_what_only_asyncio_can_do_is_an_error_that_says_so() -> None:
    time = VirtualTime()
    with pytest.raises(RuntimeError, match="only asyncio"):
        time.start(asyncio.sleep(0))


def test_a_coroutine_run_at_once_may_not_sleep() -> None:
    time = VirtualTime()

    async def three() -> int:
        await time.sleep(0)
        return 3

    assert at_once(three()) == 3
    with pytest.raises(RuntimeError, match="without sleeping"):
        at_once(time.sleep(1))


# work while conditions hold, as `edge_client.conditions.while_holding` does it on a real loop


def held(
    time: VirtualTime, naps: list[float], breaks_at: float, *, result_on_cancel: bool = False
) -> list[object]:
    """What becomes of work with these naps under conditions that are asked for every 5 s: (what, when)."""
    seen: list[object] = []

    async def work() -> str:
        try:
            for nap in naps:
                await time.sleep(nap)
        except asyncio.CancelledError:
            seen.append(("cancelled", time.now()))
            if result_on_cancel:
                return "all the same"
            raise
        finally:
            seen.append(("over", time.now()))
        return "done"

    async def broken() -> str:
        return "hot" if time.now() >= breaks_at else ""

    async def life() -> None:
        try:
            seen.append((await time.held(work, broken, 5.0), time.now()))
        except Declined as error:
            seen.append((str(error), time.now()))

    time.start(life())
    time.run(forever)
    return seen


def test_work_whose_conditions_hold_comes_to_its_end_in_its_own_time() -> None:
    assert held(VirtualTime(), [3.0, 4.0, 2.5], 100.0) == [("over", 9.5), ("done", 9.5)]
    assert held(VirtualTime(), [], 100.0) == [("over", 0.0), ("done", 0.0)]
    assert held(VirtualTime(), [5.0, 5.0], 10.0) == [("over", 10.0), ("done", 10.0)]


def test_work_ends_at_the_first_look_after_conditions_broke() -> None:
    cancelled = [("cancelled", 15.0), ("over", 15.0), ("hot", 15.0)]
    assert held(VirtualTime(), [100.0], 12.0) == cancelled
    assert held(VirtualTime(), [1.0] * 100, 12.0) == cancelled


def test_work_is_not_begun_where_they_do_not_hold() -> None:
    assert held(VirtualTime(), [1.0], 0.0) == [("hot", 0.0)]


def test_work_that_has_a_result_when_it_is_cancelled_keeps_it() -> None:
    found = held(VirtualTime(), [100.0], 12.0, result_on_cancel=True)
    assert found == [("cancelled", 15.0), ("over", 15.0), ("all the same", 15.0)]


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_who_is_ended_while_it_works_ends_the_work(end: str) -> None:
    time, seen = VirtualTime(), []

    async def work() -> None:
        try:
            await time.sleep(100.0)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise
        finally:
            seen.append("over")

    async def broken() -> str:
        return ""

    async def life() -> None:
        await time.held(work, broken, 5.0)

    running = time.start(life())
    time.call_at(12.0, getattr(running, end))
    time.run(forever)
    assert seen == (["cancelled", "over"] if end == "stop" else ["over"])


def test_an_error_of_the_work_comes_out() -> None:
    time = VirtualTime()

    async def work() -> None:
        await time.sleep(1.0)
        raise ValueError("disk full")

    async def broken() -> str:
        return ""

    async def life() -> None:
        await time.held(work, broken, 5.0)

    time.start(life())
    with pytest.raises(ValueError, match="disk full"):
        time.run(forever)
