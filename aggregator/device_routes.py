"""The calls of devices: bytes to value, error to status, nothing else."""

from __future__ import annotations

from functools import partial

from aiohttp import web

from aggregator.auth import claim_of, verify, verify_key
from aggregator.blob_answers import blob_answer
from aggregator.handling import (
    AUTHORITIES,
    KEYS,
    SERVICE,
    ProblemError,
    answer,
    checked,
    read_body,
    read_message,
)
from aggregator.problems import bad_signature, busy, not_found, too_many
from aggregator.service import Proof, Service
from fedtt.manifest import MANIFEST, decode_manifest
from fedtt.messages import (
    DIFFERENCE_MEDIA_TYPE,
    MESSAGE_LIMIT_BYTES,
    Code,
    Enroll,
    Failure,
    Problem,
    Verdict,
    decode,
    decode_check_in,
)
from fedtt.signature import Signed, content_digest, hex_digest

_FOR_EVER = {"Cache-Control": "private, max-age=31536000, immutable"}

__all__ = ["add_device_routes", "serve_bundle_file"]


def _claim(request: web.Request) -> tuple[Signed, bytes]:
    """Who says to have sent this request, and with which signature; not verified yet."""
    authority, known = request.headers.get("Host", ""), request.app[AUTHORITIES]
    if known and authority.lower() not in known:
        raise ProblemError(bad_signature(f"Host is {authority[:100]!r}, which is no name of this server"))
    return checked(claim_of(request.method, authority, request.rel_url.raw_path, request.headers))


async def _sender(request: web.Request) -> Signed:
    """The device that signed this request; its body is not read yet, its digest is part of the claim."""
    service = request.app[SERVICE]
    claim, signature = _claim(request)
    _admit(request, claim, await service.sender(claim.device, _proof(service, claim, signature)))
    return claim


def _admit(request: web.Request, claim: Signed, problem: Problem | None) -> None:
    """Refuse whoever is not the device that signed, and a device that asks too often."""
    if problem is not None:
        raise ProblemError(problem)
    if wait_s := request.app[KEYS].take(claim.device, request.app[SERVICE].clock.now()):
        raise ProblemError(too_many("this device"), wait_s)


def _proof(service: Service, claim: Signed, signature: bytes) -> Proof:
    """What a look at the store checks of a claim, on the store's thread."""
    return lambda device: verify(claim, signature, device, service.clock.now())


async def _signed_body(request: web.Request, claim: Signed, limit_bytes: int) -> bytes:
    body = await read_body(request, limit_bytes)
    if content_digest(body) != claim.digest:
        raise ProblemError(bad_signature("Content-Digest does not match the body"))
    return body


async def _bare_sender(request: web.Request) -> Signed:
    """The device that signed a request which has no body."""
    claim = await _sender(request)
    await _signed_body(request, claim, 0)
    return claim


async def enroll(request: web.Request) -> web.Response:
    """Signed by the very key that it brings, so that nobody enrols a key of someone else."""
    service = request.app[SERVICE]
    claim, signature = _claim(request)
    message = read_message(
        await _signed_body(request, claim, MESSAGE_LIMIT_BYTES), partial(decode, kind=Enroll)
    )
    if problem := verify_key(claim, signature, message.public_key, service.clock.now()):
        raise ProblemError(problem)
    return answer(checked(await service.enroll(message, claim.nonce)))


async def check_in(request: web.Request) -> web.Response:
    claim = await _sender(request)
    message = read_message(await _signed_body(request, claim, MESSAGE_LIMIT_BYTES), decode_check_in)
    service = request.app[SERVICE]
    found = await service.check_in(claim.device, message, claim.nonce)
    if isinstance(found, Problem) and found.code is Code.BUSY:
        raise ProblemError(found, service.pace.again_s(service.clock.now(), claim.device))
    response = answer(checked(found))
    if service.server_key is not None and isinstance(response.body, bytes):
        sender, now = request.headers["Signature"], service.clock.now()
        response.headers.update(service.server_key.sign(response.status, response.body, sender, now))
    return response


