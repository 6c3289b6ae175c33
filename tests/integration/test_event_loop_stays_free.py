"""A device inside an app: files, databases and large products are waited for beside the app's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import shutil
import ssl
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from aggregator.app import device_app
from edge_client import bundle_cache, device, local_training
from edge_client.aside import beside
from edge_client.device_config import DeviceConfig
from edge_client.events import Acknowledged, Step
from edge_client.examples import Example, ExampleStore
from edge_client.home import Home
from edge_client.http_transport import HttpTransport
from edge_client.identity import Identity
from edge_client.local_trainer import LocalTrainer
from edge_client.runtime import Runtimes
from edge_client.session import forget, leave, open_device
from fedtt.errors import StorageError
from fedtt.messages import MEDIA_TYPE, Receipt, UpdateState, encode
from fedtt.seams import SystemClock
from fedtt.wire import update_digest
from tests.support.certificates import authority
from tests.support.device_world import SPEC
from tests.support.edge import MeanTarget, locked_home, write_small_bundle
from tests.support.in_process import TOKEN, listening, memory_service

LAG_S = 0.05
BASE_BYTES = 24 << 20  #: of a bundle: hashing it takes longer than a loop may be held up
EXAMPLES = 5000


BLOCKING = (
    *((os, "fsync"), (os, "replace"), (os, "open"), (time, "sleep"), (shutil, "rmtree"), (fcntl, "flock")),
    *((Path, "unlink"), (Path, "read_bytes"), (Path, "mkdir"), (os, "utime")),
    *((bundle_cache, "file_fault"), (bundle_cache, "decode_manifest"), (local_training, "zeros")),
    *((bundle_cache, "try_lock"), (bundle_cache, "check_manifest"), (device, "update_digest")),
)


class Behind(SystemClock):
    """Of a device whose clock is a week behind."""

    def now(self) -> float:
        return super().now() - 7 * 86400


class Watch:
    """Where blocking calls are made, and how long the loop's own thread computes without a pause."""

    def __init__(self) -> None:
        self.on_loop: list[str] = []
        self.beside: Counter[str] = Counter()
        self.busy_s = 0.0
        self._loop = threading.get_ident()

    def watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == self._loop:
                self.on_loop.append(name)
            else:
                self.beside[name] += 1
            return function(*args, **kwargs)

        return call

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """By CPU time: what other programs of this machine do is not the device's doing."""

        async def tick() -> None:
            while True:
                before = time.thread_time()
                await asyncio.sleep(0.001)
                self.busy_s = max(self.busy_s, time.thread_time() - before)

        ticking = asyncio.create_task(tick())
        try:
            yield
        finally:
            ticking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ticking


