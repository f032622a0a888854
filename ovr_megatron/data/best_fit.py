"""Assign documents to packs by best fit: a function of their lengths alone."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

_BITS = 8  # sizes of free space share a word of 2^8 bits


class PackError(ValueError):
    """Documents that do not fit into a pack."""


class _FreeSpace:
    """Packs by their free tokens; two levels of bits find the least free space that suffices in constant time."""

    def __init__(self, pack_tokens: int) -> None:
        words = (pack_tokens >> _BITS) + 1
        self._words = [0] * words  # bit f of all words in a row: some pack has f free tokens
        self._filled = 0  # bit w: word w is not zero
        self._packs: dict[int, list[int]] = {}  # free tokens -> heap of packs

    def take(self, length: int) -> tuple[int, int] | None:
        """Remove the fullest pack with room for ``length``, of equals the first opened.

        Returns:
            Its free tokens and its index, or None if no open pack has room.
        """
        free = self._least(length)
        if free < 0:
            return None
        # A heap: of the packs of one size, the first opened comes out first.
        heap = self._packs[free]
        pack = heapq.heappop(heap)
        if not heap:
            word = free >> _BITS
            bit = 1 << (free & 255)
            self._words[word] ^= bit
            if not self._words[word]:
                self._filled ^= 1 << word
        return free, pack

    def put(self, free: int, pack: int) -> None:
        """Record that ``pack`` has ``free`` tokens of free space."""
        heap = self._packs.setdefault(free, [])
        if not heap:
            word = free >> _BITS
            bit = 1 << (free & 255)
            self._words[word] |= bit
            self._filled |= 1 << word
        heapq.heappush(heap, pack)

    def _least(self, length: int) -> int:
        """Return the least free space of a pack that is at least ``length``, or -1."""
        word = length >> _BITS
        # In the word of `length` itself, sizes below it are shifted out.
        if rest := self._words[word] >> (length & 255):
            return length + _lowest_bit(rest)
        if rest := self._filled >> (word + 1):
            word += 1 + _lowest_bit(rest)
            lowest = _lowest_bit(self._words[word])
            return (word << _BITS) + lowest
        return -1


def _lowest_bit(bits: int) -> int:
    lowest = bits & -bits
    return lowest.bit_length() - 1


def assign_packs(lengths: Sequence[int] | np.ndarray, pack_tokens: int) -> np.ndarray:
    """Give each document, in order, to the fullest pack that has room: online best fit.

    Returns:
        int32[D], the pack of each document; packs count in the order in which they were opened.

    Raises:
        PackError: a document is longer than ``pack_tokens``.
    """
    lengths = np.asarray(lengths, np.int64)
    over = np.flatnonzero(lengths > pack_tokens)
    if over.size:
        index = int(over[0])
        length = int(lengths[index])
        raise PackError(f"sample {index} has {length} tokens and does not fit into a pack of {pack_tokens}")
    free_space = _FreeSpace(pack_tokens)
    opened = 0
    assigned = np.empty(len(lengths), np.int32)
    for index, length in enumerate(lengths.tolist()):
        fit = free_space.take(length)
        if fit is None:
            fit = (pack_tokens, opened)
            opened += 1
        free, pack = fit
        assigned[index] = pack
        if free > length:
            free_space.put(free - length, pack)
    return assigned


def plan_packs(lengths: Sequence[int], pack_tokens: int) -> list[list[int]]:
    """Return `assign_packs` as the indices of each pack's documents, in the order of ``lengths``."""
    packs: list[list[int]] = []
    assigned = assign_packs(lengths, pack_tokens)
    for index, pack in enumerate(assigned.tolist()):
        # Packs count in the order in which they were opened.
        if pack == len(packs):
            packs.append([])
        packs[pack].append(index)
    return packs
