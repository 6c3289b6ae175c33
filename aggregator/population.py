"""Who takes part: devices that enrol, leave, are erased or revoked, and what becomes of their work."""

from __future__ import annotations

from msgspec.structs import replace

from aggregator.problems import bad_token, not_found, replayed, revoked, unknown_device
from aggregator.promised import promised
from fedtt.messages import AsTold, CheckIn, Enroll, Enrolled, Problem, device_id
from storage.records import Device, DeviceState, LeaseState, RoundState, Update, UpdateState
from storage.store import Transaction

__all__ = ["Population", "is_new", "known_device", "newer", "told"]


class Population:
    """The coordinator's calls about devices themselves; stateless."""

    def enroll(
        self, tx: Transaction, now: float, message: Enroll, token_sha256: str, nonce: int | None = None
    ) -> Enrolled | Problem:
        """Take a key into the population; enrolling it again is harmless and costs no use of the token."""
        name = device_id(message.public_key)
        known = tx.device(name)
        if known and known.state is DeviceState.ACTIVE:
            return Enrolled(device=name)
        if known and known.revoked_at is not None:
            return revoked()
        if known and not is_new(known, nonce):
            return replayed()
        token = tx.token(token_sha256)
        if token is None or token.uses_left == 0 or (token.expires_at or now) < now:
            return bad_token()
        if token.uses_left is not None:
            tx.put_token(replace(token, uses_left=token.uses_left - 1))
        tx.put_device(
            Device(
                id=name,
                public_key=message.public_key,
                client=message.client,
                runtimes=(),
                examples=0,
                enrolled_at=now,
                seen_at=now,
                state=DeviceState.ACTIVE,
                last_nonce=newer(known, nonce),
            )
        )
        return Enrolled(device=name)

    def leave(
        self, tx: Transaction, device_name: str, *, erase: bool, nonce: int | None = None
    ) -> Problem | None:
        """Take a device out: its leases end, its updates that are not folded yet are discarded."""
        device = tx.device(device_name)
        if device is None:
            return unknown_device()
        if device.state is DeviceState.ERASED:
            return None
        if not is_new(device, nonce):
            return replayed()
        device = replace(device, last_nonce=newer(device, nonce))
        self._discard(tx, device_name, "its device was erased" if erase else "its device left")
        tx.put_device(_erased(device) if erase else replace(device, state=DeviceState.LEFT))
        if erase:
            tx.forget_settled(device_name)
            tx.forget_participations(device_name)
            tx.forget_evaluations(device_name)
        return None

    def revoke(self, tx: Transaction, now: float, device_name: str) -> Device | Problem:
        """Take a device out for good, on an operator's word: its key is never taken again."""
        device = tx.device(device_name)
        if device is None:
            return not_found(f"device {device_name[:32]}")
        if device.revoked_at is not None:
            return device
        self._discard(tx, device_name, "its device was revoked")
        state = DeviceState.LEFT if device.state is DeviceState.ACTIVE else device.state
        device = replace(device, state=state, revoked_at=now)
        tx.put_device(device)
        return device

    def _discard(self, tx: Transaction, device_name: str, reason: str) -> None:
        """What a device leaves unfinished: its leases end, its updates that no fold has claimed go."""
        discarded = self._not_claimed(tx, tx.updates_of(device_name, UpdateState.ACCEPTED))
        tx.settle(discarded, UpdateState.DISCARDED, reason=reason)
        self._free_seats(tx, device_name, discarded)

    @staticmethod
    def _free_seats(tx: Transaction, device_name: str, discarded: list[str]) -> None:
        """Of leases that will bring their rounds nothing any more."""
        unused = (LeaseState.ACTIVE, LeaseState.EXPIRED)
        leases = [lease for state in unused for lease in tx.leases_of(device_name, state)]
        leases += [promised(tx.lease(lease_id), "an update's lease") for lease_id in discarded]
        for lease in leases:
            tx.put_lease(replace(lease, state=LeaseState.FAILED))

    @staticmethod
    def _not_claimed(tx: Transaction, updates: list[Update]) -> list[str]:
        """Those no fold has claimed: the set being summed is fixed, so that a repeated sum is the same."""
        rounds = {(u.task_id, u.branch, u.round_number) for u in updates}
        claimed = {key for key in rounds if (r := tx.round(*key)) and r.state is RoundState.FOLDING}
        return [u.lease_id for u in updates if (u.task_id, u.branch, u.round_number) not in claimed]


def is_new(device: Device, nonce: int | None) -> bool:
    """Whether a request is later than all that have changed this device; None needs no proof."""
    return nonce is None or nonce > device.last_nonce


def newer(device: Device | None, nonce: int | None) -> int:
    return max(device.last_nonce if device else 0, nonce or 0)


def told(device: Device, message: CheckIn | AsTold) -> CheckIn | None:
    """All that a device says of itself; None where it says to have told it and its row has it otherwise."""
    if isinstance(message, CheckIn):
        return message
    for judges in (False, True):  # of which no row says anything
        kept = CheckIn(
            client=device.client,
            runtimes=device.runtimes,
            examples=device.examples,
            memory_mb=device.memory_mb,
            judges=judges,
        )
        if kept.as_told() == message:
            return kept
    return None


def known_device(tx: Transaction, device_name: str) -> Device | None:
    """None also where it was erased: nothing is left that could tell it from a stranger."""
    device = tx.device(device_name)
    return None if device is None or device.state is DeviceState.ERASED else device


def _erased(device: Device) -> Device:
    """What stays of it: name, times and state."""
    return replace(
        device, state=DeviceState.ERASED, public_key=b"", client="", runtimes=(), examples=0, memory_mb=0
    )
