from __future__ import annotations

import asyncio
import hashlib
import threading
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from edge_client.bundle import Bundle
from edge_client.examples import Example, Examples, Shard
from edge_client.judging import JudgingRequest
from edge_client.local_trainer import LocalTrainer
from edge_client.runtime import Hidden, Runtimes
from edge_client.tokens import Batch, KeptTokens, RememberedTokens
from edge_client.trainer import TrainingRequest
from fedtt.algorithms import FedTT
from fedtt.codec import CodecSpec
from fedtt.errors import ConfigError, Declined
from fedtt.layout import Theta
from fedtt.manifest import DepthGraphs, FileEntry
from fedtt.messages import Judge, Plan
from fedtt.optimiser import TrainingSpec
from fedtt.wire import encode_theta, version_digest
from tests.support.edge import Living, MeanTarget, living_tokenizers, small_bundle
from tests.support.tiny import tiny_manifest, tiny_spec

LAYOUT = tiny_spec().layout
VERSION = encode_theta(np.zeros(LAYOUT.size, np.float32))
EXAMPLES = [Example(f"lights {'on' if n % 2 else 'off'}", n % 2, f"row {n}") for n in range(7)]
NEW = [*EXAMPLES, Example("now", 1)]
DEVICE = "0123456789abcdef" * 2
PLAN = Plan(
    task="t",
    seed=1,
    bundle="0" * 64,
    version=version_digest(VERSION),
    version_number=0,
    round=1,
    live=tuple(range(len(LAYOUT.factors))),
    training=TrainingSpec(local_steps=3, batch_size=4, max_tokens=8),
    codec=CodecSpec(quantise="fp32"),
    method=FedTT(),
    min_examples=1,
)


class Watched(MeanTarget):
    """Notes how many tokenizers are in memory beside each graph, and when graphs go."""

    def __init__(self, living: Living, depths: tuple[int, ...]) -> None:
        super().__init__()
        self.calls: list[
            tuple[str, int]
        ] = []  #: and how many tokenizers there were; read so far at a release
        self._living, self.depths = living, depths

    def prefix(self, theta: Theta, batch: Batch, depth: int) -> Hidden:
        self.calls.append(("graph", self._living.count))
        return np.zeros((*batch.ids.shape, tiny_spec().hidden), np.float32)

    def gradient_above(self, theta: Theta, hidden: Hidden, batch: Batch, depth: int) -> tuple[float, Theta]:
        return self.gradient(theta, batch)

    def gradient(self, theta: Theta, batch: Batch) -> tuple[float, Theta]:
        self.calls.append(("graph", self._living.count))
        return super().gradient(theta, batch)

    def logits(self, theta: Theta, batch: Batch) -> NDArray[np.float32]:
        self.calls.append(("graph", self._living.count))
        return super().logits(theta, batch)

    def release(self) -> None:
        self.calls.append(("release", len(self._living.read)))


def bundle_with_a_depth(directory: Path) -> Bundle:
    cut = DepthGraphs(depth=1, prefix="prefix-1.onnx", step="step-1.onnx")
    graphs = {"onnxruntime": replace(tiny_manifest().graphs["onnxruntime"], depths=(cut,))}
    files = tiny_manifest().files | {cut.prefix: FileEntry("0" * 64, 1)}
    return small_bundle(directory, graphs=graphs, files=files)


def training(
    bundle: Bundle,
    examples: Sequence[Example] | Examples,
    limit_s: float | None = None,
) -> TrainingRequest:
    return TrainingRequest(
        plan=PLAN,
        device=DEVICE,
        bundle=bundle,
        version=VERSION,
        examples=Shard(examples) if isinstance(examples, Sequence) else examples,
        time_limit_s=limit_s,
    )


def judging(bundle: Bundle, examples: Sequence[Example]) -> JudgingRequest:
    sha256 = version_digest(VERSION)
    question = Judge(
        lease="0" * 32,
        expires_in_s=60,
        task="t",
        seed=1,
        bundle=bundle.digest,
        version=sha256,
        version_number=2,
        before=sha256,
        examples=100,
    )
    return JudgingRequest(
        question=question,
        device=DEVICE,
        bundle=bundle,
        before=VERSION,
        after=VERSION,
        examples=Shard(examples),
    )


@pytest.mark.parametrize("depths", [(), (1,)], ids=["whole steps", "last block"])
async def test_no_tokenizer_is_in_memory_beside_a_graph(tmp_path: Path, depths: tuple[int, ...]) -> None:
    bundle = bundle_with_a_depth(tmp_path)
    with living_tokenizers() as living:
        runtime = Watched(living, depths)
        trainer = LocalTrainer(Runtimes(lambda _: runtime), keeps_tokenizers=False)
        for examples in (EXAMPLES, EXAMPLES, NEW):
            runtime.calls.append(("training", len(living.read)))
            await trainer.train(training(bundle, examples))
        for examples in (NEW, NEW, [*NEW, Example("please", 0)]):
            runtime.calls.append(("judging", len(living.read)))
            await trainer.judge(judging(bundle, examples))
    graphs = [tokenizers for name, tokenizers in runtime.calls if name == "graph"]
    assert len(graphs) >= 3 * 3 + 3 * 2
    assert set(graphs) == {0}
    assert [call for call in runtime.calls if call[0] != "graph"] == [
        *(("training", 0), ("release", 0)),
        ("training", 1),  # nothing is new, so what is loaded stays
        *(("training", 1), ("release", 1)),  # before the tokenizer is read again
        *(("judging", 2), ("release", 2)),  # which cuts texts elsewhere, and so reads its own
        ("judging", 3),
        *(("judging", 3), ("release", 3)),
    ]


