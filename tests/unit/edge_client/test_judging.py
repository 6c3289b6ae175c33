"""What judging takes of a device: passes no larger than those of training, and losses in pieces."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from edge_client.examples import Example
from edge_client.inference import Model, _next_token_nll
from edge_client.passes import PASSES
from edge_client.tokens import Batch
from fedtt.layout import Theta
from tests.support.edge import MeanTarget, small_bundle
from tests.support.tiny import tiny_manifest, tiny_spec

THETA = np.zeros(tiny_spec().layout.size, np.float32)
LONG = replace(tiny_manifest().tokenization, max_tokens=512)


class Judge(MeanTarget):
    """Tells "on" from everything else by its first token, and notes how large its batches are."""

    def __init__(self, rows: int | None = None) -> None:
        super().__init__()
        self.rows, self.shapes = rows, list[tuple[int, ...]]()

    def logits(self, theta: Theta, batch: Batch) -> NDArray[np.float32]:
        self.shapes.append(batch.ids.shape)
        logits: NDArray[np.float32] = np.eye(2, dtype=np.float32)[(batch.ids[:, 0] == 3).astype(int)]
        return logits


@pytest.mark.parametrize("rows", [None, 3])
def test_no_batch_has_more_tokens_than_a_pass_of_training_or_more_rows_than_the_runtime_takes(
    rows: int | None, tmp_path: Path
) -> None:
    runtime = Judge(rows)
    model = Model(small_bundle(tmp_path, tokenization=LONG), THETA, runtime)
    texts = [f"{'on' if n % 3 else 'off'} {'now ' * (n * 37 % 600)}" for n in range(90)]
    examples = [Example(text, int(text.startswith("on"))) for text in texts]
    found = model.evaluate(examples)
    assert (found.examples, found.accuracy) == (90, 1.0)
    assert found.loss == pytest.approx(np.log1p(np.exp(-1)))
    assert [p.label for p in model.predict(texts)] == ["yes" if e.label else "no" for e in examples]
    assert max(count for count, _ in runtime.shapes) <= (rows or 32)
    assert max(width for _, width in runtime.shapes) == 512
    assert max(count * width for count, width in runtime.shapes) <= PASSES.tokens


def test_the_loss_of_a_large_vocabulary_is_what_it_is_and_takes_a_piece_of_memory_at_a_time() -> None:
    rng, shape, words = np.random.default_rng(0), (4, 32), 32_000
    logits = rng.normal(0, 3, (*shape, words)).astype(np.float32)
    lengths = np.array([32, 1, 0, 20])
    mask = (np.arange(shape[1]) < lengths[:, None]).astype(np.int64)
    batch = Batch(ids=rng.integers(0, words, shape) * mask, mask=mask)
    expected, count = 0.0, 0
    for row, length in enumerate(lengths):
        for place in range(1, length):
            before = logits[row, place - 1].astype(np.float64)
            expected += np.log(np.exp(before).sum()) - before[batch.ids[row, place]]
            count += 1
    tracemalloc.start()
    try:
        nll, found = _next_token_nll(logits, batch)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert nll == pytest.approx(expected, rel=1e-12)
    assert found == count
    assert peak < logits.nbytes / 2  # 16 MB; in float64 it would be thrice 32