@pytest.mark.slow
async def test_a_device_enrols_downloads_trains_and_uploads_without_holding_up_its_app(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_small_bundle(tmp_path / "bundle", base_bytes=BASE_BYTES)
    with closing(ExampleStore(tmp_path / "examples.db")) as store:
        store.replace_file("rows", [_example(number) for number in range(EXAMPLES)])
        async with (
            memory_service(tmp_path / "blobs", SPEC, tmp_path / "bundle", SystemClock()) as service,
            listening(device_app(service)) as url,
        ):
            watch = Watch()
            for module, name in BLOCKING:
                monkeypatch.setattr(module, name, watch.watched(name, getattr(module, name)))
            for name in ("count", "read"):
                monkeypatch.setattr(store, name, watch.watched(name, getattr(store, name)))
            async with (
                watch.watching(),
                open_device(
                    tmp_path / "home",
                    server=url,
                    examples=store,
                    config=DeviceConfig(token=TOKEN),
                    trainer=LocalTrainer(Runtimes(lambda _: MeanTarget())),
                    clock=Behind(),
                ) as opened,
            ):
                await opened.consent()
                last = await opened.run(until=_acknowledged)
                with pytest.raises(StorageError, match="another client is running"):
                    async with open_device(
                        tmp_path / "home", server=url, examples=store, config=DeviceConfig()
                    ):
                        pass
            state = opened.journal.state
    assert isinstance(last, Acknowledged)
    assert state.clock_offset_s == pytest.approx(7 * 86400, abs=60)
    assert watch.on_loop == []
    assert watch.beside["sleep"] >= 1  # for the place of the other client
    # each file of the bundle and its manifest, every step's journal, the version
    assert watch.beside["fsync"] >= 10
    assert watch.beside["file_fault"] >= 4
    assert (watch.beside["count"], watch.beside["read"]) == (1, 1)
    assert watch.busy_s < LAG_S


@pytest.mark.slow
async def test_a_device_is_left_and_forgotten_without_holding_up_its_app(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_small_bundle(tmp_path / "bundle")
    home = Home(tmp_path / "home")
    home.create()
    async with (
        memory_service(tmp_path / "blobs", SPEC, tmp_path / "bundle", SystemClock()) as service,
        listening(device_app(service)) as url,
    ):
        with closing(ExampleStore(home.examples)) as store:
            store.replace_file("rows", [_example(number) for number in range(EXAMPLES)])
            async with open_device(
                home.directory,
                server=url,
                examples=store,
                config=DeviceConfig(token=TOKEN),
                trainer=LocalTrainer(Runtimes(lambda _: MeanTarget())),
            ) as opened:
                await opened.consent()
                await opened.run(until=_acknowledged)
        watch = Watch()
        for module, name in BLOCKING:
            monkeypatch.setattr(module, name, watch.watched(name, getattr(module, name)))
        async with watch.watching():
            assert await leave(home)
            await forget(home, local_only=False)
    assert not home.exists
    assert watch.on_loop == []
    assert watch.beside["flock"] >= 4  # to see whether a client runs and to take its place, twice
    assert watch.beside["fsync"] >= 2  # the journal without consent, and its directory
    assert watch.beside["rmtree"] >= 4  # bundles, versions, activations, conditions
    assert watch.busy_s < LAG_S


FRAME = bytes(160 << 20)  #: of a layout of 40 million numbers in fp32
LEASE = "0" * 32


async def take(request: web.Request) -> web.Response:
    """The server's side of an upload, and no more."""
    found = hashlib.sha256()
    async for piece in request.content.iter_chunked(1 << 16):
        found.update(piece)
    receipt = Receipt(lease=LEASE, digest=found.hexdigest(), state=UpdateState.ACCEPTED)
    return web.Response(body=encode(receipt), content_type=MEDIA_TYPE)


@contextmanager
def taking_frames(tls: ssl.SSLContext | None) -> Iterator[str]:
    """A server on a loop and thread of its own; yields its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    app = web.Application()
    app.router.add_put("/v1/leases/{lease}/update", take)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()

    try:
        asyncio.run_coroutine_threadsafe(start(), loop).result(10)
        yield f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.mark.slow
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
async def test_a_large_frame_is_hashed_and_sent_without_holding_up_the_app(
    secure: bool, tmp_path: Path
) -> None:
    tls, ca = None, ""
    if secure:
        authority(tmp_path, "ours")
        tls, ca = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), str(tmp_path / "ours.pem")
        tls.load_cert_chain(tmp_path / "server-ours.pem", tmp_path / "server-ours-key.pem")
    watch = Watch()
    with locked_home(tmp_path / "home") as home, taking_frames(tls) as url:
        transport = HttpTransport(url, Identity.open(home), SystemClock(), ca=ca)
        async with watch.watching():
            receipt = await transport.upload(LEASE, FRAME)
        await transport.close()
    assert receipt.digest == update_digest(FRAME)
    assert watch.busy_s < LAG_S


def _acknowledged(step: Step) -> bool:
    return isinstance(step, Acknowledged)


def _example(number: int) -> Example:
    return Example(f"lights {number}", number % 2)


@pytest.mark.parametrize("times", [1, 3])
async def test_cancelling_waits_for_what_was_begun_beside_the_loop(times: int) -> None:
    began, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        go_on.wait(10)
        ended.set()

    task = asyncio.create_task(beside(work))
    await asyncio.to_thread(began.wait, 10)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0.01)
        assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_what_fails_beside_the_loop_fails_for_whoever_waits() -> None:
    def work() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await beside(work)
