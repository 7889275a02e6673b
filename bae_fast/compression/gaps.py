"""Ascending places as the gaps between them, range coded.

A gap g is two symbols, g >> s and g mod 2^s, which are independent where g is geometric; the last
symbol of the first alphabet means "that many more, and go on". Nothing of the rate is lost to
either.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

# probabilities are shares of 2^32
ONE = 1 << 32

# symbols of the first alphabet; at most 2^12 of the second
_HIGH = 1024
_MOST_SHIFT = 12


def constriction_stream() -> Any:
    """The module of stream coders of ``constriction``.

    Raises:
        ImportError: it is not installed; the extra is named.
    """
    try:
        import constriction
    except ImportError as error:
        raise ImportError(
            f"compression needs constriction: pip install 'bae-fast[compress]' ({error})"
        ) from error
    return constriction.stream


def categorical(weights: np.ndarray) -> Any:
    return constriction_stream().model.Categorical(weights, perfect=False, lazy=False)


def _table(weights: list[int]) -> Any:
    # whole numbers below 2^53: float64 holds them as they are
    return categorical(np.array([weight >> 44 for weight in weights], dtype=np.float64))


class Gaps:
    """Gaps between ones of independent bits, each a one with probability flips / 2^32."""

    def __init__(self, flips: int) -> None:
        self.flips = flips
        self.shift = min(max((ONE // flips).bit_length() - 7, 0), _MOST_SHIFT)
        # powers of the probability of a zero, 96 bits after the point, each product cut
        unit = 1 << 96
        zero = (ONE - flips) << 64
        run = zero
        low = [unit]
        for _ in range(1, 1 << self.shift):
            low.append(low[-1] * zero >> 96)
        for _ in range(self.shift):
            run = run * run >> 96
        tail = [unit]
        for _ in range(_HIGH - 1):
            tail.append(tail[-1] * run >> 96)
        high = [left - right for left, right in itertools.pairwise(tail)]
        self.high = _table([*high, tail[-1]])
        self.low = _table(low) if self.shift else None

    def most_symbols(self, n_bits: int) -> int:
        """Symbols "go on" that a sequence of so many bits can have."""
        return n_bits // (_HIGH - 1 << self.shift)

    def encode(self, encoder: Any, gaps: np.ndarray) -> int:
        """Feed int64 gaps; returns the symbols of the first alphabet."""
        high = gaps >> self.shift
        if len(high) and int(high.max()) >= _HIGH - 1:
            more = high // (_HIGH - 1)
            ends = np.cumsum(more + 1) - 1
            symbols = np.full(int(ends[-1]) + 1, _HIGH - 1, dtype=np.int32)
            symbols[ends] = high - more * (_HIGH - 1)
        else:
            symbols = high.astype(np.int32)
        encoder.encode(symbols, self.high)
        if self.low is not None:
            encoder.encode((gaps & ((1 << self.shift) - 1)).astype(np.int32), self.low)
        return len(symbols)

    def decode(self, decoder: Any, n_symbols: int) -> np.ndarray:
        """Inverse of :meth:`encode`; ValueError where the symbols end on "go on"."""
        symbols = decoder.decode(self.high, n_symbols)
        gaps = symbols.astype(np.int64)
        if n_symbols and int(symbols.max()) == _HIGH - 1:
            ends = np.flatnonzero(symbols != _HIGH - 1)
            if not len(ends) or ends[-1] != n_symbols - 1:
                raise ValueError("a gap has no end")
            gaps = gaps[ends] + (np.diff(ends, prepend=-1) - 1) * (_HIGH - 1)
        gaps <<= self.shift
        if self.low is not None:
            gaps += decoder.decode(self.low, len(gaps))
        return gaps


def encode_places(
    gaps: list[Gaps], places: np.ndarray, ends: np.ndarray, expected: list[int]
) -> bytes:
    """Numbers of symbols and the coder's words of ascending places, classes after one another.

    Args:
        places: int64, the places of differences.
        ends: where each class ends.
        expected: what is taken off each class's number of symbols.
    """
    cuts = np.concatenate([[0], np.searchsorted(places, ends)])
    between = np.diff(places, prepend=-1) - 1
    encoder = constriction_stream().queue.RangeEncoder()
    numbers = bytearray()
    for c, less in enumerate(expected):
        part = between[cuts[c] : cuts[c + 1]]
        if c and len(part):  # its first gap begins with the class
            part[0] = places[cuts[c]] - ends[c - 1]
        _append_number(numbers, gaps[c].encode(encoder, part) - less)
    return bytes(numbers) + encoder.get_compressed().astype("<u4").tobytes()


def decode_places(
    gaps: list[Gaps], data: bytes, expected: list[int], lengths: list[int]
) -> list[np.ndarray]:
    """Inverse of :func:`encode_places`: the places of each class, counted from its begin.

    Args:
        lengths: the most bits that each class can have.

    Raises:
        ValueError: data that it did not make.
    """
    numbers, at = [], 0
    for less in expected:
        number, at = _read_number(data, at)
        numbers.append(number + less)
    # a symbol takes a bit or more, as p is at most 1/2, but for those that go on
    most = 10 * (len(data) - at)
    goes_on = [one.most_symbols(length) for one, length in zip(gaps, lengths, strict=True)]
    fits = all(0 <= n <= length for n, length in zip(numbers, lengths, strict=True))
    if (len(data) - at) % 4 or not fits or sum(numbers) > most + sum(goes_on):
        raise ValueError("numbers of symbols out of range")
    stream = np.frombuffer(data, dtype="<u4", offset=at).astype(np.uint32)
    decoder = constriction_stream().queue.RangeDecoder(stream)
    return [
        np.cumsum(one.decode(decoder, number) + 1) - 1
        for one, number in zip(gaps, numbers, strict=True)
    ]


def _append_number(out: bytearray, value: int) -> None:
    """A signed number, small ones short: zigzag, seven bits a byte."""
    value = value << 1 if value >= 0 else (-value << 1) - 1
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)


def _read_number(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("numbers of symbols are cut off")
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return (value >> 1) ^ -(value & 1), at
