from __future__ import annotations

from pathlib import Path

import pytest

from edge_client.files import publish
from edge_client.home import Home
from edge_client.identity import Identity
from edge_client.journal import Idle, Journal, Residual, Trained, read_state
from fedtt.errors import StorageError
from fedtt.messages import Receipt, UpdateState

LEASE = "ab" * 16


OLD = {"task:layout": Residual(version_number=3, data=b"old")}
NEXT = Residual(version_number=4, data=b"next")


def trained(key: str = "task:layout") -> Trained:
    return Trained(lease=LEASE, frame=b"frame", residual_key=key, residual=NEXT)


def journal_with(tmp_path: Path, residuals: dict[str, Residual]) -> Journal:
    journal = Journal(Home(tmp_path))
    journal.update(residuals=residuals)
    return journal


def receipt(state: UpdateState = UpdateState.ACCEPTED) -> Receipt:
    return Receipt(lease=LEASE, digest="0" * 64, state=state)


def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    Journal(Home(tmp_path)).update(server="https://a", phase=trained(), residuals=OLD)
    state = Journal(Home(tmp_path)).state
    assert state.server == "https://a"
    assert state.phase == trained()
    assert state.residuals == OLD


def test_the_state_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    Journal(Home(tmp_path))
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o600


def test_a_receipt_moves_the_next_residual_in(tmp_path: Path) -> None:
    journal = Journal(Home(tmp_path))
    journal.update(phase=trained(), residuals={**OLD, "other": Residual()})
    journal.commit(receipt())
    state = Journal(Home(tmp_path)).state
    assert state.phase == Idle()
    assert state.residuals == {"task:layout": NEXT, "other": Residual()}
    assert (state.finished_lease, state.acknowledged) == (LEASE, 1)


def test_an_update_the_server_discarded_keeps_the_old_residual(tmp_path: Path) -> None:
    journal = Journal(Home(tmp_path))
    journal.update(phase=trained(), residuals=OLD)
    journal.commit(receipt(UpdateState.DISCARDED))
    assert journal.state.residuals == OLD
    assert journal.state.phase == Idle()


def test_a_refused_lease_drops_frame_and_next_residual(tmp_path: Path) -> None:
    journal = Journal(Home(tmp_path))
    journal.update(phase=trained(), residuals=OLD)
    journal.drop(LEASE)
    state = Journal(Home(tmp_path)).state
    assert (state.phase, state.residuals, state.finished_lease) == (Idle(), OLD, LEASE)


@pytest.mark.parametrize(
    ("version_number", "expected"),
    [(2, b""), (3, b"old"), (4, b"old"), (1003, b"old"), (1004, b"")],  # made on 3; 3 + 1000 = 1003
)
def test_a_residual_serves_the_versions_that_follow_its_own(
    tmp_path: Path, version_number: int, expected: bytes
) -> None:
    assert journal_with(tmp_path, OLD).residual("task:layout", version_number) == expected


def test_a_residual_from_before_a_rollback_is_gone_for_good(tmp_path: Path) -> None:
    kept = {"other": Residual(version_number=9, data=b"kept")}
    journal_with(tmp_path, {**OLD, **kept}).residual("task:layout", 0)
    assert Journal(Home(tmp_path)).state.residuals == kept


def test_a_task_without_a_residual_begins_with_none(tmp_path: Path) -> None:
    assert journal_with(tmp_path, OLD).residual("another:layout", 3) == b""


def test_the_residuals_of_eight_tasks_are_kept_and_the_longest_unused_dropped(tmp_path: Path) -> None:
    journal = Journal(Home(tmp_path))
    for task in ("a", "b", "c", "d", "e", "f", "g", "h", "a", "i"):
        journal.update(phase=trained(task))
        journal.commit(receipt())
    assert list(Journal(Home(tmp_path)).state.residuals) == ["c", "d", "e", "f", "g", "h", "a", "i"]


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
