"""Hashes of integers: the same bits in every process, on every machine and device.

They work on NumPy and on JAX arrays alike; constants are NumPy scalars, so that the types of
unsigned integers are kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def mix64(x: Any) -> Any:
    """Returns a bijection of uint64 whose every output bit depends on every input bit.

    The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    """
    # The increment of SplitMix64 (2^64 / golden ratio): without it 0 would stay 0.
    x = x + np.uint64(0x9E3779B97F4A7C15)
    # Each shift carries high bits down, each odd factor low bits up; products wrap at 2^64.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mix32(x: Any) -> Any:
    """Returns a bijection of uint32 whose every output bit depends on every input bit.

    The function lowbias32 that Wellons' hash prospector found.
    """
    # 32 bits, because JAX has no uint64 unless x64 is switched on.
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def multiply_shift(x: Any, multiplier: Any, bits: int) -> Any:
    """Returns the top bits of a product modulo 2^32.

    Multiply-shift hashing (Dietzfelbinger et al., Journal of Algorithms 1997): over the choice of
    the multiplier, two numbers share a hash with probability at most 2 / 2^bits.

    Args:
        x: uint32 numbers.
        multiplier: Odd uint32 number, or several that broadcast against `x`.
        bits: Number of bits of the hash, from 1 to 32.

    Returns:
        uint32 numbers in [0, 2^bits).
    """
    # The low bits of a product depend on few bits of `x`; the top ones on all.
    return (x * multiplier) >> np.uint32(32 - bits)
