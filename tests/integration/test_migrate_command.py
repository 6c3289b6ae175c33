"""`fedtt migrate`: a person takes a ledger to an older schema and back, beside a server that waits it out."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from fedtt.cli import main
from storage.migrate import newest_schema, revisions
from storage.sql import SqlStore
from tests.support import ledger
from tests.support.postgresql import needs_postgresql, server


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=needs_postgresql)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """Where a ledger with one row lies, as options."""
    on_sqlite = request.param == "sqlite"
    database: Path | str = tmp_path / "fedtt.db" if on_sqlite else server().new_database()
    with closing(SqlStore.open(database)) as store, store.transaction() as tx:
        ledger.open_round(tx)
    return ["--data", str(tmp_path)] if on_sqlite else ["--database", str(database)]


def test_a_ledger_goes_back_and_forward_and_keeps_its_rows(
    place: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    newest, older = newest_schema(), revisions()[-3]
    for to, said in (
        ([], f"schema {newest}, as before"),
        (["--to", older], f"schema {older}, where it was {newest}"),
        (["--to", older], f"schema {older}, as before"),
        (["--to", revisions()[-2]], f"schema {revisions()[-2]}, where it was {older}"),
        (["--to", revisions()[0]], f"schema {revisions()[0]}, where it was {revisions()[-2]}"),
        ([], f"schema {newest}, where it was {revisions()[0]}"),
    ):
        assert main(["migrate", *place, *to]) == 0
        assert capsys.readouterr().out == said + "\n"
    database = place[1] if place[0] == "--database" else Path(place[1]) / "fedtt.db"
    with closing(SqlStore.open(database)) as store, store.reading() as tx:
        (task,) = tx.tasks()
        assert task == ledger.task(id=1, draw_key=task.draw_key)  # which is made anew
        assert len(task.draw_key) == 32


def test_a_schema_that_nobody_knows_changes_nothing(
    place: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["migrate", *place, "--to", "9999"]) != 0
    said = capsys.readouterr().err
    assert re.search(r"--to = '9999' is not allowed: one of 0001, .*" + newest_schema(), said)
    assert main(["migrate", *place, "--json"]) == 0
    assert f'"before":"{newest_schema()}"' in capsys.readouterr().out


def test_a_ledger_that_is_not_there_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate", "--data", str(tmp_path / "none")]) != 0
    assert "does not exist: `fedtt serve` makes it" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "fedtt.db").touch()
    assert main(["migrate", "--data", str(tmp_path)]) != 0
    assert "holds no ledger: `fedtt serve` makes one" in capsys.readouterr().err
    with closing(sqlite3.connect(tmp_path / "fedtt.db")) as database:
        assert database.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
