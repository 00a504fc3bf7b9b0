"""The order of a shuffled pass, computed for the examples of one batch alone.

It is that of `grain.MapDataset.shuffle`: a block cipher over the numbers of the examples, after
Simon (Beaulieu et al., 2013, eprint.iacr.org/2013/404). No permutation is kept, however many
examples there are. Grain computes one number a call, in 5 microseconds, which is longer than to
read the example; here those of a batch are computed together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

# As Grain calls its own function.
_ROUNDS = 4
# Smaller blocks leave patterns.
_SMALLEST_BLOCK = 16
# Most examples whose whole order is kept.
_FEW = 2**14
_WORD = 2**32


def shuffled(positions: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Returns the numbers of the examples that stand at some positions of a pass.

    Args:
        positions: Positions int [B], each in [0, count).
        count: Number of examples in the pass.
        seed: Seed of the pass, in [0, 2^32).

    Returns:
        int64 [B]. All positions together give every number of [0, count) once.
    """
    if count <= _FEW:
        return _few_shuffled(count, seed)[positions]
    # Where the largest number is a power of two, Grain's block is one bit too small for it.
    num_bits = max(_SMALLEST_BLOCK, (count - 1).bit_length())
    word_bits = (num_bits + 1) // 2
    keys = round_keys(seed)
    return _walk(np.asarray(positions), count, lambda x: encrypt(x, keys, word_bits))


@functools.lru_cache(maxsize=4)
def _few_shuffled(count: int, seed: int) -> np.ndarray:
    """Returns the examples of a whole pass over few of them, int64 [count]."""
    # Of few examples the walks are long: each step of theirs is looked up.
    blocks = np.arange(2**_SMALLEST_BLOCK)
    table = encrypt(blocks, round_keys(seed), _SMALLEST_BLOCK // 2)
    return _walk(np.arange(count), count, lambda x: table[x])


def _walk(
    positions: np.ndarray, count: int, permute: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Returns positions permuted until they are below `count`, int64 [B].

    As every walk begins below `count`, no two end in one place.
    """
    numbers = permute(positions)
    outside = np.flatnonzero(numbers >= count)
    while len(outside):
        numbers[outside] = permute(numbers[outside])
        outside = outside[numbers[outside] >= count]
    return numbers


def encrypt(blocks: np.ndarray, keys: list[int], word_bits: int) -> np.ndarray:
    """Returns blocks of two words each, permuted: int64 [B].

    Args:
        blocks: Blocks int [B], below 2^(2 word_bits).
        keys: A key for each round, an even number of them.
        word_bits: Bits of a word, from 8 to 32.
    """
    bits = np.uint64(word_bits)
    mask = np.uint64(2**word_bits - 1)

    def rotate(words: np.ndarray, by: int) -> np.ndarray:
        left = words << np.uint64(by)
        right = words >> np.uint64(word_bits - by)
        return (left | right) & mask

    def mix(words: np.ndarray) -> np.ndarray:
        return rotate(words, 1) & rotate(words, 8) ^ rotate(words, 2)

    unsigned = blocks.astype(np.uint64)
    high = unsigned >> bits
    low = unsigned & mask
    for first, second in zip(keys[::2], keys[1::2]):
        high = high ^ mix(low) ^ (np.uint64(first) & mask)
        low = low ^ mix(high) ^ (np.uint64(second) & mask)
    return ((high << bits) | low).astype(np.int64)


def round_keys(seed: int) -> list[int]:
    """Returns the keys of the rounds: the four words that `std::seed_seq{seed}` of C++ generates.

    Source: ISO/IEC 14882, [rand.util.seedseq].

    Args:
        seed: Seed in [0, 2^32).
    """
    count = _ROUNDS
    words = [0x8B8B8B8B] * count
    # The length of the seed, then its one word, beside the number of the step.
    given = [1, 1 + seed, 2, 3]
    for k in range(count):
        near = (k + 1) % count
        far = (k + 2) % count
        mixed = 1664525 * _fold(words[k] ^ words[near] ^ words[k - 1])
        added = mixed + given[k]
        words[near] = (words[near] + mixed) % _WORD
        words[far] = (words[far] + added) % _WORD
        words[k] = added % _WORD
    for k in range(count):
        near = (k + 1) % count
        far = (k + 2) % count
        mixed = 1566083941 * _fold((words[k] + words[near] + words[k - 1]) % _WORD)
        words[near] ^= mixed % _WORD
        words[far] ^= (mixed - k) % _WORD
        words[k] = (mixed - k) % _WORD
    return words


def _fold(word: int) -> int:
    return word ^ word >> 27
