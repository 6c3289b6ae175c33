from __future__ import annotations

from pathlib import Path

import pytest

from edge_client.files import publish
from edge_client.home import Home
from edge_client.identity import Identity
from edge_client.journal import Idle, Journal, Trained, read_state
from fedtt.errors import StorageError
from fedtt.messages import Receipt, UpdateState

LEASE = "ab" * 16


def trained(residual: bytes = b"next") -> Trained:
    return Trained(lease=LEASE, frame=b"frame", residual_key="task:layout", residual=residual)


def receipt(state: UpdateState = UpdateState.ACCEPTED) -> Receipt:
    return Receipt(lease=LEASE, digest="0" * 64, state=state)


def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    Journal(Home(tmp_path)).update(server="https://a", phase=trained(), residuals={"k": b"old"})
    state = Journal(Home(tmp_path)).state
    assert state.server == "https://a"
    assert state.phase == trained()
    assert state.residuals == {"k": b"old"}


def test_the_state_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    Journal(Home(tmp_path))
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o600


def test_a_receipt_moves_the_next_residual_in(tmp_path: Path) -> None:
    journal = Journal(Home(tmp_path))
    journal.update(phase=trained(), residuals={"task:layout": b"old", "other": b"kept"})
    journal.commit(receipt())
    state = Journal(Home(tmp_path)).state
    assert state.phase == Idle()
    assert state.residuals == {"task:layout": b"next", "other": b"kept"}
    assert (state.finished_lease, state.acknowledged) == (LEASE, 1)


def test_an_update_the_server_discarded_keeps_the_old_residual(tmp_path: Path) -> None:
    journal = Journal(Home(tmp_path))
    journal.update(phase=trained(), residuals={"task:layout": b"old"})
    journal.commit(receipt(UpdateState.DISCARDED))
    assert journal.state.residuals == {"task:layout": b"old"}
    assert journal.state.phase == Idle()


def test_a_refused_lease_drops_frame_and_next_residual(tmp_path: Path) -> None:
    journal = Journal(Home(tmp_path))
    journal.update(phase=trained(), residuals={"task:layout": b"old"})
    journal.drop(LEASE)
    state = Journal(Home(tmp_path)).state
    assert (state.phase, state.residuals, state.finished_lease) == (Idle(), {"task:layout": b"old"}, LEASE)


def test_nothing_can_be_committed_without_a_trained_lease(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trained lease"):
        Journal(Home(tmp_path)).commit(receipt())


def test_every_truncation_and_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    Journal(Home(tmp_path)).update(server="https://a", phase=trained())
    whole = (tmp_path / "state").read_bytes()
    for at in range(len(whole)):
        flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        for damaged in (whole[:at], flipped):
            (tmp_path / "state").write_bytes(damaged)
            with pytest.raises(StorageError, match=r"state cannot be read, it is damaged.*--local-only"):
                read_state(Home(tmp_path))
            with pytest.raises(StorageError):
                Journal(Home(tmp_path))
            assert (tmp_path / "state").read_bytes() == damaged, "nobody may reset it silently"


def test_a_state_that_vanished_beside_the_key_is_not_begun_anew(tmp_path: Path) -> None:
    home = Home(tmp_path)
    Journal(home)
    Identity.open(home)
    home.state.unlink()
    with pytest.raises(StorageError, match="missing beside the device's key"):
        Journal(home)


def test_a_state_of_another_release_is_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    import msgspec

    body = msgspec.msgpack.encode({"format": 2})
    Home(tmp_path).state.write_bytes(b"fTTj" + hashlib.sha256(body).digest() + body)
    with pytest.raises(StorageError, match="another release wrote it"):
        read_state(Home(tmp_path))


def test_a_crash_before_the_rename_leaves_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PowerCutError(BaseException):
        pass

    def cut(partial: Path, path: Path) -> None:
        raise PowerCutError

    journal = Journal(Home(tmp_path))
    journal.update(server="https://old")
    monkeypatch.setattr("edge_client.files.publish", cut)
    with pytest.raises(PowerCutError):
        journal.update(server="https://new")
    assert journal.state.server == "https://old"
    monkeypatch.setattr("edge_client.files.publish", publish)
    reopened = Journal(Home(tmp_path))
    assert reopened.state.server == "https://old"
    reopened.update(server="https://newer")
    assert Journal(Home(tmp_path)).state.server == "https://newer"
