"""An adaptive binary range coder: decisions as bytes, near their entropy, in integers alone.

G. N. N. Martin. "Range encoding: an algorithm for removing redundancy from a digitised message". 1979; the
carry as in LZMA (I. Pavlov). Each context has its own chance of a zero, p of 2^16, and counts its decisions
up to five: the n-th moves p by 2^-min(n+1, 5) of the way, fast at first, and never past 32 from either end.
All is unsigned and below 2^33, so that a browser's numbers hold it too.

    low, range      the interval that is left, of 2^32; range stays at least 2^24
    zero            takes the first (range >> 16) · p of it, one the rest; a raw bit halves it
    end             the number in the interval with the most zero bits at its end, less trailing zero bytes;
                    past its end a stream reads as zeros
"""

from __future__ import annotations

from fedtt.errors import WireError

__all__ = ["Decoder", "Encoder"]

_FULL, _LEAST = 0xFFFFFFFF, 1 << 24
_ONE, _EDGE, _SLOWEST = 1 << 16, 32, 5


class _Contexts:
    """p of a zero of each context, and how far it has come."""

    def __init__(self, contexts: int) -> None:
        self._zero = [_ONE >> 1] * contexts
        self._shift = [1] * contexts

    def _learn(self, context: int, bit: int) -> None:
        p, shift = self._zero[context], self._shift[context]
        if bit:
            self._zero[context] = p - ((p - _EDGE) >> shift)
        else:
            self._zero[context] = p + ((_ONE - _EDGE - p) >> shift)
        if shift < _SLOWEST:
            self._shift[context] = shift + 1


class Encoder(_Contexts):
    """Decisions in, bytes out."""

    def __init__(self, contexts: int) -> None:
        super().__init__(contexts)
        self._low, self._range, self._out = 0, _FULL, bytearray()

    def bit(self, context: int, bit: int) -> None:
        """One decision, by what its context has learnt."""
        bound = (self._range >> 16) * self._zero[context]
        if bit:
            self._low += bound
            self._range -= bound
        else:
            self._range = bound
        self._learn(context, bit)
        self._shift_out()

    def raw(self, value: int, bits: int) -> None:
        """`bits` even decisions, the highest first."""
        for at in reversed(range(bits)):
            self._range >>= 1
            if value >> at & 1:
                self._low += self._range
            self._shift_out()

    def finish(self) -> bytes:
        top = self._low + self._range
        end = next(v for k in range(32, -1, -1) if (v := -(-self._low >> k) << k) < top)
        self._low = end
        for _ in range(4):
            self._byte_out()
        return bytes(self._out).rstrip(b"\0")

    def _shift_out(self) -> None:
        while self._range < _LEAST:
            self._byte_out()
            self._range = self._range << 8 & _FULL

    def _byte_out(self) -> None:
        """The highest byte of `low`; a carry past it goes into those already out."""
        if self._low > _FULL:
            at = len(self._out) - 1
            while self._out[at] == 0xFF:
                self._out[at] = 0
                at -= 1
            self._out[at] += 1
        self._out.append(self._low >> 24 & 0xFF)
        self._low = self._low << 8 & _FULL


class Decoder(_Contexts):
    """The same decisions again; any bytes give some."""

    def __init__(self, data: bytes, contexts: int) -> None:
        super().__init__(contexts)
        self._data, self._at, self._range = data, 4, _FULL
        self._offset = int.from_bytes(data[:4].ljust(4, b"\0"), "big")

    def bit(self, context: int) -> int:
        bound = (self._range >> 16) * self._zero[context]
        bit = int(self._offset >= bound)
        if bit:
            self._offset -= bound
            self._range -= bound
        else:
            self._range = bound
        self._learn(context, bit)
        self._shift_in()
        return bit

    def raw(self, bits: int) -> int:
        value = 0
        for _ in range(bits):
            self._range >>= 1
            bit = int(self._offset >= self._range)
            self._offset -= bit * self._range
            value = value << 1 | bit
            self._shift_in()
        return value

    def finish(self) -> None:
        """Raise WireError for bytes that no decision came from, or that end in a zero."""
        if len(self._data) > self._at or self._data.endswith(b"\0"):
            raise WireError("the coded payload goes on past its end")

    def _shift_in(self) -> None:
        while self._range < _LEAST:
            byte = self._data[self._at] if self._at < len(self._data) else 0
            self._offset = (self._offset << 8 | byte) & _FULL
            self._range = self._range << 8 & _FULL
            self._at += 1
