"""Targets of `benchmarks.fuzz` that read who signed what: requests, answers, delegations, manifests.

Headers come one a line.
"""

from __future__ import annotations

import base64
import contextlib

from benchmarks.fuzz_inputs import sound_manifest
from benchmarks.fuzz_target import Target, law
from fedtt.errors import BundleError
from fedtt.manifest import decode_manifest
from fedtt.release import (
    Delegation,
    SignedAnswer,
    answer_headers,
    manifest_claim,
    parse_answer,
    signed_manifest,
)
from fedtt.signature import Signed, content_digest, parse_signature, signature_headers

__all__ = ["signed_targets"]

_DELEGATION = Delegation(
    release_key=bytes(32), server_key=bytes(range(32)), expires=1_800_000_000, signature=bytes(64)
)


def signed_targets() -> dict[str, Target]:
    """name -> target."""
    manifest = sound_manifest()
    return {
        "signature": Target(_signature, (_sound_signature(),)),
        "delegation": Target(_delegation, (_DELEGATION.header.encode(),)),
        "answer": Target(_answer, (_sound_answer(),)),
        "claim": Target(_claim, (manifest, signed_manifest(manifest, bytes(range(64))))),
    }


def _signature(data: bytes) -> None:
    """Whoever is taken writes the very lines again."""
    digest, given, value = [*data.decode("latin-1").split("\n", 2), "", ""][:3]
    signed, raw = parse_signature("PUT", "example.org", "/v1", digest, given, value)
    with law():
        lines = _request_lines(signed, raw)
        assert lines == f"{digest}\n{given}\n{value}".encode("latin-1")
        assert parse_signature("PUT", "example.org", "/v1", *lines.decode().split("\n")) == (signed, raw)


def _delegation(data: bytes) -> None:
    found = Delegation.parse(data.decode("latin-1"))
    with law():
        assert Delegation.parse(found.header) == found


def _answer(data: bytes) -> None:
    """Whoever is taken writes the very lines again."""
    digest, request, given, value = [*data.decode("latin-1").split("\n", 3), "", "", ""][:4]
    found, raw = parse_answer(200, digest, request, given, value, _DELEGATION.server_key)
    assert _answer_lines(found, raw) == f"{digest}\n{request}\n{given}\n{value}".encode("latin-1")


def _claim(data: bytes) -> None:
    """Covered is all but the signature, which is the one that a manifest's reader finds."""
    covered, signature = manifest_claim(data)
    if signature is None:
        assert covered == data
        return
    with law():
        assert signed_manifest(data, signature) == signed_manifest(covered, signature) == data
    assert manifest_claim(covered) == (covered, None)
    with contextlib.suppress(BundleError):
        assert decode_manifest(data).signature == signature.hex()


def _sound_signature() -> bytes:
    """Of an upload."""
    signed = Signed(
        method="PUT",
        authority="example.org",
        path="/v1",
        digest=content_digest(b""),
        created=1_700_000_000,
        expires=1_700_000_060,
        nonce=1_700_000_000_000_000,
        device="0" * 32,
    )
    return _request_lines(signed, bytes(64))


def _request_lines(signed: Signed, raw: bytes) -> bytes:
    """The three headers of a signed request."""
    headers = signature_headers(signed, raw)
    return "\n".join((signed.digest, headers["Signature-Input"], headers["Signature"])).encode()


def _sound_answer() -> bytes:
    answer = SignedAnswer(
        status=200,
        digest=content_digest(b""),
        request_signature=f":{base64.b64encode(bytes(64)).decode()}:",
        created=1_700_000_000,
        server_key=_DELEGATION.server_key,
    )
    return _answer_lines(answer, bytes(64))


def _answer_lines(answer: SignedAnswer, raw: bytes) -> bytes:
    """The headers of a signed answer, after the digest the signature of the request that it is to."""
    headers = answer_headers(answer, raw, _DELEGATION)
    request = f"sig1={answer.request_signature}"
    lines = (answer.digest, request, headers["Signature-Input"], headers["Signature"])
    return "\n".join(lines).encode("latin-1")
