from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from benchmarks.claims import __main__ as claims
from benchmarks.claims.case import Point, Result
from benchmarks.claims.plan import Arm, Case, Plan, Set, plans, read_plan, small
from benchmarks.claims.report import write_report
from fedtt.errors import ConfigError

PLAN = Plan(
    title="Two methods",
    question="Which?",
    reduced="all of it",
    verdict="The second, here.",
    sets=(Set(name="toy"),),
    arms=(Arm(name="one"), Arm(name="two", partitions=("skewed",))),
    partitions={"iid": {"kind": "iid"}, "skewed": {"kind": "dirichlet", "alpha": 0.1}},
    rates=(0.1, 0.2),
    search_partition="skewed",
    seeds=(0, 1),
)


def _result(case: Case, accuracy: float, rate: float = 0.1) -> Result:
    points = [
        Point(0, 0.5, 1.0, 0, 0, 0, 0.0),
        Point(1, accuracy - 0.005, 0.7, 1000, 1100, 3000, 60.0),
        Point(2, accuracy, 0.6, 2000, 2200, 6000, 120.0),
    ]
    return Result(
        set=case.set.shown,
        partition=case.partition,
        arm=case.arm.name,
        seed=case.seed,
        rate=rate,
        digest=case.digest,
        trained_numbers=1234,
        rounds=2,
        participations=4,
        curve=points,
        wall_s=1.0,
        sha256="",
        searched=case.is_search,
    )


def _row(page: str, arm: str) -> list[str]:
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {arm} ")]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("name", plans())
def test_every_plan_beside_the_runner_can_be_read_and_asks_for_three_seeds(name: str) -> None:
    plan = read_plan(plans()[name])
    assert plan.seeds == (0, 1, 2)
    assert {case.arm.name for case in plan.cases()} == {arm.name for arm in plan.arms}
    chosen = read_plan(plans()[plan.rates_from or name])
    own = {arm.name for arm in chosen.arms}
    assert all((arm.rate_of or arm.name) in own for arm in plan.arms)
    # which the report counts the trained numbers by
    assert {case.settings("task")["codec"]["quantise"] for case in plan.cases()} == {"fp32"}


def test_every_arm_has_as_many_searches_and_none_on_a_reported_seed() -> None:
    searches = list(PLAN.searches())
    assert [(case.arm.name, case.rate) for case in searches] == [
        (arm, rate) for arm in ("one", "two") for rate in (0.1, 0.2)
    ]
    assert not {case.seed for case in searches} & set(PLAN.seeds)


def test_arms_that_are_compared_by_time_have_as_long_to_search_and_to_run() -> None:
    plan = read_plan(plans()["hierarchy"])
    for cases, last_s in ((plan.cases(), 4500.0), (plan.searches(), 2700.0)):
        found = list(cases)
        assert {case.settings("fleet")["last_s"] for case in found} == {last_s}
        assert {case.settings("task")["rounds"]["count"] for case in found} == {500}
        assert not any(case.is_cut for case in found)
    longer = msgspec.structs.replace(plan, search_s=3000.0)
    assert not {case.digest for case in longer.searches()} & {case.digest for case in plan.searches()}
    assert [case.digest for case in longer.cases()] == [case.digest for case in plan.cases()]


def test_a_plan_by_time_says_how_long_a_search_lasts(tmp_path: Path) -> None:
    path = tmp_path / "by-time.toml"
    path.write_text(plans()["hierarchy"].read_text().replace("search_s = 2700.0\n", ""))
    with pytest.raises(ConfigError, match="search_s"):
        read_plan(path)


def test_a_quick_run_leaves_methods_the_rounds_in_which_they_measure() -> None:
    found = {arm.name: arm.task["rounds"] for arm in small(read_plan(plans()["hierarchy"])).arms}
    assert found["FedLoRA r8"] == {"count": 2}
    assert found["HierFedLoRA r8"] == {"count": 3}
    assert found["FedLoRA r8, first 6 of 9"] == {"count": 2, "buffer": 6}


def test_an_arm_is_run_on_its_own_partitions_alone_and_seed_by_seed() -> None:
    found = [(case.seed, case.partition, case.arm.name) for case in PLAN.cases()]
    one_seed = [("iid", "one"), ("skewed", "one"), ("skewed", "two")]
    assert found == [(seed, *rest) for seed in (0, 1) for rest in one_seed]


