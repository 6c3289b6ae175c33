"""The page: nothing from elsewhere, nothing of a stranger's words as markup, no number that is none."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtt.errors import ConfigError, StorageError
from fleet.report import write_report
from tests.support.runs import device_line, outcome, version_line, write_run

HOSTILE = "</title></svg><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\x00\u202e"
ELEMENTS = {"html", "head", "meta", "link", "title", "style", "body", "header", "main", "nav", "section"}
ELEMENTS |= {"h1", "h2", "h3", "p", "span", "ul", "li", "dl", "dt", "dd", "div", "figure", "figcaption"}
ELEMENTS |= {"details", "summary", "table", "thead", "tbody", "tr", "th", "td", "code"}
ELEMENTS |= {"svg", "path", "circle", "rect", "text"}


class _Reader(HTMLParser):
    """What a browser makes of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes += [(name, value or "") for name, value in attributes]

    def handle_data(self, data: str) -> None:
        self.text += data


def report(*directories: Path) -> tuple[str, _Reader]:
    out = directories[0].parent / "report.html"
    write_report(directories, out)
    html = out.read_text(encoding="utf-8")
    reader = _Reader()
    reader.feed(html)
    return html, reader


def check(html: str, reader: _Reader) -> None:
    """What holds of every page."""
    assert reader.elements <= ELEMENTS
    names = {name for name, _ in reader.attributes}
    assert not {name for name in names if name.startswith("on") or name == "style"}
    links = [value for name, value in reader.attributes if name in {"href", "src", "action"}]
    assert links == ["data:,"]
    for chart in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        for element in ElementTree.fromstring(chart).iter():  # noqa: S314  # our own
            for name in ("x", "y", "width", "height", "cx", "cy", "d"):
                assert not re.search("nan|inf|e[+-]", element.get(name, ""))


def test_a_page_runs_nothing_and_loads_nothing(tmp_path: Path) -> None:
    html, reader = report(write_run(tmp_path / "run", ended=outcome(), devices=[device_line(3)]))
    check(html, reader)
    style = re.search(r"<style>(.*)</style>", html, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    policy = next(value for name, value in reader.attributes if name == "content")
    assert f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:" in policy
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_what_strangers_wrote_stays_text(tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "").replace("\x00", "")
    line = version_line(1, outcomes={HOSTILE: 3}, report={HOSTILE: 0.5})
    for directory in (tmp_path / "a" / name, tmp_path / "b" / name):
        write_run(
            directory,
            versions=[version_line(0), line],
            work=[(0, HOSTILE), (1, "acknowledged")],
            ended=outcome(task=HOSTILE, state=HOSTILE, reason=HOSTILE, left_out={HOSTILE: 2}),
            devices=[device_line(0, profile=HOSTILE)],
            settings={HOSTILE: {"name": HOSTILE}, "list": [{"name": HOSTILE}, 3]},
        )
    check(*report(tmp_path / "a" / name))
    check(*report(tmp_path / "a" / name, tmp_path / "b" / name))


def test_a_run_shows_its_curves_its_end_and_its_settings(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ended=outcome(), devices=[device_line(k) for k in range(9)])
    html, reader = report(run)
    for said in ("Accuracy against rounds", "Accuracy against bytes up", "Accuracy against bytes both ways"):
        assert said in reader.text
    for said in (
        "Accuracy against the devices' time",
        "Accuracy of single devices",
        "Gini coefficient: 0.95",
    ):
        assert said in reader.text
    for said in ("What came of the work given out", "Bytes by kind", "task.name", "finished", "80.0%"):
        assert said in reader.text
    assert "run: accuracy 80.0% at bytes up 20 kB" in html
    assert "Every update was folded onto the very version it began from." in reader.text


def test_a_language_model_is_shown_by_its_loss(tmp_path: Path) -> None:
    versions = [version_line(number, accuracy=None) for number in range(3)]
    devices = [device_line(k, accuracy=None) for k in range(4)]
    _, reader = report(write_run(tmp_path / "run", versions=versions, ended=outcome(), devices=devices))
    assert "Loss against rounds" in reader.text
    assert "Loss of single devices" in reader.text
    assert "Accuracy against" not in reader.text


def test_an_interrupted_run_is_shown_as_far_as_it_came(tmp_path: Path) -> None:
    html, reader = report(write_run(tmp_path / "run"))
    assert "run has not come to its end: this shows what came until version 4." in reader.text
    assert "Accuracy against rounds" in reader.text
    check(html, reader)


def test_a_run_without_anything_yet_is_a_page_too(tmp_path: Path) -> None:
    html, reader = report(write_run(tmp_path / "run", versions=(), work=()))
    assert "this shows nothing" in reader.text
    check(html, reader)


def test_runs_are_laid_over_one_another_and_their_differing_settings_told(tmp_path: Path) -> None:
    slim = [version_line(k, sent_bytes=50 * k) for k in range(5)]
    one = write_run(tmp_path / "one", ended=outcome(), settings={"seed": 1, "same": 5})
    two = write_run(tmp_path / "two", versions=slim, settings={"seed": 2, "same": 5})
    html, reader = report(one, two)
    check(html, reader)
    assert "2 emulated fleets compared" in reader.text
    assert "bytes up (kB, log scale)" in reader.text  # 20 kB against 200 B
    assert "bytes up and down, without bundles (kB)" in reader.text
    differ = reader.text[reader.text.index("Settings that differ") : reader.text.index("All settings")]
    assert "seed" in differ
    assert "same" not in differ


def test_stale_updates_are_shown_by_their_age(tmp_path: Path) -> None:
    lines = [version_line(0), version_line(1, staleness={0: 3, 2: 1}), version_line(2, staleness={40: 4})]
    html, reader = report(write_run(tmp_path / "run", versions=lines))
    check(html, reader)
    assert "Age of what updates began from" in reader.text
    assert "12 or more: 50.0%" in reader.text


def test_runs_of_one_name_go_by_their_places(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run")
    _, reader = report(one, two)
    assert str(one) in reader.text
    assert str(two) in reader.text


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ended=outcome())
    assert report(run)[0] == report(run)[0]


def test_more_runs_than_can_be_told_apart_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="1 to 16 directories"):
        write_report([run] * 17, tmp_path / "report.html")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(StorageError, match="name another --out"):
        write_report([run], tmp_path / "none" / "report.html")


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
INTS = st.integers(-(2**63), 2**64 - 1)
LINES = st.fixed_dictionaries(
    {
        "virtual_s": FLOATS,
        "loss": st.none() | FLOATS,
        "accuracy": st.none() | FLOATS,
        "train_loss_last": st.none() | FLOATS,
        "sent_bytes": INTS,
        "received_bytes": INTS,
        "frame_bytes": INTS,
        "trained": INTS,
        "staleness": st.dictionaries(INTS, INTS, max_size=3),
        "outcomes": st.dictionaries(st.text(max_size=3), INTS, max_size=3),
        "report": st.dictionaries(st.text(max_size=3), FLOATS, max_size=2),
    }
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINES, max_size=4), devices=st.lists(FLOATS, max_size=3))
def test_whatever_numbers_a_run_claims_the_page_is_drawn(
    tmp_path: Path, lines: list[dict[str, Any]], devices: list[float]
) -> None:
    one = write_run(
        tmp_path / "one",
        versions=[version_line(k, **line) for k, line in enumerate(lines)],
        ended=outcome(),
        devices=[device_line(k, accuracy=value, loss=value) for k, value in enumerate(devices)],
    )
    check(*report(one))
    check(*report(one, write_run(tmp_path / "two")))
