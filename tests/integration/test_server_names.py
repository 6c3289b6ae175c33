"""A server that was told its names takes nothing that a device signed for another."""

from __future__ import annotations

import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_client.identity import Identity
from fedtt.messages import MEDIA_TYPE, Code, Enroll, encode
from tests.support.served import CHECK_IN, Answer, refused, served, task_text

DEVICE = Identity(Ed25519PrivateKey.from_private_bytes(b"\5" * 32))
HERE, ELSEWHERE, ADDRESS = "fedtt.example.org:8440", "other.example.org", "10.0.0.7"


async def test_what_is_signed_for_another_name_is_refused(tmp_path: Path) -> None:
    async with served(tmp_path, task_text(), authorities=("FedTT.example.org:8440", ADDRESS)) as server:

        async def ask(path: str, body: bytes, host: str, signed_for: str) -> Answer:
            now = time.time()
            signed = DEVICE.sign(
                method="POST",
                authority=signed_for,
                path=path,
                body=body,
                created=int(now),
                nonce=int(now * 1e6),
            )
            return await server.raw("POST", path, body, signed | {"Host": host, "Content-Type": MEDIA_TYPE})

        enrolling = encode(Enroll(public_key=DEVICE.public_key, token=server.token, client="test"))
        no_name = f"Host is '{ELSEWHERE}', which is no name of this server"
        refused(await ask("/v1/enroll", enrolling, ELSEWHERE, ELSEWHERE), Code.BAD_SIGNATURE, no_name)
        assert (await ask("/v1/enroll", enrolling, HERE, HERE)).status == 200
        check_in = "/v1/check-in", encode(CHECK_IN)
        refused(await ask(*check_in, ELSEWHERE, ELSEWHERE), Code.BAD_SIGNATURE, no_name)
        refused(await ask(*check_in, ADDRESS, ELSEWHERE), Code.BAD_SIGNATURE, "does not match the request")
        assert (await ask(*check_in, ADDRESS, ADDRESS)).status == 200
