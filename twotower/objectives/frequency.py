"""How often an id is drawn. The counts are arrays of the train state, so a resumed run corrects as before."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def log_expected_count(
    counts: Float[Array, "N"], rows: Float[Array, ""], ids: Int[Array, "B"], batch_size: int
) -> Float[Array, "B"]:
    """Log of the expected number of times an id stands in a batch of uniformly drawn training rows.

    log(batch_size * count / rows), in logs so that nothing is floored; an id that training never saw has one pseudo-count.

    Args:
        counts: training rows of each id.
        rows: training rows in all; kept beside the counts, since summing them would cost N at every step.
        ids: whose expectation to give; within [0, N).
        batch_size: rows drawn.
    """
    return jnp.log(jnp.maximum(counts[ids], 1.0)) - jnp.log(rows) + jnp.log(float(batch_size))
