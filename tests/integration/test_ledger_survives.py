"""What an acknowledged commit promises, with real processes that are killed and real files that are read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from storage.records import MAIN, UpdateState
from storage.sql import SqlStore
from tests.support import ledger

ROOT = Path(__file__).parents[2]

KEEP_THEN_HANG = """
import sys, time
from storage.sql import SqlStore
from tests.support import ledger
store = SqlStore.open(sys.argv[1])
with store.transaction() as tx:
    ledger.open_round(tx)
    ledger.upload(tx, "kept", payload=bytes(50_000))
with store.transaction() as tx:
    tx.add_version(ledger.version(1))
    tx.settle([ledger.lease("kept").id], ledger.update().state.FOLDED, folded_into=1)
    for i in range(200):
        ledger.upload(tx, i, payload=bytes(50_000))  # more than the page cache holds: written to the log
    print("inside", flush=True)
    time.sleep(60)
"""

COUNT_UP = """
import sys
from msgspec.structs import replace
from storage.sql import SqlStore
from tests.support import ledger
store = SqlStore.open(sys.argv[1])
for _ in range(50):
    with store.transaction() as tx:
        alice = tx.device(ledger.device("alice").id)
        tx.put_device(replace(alice, examples=alice.examples + 1))
store.close()
"""


def _start(script: str, path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, str(path)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_process_killed_inside_a_transaction_leaves_what_it_had_committed_and_no_more(
    tmp_path: Path,
) -> None:
    path = tmp_path / "ledger.db"
    with _start(KEEP_THEN_HANG, path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "inside\n"
        os.kill(process.pid, signal.SIGKILL)
    with closing(SqlStore.open(path)) as store, store.reading() as tx:
        assert tx.versions(1) == [ledger.version(0)]
        assert tx.rounds(1) == [ledger.round_(1)]
        expected = ledger.update("kept", sequence=1)
        assert list(tx.updates(1, MAIN, 1, UpdateState.ACCEPTED)) == [expected]
        assert tx.payloads([expected]) == [bytes(50_000)]
        assert tx.lease(ledger.lease("0").id) is None


def test_a_closed_ledger_opens_again_with_everything_in_it(tmp_path: Path) -> None:
    with closing(SqlStore.open(tmp_path / "ledger.db")) as store, store.transaction() as tx:
        ledger.open_round(tx)
        tx.put_token(ledger.token())
        update = ledger.upload(tx)
    with closing(SqlStore.open(tmp_path / "ledger.db")) as store, store.reading() as tx:
        assert tx.token(ledger.sha256("secret")) == ledger.token()
        assert [device.id for device in tx.devices()] == sorted(
            ledger.device(name).id for name in ("alice", "bob")
        )
        assert tx.bundle(ledger.bundle().sha256) == ledger.bundle()
        assert tx.tasks() == [ledger.task(id=1)]
        assert tx.versions(1) == [ledger.version(0)]
        assert tx.rounds(1) == [ledger.round_(1)]
        assert tx.lease(update.lease_id) is not None
        assert tx.update(update.lease_id) == update


def test_transactions_of_several_processes_happen_one_after_another(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with closing(SqlStore.open(path)) as store:
        with store.transaction() as tx:
            ledger.open_round(tx)
        for process in [_start(COUNT_UP, path) for _ in range(2)]:
            with process:
                assert process.wait() == 0
        with store.reading() as tx:  # 7 + 2·50 = 107
            assert tx.device(ledger.device("alice").id) == ledger.device("alice", examples=107)


@pytest.mark.parametrize("payload_bytes", [24, 300, 4_000, 50_000])
def test_settled_payloads_are_in_no_file_any_more(payload_bytes: int, tmp_path: Path) -> None:
    secrets = {str(i): os.urandom(payload_bytes) for i in range(40)}
    with closing(SqlStore.open(tmp_path / "ledger.db")) as store:
        with store.transaction() as tx:
            ledger.open_round(tx)
        for name, secret in secrets.items():
            with store.transaction() as tx:
                ledger.upload(tx, name, payload=secret)
        assert len(_found(secrets, tmp_path)) == 40
        settled = list(secrets)[::2]
        with store.transaction() as tx:
            tx.settle([ledger.lease(n).id for n in settled], UpdateState.DISCARDED, reason="test")
        assert not store.wipe()
        assert store.maintain()
        assert _found(secrets, tmp_path) == set(secrets) - set(settled)


def test_what_a_server_settled_and_did_not_wipe_is_wiped_by_the_next(tmp_path: Path) -> None:
    secret = {"a": os.urandom(5_000)}
    with closing(SqlStore.open(tmp_path / "ledger.db")) as store, store.transaction() as tx:
        ledger.open_round(tx)
        ledger.upload(tx, "a", payload=secret["a"])
        tx.settle([ledger.lease("a").id], UpdateState.DISCARDED, reason="test")
    assert _found(secret, tmp_path)
    with closing(SqlStore.open(tmp_path / "ledger.db")) as store:
        assert not store.wipe()
        assert store.maintain()
        assert not _found(secret, tmp_path)


def test_what_a_server_settled_and_did_not_wipe_is_wiped_by_those_that_live_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = {"a": os.urandom(5_000)}
    with closing(SqlStore.open(tmp_path / "ledger.db", alone=False)) as survivor:
        assert not survivor.wipe()
        with closing(SqlStore.open(tmp_path / "ledger.db", alone=False)) as other, other.transaction() as tx:
            ledger.open_round(tx)
            ledger.upload(tx, "a", payload=secret["a"])
            tx.settle([ledger.lease("a").id], UpdateState.DISCARDED, reason="test")
        assert not survivor.wipe()
        assert _found(secret, tmp_path)
        monkeypatch.setattr("storage.sql._LOOK_AGAIN_S", 0.0)
        assert not survivor.wipe()
        assert survivor.maintain()
        assert not _found(secret, tmp_path)


def _found(secrets: dict[str, bytes], directory: Path) -> set[str]:
    """The names of the secrets of which a piece lies in some file of the directory."""
    stored = b"".join(path.read_bytes() for path in directory.iterdir())
    return {name for name, secret in secrets.items() if any(p in stored for p in _pieces(secret))}


def _pieces(secret: bytes) -> list[bytes]:
    """Sixteen bytes from its beginning, middle and end."""
    return [secret[:16], secret[len(secret) // 2 - 8 :][:16], secret[-16:]]


def test_maintenance_says_when_a_reader_is_in_its_way(tmp_path: Path) -> None:
    with closing(SqlStore.open(tmp_path / "ledger.db", busy_timeout_s=0.05)) as store:
        with store.reading() as tx:
            assert tx.tasks() == []
            with store.transaction() as writing:
                ledger.open_round(writing)
            assert not store.wipe()
            assert not store.maintain()
        assert store.maintain()
        assert (tmp_path / "ledger.db-wal").stat().st_size == 0
