"""A PostgreSQL server of one's own: made in a temporary folder from the system's packages, on a free port."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["LocalPostgresql", "postgresql_binaries"]

_PLACES = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql*/bin",
    "/usr/local/bin",
)
_USERS = ("postgres", "nobody")  #: whom root hands it to, for PostgreSQL refuses to run as root


def postgresql_binaries() -> Path | None:
    """The folder of the newest initdb that is installed; None where there is none."""
    if on_path := shutil.which("initdb"):
        return Path(on_path).resolve().parent
    found = [path for place in _PLACES for path in Path("/").glob(place[1:]) if (path / "initdb").is_file()]
    return max(
        found,
        key=lambda path: [int(n) for n in "".join(c if c.isdigit() else " " for c in str(path)).split()],
        default=None,
    )


class LocalPostgresql:
    """A server that lives as long as this object; only this machine reaches it, and it asks no password.

    durable: sync commits to disk; tests that lose no power need not.
    """

    def __init__(self, binaries: Path, *, durable: bool = False) -> None:
        self._binaries, self._numbers = binaries, itertools.count(1)
        self.folder = Path(tempfile.mkdtemp(prefix="fedtt-postgresql-"))
        self.port = _free_port()
        self._as_user = _other_user(self.folder)
        self._run(
            "initdb", "--no-sync", "--auth=trust", "--username=fedtt", "--encoding=UTF8", "--locale=C.UTF-8"
        )
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "fsync": "on" if durable else "off",
            "log_min_messages": "fatal",
            "max_connections": 200,
        }
        if sys.platform == "linux" and int((self.folder / "data" / "PG_VERSION").read_text()) >= 14:
            # else it opens and syncs each of its files before it recovers: 5 s of a gap of 6 s
            settings["recovery_init_sync_method"] = "syncfs"
        with (self.folder / "data" / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())
        self.start()

    def start(self) -> None:
        self._run("pg_ctl", "start", "--wait", "--silent", "--log", str(self.folder / "log"))

    def stop(self, mode: str = "immediate") -> None:
        """`immediate` is as good as a crash: it recovers from its log at the next start."""
        self._run("pg_ctl", "stop", "--mode", mode, "--silent")

    def sql(self, command: str, database: str = "postgres") -> list[tuple[object, ...]]:
        """Run one statement outside a transaction; returns its rows, if it has any."""
        import psycopg

        with psycopg.connect(self.url(database).replace("+psycopg", ""), autocommit=True) as connection:
            cursor = connection.execute(command.encode())
            return cursor.fetchall() if cursor.description else []

    @property
    def pid(self) -> int:
        """Of the process whose children serve the connections."""
        return int((self.folder / "data" / "postmaster.pid").read_text().split()[0])

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://fedtt@127.0.0.1:{self.port}/{database}"

    def new_database(self, template: str = "template1") -> str:
        """The address of a database that nobody has used."""
        name = f"fedtt_{next(self._numbers)}"
        self.sql(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.url(name)

    def drop(self, url: str) -> None:
        self.sql(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._binaries / program), "--pgdata", str(self.folder / "data"), *arguments]
        done = subprocess.run(
            [*self._as_user, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            text=True,
            check=False,
            timeout=120,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stdout}")


def _other_user(folder: Path) -> list[str]:
    """The start of a command line that gives root's rights away, and the folder with it."""
    if os.geteuid() != 0:
        return []
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    user = next(known[name] for name in _USERS if name in known)
    os.chown(folder, user.pw_uid, user.pw_gid)
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port
