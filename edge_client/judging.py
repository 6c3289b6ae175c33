"""What a version is worth on the device's own examples, beside the one before it; neither is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from edge_client.batches import address
from edge_client.bundle import Bundle
from edge_client.examples import Example, Examples
from edge_client.inference import Model
from edge_client.runtime import Runtime
from edge_client.tokens import Tokens
from fedtt.errors import DataError
from fedtt.messages import Judge, Judged, Verdict
from fedtt.rng import Purpose, rng_for
from fedtt.wire import decode_theta

__all__ = ["JudgingRequest", "judge"]

_MOST_LOSS = 1e9  #: what a model that has lost its mind counts as


@dataclass(frozen=True, eq=False, kw_only=True)
class JudgingRequest:
    """Everything a verdict is made from."""

    question: Judge
    device: str
    bundle: Bundle
    before: bytes  #: of the versions' factors, as the question names them
    after: bytes
    examples: Examples  #: read when judging begins
    time_limit_s: float | None = None  #: after which it ends without a verdict; None for as long as it takes


def judge(
    request: JudgingRequest,
    runtime: Runtime,
    tokens: Tokens | None = None,
    go_on: Callable[[], None] = lambda: None,
) -> Verdict:
    """Judge here and now, on as many of the examples as are asked for, drawn by seed, version and device.

    tokens: of the bundle, where they are at hand; before they read what is new the runtime's graphs go.
    Raises DataError (no or unusable examples), LayoutError or WireError (a version is another one),
    RuntimeFailure (graph) and what `go_on` does, which is called before each text that is read and before
    each batch.
    """
    question, layout = request.question, request.bundle.manifest.adapter.layout
    examples = _drawn(request)
    if not examples:
        raise DataError("this device has no example to judge a version by")

    def judged(version: bytes, sha256: str) -> Judged:
        if tokens is not None and not tokens.know([example.words for example in examples]):
            runtime.release()  # a tokenizer comes, and does not lie in memory beside a graph
        model = Model(request.bundle, decode_theta(version, layout, sha256), runtime, tokens)
        found = model.evaluate(examples, go_on)
        loss = min(found.loss, _MOST_LOSS) if math.isfinite(found.loss) else _MOST_LOSS
        right = None if found.accuracy is None else round(found.accuracy * found.examples)
        return Judged(loss=max(0.0, loss), right=right)

    before = judged(request.before, question.before)
    return Verdict(examples=len(examples), before=before, after=judged(request.after, question.version))


def _drawn(request: JudgingRequest) -> list[Example]:
    question, examples = request.question, request.examples.read()
    rng = rng_for(question.seed, Purpose.JUDGED, question.version_number, address(request.device))
    rows = rng.permutation(len(examples))[: question.examples]
    return [examples[row] for row in sorted(rows.tolist())]
