"""What robust folds may take of memory: a task whose rounds could need more is refused."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from msgspec.structs import replace

from fedtt.errors import ConfigError
from fedtt.folds import Contribution, Krum, Mean, Median, TrimmedMean
from fedtt.task import parse_task
from tests.support.adapters import small_adapter

ADAPTER = small_adapter("lora", hidden=16, layers=2)
TASK = """
name = "t"
[rounds]
count = 1
cohort = {cohort}
quorum = 5
max_staleness = {staleness}
[method]
name = "fedlora"
[fold]
kind = "{kind}"
memory_mb = {memory_mb}
"""


def updates(count: int, numbers: int) -> Iterator[Contribution]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield Contribution(delta=rng.standard_normal(numbers).astype(np.float32), examples=1)


@pytest.mark.parametrize("mixing", [0.0, 0.2], ids=["plain", "mixed"])
@pytest.mark.parametrize("fold", [Median(), TrimmedMean(), Krum()], ids=lambda fold: type(fold).__name__)
@pytest.mark.parametrize(("count", "numbers"), [(600, 50), (40, 20_000)])
def test_a_fold_takes_no_more_than_it_says(
    fold: Median | TrimmedMean | Krum, count: int, numbers: int, mixing: float
) -> None:
    fold = replace(fold, mixing=mixing)
    tracemalloc.start()
    try:
        fold.combine(numbers, updates(count, numbers))
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.4 < most_bytes / fold.needed_bytes(count, numbers) < 1.05


@pytest.mark.parametrize("kind", ["median", "trimmed-mean", "krum"])
def test_a_task_that_could_need_more_is_refused(kind: str) -> None:
    size = ADAPTER.layout.size
    cohort = 10**6 // (24 * size) + 1  # one megabyte, and what rounds it up
    for staleness, memory_mb in ((0, 2), (9, 20)):
        said = TASK.format(cohort=cohort // 2, staleness=staleness, kind=kind, memory_mb=memory_mb)
        parse_task(said).check(ADAPTER)
    small = TASK.format(cohort=cohort, staleness=0, kind=kind, memory_mb=1)
    with pytest.raises(
        ConfigError, match=rf"fold\.memory_mb = 1 is not allowed: at least 2, for {cohort} up"
    ):
        parse_task(small).check(ADAPTER)
    late = TASK.format(cohort=cohort // 2, staleness=9, kind=kind, memory_mb=1)
    with pytest.raises(ConfigError, match=r"fold\.memory_mb = 1 is not allowed"):
        parse_task(late).check(ADAPTER)


def test_a_mean_holds_few_updates_whatever_their_number() -> None:
    Mean().check(10**9, 10**9)
