"""Which backend trains many devices faster on this machine: found by a short timing, not by a guess.

Backends agree to about 1e-6, not to the bit, and another timing may find the other: a run keeps its choice
(`fleet.computed`), and who needs the same hash from every start names one.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_client.bundle import Bundle
from fleet.backends import Backend, OnnxBackend, TorchBackend
from fleet.batched import BatchedPool

__all__ = ["fastest_pool", "made_up_rows", "step_s"]

_DEVICES, _ROWS, _TOKENS, _REPEATS = 8, 32, 16, 3


def fastest_pool(bundle: Bundle, *, model: str, threads: int = 2) -> BatchedPool:
    """A pool over the backend whose step of this bundle is the faster; opens both, and lets one go."""
    backends: list[Backend] = [
        OnnxBackend(bundle, model=model, threads=threads),
        TorchBackend(bundle, model=model, threads=threads),
    ]
    return BatchedPool(bundle, min(backends, key=lambda backend: step_s(backend, bundle)))


def step_s(backend: Backend, bundle: Bundle) -> float:
    """Seconds of a small step, the least of a few, with as many at a time as the backend takes."""
    inputs = made_up_rows(bundle, devices=_DEVICES, rows=_ROWS, tokens=_TOKENS)
    if backend.cut:
        inputs["hidden"] = backend.hidden(inputs["ids"], inputs["mask"])
    backend.step(inputs)
    together = [inputs] * backend.passes_at_once
    times = []
    with ThreadPoolExecutor(len(together)) as threads:
        for _ in range(_REPEATS):
            began = time.perf_counter()
            list(threads.map(backend.step, together))
            times.append((time.perf_counter() - began) / len(together))
    return min(times)


def made_up_rows(bundle: Bundle, *, devices: int, rows: int, tokens: int) -> dict[str, NDArray[Any]]:
    """Full rows of random ids under random factors, without hidden states."""
    manifest, rng = bundle.manifest, np.random.default_rng(0)
    tokens = min(tokens, manifest.tokenization.max_tokens)
    inputs: dict[str, NDArray[Any]] = {
        "theta": 0.05 * rng.standard_normal((devices, manifest.adapter.layout.size), np.float32),
        "device": np.sort(np.arange(rows) % devices),
        "weight": np.full(rows, devices / rows, np.float32),
        "ids": rng.integers(0, manifest.model.vocabulary, (rows, tokens)),
        "mask": np.ones((rows, tokens), np.int64),
    }
    if manifest.labels:
        inputs["labels"] = rng.integers(0, len(manifest.labels), rows)
    return inputs
