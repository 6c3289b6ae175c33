"""Signed requests: a fixed profile of RFC 9421 (HTTP Message Signatures) with Ed25519.

Covered, in this order: "@method" "@authority" "@path" "content-digest"; parameters created, keyid (the
device's name), alg, expires and nonce (a number that rises from request to request); one label, `sig1`.
This file builds and reads the text, the programs sign and check it with a library. The body's digest is
that of RFC 9530 with sha-256.
"""

from __future__ import annotations

import base64
import hashlib
import re

from msgspec import Struct

from fedtt.errors import WireError

__all__ = [
    "LASTS_S",
    "LATEST_S",
    "Signed",
    "content_digest",
    "hex_digest",
    "parse_signature",
    "signature_base",
    "signature_headers",
]

LASTS_S = 300  #: longest that a request may be good for
LATEST_S = 9e9  #: Unix seconds, in 2255: as microseconds they are a nonce

_COVERED = '("@method" "@authority" "@path" "content-digest")'
_INPUT = re.compile(
    r"sig1="
    + re.escape(_COVERED)
    + r';created=(?P<created>0|[1-9][0-9]{0,11});keyid="(?P<key>[0-9a-f]{32})";alg="ed25519"'
    + r';expires=(?P<expires>[1-9][0-9]{0,11});nonce="(?P<nonce>[1-9][0-9]{0,15})"'
)
_VALUE = re.compile(r"sig1=:(?P<value>[A-Za-z0-9+/]{85}[AQgw]==):")
_DIGEST = re.compile(r"sha-256=:(?P<value>[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=):")


class Signed(Struct, frozen=True, kw_only=True):
    """What is signed: one request by one device at one time."""

    method: str
    authority: str  #: host[:port] as the client addressed it, lower case
    path: str  #: without the query
    digest: str  #: value of Content-Digest
    created: int  #: Unix seconds
    expires: int  #: Unix seconds, at most `LASTS_S` after `created`
    nonce: int  #: above that of every earlier request of this device, below 10**16
    device: str


def content_digest(body: bytes) -> str:
    """The value of the Content-Digest header (RFC 9530)."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


def hex_digest(header: str) -> str:
    """The sha-256 of a Content-Digest header in hex; raises WireError for any other header."""
    found = _DIGEST.fullmatch(header)
    if found is None:
        raise WireError("Content-Digest must be sha-256=:<base64 of 32 bytes>:")
    return base64.b64decode(found["value"]).hex()


def signature_base(signed: Signed) -> bytes:
    """The bytes that are signed (RFC 9421 §2.5); what is no text in a request stands as its raw bytes."""
    lines = {
        "@method": signed.method,
        "@authority": signed.authority.lower(),
        "@path": signed.path,
        "content-digest": signed.digest,
        "@signature-params": _params(signed),
    }
    return "\n".join(f'"{name}": {value}' for name, value in lines.items()).encode(errors="surrogateescape")


def signature_headers(signed: Signed, signature: bytes) -> dict[str, str]:
    """The three headers that carry a signature of 64 bytes."""
    return {
        "Content-Digest": signed.digest,
        "Signature-Input": f"sig1={_params(signed)}",
        "Signature": f"sig1=:{base64.b64encode(signature).decode()}:",
    }


def _params(signed: Signed) -> str:
    who = f'created={signed.created};keyid="{signed.device}";alg="ed25519"'
    return f'{_COVERED};{who};expires={signed.expires};nonce="{signed.nonce}"'


def parse_signature(
    method: str, authority: str, path: str, digest: str, signature_input: str, signature: str
) -> tuple[Signed, bytes]:
    """The claim of a request's headers and its 64 bytes; raises WireError unless they follow the profile."""
    hex_digest(digest)
    params, value = _INPUT.fullmatch(signature_input), _VALUE.fullmatch(signature)
    if params is None or value is None:
        raise WireError("Signature-Input and Signature must follow the profile in docs/protocol.md")
    claim = Signed(
        method=method,
        authority=authority,
        path=path,
        digest=digest,
        created=int(params["created"]),
        expires=int(params["expires"]),
        nonce=int(params["nonce"]),
        device=params["key"],
    )
    if not 0 < claim.expires - claim.created <= LASTS_S:
        raise WireError(f"a signature's expires must lie 1 to {LASTS_S} s after its created")
    return claim, base64.b64decode(value["value"])
