from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtt.adapter import AdapterSpec
from fedtt.algorithms import FlexLoRA, Tier, TTSVDFedTT
from fedtt.algorithms.mixed_ranks import MixedRanks
from fedtt.errors import ConfigError
from fedtt.folds import Contribution
from fedtt.task import parse_task
from tests.support.ranks import devices, folded, lora_adapter, products, tt_adapter
from tests.support.trains import random_theta

both = pytest.mark.parametrize("kind", [TTSVDFedTT, FlexLoRA])
TIERS = (Tier(rank=2, below_mb=512), Tier(rank=4, below_mb=2048))
trained = pytest.mark.parametrize(
    ("method", "adapter"),
    [(TTSVDFedTT(tiers=TIERS), tt_adapter(rank=5)), (FlexLoRA(tiers=TIERS), lora_adapter(rank=5))],
    ids=["trains", "lora"],
)
TASK = 'name = "t"\n[rounds]\ncount = 3\ncohort = 4\n'


@both
def test_a_device_trains_at_the_rank_of_the_first_tier_it_falls_below(kind: type[MixedRanks]) -> None:
    method = kind(tiers=TIERS)
    assert method.ranks == (2, 4)
    found = {mb: method.rank_for(mb) for mb in (1, 511, 512, 2047, 2048, 10**9)}
    assert found == {1: 2, 511: 2, 512: 4, 2047: 4, 2048: None, 10**9: None}


@both
def test_a_device_that_does_not_say_trains_at_the_adapters_own(kind: type[MixedRanks]) -> None:
    assert kind(tiers=TIERS).rank_for(0) is None
    assert kind().rank_for(1) is None


limits = st.tuples(st.integers(1, 9), st.none() | st.integers(1, 9), st.none() | st.integers(1, 9))
some_limits = limits.filter(lambda limit: limit[1:] != (None, None))


@given(st.lists(some_limits, max_size=4))
def test_tiers_rise_in_rank_and_memory_and_fall_in_seconds_or_are_refused(
    given_: list[tuple[int, int | None, int | None]],
) -> None:
    tiers = tuple(Tier(rank=r, below_mb=mb, slower_than_s=s) for r, mb, s in given_)
    pairs = list(itertools.combinations(given_, 2))
    sound = (
        all(a < b for (a, _, _), (b, _, _) in pairs)
        and all(a < b for (_, a, _), (_, b, _) in pairs if a is not None and b is not None)
        and all(a > b for (_, _, a), (_, _, b) in pairs if a is not None and b is not None)
    )
    if sound:
        assert TTSVDFedTT(tiers=tiers).ranks == tuple(r for r, _, _ in given_)
    else:
        with pytest.raises(ConfigError, match=r"method\.tiers = .* rising, rising and falling"):
            TTSVDFedTT(tiers=tiers)


@given(
    st.dictionaries(st.integers(1, 9), st.integers(1, 9) | st.none(), max_size=4),
    st.sets(st.integers(1, 9), min_size=4, max_size=4),
    st.integers(0, 10),
    st.none() | st.integers(0, 10),
)
def test_the_rank_is_the_least_of_any_tier_that_memory_or_time_puts_a_device_into(
    by_memory: dict[int, int | None], seconds: set[int], memory_mb: int, time_s: int | None
) -> None:
    ranks, mbs = sorted(by_memory), iter(sorted(v for v in set(by_memory.values()) if v is not None))
    slow = sorted(seconds, reverse=True)
    tiers = [
        Tier(rank=rank, below_mb=next(mbs, None) if by_memory[rank] else None, slower_than_s=s)
        for rank, s in zip(ranks, slow, strict=False)
    ]
    allowed = {
        tier.rank
        for tier in tiers
        if (tier.below_mb is not None and memory_mb and memory_mb < tier.below_mb)
        or (tier.slower_than_s is not None and time_s is not None and time_s > tier.slower_than_s)
    }
    assert FlexLoRA(tiers=tuple(tiers)).rank_for(memory_mb, time_s) == min(allowed, default=None)


def test_a_device_without_a_measurement_goes_by_its_memory_alone() -> None:
    tiers = (Tier(rank=2, below_mb=512, slower_than_s=60.0), Tier(rank=4, slower_than_s=20.0))
    method = TTSVDFedTT(tiers=tiers)
    assert [method.rank_for(mb) for mb in (0, 100, 512)] == [None, 2, None]
    assert [method.rank_for(0, s) for s in (20.0, 20.1, 60.0, 60.1)] == [None, 4, 4, 2]
    assert method.rank_for(100, 1.0) == 2


def test_tiers_by_memory_alone_go_out_as_they_did_before_there_was_another() -> None:
    assert msgspec.to_builtins(Tier(rank=2, below_mb=512)) == {"rank": 2, "below_mb": 512}


