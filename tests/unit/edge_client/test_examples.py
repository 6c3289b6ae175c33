from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from edge_client import examples
from edge_client.examples import Example, ExampleLimits, ExampleStore, label_index
from fedtt.errors import ConfigError, DataError, StorageError
from tests.support.clock import VirtualClock

LABELS = ("off", "on")


def texts(store: ExampleStore) -> list[str]:
    return [example.text for example in store.read()]


def test_examples_come_back_in_the_order_they_were_added(tmp_path: Path) -> None:
    path = tmp_path / "examples.db"
    store = ExampleStore(path)
    store.add("lights on", "on")
    store.add("lights off", 0)
    store.add("just words")
    store.close()
    found = ExampleStore(path).read()
    assert [(e.text, e.label) for e in found] == [
        ("lights on", "on"),
        ("lights off", 0),
        ("just words", None),
    ]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_store_of_an_earlier_release_takes_pairs_too(tmp_path: Path) -> None:
    path = tmp_path / "examples.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE example (id INTEGER PRIMARY KEY, text, label, source, file, added_at)")
        db.execute("INSERT INTO example VALUES (1, 'old', 0, '', NULL, 0)")
        db.commit()
    with closing(ExampleStore(path)) as store:
        store.add("a cat", 1, text_pair="an animal")
        assert [(e.text, e.text_pair) for e in store.read()] == [("old", None), ("a cat", "an animal")]


def test_both_texts_of_a_pair_count_towards_its_size() -> None:
    store = ExampleStore(None, ExampleLimits(max_text_bytes=10))
    with pytest.raises(DataError, match="the text has 12 bytes, at most 10 are kept"):
        store.add("123456", text_pair="123456")
    with pytest.raises(DataError, match="a text that is not empty"):
        store.add("123456", text_pair=" ")


def test_the_oldest_go_first_when_there_are_too_many() -> None:
    store = ExampleStore(None, ExampleLimits(max_examples=3))
    for number in range(5):
        store.add(f"text {number}")
    assert texts(store) == ["text 2", "text 3", "text 4"]
    assert store.count() == 3


def test_examples_are_not_used_past_their_age_and_then_deleted() -> None:
    clock = VirtualClock()
    store = ExampleStore(None, ExampleLimits(max_age_s=100), clock)
    store.add("old")
    clock._now += 60
    store.add("young")
    clock._now += 60
    assert texts(store) == ["young"]
    assert store.count() == 1
    store.add("new")
    assert texts(store) == ["young", "new"]


def test_a_clock_that_is_a_week_ahead_for_a_while_deletes_nothing_young() -> None:
    clock, day_s = VirtualClock(), 86400.0
    store = ExampleStore(None, ExampleLimits(max_age_s=5 * day_s), clock)
    store.add("young")
    clock._now += 7 * day_s
    store.add("ahead")
    assert texts(store) == ["ahead"]
    clock._now -= 7 * day_s
    assert texts(store) == ["young", "ahead"]
    clock._now += 12 * day_s + 1
    store.add("new")
    assert store._db.execute("SELECT text FROM example ORDER BY id").fetchall() == [("ahead",), ("new",)]


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_example_needs_a_text(text: str) -> None:
    with pytest.raises(DataError, match="needs a text that is not empty"):
        ExampleStore(None).add(text)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example("a\ud800", None, "f.csv row 7"), "f.csv row 7: a text or label holds half a character"),
        (Example("a", "b\ud800"), "a text or label holds half a character"),
        (Example("a", 2**63, "f.csv row 7"), "f.csv row 7: the label is a number of more than 63 bits"),
    ],
)
def test_what_no_store_can_hold_is_refused(example: Example, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ExampleStore(None).replace_file("f\udcff.csv", [example])


def test_a_file_whose_name_is_not_utf8_may_be_kept() -> None:
    store = ExampleStore(None)
    assert store.replace_file("f\udcff.csv", [Example("a", 1, "f\udcff.csv row 1")]) == 1
    assert store.read()[0].source == r"f\udcff.csv row 1"


def test_a_text_over_the_limit_is_refused_with_both_sizes() -> None:
    store = ExampleStore(None, ExampleLimits(max_text_bytes=10))
    store.add("ääääá")  # 5 characters of 2 bytes
    with pytest.raises(DataError, match="has 11 bytes, at most 10 are kept"):
        store.add("a" * 11)


@pytest.mark.parametrize("field", ["max_examples", "max_text_bytes", "max_age_s"])
def test_a_limit_of_nothing_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"examples.{field} = 0 is not allowed"):
        ExampleLimits(**{field: 0})


