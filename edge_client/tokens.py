"""Text to token ids, as the bundle's graphs take them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_client.bundle import Bundle
from edge_client.examples import Text
from fedtt.errors import BundleError

__all__ = ["Batch", "Ids", "KeptTokens", "Tokens"]

_LIMIT_BYTES = 64 << 20  #: of a tokenizer's file; those with 250,000 words have 17 MB
_KEPT = 2  #: tokenizers of one bundle: as its task cuts texts, and as judging does

Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Input of a graph: B texts, padded to the longest of them, S tokens."""

    ids: Ids  #: (B, S)
    mask: Ids  #: (B, S), 1 where a token stands and 0 where padding does
    labels: Ids | None = None  #: (B,) indices of labels, for classification


class Tokens:
    """The bundle's tokenizer. Texts longer than the graph allows are cut at its last position."""

    def __init__(self, bundle: Bundle, max_tokens: int | None = None) -> None:
        from tokenizers import Tokenizer  # kept out of the cold start

        spec = bundle.manifest.tokenization
        path = bundle.path(spec.file)
        if path.is_file() and (size := path.stat().st_size) > _LIMIT_BYTES:
            raise BundleError(f"{path} has {size} bytes, a tokenizer has at most {_LIMIT_BYTES}")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise BundleError(f"{path} is not a tokenizer this program can read ({error})") from None
        self._limit = min(max_tokens or spec.max_tokens, spec.max_tokens)
        self._pad_id, self._least = spec.pad_id, spec.min_tokens
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self._limit)

    def batch(self, texts: Sequence[Text], labels: Sequence[int] | None = None) -> tuple[Batch, int]:
        """A batch, and how many of its texts were cut."""
        rows, cut = self.rows(texts)
        return self.padded(*rows, labels=labels), sum(cut)

    def rows(self, texts: Sequence[Text]) -> tuple[list[list[int]], list[bool]]:
        """The token ids of each text or pair of texts, and whether it was cut: of a pair the longer first."""
        pairs = [(text, None) if isinstance(text, str) else text for text in texts]
        found = [self._tokenizer.encode(text, pair) for text, pair in pairs]
        return [encoding.ids for encoding in found], [bool(encoding.overflowing) for encoding in found]

    def padded(self, *rows: Sequence[int], labels: Sequence[int] | None = None) -> Batch:
        """A batch of token ids as they are, padded to the longest row and to what the graph needs."""
        width = max(self._least, *map(len, rows))
        ids = np.full((len(rows), width), self._pad_id, np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row
            mask[number, : len(row)] = 1
        return Batch(ids=ids, mask=mask, labels=None if labels is None else np.array(labels, np.int64))

    def text(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self._tokenizer.decode(list(ids)))


class KeptTokens:
    """The tokenizers of the bundle that a process opened last: reading one holds all its threads up."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int | None], Tokens] = {}  #: by bundle and limit, as last used
        self._guard = threading.Lock()

    def open(self, bundle: Bundle, max_tokens: int | None = None) -> Tokens:
        """Raises BundleError, as `Tokens` does."""
        key = bundle.digest, max_tokens
        with self._guard:
            tokens = self._kept.pop(key, None)
            if tokens is None:
                older = [k for k in self._kept if k[0] == bundle.digest][-(_KEPT - 1) :]
                self._kept = {k: self._kept[k] for k in older}  # memory goes before the next is loaded
                tokens = Tokens(bundle, max_tokens)
            self._kept[key] = tokens
            return tokens
