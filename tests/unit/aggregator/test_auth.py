"""Who sends a request."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from aggregator.auth import claim_of, verify
from aggregator.token_files import same_token, token_sha256
from edge_client.identity import Identity
from fedtt.messages import Code, Problem
from fedtt.signature import Signed
from storage.records import Device, DeviceState
from tests.support import ledger

IDENTITY = Identity(Ed25519PrivateKey.from_private_bytes(bytes(32)))
SIGNED_AT = 1000


def enrolled(**changes: object) -> Device:
    return ledger.device(id=IDENTITY.device, public_key=IDENTITY.public_key, **changes)


def claim() -> tuple[Signed, bytes]:
    headers = IDENTITY.sign(method="GET", authority="h:1", path="/p", body=b"", created=SIGNED_AT, nonce=1)
    found = claim_of("GET", "H:1", "/p", headers)
    assert not isinstance(found, Problem)
    return found


@pytest.mark.parametrize(
    ("now", "code"), [(700.0, None), (1300.0, None), (699.0, Code.CLOCK_SKEW), (1301.0, Code.CLOCK_SKEW)]
)
def test_a_signature_is_good_for_five_minutes_either_way(now: float, code: Code | None) -> None:
    found = verify(*claim(), enrolled(), now)
    assert (found.code if found else None) is code
    if found:
        assert (found.now, "301 s away" in found.detail) == (now, True)


def test_a_wrong_signature_is_not_told_the_time() -> None:
    signed, signature = claim()
    found = verify(replace(signed, path="/other"), signature, enrolled(), 1e9)
    assert found is not None
    assert (found.code, found.now) == (Code.BAD_SIGNATURE, None)


def test_a_device_that_left_may_still_ask_but_an_erased_one_is_unknown() -> None:
    assert verify(*claim(), enrolled(state=DeviceState.LEFT), SIGNED_AT) is None
    for device in (None, enrolled(state=DeviceState.ERASED)):
        found = verify(*claim(), device, SIGNED_AT)
        assert found is not None
        assert "not enrolled here" in found.detail


@pytest.mark.parametrize("token", ["", "x", "\udcff", "ü" * 100])
def test_a_token_is_compared_by_its_hash_whatever_it_is_made_of(token: str) -> None:
    assert same_token(token, token_sha256(token))
    assert not same_token(token, token_sha256("another"))
