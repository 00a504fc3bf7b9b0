"""The streaming loss: the naive one's numbers, without its matrix, on one device and on eight."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from tests.objectives.cases import Case, case
from twotower.objectives import LOSSES
from twotower.objectives.negatives import Candidates, Hard, Positives
from twotower.objectives.reference import naive_loss
from twotower.objectives.streaming import streaming_loss


def _differentiable(c: Case) -> dict:
    o = c.options
    return {
        "queries": c.queries, "positives": c.positives.vectors, "items": c.items, "hard": o["hard"].vectors,
        "scale": o["scale"], "bias": o["bias"], "weights": o["weights"],
    }  # fmt: skip


def _of(form, c: Case, arrays: dict, **changes) -> jax.Array:
    options = c.options | {n: arrays[n] for n in ("scale", "bias", "weights")} | changes
    if options["hard"] is not None:
        options["hard"] = options["hard"]._replace(vectors=arrays["hard"])
    positives = c.positives._replace(vectors=arrays["positives"])
    return form(arrays["queries"], positives, arrays["items"], c.candidates, **options)


def _both(c: Case, **changes) -> list:
    """(loss, gradients) of the naive and of the streaming form."""
    block = changes.pop("block", 4)
    forms = (naive_loss, functools.partial(streaming_loss, block=block))
    return [jax.jit(jax.value_and_grad(lambda a, f=form: _of(f, c, a, **changes)))(_differentiable(c)) for form in forms]


def _assert_close(got, expected, tolerance: float = 1e-10) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), got, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_naive_loss_with_everything_on(name):
    """Loss and every gradient, in float64; 13 queries in blocks of 4, so that the last is filled up."""
    with jax.enable_x64(True):
        naive, streaming = _both(case(name, jnp.float64))
        assert naive[0] > 0.1 and all(jnp.abs(g).max() > 0 for n, g in naive[1].items() if n not in ("scale", "bias"))
        assert (naive[1]["scale"] != 0) == LOSSES[name].scaled and (naive[1]["bias"] != 0) == LOSSES[name].biased
        _assert_close(streaming, naive)


@pytest.mark.parametrize("changes", [{"mask_same_user": False}, {"hard": None}, {"bias": None}, {"block": 1}, {"block": 0}], ids=str)
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_equals_the_naive_loss_with_a_part_left_out(name, changes):
    with jax.enable_x64(True):
        naive, streaming = _both(case(name, jnp.float64), **changes)
        _assert_close(streaming, naive)


@pytest.mark.parametrize("name", LOSSES)
def test_the_value_alone_is_the_same_value(name):
    with jax.enable_x64(True):
        c = case(name, jnp.float64)
        value = jax.jit(lambda a: _of(functools.partial(streaming_loss, block=4), c, a))(_differentiable(c))
        _assert_close(value, _of(naive_loss, c, _differentiable(c)))
