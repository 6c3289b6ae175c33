"""Short versions of `python -m benchmarks.faults`: what a server process survives."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.faults.attacks import attacked
from benchmarks.faults.colluding import colluding
from benchmarks.faults.flips import damaged
from benchmarks.faults.fold import folded
from benchmarks.faults.full_disk import filled
from benchmarks.faults.herd import herd
from benchmarks.faults.hostile import bounded, refusals
from benchmarks.faults.judges import run as judged
from benchmarks.faults.kill import killed
from benchmarks.faults.ledger import NOTHING_WRONG
from benchmarks.faults.power import cut
from benchmarks.faults.row import Outcome, Setting
from benchmarks.faults.soak import soaked
from benchmarks.faults.syscalls import calls_in, injected, was_injected
from benchmarks.harness import Report

pytestmark = pytest.mark.slow


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(report=Report("faults", None), directory=tmp_path, quick=True)


def wrong(outcome: Outcome) -> dict[str, float | int | str]:
    """The figures of an audit that should be zero and are not."""
    assert set(NOTHING_WRONG) <= set(outcome.figures)
    return {name: outcome.figures[name] for name in NOTHING_WRONG if outcome.figures[name] != 0}


async def test_a_server_killed_again_and_again_loses_and_doubles_nothing(setting: Setting) -> None:
    outcome = await killed(setting, count=12, kills=3, up_s=0.3)
    assert wrong(outcome) == {}
    assert int(outcome.figures["acknowledged"]) >= 3
    assert int(outcome.figures["unreachable"]) > 0


async def test_one_of_two_servers_on_one_file_killed_again_and_again_loses_and_doubles_nothing(
    setting: Setting,
) -> None:
    outcome = await killed(setting, count=12, kills=3, up_s=0.3, servers=2)
    assert wrong(outcome) == {}
    assert int(outcome.figures["acknowledged"]) >= 3


def test_calls_are_counted_of_threads_with_short_and_with_long_numbers() -> None:
    log = (
        '417   fdatasync(9) = 0\n417   fdatasync(9) = 0\n31234 fdatasync(9) = 0\n31234 write(2, "", 0) = 0\n'
    )
    assert calls_in(log) == {"fdatasync": 2, "write": 1}


def test_an_error_counts_as_met_where_strace_says_so() -> None:
    call = "417   fdatasync(9)"
    assert was_injected(
        f"{call} = 0\n417   <... fdatasync resumed>) = -1 EIO (Input/output error) (INJECTED)\n"
    )
    assert not was_injected(f"{call} = -1 EIO (Input/output error)\n{call} = 0\n")
    assert not was_injected("")


async def test_a_server_whose_writes_fail_or_end_it_loses_and_doubles_nothing(setting: Setting) -> None:
    outcome = await injected(setting, most=3)
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert wrong(outcome) == {}
    assert (outcome.figures["faults"], outcome.figures["not_recovered"]) == (3, 0)
    met = int(outcome.figures["deaths"]) + int(outcome.figures["struck"])
    assert met >= 2  # a call that only some rounds make may not come in any of the tries
    assert outcome.figures["acknowledged"] == 4 * int(outcome.figures["rounds"])  # of 4 devices each


async def test_one_device_moves_the_model_by_its_bounded_norm_and_weight_and_no_further(
    setting: Setting,
) -> None:
    assert await bounded(setting) == {"moved_over_bound": 1.0}


async def test_hostile_values_are_all_refused_and_an_honest_update_is_taken_after_them(
    setting: Setting,
) -> None:
    figures = await refusals(setting)
    assert (figures["hostile_sent"], figures["hostile_taken"], figures["server_errors"]) == (14, 0, 0)
    assert sum(int(count) for name, count in figures.items() if name.startswith("refused_")) == 14


async def test_three_of_ten_judges_neither_hold_a_good_version_nor_release_a_worse_one(
    setting: Setting,
) -> None:
    outcome = await judged(setting)
    assert outcome.figures == {"good_held": 0, "good_released": 2, "worse_held": 2, "worse_released": 0}


def test_a_fifth_of_colluding_devices_costs_a_robust_fold_little_and_the_plain_mean_much(
    setting: Setting,
) -> None:
    figures = colluding(setting, rounds=10, divisions=1)
    assert figures["points_lost_best_fold"] == figures["points_lost_best_fold_worst_division"]
    assert float(figures["points_lost_best_fold"]) <= 2.0  # in this division, not in each
    assert float(figures["points_lost_plain_mean_in_opposite"]) > 20.0


async def test_damaged_updates_are_refused_in_each_codec_and_the_sound_one_is_taken(setting: Setting) -> None:
    outcome = await damaged(setting, stride=101)
    assert outcome.failures == []


async def test_a_server_whose_disk_runs_full_goes_on_by_itself_once_there_is_room(setting: Setting) -> None:
    outcome = await filled(setting, times=1, full_s=0.5)
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert wrong(outcome) == {}
    assert outcome.figures["died"] == 0
    assert int(outcome.figures["refused_busy"]) > 0


async def test_power_cuts_lose_nothing_that_was_acknowledged(setting: Setting) -> None:
    outcome = await cut(setting, lives=1, cuts=25)
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert wrong(outcome) == {}
    assert int(outcome.figures["expected"]) > 25
    assert int(outcome.figures["spoiled_without_syncs"]) >= 1


async def test_a_herd_of_check_ins_is_answered_and_comes_back_spread_out(setting: Setting) -> None:
    outcome = await herd(setting, count=300)
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert outcome.figures["answered"] == 300
    assert float(outcome.figures["arrivals_spread_s"]) > 90  # of 100 s over which they are told to return


async def test_honest_devices_go_on_while_others_flood_and_stall(setting: Setting) -> None:
    outcome = await attacked(setting, slow=100, seconds=2)
    assert wrong(outcome) == {}
    assert (outcome.figures["died"], outcome.figures["server_errors"]) == (0, 0)
    assert int(outcome.figures["acknowledged"]) > 0
    late = {"acknowledged", "honest_p99_s", "slowest_refused_p99_s"}  # which say little while other tests run
    assert [failure for failure in outcome.failures if failure.split(" ")[0] not in late] == []


async def test_a_fold_leaves_no_update_and_no_payload_in_memory_that_many_updates_share(
    setting: Setting,
) -> None:
    outcome = await folded(setting, few=100, many=900, codecs=("fp32",))
    assert outcome.failures == []  # 800 more updates are 61 MB, twice what the sum of many may take more


async def test_a_server_under_steady_load_keeps_its_files_and_sockets(setting: Setting) -> None:
    outcome = await soaked(setting, count=10, seconds=6, every_s=0.1)
    assert wrong(outcome) == {}
    assert outcome.failures == []
