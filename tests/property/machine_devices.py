"""What devices send, in any order, and what they make of the answers."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import rule
from msgspec.structs import replace

from aggregator.uploads import Admission, Upload
from fedtt.messages import (
    AsTold,
    CheckIn,
    Code,
    Enroll,
    Enrolled,
    Problem,
    Receipt,
    Retired,
    Tell,
    Wait,
    Work,
)
from storage.records import DeviceState
from tests.property.machine_server import ServerMachine
from tests.property.machine_state import (
    DEVICES,
    ModelDevice,
    digest_of,
    is_refused,
    upload_of,
)

__all__ = ["DeviceMachine"]

CHECK_IN = CheckIn(client="machine", runtimes=("onnxruntime",), examples=3)
SHORT = (CHECK_IN.as_told(), replace(CHECK_IN, examples=4).as_told())


class DeviceMachine(ServerMachine):
    """Rules of devices, with the server's between admission and acceptance."""

    def begin(self) -> None:
        super().begin()
        for i in range(DEVICES - 1):
            self.enroll(i, crash=False)

    @rule(i=st.integers(0, DEVICES - 1), crash=st.booleans())
    def enroll(self, i: int, crash: bool) -> None:
        device = self.devices[i]
        message = Enroll(public_key=device.key, token="secret", client="machine")
        answer = self._transact(
            lambda tx: self.coordinator.enroll(tx, self.now, message, digest_of(b"secret")), crash=crash
        )
        if answer is not None:
            assert isinstance(answer, Enrolled)
            device.id, device.erased = answer.device, False

    @rule(i=st.integers(0, DEVICES - 1), crash=st.booleans(), lost=st.booleans())
    def check_in(self, i: int, crash: bool, lost: bool) -> None:
        self._check_in(self.devices[i], CHECK_IN, crash=crash, lost=lost)

    @rule(i=st.integers(0, DEVICES - 1), told=st.sampled_from(SHORT), crash=st.booleans(), lost=st.booleans())
    def check_in_as_told(self, i: int, told: AsTold, crash: bool, lost: bool) -> None:
        """Of other facts than the row's nothing comes, not even a nonce that is used up."""
        device = self.devices[i]
        with self.store.reading() as tx:
            before = tx.device(device.id)
        kept = CHECK_IN if before is None else replace(CHECK_IN, examples=before.examples)
        if before is None or before.state is not DeviceState.ACTIVE or kept.as_told() == told:
            self._check_in(device, told, crash=crash, lost=lost)
            return
        self.nonce += 1
        nonce = self.nonce
        answer = self._transact(
            lambda tx: self.coordinator.check_in(tx, self.now, device.id, told, nonce), crash=crash
        )
        assert answer == (None if crash else Tell())
        with self.store.reading() as tx:
            assert tx.device(device.id) == before
        self._check_in(
            device, replace(CHECK_IN, examples=4 if told is SHORT[1] else 3), crash=False, lost=lost
        )

    def _check_in(self, device: ModelDevice, message: CheckIn | AsTold, *, crash: bool, lost: bool) -> None:
        if not device.id or device.lease is not None:
            return
        self.nonce += 1
        nonce = self.nonce
        answer = self._transact(
            lambda tx: self.coordinator.check_in(tx, self.now, device.id, message, nonce), crash=crash
        )
        if isinstance(answer, Work | Wait):
            device.nonce = nonce
        if isinstance(answer, Work) and not lost:
            device.lease = answer
        elif answer is not None and not isinstance(answer, Work):
            assert (
                is_refused(answer, Code.UNKNOWN_DEVICE)
                if device.erased
                else isinstance(answer, Wait | Retired)
            )

    @rule(i=st.integers(0, DEVICES - 1))
    def replay_the_last_check_in(self, i: int) -> None:
        device, message = self.devices[i], (CHECK_IN, *SHORT)[i % 3]
        if device.nonce:
            answer = self._transact(
                lambda tx: self.coordinator.check_in(tx, self.now, device.id, message, device.nonce)
            )
            gone = device.erased and is_refused(answer, Code.UNKNOWN_DEVICE)
            assert gone or is_refused(answer, Code.REPLAYED) or isinstance(answer, Retired)

    @rule(i=st.integers(0, DEVICES - 1), change=st.integers(-50, 50))
    def train(self, i: int, change: int) -> None:
        device = self.devices[i]
        if device.lease is None or device.frame is not None:
            return
        target = change + device.residual
        sent = 4 * round(target / 4)
        device.trained, device.next_residual = change, target - sent
        device.frame = f"{device.lease.lease} {sent}".encode()

    @rule(i=st.integers(0, DEVICES - 1), crash=st.booleans(), lost=st.booleans(), late=st.booleans())
    def upload(self, i: int, crash: bool, lost: bool, late: bool) -> None:
        """Send the stored frame; the server may die, the answer may be lost, a fold may come between."""
        device = self.devices[i]
        if device.lease is None or device.frame is None:
            return
        answer = self._send(device, device.lease.lease, device.frame, crash=crash, late=late)
        if answer is None or lost:
            if isinstance(answer, Receipt):
                self.receipts.setdefault(answer.lease, answer)
            return  # the outcome is unknown: the device keeps frame and both residuals
        self._learn(device, answer)

    @rule(order=st.permutations(range(DEVICES)), twice=st.booleans())
    def upload_together(self, order: list[int], twice: bool) -> None:
        """Stored frames that meet in one commit, the first of them twice."""
        sent: list[tuple[ModelDevice, Upload]] = []
        with self.store.reading() as tx:
            for device in (self.devices[i] for i in order):
                if device.lease is not None and device.frame is not None:
                    lease, digest = device.lease.lease, digest_of(device.frame)
                    admission = self.coordinator.admit(tx, device.id, lease, digest)
                    if isinstance(admission, Admission):
                        sent.append((device, upload_of(admission, device.frame)))
        uploads = [upload for _, upload in sent + sent[:twice]]
        answers = self._transact(lambda tx: self.coordinator.accept_all(tx, self.now, uploads))
        assert answers[len(sent) :] == answers[: len(answers) - len(sent)]
        for (device, _), answer in zip(sent, answers, strict=False):
            self._learn(device, answer)

    def _learn(self, device: ModelDevice, answer: Receipt | Problem) -> None:
        if isinstance(answer, Receipt):
            self._commit(device, answer)
        elif answer.code is not Code.BUSY:
            self._drop(device)

    def _send(
        self, device: ModelDevice, lease: str, frame: bytes, *, crash: bool, late: bool
    ) -> Receipt | Problem | None:
        digest = digest_of(frame)
        with self.store.reading() as tx:
            admission = self.coordinator.admit(tx, device.id, lease, digest)
        if late:
            self.advance(crash=False)
            self.fold(crash=False, twice=False)
        if not isinstance(admission, Admission):
            return admission
        upload = upload_of(admission, frame)
        answer: Receipt | Problem | None = self._transact(
            lambda tx: self.coordinator.accept(tx, self.now, upload), crash=crash
        )
        return answer

    def _commit(self, device: ModelDevice, receipt: Receipt) -> None:
        assert device.frame is not None
        assert receipt.digest == digest_of(device.frame)
        self.receipts.setdefault(receipt.lease, receipt)
        device.acknowledged_trained += device.trained
        device.acknowledged_sent += int(device.frame.split()[1])
        device.residual = device.next_residual
        device.old_frames[receipt.lease] = device.frame
        self._drop(device)

    @staticmethod
    def _drop(device: ModelDevice) -> None:
        device.lease = device.frame = None

    @rule(i=st.integers(0, DEVICES - 1), data=st.data())
    def send_an_acknowledged_frame_again(self, i: int, data: st.DataObject) -> None:
        device = self.devices[i]
        if not device.old_frames:
            return
        lease = data.draw(st.sampled_from(sorted(device.old_frames)))
        answer = self._send(device, lease, device.old_frames[lease], crash=False, late=False)
        assert is_refused(answer, Code.UNKNOWN_DEVICE) if device.erased else isinstance(answer, Receipt)

    @rule(i=st.integers(0, DEVICES - 1), data=st.data())
    def send_other_bytes_under_an_acknowledged_lease(self, i: int, data: st.DataObject) -> None:
        device = self.devices[i]
        if not device.old_frames:
            return
        lease = data.draw(st.sampled_from(sorted(device.old_frames)))
        answer = self._send(device, lease, b"other 0", crash=False, late=False)
        assert is_refused(answer, Code.UNKNOWN_DEVICE if device.erased else Code.CONFLICT)

    @rule(i=st.integers(0, DEVICES - 1), j=st.integers(0, DEVICES - 1))
    def send_under_anothers_lease(self, i: int, j: int) -> None:
        thief, owner = self.devices[i], self.devices[j]
        if i == j or not thief.id or owner.lease is None:
            return
        answer = self._send(thief, owner.lease.lease, b"stolen 0", crash=False, late=False)
        assert is_refused(answer, Code.UNKNOWN_DEVICE if thief.erased else Code.UNKNOWN_LEASE)

    @rule(i=st.integers(0, DEVICES - 1), crash=st.booleans())
    def give_the_lease_back(self, i: int, crash: bool) -> None:
        device = self.devices[i]
        if device.lease is None:
            return
        lease = device.lease.lease
        self._transact(lambda tx: self.coordinator.fail(tx, device.id, lease), crash=crash)
        if not crash:
            self._drop(device)

    @rule(i=st.integers(0, DEVICES - 1), erase=st.booleans())
    def leave(self, i: int, erase: bool) -> None:
        device = self.devices[i]
        if device.id:
            self._transact(lambda tx: self.coordinator.leave(tx, device.id, erase=erase))
            device.erased |= erase
