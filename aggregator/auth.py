"""Which device sends a request: by Ed25519 signature."""

from __future__ import annotations

from collections.abc import Mapping

from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

from aggregator.problems import bad_signature, clock_skew, revoked, unknown_device
from fedtt.errors import WireError
from fedtt.messages import Problem, device_id
from fedtt.signature import Signed, parse_signature, signature_base
from storage.records import Device, DeviceState

__all__ = ["CLOCK_SKEW_S", "claim_of", "verify", "verify_key"]

CLOCK_SKEW_S = 300.0  #: how far a signature's time may lie from the server's


def claim_of(
    method: str, authority: str, path: str, headers: Mapping[str, str]
) -> tuple[Signed, bytes] | Problem:
    """What a request claims about its sender; nothing is verified yet."""
    try:
        return parse_signature(
            method,
            authority,
            path,
            headers.get("Content-Digest", ""),
            headers.get("Signature-Input", ""),
            headers.get("Signature", ""),
        )
    except WireError as error:
        return bad_signature(str(error))


def verify(claim: Signed, signature: bytes, device: Device | None, now: float) -> Problem | None:
    """None where the device did sign this, recently."""
    if device is None or device.state is DeviceState.ERASED:
        return unknown_device()
    if problem := verify_key(claim, signature, device.public_key, now):
        return problem
    return revoked() if device.revoked_at is not None else None


def verify_key(claim: Signed, signature: bytes, public_key: bytes, now: float) -> Problem | None:
    """None where whoever holds this key did sign this, recently."""
    try:
        if device_id(public_key) != claim.device:
            return bad_signature("keyid is not the name of the key that signs")
        VerifyKey(public_key).verify(signature_base(claim), signature)
    except BadSignatureError:
        return bad_signature("the signature does not match the request")
    if abs(claim.created - now) > CLOCK_SKEW_S or claim.expires < now:
        return clock_skew(claim.created, now)
    return None
