"""The runtime on a real exported graph: a two-layer BERT of width 32 with four labels."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from msgspec.structs import replace

from edge_client.bundle import Bundle, open_bundle
from edge_client.onnx_runtime import OnnxRuntime
from edge_client.tokens import Batch, Tokens
from fedtt.adapter import initial_theta
from fedtt.errors import BundleError, RuntimeFailure, StorageError, UnavailableError
from fedtt.layout import Theta
from fedtt.planning import plan_adapter, plan_tt


def somewhere(bundle: Bundle) -> Theta:
    """A theta at which every factor has a gradient."""
    theta = initial_theta(bundle.manifest.adapter, 0)
    noise = np.random.default_rng(0).normal(0, 0.1, theta.shape)
    return theta + noise.astype(np.float32)


def batch_of(bundle: Bundle) -> Batch:
    batch, _ = Tokens(bundle).batch(["set the alarm", "lights off now please", "pay my card"], [0, 1, 2])
    return batch


@pytest.mark.parametrize("name", ["step.onnx", "base.bin"])
def test_a_file_that_is_gone_when_its_graph_is_loaded_is_one_that_may_come_back(
    name: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = open_bundle(Path(shutil.copytree(tiny_bundle, tmp_path / "bundle")))
    runtime, theta, batch = OnnxRuntime(bundle), somewhere(bundle), batch_of(bundle)
    bundle.path(name).rename(tmp_path / name)
    with pytest.raises(UnavailableError, match=rf"{name} cannot be used \(No such file or directory\)"):
        runtime.gradient(theta, batch)
    (tmp_path / name).rename(bundle.path(name))
    expected, _ = OnnxRuntime(open_bundle(tiny_bundle)).gradient(theta, batch)
    assert runtime.gradient(theta, batch)[0] == expected


def test_a_file_where_the_bundle_was_is_nothing_that_trying_again_mends(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = open_bundle(Path(shutil.copytree(tiny_bundle, tmp_path / "bundle")))
    runtime, theta, batch = OnnxRuntime(bundle), somewhere(bundle), batch_of(bundle)
    shutil.rmtree(bundle.directory)
    bundle.directory.write_bytes(b"")
    with pytest.raises(StorageError, match="a file stands where a directory should be") as found:
        runtime.gradient(theta, batch)
    assert not isinstance(found.value, UnavailableError)


def test_a_process_with_too_many_open_files_may_try_again(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    runtime, theta, batch = OnnxRuntime(bundle), somewhere(bundle), batch_of(bundle)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(UnavailableError, match=r"Too many open files.*ulimit -n"):
            runtime.gradient(theta, batch)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    runtime.gradient(theta, batch)


def test_a_graph_of_another_layout_is_refused_when_it_is_loaded(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    other = plan_adapter(plan_tt(hidden=8, bottleneck=4, rank=2), hidden=8, layers=1)
    foreign = Bundle(
        directory=bundle.directory, digest=bundle.digest, manifest=replace(bundle.manifest, adapter=other)
    )
    with pytest.raises(
        RuntimeFailure, match=rf"step\.onnx takes a theta of shape .*has {other.layout.size} numbers"
    ):
        OnnxRuntime(foreign).gradient(np.zeros(other.layout.size, np.float32), batch_of(bundle))


def test_an_onnxruntime_older_than_the_bundle_requires_is_named_with_the_remedy(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    ahead = replace(bundle.manifest, requires={"onnxruntime": "99.1"})
    demanding = Bundle(directory=bundle.directory, digest=bundle.digest, manifest=ahead)
    with pytest.raises(RuntimeFailure) as caught:
        OnnxRuntime(demanding).gradient(somewhere(bundle), batch_of(bundle))
    assert str(caught.value) == (
        f"the bundle needs onnxruntime 99.1 or newer, {onnxruntime.__version__} is installed: "
        "pip install 'onnxruntime>=99.1'"
    )


@pytest.mark.parametrize("required", ["1.9.9", "1.20", onnxruntime.__version__])
def test_an_onnxruntime_as_new_as_required_runs(tiny_bundle: Path, required: str) -> None:
    bundle = open_bundle(tiny_bundle)
    manifest = replace(bundle.manifest, requires={"onnxruntime": required})
    content = Bundle(directory=bundle.directory, digest=bundle.digest, manifest=manifest)
    assert OnnxRuntime(content).gradient(somewhere(bundle), batch_of(bundle))[0] > 0


@pytest.mark.parametrize("content", [b"", b"no graph at all"])
def test_a_damaged_graph_is_a_clear_error(tiny_bundle: Path, tmp_path: Path, content: bytes) -> None:
    directory = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    bundle = open_bundle(directory)
    (directory / "step.onnx").write_bytes(content)
    with pytest.raises((BundleError, RuntimeFailure), match=r"step\.onnx cannot be loaded") as caught:
        OnnxRuntime(bundle).gradient(somewhere(bundle), batch_of(bundle))
    assert "\n" not in str(caught.value)


def test_a_batch_the_graph_cannot_take_is_a_clear_error(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    limit = bundle.manifest.model.vocabulary
    batch = Batch(
        ids=np.full((1, 3), limit + 5), mask=np.ones((1, 3), np.int64), labels=np.zeros(1, np.int64)
    )
    with pytest.raises(RuntimeFailure, match=r"step\.onnx did not run on a batch of 1x3 tokens"):
        OnnxRuntime(bundle).gradient(somewhere(bundle), batch)


def write_step(path: Path, loss: list[int], grad: list[int], size: int) -> None:
    """A step that returns zeros of these shapes, whatever it is given."""
    values = {"loss": np.zeros(loss, np.float32), "grad": np.zeros(grad, np.float32)}
    integers = (onnx.TensorProto.INT64, [None, None])
    inputs: dict[str, Any] = {"theta": (onnx.TensorProto.FLOAT, [size]), "ids": integers, "mask": integers}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Neg", [f"{name}.of"], [name]) for name in values],
        "step",
        [
            onnx.helper.make_tensor_value_info(name, *of)
            for name, of in (inputs | {"labels": (onnx.TensorProto.INT64, [None])}).items()
        ],
        [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, value.shape)
            for name, value in values.items()
        ],
        [onnx.numpy_helper.from_array(value, f"{name}.of") for name, value in values.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())


def test_outputs_of_other_shapes_than_a_steps_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    bundle = open_bundle(directory)
    theta, batch = somewhere(bundle), batch_of(bundle)
    size = len(theta)
    write_step(directory / "step.onnx", [], [size], size)
    assert OnnxRuntime(bundle).gradient(theta, batch)[1].shape == (size,)
    for loss, grad in (([2], [size]), ([1], [size]), ([], [1]), ([], [size + 1]), ([], [size, 1])):
        write_step(directory / "step.onnx", loss, grad, size)
        with pytest.raises(RuntimeFailure, match=r"step\.onnx returned float32 .* in place of float32 \(\)"):
            OnnxRuntime(bundle).gradient(theta, batch)


def test_a_graph_that_is_too_large_is_not_read(tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    bundle = open_bundle(tmp_path / "bundle")
    os.truncate(bundle.path(bundle.graphs("onnxruntime").step), 1 << 40)
    with pytest.raises(BundleError, match="has 1099511627776 bytes, a graph has at most"):
        OnnxRuntime(bundle).gradient(somewhere(bundle), batch_of(bundle))
