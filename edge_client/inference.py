"""Using a trained version on the device: labels with probabilities, continuations, and how good it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from edge_client.bundle import Bundle, open_bundle
from edge_client.examples import Example, Text, label_index
from edge_client.files import storage_errors
from edge_client.onnx_runtime import OnnxRuntime
from edge_client.passes import PASSES, passes_in_order
from edge_client.runtime import Scorer
from edge_client.tokens import Batch, Tokens
from fedtt.errors import BundleError, DataError
from fedtt.factor_file import decode_factors
from fedtt.layout import Theta
from fedtt.version_config import CONFIG, FACTORS, VersionConfig, decode_config
from fedtt.wire import encode_theta, version_digest

__all__ = ["Evaluation", "Model", "Prediction"]

_ROWS = 32  #: of a batch, as far as its tokens and the runtime allow
_PIECE = 1 << 17  #: numbers whose logarithms are taken at once: 1 MiB in float64
Logits = NDArray[np.float32]


class Prediction(Struct, frozen=True):
    """What the model makes of one text."""

    text: str
    label: str
    probability: float
    probabilities: dict[str, float]  #: of every label
    cut: bool = False  #: the text is longer than the graph allows, judged by its beginning


class Evaluation(Struct, frozen=True):
    """How good a model is on some examples."""

    examples: int
    loss: float  #: mean over examples, or over predicted tokens, in nats
    accuracy: float | None  #: share of right labels; None for language modelling
    cut_texts: int  #: texts longer than the graph allows, judged by their beginning


class Model:
    """A version's factors on the frozen base of its bundle."""

    def __init__(self, bundle: Bundle, theta: Theta, runtime: Scorer, tokens: Tokens | None = None) -> None:
        """tokens: of the bundle, where they are at hand; reading texts raises BundleError."""
        self.manifest = bundle.manifest
        self._theta, self._runtime, self._tokens = theta, runtime, tokens or Tokens(bundle)

    @classmethod
    def open(cls, version: Path, bundle: Path | None = None, *, threads: int = 1) -> Model:
        """Load a downloaded version; its bundle lies in `version`/bundle unless named.

        Raises BundleError or LayoutError where a file is missing, damaged or of another model.
        """
        config = _config(version)
        opened = open_bundle(bundle or version / "bundle")
        if opened.digest != config.bundle_sha256:
            raise BundleError(
                f"{version} was trained with bundle {config.bundle_sha256[:12]}…, "
                f"{opened.directory} is {opened.digest[:12]}…: name the right one with --bundle"
            )
        theta = _theta(version / FACTORS, config)
        return cls(opened, theta, OnnxRuntime(opened, threads=threads))

    def predict(self, texts: Sequence[Text]) -> list[Prediction]:
        """The labels of texts or of pairs of them. Raises DataError where the model tells none apart."""
        labels = self.manifest.labels
        if not labels:
            raise DataError("this model continues texts, it tells no labels apart: use `continuation`")
        found: list[Prediction] = []
        for batch, cuts, chunk in self._batches(list(texts)):
            probabilities = np.exp(_log_softmax(self._runtime.logits(self._theta, batch)))
            for text, cut, row in zip(chunk, cuts, probabilities, strict=True):
                best = int(row.argmax())
                scores = dict(zip(labels, map(float, row), strict=True))
                shown = text if isinstance(text, str) else " / ".join(text)
                found.append(Prediction(shown, labels[best], float(row[best]), scores, cut))
        return found

    def is_cut(self, text: str) -> bool:
        """Whether a text is longer than the graph allows, so that only its beginning counts."""
        _, (cut,) = self._tokens.rows([text])
        return cut

    def continuation(self, text: str, tokens: int = 32) -> str:
        """The text and the most likely next tokens, one after another, as far as the graph reaches."""
        batch, _ = self._tokens.batch([text])
        known = int(batch.mask.sum())
        ids = batch.ids[0, :known].tolist()
        while len(ids) < min(known + tokens, self.manifest.tokenization.max_tokens):
            logits = self._runtime.logits(self._theta, self._tokens.padded(ids))
            ids.append(int(logits[0, len(ids) - 1].argmax()))
        return self._tokens.text(ids)

    def evaluate(self, examples: Sequence[Example], go_on: Callable[[], None] = lambda: None) -> Evaluation:
        """Loss and, for a classifier, accuracy. Raises DataError for an example it cannot be judged by.

        go_on: called before each text that is read and before each batch; what it raises ends this.
        """
        labels = [label_index(e, self.manifest.labels) for e in examples] if self.manifest.labels else None
        loss, weight, right, cut_texts, start = 0.0, 0, 0, 0, 0
        for batch, cuts, chunk in self._batches([example.words for example in examples], go_on):
            go_on()
            logits = self._runtime.logits(self._theta, batch)
            if labels is None:
                nll, count = _next_token_nll(logits, batch)
            else:
                expected = np.array(labels[start : start + len(chunk)])
                nll, count = _nll(logits, expected), len(chunk)
                right += int((logits.argmax(axis=1) == expected).sum())
            loss, weight, start = loss + nll, weight + count, start + len(chunk)
            cut_texts += sum(cuts)
        return Evaluation(
            examples=len(examples),
            loss=loss / max(weight, 1),
            accuracy=None if labels is None else right / max(len(examples), 1),
            cut_texts=cut_texts,
        )

    def _batches(
        self, texts: Sequence[Text], go_on: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[Batch, list[bool], Sequence[Text]]]:
        """In their order, none with more tokens than a pass of training."""
        rows, cuts = self._tokens.rows(texts, go_on)
        limits = replace(PASSES, rows=min(_ROWS, self._runtime.rows or _ROWS))
        least = self.manifest.tokenization.min_tokens
        for part in passes_in_order([len(row) for row in rows], limits, least=least):
            yield self._tokens.padded(*rows[part]), cuts[part], texts[part]


def _config(version: Path) -> VersionConfig:
    path = version / CONFIG
    if not path.is_file():
        raise BundleError(f"{version} is not a version: it has no {CONFIG}; download it again")
    with storage_errors(path):
        return decode_config(path.read_bytes(), str(path))


def _theta(path: Path, config: VersionConfig) -> Theta:
    if not path.is_file():
        raise BundleError(f"{path} is missing: download the version again")
    with storage_errors(path):
        data = path.read_bytes()
    theta = decode_factors(data, config.adapter.layout, str(path), "download the version again")
    if version_digest(encode_theta(theta)) != config.version_sha256:
        raise BundleError(f"{path} does not match the sha256 in {CONFIG}: download the version again")
    return theta


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _nll(logits: Logits, expected: NDArray[np.int64]) -> float:
    """Sum of -log p of the expected classes; logits (N, C), expected (N,), a piece at a time."""
    rows, nll = max(1, _PIECE // logits.shape[1]), 0.0
    for start in range(0, len(expected), rows):
        part = slice(start, start + rows)
        log_p = _log_softmax(logits[part])
        nll -= float(np.take_along_axis(log_p, expected[part, None], axis=1).sum())
    return nll


def _next_token_nll(logits: Logits, batch: Batch) -> tuple[float, int]:
    """Sum of -log p of every token after the first that is no padding, and how many; logits (B, S, V)."""
    lengths = batch.mask.sum(1).tolist()  # padding comes last
    rows = zip(logits, batch.ids, lengths, strict=True)
    nll = sum(_nll(row[: n - 1], ids[1:n]) for row, ids, n in rows if n > 1)
    return nll, sum(max(0, n - 1) for n in lengths)