def test_the_same_run_has_one_digest_whatever_plan_asks_for_it() -> None:
    other = msgspec.structs.replace(PLAN, title="Another", question="", seeds=(1,))
    known = {(case.partition, case.arm.name, case.seed): case.digest for case in PLAN.cases()}
    for case in other.cases():
        assert case.digest == known[case.partition, case.arm.name, case.seed]
    changed = msgspec.structs.replace(PLAN, model={"depth": 2})
    assert not {case.digest for case in changed.cases()} & set(known.values())


def test_a_plan_chooses_rates_or_takes_them_and_not_both(tmp_path: Path) -> None:
    path = tmp_path / "both.toml"
    path.write_text(
        plans()["methods"].read_bytes().decode().replace("rates =", 'rates_from = "ranks"\nrates =')
    )
    with pytest.raises(ConfigError, match="rates_from"):
        read_plan(path)


def test_the_best_search_decides_the_rate_once_all_are_there() -> None:
    searches = list(PLAN.searches())
    results = [_result(case, 0.6 + (case.rate or 0.0), case.rate or 0.0) for case in searches]
    searched = {result.key: result for result in results}
    (case, *_) = PLAN.cases()
    assert claims._rate(case, searches, searched) == 0.2
    assert claims._rate(case, searches, {results[0].key: results[0]}) is None
    edited = list(msgspec.structs.replace(PLAN, model={"depth": 2}).searches())
    assert claims._rate(case, edited, searched) is None  # those of another plan decide nothing
    with pytest.raises(SystemExit, match="no search chooses a rate for 'one' on 'toy'"):
        claims._rate(case, [], searched)


def test_a_set_with_a_label_is_searched_under_it() -> None:
    labelled = msgspec.structs.replace(PLAN, sets=(msgspec.structs.replace(PLAN.sets[0], label="toy, half"),))
    (search, *_), (case, *_) = labelled.searches(), labelled.cases()
    assert claims._decides(search, case)
    elsewhere = msgspec.structs.replace(labelled, rates=(), rates_from="toys")
    (first, *_) = PLAN.searches()
    assert claims._decides(first, next(elsewhere.cases()))  # that of the set without a label there


def test_what_another_experiment_has_run_is_taken_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "WORK", tmp_path / "work")
    lines = [_result(case, 0.8, case.rate or 0.0) for case in PLAN.searches()]
    lines += [_result(case, 0.8) for case in PLAN.cases()]
    (tmp_path / "first.jsonl").write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    renamed = (msgspec.structs.replace(PLAN.arms[0], name="again", rate_of="one"),)
    taking = msgspec.structs.replace(PLAN, arms=renamed, rates=(), rates_from="first")

    claims.run("second", taking, float("inf"), tmp_path, PLAN)

    found = claims.stored(tmp_path / "second.jsonl")
    assert [(r.arm, r.partition, r.seed) for r in found] == [
        ("again", partition, seed) for seed in (0, 1) for partition in ("iid", "skewed")
    ]
    before = (tmp_path / "second.jsonl").read_bytes()
    claims.run("second", taking, float("inf"), tmp_path, PLAN)
    assert (tmp_path / "second.jsonl").read_bytes() == before


def test_missing_searches_of_another_experiment_are_run_first_and_kept_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "WORK", tmp_path / "work")
    monkeypatch.setattr(claims, "run_case", lambda case, rate: _result(case, rate, rate))
    taking = msgspec.structs.replace(PLAN, arms=PLAN.arms[:1], rates=(), rates_from="first")

    claims.run("second", taking, float("inf"), tmp_path, PLAN)

    assert [(r.arm, r.rate) for r in claims.stored(tmp_path / "first.jsonl")] == [("one", 0.1), ("one", 0.2)]
    assert {r.rate for r in claims.stored(tmp_path / "second.jsonl")} == {0.2}


def test_lines_of_a_plan_that_was_edited_since_are_left_out_and_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    edited = msgspec.structs.replace(PLAN, model={"depth": 2})
    searched = [_result(search, 0.6 - search.rate, search.rate) for search in PLAN.searches() if search.rate]
    results = [_result(case, 0.8) for plan in (PLAN, edited) for case in plan.cases()]
    before = [_result(case, 0.8, 0.2) for case in PLAN.cases()]  # at a rate that was chosen of a shorter list
    assert claims._of_today("toy", PLAN, results + before, PLAN, searched) == results[:6]
    assert "toy: 12 stored lines are of another plan than today's" in capsys.readouterr().out


