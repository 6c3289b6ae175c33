"""Text to token ids, as the bundle's graphs take them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_client.bundle import Bundle
from edge_client.examples import Text
from fedtt.errors import BundleError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Batch", "Ids", "KeptTokens", "RememberedTokens", "Tokens"]

_LIMIT_BYTES = 64 << 20  #: of a tokenizer's file; those with 250,000 words have 17 MB
_KEPT = 2  #: ways of reading the texts of one bundle: as its task cuts them, and as judging does
_DEVICE_TOKENS = 200_000  #: remembered of each, with their texts some 2 MB

Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Input of a graph: B texts, padded to the longest of them, S tokens."""

    ids: Ids  #: (B, S)
    mask: Ids  #: (B, S), 1 where a token stands and 0 where padding does
    labels: Ids | None = None  #: (B,) indices of labels, for classification


class Tokens:
    """The bundle's tokenizer. Texts longer than the graph allows are cut at its last position.

    It is read when first needed, and whatever needs it raises BundleError where that cannot be done.
    """

    def __init__(self, bundle: Bundle, max_tokens: int | None = None) -> None:
        spec = bundle.manifest.tokenization
        self._path = bundle.path(spec.file)
        self._limit = min(max_tokens or spec.max_tokens, spec.max_tokens)
        self._pad_id, self._least = spec.pad_id, spec.min_tokens
        self._tokenizer: Tokenizer | None = None

    def batch(self, texts: Sequence[Text], labels: Sequence[int] | None = None) -> tuple[Batch, int]:
        """A batch, and how many of its texts were cut."""
        rows, cut = self.rows(texts)
        return self.padded(*rows, labels=labels), sum(cut)

    def rows(self, texts: Sequence[Text]) -> tuple[list[list[int]], list[bool]]:
        """The token ids of each text or pair of texts, and whether it was cut: of a pair the longer first."""
        pairs = [(text, None) if isinstance(text, str) else text for text in texts]
        found = [self._read().encode(text, pair) for text, pair in pairs]
        return [encoding.ids for encoding in found], [bool(encoding.overflowing) for encoding in found]

    def know(self, texts: Sequence[Text]) -> bool:
        """Whether no tokenizer has to be read for them."""
        return self._tokenizer is not None

    def padded(self, *rows: Sequence[int] | NDArray[np.int32], labels: Sequence[int] | None = None) -> Batch:
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
        return str(self._read().decode(list(ids)))

    def _read(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = _tokenizer(self._path, self._limit)
        return self._tokenizer


class RememberedTokens(Tokens):
    """Gives what `Tokens` gives, and reads each text once as long as it is remembered.

    limit: tokens remembered, 4 bytes each; what was read longest ago is forgotten first.
    keeps: its tokenizer; else that is in memory only while new texts are read. Threads may share it.
    """

    def __init__(
        self, bundle: Bundle, max_tokens: int | None = None, *, limit: int = 20_000_000, keeps: bool = True
    ) -> None:
        super().__init__(bundle, max_tokens)
        self._limit_tokens, self._held_tokens, self._keeps = limit, 0, keeps
        self._held: OrderedDict[Text, tuple[NDArray[np.int32], bool]] = OrderedDict()
        self._guard = threading.Lock()

    def know(self, texts: Sequence[Text]) -> bool:
        return super().know(texts) or all(text in self._held for text in texts)

    def rows(self, texts: Sequence[Text]) -> tuple[list[list[int]], list[bool]]:
        with self._guard:
            try:
                return self._rows(texts)
            finally:
                if not self._keeps:
                    self._tokenizer = None

    def _rows(self, texts: Sequence[Text]) -> tuple[list[list[int]], list[bool]]:
        new = [text for text in dict.fromkeys(texts) if text not in self._held]
        found = dict(zip(new, zip(*super().rows(new), strict=True), strict=True)) if new else {}
        rows: list[list[int]] = []
        cuts: list[bool] = []
        for text in texts:
            if text in found:
                ids, cut = found[text]
            else:
                self._held.move_to_end(text)
                held, cut = self._held[text]
                ids = held.tolist()
            rows.append(ids)
            cuts.append(cut)
        for text, (ids, cut) in found.items():
            self._keep(text, ids, cut)
        return rows, cuts

    def _keep(self, text: Text, ids: list[int], cut: bool) -> None:
        self._held[text] = (np.array(ids, np.int32), cut)
        self._held_tokens += len(ids)
        while self._held_tokens > self._limit_tokens:
            _, (oldest, _) = self._held.popitem(last=False)
            self._held_tokens -= len(oldest)


class KeptTokens:
    """What a process remembers of the texts of the bundle that it opened last; its tokenizers never stay."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int | None], RememberedTokens] = {}  #: by bundle and limit, as last used
        self._guard = threading.Lock()

    def open(self, bundle: Bundle, max_tokens: int | None = None) -> RememberedTokens:
        key = bundle.digest, max_tokens
        with self._guard:
            tokens = self._kept.pop(key, None)
            if tokens is None:
                older = [k for k in self._kept if k[0] == bundle.digest][-(_KEPT - 1) :]
                self._kept = {k: self._kept[k] for k in older}
                tokens = RememberedTokens(bundle, max_tokens, limit=_DEVICE_TOKENS, keeps=False)
            self._kept[key] = tokens
            return tokens


def _tokenizer(path: Path, limit: int) -> Tokenizer:
    """Of a file, cutting at so many tokens; BundleError where it is none."""
    from tokenizers import Tokenizer  # kept out of the cold start

    if path.is_file() and (size := path.stat().st_size) > _LIMIT_BYTES:
        raise BundleError(f"{path} has {size} bytes, a tokenizer has at most {_LIMIT_BYTES}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise BundleError(f"{path} is not a tokenizer this program can read ({error})") from None
    tokenizer.no_padding()
    tokenizer.enable_truncation(limit)
    return tokenizer
