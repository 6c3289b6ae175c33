"""Training over kept activations, on a runtime whose two halves are plain arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from edge_client.activations import FileActivations, kept_bytes
from edge_client.bundle import Bundle, RuntimeName
from edge_client.frozen_prefix import FrozenPrefix, least_depth
from edge_client.runtime import Hidden
from edge_client.tokens import Batch
from fedtt.adapter import AdapterSpec
from fedtt.layout import LiveSet, Theta
from fedtt.manifest import DepthGraphs, FileEntry
from tests.support.adapters import small_adapter
from tests.support.edge import WholeSteps, small_bundle
from tests.support.tiny import tiny_manifest, tiny_spec

SPEC = small_adapter("tt", hidden=8, layers=3, head="dense", labels=2)
THETA = np.arange(SPEC.layout.size, dtype=np.float32)
BELOW = SPEC.size_below(1)
CUT = DepthGraphs(depth=1, prefix="prefix-1.onnx", step="step-1.onnx")
GRAPHS = {"onnxruntime": replace(tiny_manifest().graphs["onnxruntime"], depths=(CUT,))}


def cut_bundle(directory: Path, **changes: object) -> Bundle:
    files = {**tiny_manifest().files, CUT.prefix: FileEntry("a" * 64, 1)}
    return small_bundle(directory, **{"adapter": SPEC, "graphs": GRAPHS, "files": files, **changes})


class Counting(WholeSteps):
    """What enters the last block is the token's number plus the first factor below."""

    name: RuntimeName = "onnxruntime"
    depths = (1,)

    def __init__(self, value: float = 0.0) -> None:
        self.asked: list[list[int]] = []
        self.calls: list[str] = []
        self.hidden: list[Hidden] = []
        self.value = value

    def gradient(self, theta: Theta, batch: Batch) -> tuple[float, Theta]:
        raise NotImplementedError

    def logits(self, theta: Theta, batch: Batch) -> Theta:
        raise NotImplementedError

    def prefix(self, theta: Theta, batch: Batch, depth: int) -> Hidden:
        assert depth == 1
        self.calls.append("prefix")
        self.asked.append(batch.ids[0].tolist())
        hidden: Hidden = np.repeat(batch.ids[:, :, None], 8, 2).astype(np.float32)
        return hidden + np.float32(theta[0] + self.value)

    def gradient_above(self, theta: Theta, hidden: Hidden, batch: Batch, depth: int) -> tuple[float, Theta]:
        self.calls.append("above")
        self.hidden.append(hidden)
        return float(hidden.sum()), np.zeros_like(theta)

    def release(self) -> None:
        self.calls.append("release")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return cut_bundle(tmp_path / "bundle")


def batch(*rows: list[int]) -> Batch:
    width = max(3, *map(len, rows))
    ids = np.array([row + [0] * (width - len(row)) for row in rows])
    mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return Batch(ids=ids, mask=mask, labels=np.zeros(len(rows), np.int64))


def step(runtime: Counting, bundle: Bundle, home: Path, theta: Theta, *rows: list[int]) -> FrozenPrefix:
    prefix = FrozenPrefix(runtime, bundle, 1, FileActivations(home / "kept", 1 << 20))
    prefix.gradient(theta, batch(*rows))
    return prefix


def test_each_row_is_computed_once_without_padding_and_kept_between_rounds(
    tmp_path: Path, bundle: Bundle
) -> None:
    runtime = Counting()
    first = step(runtime, bundle, tmp_path, THETA, [5, 6, 7, 8], [5], [5, 6, 7, 8])
    assert runtime.asked == [[5, 6, 7, 8], [5, 0, 0]]  # at least three tokens
    assert (first.computed, first.reused) == (2, 1)
    moved = THETA.copy()
    moved[BELOW:] += 1
    second = step(runtime, bundle, tmp_path, moved, [5], [5, 6, 7, 8, 9])
    assert runtime.asked[2:] == [[5, 6, 7, 8, 9]]
    assert (second.computed, second.reused) == (1, 1)
    np.testing.assert_array_equal(runtime.hidden[1][0, :, 0], [5, 0, 0, 0, 0])


