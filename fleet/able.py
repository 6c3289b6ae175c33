"""Whether a fleet can come to the end of its task at all, as far as numbers say it before anything starts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_client.examples import Examples
from fedtt.algorithms.hier_fedlora import Hierarchical
from fedtt.errors import ConfigError
from fedtt.task import TaskSpec
from fleet.population import Population
from fleet.profiles import Profile

__all__ = ["check_able"]


def check_able(task: TaskSpec, population: Population, shards: Sequence[Examples]) -> None:
    """Raise ConfigError where too few devices may ever take part, or each too seldom.

    A version takes updates of `quorum` devices at least, none of them twice.
    """
    quorum, why = task.rounds.quorum, _unable(task, population, shards)
    able = int(population.size - np.any(list(why.values()), axis=0).sum())
    if able < quorum:
        told = "; ".join(f"{int(mask.sum())} {reason}" for reason, mask in why.items() if mask.any())
        allowed = f"such that task.rounds.quorum = {quorum} can take part, not {able}: {told}"
        raise ConfigError("fleet.devices", population.size, allowed)
    if not isinstance(task.method, Hierarchical):  # whose groups share the quorum out
        _check_often(task, able)


def _unable(
    task: TaskSpec, population: Population, shards: Sequence[Examples]
) -> dict[str, NDArray[np.bool_]]:
    """The devices (size,) that can never take part, by reason."""
    rows = np.array([shard.count() for shard in shards])
    floor_mb = task.budget.memory_mb or 0
    little = np.array([0 < profile.memory_mb < floor_mb for profile in population.profiles])
    never = np.array([_never_works(profile) for profile in population.profiles])
    return {
        f"have fewer rows than task.min_examples = {task.min_examples}": (
            (rows < task.min_examples)[population.shard]
        ),
        f"say they have less memory than task.budget.memory_mb = {floor_mb}": little[population.profile],
        "ask for an unmetered network and have a metered one": never[population.profile],
    }


def _never_works(profile: Profile) -> bool:
    return profile.limits.only_unmetered and profile.network == "metered"


def _check_often(task: TaskSpec, able: int) -> None:
    rounds, sampling = task.rounds, task.sampling
    cap, needed = sampling.participation_cap, rounds.count * rounds.quorum
    of = f"{rounds.count} rounds of {rounds.quorum} updates or more (task.rounds.quorum)"
    if cap is not None and cap * able < needed:
        allowed = f"at least {-(-needed // able)}, for {of} by {able} devices"
        raise ConfigError("task.sampling.participation_cap", cap, allowed)
    apart = min(sampling.separation, rounds.count)
    if apart * rounds.quorum > able:
        allowed = f"at most {able // rounds.quorum}, for {of} by {able} devices"
        raise ConfigError("task.sampling.separation", sampling.separation, allowed)
