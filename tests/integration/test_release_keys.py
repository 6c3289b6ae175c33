"""A device that trusts a release key: what it follows, and what it does not begin."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from http_message_signatures import HTTPMessageVerifier, MappingKeyResolver
from http_message_signatures.algorithms import ED25519
from msgspec.structs import replace

from aggregator.server_key import ServerKey
from edge_client import events
from edge_client.device_config import DeviceConfig
from edge_client.events import Step
from edge_client.examples import ExampleStore
from edge_client.home import Home
from edge_client.journal import Idle, Journal
from edge_client.local_trainer import LocalTrainer
from edge_client.runtime import Runtimes
from edge_client.session import open_device
from export.signing import create_key, delegate, read_key, sign_bundle
from fedtt.errors import FedttError
from fedtt.messages import FailureCode, Retired, encode
from fedtt.release import DELEGATION_HEADER, Delegation
from fedtt.seams import SystemClock
from tests.support.edge import MeanTarget, write_small_bundle
from tests.support.in_process import listening
from tests.support.served import CHECK_IN, Peer, Served, served, task_text


@dataclass
class Keys:
    """A release key and the key of a server that it vouches for."""

    release: Ed25519PrivateKey
    server: Path

    @property
    def public(self) -> bytes:
        return self.release.public_key().public_bytes_raw()


def keys(directory: Path, name: str = "") -> Keys:
    create_key(directory / f"{name}release.key")
    release = read_key(directory / f"{name}release.key")
    delegate(release, directory / f"{name}server.key", 30)
    return Keys(release, directory / f"{name}server.key")


@asynccontextmanager
async def released(directory: Path, trusted: Keys, *, signed: bool = True) -> AsyncIterator[Served]:
    """A server with a key; its bundle is signed, or slipped in before the server knew its key."""
    async with served(directory, server_key=trusted.server) as server:
        write_small_bundle(server.bundle, base_bytes=1000)
        known = server.service.server_key
        if signed:
            sign_bundle(server.bundle, trusted.release)
        else:
            server.service.server_key = None
        digest = await server.admin.send_bundle(server.bundle)
        server.service.server_key = known
        await server.admin.create_task(task_text(), digest)
        yield server


class Ahead(SystemClock):
    """A device on which more time has passed than on the server."""

    def __init__(self, by_s: float) -> None:
        self._by_s = by_s

    def now(self) -> float:
        return super().now() + self._by_s


async def steps(
    directory: Path, url: str, token: str, count: int, *, release_key: bytes = b"", ahead_s: float = 0.0
) -> tuple[list[Step], Home]:
    """The first steps of a device over real HTTP, with a runtime that needs no graph."""
    home, seen, examples = Home(directory / "home"), list[Step](), ExampleStore(None)
    for number in range(5):
        examples.add(f"lights {number}", number % 2)
    async with open_device(
        home.directory,
        server=url,
        examples=examples,
        config=DeviceConfig(token=token),
        release_key=release_key,
        trainer=LocalTrainer(Runtimes(lambda _: MeanTarget())),
        clock=Ahead(ahead_s),
    ) as device:
        await device.consent()
        for _ in range(count):
            seen.append(await device.step())
    return seen, home


async def test_a_device_trusts_the_key_it_is_told_of_when_it_enrols_and_takes_part(tmp_path: Path) -> None:
    trusted = keys(tmp_path)
    async with released(tmp_path, trusted) as server:
        seen, home = await steps(tmp_path, server.url, server.token, 4)
    kinds = [type(step).__name__ for step in seen]
    assert kinds == ["Enrolled", "Granted", "Trained", "Acknowledged"]
    assert Journal(home).state.release_key == trusted.public


async def test_a_bundle_of_another_key_or_none_is_not_taken_by_a_server(tmp_path: Path) -> None:
    trusted, other = keys(tmp_path), keys(tmp_path, "other-")
    async with served(tmp_path, server_key=trusted.server) as server:
        with pytest.raises(
            FedttError, match=f"not signed by the release key of this server, {trusted.public.hex()}"
        ):
            await server.admin.send_bundle(server.bundle)
        sign_bundle(server.bundle, other.release)
        with pytest.raises(FedttError, match="not signed by the release key of this server"):
            await server.admin.send_bundle(server.bundle)
        sign_bundle(server.bundle, trusted.release)  # a new signature takes the place of the old one
        await server.admin.send_bundle(server.bundle)


async def test_a_bundle_that_is_not_signed_is_neither_downloaded_nor_run(tmp_path: Path) -> None:
    async with released(tmp_path, keys(tmp_path), signed=False) as server:
        seen, home = await steps(tmp_path, server.url, server.token, 3)
    gave_up = seen[-1]
    assert isinstance(gave_up, events.GaveUp)
    assert gave_up.code is FailureCode.BUNDLE
    assert "is not signed, and this device runs only what its release key signed" in gave_up.detail
    assert list(home.bundles.iterdir()) == []


@pytest.mark.parametrize("enrolled_before", [False, True])
async def test_a_server_of_another_release_key_is_not_followed(tmp_path: Path, enrolled_before: bool) -> None:
    trusted, other = keys(tmp_path), keys(tmp_path, "other-")
    async with released(tmp_path, trusted) as server:
        if enrolled_before:
            await steps(tmp_path, server.url, server.token, 1)
        seen, home = await steps(tmp_path, server.url, server.token, 2, release_key=other.public)
    for step in seen:
        assert isinstance(step, events.Retrying)
        assert f"the server's release key is {trusted.public.hex()}, this device trusts" in step.error
    assert not home.bundles.exists() or not any(home.bundles.iterdir())


async def test_a_server_without_a_key_is_not_followed_by_a_device_that_trusts_one(tmp_path: Path) -> None:
    async with served(tmp_path, task_text()) as server:
        seen, _ = await steps(tmp_path, server.url, server.token, 2, release_key=bytes(32))
    assert isinstance(seen[-1], events.Retrying)
    assert "the answer is not signed" in seen[-1].error


async def test_a_task_that_goes_back_is_given_back(tmp_path: Path) -> None:
    trusted = keys(tmp_path)
    async with released(tmp_path, trusted) as server:
        _, home = await steps(tmp_path, server.url, server.token, 1)
        Journal(home).update(newest_rounds={"lights": 7})
        seen, _ = await steps(tmp_path, server.url, server.token, 1)
    (gave_up,) = seen
    assert isinstance(gave_up, events.GaveUp)
    assert "task 'lights' went back from round 7 to 1" in gave_up.detail
    assert Journal(home).state.newest_rounds == {"lights": 7}


async def test_a_round_that_should_be_over_is_given_back(tmp_path: Path) -> None:
    """The server stands still: for it, the round's hour has only just begun."""
    trusted = keys(tmp_path)
    async with released(tmp_path, trusted) as server:
        seen, home = await steps(tmp_path, server.url, server.token, 2)
        assert isinstance(seen[-1], events.Granted)
        (ends_at,) = Journal(home).state.round_ends.values()
        assert 3590 < ends_at - time.time() <= 3600
        for ahead_s, kind in ((3600 + 200, events.Granted), (3600 + 400, events.GaveUp)):
            Journal(home).update(phase=Idle())  # as after a crash: the server offers the lease again
            seen, _ = await steps(tmp_path, server.url, server.token, 2, ahead_s=ahead_s)
            step = next(step for step in seen if not isinstance(step, events.Retrying))  # the clock is set
            assert isinstance(step, kind)
            assert Journal(home).state.round_ends == {"lights": ends_at}  # nothing said later moves it
    assert isinstance(step, events.GaveUp)
    assert "task 'lights' stands still at round 1, over for 4" in step.detail