def test_a_file_replaces_its_earlier_rows_and_no_others() -> None:
    store = ExampleStore(None)
    store.add("from the app")
    store.replace_file("a.csv", [Example("a1"), Example("a2")])
    store.replace_file("b.csv", [Example("b1")])
    assert store.replace_file("a.csv", [Example("a3")]) == 1
    assert texts(store) == ["from the app", "b1", "a3"]


def test_a_bad_row_leaves_the_store_as_it_was() -> None:
    store = ExampleStore(None)
    store.replace_file("a.csv", [Example("a1")])
    with pytest.raises(DataError, match=r"a\.csv row 3"):
        store.replace_file("a.csv", [Example("fine"), Example(" ", None, "a.csv row 3")])
    assert texts(store) == ["a1"]


def test_many_threads_may_add_while_others_read(tmp_path: Path) -> None:
    store, other = ExampleStore(tmp_path / "e.db"), ExampleStore(tmp_path / "e.db")
    sizes: list[int] = []

    def work(adding: ExampleStore, name: str) -> None:
        for number in range(20):
            adding.add(f"{name} {number}")
            sizes.append(len(adding.read()))

    threads = [threading.Thread(target=work, args=(s, f"t{i}")) for i, s in enumerate((store, store, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.count() == 60  # 3 threads, 20 each
    assert len(sizes) == 60


def test_an_app_adds_while_all_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, go_on, found = threading.Event(), threading.Event(), list[Example]()

    def slow(*row: Any) -> Example:  # what a row becomes, while the query that gave it goes on
        began.set()
        go_on.wait(10)
        return Example(*row)

    with closing(ExampleStore(tmp_path / "e.db")) as store:
        store.replace_file("rows", [Example(f"lights {number}") for number in range(1000)])
        monkeypatch.setattr(examples, "Example", slow)
        reading = threading.Thread(target=lambda: found.extend(store.read()))
        reading.start()
        assert began.wait(10)
        monkeypatch.undo()
        adding = threading.Thread(target=store.add, args=("wake me",))
        adding.start()
        adding.join(5)
        waited = adding.is_alive()
        go_on.set()
        adding.join()
        reading.join()
        assert not waited
        assert len(found) == 1000, "what there was when the reading began"
        assert store.count() == 1001


def test_deleted_texts_leave_no_trace_on_the_disk(tmp_path: Path) -> None:
    store = ExampleStore(tmp_path / "e.db")
    store.add("my mother's maiden name")
    store.clear()
    assert store.count() == 0
    assert all(b"maiden" not in path.read_bytes() for path in tmp_path.iterdir())


def test_a_file_that_is_no_database_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "e.db").write_bytes(b"no database" * 1000)
    with pytest.raises(StorageError, match=r"e.db cannot be used \(file is not a database\)"):
        ExampleStore(tmp_path / "e.db")


@pytest.mark.parametrize(("label", "index"), [("off", 0), ("on", 1), (1, 1), ("1", 1), (0, 0)])
def test_labels_are_names_or_indices(label: str | int, index: int) -> None:
    assert label_index(Example("x", label), LABELS) == index


def test_a_name_of_digits_is_a_name_first() -> None:
    assert label_index(Example("x", "1"), ("1", "0")) == 0


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, "f.csv row 7: the example has no label"),
        ("dim", "f.csv row 7: label 'dim' is not among the task's 2 labels: off, on"),
        (2, r"f.csv row 7: label index 2 is out of range: the task has labels 0\.\.1"),
        (-1, "label index -1 is out of range"),
        ("2", "label index 2 is out of range"),
        pytest.param("9" * 5000, "f.csv row 7: label '9{50}' is not among", id="digits"),
        pytest.param(10**5000, "f.csv row 7: label index of more than 63 bits", id="number"),
    ],
)
def test_a_label_the_task_does_not_have_is_named_with_its_row(label: str | int | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        label_index(Example("x", label, "f.csv row 7"), LABELS)
