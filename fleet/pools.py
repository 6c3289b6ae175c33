"""The pools that a fleet file may name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from edge_client.bundle import Bundle
from fedtt.errors import ConfigError
from fleet.pool import NoopPool, OneByOnePool, Pool

__all__ = ["POOLS", "Opener", "check_pool", "name_of", "open_pool", "settled"]


#: By the name of a trainer: the name that opens it again with the same back end, and its pool.
Opener = Callable[[str], tuple[str, Pool]]


class _Open(Protocol):
    def __call__(self, bundle: Bundle, threads: int, model: str | None) -> Pool: ...


def _one_by_one(bundle: Bundle, threads: int, model: str | None) -> Pool:
    from edge_client.onnx_runtime import onnx_runtimes

    return OneByOnePool(onnx_runtimes(threads))


def _noop(bundle: Bundle, threads: int, model: str | None) -> Pool:
    return NoopPool()


def _onnx(bundle: Bundle, threads: int, model: str | None) -> Pool:
    from fleet.batched import onnx_pool

    return onnx_pool(bundle, model=model, threads=threads)


def _torch(bundle: Bundle, threads: int, model: str | None) -> Pool:
    from fleet.batched import torch_pool

    return torch_pool(bundle, model=_named(model), threads=threads)


def _batched(bundle: Bundle, threads: int, model: str | None) -> Pool:
    from fleet.fastest import fastest_pool

    return fastest_pool(bundle, model=_named(model), threads=threads)


def _named(model: str | None) -> str:
    if model is None:
        raise ConfigError("fleet.model", None, "the model that the bundle was exported from")
    return model


#: name -> what makes it of the fleet's bundle, a number of threads and the model the bundle is of
POOLS: dict[str, _Open] = {
    "batched": _batched,
    "batched-onnx": _onnx,
    "batched-torch": _torch,
    "noop": _noop,
    "one-by-one": _one_by_one,
}


def check_pool(name: str, bundle: Bundle, model: str | None = None) -> None:
    """Raise what `open_pool` does for these, and open nothing."""
    if name not in POOLS:
        raise ConfigError("fleet.trainer", name, "one of " + ", ".join(sorted(map(repr, POOLS))))
    if name in {"batched", "batched-torch"} or (name == "batched-onnx" and not _is_compiled(bundle)):
        named = _named(model)
        if named.startswith((".", "/")) and not Path(named).is_dir():  # said before torch is loaded
            raise ConfigError("fleet.model", named, "a directory that is there, or the name of one on a hub")


def _is_compiled(bundle: Bundle) -> bool:
    from export.emulation_files import emulation_directory, open_emulation

    return open_emulation(emulation_directory(bundle.directory), bundle.digest) is not None


def open_pool(name: str, bundle: Bundle, threads: int, model: str | None = None) -> Pool:
    """Raises ConfigError for a name there is no pool of, or where one needs a model and none is named."""
    check_pool(name, bundle, model)
    return POOLS[name](bundle, threads, model)


def settled(name: str, bundle: Bundle, threads: int, model: str | None = None) -> str:
    """The name by which several processes open like pools, after this one has done what is done once.

    Compiles graphs that all of them read, and times backends, so that all take the same.
    """
    if name not in {"batched", "batched-onnx"}:
        return name
    pool = open_pool(name, bundle, threads, model)
    pool.close()
    return name_of(name, pool)


def name_of(name: str, pool: Pool) -> str:
    """The name by which a pool that was opened by `name` is opened again, with the same back end."""
    if name != "batched":
        return name
    from fleet.backends import TorchBackend
    from fleet.batched import BatchedPool

    is_torch = isinstance(pool, BatchedPool) and isinstance(pool.backend, TorchBackend)
    return "batched-torch" if is_torch else "batched-onnx"
