"""What a release key vouches for: bundles by itself, and a server's answers through a key that it certifies.

A release key is an Ed25519 key that never lies on a server. A bundle's manifest bears its signature. A server
has a key of its own and a `Delegation`: the release key's word that this key speaks for it until some time.
With it the server signs its answers to check-ins by RFC 9421, bound to the signature of the very request, so
that no earlier answer can be played again. This file builds and reads the bytes; the programs sign and check
them with a library.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Literal

import msgspec
from msgspec import Struct

from fedtt.errors import BundleError, ConfigError, WireError
from fedtt.messages import device_id
from fedtt.names import Sha256

__all__ = [
    "DELEGATION_HEADER",
    "Delegation",
    "ServerKeyFile",
    "SignedAnswer",
    "answer_base",
    "answer_headers",
    "delegation_base",
    "manifest_claim",
    "parse_answer",
    "parse_public_key",
    "read_server_key",
    "request_signature",
    "signed_manifest",
]

DELEGATION_HEADER = "Fedtt-Delegation"
_UNSIGNED = b'  "signature": null\n}\n'
_SIGNED = re.compile(rb'  "signature": "(?P<value>[0-9a-f]{128})"\n}\n')
_TAIL_BYTES = len(_UNSIGNED) - len(b"null") + 130

_COVERED = '("@status" "content-digest" "signature";req;key="sig1")'
_INPUT = re.compile(
    r"sig1="
    + re.escape(_COVERED)
    + r';created=(?P<created>0|[1-9][0-9]{0,11});keyid="(?P<key>[0-9a-f]{32})";alg="ed25519"'
)
_VALUE = re.compile(r"sig1=(?P<value>:[A-Za-z0-9+/]{85}[AQgw]==:)")


def parse_public_key(text: str, field: str) -> bytes:
    """The 32 bytes of a public key in hex; raises ConfigError."""
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise ConfigError(field, text, "64 hex digits, as `fedtt key create` prints them")
    return bytes.fromhex(text)


# bundles


def manifest_claim(data: bytes) -> tuple[bytes, bytes | None]:
    """The bytes that a manifest's signature covers, and the signature; None where it bears none.

    Covered is the file itself with `null` in the place of the signature, its last value.
    """
    if found := _SIGNED.fullmatch(data[-_TAIL_BYTES:]):
        return data[:-_TAIL_BYTES] + _UNSIGNED, bytes.fromhex(found["value"].decode())
    return data, None


def signed_manifest(data: bytes, signature: bytes) -> bytes:
    """A manifest with this signature in place of its own; raises BundleError where none has room."""
    covered, _ = manifest_claim(data)
    if not covered.endswith(_UNSIGNED):
        raise BundleError("the manifest is not as `fedtt export` writes it: export the bundle again")
    return covered[: -len(_UNSIGNED)] + f'  "signature": "{signature.hex()}"\n}}\n'.encode()


# servers


class Delegation(Struct, frozen=True, kw_only=True):
    """A release key's word that another key answers for it."""

    release_key: bytes  #: 32 bytes
    server_key: bytes  #: 32 bytes
    expires: int  #: Unix seconds
    signature: bytes  #: 64 bytes, by the release key over `delegation_base`

    @property
    def header(self) -> str:
        """The value of `DELEGATION_HEADER`."""
        expires = self.expires.to_bytes(8, "little")
        return base64.b64encode(self.release_key + self.server_key + expires + self.signature).decode()

    @classmethod
    def parse(cls, header: str) -> Delegation:
        """Read a header's value; raises WireError."""
        try:
            data = base64.b64decode(header, validate=True)
        except (binascii.Error, ValueError):
            data = b""
        if len(data) != 136:  # 32 + 32 + 8 + 64
            raise WireError(f"{DELEGATION_HEADER} must be 136 bytes in base64")
        expires = int.from_bytes(data[64:72], "little")
        return cls(release_key=data[:32], server_key=data[32:64], expires=expires, signature=data[72:])


def delegation_base(release_key: bytes, server_key: bytes, expires: int) -> bytes:
    """The bytes that a release key signs for a server's key."""
    return b"fedtt-delegation-1\n" + release_key + server_key + expires.to_bytes(8, "little")


class ServerKeyFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `fedtt key delegate` writes and `fedtt serve --server-key` reads, as JSON."""

    format: Literal[1] = 1
    private_key: Sha256
    delegation: str  #: as in the header


_SERVER_KEY = msgspec.json.Decoder(ServerKeyFile)


def read_server_key(data: bytes, where: str) -> ServerKeyFile:
    """Raises ConfigError where the file is another one."""
    try:
        return _SERVER_KEY.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise ConfigError("--server-key", where, "a file that `fedtt key delegate` wrote") from None


# answers


class SignedAnswer(Struct, frozen=True, kw_only=True):
    """What is signed of one answer (RFC 9421 §2.4): it belongs to one request alone."""

    status: int
    digest: str  #: value of Content-Digest
    request_signature: str  #: the request's own, `:base64:`
    created: int  #: Unix seconds
    server_key: bytes  #: 32 bytes


def request_signature(header: str) -> str:
    """`:base64:` of a request's Signature header; raises WireError for another one."""
    found = _VALUE.fullmatch(header)
    if found is None:
        raise WireError("Signature must follow the profile in docs/protocol.md")
    return found["value"]


def _params(answer: SignedAnswer) -> str:
    return f'{_COVERED};created={answer.created};keyid="{device_id(answer.server_key)}";alg="ed25519"'


def answer_base(answer: SignedAnswer) -> bytes:
    """The bytes that are signed."""
    lines = {
        '"@status"': answer.status,
        '"content-digest"': answer.digest,
        '"signature";req;key="sig1"': answer.request_signature,
        '"@signature-params"': _params(answer),
    }
    return "\n".join(f"{name}: {value}" for name, value in lines.items()).encode()


def answer_headers(answer: SignedAnswer, signature: bytes, delegation: Delegation) -> dict[str, str]:
    """The four headers that carry a signature of 64 bytes."""
    return {
        "Content-Digest": answer.digest,
        "Signature-Input": f"sig1={_params(answer)}",
        "Signature": f"sig1=:{base64.b64encode(signature).decode()}:",
        DELEGATION_HEADER: delegation.header,
    }


def parse_answer(
    status: int, digest: str, request: str, signature_input: str, signature: str, server_key: bytes
) -> tuple[SignedAnswer, bytes]:
    """The claim of an answer's headers and its 64 bytes; raises WireError unless they follow the profile.

    request: the Signature header of the request.
    """
    params, value = _INPUT.fullmatch(signature_input), _VALUE.fullmatch(signature)
    if params is None or value is None:
        raise WireError("the answer is not signed as docs/protocol.md says")
    answer = SignedAnswer(
        status=status,
        digest=digest,
        request_signature=request_signature(request),
        created=int(params["created"]),
        server_key=server_key,
    )
    if params["key"] != device_id(server_key):
        raise WireError("the answer's keyid is not that of the delegated key")
    return answer, base64.b64decode(value["value"].strip(":"))
