"""Our profile of RFC 9421 against an independent implementation of the whole of it, both ways."""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass, field

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from http_message_signatures import (
    HTTPMessageSigner,
    HTTPMessageVerifier,
    InvalidSignature,
    MappingKeyResolver,
)
from http_message_signatures.algorithms import ED25519

from aggregator.auth import claim_of, verify_key
from edge_client.identity import Identity
from fedtt.messages import Problem

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
IDENTITY = Identity(KEY)
KEYS = MappingKeyResolver(
    public_keys={IDENTITY.device: KEY.public_key()}, private_keys={IDENTITY.device: KEY}
)
HOST = "example.org:8440"
LEASE = "/v1/leases/00112233445566778899aabbccddeeff"
CALLS = [
    ("POST", "/v1/check-in", b"{}"),
    ("PUT", LEASE + "/update", bytes(range(256))),
    ("GET", "/v1/versions/" + "a" * 64 + "?from=" + "b" * 64, b""),
    ("DELETE", "/v1/device", b""),
]


@dataclass
class Message:
    """What the other implementation asks of a request."""

    method: str
    url: str
    headers: dict[str, str] = field(default_factory=dict)


def message(method: str, path: str) -> Message:
    return Message(method, f"https://{HOST}{path}")


@pytest.mark.parametrize(("method", "path", "body"), CALLS, ids=[call[0] for call in CALLS])
def test_what_a_device_signs_verifies_elsewhere(method: str, path: str, body: bytes) -> None:
    request, now = message(method, path), int(time.time())
    plain = path.partition("?")[0]
    request.headers |= IDENTITY.sign(
        method=method, authority=HOST, path=plain, body=body, created=now, nonce=now
    )
    verifier = HTTPMessageVerifier(signature_algorithm=ED25519, key_resolver=KEYS)
    (found,) = verifier.verify(request)
    assert verifier.verify_body(request, [found], body)[0].body == body
    assert (found.label, found.nonce) == ("sig1", str(now))
    assert found.parameters["expires"] == now + 300
    request.url = request.url.replace("example.org", "example.com")
    with pytest.raises(InvalidSignature):
        verifier.verify(request)


@pytest.mark.parametrize(("method", "path", "body"), CALLS, ids=[call[0] for call in CALLS])
def test_what_is_signed_elsewhere_is_taken_here(method: str, path: str, body: bytes) -> None:
    request, now = message(method, path), int(time.time())
    HTTPMessageSigner(signature_algorithm=ED25519, key_resolver=KEYS).sign(
        request,
        key_id=IDENTITY.device,
        created=datetime.datetime.fromtimestamp(now, datetime.UTC),
        expires=datetime.datetime.fromtimestamp(now + 60, datetime.UTC),
        nonce="7",
        label="sig1",
        covered_component_ids=("@method", "@authority", "@path", "content-digest"),
        body=body,
    )
    claim = claim_of(method, HOST, path.partition("?")[0], request.headers)
    assert not isinstance(claim, Problem), claim
    signed, signature = claim
    assert verify_key(signed, signature, IDENTITY.public_key, now) is None
    assert (signed.expires, signed.nonce) == (now + 60, 7)
    late = verify_key(signed, signature, IDENTITY.public_key, now + 61)
    assert late is not None
    assert late.now == now + 61
