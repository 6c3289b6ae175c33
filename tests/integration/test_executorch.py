"""Training on ExecuTorch: verified, without torch in the process; a wrong library or base is refused."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor, nn

from benchmarks.fuzz_programs import names_in
from edge_client import executorch_runtime
from edge_client.bundle import Bundle, needed_files, open_bundle
from edge_client.executorch_runtime import LIBRARY_VARIABLE, ExecutorchRuntime
from edge_client.onnx_runtime import OnnxRuntime
from edge_client.tokens import Batch, Tokens
from export import verify_bundle
from export.verify import verify_graphs
from fedtt.errors import BundleError, RuntimeFailure, UnavailableError
from fedtt.layout import Theta
from fedtt.program_file import check_program, program_needs
from tests.support.torch_runtime import TorchRuntime, adapted_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundle(executorch_bundle: Path) -> Bundle:
    return open_bundle(executorch_bundle, "executorch")


def first_theta(bundle: Bundle) -> Theta:
    return bundle.manifest.adapter.layout.flatten(load_file(bundle.path(bundle.manifest.initial)))


def some_batch(bundle: Bundle, rows: int = 3) -> Batch:
    return Tokens(bundle).padded(
        *[[5 + row, 6, 7] for row in range(rows)], labels=[row % 4 for row in range(rows)]
    )


class Noise(nn.Module):
    """An operator that no step has, for its output is no function of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(2)


def lowered(module: nn.Module) -> bytes:
    """A program of it by ExecuTorch's own means."""
    from executorch.exir import to_edge

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(module, (torch.zeros(2),))
        return bytes(to_edge(exported).to_executorch().buffer)


def test_verify_compares_both_runtimes_with_torch(executorch_bundle: Path, tiny_model: Path) -> None:
    differences = verify_bundle(executorch_bundle, str(tiny_model))
    assert {d.runtime for d in differences} == {"onnxruntime", "executorch"}
    assert all(d.hidden and d.above for d in differences), "a step over its prefix was not compared"
    assert max(d.largest for d in differences) <= 1e-5


def test_a_device_downloads_the_files_of_its_own_runtime_alone(bundle: Bundle) -> None:
    theirs = set(needed_files(bundle.manifest, "executorch"))
    assert {"step.pte", "eval.pte", "prefix-1.pte", "step-1.pte", "base.ptd"} <= theirs
    assert not theirs & {"step.onnx", "eval.onnx", "base.bin"}


def test_one_file_holds_each_weight_once(executorch_bundle: Path) -> None:
    """All programs, forward and backward, read one copy of the base."""
    ours, onnx = ((executorch_bundle / name).stat().st_size for name in ("base.ptd", "base.bin"))
    assert ours < 1.4 * onnx  # alignment and names weigh something beside so small a base


def test_products_in_int8_agree_with_integers_in_torch_and_nearly_with_float32(
    integer_executorch_bundle: Path, executorch_library: Path, tiny_model: Path
) -> None:
    """Step, evaluation, the step that clips and that over a prefix, and the gradient on a device."""
    differences = verify_bundle(integer_executorch_bundle, str(tiny_model))
    ours = [d for d in differences if d.runtime == "executorch"]
    assert min(d.largest for d in ours) <= 1e-5  # where nothing is rounded the other way
    assert all(0 < d.largest <= d.allowed and d.above and d.private for d in ours)
    opened = open_bundle(integer_executorch_bundle, "executorch")
    theta = np.random.default_rng(0).normal(0, 0.05, opened.manifest.adapter.layout.size).astype(np.float32)
    _, found = ExecutorchRuntime(opened, library=executorch_library).gradient(theta, some_batch(opened))
    in_float32 = TorchRuntime(adapted_model(opened, tiny_model))  # by the same rounded matrices
    _, expected = in_float32.gradient(theta, some_batch(opened))
    cosine = found @ expected / np.linalg.norm(found) / np.linalg.norm(expected)
    assert 0.99 < cosine < 1 - 1e-6  # and it is another


