"""Gradients of a private training: each example's clipped in the graph, noise added here.

The noise is a stream of AES-CTR under a key that never leaves the device, so that nobody who knows the
task's seed can take it off again, and a training repeated after a crash sends the same frame and not a
second draw.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import replace

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_client.passes import PASSES, in_passes
from edge_client.runtime import Runtime
from edge_client.tokens import Batch
from fedtt.layout import Theta
from fedtt.messages import Plan
from fedtt.privacy import PrivacySpec

__all__ = ["GaussianMechanism", "Noise", "PrivateGradient", "noise_key", "noise_secret"]


def noise_secret(uniform: Callable[[], float]) -> bytes:
    """32 bytes of numbers in [0, 1) that nobody can guess."""
    return bytes(int(256 * uniform()) for _ in range(32))


def noise_key(secret: bytes, lease: str, plan: Plan, spent: float) -> bytes:
    """Of one training's noise: two frames under one key would differ by what the noise was to hide.

    spent: μ² of the task before it, which grows with each frame; so a server that gives a lease again,
    with the same plan or another, gets other noise, and a training that a crash cut short the same.
    """
    message = msgspec.msgpack.encode(("fedtt-noise-2", lease, plan, spent))
    return hmac.digest(secret, message, hashlib.sha256)


class Noise:
    """Standard normal numbers in order, of one key."""

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def draw(self, count: int) -> NDArray[np.float64]:
        """The next `count`, by pairs (Box and Muller 1958); an odd one's partner is dropped."""
        pairs = (count + 1) // 2
        words = np.frombuffer(self._stream.update(bytes(16 * pairs)), "<u8").reshape(2, pairs)
        u, v = (words >> np.uint64(11)) * 2.0**-53
        radius, angle = np.sqrt(-2 * np.log1p(-u)), 2 * np.pi * v
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


class GaussianMechanism:
    """(1/B) (Σ_b clipped g_b + σ C ξ) on the live numbers, zero elsewhere (Abadi et al., Algorithm 1).

    live: positions in a theta of `size` numbers.
    """

    def __init__(self, privacy: PrivacySpec, live: NDArray[np.intp], size: int, noise: Noise) -> None:
        self.clip = privacy.clip
        self.live = np.zeros(size, np.float32)  #: 1 where a number is trained
        self.live[live] = 1
        self._deviation = privacy.noise_multiplier * privacy.clip
        self._positions, self._noise = live, noise

    def clipped(self, gradient: Theta, rows: int) -> Theta:
        """One example's part of a batch's mean gradient: `gradient` is g_b / B with B = rows."""
        live = gradient * self.live
        norm, bound = float(np.linalg.norm(live)), self.clip / rows
        return live if norm <= bound else live * np.float32(bound / norm)

    def noisy(self, gradient: Theta, rows: int) -> Theta:
        """A batch's mean of clipped gradients with the next noise of this training."""
        found = gradient.copy()
        drawn = self._noise.draw(len(self._positions))
        found[self._positions] += (self._deviation / rows * drawn).astype(np.float32)
        return found


class PrivateGradient:
    """The gradients of a private training, each example's clipped in the runtime's graph.

    least: tokens that the graph needs of a row. go_on: called before each pass; what it raises ends this.
    """

    def __init__(
        self,
        runtime: Runtime,
        mechanism: GaussianMechanism,
        least: int = 1,
        go_on: Callable[[], None] = lambda: None,
    ) -> None:
        self._runtime, self._mechanism, self._least, self._go_on = runtime, mechanism, least, go_on

    def gradient(self, theta: Theta, batch: Batch) -> tuple[float, Theta]:
        mechanism = self._mechanism

        def one(part: Batch) -> tuple[float, Theta]:
            self._go_on()
            return self._runtime.private_gradient(theta, part, mechanism.live, mechanism.clip)

        limits = replace(PASSES, rows=self._runtime.rows)
        loss, gradient = in_passes(batch, limits, one, least=self._least, by_tokens=False)
        return loss, mechanism.noisy(gradient, len(batch.ids))