@both
def test_tiers_are_read_from_a_task_file(kind: type[MixedRanks]) -> None:
    name = kind.__struct_config__.tag
    text = f'{TASK}[method]\nname = "{name}"\n' + "".join(
        f"[[method.tiers]]\nrank = {tier.rank}\nbelow_mb = {tier.below_mb}\n" for tier in TIERS
    )
    assert parse_task(text).method == kind(tiers=TIERS)


def test_the_tiers_of_the_document_are_a_tasks() -> None:
    document = (Path(__file__).parents[4] / "docs" / "task.md").read_text()
    (block,) = (b for b in re.findall(r"```toml\n(.*?)```", document, re.DOTALL) if "method.tiers" in b)
    expected = (Tier(rank=2, below_mb=1024), Tier(rank=3, below_mb=4096))
    assert parse_task(TASK + block).method == TTSVDFedTT(tiers=expected)


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (
            "[[method.tiers]]\nrank = 4\nbelow_mb = 9\n[[method.tiers]]\nrank = 2\nbelow_mb = 99",
            r"method\.tiers = \[\(4, 9, None\), \(2, 99, None\)\] .* rising, rising and falling",
        ),
        (
            "[[method.tiers]]\nrank = 2\nbelow_mb = 99\n[[method.tiers]]\nrank = 4\nbelow_mb = 9",
            r"method\.tiers = \[\(2, 99, None\), \(4, 9, None\)\] .* rising, rising and falling",
        ),
        ("[[method.tiers]]\nrank = 0\nbelow_mb = 9", r"method\.tiers\[0\]\.rank = 0 .*>= 1"),
        ("[[method.tiers]]\nrank = 2\nbelow_mb = 0", r"method\.tiers\[0\]\.below_mb = 0 .*>= 1"),
        (
            "[[method.tiers]]\nrank = 2\nslower_than_s = 9\n[[method.tiers]]\nrank = 4\nslower_than_s = 9.5",
            r"method\.tiers = \[\(2, None, 9\.0\), \(4, None, 9\.5\)\] .* rising, rising and falling",
        ),
        ("[[method.tiers]]\nrank = 2\nslower_than_s = 0", r"method\.tiers\[0\]\.slower_than_s = 0 .*> 0"),
        ("[[method.tiers]]\nrank = 2", r"method\.tiers\.below_mb = None .*only where there is slower_than_s"),
        (
            "[[method.tiers]]\nrank = 2\nbelow_mb = 9\nabove_mb = 3",
            r"method\.tiers\[0\]\.above_mb = 3 .*known settings here are rank, below_mb, slower_than_s",
        ),
        ("tiers = 3", r"method\.tiers = 3 .*array"),
        ("tiers = [3]", r"method\.tiers\[0\] = 3 .*object"),
        ("\n".join("[[method.tiers]]\nrank = 2\nbelow_mb = 9" for _ in range(9)), r"method\.tiers = .* <= 8"),
        ("period = 2", r"method\.period = 2 .*known settings here are tiers"),
    ],
)
@both
def test_tiers_that_make_no_sense_are_refused_by_name(
    kind: type[MixedRanks], lines: str, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_task(f'{TASK}[method]\nname = "{kind.__struct_config__.tag}"\n{lines}\n')


@both
def test_a_residual_means_nothing_after_a_fold(kind: type[MixedRanks]) -> None:
    lines = f'[codec]\nerror_feedback = true\n[method]\nname = "{kind.__struct_config__.tag}"\n'
    with pytest.raises(ConfigError, match=r"codec\.error_feedback = True .*coordinates change"):
        parse_task(TASK + lines)


@trained
@given(data=st.data(), rng=st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=25)
def test_the_order_of_the_ledger_changes_the_last_digits_alone(
    method: MixedRanks, adapter: AdapterSpec, data: st.DataObject, rng: Any
) -> None:
    given_ = data.draw(devices(adapter, [None, *method.ranks], sizes=(0.0, 0.03, 0.3)))
    theta, mixed = random_theta(adapter, 0) / np.float32(2), rng.sample(given_, len(given_))
    one, other = (products(adapter, folded(method, adapter, theta, c).theta) for c in (given_, mixed))
    for name, matrix in one.items():
        np.testing.assert_allclose(matrix, other[name], rtol=1e-6, atol=1e-6 * float(np.linalg.norm(matrix)))


@trained
def test_sums_that_are_not_finite_stay_so_for_the_server_to_refuse(
    method: MixedRanks, adapter: AdapterSpec
) -> None:
    giant = Contribution(delta=np.full(adapter.layout.size, 3e38, np.float32), examples=1)
    assert not folded(method, adapter, random_theta(adapter, 0), [giant]).is_finite
