"""Joining a Ray cluster, or starting one on this machine for as long as a run lasts."""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fedtt.errors import ConfigError, FedttError, Unreachable

__all__ = ["check_address", "joined"]

_REACH_S = 5.0
_OBJECTS_BYTES = 256 * 2**20  #: of memory for what lies between workers, on this machine
_ADDRESS = re.compile(r"(?P<host>[^:/\s]+|\[[^\]\s]+\]):(?P<port>\d{1,5})")
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # tells nobody
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # as later releases of Ray do
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # prints nothing of its own among our lines
}
_SOON = {"RAY_gcs_server_request_timeout_seconds": "20", "RAY_NUM_REDIS_GET_RETRIES": "5"}  # not minutes


@contextmanager
def joined(address: str | None, cpus: int) -> Iterator[Any]:
    """The module `ray`, connected: to the cluster at an address, or to one of so many CPUs on this machine.

    address: HOST:PORT of the cluster's head, "auto" for the cluster this machine is part of, or None.
    Raises ConfigError for another address, Unreachable with one line where there is no cluster.
    """
    check_address(address)
    if "ray" not in sys.modules:  # which reads these when it is imported
        wanted = _QUIET | (_ours() if address is None else _SOON)
        os.environ.update({name: value for name, value in wanted.items() if name not in os.environ})
    try:
        import ray
    except ModuleNotFoundError:
        raise FedttError("--ray needs the package ray: pip install 'fedtt[ray]'") from None
    if ray.is_initialized():
        raise Unreachable("this process uses Ray already: leave it with ray.shutdown() first")
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    options: dict[str, Any] = {"address": address or "local"}
    if address is None:
        options |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": _OBJECTS_BYTES}
    try:
        with _kept_sigterm():
            ray.init(**options, log_to_driver=False, logging_level=logging.CRITICAL, configure_logging=False)
    except (Exception, SystemExit) as error:  # its errors share no base of their own
        ray.shutdown()
        raise Unreachable(_refusal(address, " ".join(str(error).split())[:300])) from None
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _kept_sigterm() -> Iterator[None]:
    """Put back, whatever happens, what SIGTERM does, which Ray takes for itself.

    Ray's stays in a program that had set its own outside of Python, which Python cannot put back.
    """
    ends = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if ends is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ends)


def _ours() -> dict[str, str]:
    """A cluster that we alone may use, although its ports listen on every interface of this machine."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def check_address(address: str | None) -> None:
    """Refuse what cannot be one, and what nobody listens at: Ray itself would wait for minutes.

    Raises ConfigError or Unreachable.
    """
    if address is None or address == "auto":
        return
    found = _ADDRESS.fullmatch(address)
    if found is None or not 0 < int(found["port"]) < 2**16:
        raise ConfigError("--ray-address", address, "HOST:PORT of the cluster's head, or auto")
    try:
        socket.create_connection((found["host"].strip("[]"), int(found["port"])), _REACH_S).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise Unreachable(f"there is no Ray at {address} ({reason}): is its head running?") from None


def _refusal(address: str | None, reason: str) -> str:
    if address == "auto":
        return "this machine is part of no Ray cluster: join one with 'ray start', or name its --ray-address"
    return f"there is no Ray at {address}: {reason}" if address else f"Ray did not start here: {reason}"
