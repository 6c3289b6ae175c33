"""ExecuTorch's file of weights as exported, and as it is refused before the library maps it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.fuzz_weights import Named, data_in, weights_bytes
from edge_client.bundle import Bundle, open_bundle
from edge_client.executorch_runtime import ExecutorchRuntime
from edge_client.tokens import Tokens
from export.verify import verify_graphs
from fedtt.errors import BundleError
from fedtt.weights_file import StoredData, stored_data
from tests.support.torch_runtime import adapted_model

pytestmark = pytest.mark.slow

EXPORTED = (
    "executorch_bundle",
    "private_executorch_bundle",
    "integer_executorch_bundle",
    "stories_executorch_bundle",
)


@pytest.mark.parametrize("exported", EXPORTED)
def test_weights_as_exported_are_read_as_flatbuffers_reads_them(
    exported: str, request: pytest.FixtureRequest
) -> None:
    weights = (request.getfixturevalue(exported) / "base.ptd").read_bytes()
    found = stored_data(weights, "base.ptd")
    assert found == data_in(weights)
    assert any(stored.type is not None for stored in found.values())


def tensors(weights: bytes) -> dict[str, StoredData]:
    return {key: found for key, found in stored_data(weights, "").items() if found.type is not None}


def without_layouts(weights: bytes) -> bytes:
    return weights_bytes([Named(key, 0, None) for key in tensors(weights)], [4])


def without_sizes(weights: bytes) -> bytes:
    return weights_bytes([Named(key, 0, stored.type, None) for key, stored in tensors(weights).items()], [4])


def with_one_number_each(weights: bytes) -> bytes:
    """And the sizes of whole tensors."""
    named = tensors(weights).items()
    return weights_bytes(
        [Named(key, 0, found.type, found.sizes, range(len(found.sizes))) for key, found in named], [4]
    )


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda weights: b"", id="nothing"),
        pytest.param(lambda weights: weights[:-1], id="cut"),
        pytest.param(lambda weights: weights[:24] + b"\xff" * 8 + weights[32:], id="tables past the end"),
        pytest.param(lambda weights: weights[:40] + b"\xff" * 8 + weights[48:], id="data past the end"),
        pytest.param(without_layouts, id="no layouts"),
        pytest.param(without_sizes, id="no sizes"),
        pytest.param(with_one_number_each, id="one number each"),
    ],
)
def test_weights_that_lie_are_refused_before_the_library_has_them(
    executorch_bundle: Path,
    executorch_library: Path,
    tiny_model: Path,
    tmp_path: Path,
    change: Callable[[bytes], bytes],
) -> None:
    """Under the right names: the library believes types, sizes and places. `verify` refuses them, too."""
    sound = open_bundle(executorch_bundle, "executorch")
    directory = Path(shutil.copytree(executorch_bundle, tmp_path / "other"))
    (directory / "base.ptd").write_bytes(change(sound.path("base.ptd").read_bytes()))
    other = Bundle(directory=directory, digest=sound.digest, manifest=sound.manifest)
    theta = np.zeros(sound.manifest.adapter.layout.size, np.float32)
    batch = Tokens(other).padded([5, 6, 7], labels=[0])
    refusal = r"^base\.ptd cannot be loaded: it is no file of weights .*; download the bundle again$"
    with pytest.raises(BundleError, match=refusal):
        ExecutorchRuntime(other, library=executorch_library).gradient(theta, batch)
    with pytest.raises(BundleError, match=refusal):
        verify_graphs(directory, sound.manifest, adapted_model(sound, tiny_model))
