"""Text to token ids, as the bundle's graphs take them."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_client.bundle import Bundle, check_there, reading
from edge_client.examples import Text
from fedtt.errors import BundleError, FedttError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Batch", "Ids", "KeptTokens", "RememberedTokens", "Tokens"]

_LIMIT_BYTES = 64 << 20  #: of a tokenizer's file; those with 250,000 words have 17 MB
_KEPT = 2  #: ways of reading the texts of one bundle: as its task cuts them, and as judging does
_DEVICE_TOKENS = 500_000  #: remembered of each: 2 MB
_PANIC = "pyo3_runtime"  #: where PanicException is, which nothing can be imported from
_TEXT_TOKENS = 50  #: as which each text counts beside its own: 200 bytes that Python takes to hold it

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

    def rows(
        self, texts: Sequence[Text], go_on: Callable[[], None] = lambda: None
    ) -> tuple[list[list[int]], list[bool]]:
        """The token ids of each text or pair of texts, and whether it was cut: of a pair the longer first.

        go_on: called before each that is read; what it raises ends this.
        """
        rows: list[list[int]] = []
        cuts: list[bool] = []
        for text in texts:
            go_on()
            first, second = (text, None) if isinstance(text, str) else text
            with _of_tokenizer(self._path):
                encoding = self._read().encode(first, second)
            if len(encoding.ids) > self._limit:  # it cuts nothing where its special tokens alone are as many
                raise BundleError(
                    f"{self._path} makes {len(encoding.ids)} tokens of a text, {self._limit} are allowed: "
                    "is the task's max_tokens too small for its special tokens?"
                )
            rows.append(encoding.ids)
            cuts.append(bool(encoding.overflowing))
        return rows, cuts

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
        with _of_tokenizer(self._path):
            return str(self._read().decode(list(ids)))

    def _read(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = _tokenizer(self._path, self._limit)
        return self._tokenizer


class RememberedTokens(Tokens):
    """Gives what `Tokens` gives, and reads each text once as long as it is remembered, by a digest.

    limit: of tokens remembered, at 4 bytes each, where a text counts as `_TEXT_TOKENS` more; what was read
    longest ago is forgotten first.
    keeps: its tokenizer; else that is in memory only while new texts are read. Threads may share it.
    """

    def __init__(
        self, bundle: Bundle, max_tokens: int | None = None, *, limit: int = 20_000_000, keeps: bool = True
    ) -> None:
        super().__init__(bundle, max_tokens)
        self._limit_tokens, self._held_tokens, self._keeps = limit, 0, keeps
        self._held: OrderedDict[bytes, tuple[bytes, bool]] = OrderedDict()  #: ids in int32, whether cut
        self._guard = threading.Lock()

    def know(self, texts: Sequence[Text]) -> bool:
        with self._guard:
            return super().know(texts) or all(_digest(text) in self._held for text in texts)

    def read(self) -> None:
        """Read the tokenizer now, where it is kept."""
        if self._keeps:
            with self._guard:
                self._read()

    def text(self, ids: Sequence[int]) -> str:
        with self._reading():
            return super().text(ids)

    def rows(
        self, texts: Sequence[Text], go_on: Callable[[], None] = lambda: None
    ) -> tuple[list[list[int]], list[bool]]:
        with self._reading():
            keys = [_digest(text) for text in texts]
            new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._held}
            read = zip(*super().rows(list(new.values()), go_on), strict=True)
            found = dict(zip(new, read, strict=True))
            pairs = [found[key] if key in found else self._again(key) for key in keys]
            for key, (ids, cut) in found.items():
                self._keep(key, ids, cut)
        return [ids for ids, _ in pairs], [cut for _, cut in pairs]

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Nobody else reads meanwhile, and afterwards the tokenizer goes unless it is kept."""
        with self._guard:
            try:
                yield
            finally:
                if not self._keeps:
                    self._tokenizer = None

    def _again(self, key: bytes) -> tuple[list[int], bool]:
        self._held.move_to_end(key)
        ids, cut = self._held[key]
        return np.frombuffer(ids, np.int32).tolist(), cut

    def _keep(self, key: bytes, ids: list[int], cut: bool) -> None:
        self._held[key] = (np.array(ids, np.int32).tobytes(), cut)
        self._held_tokens += len(ids) + _TEXT_TOKENS
        while self._held_tokens > self._limit_tokens:
            _, (oldest, _) = self._held.popitem(last=False)
            self._held_tokens -= len(oldest) // 4 + _TEXT_TOKENS


class KeptTokens:
    """What a process remembers of the texts of the bundle that it opened last.

    keeps: its tokenizers too, one for each length at which tasks cut their texts, and one for judging.
    """

    def __init__(self, *, keeps: bool = False) -> None:
        self._kept: dict[tuple[str, int | None], RememberedTokens] = {}  #: by bundle and limit, as last used
        self.keeps, self._guard = keeps, threading.Lock()

    def open(self, bundle: Bundle, max_tokens: int | None = None) -> RememberedTokens:
        key = bundle.digest, max_tokens
        with self._guard:
            tokens = self._kept.pop(key, None)
            if tokens is None:
                older = [k for k in self._kept if k[0] == bundle.digest][-(_KEPT - 1) :]
                self._kept = {k: self._kept[k] for k in older}
                tokens = RememberedTokens(bundle, max_tokens, limit=_DEVICE_TOKENS, keeps=self.keeps)
            self._kept[key] = tokens
            return tokens


def _digest(text: Text) -> bytes:
    """16 bytes that no other text or pair of texts has."""
    parts = (text,) if isinstance(text, str) else text
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        found.update(len(data).to_bytes(8, "little") + data)
    return found.digest()


def _tokenizer(path: Path, limit: int) -> Tokenizer:
    """Of a file, cutting at so many tokens; BundleError where it is none, UnavailableError where it cannot
    be read now.
    """
    from tokenizers import Tokenizer  # kept out of the cold start

    with reading(path):
        size = path.stat().st_size
    if size > _LIMIT_BYTES:
        raise BundleError(f"{path} has {size} bytes, a tokenizer has at most {_LIMIT_BYTES}")
    try:
        with _of_tokenizer(path):
            tokenizer = Tokenizer.from_file(str(path))
            tokenizer.no_padding()
            tokenizer.enable_truncation(limit)
    except BundleError:
        check_there(path)
        raise
    return tokenizer


@contextmanager
def _of_tokenizer(path: Path) -> Iterator[None]:
    """What the library raises, a panic in its Rust with it, as a BundleError: a file of the bundle made it.

    Of what is no Exception a panic alone; asking a program to end goes on.
    """
    try:
        yield
    except FedttError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != _PANIC:
            raise
        why = " ".join(str(error).split())[:300]
        raise BundleError(f"{path} is not a tokenizer this program can read ({why})") from None
