"""Many devices' local training in one vectorised pass over the base they share.

Each training asks for its gradients (`fedtt.algorithms.base.Steps`). Those that are outstanding together
are led in step: the rows of all their batches are computed in passes of like length, and each is sent its
own loss and gradient. Methods and optimisers are those that devices run; nothing of them is here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edge_client.bundle import Bundle, RuntimeName
from edge_client.passes import PassLimits
from edge_client.tokens import Batch, RememberedTokens
from edge_client.trainer import Training, TrainingRequest
from fedtt.algorithms import LocalResult
from fedtt.errors import BundleError, ConfigError, FedttError
from fedtt.layout import Theta
from fleet.activations import Activations
from fleet.backends import Backend, OnnxBackend, TorchBackend
from fleet.gradients import Ask, Counts, Gradients
from fleet.pool import Outstanding

__all__ = ["BatchedPool", "onnx_pool", "torch_pool"]


class BatchedPool:
    """A Pool that computes all outstanding trainings of one bundle when the first of them is asked for.

    devices: trained at once; more that are outstanding wait, in order, so that memory stays bounded.
    limits: of a pass. activations: keeps what the frozen prefix computed.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        devices: int = 256,
        limits: PassLimits | None = None,
        activations: Activations | None = None,
    ) -> None:
        if devices < 1:
            raise ConfigError("devices", devices, "a whole number from 1")
        self._bundle, self._devices = bundle, devices
        self._waiting: list[Outstanding] = []
        self._tokens: dict[int | None, RememberedTokens] = {}
        self.backend, self.counts = backend, Counts()
        self._gradients = Gradients(
            backend,
            bundle.manifest.tokenization,
            limits or PassLimits(),
            activations or Activations(),
            self.counts,
        )

    @property
    def runtime(self) -> RuntimeName:
        return "onnxruntime"

    def submit(self, request: TrainingRequest) -> Outstanding:
        handle = Outstanding(self.compute, request)
        self._waiting.append(handle)
        return handle

    def close(self) -> None:
        self._waiting, self._tokens = [], {}
        self._gradients.close()

    def compute(self) -> None:
        """Train all that wait, as many at once as may be, in order; each handle gets its outcome."""
        waiting, self._waiting = [handle for handle in self._waiting if handle.is_wanted], []
        for start in range(0, len(waiting), self._devices):
            self._train(waiting[start : start + self._devices])

    def _train(self, handles: Sequence[Outstanding]) -> None:
        running: list[_Running] = []
        with np.errstate(over="ignore", invalid="ignore"):  # what diverges is refused when it is packed
            for handle in handles:
                with handle.failing():
                    running.append(_Running(handle, self._training(handle.request)))
            while running := [each for each in running if each.ask is not None]:
                self._step(running)

    def _step(self, running: Sequence[_Running], *, at_once: int | None = None) -> None:
        """Answer what each asks; where that cannot be done together, a peak of memory say, one by one."""
        try:
            asks = [each.ask for each in running if each.ask is not None]
            answers = self._gradients.of(asks, at_once=at_once)
        except FedttError as error:
            if at_once == 1 and len(running) == 1:
                running[0].fail(error)
            else:
                for each in running:
                    self._step([each], at_once=1)
            return
        for each, answer in zip(running, answers, strict=True):
            each.send(answer)

    def _training(self, request: TrainingRequest) -> Training:
        if request.bundle.digest != self._bundle.digest:
            raise BundleError(
                f"this pool trains bundle {self._bundle.digest[:12]}… and was asked for "
                f"{request.bundle.digest[:12]}…"
            )
        limit = request.plan.training.max_tokens
        if limit not in self._tokens:
            self._tokens[limit] = RememberedTokens(request.bundle, limit)
        return Training(request, self._tokens[limit])


class _Running:
    """One training on its way from ask to ask; it fails by itself, or ends with a packed update."""

    def __init__(self, handle: Outstanding, training: Training) -> None:
        self.handle, self._training, self._steps = handle, training, training.steps()
        self.ask: Ask | None = None  #: what it waits for; None once it has ended
        self._advance(lambda: next(self._steps))

    def send(self, answer: tuple[float, Theta]) -> None:
        self._advance(lambda: self._steps.send(answer))

    def fail(self, error: FedttError) -> None:
        self.ask = None
        self.handle.fail(error)

    def _advance(self, step: Callable[[], tuple[Theta, Batch]]) -> None:
        self.ask = None
        with self.handle.failing():
            try:
                self.ask = Ask(*step(), self._training.mechanism)
            except StopIteration as end:
                result: LocalResult = end.value
                self.handle.finish(self._training.pack(result))


def onnx_pool(bundle: Bundle, *, model: str | None = None, threads: int = 2) -> BatchedPool:
    """Over the graphs beside the bundle, compiled from `model` where they are not there yet."""
    return BatchedPool(bundle, OnnxBackend(bundle, model=model, threads=threads))


def torch_pool(bundle: Bundle, *, model: str, threads: int = 2, device: str | None = None) -> BatchedPool:
    """Over torch, on CUDA where there is a device; `model` is what the bundle was exported from."""
    return BatchedPool(bundle, TorchBackend(bundle, model=model, threads=threads, device=device))
