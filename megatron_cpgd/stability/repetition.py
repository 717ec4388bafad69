"""How much of a response repeats itself."""

from collections.abc import Sequence

import numpy as np

NGRAM = 16
"""Long enough that ordinary text, which restates a formula or a sentence opening, hardly counts."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def repetition_frac(tokens: Sequence[int]) -> float:
    """Share of the n-grams (n = 16) of a response that occurred earlier in it.

    0 for text that does not repeat 16 tokens, and for fewer than 17 tokens. A loop of period p that
    fills L tokens gives (L - 15 - p) / (L - 15): close to 1. N-grams are compared by a 64-bit hash.
    """
    count = len(tokens) - NGRAM + 1
    if count < 2:
        return 0.0
    words = (np.asarray(tokens, dtype=np.uint64) + np.uint64(1)) * _FACTOR
    words ^= words >> np.uint64(29)
    hashes = np.zeros(count, dtype=np.uint64)
    for i in range(NGRAM):  # a polynomial in an odd factor, modulo 2^64
        hashes = hashes * _FACTOR + words[i : i + count]
    return 1 - len(np.unique(hashes)) / count
