"""Task files: what is refused and how, and docs/task.md held against the types it describes."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import Any, NamedTuple, get_args

import msgspec
import pytest
from msgspec import NODEFAULT, Struct

from fedtt.algorithms import FedAvg, FedTT, Method
from fedtt.budget import Budget
from fedtt.codec import CodecSpec
from fedtt.errors import ConfigError
from fedtt.evaluation import EvaluationSpec
from fedtt.privacy import PrivacySpec
from fedtt.task import RoundSpec, TaskSpec, TrainingSpec, parse_task
from tests.support.adapters import small_adapter

DOCUMENT = (Path(__file__).parents[3] / "docs" / "task.md").read_text()
EXAMPLE = re.findall(r"```toml\n(.*?)```", DOCUMENT, re.DOTALL)[0]
LEAST = 'name = "t"\n[rounds]\ncount = 3\ncohort = 4\n'
SECTIONS: dict[str, type[Struct]] = {
    "The task": TaskSpec,
    "`[rounds]`": RoundSpec,
    "`[training]`": TrainingSpec,
    "`[codec]`": CodecSpec,
    "`[budget]`": Budget,
    "`[privacy]`": PrivacySpec,
    "`[evaluation]`": EvaluationSpec,
}
METHODS: dict[str, type[Struct]] = {str(kind.__struct_config__.tag): kind for kind in get_args(Method)}


def documented(section: str, heading: str = "##") -> dict[str, list[str]]:
    """setting -> [default, allowed, meaning] of the tables below one heading of the document."""
    text = re.split(r"\n##+ ", DOCUMENT.split(f"\n{heading} {section}\n")[1])[0]
    rows = (line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `"))
    return {row[0].strip("`"): row[1:] for row in rows}


def with_setting(path: str, value: str, method: str = "fedtt") -> str:
    """The smallest task file with one setting given or changed."""
    section, _, name = path.rpartition(".")
    raw = {"": {"name": '"t"'}, "rounds": {"count": "3", "cohort": "4"}}
    if section == "method":
        raw["method"] = {"name": f'"{method}"'}
    if path in {"codec.step", "codec.keep", "codec.threshold"}:  # which do not stand alone
        raw["codec"] = {"quantise": '"rms"', "coding": '"range"'}
    if section == "privacy":
        raw["privacy"] = {"clip": "1.0", "noise_multiplier": "1.0"}
    raw.setdefault(section, {})[name] = value
    return "\n".join(
        line
        for part, settings in raw.items()
        for line in ([f"[{part}]"] if part else []) + [f"{k} = {v}" for k, v in settings.items()]
    )


def test_the_least_a_task_file_needs() -> None:
    spec = parse_task(LEAST)
    assert spec == TaskSpec(name="t", rounds=RoundSpec(count=3, cohort=4))
    assert (spec.method, spec.codec, spec.training) == (FedTT(), CodecSpec(), TrainingSpec())
    assert spec.rounds.closes_at == 4
    assert spec.rounds.lease_lasts_s == 600.0


def test_the_learning_rate_falls_evenly_to_its_last_part() -> None:
    spec = parse_task(LEAST + "final_rate = 0.2\n[training]\nlearning_rate = 0.5\nlocal_steps = 7\n")
    rates = [spec.training_in(number).learning_rate for number in (1, 2, 3, 4)]
    assert rates == pytest.approx([0.5, 0.3, 0.1, 0.1])  # 0.5 · (1, 0.6, 0.2), and a round past the count
    assert spec.training_in(2).local_steps == 7
    assert parse_task(LEAST).training_in(3) == TrainingSpec()


def test_the_example_of_the_document_says_every_setting_once_and_means_it() -> None:
    spec, raw = parse_task(EXAMPLE), tomllib.loads(EXAMPLE)
    assert raw == msgspec.to_builtins(spec)
    assert (spec.rounds.closes_at, spec.rounds.lease_lasts_s) == (10, 1800.0)


def test_the_readmes_example_is_a_task() -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    blocks = re.findall(r"```toml\n(.*?)```", readme, re.DOTALL)
    assert [parse_task(block, "README.md").method for block in blocks] == [FedTT()]


@pytest.mark.parametrize("section", SECTIONS)
def test_the_document_lists_every_setting_with_its_default(section: str) -> None:
    check_settings(documented(section), SECTIONS[section])


def test_the_document_lists_every_method() -> None:
    rows = list(documented("`[method]`"))
    assert rows[0] == "name"
    assert [row.strip('"') for row in rows[1:]] == list(METHODS)


@pytest.mark.parametrize("method", [tag for tag, kind in METHODS.items() if msgspec.structs.fields(kind)])
def test_the_document_lists_every_setting_of_a_method_with_its_default(method: str) -> None:
    check_settings(documented(f"`{method}`", "###"), METHODS[method])


def check_settings(rows: dict[str, list[str]], kind: type[Struct]) -> None:
    """All settings of this kind, in its order, with their defaults."""
    known = {f.name: f for f in msgspec.structs.fields(kind) if not _is_section(f.type)}
    assert list(rows) == list(known)
    for name, field in known.items():
        default = rows[name][0]
        if field.default is NODEFAULT:
            assert default == "must be given"
        elif field.default is not None:
            value = tomllib.loads(f"x = {default.strip('`')}")["x"]
            plain = list(field.default) if isinstance(field.default, tuple) else field.default
            assert (value, type(value)) == (plain, type(plain))


def _is_section(kind: Any) -> bool:
    return any(isinstance(k, type) and issubclass(k, Struct) for k in (kind, *get_args(kind)))


class Range(NamedTuple):
    """A row of the document whose setting lies between two numbers."""

    path: str
    method: str
    real: bool
    above: bool  #: whether the lower end itself is out
    low: str
    below: bool  #: and the upper
    high: str


def _ranges() -> list[Range]:
    pattern = re.compile(r"(above )?(\d+) … (below )?(\d+)")
    tables = [(name, "", documented(name)) for name in SECTIONS]
    methods = [tag for tag, kind in METHODS.items() if msgspec.structs.fields(kind)]
    tables += [("`[method]`", tag, documented(f"`{tag}`", "###")) for tag in methods]
    return [
        Range(
            f"{section.strip('`[]')}.{name}".removeprefix("The task."),
            method or "fedtt",
            "." in default,
            bool(a),
            low,
            bool(b),
            high,
        )
        for section, method, rows in tables
        for name, (default, allowed, _) in rows.items()
        for a, low, b, high in pattern.findall(allowed)
    ]


def test_the_ranges_of_numbers_stand_in_the_document() -> None:
    # task 3, rounds 7, training 9, codecs 4, budgets 4, privacy 3, methods 10, evaluation 4
    assert len(_ranges()) == 44


@pytest.mark.parametrize("documented_range", _ranges(), ids=lambda row: f"{row.method} {row.path}")
def test_the_ranges_of_the_document_are_those_that_are_checked(documented_range: Range) -> None:
    path, method, real, above, low, below, high = documented_range
    before, after = _neighbours(low, real)
    last, beyond = _neighbours(high, real)
    for value in (after if above else low, last if below else high):
        parse_task(with_setting(path, value, method))
    for value in (low if above else before, high if below else beyond):
        with pytest.raises(ConfigError, match=re.escape(f"task: {path} = ")):
            parse_task(with_setting(path, value, method))


def _neighbours(number: str, real: bool) -> tuple[str, str]:
    """The numbers next to one, below and above: whole ones, or float64."""
    if real:
        return repr(math.nextafter(float(number), -math.inf)), repr(math.nextafter(float(number), math.inf))
    return str(int(number) - 1), str(int(number) + 1)


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("name", '"My Task"', "name = 'My Task' is not allowed: Expected `str` matching regex"),
        ("name", '""', "name = '' is not allowed"),
        ("seed", "-1", "seed = -1 is not allowed: Expected `int` >= 0"),
        ("sed", "1", "sed = 1 is not allowed: known settings here are name, rounds, seed, "),
        ("rounds.count", "0", "rounds.count = 0 is not allowed: Expected `int` >= 1"),
        ("rounds.cohort", "2.5", "rounds.cohort = 2.5 is not allowed: Expected `int`, got `float`"),
        ("rounds.cohort", '"4"', "rounds.cohort = '4' is not allowed: Expected `int`, got `str`"),
        ("rounds.cohrt", "4", "rounds.cohrt = 4 is not allowed: known settings here are count, cohort, "),
        ("rounds.buffer", "5", "rounds.buffer = 5 is not allowed: a number from 1 to rounds.cohort = 4"),
        ("rounds.quorum", "5", "rounds.quorum = 5 is not allowed: a number from 1 to rounds.buffer = 4"),
        ("rounds.lease_s", "601", "rounds.lease_s = 601.0 is not allowed: at most rounds.deadline_s = 600"),
        ("rounds.deadline_s", "nan", "rounds.deadline_s = nan is not allowed: Expected `float` > 0.0"),
        ("rounds.deadline_s", "2024-01-01", "rounds.deadline_s = datetime.date(2024, 1, 1) is not allowed"),
        ("training.learning_rate", "inf", "training.learning_rate = inf is not allowed"),
        ("training.optimiser", '"adam"', "training.optimiser = 'adam' is not allowed: one of 'adamw', 'sgd'"),
        ("training.lr", "0.1", "training.lr = 0.1 is not allowed: known settings here are optimiser, "),
        ("training.local_steps", "true", "training.local_steps = True is not allowed: Expected `int`"),
        ("method.name", '"fedprox"', "method.name = 'fedprox' is not allowed: one of 'dense-adapter', "),
        ("method.period", "3", "method.period = 3 is not allowed: known settings here are cores_only"),
        (
            "codec.quantise",
            '"int5"',
            "codec.quantise = 'int5' is not allowed: one of 'fp32', 'int2', 'int3', ",
        ),
        ("codec.quantise", '"rms"', "codec.quantise = 'rms' is not allowed: only with coding = 'range'"),
        ("codec.bits", "4", "codec.bits = 4 is not allowed: known settings here are quantise, "),
        ("codec.error_feedback", "1", "codec.error_feedback = 1 is not allowed: Expected `bool`, got `int`"),
    ],
)
def test_each_refusal_names_file_field_value_and_what_is_allowed(
    path: str, value: str, complaint: str
) -> None:
    with pytest.raises(ConfigError) as error:
        parse_task(with_setting(path, value), "task.toml")
    assert str(error.value).startswith(f"task.toml: {complaint}")
    assert "\n" not in str(error.value)
    assert error.value.field == path


@pytest.mark.parametrize(
    ("method", "path", "value", "complaint"),
    [
        ("fedtt-plus", "method.rotation", '"random"', "one of 'cyclic', 'fixed'"),
        ("fedtt-plus", "method.schedule", '"sweep"', "known settings here are rotation, period"),
        ("exact-fedtt", "method.schedule", '"als"', "one of 'alternate', 'cyclic', 'norm', 'sweep'"),
        ("exact-fedtt", "method.epoch_rounds", "0", "Expected `int` >= 1"),
        ("exact-fedtt", "method.orthogonal", "1", "Expected `bool`, got `int`"),
    ],
)
def test_an_option_that_a_method_does_not_have_is_refused(
    method: str, path: str, value: str, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^task\.toml: {re.escape(path)} = .*{re.escape(complaint)}"):
        parse_task(with_setting(path, value, method), "task.toml")


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ('name = "fedtt-plus"\nrotation = "fixed"\nperiod = 2', "method.period = 2 .* rotation 'fixed'"),
        (
            'name = "exact-fedtt"\nschedule = "norm"\nepoch_rounds = 2',
            "method.epoch_rounds = 2 .* schedule 'norm'",
        ),
        (
            'name = "exact-fedtt"\northogonal = true\n[codec]\nerror_feedback = true',
            "codec.error_feedback = True .* false with exact-fedtt",
        ),
    ],
)
def test_settings_of_a_method_that_contradict_others_are_refused(lines: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=rf"^task\.toml: {complaint}"):
        parse_task(f"{LEAST}[method]\n{lines}\n", "task.toml")


def test_settings_that_contradict_each_other_are_refused_with_the_file() -> None:
    text = LEAST + '[codec]\nrounding = "stochastic"\nerror_feedback = true\n'
    with pytest.raises(ConfigError, match=r"^task\.toml: codec\.error_feedback = True .*'nearest'"):
        parse_task(text, "task.toml")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", r"task: name = None is not allowed: it must be given"),
        ('name = "t"', r"task: rounds = None is not allowed: it must be given"),
        ('name = "t"\nrounds = 3', r"task: rounds = 3 is not allowed: Expected `object`"),
        ('name = "t"\n[rounds]\ncount = 3', r"task: rounds\.cohort = None is not allowed: it must be given"),
        (LEAST + '[method]\nweighting = "uniform"', r"task: method\.name = None .*it must be given"),
        (LEAST + "[secrecy]", r"task: secrecy = \{\} is not allowed: known settings here are name, "),
        ("name = t", r"task = '…' is not allowed: valid TOML \(.*line 1, column 8"),
        ("x = " + "[" * 60_000, r"task = '…' is not allowed: valid TOML \("),
        ("seed = " + "9" * 5000, r"task = '…' is not allowed: valid TOML \("),
        (
            f"{LEAST}deadline_s = 0x{'f' * 5000}",
            r"task: rounds\.deadline_s = an integer of 20000 bits is not allowed",
        ),
        (".".join("a" * 20_000) + " = 1", "task = '…' is not allowed: at most 100 dots in a line"),
        (".".join("a" * 100) + " = 1", r"task: a = .{,50} is not allowed"),
        (f"x = {'{a = ' * 50}'{'z' * 500}'{'}' * 50}", r"task: x = .{,50} is not allowed"),
        (f"{LEAST}seed = '{'z' * 500}'", r"task: rounds\.seed = .{,210} is not allowed"),
        ("#" * 65_537, r"task = '65537 characters' is not allowed: at most 65536 bytes"),
    ],
)
def test_a_file_that_is_no_task_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=f"^{complaint}"):
        parse_task(text)


@pytest.mark.parametrize("kind", get_args(Method))
def test_every_method_of_the_union_can_be_named_in_a_task(kind: type[FedAvg]) -> None:
    name = str(kind.__struct_config__.tag)
    assert type(parse_task(with_setting("method.name", f'"{name}"')).method) is kind


def test_a_depth_leaves_the_lower_blocks_out_of_what_the_method_trains() -> None:
    adapter = small_adapter("tt", hidden=8, layers=3, head="dense")
    task = parse_task(LEAST + "[training]\ndepth = 2")
    task.check(adapter)
    live = task.live(adapter, 1)
    assert {adapter.block_of(index) for index in live.indices} == {1, 2, None}
    with pytest.raises(ConfigError, match=r"training\.depth = 4 .*at most 3, the bundle's adapted blocks"):
        parse_task(LEAST + "[training]\ndepth = 4").check(adapter)


def test_a_depth_is_refused_where_the_method_sets_its_own() -> None:
    with pytest.raises(ConfigError, match=r"training\.depth = 1 .*none with hier-fedtt"):
        parse_task(LEAST + '[training]\ndepth = 1\n[method]\nname = "hier-fedtt"')
