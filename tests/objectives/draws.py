"""Draws over many keys, counted and compared with their log expected counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

N, TRIALS = 40, 4000
IDS = jnp.arange(N, dtype=jnp.int32)


def count(draw, size=N, trials=TRIALS):
    """How often each id is drawn in all, over `trials` keys."""
    ids = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(3), trials)))
    return np.bincount(ids.ravel()[ids.ravel() >= 0], minlength=size)


def agree(stated, observed, trials=TRIALS):
    """Log expected counts of one step with counts over `trials`: each within 5 standard deviations,
    all by chi-square."""
    mean = np.exp(np.asarray(stated, np.float64)) * trials
    assert (observed[mean == 0] == 0).all()
    z = ((observed - mean) / np.sqrt(np.maximum(mean, 1e-9)))[mean > 0]
    assert np.abs(z).max() < 5, z
    assert (z**2).sum() < z.size + 5 * np.sqrt(2 * z.size)


def disagree(stated, observed):
    with pytest.raises(AssertionError):
        agree(stated, observed)
