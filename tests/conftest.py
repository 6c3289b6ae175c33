"""Bundles that many tests share: each exported when the first asks for it, once for all workers."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

from tests.support.long import LONG

if TYPE_CHECKING:
    from export import ExportRequest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a hub; read when transformers is imported
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # workers share the cores: threads that wait for each other spin; read when torch is imported

# A shell that runs the checks in the background has them ignore Ctrl-C, and so would every client they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

TINY_LABELS = ("alarm", "lights off", "pay", "weather")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two blocks, width 32, that reads the words of `tests.support.models.WORDS`."""
    from tests.support.models import save_tiny_model

    return _once("tiny-model", tmp_path_factory, save_tiny_model)


@pytest.fixture(scope="session")
def tiny_request(tiny_model: Path) -> ExportRequest:
    from export import ExportRequest

    return ExportRequest(
        model=str(tiny_model), labels=TINY_LABELS, bottleneck=8, rank=2, head_rank=2, max_tokens=32
    )


@pytest.fixture(scope="session")
def tiny_bundle(tiny_request: ExportRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """428 trained numbers, 4 labels, at most 32 tokens."""
    return _export("tiny", tiny_request, tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_emulation(tiny_bundle: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle's graphs of many devices, beside it."""
    from export.emulation import compile_emulation

    def compile_beside(_: Path) -> Path:
        directory, _files = compile_emulation(tiny_bundle, str(tiny_model))
        return directory

    return _once("tiny-emulation", tmp_path_factory, compile_beside)


@pytest.fixture(scope="session")
def private_bundle(tiny_request: ExportRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in its upper block alone, with the step that clips each example's gradient."""
    return _export("private", replace(tiny_request, private=True, depth=1, depths=()), tmp_path_factory)


@pytest.fixture(scope="session")
def executorch_bundle(tiny_request: ExportRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for both runtimes; it takes half a minute to lower."""
    pytest.importorskip("executorch.exir", reason="SKIPPED: executorch is not installed, nothing is lowered")
    both = replace(tiny_request, runtimes=("onnxruntime", "executorch"))
    return _export("executorch", both, tmp_path_factory)


@pytest.fixture(scope="session")
def private_executorch_bundle(tiny_request: ExportRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`private_bundle` for both runtimes."""
    _takes_minutes("lowering the step that clips")
    pytest.importorskip("executorch.exir", reason="SKIPPED: executorch is not installed, nothing is lowered")
    both = replace(tiny_request, private=True, depth=1, depths=(), runtimes=("onnxruntime", "executorch"))
    return _export("private-executorch", both, tmp_path_factory)


@pytest.fixture(scope="session")
def integer_executorch_bundle(tiny_request: ExportRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`private_executorch_bundle` at full depth, over a base multiplied in int8."""
    _takes_minutes("lowering steps with products in int8")
    pytest.importorskip("executorch.exir", reason="SKIPPED: executorch is not installed, nothing is lowered")
    integers = replace(
        tiny_request, private=True, base="int8", products="int8", runtimes=("onnxruntime", "executorch")
    )
    return _export("integer-executorch", integers, tmp_path_factory)


@pytest.fixture(scope="session")
def executorch_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with the shim, built here."""
    from edge_client.executorch.build import build

    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("SKIPPED: without a C++ compiler the ExecuTorch runtime is not tested")
    return _once("executorch-library", tmp_path_factory, build)


@pytest.fixture(scope="session")
def minilm_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real MiniLM-L6 at full depth with FedTT's defaults, over the demo's intents."""
    from export import ExportRequest
    from export.labels import read_labels
    from tests.support.models import minilm_directory

    labels = read_labels(Path(__file__).parents[1] / "fleet" / "assistant" / "labels.json")
    request = ExportRequest(model=str(minilm_directory()), labels=labels, depths=())
    return _export("minilm", request, tmp_path_factory)


@pytest.fixture(scope="session")
def stories_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real Llama of 260,000 weights for next-token prediction, where the checkout has it beside it.

    Adapters sit in the last 3 of its 5 blocks.
    """
    from export import ExportRequest
    from tests.support.models import STORIES

    if not STORIES.is_dir():
        pytest.skip(f"the stories260k decoder is not at {STORIES}")
    request = ExportRequest(model=str(STORIES), task="causal-lm", depth=3, bottleneck=16, depths=(1,))
    return _export("stories", request, tmp_path_factory)


@pytest.fixture(scope="session")
def stories_executorch_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same decoder for both runtimes; backward through one block alone, as lowering takes long."""
    from export import ExportRequest
    from tests.support.models import STORIES

    _takes_minutes("lowering a decoder")
    pytest.importorskip("executorch.exir", reason="SKIPPED: executorch is not installed, nothing is lowered")
    if not STORIES.is_dir():
        pytest.skip(f"SKIPPED: the stories260k decoder is not at {STORIES}")
    request = ExportRequest(
        model=str(STORIES),
        task="causal-lm",
        depth=2,
        sites=("mlp",),
        bottleneck=16,
        depths=(),
        runtimes=("onnxruntime", "executorch"),
    )
    return _export("stories-executorch", request, tmp_path_factory)


def _takes_minutes(what: str) -> None:
    if not LONG:
        pytest.skip(f"SKIPPED: {what} takes minutes; FEDTT_LONG=1 ./scripts/check does it, too")


def _export(name: str, request: ExportRequest, factory: pytest.TempPathFactory) -> Path:
    """Without the comparison with torch, which tests make where they are about it."""
    from export import export_bundle

    def export(directory: Path) -> Path:
        export_bundle(request, directory, verify=False)
        return directory

    return _once(name, factory, export)


def _once(name: str, factory: pytest.TempPathFactory, make: Callable[[Path], Path]) -> Path:
    """What `make` leaves in a directory, made by the first worker of pytest-xdist that asks for it."""
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    place, made = shared / f"shared-{name}", shared / f"shared-{name}.made"
    with FileLock(shared / f"shared-{name}.lock"):
        if not made.is_file():
            made.write_text(str(make(place)))
    return Path(made.read_text())