def test_an_app_that_trains_imports_no_torch(
    executorch_bundle: Path, executorch_library: Path, bundle: Bundle
) -> None:
    program = """
import sys
import warnings
from pathlib import Path
import numpy as np
from edge_client import LocalTrainer, executorch_runtimes
from edge_client.bundle import open_bundle
from edge_client.tokens import Tokens
bundle = open_bundle(Path(sys.argv[1]), "executorch")
theta = np.full(bundle.manifest.adapter.layout.size, 0.05, np.float32)
batch = Tokens(bundle).padded([5, 6, 7], [6, 6, 7], [7, 6, 7], labels=[0, 1, 2])
runtimes = executorch_runtimes()
assert LocalTrainer(runtimes).runtime == "executorch"
loss, gradient = runtimes.open(bundle).gradient(theta, batch)
assert not {"torch", "executorch", "onnxruntime"} & set(sys.modules)
print(loss)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(executorch_bundle)],
        env={**os.environ, LIBRARY_VARIABLE: str(executorch_library)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    theta = np.full(bundle.manifest.adapter.layout.size, 0.05, np.float32)
    expected, _ = OnnxRuntime(open_bundle(executorch_bundle)).gradient(theta, some_batch(bundle))
    assert float(done.stdout) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["step.pte", "base.ptd"])
def test_a_file_that_is_gone_when_its_program_is_loaded_is_one_that_may_come_back(
    name: str, executorch_bundle: Path, executorch_library: Path, tmp_path: Path
) -> None:
    bundle = open_bundle(Path(shutil.copytree(executorch_bundle, tmp_path / "bundle")), "executorch")
    runtime = ExecutorchRuntime(bundle, library=executorch_library)
    bundle.path(name).rename(tmp_path / name)
    with pytest.raises(UnavailableError, match=rf"{name} cannot be used \(No such file or directory\)"):
        runtime.gradient(first_theta(bundle), some_batch(bundle))
    (tmp_path / name).rename(bundle.path(name))
    runtime.gradient(first_theta(bundle), some_batch(bundle))


def test_a_missing_library_is_one_line_with_the_remedy(bundle: Bundle, tmp_path: Path) -> None:
    runtime = ExecutorchRuntime(bundle, library=tmp_path / "none.so")
    with pytest.raises(RuntimeFailure, match=r"not here \(none\.so\): install the fedtt-executorch wheel"):
        runtime.gradient(first_theta(bundle), some_batch(bundle))


def test_another_library_is_refused(bundle: Bundle, executorch_library: Path) -> None:
    runtime = ExecutorchRuntime(bundle, library=executorch_library.with_name("libexecutorch.so"))
    with pytest.raises(RuntimeFailure, match="not an ExecuTorch library of fedtt"):
        runtime.gradient(first_theta(bundle), some_batch(bundle))


def test_a_library_of_another_version_is_refused(bundle: Bundle, executorch_library: Path) -> None:
    bundle.manifest.requires["executorch"] = "1.9.0"
    try:
        runtime = ExecutorchRuntime(bundle, library=executorch_library)
        with pytest.raises(RuntimeFailure, match=r"needs ExecuTorch 1\.9\.0, the library here is of 1\.5\.1"):
            runtime.logits(first_theta(bundle), some_batch(bundle))
    finally:
        bundle.manifest.requires["executorch"] = "1.5.1"


def test_weights_of_another_base_are_refused_before_anything_runs(
    bundle: Bundle, executorch_library: Path, tmp_path: Path
) -> None:
    """Each tensor bears the hash of its bytes, so the programs do not find theirs in another base's file."""
    data = bundle.path("base.ptd").read_bytes()
    names = set(re.findall(rb"t[0-9a-f]{32}", data))
    assert names
    for name in names:  # the same shapes under other names
        data = data.replace(name, b"t" + name[:0:-1])
    shutil.copytree(bundle.directory, tmp_path / "other")
    (tmp_path / "other" / "base.ptd").write_bytes(data)
    other = Bundle(directory=tmp_path / "other", digest=bundle.digest, manifest=bundle.manifest)
    with pytest.raises(RuntimeFailure, match=r"does base\.ptd belong to it\?"):
        ExecutorchRuntime(other, library=executorch_library).logits(first_theta(bundle), some_batch(bundle))


def test_other_weights_under_the_right_names_are_refused_by_their_hash(
    executorch_bundle: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(executorch_bundle, tmp_path / "other"))
    data = bytearray((other / "base.ptd").read_bytes())
    data[-1] ^= 1
    (other / "base.ptd").write_bytes(data)
    with pytest.raises(BundleError, match=r"base\.ptd does not match its sha256"):
        open_bundle(other, "executorch")


def with_step(bundle: Bundle, directory: Path, step: bytes) -> Bundle:
    """A copy of the bundle with this for a step, whose hash nobody has checked."""
    shutil.copytree(bundle.directory, directory)
    (directory / "step.pte").write_bytes(step)
    return Bundle(directory=directory, digest=bundle.digest, manifest=bundle.manifest)


@pytest.mark.parametrize("kept_bytes", [0, 7, 2000, -1000])
def test_a_damaged_program_is_refused(
    bundle: Bundle, executorch_library: Path, tmp_path: Path, kept_bytes: int
) -> None:
    """Cut within the program by us; within the data behind it by the library, which maps that."""
    damaged = with_step(bundle, tmp_path / "damaged", bundle.path("step.pte").read_bytes()[:kept_bytes])
    error = RuntimeFailure if kept_bytes < 0 else BundleError
    with pytest.raises(error, match=r"^step\.pte cannot be loaded.*download the bundle again$"):
        ExecutorchRuntime(damaged, library=executorch_library).gradient(
            first_theta(bundle), some_batch(bundle)
        )