async def test_an_app_reads_a_tokenizer_once_for_training_and_once_for_judging(
    tmp_path: Path,
) -> None:
    bundle = small_bundle(tmp_path)
    with living_tokenizers() as living:
        runtime = Watched(living, ())
        trainer = LocalTrainer(Runtimes(lambda _: runtime))
        for examples in (EXAMPLES, NEW):
            await trainer.train(training(bundle, examples))
            await trainer.judge(judging(bundle, examples))
    assert len(living.read) == 2
    assert sum(name == "release" for name, _ in runtime.calls) == len(living.read)


async def test_an_app_that_knows_the_bundle_reads_its_tokenizer_beforehand(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path)
    with living_tokenizers() as living:
        runtime = Watched(living, ())
        trainer = LocalTrainer(Runtimes(lambda _: runtime))
        for max_tokens in (PLAN.training.max_tokens, None):
            trainer.read_tokenizer(bundle.directory, max_tokens)
        assert (len(living.read), living.count) == (2, 2)
        await trainer.train(training(bundle, EXAMPLES))
        await trainer.judge(judging(bundle, EXAMPLES))
        assert len(living.read) == 2
        with pytest.raises(ConfigError, match="keeps_tokenizers"):
            LocalTrainer(Runtimes(lambda _: runtime), keeps_tokenizers=False).read_tokenizer(bundle.directory)
        assert len(living.read) == 2


LONG = replace(tiny_manifest().tokenization, max_tokens=64)
MANY = [Example(f"word {n}", n % 2) for n in range(2_000)]


class Slow:
    """Examples that are fetched once somebody lets them."""

    def __init__(self) -> None:
        self.asked, self.may_go_on = threading.Event(), threading.Event()

    def count(self) -> int:
        return len(MANY)

    def read(self) -> list[Example]:
        self.asked.set()
        assert self.may_go_on.wait(10)
        return MANY


async def test_reading_texts_ends_at_the_limit_of_time(tmp_path: Path) -> None:
    with living_tokenizers() as living:
        runtime = Watched(living, ())
        request = training(small_bundle(tmp_path), MANY, limit_s=1e-9)
        with pytest.raises(Declined, match="training has taken"):
            await LocalTrainer(Runtimes(lambda _: runtime)).train(request)
    assert living.read == []
    assert runtime.batches == []


async def test_reading_texts_ends_when_cancelled(tmp_path: Path) -> None:
    slow = Slow()
    with living_tokenizers() as living:
        runtime = Watched(living, ())
        request = training(small_bundle(tmp_path), slow)
        task = asyncio.create_task(LocalTrainer(Runtimes(lambda _: runtime)).train(request))
        await asyncio.to_thread(slow.asked.wait, 10)
        task.cancel()
        await asyncio.sleep(0)
        slow.may_go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert living.read == []
    assert runtime.batches == []


def test_reading_can_be_ended_before_any_text_and_leaves_no_tokenizer(tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    texts, asked = [example.text for example in MANY], 0

    def go_on() -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise Enough

    with living_tokenizers() as living:
        tokens = KeptTokens().open(small_bundle(tmp_path))
        with pytest.raises(Enough):
            tokens.rows(texts, go_on)
        assert (len(living.read), living.count, asked) == (1, 0, 3)
        tokens.rows(texts)
        tokens.rows(texts, go_on)  # what is remembered is not read
        assert (len(living.read), asked) == (2, 3)


def test_text_of_ids_leaves_no_tokenizer_and_threads_do_not_take_one_from_another(tmp_path: Path) -> None:
    tokens, failed = KeptTokens().open(small_bundle(tmp_path)), list[Exception]()

    def work(number: int) -> None:
        try:
            for turn in range(40):
                assert tokens.text([2, 3]) == "lights on"
                tokens.rows([f"on {number} {turn}"])
        except Exception as error:
            failed.append(error)

    with living_tokenizers() as living:
        assert tokens.text([2, 3]) == "lights on"
        assert (len(living.read), living.count) == (1, 0)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


@pytest.mark.parametrize("words", [1, 30])
def test_what_is_remembered_takes_no_more_than_four_bytes_a_token(tmp_path: Path, words: int) -> None:
    limit = 50_000
    tokens = RememberedTokens(small_bundle(tmp_path, tokenization=LONG), limit=limit)
    tokens.rows(["on"])
    tracemalloc.start()
    try:
        for start in range(0, 3_000, 100):
            tokens.rows([f"{n} " + "on " * words for n in range(start, start + 100)])
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert limit < held < 4 * limit * 1.25


def test_no_text_is_kept_in_what_is_remembered(tmp_path: Path) -> None:
    tokens = RememberedTokens(small_bundle(tmp_path), keeps=False)
    tokens.rows(["please", ("lights", "on"), ("light", "son")])
    assert tokens.know(["please", ("lights", "on"), ("light", "son")])
    assert not tokens.know(["lightson"])
    keys = list(tokens._held)
    assert {len(key) for key in keys} == {hashlib.blake2b(digest_size=16).digest_size}
