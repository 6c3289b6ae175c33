"""What every transport promises to a device, in one class; each transport inherits it whole."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from aggregator.app import device_app
from aggregator.service import Service
from edge_client.http_transport import HttpTransport
from edge_client.identity import Identity
from fedtt.codec import CodecSpec
from fedtt.codec.difference import decode_difference
from fedtt.errors import Refused, WireError
from fedtt.manifest import MANIFEST
from fedtt.messages import Code, Enroll, Failure, FailureCode, Retired, Tell, UpdateState, Wait, Work
from fedtt.seams import Transport
from fedtt.task import RoundSpec
from fedtt.wire import version_digest
from tests.support.clock import VirtualClock
from tests.support.device_world import SPEC
from tests.support.edge import write_small_bundle
from tests.support.in_process import TOKEN, InProcess, listening, memory_service
from tests.support.served import CHECK_IN, frame_of
from tests.support.tiny import tiny_spec

BASE_BYTES = 200_000
SIZE = tiny_spec().layout.size
NO_LEASE = "0" * 32
GIVEN_BACK = Failure(code=FailureCode.CONDITIONS)

Reach = Callable[[Identity], Transport]

#: Every call that only a known device may make.
CALLS: dict[str, Callable[[Transport], Awaitable[object]]] = {
    "check_in": lambda transport: transport.check_in(CHECK_IN),
    "bundle_file": lambda transport: anext(transport.bundle_file("0" * 64, MANIFEST, 0)),
    "version": lambda transport: transport.version("0" * 64, 10),
    "upload": lambda transport: transport.upload(NO_LEASE, b"frame"),
    "receipt": lambda transport: transport.receipt(NO_LEASE),
    "fail": lambda transport: transport.fail(NO_LEASE, GIVEN_BACK),
    "leave": lambda transport: transport.leave(erase=False),
    "erase": lambda transport: transport.leave(erase=True),
}


class Server:
    """A service whose rounds seat two devices, and the ways of numbered devices to it."""

    def __init__(self, service: Service, reach: Reach, bundle: Path) -> None:
        self.service, self.bundle = service, bundle
        self._reach, self._opened = reach, AsyncExitStack()

    async def close(self) -> None:
        await self._opened.aclose()

    def stranger(self, number: int) -> tuple[Transport, Enroll]:
        """The way of a device that has not enrolled, and what it enrols with."""
        identity = Identity(Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big")))
        transport = self._reach(identity)
        self._opened.push_async_callback(transport.close)
        return transport, Enroll(public_key=identity.public_key, token=TOKEN, client="test")

    async def device(self, number: int) -> Transport:
        transport, enroll = self.stranger(number)
        await transport.enroll(enroll)
        return transport


async def work_for(transport: Transport) -> Work:
    answer = await transport.check_in(CHECK_IN)
    assert isinstance(answer, Work), answer
    return answer


async def read(transport: Transport, bundle: str, name: str, offset: int = 0) -> list[bytes]:
    return [piece async for piece in transport.bundle_file(bundle, name, offset)]


async def refusal(call: Awaitable[object]) -> Code:
    with pytest.raises(Refused) as caught:
        await call
    return caught.value.problem.code


class TransportContract:
    """Tests of `fedtt.seams.Transport`; a subclass says how devices reach a service."""

    def reaching(self, service: Service, clock: VirtualClock) -> AbstractAsyncContextManager[Reach]:
        raise NotImplementedError

    @pytest.fixture
    async def server(self, tmp_path: Path) -> AsyncIterator[Server]:
        clock, bundle = VirtualClock(), tmp_path / "bundle"
        write_small_bundle(bundle, BASE_BYTES)
        rounds = RoundSpec(count=3, cohort=2, deadline_s=1000, retry_s=10)
        spec = replace(SPEC, rounds=rounds, codec=CodecSpec(quantise="fp32"))
        async with (
            memory_service(tmp_path / "blobs", spec, bundle, clock) as service,
            self.reaching(service, clock) as reach,
        ):
            server = Server(service, reach, bundle)
            yield server
            await server.close()

    # enrolment

    async def test_a_device_is_enrolled_under_its_keys_name_as_often_as_it_asks(self, server: Server) -> None:
        transport, enroll = server.stranger(1)
        name = hashlib.sha256(enroll.public_key).hexdigest()[:32]
        assert [(await transport.enroll(enroll)).device for _ in range(2)] == [name, name]

    async def test_a_token_the_server_never_gave_enrols_nobody(self, server: Server) -> None:
        transport, enroll = server.stranger(1)
        assert await refusal(transport.enroll(replace(enroll, token="guessed"))) is Code.BAD_TOKEN
        assert await refusal(transport.check_in(CHECK_IN)) is Code.UNKNOWN_DEVICE

    # work

    async def test_a_device_that_asks_again_is_given_the_same_lease(self, server: Server) -> None:
        transport = await server.device(1)
        first = await work_for(transport)
        assert (first.plan.task, first.plan.version_number, first.plan.round) == ("lights", 0, 1)
        assert await work_for(transport) == first

    async def test_what_was_told_need_not_be_told_again_and_what_changed_must(self, server: Server) -> None:
        transport = await server.device(1)
        assert await transport.check_in(CHECK_IN.as_told()) == Tell()
        first = await work_for(transport)
        assert await transport.check_in(CHECK_IN.as_told()) == first
        assert await transport.check_in(replace(CHECK_IN, examples=6).as_told()) == Tell()
        assert await transport.check_in(CHECK_IN.as_told()) == first

    async def test_a_device_without_a_seat_waits_and_without_a_graph_too(self, server: Server) -> None:
        for number in (1, 2):
            await work_for(await server.device(number))
        third = await server.device(3)
        for asked in (CHECK_IN, replace(CHECK_IN, runtimes=("abacus",))):
            answer = await third.check_in(asked)
            assert isinstance(answer, Wait)
            assert answer.retry_after_s > 0

    async def test_a_lease_that_is_given_back_seats_another_device(self, server: Server) -> None:
        first, second, third = [await server.device(number) for number in (1, 2, 3)]
        given, kept = await work_for(first), await work_for(second)
        for _ in range(2):
            await first.fail(given.lease, GIVEN_BACK)
        assert isinstance(await first.check_in(CHECK_IN), Wait)
        assert (await work_for(third)).lease not in {given.lease, kept.lease}
        assert await refusal(first.upload(given.lease, frame_of(given.plan))) is Code.STALE

    # downloads

    async def test_a_bundle_comes_whole_and_matches_its_names(self, server: Server) -> None:
        transport = await server.device(1)
        bundle = (await work_for(transport)).plan.bundle
        manifest = b"".join(await read(transport, bundle, MANIFEST))
        assert hashlib.sha256(manifest).hexdigest() == bundle
        for name in ("step.onnx", "eval.onnx", "tokenizer.json", "base.bin"):
            assert b"".join(await read(transport, bundle, name)) == (server.bundle / name).read_bytes()

    @pytest.mark.parametrize("offset", [1, 65_536, 100_000, BASE_BYTES - 1])
    async def test_a_file_comes_from_any_byte_on(self, offset: int, server: Server) -> None:
        transport = await server.device(1)
        bundle = (await work_for(transport)).plan.bundle
        base = (server.bundle / "base.bin").read_bytes()
        assert b"".join(await read(transport, bundle, "base.bin", offset)) == base[offset:]

    async def test_a_download_that_is_stopped_after_every_piece_is_the_same(self, server: Server) -> None:
        transport = await server.device(1)
        bundle, got = (await work_for(transport)).plan.bundle, b""
        pieces = 0
        while len(got) < BASE_BYTES:
            source = transport.bundle_file(bundle, "base.bin", len(got))
            got += await anext(source)
            await source.aclose()
            pieces += 1
        assert got == (server.bundle / "base.bin").read_bytes()
        assert pieces > 1, "no piece holds the whole file"

    async def test_what_is_in_no_bundle_is_not_found(self, server: Server) -> None:
        transport = await server.device(1)
        bundle = (await work_for(transport)).plan.bundle
        assert await refusal(read(transport, bundle, "none.bin")) is Code.NOT_FOUND
        assert await refusal(read(transport, "0" * 64, MANIFEST)) is Code.NOT_FOUND

    async def test_a_versions_bytes_match_its_name(self, server: Server) -> None:
        transport = await server.device(1)
        plan = (await work_for(transport)).plan
        body = await transport.version(plan.version, 4 * SIZE)
        assert not body.difference
        assert version_digest(body.data) == plan.version
        assert body.data == np.zeros(SIZE, "<f4").tobytes()

    async def test_no_more_of_a_version_is_taken_than_was_asked_for(self, server: Server) -> None:
        transport = await server.device(1)
        plan = (await work_for(transport)).plan
        with pytest.raises(WireError, match=f"{4 * SIZE - 1}"):
            await transport.version(plan.version, 4 * SIZE - 1)
        assert await refusal(transport.version("0" * 64, 4 * SIZE)) is Code.NOT_FOUND

    async def test_a_version_comes_as_its_difference_from_the_one_that_is_held(self, server: Server) -> None:
        transport, old, new = await self.two_versions(server)
        whole = (await transport.version(new, 4 * SIZE)).data
        body = await transport.version(new, 4 * SIZE, old)
        assert body.difference
        assert len(body.data) < len(whole) / 2
        assert decode_difference(bytes(4 * SIZE), body.data) == whole
        assert version_digest(whole) == new
        with pytest.raises(WireError, match=f"{len(body.data) - 1}"):
            await transport.version(new, len(body.data) - 1, old)

    async def test_to_who_holds_a_version_the_server_does_not_know_it_comes_whole(
        self, server: Server
    ) -> None:
        transport, _, new = await self.two_versions(server)
        assert await transport.version(new, 4 * SIZE, "0" * 64) == await transport.version(new, 4 * SIZE)

    @pytest.mark.parametrize("held", ["", "0" * 63, "A" * 64, "0" * 64 + "\n", "../" * 30])
    async def test_a_held_version_whose_name_is_none_is_malformed(self, held: str, server: Server) -> None:
        transport = await server.device(1)
        plan = (await work_for(transport)).plan
        assert await refusal(transport.version(plan.version, 4 * SIZE, held)) is Code.MALFORMED

    async def test_a_version_that_is_not_there_is_not_found_whatever_is_held(self, server: Server) -> None:
        transport, old, _ = await self.two_versions(server)
        assert await refusal(transport.version("0" * 64, 4 * SIZE, old)) is Code.NOT_FOUND

    async def two_versions(self, server: Server) -> tuple[Transport, str, str]:
        """A device's way to a server with two versions, and their names; a tenth of the factors moved."""
        delta = np.zeros(SIZE, np.float32)
        delta[: SIZE // 10] = 0.01
        plans = []
        for number in (1, 2):
            transport = await server.device(number)
            work = await work_for(transport)
            await transport.upload(work.lease, frame_of(work.plan, delta))
            plans.append(work.plan)
        await server.service.tick()
        new = (await work_for(transport)).plan.version
        return transport, plans[0].version, new

    # updates

    async def test_an_update_is_acknowledged_and_the_same_bytes_again_too(self, server: Server) -> None:
        transport = await server.device(1)
        work = await work_for(transport)
        frame = frame_of(work.plan)
        receipt = await transport.upload(work.lease, frame)
        assert (receipt.lease, receipt.state) == (work.lease, UpdateState.ACCEPTED)
        assert receipt.digest == hashlib.sha256(frame).hexdigest()
        assert await transport.upload(work.lease, frame) == receipt
        assert await transport.receipt(work.lease) == receipt

    async def test_other_bytes_under_a_used_lease_are_a_conflict(self, server: Server) -> None:
        transport = await server.device(1)
        work = await work_for(transport)
        receipt = await transport.upload(work.lease, frame_of(work.plan))
        other = frame_of(work.plan, examples=6)
        assert await refusal(transport.upload(work.lease, other)) is Code.CONFLICT
        assert await transport.receipt(work.lease) == receipt

    async def test_bytes_that_are_no_update_leave_the_lease_as_it_was(self, server: Server) -> None:
        transport = await server.device(1)
        work = await work_for(transport)
        assert await refusal(transport.upload(work.lease, b"not a frame")) is Code.MALFORMED
        assert await refusal(transport.receipt(work.lease)) is Code.UNKNOWN_LEASE
        receipt = await transport.upload(work.lease, frame_of(work.plan))
        assert receipt.state is UpdateState.ACCEPTED

    @pytest.mark.parametrize("whose", ["nobody's", "another device's"])
    async def test_a_lease_that_is_not_ones_own_is_unknown(self, whose: str, server: Server) -> None:
        mine, theirs = await server.device(1), await server.device(2)
        work = await work_for(theirs)
        lease = work.lease if whose == "another device's" else NO_LEASE
        frame = frame_of(work.plan)
        assert await refusal(mine.upload(lease, frame)) is Code.UNKNOWN_LEASE
        assert await refusal(mine.fail(lease, GIVEN_BACK)) is Code.UNKNOWN_LEASE
        await theirs.upload(work.lease, frame)
        assert await refusal(mine.receipt(lease)) is Code.UNKNOWN_LEASE

    async def test_after_the_fold_a_receipt_names_the_version(self, server: Server) -> None:
        leases = []
        for number in (1, 2):
            transport = await server.device(number)
            work = await work_for(transport)
            frame = frame_of(work.plan)
            await transport.upload(work.lease, frame)
            leases.append((transport, work, frame))
        await server.service.tick()
        for transport, work, frame in leases:
            receipt = await transport.receipt(work.lease)
            assert (receipt.state, receipt.version_number) == (UpdateState.FOLDED, 1)
            assert await transport.upload(work.lease, frame) == receipt

    async def test_the_next_round_starts_from_the_folded_version(self, server: Server) -> None:
        devices = [await server.device(number) for number in (1, 2)]
        for transport in devices:
            work = await work_for(transport)
            await transport.upload(work.lease, frame_of(work.plan))
        await server.service.tick()
        plan = (await work_for(devices[0])).plan
        assert (plan.round, plan.version_number) == (2, 1)
        body = await devices[0].version(plan.version, 4 * SIZE)
        theta = np.frombuffer(body.data, "<f4")
        assert theta == pytest.approx(np.full(SIZE, 0.01))  # 0 + (0.01 + 0.01) / 2

    # leaving

    async def test_a_device_that_left_is_retired_and_keeps_its_receipts(self, server: Server) -> None:
        transport = await server.device(1)
        work = await work_for(transport)
        await transport.upload(work.lease, frame_of(work.plan))
        for _ in range(2):
            await transport.leave(erase=False)
        assert isinstance(await transport.check_in(CHECK_IN), Retired)
        receipt = await transport.receipt(work.lease)
        assert (receipt.state, receipt.reason) == (UpdateState.DISCARDED, "its device left")

    @pytest.mark.parametrize("call", CALLS)
    async def test_an_erased_device_is_a_stranger_to_every_call(self, call: str, server: Server) -> None:
        erased, never_enrolled = await server.device(1), server.stranger(2)[0]
        await erased.leave(erase=True)
        for transport in (erased, never_enrolled):
            assert await refusal(CALLS[call](transport)) is Code.UNKNOWN_DEVICE

    async def test_an_erased_device_may_enrol_again(self, server: Server) -> None:
        await (await server.device(1)).leave(erase=True)
        await server.service.clock.sleep(1)  # a new transport's nonces begin at the time
        await work_for(await server.device(1))


class TestInProcess(TransportContract):
    @asynccontextmanager
    async def reaching(self, service: Service, clock: VirtualClock) -> AsyncIterator[Reach]:
        yield lambda identity: InProcess(service, identity.device)


class TestHttp(TransportContract):
    @asynccontextmanager
    async def reaching(self, service: Service, clock: VirtualClock) -> AsyncIterator[Reach]:
        async with listening(device_app(service)) as url:
            yield lambda identity: HttpTransport(url, identity, clock)
