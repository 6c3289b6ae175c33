"""`fedtt doctor`: whether this machine and these files can serve, and what to do where not."""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from cryptography import x509

from aggregator.doctor_database import look_at_database
from aggregator.findings import Finding
from aggregator.server_key import ServerKey
from aggregator.tls import server_tls
from fedtt.cli import print_json
from fedtt.errors import FedttError
from storage.backend import is_shared
from storage.blobs import blobs_directory, load, open_blobs, save
from storage.engine import database_path

__all__ = ["examine", "run"]

_FREE_BYTES, _FREE_SHARE = 1 << 30, 0.05
_FILES = 20_000  #: two for each of 10,000 connections
_PROBE_BYTES = 1000
_DAY_S = 86400.0
_TIME_ERROR = 5  #: of adjtimex(2): the clock is not synchronised


def _directory(data: Path) -> Finding:
    if not data.is_dir():
        return Finding(name="data", ok=False, said=f"{data} does not exist", fix="start `fedtt serve` once")
    mode = data.stat().st_mode & 0o777
    if mode & 0o077:
        return Finding(
            name="data", ok=False, said=f"{data} has mode {mode:o}, others may enter", fix=f"chmod 700 {data}"
        )
    for secret in ("admin-token", "enrolment-token"):
        path = data / secret
        if path.exists() and path.stat().st_mode & 0o077:
            return Finding(name="data", ok=False, said=f"others may read {path}", fix=f"chmod 600 {path}")
    return Finding(name="data", ok=True, said=f"{data} is this user's alone")


def _disks(data: Path, database: str | None, blobs: str | None) -> Iterator[Finding]:
    """The room on each disk that the server's files lie on."""
    places = {"disk": data}
    if database is not None and not is_shared(database):
        places["ledger disk"] = database_path(database)
    if blobs is not None and (directory := blobs_directory(blobs)) is not None:
        places["blobs disk"] = directory
    seen: set[int] = set()
    for name, place in places.items():
        there = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
        if (device := there.stat().st_dev) not in seen:
            seen.add(device)
            yield _room(name, there)


def _room(name: str, there: Path) -> Finding:
    found = shutil.disk_usage(there)
    said = f"{there}: {found.free >> 20} MiB of {found.total >> 20} MiB are free"
    enough = found.free >= _FREE_BYTES and found.free >= _FREE_SHARE * found.total
    return Finding(name=name, ok=enough, said=said, fix="" if enough else "free at least 1 GiB and 5 %")


def _blobs(place: str | Path) -> Finding:
    """Whether one can be written, read and removed."""
    data = os.urandom(_PROBE_BYTES)
    blobs = open_blobs(place)
    sha256 = save(blobs, data)
    try:
        load(blobs, sha256)
    finally:
        gone = blobs.delete(sha256)
    if not gone or blobs.has(sha256):
        fix = "let this user delete there: a half-written blob is removed"
        return Finding(
            name="blobs", ok=False, said=f"{place}: a blob that was deleted is still there", fix=fix
        )
    return Finding(name="blobs", ok=True, said=f"{place}: a blob was written, read and deleted")


def _clock() -> Finding:
    """What the kernel says of its clock: devices within 300 s are served, others are told the time."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "adjtimex"):
        return Finding(name="clock", ok=True, said="this system does not say whether it is synchronised")
    state = libc.adjtimex(ctypes.create_string_buffer(256))  # modes = 0: look and change nothing
    if state == _TIME_ERROR:
        return Finding(
            name="clock", ok=False, said="the clock is not synchronised", fix="run chrony or timesyncd"
        )
    return Finding(name="clock", ok=True, said="the clock is synchronised")


def _files() -> Finding:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = hard == resource.RLIM_INFINITY
    ok = unlimited or hard >= _FILES
    said = f"{'any number of' if unlimited else hard} files may be open"
    return Finding(name="files", ok=ok, said=said, fix="" if ok else f"LimitNOFILE={_FILES} in the unit")


def _tls(certificate: Path | None, key: Path | None, now: float) -> Finding:
    if server_tls(certificate, key) is None or certificate is None:
        return Finding(
            name="tls", ok=True, said="none here: a proxy must speak it, and keep Host and path as they came"
        )
    chain = x509.load_pem_x509_certificates(certificate.read_bytes())
    begins = max(found.not_valid_before_utc.timestamp() for found in chain)
    if begins > now:
        said = f"{certificate} is not valid yet, for {(begins - now) / _DAY_S:.1f} days more"
        return Finding(
            name="tls", ok=False, said=said, fix="set the clock right, or use a certificate that is valid"
        )
    days = (min(found.not_valid_after_utc.timestamp() for found in chain) - now) / _DAY_S
    said = f"{certificate} is valid for {days:.0f} days"
    return Finding(name="tls", ok=days > 14, said=said, fix="" if days > 14 else "renew it and restart")


def _server_key(path: Path | None, now: float) -> Finding:
    if path is None:
        return Finding(
            name="server key", ok=True, said="none: devices that trust a release key do not follow"
        )
    days = (ServerKey.read(path, now).delegation.expires - now) / _DAY_S
    fix = "" if days > 30 else "run `fedtt key delegate` and restart"
    return Finding(name="server key", ok=days > 30, said=f"{path} is good for {days:.0f} days", fix=fix)


def examine(
    data: Path,
    *,
    database: str | None = None,
    blobs: str | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    server_key: Path | None = None,
) -> Iterator[Finding]:
    """Look at everything, whatever fails."""
    now = time.time()
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "data": lambda: [_directory(data)],
        "disk": lambda: _disks(data, database, blobs),
        "database": lambda: look_at_database(database or data / "fedtt.db"),
        "blobs": lambda: [_blobs(blobs or data / "blobs")] if blobs or data.is_dir() else [],
        "clock": lambda: [_clock()],
        "files": lambda: [_files()],
        "tls": lambda: [_tls(tls_cert, tls_key, now)],
        "server key": lambda: [_server_key(server_key, now)],
    }
    for name, check in checks.items():
        try:
            yield from check()
        except (FedttError, OSError, ValueError, sqlite3.Error) as error:
            yield Finding(name=name, ok=False, said=str(error), fix="see what it says")
        except Exception as error:  # a database's driver has errors of its own
            yield Finding(
                name=name, ok=False, said=f"{type(error).__name__}: {error}", fix="see what it says"
            )


def run(args: argparse.Namespace) -> int:
    """Print what was found; status 1 where something is to be fixed."""
    found = list(
        examine(
            args.data,
            database=args.database,
            blobs=args.blobs,
            tls_cert=args.tls_cert,
            tls_key=args.tls_key,
            server_key=args.server_key,
        )
    )
    for finding in found:
        if args.json:
            print_json(finding)
        else:
            said = " ".join(finding.said.split())
            print(f"{'ok  ' if finding.ok else 'FAIL'} {finding.name:11} {said}")
            if finding.fix:
                print(f"     {'':11} → {finding.fix}")
    sys.stdout.flush()
    return 0 if all(finding.ok for finding in found) else 1
