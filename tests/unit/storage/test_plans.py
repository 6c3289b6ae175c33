"""How PostgreSQL means to find what crowds ask for: by index, although their tables are still empty."""

from __future__ import annotations

from contextlib import closing

import pytest
from sqlalchemy import ClauseElement

from storage import statements as sql
from storage.postgresql import PostgresqlBackend
from storage.sql import SqlStore
from tests.support.postgresql import needs_postgresql, server

CROWDS = {
    "leases": sql.leases_named,
    "updates": sql.updates_named,
    "devices": sql.devices_named,
    "participations": sql.participations_of,
    "moves": sql.move_leases.values(state="uploaded"),
    "wiping": sql.payloads_to_wipe,
    "settling": sql.settle.values(state="folded", reason="", folded_into=0),
}


@needs_postgresql
@pytest.mark.parametrize("name", CROWDS)
def test_a_crowd_is_looked_up_by_index_also_while_its_table_is_empty(name: str) -> None:
    statement: ClauseElement = CROWDS[name]
    url = server().new_database()
    SqlStore.open(url).close()
    backend = PostgresqlBackend(url, busy_timeout_s=1.0)
    with closing(backend.writer.connect()) as connection:
        connection.exec_driver_sql("ANALYZE")  # else it takes every new table for one of ten pages
        compiled = statement.compile(backend.writer)
        values = {name: getattr(value, "value", value) for name, value in compiled.params.items()}
        values |= {"names": ["a", "b"], "state": "uploaded", "after": 0, "limit": 64}
        found = connection.exec_driver_sql(f"EXPLAIN {compiled}", values)
        plan = "\n".join(found.scalars())
    backend.writer.dispose()
    assert "Index" in plan
    assert "Seq Scan" not in plan
    assert "Join" not in plan  # which may read a whole index
