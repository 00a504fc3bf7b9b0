"""Traps of what is a negative: the answer itself, the user's other answers, masks that overflow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.objectives.cases import OBJECTIVE
from twotower.config import ObjectiveConfig
from twotower.kernels.loss_inputs import (
    Candidates,
    HardNegatives,
    LossInputs,
    LossOptions,
    Positives,
)
from twotower.kernels.streaming_softmax import streaming_softmax
from twotower.objectives.losses import LOSSES, bind_constants

pytestmark = pytest.mark.slow

B = 3
C = 6
H = 2
D = 4


def _arrays(scale=1.0):
    rng = np.random.default_rng(0)
    shapes = {"queries": (B, D), "positives": (B, D), "items": (C, D), "hard": (B, H, D)}
    return {
        name: jnp.asarray(scale * rng.normal(size=shape), jnp.float32)
        for name, shape in shapes.items()
    }


@functools.partial(jax.jit, static_argnames=("loss", "dtype", "mask_same_user"))
@functools.partial(jax.value_and_grad, argnums=0)
def _loss(arrays, ids, query_ids, hard, *, loss, dtype, mask_same_user):
    whole = jnp.arange(B, dtype=jnp.int32)
    inputs = LossInputs(
        arrays["queries"],
        whole,
        jnp.ones(B),
        Positives(arrays["positives"], whole, jnp.zeros(B)),
        Candidates(arrays["items"], ids, query_ids, jnp.zeros(C)),
        scale=2.0,
        hard=HardNegatives(arrays["hard"], hard, jnp.zeros((B, H))),
    )
    bound = bind_constants(LOSSES[loss], OBJECTIVE, 9)
    options = LossOptions(bound, mask_same_user=mask_same_user)
    return streaming_softmax(inputs, options, dtype=dtype)


def _gradients(
    arrays,
    *,
    ids=range(10, 10 + C),
    query_ids=(-1,) * C,
    hard=((-1,) * H,) * B,
    loss="softmax",
    dtype=None,
    mask_same_user=True,
):
    """The loss and its gradients of B queries, of users 0 to B - 1, whose answers have the ids 0 to
    B - 1."""
    numbers = [jnp.asarray(x, jnp.int32) for x in (ids, query_ids, hard)]
    return _loss(arrays, *numbers, loss=loss, dtype=dtype, mask_same_user=mask_same_user)


@pytest.mark.trap(10)
@pytest.mark.parametrize("loss", ["softmax", "bpr"])
def test_an_accidental_hit_has_probability_zero(loss):
    """ "Removed" by adding 1e-40, a hit stays a negative: its gradient, which is its probability,
    is exactly 0.

    Hits are known by id, wherever they stand: candidate 4 and a hard negative are the answer of
    query 1.
    """
    ids = [10, 11, 12, 13, 1, 15]
    hard = [[-1, -1], [1, 20], [-1, -1]]
    arrays = _arrays()
    moved = arrays | {"items": arrays["items"].at[4].add(7.0)}
    (_, before), (_, after) = (
        _gradients(a, ids=ids, hard=hard, loss=loss) for a in (arrays, moved)
    )
    # Moved far, it leaves query 1 as it was, to the bit.
    assert [bool((b != a).any()) for b, a in zip(before["queries"], after["queries"])] == [
        True,
        False,
        True,
    ]
    assert not before["hard"][1, 0].any() and before["hard"][1, 1].any()


@pytest.mark.trap(11)
def test_other_answers_of_the_user_are_no_negatives():
    """Another positive of the same user as a negative: moved far, candidate 2 of user 1 leaves
    query 1 as it was."""
    arrays = _arrays()
    query_ids = [-1, -1, 1, -1, -1, 2]
    moved = arrays | {"items": arrays["items"].at[2].add(7.0)}
    (_, before), (_, after) = (_gradients(a, query_ids=query_ids) for a in (arrays, moved))
    assert [bool((b != a).any()) for b, a in zip(before["queries"], after["queries"])] == [
        True,
        False,
        True,
    ]
    (_, before), (_, after) = (
        _gradients(a, query_ids=query_ids, mask_same_user=False) for a in (arrays, moved)
    )
    assert (before["queries"][1] != after["queries"][1]).any()
    assert ObjectiveConfig().mask_same_user


@pytest.mark.trap(12)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_query_without_a_negative_costs_nothing(loss, dtype):
    """A mask by adding finfo.min leaves a sum of masked ones: with all masked, loss and gradients
    are 0 and no NaN."""
    value, gradients = _gradients(
        _arrays(), ids=[-1] * C, hard=[[-1, 0], [1, 1], [-1, 2]], loss=loss, dtype=dtype
    )
    assert value == 0
    for gradient in gradients.values():
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.trap(12)
def test_logits_are_float32_whatever_multiplies():
    """Logits and masks in half precision overflow: with float16 operands and scores beyond 65,504
    the loss is float32's."""
    arrays = {name: jnp.round(x) for name, x in _arrays(150.0).items()}
    value, gradients = _gradients(arrays, dtype=jnp.float16, ids=[10, 11, -1, 13, 1, 15])
    expected, exact = _gradients(arrays, ids=[10, 11, -1, 13, 1, 15])
    assert value > 65_504
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradients["items"], exact["items"], rtol=1e-2)
