"""The cost of comparing every query with every candidate. The streaming loss against the
naive one.

    python -m experiments.benchmarks.loss [--quick] [--json=FILE] [--check]

First the two in float64, for every loss, with every mask, correction and margin and with hard
negatives: they must be equal. Then value and gradient (by queries, items and temperature) of the
in-batch softmax, D = 64, with the logQ correction and accidental hits masked, in turns:

    naive            the [B, B] logits as one writes them, with optax's cross-entropy
    reference        `twotower.kernels.softmax_reference.naive_softmax`, which also holds them
    streaming        `streaming_softmax`
    naive, bf16      the naive form with the operands of its products in bfloat16
    streaming, bf16  `streaming_softmax` likewise; sums are float32 in all of them

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

from experiments.benchmarks import floors, harness
from twotower.config import ObjectiveConfig
from twotower.kernels.loss_inputs import (
    Candidates,
    HardNegatives,
    LossInputs,
    LossOptions,
    Positives,
)
from twotower.kernels.softmax_reference import naive_softmax
from twotower.kernels.streaming_softmax import streaming_softmax
from twotower.objectives.losses import LOSSES, bind_constants

WIDTH = 64
_SIZES, _QUICK_SIZES = (1024, 4096, 16_384, 65_536), (1024, 4096)
_LARGEST_NAIVE = 16_384
# Least times of the naive form to ours, by form and batch; about nine tenths of the least that was
# measured on two machines: the naive form waits for memory, ours multiplies.
FLOORS = {
    "streaming 1,024": 1.4,
    "streaming 4,096": 2.9,
    "streaming 16,384": 3.0,
    "streaming, bf16 1,024": 2.2,
    "streaming, bf16 4,096": 5.4,
    "streaming, bf16 16,384": 5.9,
}


def main(argv: list[str]) -> None:
    harness.steady_allocator()
    quick = harness.QUICK.value
    with jax.enable_x64(True):
        worst = {name: difference(name, 100 if quick else 500) for name in LOSSES}
    print(
        "float64, everything on, largest relative difference of a value or gradient between "
        "reference and streaming:"
    )
    print("  " + ", ".join(f"{name} {difference:.0e}" for name, difference in worst.items()))
    times: dict[str, list[float]] = {}
    ratios = {}
    print(
        f"{'B':>8}  {'form':16}{'ms':>10}{'examples/s':>14}{'temporary MB':>14}{'naive/form':>12}"
    )
    half = functools.partial(functools.partial, dtype=jnp.bfloat16)
    streaming = {"streaming": streaming_softmax, "streaming, bf16": half(streaming_softmax)}
    for size in _QUICK_SIZES if quick else _SIZES:
        forms = (
            {"naive": _naive, "reference": naive_softmax, "naive, bf16": half(_naive)}
            if size <= _LARGEST_NAIVE
            else {}
        )
        calls = {name: compiled(form, size) for name, form in (forms | streaming).items()}
        # Several calls a turn: the pages that a form gives back are taken from the time of the call
        # that follows.
        rounds, repeats = (10 if size <= 4096 else 2, max(4, 8192 // size)) if forms else (1, 1)
        waiting = {name: functools.partial(_wait_for, call) for name, (call, _) in calls.items()}
        found = harness.alternate(waiting, rounds=rounds, repeats=repeats)
        for name, ms in found.items():
            ratio = min(found["naive"]) / min(ms) if "naive" in found else float("nan")
            ratios[f"{name} {size:,}"] = ratio
            megabytes = calls[name][1] / 1e6
            print(
                f"{size:8,}  {name:16}{min(ms):10.1f}{size / min(ms) * 1e3:14,.0f}"
                f"{megabytes:14.1f}{ratio:12.2f}"
            )
        times |= {f"{name} {size:,}": ms for name, ms in found.items()}
    harness.report("loss", times, unit="ms for value and gradient", base=next(iter(times)))
    floors.check(ratios, FLOORS)


def _wait_for(call: Callable[[], Any]) -> None:
    jax.block_until_ready(call())


def _naive(inputs: LossInputs, options: LossOptions, dtype: Any = jnp.float32) -> jax.Array:
    """The in-batch softmax as one writes it; each query's positive is the candidate of its own
    row."""
    candidates = inputs.candidates
    rows = jnp.arange(len(inputs.queries))
    queries = inputs.queries.astype(dtype)
    items = candidates.vectors.astype(dtype)
    scores = jnp.matmul(queries, items.T, preferred_element_type=jnp.float32)
    logits = scores * inputs.scale - candidates.log_expected_count[None, :]
    is_same = candidates.ids[None, :] == inputs.positives.ids[:, None]
    hits = is_same & (rows[None, :] != rows[:, None])
    masked = jnp.where(hits, -jnp.inf, logits)
    losses = optax.softmax_cross_entropy_with_integer_labels(masked, rows)
    return jnp.sum(inputs.weights * losses)


def compiled(
    form: Callable, size: int, *, mask_same_user: bool = False
) -> tuple[Callable[[], Any], int]:
    """Value and gradient as a function of nothing, which does not wait for the device, and the
    bytes of temporaries that it allocates."""
    arrays, known = _arrays(size, size, jnp.float32)
    options = LossOptions(LOSSES["softmax"], mask_same_user=mask_same_user)

    def loss(trained: dict, known: dict) -> jax.Array:
        ids, log_count = known["ids"], known["log_count"]
        inputs = LossInputs(
            trained["queries"],
            known["query_ids"],
            known["weights"],
            Positives(trained["items"], ids, log_count),
            Candidates(trained["items"], ids, known["query_ids"], log_count),
            scale=1 / trained["temperature"],
        )
        return form(inputs, options)

    program = jax.jit(jax.value_and_grad(loss)).lower(arrays, known).compile()
    memory = program.memory_analysis()
    assert memory is not None
    return functools.partial(program, arrays, known), memory.temp_size_in_bytes


def _arrays(size: int, num_items: int, dtype: Any) -> tuple[dict, dict]:
    rng = np.random.default_rng(0)
    real = lambda *shape: jnp.asarray(rng.normal(size=shape) / WIDTH**0.5, dtype)  # noqa: E731
    trained = {
        "queries": real(size, WIDTH),
        "items": real(size, WIDTH),
        "temperature": jnp.asarray(0.1, dtype),
    }
    return trained, {
        "ids": jnp.asarray(rng.integers(0, num_items, size), jnp.int32),
        "query_ids": jnp.asarray(rng.integers(-1, num_items, size), jnp.int32),
        "log_count": jnp.asarray(rng.normal(size=size), dtype),
        "weights": jnp.asarray(rng.random(size), dtype),
    }


def difference(
    name: str,
    size: int,
    forms: tuple[Callable, Callable] = (naive_softmax, streaming_softmax),
    dtype: Any = jnp.float64,
) -> float:
    """The largest difference of a value or gradient of two forms, relative to the largest of its
    array; few items, so that masks matter."""
    trained, known = _arrays(size, size // 4, dtype)
    rng, loss, ids = np.random.default_rng(1), LOSSES[name], known["ids"]
    hard = jnp.asarray(rng.normal(size=(size, 4, WIDTH)), dtype)
    trained |= {"hard": hard, "bias": jnp.asarray(-1.0, dtype)}
    hard_ids = jnp.asarray(rng.integers(-1, size // 4, (size, 4)), jnp.int32)
    bound = bind_constants(loss, ObjectiveConfig(margin=0.1), 10_000)
    options = LossOptions(bound, margin=0.1, positive_temperature=0.12)

    def value(trained: dict, form: Callable) -> jax.Array:
        padded = ids.at[:9].set(-1)
        inputs = LossInputs(
            trained["queries"],
            known["query_ids"],
            known["weights"],
            Positives(trained["items"], ids, known["log_count"]),
            Candidates(trained["items"], padded, known["query_ids"], known["log_count"]),
            scale=1 / trained["temperature"],
            bias=trained["bias"],
            hard=HardNegatives(trained["hard"], hard_ids, jnp.zeros(hard_ids.shape)),
        )
        return form(inputs, options)

    both = (
        jax.jit(jax.value_and_grad(functools.partial(value, form=form)))(trained) for form in forms
    )
    relative = lambda x, y: float(jnp.abs(x - y).max() / jnp.maximum(jnp.abs(x).max(), 1e-300))  # noqa: E731
    return max(jax.tree.leaves(jax.tree.map(relative, *both)))


if __name__ == "__main__":
    app.run(main)