async def upload(request: web.Request) -> web.Response:
    """Whether it may come and from whom is one look at the store, for this call comes in crowds."""
    service, lease = request.app[SERVICE], request.match_info["lease"]
    claim, signature = _claim(request)
    digest = hex_digest(claim.digest)
    problem, admitted = await service.admit(claim.device, lease, digest, _proof(service, claim, signature))
    _admit(request, claim, problem)
    if not isinstance(admitted, tuple):
        return answer(checked(admitted))
    admission, limit_bytes = admitted
    return answer(checked(await service.upload(admission, await read_body(request, limit_bytes), digest)))


async def receipt(request: web.Request) -> web.Response:
    claim = await _bare_sender(request)
    return answer(checked(await request.app[SERVICE].receipt(claim.device, request.match_info["lease"])))


async def verdict(request: web.Request) -> web.Response:
    claim = await _sender(request)
    message = read_message(
        await _signed_body(request, claim, MESSAGE_LIMIT_BYTES), partial(decode, kind=Verdict)
    )
    checked(await request.app[SERVICE].judge(claim.device, request.match_info["lease"], message))
    return web.Response(status=204)


async def failure(request: web.Request) -> web.Response:
    claim = await _sender(request)
    message = read_message(
        await _signed_body(request, claim, MESSAGE_LIMIT_BYTES), partial(decode, kind=Failure)
    )
    checked(await request.app[SERVICE].fail(claim.device, request.match_info["lease"], message))
    return web.Response(status=204)


async def leave(request: web.Request) -> web.Response:
    claim = await _bare_sender(request)
    erase = request.method == "DELETE"
    checked(await request.app[SERVICE].leave(claim.device, erase=erase, nonce=claim.nonce))
    return web.Response(status=204)


async def version(request: web.Request) -> web.StreamResponse:
    await _bare_sender(request)
    sha256, held = request.match_info["sha256"], request.query.get("from")
    service = request.app[SERVICE]
    difference = checked(await service.difference(sha256, held))
    if difference is None:
        return await blob_answer(request, sha256, checked=True, **_FOR_EVER)
    return web.Response(body=difference, content_type=DIFFERENCE_MEDIA_TYPE, headers=_FOR_EVER)


async def bundle_file(request: web.Request) -> web.StreamResponse:
    await _bare_sender(request)
    return await serve_bundle_file(request)


async def serve_bundle_file(request: web.Request) -> web.StreamResponse:
    """One file of a bundle, with Range."""
    service = request.app[SERVICE]
    sha256, name = request.match_info["sha256"], request.match_info["file"]
    bundle = await service.read(lambda tx: tx.bundle(sha256))
    if bundle is None:
        raise ProblemError(not_found(f"bundle {sha256[:12]}…"))
    if name == MANIFEST:
        return web.Response(body=bundle.manifest, content_type="application/json")
    entry = decode_manifest(bundle.manifest).files.get(name)
    if entry is None:
        raise ProblemError(not_found(f"file {name[:100]!r} in bundle {sha256[:12]}…"))
    return await blob_answer(request, entry.sha256)


async def healthz(_: web.Request) -> web.Response:
    return web.json_response({"ok": True})


async def readyz(request: web.Request) -> web.Response:
    """Whether a balancer may send devices here: 503 while the server stops or its ledger cannot be read."""
    service = request.app[SERVICE]
    if service.draining:
        raise ProblemError(busy("this server is about to stop"))
    await service.read(lambda tx: tx.last_audit())
    return web.json_response({"ready": True})


def add_device_routes(app: web.Application) -> None:
    lease = "/v1/leases/{lease:[0-9a-f]{32}}"
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_post("/v1/enroll", enroll)
    app.router.add_post("/v1/check-in", check_in)
    app.router.add_get("/v1/bundles/{sha256:[0-9a-f]{64}}/{file}", bundle_file)
    app.router.add_get("/v1/versions/{sha256:[0-9a-f]{64}}", version)
    app.router.add_put(f"{lease}/update", upload)
    app.router.add_get(lease, receipt)
    app.router.add_post(f"{lease}/failure", failure)
    app.router.add_post(f"{lease}/verdict", verdict)
    app.router.add_post("/v1/device/leave", leave)
    app.router.add_delete("/v1/device", leave)
