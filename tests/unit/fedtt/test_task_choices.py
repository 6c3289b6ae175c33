"""Folds, server optimisers and sampling in a task file: documented, bounded, and refused where they clash."""

from __future__ import annotations

import re
from typing import Any, get_args

import msgspec
import pytest
from msgspec import Struct

from fedtt.algorithms import Method
from fedtt.errors import ConfigError
from fedtt.folds import Fold, Krum, Mean, Median, TrimmedMean
from fedtt.sampling import ByExamples, Oort, PowerOfChoice, Sampling, Uniform
from fedtt.server_optimiser import ServerSpec
from fedtt.task import TaskSpec, parse_task
from tests.unit.fedtt.test_task import DOCUMENT, check_settings, documented

TAGS = {"fold": "kind", "sampling": "strategy"}
KINDS: dict[str, tuple[str, type[Struct]]] = {
    str(kind.__struct_config__.tag): (section, kind)
    for section, union in (("fold", Fold), ("sampling", Sampling))
    for kind in get_args(union)
}
NEEDED = {"power-of-choice": "candidates = 100000\n"}
#: Of settings that are bounded by each other, what lets one have its whole range.
BESIDE = {"exploration": "least_exploration = 0\n"}


def text(section: str, lines: str, cohort: int = 100_000) -> str:
    """A task whose rounds are large enough for any fold, with these lines in a section."""
    return f'name = "t"\n[rounds]\ncount = 3\ncohort = {cohort}\nquorum = {cohort}\n[{section}]\n{lines}'


def read(section: str, lines: str, cohort: int = 100_000) -> TaskSpec:
    return parse_task(text(section, lines, cohort), "task.toml")


def own_settings(tag: str) -> dict[str, list[str]]:
    """Of one kind: those of its section, then those below a heading of its own."""
    section = KINDS[tag][0]
    common = documented(f"`[{section}]`")
    del common[TAGS[section]]
    return common | (documented(f"`{tag}`", "###") if f"\n### `{tag}`\n" in DOCUMENT else {})


@pytest.mark.parametrize("tag", KINDS)
def test_the_document_lists_every_setting_of_every_kind_with_its_default(tag: str) -> None:
    section, kind = KINDS[tag]
    check_settings(own_settings(tag), kind)
    assert f'`"{tag}"`' in documented(f"`[{section}]`")[TAGS[section]][1]


def test_the_document_lists_every_setting_of_the_server() -> None:
    check_settings(documented("`[server]`"), ServerSpec)


def ranges() -> list[Any]:
    """(section, kind or "", setting, allowed) of every row that bounds a number."""
    rows = [("server", "", name, row) for name, row in documented("`[server]`").items()]
    rows += [(KINDS[tag][0], tag, name, row) for tag in KINDS for name, row in own_settings(tag).items()]
    return [pytest.param(s, t, n, row[1], id=f"{s} {t} {n}") for s, t, n, row in rows if "…" in row[1]]


@pytest.mark.parametrize(("section", "tag", "name", "allowed"), ranges())
def test_the_ranges_of_the_document_are_those_that_are_checked(
    section: str, tag: str, name: str, allowed: str
) -> None:
    found = re.fullmatch(r"(above )?([\d.]+) … (below )?([\d.]+)", allowed)
    assert found
    above, low, below, high = found.groups()
    kinds = KINDS[tag][1] if tag else ServerSpec
    (field,) = (f for f in msgspec.structs.fields(kinds) if f.name == name)
    real = "float" in str(field.type)
    head = (f'{TAGS[section]} = "{tag}"\n' if tag else "") + NEEDED.get(tag, "") + BESIDE.get(name, "")

    def value(number: str, step: int) -> str:
        return repr(float(number) + step * 1e-6) if real else str(int(number) + step)

    for good in (value(low, 1 if above else 0), value(high, -1 if below else 0)):
        read(section, f"{head}{name} = {good}\n")
    for bad in (value(low, 0 if above else -1), value(high, 0 if below else 1)):
        with pytest.raises(ConfigError, match=re.escape(f"task.toml: {section}.{name} = ")):
            read(section, f"{head}{name} = {bad}\n")


@pytest.mark.parametrize(
    ("section", "lines", "expected"),
    [
        ("fold", 'kind = "median"\nnorm_bound = 2.5', Median(norm_bound=2.5)),
        ("fold", 'kind = "trimmed-mean"\ntrim = 0.3', TrimmedMean(trim=0.3)),
        ("fold", 'kind = "krum"\nhostile = 2\nselected = 3', Krum(hostile=2, selected=3)),
        ("fold", 'kind = "mean"\nweighting = "uniform"', Mean(weighting="uniform")),
        ("server", 'optimiser = "yogi"', ServerSpec(optimiser="yogi")),
        ("sampling", 'strategy = "uniform"\nseparation = 4', Uniform(separation=4)),
        ("sampling", 'strategy = "examples"\nmax_examples = 9', ByExamples(max_examples=9)),
        (
            "sampling",
            'strategy = "power-of-choice"\ncandidates = 100000\nparticipation_cap = 2',
            PowerOfChoice(candidates=100_000, participation_cap=2),
        ),
        ("sampling", 'strategy = "oort"\npenalty = 1.5', Oort(penalty=1.5)),
    ],
)
def test_every_kind_can_be_chosen_and_goes_into_the_ledger_and_back(
    section: str, lines: str, expected: Struct
) -> None:
    spec = read(section, lines)
    assert getattr(spec, section) == expected
    assert msgspec.json.decode(msgspec.json.encode(spec), type=TaskSpec) == spec