# on the way


@dataclass
class Between:
    """A proxy that passes everything on, and may change the answers to check-ins."""

    target: str
    change: Any = None  #: of status, headers and body
    answers: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)

    async def pass_on(self, request: web.Request) -> web.Response:
        async with (
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.request(
                request.method,
                self.target + request.path_qs,
                data=await request.read(),
                headers=request.headers,
            ) as answer,
        ):
            found = answer.status, dict(answer.headers), await answer.read()
        if request.path == "/v1/check-in":
            self.answers.append(found)
            found = self.change(found) if self.change else found
        status, headers, body = found
        for name in ("Content-Length", "Date", "Server"):
            headers.pop(name, None)
        return web.Response(status=status, headers=headers, body=body)

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.pass_on)
        return app


Found = tuple[int, dict[str, str], bytes]
CHANGES: dict[str, tuple[str, Any]] = {
    "another body": ("does not match", lambda found: (found[0], found[1], encode(Retired(reason="go away")))),
    "another body and its digest": (
        "does not match",
        lambda found: (
            found[0],
            found[1] | {"Content-Digest": "sha-256=:" + "A" * 43 + "=:"},
            found[2],
        ),
    ),
    "no signature": (
        "not signed as",
        lambda found: (found[0], {k: v for k, v in found[1].items() if k != "Signature"}, found[2]),
    ),
    "no delegation": (
        "the answer is not signed",
        lambda found: (found[0], {k: v for k, v in found[1].items() if k != DELEGATION_HEADER}, found[2]),
    ),
    "a delegation of no key": (
        "136 bytes",
        lambda found: (found[0], found[1] | {DELEGATION_HEADER: "AAAA"}, found[2]),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
async def test_an_answer_changed_on_the_way_is_not_followed(tmp_path: Path, name: str) -> None:
    said, change = CHANGES[name]
    async with released(tmp_path, keys(tmp_path)) as server:
        between = Between(server.url, change)
        async with listening(between.app()) as url:
            seen, _ = await steps(tmp_path, url, server.token, 2)
    assert isinstance(seen[1], events.Retrying)
    assert said in seen[1].error


async def test_an_earlier_answer_played_again_is_not_followed(tmp_path: Path) -> None:
    async with released(tmp_path, keys(tmp_path)) as server:
        between = Between(server.url)
        async with listening(between.app()) as url:
            seen, home = await steps(tmp_path, url, server.token, 2)
            assert isinstance(seen[1], events.Granted)
            between.change = lambda _: (
                between.answers[0][0],
                dict(between.answers[0][1]),
                between.answers[0][2],
            )
            Journal(home).drop("another")
            seen, _ = await steps(tmp_path, url, server.token, 1)
    assert isinstance(seen[0], events.Retrying)
    assert (
        "the answer's signature does not match: it was changed, or answers another request" in seen[0].error
    )


async def test_an_expired_key_of_a_server_is_not_followed(tmp_path: Path) -> None:
    trusted = keys(tmp_path)
    async with released(tmp_path, trusted) as server:
        known = server.service.server_key
        assert known is not None
        base_key = Ed25519PrivateKey.generate()
        from fedtt.release import delegation_base

        expires, public = int(time.time()) - 1, base_key.public_key().public_bytes_raw()
        word = trusted.release.sign(delegation_base(trusted.public, public, expires))
        old = Delegation(release_key=trusted.public, server_key=public, expires=expires, signature=word)
        server.service.server_key = ServerKey(base_key, old)
        seen, _ = await steps(tmp_path, server.url, server.token, 2)
        assert isinstance(seen[1], events.Retrying)
        assert "the server's key has expired" in seen[1].error
        server.service.clock = Ahead(-(10.0**6))  # who answers sets the clock of requests, never this one
        seen, _ = await steps(tmp_path / "lied-to", server.url, server.token, 2)
        assert isinstance(seen[1], events.Retrying)
        assert "the server's key has expired" in seen[1].error
        server.service.clock = SystemClock()
        forged = replace(old, expires=expires + 10**6)  # who extends it breaks the release key's word
        server.service.server_key = ServerKey(base_key, forged)
        seen, _ = await steps(tmp_path, server.url, server.token, 1)
        assert isinstance(seen[0], events.Retrying)
        assert "is it the right server?" in seen[0].error


async def test_a_signed_answer_verifies_by_another_implementation_of_rfc_9421(tmp_path: Path) -> None:
    @dataclass
    class Message:
        headers: dict[str, str]
        status_code: int = 200
        request: Any = None
        method: str = "POST"
        url: str = ""

    trusted = keys(tmp_path)
    async with released(tmp_path, trusted) as server, server.device() as peer:
        assert isinstance(peer, Peer)
        body = encode(CHECK_IN)
        headers = peer.signed("POST", "/v1/check-in", body)
        answer = await server.raw("POST", "/v1/check-in", body, headers)
        delegation = Delegation.parse(answer.headers[DELEGATION_HEADER])
        key = Ed25519PublicKey.from_public_bytes(delegation.server_key)
        name = answer.headers["Signature-Input"].split('keyid="')[1][:32]
        verifier = HTTPMessageVerifier(
            signature_algorithm=ED25519,
            key_resolver=MappingKeyResolver(public_keys={name: key}, private_keys={}),
        )
        request = Message(headers, url=server.url + "/v1/check-in")
        response = Message(dict(answer.headers), request=request)
        (found,) = verifier.verify(response)
        assert verifier.verify_body(response, [found], answer.body)[0].body == answer.body
