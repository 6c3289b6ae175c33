"""`fedtt doctor`: whether this machine and these files can serve, and what to do where not."""

from __future__ import annotations

import argparse
import ctypes
import resource
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from cryptography import x509
from msgspec import Struct

from aggregator.server_key import ServerKey
from aggregator.tls import server_tls
from fedtt.cli import print_json
from fedtt.errors import FedttError
from storage.backend import is_shared, open_backend
from storage.engine import database_path

__all__ = ["Finding", "examine", "run"]

_FREE_BYTES, _FREE_SHARE = 1 << 30, 0.05
_FILES = 20_000  #: two for each of 10,000 connections
_DAY_S = 86400.0
_TIME_ERROR = 5  #: of adjtimex(2): the clock is not synchronised


class Finding(Struct, frozen=True, kw_only=True):
    """One thing looked at."""

    name: str
    ok: bool
    said: str
    fix: str = ""  #: what to do where it is not


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


def _disk(data: Path) -> Finding:
    found = shutil.disk_usage(data if data.is_dir() else data.absolute().parent)
    said = f"{found.free >> 20} MiB of {found.total >> 20} MiB are free"
    enough = found.free >= _FREE_BYTES and found.free >= _FREE_SHARE * found.total
    return Finding(name="disk", ok=enough, said=said, fix="" if enough else "free at least 1 GiB and 5 %")


def _database(database: str | Path) -> Finding:
    if is_shared(database):
        backend = open_backend(database, busy_timeout_s=5.0)
        with backend.reader.connect() as connection:
            connection.exec_driver_sql("SELECT 1")
        return Finding(name="database", ok=True, said=f"{backend.where} answers")
    path = database_path(database)
    if not path.is_file():
        return Finding(
            name="database", ok=False, said=f"{path} does not exist", fix="start `fedtt serve` once"
        )
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5.0)) as connection:
        (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
        (sound,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if mode != "wal":
        fix = "keep it on a local disk and start `fedtt serve`, which sets it"
        return Finding(name="database", ok=False, said=f"{path} has journal mode {mode}, not wal", fix=fix)
    if sound != "ok":
        return Finding(
            name="database", ok=False, said=f"{path} is damaged: {sound}", fix="restore it from a backup"
        )
    return Finding(name="database", ok=True, said=f"{path} is sound, journal mode wal")


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
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    server_key: Path | None = None,
) -> Iterator[Finding]:
    """Look at everything, whatever fails."""
    now = time.time()
    checks: dict[str, Callable[[], Finding]] = {
        "data": lambda: _directory(data),
        "disk": lambda: _disk(data),
        "database": lambda: _database(database or data / "fedtt.db"),
        "clock": _clock,
        "files": _files,
        "tls": lambda: _tls(tls_cert, tls_key, now),
        "server key": lambda: _server_key(server_key, now),
    }
    for name, check in checks.items():
        try:
            yield check()
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
            print(f"{'ok  ' if finding.ok else 'FAIL'} {finding.name:10} {said}")
            if finding.fix:
                print(f"     {'':10} → {finding.fix}")
    sys.stdout.flush()
    return 0 if all(finding.ok for finding in found) else 1
