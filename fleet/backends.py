"""What computes one pass of many devices: the compiled graph in ONNX Runtime, or torch on CPU or CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_client.bundle import Bundle
from export.emulation_files import DEVICES, PREFIX, emulation_directory, open_emulation, open_session
from fedtt.errors import BundleError, ConfigError, RuntimeFailure

if TYPE_CHECKING:
    import torch
    from onnxruntime import InferenceSession

__all__ = ["Backend", "Inputs", "Losses", "OnnxBackend", "TorchBackend"]

Inputs = Mapping[str, NDArray[Any]]
Losses = NDArray[np.float32]


class Backend(Protocol):
    """The step of `export.devices.DevicesStep`; both functions raise RuntimeFailure."""

    @property
    def passes_at_once(self) -> int:
        """How many threads may call it at a time, to have all cores at work."""
        ...

    @property
    def cut(self) -> int:
        """The block that `hidden` enters; 0 where the step takes ids."""
        ...

    def hidden(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """ids, mask (N, S) -> the hidden state (N, S, H) that enters block `cut`."""
        ...

    def step(self, inputs: Inputs) -> tuple[Losses, NDArray[np.float32]]:
        """The step's inputs, and perhaps others, by name -> losses (N,), gradient (D, P)."""
        ...


class OnnxBackend:
    """The graphs beside a bundle, compiled now from `model` if they are not there yet.

    Each pass is computed on one thread, so many passes at a time: so no core waits for another within one.
    Raises ConfigError where they are not and no model is named.
    """

    def __init__(self, bundle: Bundle, *, model: str | None = None, threads: int = 2) -> None:
        directory = emulation_directory(bundle.directory)
        files = open_emulation(directory, bundle.digest)
        if files is None:
            if model is None:
                raise ConfigError(
                    "model", None, f"the model that {bundle.directory} was exported from, to compile it anew"
                )
            from export.emulation import compile_emulation  # imports torch

            directory, files = compile_emulation(bundle.directory, model)
        self.cut, self.passes_at_once = files.cut, threads
        self._devices = _session(directory / DEVICES, bundle)
        self._prefix = _session(directory / PREFIX, bundle) if files.cut else None
        self._inputs = [value.name for value in self._devices.get_inputs()]

    def hidden(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        if self._prefix is None:
            raise ValueError("no block of this bundle lies below all adapters")
        (hidden,) = _run(self._prefix, ["hidden"], {"ids": ids, "mask": mask})
        return hidden

    def step(self, inputs: Inputs) -> tuple[Losses, NDArray[np.float32]]:
        loss, grad = _run(self._devices, ["loss", "grad"], {name: inputs[name] for name in self._inputs})
        return loss, grad


def _session(graph: Path, bundle: Bundle) -> InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # errors reach us as exceptions
    options.enable_mem_pattern = False  # of each shape of pass, and there are many
    try:
        return open_session(graph, bundle.directory, options)
    except Exception as error:  # its errors share no base of their own
        raise RuntimeFailure(f"{graph} cannot be loaded: {_line(error)}") from None


def _run(session: InferenceSession, outputs: list[str], inputs: Inputs) -> list[NDArray[np.float32]]:
    try:
        found: list[NDArray[np.float32]] = session.run(outputs, dict(inputs))
    except Exception as error:  # its errors share no base of their own
        raise RuntimeFailure(f"the graph of many devices did not run: {_line(error)}") from None
    return found


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


class TorchBackend:
    """The same step in torch, on CUDA where there is a device; `model` is what the bundle is of.

    Raises BundleError where it is another one. The threads are those of all torch in this process.
    """

    def __init__(self, bundle: Bundle, *, model: str, threads: int = 2, device: str | None = None) -> None:
        import torch

        from export.base import load_base
        from export.devices import DevicesStep
        from export.prefix import Prefix
        from export.step import AdaptedModel

        torch.set_num_threads(threads)
        manifest = bundle.manifest
        base = load_base(model, manifest.task, manifest.model.precision, manifest.model.products)
        if base.sha256 != manifest.model.base_sha256:
            raise BundleError(f"{bundle.directory} was made from other weights than {model} holds")
        adapted = AdaptedModel(base, manifest.adapter, manifest.labels)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        adapted.to(self.device)
        self.cut = manifest.adapter.blocks.start
        self._step, self._prefix = DevicesStep(adapted, self.cut), Prefix(base, self.cut)
        self._products = adapted.products
        self.passes_at_once = 1  # which torch divides itself

    def hidden(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        import torch

        with torch.no_grad(), self._products():
            hidden = self._guarded(self._prefix, self._tensor(ids), self._tensor(mask))
        return np.asarray(hidden.cpu().numpy())

    def step(self, inputs: Inputs) -> tuple[Losses, NDArray[np.float32]]:
        import torch

        theta, *rows = (self._tensor(inputs[name]) for name in self._step.inputs)
        theta.requires_grad_()
        with torch.enable_grad(), self._products():
            total, losses = self._guarded(self._step.loss, theta, *rows)
            (grad,) = self._guarded(torch.autograd.grad, total, theta)
        return np.asarray(losses.detach().cpu().numpy()), np.asarray(grad.cpu().numpy())

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        import torch

        return torch.from_numpy(array).to(self.device)

    def _guarded(self, function: Any, *inputs: torch.Tensor) -> Any:
        try:
            return function(*inputs)
        except (IndexError, RuntimeError) as error:  # a token id past the vocabulary; memory
            raise RuntimeFailure(f"torch did not run: {_line(error)}") from None