def test_a_program_with_another_operator_is_refused_before_the_library_has_it(
    bundle: Bundle, executorch_library: Path, tmp_path: Path
) -> None:
    """A real one, which the library would load and run: its results are drawn at random."""
    program = lowered(Noise())
    (tmp_path / "noise.pte").write_bytes(program)
    library = executorch_runtime._open(executorch_library, 1)
    alone = library.fedtt_load(os.fsencode(tmp_path / "noise.pte"), None, None, 0)
    assert alone, "the library itself refuses it, so this test shows nothing"
    library.fedtt_free(alone)
    runtime = ExecutorchRuntime(with_step(bundle, tmp_path / "other", program), library=executorch_library)
    with pytest.raises(BundleError, match=r"^step\.pte uses the operator 'aten::rand\.out'.*: not loaded; "):
        runtime.gradient(first_theta(bundle), some_batch(bundle))
    assert runtime.logits(first_theta(bundle), some_batch(bundle)).shape == (3, 4)  # its other programs run


def test_verify_refuses_a_program_that_devices_refuse(
    bundle: Bundle, executorch_bundle: Path, tiny_model: Path, tmp_path: Path
) -> None:
    changed = bundle.path("step.pte").read_bytes().replace(b"aten::add\0", b"aten::odd\0")
    with_step(bundle, tmp_path / "other", changed)
    model = adapted_model(bundle, tiny_model)
    with pytest.raises(BundleError, match=r"step\.pte uses the operator 'aten::odd\.out'"):
        verify_graphs(tmp_path / "other", bundle.manifest, model)


@pytest.mark.parametrize(
    "exported",
    [
        "executorch_bundle",
        "private_executorch_bundle",
        "integer_executorch_bundle",
        "stories_executorch_bundle",
    ],
)
def test_exported_programs_need_our_operators_alone(exported: str, request: pytest.FixtureRequest) -> None:
    directory: Path = request.getfixturevalue(exported)
    programs = sorted(directory.glob("*.pte"))
    assert programs
    for path in programs:
        check_program(path.read_bytes(), path.name)
        assert program_needs(path.read_bytes(), path.name) == names_in(path.read_bytes())


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"sizes": [-1]}, "impossible sizes"),
        ({"sizes": [2**31 - 1]}, "does not take its inputs"),
        ({"sizes": [2**31 - 1] * 8, "dimensions": 8}, "impossible sizes"),  # 8·(2**31 - 1)**8 > 2**63 bytes
        ({"dimensions": 9}, "impossible sizes"),
        ({"type": 99}, "impossible sizes or type"),
        ({"data": None}, "or no data"),
    ],
)
def test_inputs_that_no_tensor_can_have_are_refused_and_the_process_lives(
    bundle: Bundle, executorch_library: Path, changed: dict[str, Any], why: str
) -> None:
    batch, error = some_batch(bundle), ctypes.create_string_buffer(400)
    library = executorch_runtime._open(executorch_library, 1)
    program = executorch_runtime._Program(library, bundle.path("eval.pte"), bundle.path("base.ptd"))
    arrays: tuple[NDArray[Any], ...] = (first_theta(bundle), batch.ids, batch.mask)
    inputs = (executorch_runtime._Tensor * 3)(*map(executorch_runtime._tensor, arrays))
    for field, value in changed.items():
        if field == "sizes":
            inputs[1].sizes[: len(value)] = value
        else:
            setattr(inputs[1], field, value)
    assert library.fedtt_run(program._handle, inputs, 3, error, 400) != 0
    assert why in error.value.decode()
    assert program.run(*arrays)[0].shape == (3, 4)


def test_a_second_number_of_threads_is_refused_and_the_first_kept(
    bundle: Bundle, executorch_library: Path
) -> None:
    first, second = (ExecutorchRuntime(bundle, threads=n, library=executorch_library) for n in (1, 2))
    expected = first.logits(first_theta(bundle), some_batch(bundle))
    with pytest.raises(RuntimeFailure, match=r"threads=1 in this process, 2 cannot be had"):
        second.logits(first_theta(bundle), some_batch(bundle))
    assert np.array_equal(first.logits(first_theta(bundle), some_batch(bundle)), expected)


def test_more_rows_than_were_planned_for_are_refused(bundle: Bundle, executorch_library: Path) -> None:
    runtime = ExecutorchRuntime(bundle, library=executorch_library)
    with pytest.raises(RuntimeFailure, match="takes at most 32 rows, the batch has 33"):
        runtime.gradient(first_theta(bundle), some_batch(bundle, 33))


def test_a_bundle_without_programs_says_so_where_it_is_opened(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="no graphs for executorch"):
        open_bundle(tiny_bundle, "executorch")
