"""Leases and updates that are not what a plan asked for: each is refused in one line and changes nothing."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
import numpy as np
import pytest

from fedtt.errors import Refused
from fedtt.messages import (
    Code,
    Failure,
    FailureCode,
    UpdateState,
    encode,
)
from tests.support.served import LAYOUT, Answer, Attacked, Peer, frame_of, refused

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("nothing_accepted_is_lost")]

NOWHERE = "/v1/leases/" + "0" * 32
NOBODY = "0" * 64


# leases


async def test_a_lease_that_was_never_given_takes_nothing(device: Peer) -> None:
    for method, path in (("PUT", f"{NOWHERE}/update"), ("GET", NOWHERE)):
        refused(await device.request(method, path), Code.UNKNOWN_LEASE, "0" * 32, "check in for new work")
    failure = encode(Failure(code=FailureCode.OTHER))
    refused(await device.request("POST", f"{NOWHERE}/failure", failure), Code.UNKNOWN_LEASE)


async def test_the_lease_of_another_device_is_as_good_as_unknown(place: Attacked, device: Peer) -> None:
    lease = f"/v1/leases/{place.receipt.lease}"
    refused(
        await device.request("PUT", f"{lease}/update", place.frame), Code.UNKNOWN_LEASE, "never given to this"
    )
    refused(await device.request("GET", lease), Code.UNKNOWN_LEASE)
    failure = encode(Failure(code=FailureCode.OTHER))
    refused(await device.request("POST", f"{lease}/failure", failure), Code.UNKNOWN_LEASE)


async def test_a_lease_takes_one_update_and_no_other(place: Attacked, device: Peer) -> None:
    work = await device.work()
    frame = frame_of(work.plan)
    receipt = await device.transport.upload(work.lease, frame)
    assert await device.transport.upload(work.lease, frame) == receipt
    answer = await device.request("PUT", f"/v1/leases/{work.lease}/update", frame_of(work.plan, examples=6))
    refused(answer, Code.CONFLICT, work.lease, "drop this one and check in")
    assert await device.transport.receipt(work.lease) == receipt


async def test_a_lease_that_was_given_back_takes_no_update_and_forges_no_line_of_the_log(
    device: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    work = await device.work()
    with caplog.at_level(logging.INFO):
        await device.transport.fail(work.lease, Failure(code=FailureCode.OTHER, detail="\nforged"))
    assert "\n" not in caplog.records[-1].getMessage()
    answer = await device.request("PUT", f"/v1/leases/{work.lease}/update", frame_of(work.plan))
    refused(answer, Code.STALE, "the lease was given back", "check in for new work")


async def test_a_device_that_leaves_takes_its_own_update_with_it_and_no_other(device: Peer) -> None:
    receipt = await device.update()
    await device.transport.leave(erase=False)
    gone = await device.transport.receipt(receipt.lease)
    assert (gone.state, gone.reason) == (UpdateState.DISCARDED, "its device left")


# updates


async def put(device: Peer, frame: bytes) -> Answer:
    return await device.request("PUT", f"/v1/leases/{(await device.work()).lease}/update", frame)


async def test_an_update_for_another_layout_or_codec_is_refused(device: Peer) -> None:
    plan = (await device.work()).plan
    remedy = "check in again and train by the new plan"
    refused(
        await put(device, frame_of(plan, layout=b"otherone")), Code.WRONG_LAYOUT, b"otherone".hex(), remedy
    )
    coarse = msgspec.structs.replace(plan, codec=msgspec.structs.replace(plan.codec, quantise="int4"))
    # 114 numbers of 4 bytes
    refused(await put(device, frame_of(coarse)), Code.WRONG_LAYOUT, "this layout and codec need 456", remedy)


async def test_a_frame_cut_anywhere_or_lengthened_is_refused_and_the_whole_one_taken(device: Peer) -> None:
    work = await device.work()
    frame = frame_of(work.plan)
    path = f"/v1/leases/{work.lease}/update"
    for length in {0, 1, 4, 10, 13, 14, *range(20, len(frame), 37), len(frame) - 1}:
        refused(
            await device.request("PUT", path, frame[:length]),
            Code.MALFORMED,
            "send the stored frame unchanged",
        )
    refused(await device.request("PUT", path, frame + b"\0"), Code.MALFORMED, "send the frame whole")
    assert (await device.transport.upload(work.lease, frame)).state is UpdateState.ACCEPTED


async def test_a_frame_with_any_bit_flipped_is_refused_and_the_sound_one_taken(device: Peer) -> None:
    work = await device.work()
    frame = frame_of(work.plan)
    for bit in range(0, 8 * len(frame), 25):  # an odd stride meets each of the eight bits of a byte
        flipped = bytearray(frame)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Refused) as caught:
            await device.transport.upload(work.lease, bytes(flipped))
        assert caught.value.problem.code is Code.MALFORMED, bit
    assert (await device.transport.upload(work.lease, frame)).state is UpdateState.ACCEPTED


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
async def test_factors_that_are_not_finite_are_refused(device: Peer, value: float) -> None:
    delta = np.zeros(LAYOUT.size, np.float32)
    delta[7] = value
    answer = await put(device, frame_of((await device.work()).plan, delta))
    refused(answer, Code.NOT_FINITE, "NaN or infinite factors", "drop it; training diverged")


@pytest.mark.parametrize("header", [{"examples": 0}, {"steps": 0}])
async def test_an_update_that_stands_for_nothing_is_refused(device: Peer, header: dict[str, Any]) -> None:
    answer = await put(device, frame_of((await device.work()).plan, **header))
    refused(answer, Code.MALFORMED, "at least one example and one step")


@pytest.mark.parametrize("loss", [np.nan, np.inf])
async def test_losses_that_are_not_finite_are_refused(device: Peer, loss: float) -> None:
    answer = await put(device, frame_of((await device.work()).plan, loss_last=loss))
    refused(answer, Code.MALFORMED, "losses are not finite")
