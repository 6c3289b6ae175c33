"""Putting a device together, and the switches by which its owner rules it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

from edge_client.activations import FileActivations
from edge_client.aside import beside, settled
from edge_client.bundle_cache import LIMIT_BYTES, BundleCache
from edge_client.conditions import Conditions
from edge_client.device import Device
from edge_client.device_config import DeviceConfig
from edge_client.events import Ended, Observer, Paused, Step, ignore
from edge_client.examples import Examples, is_store
from edge_client.home import Home
from edge_client.http_transport import HttpTransport, Traffic
from edge_client.identity import Identity
from edge_client.journal import Idle, Journal, is_journal, read_state
from edge_client.linux_conditions import LinuxConditions
from edge_client.local_trainer import LocalTrainer
from edge_client.onnx_runtime import onnx_runtimes
from edge_client.trainer import Trainer
from edge_client.version_cache import FileVersions
from fedtt.errors import ConfigError, FedttError, Refused, StorageError, Unreachable, WireError
from fedtt.messages import Code
from fedtt.seams import Clock, SystemClock

__all__ = ["forget", "leave", "open_device", "open_transport", "stopped", "supervise"]

POLL_S = 0.5  #: how often a running client looks at the switches
_STOP_WAIT_S = 60.0  #: a running client ends at its next pass at the latest


def open_transport(
    home: Home,
    journal: Journal,
    server: str,
    clock: Clock,
    traffic: Traffic | None = None,
    *,
    move: bool = False,
) -> HttpTransport:
    """A transport signed with the home's key, that remembers address and clock of the server in the journal.

    An enrolled device goes to another address only where its owner has agreed to that (`move`). Consent is
    given anew; key, lease and residuals go along: where only the address is new, nothing is lost, and
    another server refuses the lease.
    """
    known = journal.state
    if known.enrolled and known.server != server and not move:
        raise ConfigError(
            "server",
            server,
            f"this device belongs to {known.server}; open it with move=True once its owner agrees to another",
        )

    def remember(offset_s: float) -> None:
        journal.update(clock_offset_s=offset_s)

    transport = HttpTransport(
        server,
        Identity.open(home),
        clock,
        clock_offset_s=known.clock_offset_s,
        on_clock_offset=remember,
        release_key=lambda: journal.state.release_key,
        ca=known.ca,
        traffic=traffic,
    )
    if known.server != server:
        journal.update(
            server=server, enrolled=False, consented_at=None, release_key=b"", newest_rounds={}, round_ends={}
        )
    return transport


@asynccontextmanager
async def open_device(
    home: Path,
    *,
    server: str,
    examples: Examples,
    config: DeviceConfig,
    move: bool = False,
    release_key: bytes = b"",
    ca: Path | None = None,
    cache: Path | None = None,
    cache_limit_bytes: int = LIMIT_BYTES,
    threads: int = 1,
    trainer: Trainer | None = None,
    traffic: Traffic | None = None,
    conditions: Conditions | None = None,
    clock: Clock | None = None,
    observe: Observer = ignore,
) -> AsyncIterator[Device]:
    """A device over HTTP that lives in `home`, alone there until the context ends.

    move: the owner has agreed that this device, enrolled elsewhere, now belongs to `server`.
    release_key: trusted from now on; b"" leaves it to what was trusted before, or to the enrolment.
    ca: certificates in PEM to trust for this server from now on; None for those trusted before.
    cache: a directory of bundles that several devices may share; None keeps them in the home.
    cache_limit_bytes: of bundles in it; the longest unused make room.
    conditions: where the app reads battery, network and the like; None reads them as Linux has them.
    trainer, traffic: likewise shared by the devices of one process; None makes them for this one.
    """
    place, time = Home(home), clock or SystemClock()

    def opened() -> tuple[Journal, HttpTransport, bytes]:
        journal = Journal(place)
        if ca is not None:
            journal.update(ca=str(ca.absolute()))
        transport = open_transport(place, journal, server, time, traffic, move=move)
        if release_key:
            journal.update(release_key=release_key)
        return journal, transport, Identity.open(place).public_key

    with ExitStack() as held:
        await beside(held.enter_context, place.lock())
        journal, transport, public_key = await beside(opened)
        trainer = trainer or LocalTrainer(onnx_runtimes(threads))
        bundles = BundleCache(
            cache or place.bundles,
            time,
            runtime=trainer.runtime,
            limit_bytes=cache_limit_bytes,
            observe=observe,
        )
        try:
            yield Device(
                config,
                public_key=public_key,
                journal=journal,
                transport=transport,
                examples=examples,
                bundles=bundles,
                trainer=trainer,
                versions=FileVersions(place.versions),
                activations=FileActivations(place.activations, config.activation_limit_mb << 20),
                conditions=conditions or LinuxConditions(place.conditions, config.limits),
                clock=time,
                observe=observe,
            )
        finally:
            await transport.close()
            observe(
                Ended(
                    sent_bytes=transport.traffic.sent_bytes,
                    received_bytes=transport.traffic.received_bytes,
                    bundle_bytes=transport.traffic.bundle_bytes,
                )
            )


async def supervise(
    device: Device, home: Home, until: Callable[[Step], bool], observe: Observer = ignore
) -> Step | None:
    """Run a device as its owner's switches allow; None once it has been asked to end.

    Pausing cancels what the device does: the journal holds where it was.
    """
    home.stop(False)
    while not home.is_stopping():
        if home.is_paused():
            observe(Paused())
            while home.is_paused() and not home.is_stopping():
                await asyncio.sleep(POLL_S)
            continue
        run = asyncio.create_task(device.run(until))
        try:
            while not (run.done() or home.is_paused() or home.is_stopping()):
                await asyncio.wait([run], timeout=POLL_S)
        finally:
            run.cancel()
            await settled(run)
        if not run.cancelled():
            return run.result()
    return None


@asynccontextmanager
async def stopped(home: Home) -> AsyncIterator[None]:
    """Ask a running client to end, wait until it has, and keep its place."""
    deadline = asyncio.get_running_loop().time() + _STOP_WAIT_S
    while await beside(home.is_running):
        await beside(home.stop, True)
        if asyncio.get_running_loop().time() > deadline:
            raise StorageError(
                f"the client on {home.directory} has been asked to end and still runs: try again later"
            )
        await asyncio.sleep(POLL_S / 5)
    with ExitStack() as held:
        await beside(held.enter_context, home.lock())
        await beside(home.stop, False)
        yield


async def leave(home: Home, clock: Clock | None = None) -> bool:
    """Take the device out of the population and withdraw consent; False where it was not enrolled.

    Examples and key stay. Raises Unreachable where the server cannot be told: nothing has changed then.
    """
    if not await beside(_was_a_device, home):
        return False
    async with stopped(home):
        journal = await beside(Journal, home)
        was_enrolled = journal.state.enrolled
        if was_enrolled:
            await _tell(home, journal, clock or SystemClock(), erase=False)
        await beside(journal.update, enrolled=False, consented_at=None, phase=Idle(), residuals={})
        return was_enrolled


async def forget(home: Home, *, local_only: bool, clock: Clock | None = None) -> None:
    """Delete everything the device kept and have the server erase it, unless `local_only`.

    Where the server cannot be reached, examples, bundles, versions and residuals are gone, and the key stays
    so that it can be asked again: that raises Unreachable. Raises StorageError for a directory that was no
    device's, and leaves it as it is; one that does not exist is forgotten already.
    """
    if not home.exists:
        return
    if not await beside(_was_a_device, home):
        raise StorageError(
            f"{home.directory} is no device's directory, it has neither key nor journal nor examples: "
            "nothing was deleted; name the device's with --home"
        )
    async with stopped(home):
        await beside(home.delete_data)
        state = None if local_only else await beside(read_state, home)
        if state is not None and state.device:
            journal = await beside(Journal, home)
            await beside(journal.update, phase=Idle(), residuals={}, consented_at=None)
            try:
                await _tell(home, journal, clock or SystemClock(), erase=True)
            except (Unreachable, WireError) as error:
                raise Unreachable(
                    f"everything here but the key is deleted, the server still knows this device: {error}; "
                    "run 'fedtt client forget' again later, or with --local-only"
                ) from None
        await beside(home.delete)


def _was_a_device(home: Home) -> bool:
    return home.key.exists() or is_journal(home.state) or is_store(home.examples)


async def _tell(home: Home, journal: Journal, clock: Clock, *, erase: bool) -> None:
    try:
        transport = await beside(open_transport, home, journal, journal.state.server, clock)
    except ConfigError as error:  # an address that an earlier release took, certificates that were moved
        raise Unreachable(f"the server cannot be told: {error}") from None
    try:
        await transport.leave(erase=erase)
    except Refused as error:
        if error.problem.code not in {Code.UNKNOWN_DEVICE, Code.NOT_FOUND}:  # it does not know us: well then
            raise FedttError(f"the server refused: {error}") from None
    finally:
        await transport.close()
