from __future__ import annotations

from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fedtt.errors import WireError
from fedtt.messages import device_id
from fedtt.signature import Signed, content_digest, parse_signature, signature_base, signature_headers

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw()
SIGNED = Signed(
    method="POST",
    authority="example.org:8440",
    path="/v1/check-in",
    digest=content_digest(b"{}"),
    created=1_700_000_000,
    expires=1_700_000_300,
    nonce=1_700_000_000_000_000,
    device=device_id(PUBLIC),
)
VALUE = KEY.sign(signature_base(SIGNED))
HEADERS = signature_headers(SIGNED, VALUE)


def parse(**changes: str) -> tuple[Signed, bytes]:
    parts = {
        "method": "POST",
        "authority": "example.org:8440",
        "path": "/v1/check-in",
        "digest": HEADERS["Content-Digest"],
        "signature_input": HEADERS["Signature-Input"],
        "signature": HEADERS["Signature"],
    }
    return parse_signature(**{**parts, **changes})


def test_the_signature_base_is_the_text_of_rfc_9421() -> None:
    # sha256("{}") and sha256 of the public key of the seed 00 01 … 1f, computed outside with openssl
    assert signature_base(SIGNED).decode() == (
        '"@method": POST\n'
        '"@authority": example.org:8440\n'
        '"@path": /v1/check-in\n'
        '"content-digest": sha-256=:RBNvo1WzZ4oRRq0W9+hknpT7T8If536DEMBg9hyq/4o=:\n'
        '"@signature-params": ("@method" "@authority" "@path" "content-digest")'
        ';created=1700000000;keyid="56475aa75463474c0285df5dbf2bcab7";alg="ed25519";expires=1700000300;nonce="1700000000000000"'
    )


def test_the_content_digest_is_that_of_rfc_9530() -> None:
    # RFC 9530, appendix D, for this body
    body = b'{"hello": "world"}\n'
    assert content_digest(body) == "sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:"


def test_a_fixed_key_gives_a_fixed_signature() -> None:
    assert HEADERS == {
        "Content-Digest": "sha-256=:RBNvo1WzZ4oRRq0W9+hknpT7T8If536DEMBg9hyq/4o=:",
        "Signature-Input": 'sig1=("@method" "@authority" "@path" "content-digest");created=1700000000'
        ';keyid="56475aa75463474c0285df5dbf2bcab7";alg="ed25519";expires=1700000300;nonce="1700000000000000"',
        "Signature": "sig1=:p31Yo/BVdFrGXHShLy+vhcqV+361PKBDOaFMpQSwhYGMc1ByNSbz"
        "qZlP07DOZSJD8OzCxj6etjgxE9A6z2jkCg==:",
    }


def test_what_was_signed_is_read_back_and_verifies() -> None:
    claim, value = parse()
    assert claim == SIGNED
    KEY.public_key().verify(value, signature_base(claim))


@pytest.mark.parametrize(
    "change",
    [
        {"method": "PUT"},
        {"authority": "example.org"},
        {"path": "/v1/check-in/"},
        {"digest": content_digest(b"{} ")},
        {"created": 1_700_000_001},
        {"expires": 1_700_000_299},
        {"nonce": 1_700_000_000_000_001},
        {"device": "0" * 32},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_change_of_any_signed_part_breaks_the_signature(change: dict[str, Any]) -> None:
    tampered = replace(SIGNED, **change)
    assert signature_base(tampered) != signature_base(SIGNED)
    with pytest.raises(InvalidSignature):
        KEY.public_key().verify(VALUE, signature_base(tampered))


def test_the_authority_is_signed_in_lower_case() -> None:
    assert signature_base(replace(SIGNED, authority="Example.ORG:8440")) == signature_base(SIGNED)


_INPUT, _VALUE = HEADERS["Signature-Input"], HEADERS["Signature"]


@pytest.mark.parametrize(
    "change",
    [
        {"signature_input": ""},
        {"signature": ""},
        {"signature_input": _INPUT.replace("sig1", "sig2")},
        {"signature_input": _INPUT.replace(' "@path"', "")},
        {"signature_input": _INPUT.replace('"@method" "@authority"', '"@authority" "@method"')},
        {"signature_input": _INPUT.replace("ed25519", "hmac-sha256")},
        {"signature_input": _INPUT.replace(";alg", ";tag=1;alg")},
        {"signature_input": _INPUT.replace(";nonce", ";tag=1;nonce")},
        {"signature_input": _INPUT.replace(";expires=1700000300", "")},
        {"signature_input": _INPUT.replace(';nonce="1700000000000000"', "")},
        {"signature_input": _INPUT.replace('nonce="17', 'nonce="017')},
        {"signature_input": _INPUT.replace('nonce="17', 'nonce="x17')},
        {"signature_input": _INPUT.replace('nonce="17', 'nonce="117')},
        {"signature_input": _INPUT + ", " + _INPUT},
        {"signature_input": " " + _INPUT},
        {"signature_input": _INPUT.replace("=1700000000", "=-1700000000")},
        {"signature_input": _INPUT.replace("=1700000000", "=01700000000")},
        {"signature_input": _INPUT.replace("=1700000000", "=1.7e9")},
        {"signature_input": _INPUT.replace("=1700000000", "=١٧٠٠٠٠٠٠٠٠")},
        {"signature_input": _INPUT.replace("=1700000000", "=1700000000000")},
        {"signature_input": _INPUT.replace('keyid="56', 'keyid="5')},
        {"signature_input": _INPUT.replace('keyid="56475aa', 'keyid="56475AA')},
        {"signature": _VALUE.replace("sig1", "sig2")},
        {"signature": _VALUE.replace("==:", ":")},
        {"signature": _VALUE[:10] + "!" + _VALUE[11:]},
        {"signature": _VALUE.replace("==:", "AA==:")},
        {"signature": _VALUE[:-4] + "B==:"},  # bits beyond the 64 bytes
        {"signature": _VALUE + ", " + _VALUE},
    ],
)
def test_a_header_off_the_profile_is_refused(change: dict[str, str]) -> None:
    with pytest.raises(WireError, match=r"must follow the profile in docs/protocol\.md"):
        parse(**change)


@pytest.mark.parametrize("expires", [1_699_999_999, 1_700_000_000, 1_700_000_301])
def test_a_signature_lasts_five_minutes_at_most(expires: int) -> None:
    text = _INPUT.replace("expires=1700000300", f"expires={expires}")
    with pytest.raises(WireError, match="must lie 1 to 300 s after its created"):
        parse(signature_input=text)


@given(
    created=st.integers(0, 10**12 - 301),
    lasts=st.integers(1, 300),
    nonce=st.integers(1, 10**16 - 1),
    device=st.binary(min_size=16, max_size=16),
    value=st.binary(min_size=64, max_size=64),
)
@settings(deadline=None, max_examples=60)
def test_headers_and_claim_are_one_to_one(
    created: int, lasts: int, nonce: int, device: bytes, value: bytes
) -> None:
    signed = replace(SIGNED, created=created, expires=created + lasts, nonce=nonce, device=device.hex())
    headers = signature_headers(signed, value)
    claim, raw = parse(signature_input=headers["Signature-Input"], signature=headers["Signature"])
    assert (claim, raw) == (signed, value)
    assert signature_headers(claim, raw) == headers


@given(st.text(max_size=200), st.text(max_size=100))
@settings(deadline=None, max_examples=60)
def test_any_text_is_a_claim_or_a_wire_error(signature_input: str, signature: str) -> None:
    with pytest.raises(WireError):
        parse(signature_input=signature_input, signature=signature)
