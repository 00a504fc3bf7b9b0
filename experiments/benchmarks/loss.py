"""What does it cost to compare every query with every candidate? The streaming loss against the
naive one.

    python -m experiments.benchmarks.loss [--quick] [--json=FILE]

First the two in float64, for every loss, with every mask, correction and margin and with hard
negatives: they must be equal. Then value and gradient (by queries, items and temperature) of the
in-batch softmax, D = 64, with the logQ correction and accidental hits masked, in turns:

    naive            the [B, B] logits as one writes them, with optax's cross-entropy
    reference        `twotower.kernels.reference.naive_loss`, which also holds them
    streaming        `streaming_loss`
    naive, bf16      the naive form with the operands of its products in bfloat16
    streaming, bf16  `streaming_loss` likewise; sums are float32 in all of them

At 65,536 the streaming loss is alone: one buffer of the others would be 17 GB. Pinned to one core
(`taskset -c 1`) the ratios are steadier. Bfloat16 gains only on processors that multiply it (AMX or
AVX512-BF16 on x86).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app

from experiments.benchmarks import harness
from twotower.config import ObjectiveConfig
from twotower.kernels.reference import naive_loss
from twotower.objectives import LOSSES, streaming_loss
from twotower.objectives.negatives import Candidates, HardNegatives, Positives

_WIDTH = 64
_SIZES, _QUICK_SIZES = (1024, 4096, 16_384, 65_536), (1024, 4096)
_LARGEST_NAIVE = 16_384


def main(argv: list[str]) -> None:
    harness.steady_allocator()
    quick = harness.QUICK.value
    with jax.enable_x64(True):
        worst = {name: _difference(name, 100 if quick else 500) for name in LOSSES}
    print(
        "float64, everything on, largest relative difference of a value or gradient between reference and streaming:"
    )
    print("  " + ", ".join(f"{name} {difference:.0e}" for name, difference in worst.items()))
    times: dict[str, list[float]] = {}
    print(
        f"{'B':>8}  {'form':16}{'ms':>10}{'examples/s':>14}{'temporary MB':>14}{'naive/form':>12}"
    )
    half = functools.partial(functools.partial, dtype=jnp.bfloat16)
    streaming = {"streaming": streaming_loss, "streaming, bf16": half(streaming_loss)}
    for size in _QUICK_SIZES if quick else _SIZES:
        forms = (
            {"naive": _naive, "reference": naive_loss, "naive, bf16": half(_naive)}
            if size <= _LARGEST_NAIVE
            else {}
        )
        calls = {name: _compiled(form, size) for name, form in (forms | streaming).items()}
        # Several calls a turn: the pages that a form gives back are taken from the time of the call
        # that follows.
        rounds, repeats = (10 if size <= 4096 else 2, max(4, 8192 // size)) if forms else (1, 1)
        found = harness.alternate(
            {name: call for name, (call, _) in calls.items()}, rounds=rounds, repeats=repeats
        )
        for name, ms in found.items():
            ratio = min(found["naive"]) / min(ms) if "naive" in found else float("nan")
            megabytes = calls[name][1] / 1e6
            print(
                f"{size:8,}  {name:16}{min(ms):10.1f}{size / min(ms) * 1e3:14,.0f}{megabytes:14.1f}{ratio:12.2f}"
            )
        times |= {f"{name} {size:,}": ms for name, ms in found.items()}
    harness.report("loss", times, unit="ms for value and gradient", base=next(iter(times)))


def _naive(
    queries: jax.Array,
    positives: Positives,
    items: jax.Array,
    candidates: Candidates,
    *,
    scale: jax.Array,
    weights: jax.Array,
    dtype: Any = jnp.float32,
    **_: Any,
) -> jax.Array:
    """The in-batch softmax as one writes it; each query's positive is the candidate of its own
    place."""
    places = jnp.arange(len(queries))
    scores = jnp.matmul(
        queries.astype(dtype), items.T.astype(dtype), preferred_element_type=jnp.float32
    )
    logits = scores * scale - candidates.log_expected_count[None, :]
    hits = (candidates.ids[None, :] == positives.ids[:, None]) & (
        places[None, :] != places[:, None]
    )
    return jnp.sum(
        weights
        * optax.softmax_cross_entropy_with_integer_labels(jnp.where(hits, -jnp.inf, logits), places)
    )


def _compiled(form: Callable, size: int) -> tuple[Callable[[], None], int]:
    """Value and gradient as a function of nothing, and the bytes of temporaries that it
    allocates."""
    arrays, known = _arrays(size, size, jnp.float32)

    def loss(trained: dict, known: dict) -> jax.Array:
        ids, log_count = known["ids"], known["log_count"]
        return form(
            trained["queries"],
            Positives(trained["items"], ids, log_count),
            trained["items"],
            Candidates(ids, known["owners"], log_count),
            loss=LOSSES["softmax"],
            weights=known["weights"],
            scale=1 / trained["temperature"],
            owners=known["owners"],
            mask_same_user=False,
        )

    compiled = jax.jit(jax.value_and_grad(loss)).lower(arrays, known).compile()

    def call() -> None:
        jax.block_until_ready(compiled(arrays, known))

    return call, compiled.memory_analysis().temp_size_in_bytes


def _arrays(size: int, num_items: int, dtype: Any) -> tuple[dict, dict]:
    rng = np.random.default_rng(0)
    real = lambda *shape: jnp.asarray(rng.normal(size=shape) / _WIDTH**0.5, dtype)  # noqa: E731
    trained = {
        "queries": real(size, _WIDTH),
        "items": real(size, _WIDTH),
        "temperature": jnp.asarray(0.1, dtype),
    }
    return trained, {
        "ids": jnp.asarray(rng.integers(0, num_items, size), jnp.int32),
        "owners": jnp.asarray(rng.integers(-1, num_items, size), jnp.int32),
        "log_count": jnp.asarray(rng.normal(size=size), dtype),
        "weights": jnp.asarray(rng.random(size), dtype),
    }


def _difference(name: str, size: int) -> float:
    """The largest difference of a value or gradient, relative to the largest of its array; few
    items, so that masks matter."""
    trained, known = _arrays(size, size // 4, jnp.float64)
    rng, loss, ids = np.random.default_rng(1), LOSSES[name], known["ids"]
    trained |= {"hard": jnp.asarray(rng.normal(size=(size, 4, _WIDTH))), "bias": jnp.asarray(-1.0)}
    hard_ids = jnp.asarray(rng.integers(-1, size // 4, (size, 4)), jnp.int32)
    constants = loss.constants(ObjectiveConfig(margin=0.1), 10_000)

    def value(trained: dict, form: Callable) -> jax.Array:
        return form(
            trained["queries"],
            Positives(trained["items"], ids, known["log_count"]),
            trained["items"],
            Candidates(ids.at[:9].set(-1), known["owners"], known["log_count"]),
            loss=loss,
            weights=known["weights"],
            scale=1 / trained["temperature"],
            owners=known["owners"],
            bias=trained["bias"],
            margin=0.1,
            positive_temperature=0.12,
            hard=HardNegatives(trained["hard"], hard_ids, jnp.zeros(hard_ids.shape)),
            constants=constants,
        )

    both = (
        jax.jit(jax.value_and_grad(functools.partial(value, form=form)))(trained)
        for form in (naive_loss, streaming_loss)
    )
    relative = lambda x, y: float(jnp.abs(x - y).max() / jnp.maximum(jnp.abs(x).max(), 1e-300))  # noqa: E731
    return max(jax.tree.leaves(jax.tree.map(relative, *both)))


if __name__ == "__main__":
    app.run(main)
