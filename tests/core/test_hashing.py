"""Hashes of integers have the same bits on the host and on a device; they spread what they hash."""

import jax
import jax.numpy as jnp
import numpy as np

from twotower.core.arrays import mix32, mix64, multiply_shift

NUMBERS = np.array([0, 1, 2, 2**31, 2**32 - 1], np.uint32)


def mix32_by_python(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def test_mix64_is_the_finaliser_of_splitmix64():
    # The first number that SplitMix64 draws from seed 0.
    assert mix64(np.array([0], np.uint64)).tolist() == [0xE220A8397B1DCDAF]


def test_mix32_has_the_same_bits_everywhere():
    expected = [mix32_by_python(int(x)) for x in NUMBERS]
    assert mix32(NUMBERS).tolist() == expected
    assert jax.jit(mix32)(jnp.asarray(NUMBERS)).tolist() == expected


def test_multiply_shift_has_the_same_bits_everywhere():
    multiplier = np.uint32(2654435769)
    expected = [int(x) * int(multiplier) % 2**32 >> 22 for x in NUMBERS]
    assert multiply_shift(NUMBERS, multiplier, 10).tolist() == expected
    on_device = jax.jit(lambda x: multiply_shift(x, jnp.uint32(multiplier), 10))
    assert on_device(jnp.asarray(NUMBERS)).tolist() == expected