def test_rows_to_come_are_computed_before_the_first_step_and_their_graph_freed(
    tmp_path: Path, bundle: Bundle
) -> None:
    runtime, kept = Counting(), FileActivations(tmp_path / "kept", 1 << 20)
    first, second = batch([5, 6, 7], [5, 6, 7]), batch([8], [5, 6, 7])
    prefix = FrozenPrefix(runtime, bundle, 1, kept, [first, second])
    for chosen in (first, second):
        prefix.gradient(THETA, chosen)
    assert runtime.calls == ["release", "prefix", "prefix", "release", "above", "above"]
    assert (prefix.computed, prefix.reused) == (2, 2)
    again = FrozenPrefix(runtime, bundle, 1, kept, [first, second])
    again.gradient(THETA, first)
    assert runtime.calls[6:] == ["above"], "all was kept: no graph but the step's is needed"


def test_no_more_rows_are_computed_ahead_than_there_is_room_for(tmp_path: Path, bundle: Bundle) -> None:
    runtime, kept = Counting(), FileActivations(tmp_path / "kept", 2 * kept_bytes((3, 8)))
    rows = batch([5, 6, 7], [6, 7, 8], [7, 8, 9])
    prefix = FrozenPrefix(runtime, bundle, 1, kept, [rows])
    prefix.gradient(THETA, rows)
    assert runtime.calls == ["release", "prefix", "prefix", "release", "prefix", "above"]
    assert (prefix.computed, prefix.reused) == (3, 0)


def test_a_change_of_anything_the_prefix_depends_on_computes_it_anew(tmp_path: Path, bundle: Bundle) -> None:
    runtime = Counting()
    step(runtime, bundle, tmp_path, THETA, [5, 6, 7])
    lower = THETA.copy()
    lower[BELOW - 1] += 1
    other_base = cut_bundle(tmp_path / "other", model=replace(bundle.manifest.model, base_sha256="1" * 64))
    files = bundle.manifest.files | {CUT.prefix: FileEntry("b" * 64, 1)}
    other_graph = cut_bundle(tmp_path / "again", files=files)  # the same base, exported anew
    for theta, of in ((lower, bundle), (THETA, other_base), (THETA, other_graph)):
        assert step(runtime, of, tmp_path, theta, [5, 6, 7]).computed == 1
    elsewhere = Counting()
    elsewhere.name = "executorch"
    both = cut_bundle(tmp_path / "both", graphs=GRAPHS | {"executorch": GRAPHS["onnxruntime"]})
    assert step(elsewhere, both, tmp_path, THETA, [5, 6, 7]).computed == 1
    other_step = cut_bundle(
        tmp_path / "step", files=bundle.manifest.files | {CUT.step: FileEntry("c" * 64, 1)}
    )
    for of in (bundle, other_step):
        assert step(runtime, of, tmp_path, THETA, [5, 6, 7]).reused == 1


def test_values_are_rounded_alike_whether_they_were_kept_or_not(tmp_path: Path, bundle: Bundle) -> None:
    runtime = Counting(value=1 / 3)
    for _ in range(2):
        step(runtime, bundle, tmp_path, THETA, [5, 6, 7])
    fresh, kept = runtime.hidden
    np.testing.assert_array_equal(fresh, kept)
    np.testing.assert_array_equal(fresh[0, :, 0], (np.array([5, 6, 7]) + 1 / 3).astype(np.float16))


def test_what_float16_cannot_hold_is_computed_each_time(tmp_path: Path, bundle: Bundle) -> None:
    runtime = Counting(value=1e6)
    for _ in range(2):
        assert step(runtime, bundle, tmp_path, THETA, [5, 6, 7]).computed == 1
    np.testing.assert_array_equal(
        runtime.hidden[1][0, :, 0], np.array([1e6 + 5, 1e6 + 6, 1e6 + 7], np.float32)
    )


@pytest.mark.parametrize(
    ("blocks", "depths", "found"),
    [
        ((2,), (1, 2), 1),
        ((1, 2), (1, 2), 2),
        ((1,), (1, 2), 2),
        ((0, 1, 2), (1, 2), None),
        ((1, 2), (1,), None),
        ((), (1, 2), 1),
        ((2,), (), None),
    ],
)
def test_the_least_depth_that_holds_all_live_blocks_is_taken(
    blocks: tuple[int, ...], depths: tuple[int, ...], found: int | None
) -> None:
    """The head is live in each case."""
    live = [i for i in range(len(SPEC.layout.factors)) if SPEC.block_of(i) in (None, *blocks)]
    assert least_depth(SPEC, LiveSet(SPEC.layout, live), depths) == found


def test_a_head_alone_takes_the_whole_base_as_its_prefix() -> None:
    spec: AdapterSpec = small_adapter("none", hidden=8, layers=3, head="dense", labels=2)
    assert least_depth(spec, spec.layout.everything, (0,)) == 0
    assert least_depth(tiny_spec(), tiny_spec().layout.everything, ()) is None