@pytest.mark.parametrize(
    ("section", "lines", "complaint"),
    [
        ("fold", "trim = 0.2", "fold.kind = None is not allowed: it must be given"),
        (
            "fold",
            'kind = "mode"',
            "fold.kind = 'mode' is not allowed: one of 'krum', 'mean', 'median', 'trimmed-mean'",
        ),
        (
            "fold",
            'kind = "median"\ntrim = 0.2',
            "fold.trim = 0.2 is not allowed: known settings here are norm",
        ),
        ("fold", 'kind = "mean"\nweighting = "size"', "fold.weighting = 'size' is not allowed: one of 'exam"),
        (
            "fold",
            'kind = "mean"\nmax_examples = 0',
            "fold.max_examples = 0 is not allowed: Expected `int` >= 1",
        ),
        ("fold", 'kind = "mean"\nnorm_bound = nan', "fold.norm_bound = nan is not allowed"),
        ("fold", 'kind = "mean"\nnorm_bound = "1"', "fold.norm_bound = '1' is not allowed"),
        (
            "fold",
            'kind = "trimmed-mean"\ntrim = 1e-300',
            "fold.trim = 1e-300 is not allowed: Expected `float`",
        ),
        (
            "server",
            'optimiser = "adamw"',
            "server.optimiser = 'adamw' is not allowed: one of 'adam', 'momentum'",
        ),
        (
            "server",
            "lr = 1",
            "server.lr = 1 is not allowed: known settings here are optimiser, learning_rate",
        ),
        ("sampling", "separation = 1", "sampling.strategy = None is not allowed: it must be given"),
        (
            "sampling",
            'strategy = "all"',
            "sampling.strategy = 'all' is not allowed: one of 'examples', 'oort'",
        ),
        (
            "sampling",
            'strategy = "power-of-choice"',
            "sampling.candidates = None is not allowed: it must be given",
        ),
        (
            "sampling",
            'strategy = "power-of-choice"\ncandidates = 99',
            "sampling.candidates = 99 is not allowed: at least rounds.cohort = 100000",
        ),
        (
            "sampling",
            'strategy = "oort"\nexploration = 0.1',
            "sampling.least_exploration = 0.2 is not allowed: at most sampling.exploration = 0.1",
        ),
        (
            "sampling",
            'strategy = "uniform"\nparticipation_cap = 0',
            "sampling.participation_cap = 0 is not allowed",
        ),
    ],
)
def test_each_refusal_names_file_field_value_and_what_is_allowed(
    section: str, lines: str, complaint: str
) -> None:
    with pytest.raises(ConfigError) as error:
        read(section, lines)
    assert str(error.value).startswith(f"task.toml: {complaint}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("lines", "least"),
    [
        ('kind = "median"', 3),
        ('kind = "trimmed-mean"', 5),
        ('kind = "trimmed-mean"\ntrim = 0.01', 100),
        ('kind = "krum"', 5),
        ('kind = "krum"\nhostile = 3\nselected = 9', 14),
    ],
)
def test_a_quorum_below_what_makes_a_fold_robust_is_refused(lines: str, least: int) -> None:
    assert read("fold", lines, cohort=least).rounds.quorum == least
    why = (
        rf"^task\.toml: rounds\.quorum = {least - 1} is not allowed: at least {least}, which this fold needs$"
    )
    with pytest.raises(ConfigError, match=why):
        read("fold", lines, cohort=least - 1)


@pytest.mark.parametrize("method", [str(kind.__struct_config__.tag) for kind in get_args(Method)])
@pytest.mark.parametrize("kind", ["mean", "median", "trimmed-mean", "krum"])
@pytest.mark.parametrize("optimiser", ["sgd", "momentum", "adam", "yogi"])
def test_every_method_goes_with_every_fold_and_server_optimiser(
    method: str, kind: str, optimiser: str
) -> None:
    chosen = f'[method]\nname = "{method}"\n[fold]\nkind = "{kind}"\n[server]\noptimiser = "{optimiser}"'
    task = parse_task(f'name = "t"\n[rounds]\ncount = 3\ncohort = 99\nquorum = 99\n{chosen}')
    tags = [str(value.__struct_config__.tag) for value in (task.method, task.fold)]
    assert (tags, task.server.optimiser) == ([method, kind], optimiser)


@pytest.mark.parametrize("method", ["hier-fedtt", "hier-fedlora"])
def test_methods_of_groups_take_no_stale_updates(method: str) -> None:
    with pytest.raises(ConfigError, match=rf"rounds\.max_staleness = 1 is not allowed: 0 with {method}: its"):
        parse_task(
            f'name = "t"\n[rounds]\ncount = 3\ncohort = 4\nmax_staleness = 1\n[method]\nname = "{method}"'
        )