def test_the_page_holds_the_verdict_the_gap_and_bytes_to_the_target(tmp_path: Path) -> None:
    accuracy = {("one", 0): 0.80, ("one", 1): 0.82, ("two", 0): 0.79, ("two", 1): 0.80}
    results = [_result(case, accuracy[case.arm.name, case.seed]) for case in PLAN.cases()]
    write_report({"toy": (PLAN, [r for r in results if r.partition == "skewed"])}, tmp_path)
    page = (tmp_path / "results.md").read_text()
    assert "**Verdict.** The second, here." in page
    assert "up to 80.0%" in page  # (0.80 + 0.82) / 2 - 0.01
    # one: seed 0 reaches 80 % at its last version, seed 1 at its first: (2000 + 1000) / 2
    assert _row(page, "one") == [
        "one", "114", "0.1 edge", "2", "**81.0 ± 1.4 %**", "", "500 B", "1.5 kB",
        "1 kB", "4 kB", "1.5 kB", "6 kB",
    ]  # fmt: skip
    assert _row(page, "two")[4:6] == ["79.5 ± 0.7 %", "-1.5 ± 0.7"]
    assert _row(page, "two")[10] == "2 kB (1 of 2)"
    assert (tmp_path / "results-toy.svg").read_bytes().startswith(b"<?xml")


def test_a_plan_by_time_counts_virtual_minutes(tmp_path: Path) -> None:
    plan = msgspec.structs.replace(PLAN, by_time=True)
    write_report({"toy": (plan, [_result(case, 0.8) for case in plan.cases()])}, tmp_path)
    assert (
        "| virtual time to 53.0% | virtual time to 79.0% | at the end |"
        in (tmp_path / "results.md").read_text()
    )
    assert "| 1 min | 1 min | 2 min |" in (tmp_path / "results.md").read_text()


def test_bytes_of_an_update_count_those_after_the_last_version(tmp_path: Path) -> None:
    results = [
        msgspec.structs.replace(_result(case, 0.8), participations=5, frame_bytes_mean=446.0)
        for case in PLAN.cases()
    ]  # 2,000 bytes of four frames until the last version, and a fifth frame that no version saw
    write_report({"toy": (PLAN, results)}, tmp_path)
    assert "| one | 100 |" in (tmp_path / "results.md").read_text()  # (446 - 46) / 4


def test_two_labels_are_scored_by_f1_and_matthews(tmp_path: Path) -> None:
    counts = (50, 10, 20, 20)  # right and found: 00, 01, 10, 11
    results = [msgspec.structs.replace(_result(case, 0.7), confusion=counts) for case in PLAN.cases()]
    write_report({"toy": (PLAN, results)}, tmp_path)
    # F1 = 40 / 70; Matthews = (50·20 - 10·20) / sqrt(30 · 40 · 60 · 70) = 800 / 2244.99
    assert "| 57.1 ± 0.0 % | 35.6 ± 0.0 % |" in (tmp_path / "results.md").read_text()


def test_what_is_no_federation_is_a_run_of_its_own_and_shows_no_bytes(tmp_path: Path) -> None:
    bound = msgspec.structs.replace(PLAN.arms[0], name="alone", bound="local only")
    plan = msgspec.structs.replace(PLAN, arms=(PLAN.arms[0], bound))
    cases = [case for case in plan.cases() if case.partition == "iid"]
    assert len({case.digest for case in cases}) == len(cases)
    results = [_result(case, 0.9 if case.arm.bound else 0.8) for case in cases]
    results = [
        msgspec.structs.replace(r, participations=0, curve=r.curve[-1:]) if r.arm == "alone" else r
        for r in results
    ]
    write_report({"toy": (plan, results)}, tmp_path)
    page = (tmp_path / "results.md").read_text()
    assert set(_row(page, "alone")[-6:]) == {"–"}
    assert _row(page, "one")[4] == "**80.0 ± 0.0 %**"  # the best of what is a federation


def test_a_set_that_is_not_there_is_left_out_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert claims._with_data("toy", PLAN).sets == ()
    assert "SKIPPED: toy needs data/toy" in capsys.readouterr().out
