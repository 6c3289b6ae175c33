"""What a device that trusts a release key takes: bundles it signed, and answers by a key it vouches for."""

from __future__ import annotations

from collections.abc import Mapping

from fedtt.errors import BundleError, WireError
from fedtt.release import (
    DELEGATION_HEADER,
    Delegation,
    answer_base,
    delegation_base,
    manifest_claim,
    parse_answer,
)
from fedtt.signature import content_digest

__all__ = ["check_answer", "check_manifest"]


def _is_by(key: bytes, signature: bytes, data: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature  # not needed where no key is trusted
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def check_manifest(data: bytes, where: str, release_key: bytes) -> None:
    """Raises BundleError unless the release key has signed this manifest."""
    covered, signature = manifest_claim(data)
    if signature is None:
        raise BundleError(f"{where} is not signed, and this device runs only what its release key signed")
    if not _is_by(release_key, signature, covered):
        raise BundleError(f"{where} is not signed by the release key of this device, {release_key.hex()}")


def check_answer(
    status: int, headers: Mapping[str, str], body: bytes, request: str, release_key: bytes, now: float
) -> None:
    """Raises WireError unless a key that the release key vouches for has signed this answer to this request.

    request: the Signature header of the request. now: Unix seconds.
    """
    if DELEGATION_HEADER not in headers:
        raise WireError("the answer is not signed, and this device follows only servers of its release key")
    delegation = Delegation.parse(headers[DELEGATION_HEADER])
    base = delegation_base(delegation.release_key, delegation.server_key, delegation.expires)
    if delegation.release_key != release_key or not _is_by(release_key, delegation.signature, base):
        raise WireError(
            f"the server's release key is {delegation.release_key.hex()}, this device trusts "
            f"{release_key.hex()}: is it the right server?"
        )
    if delegation.expires < now:
        raise WireError(
            "the server's key has expired: whoever runs the server must have it renewed, "
            "unless this device's clock is ahead"
        )
    digest = headers.get("Content-Digest", "")
    signed_input, signature = headers.get("Signature-Input", ""), headers.get("Signature", "")
    answer, value = parse_answer(status, digest, request, signed_input, signature, delegation.server_key)
    if digest != content_digest(body) or not _is_by(delegation.server_key, value, answer_base(answer)):
        raise WireError("the answer's signature does not match: it was changed, or answers another request")
