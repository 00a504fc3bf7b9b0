"""What a step asks of the loss: counts, masks and both directions, against a loop over pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower.config import from_dict
from twotower.core.errors import ConfigError
from twotower.core.mesh import SINGLE_DEVICE
from twotower.features.inputs import Input, TableShape
from twotower.towers.two_tower import TwoTower
from twotower.training.candidates import CorpusSize, SampledItems
from twotower.training.state import Trainer, TrainState
from twotower.training.step_losses import loss_sums

pytestmark = pytest.mark.slow

USER = [0, 0, 1, 2, 3, 1]
ITEM = [4, 5, 4, 6, 7, 7]
COUNTS = {"user": [9.0, 2.0, 5.0, 26.0], "item": [1.0, 1.0, 1.0, 1.0, 30.0, 2.0, 7.0, 0.0]}


def _loss_sums(trainer):
    """(params, vectors, batch, sampled items, state) -> the sum of the loss of each task."""
    return jax.jit(lambda *arrays: loss_sums(trainer, *arrays, {}, SINGLE_DEVICE))


def _by_hand(query, answer, vectors, counts, *, logq, mask_same_user):
    ids = np.array(answer)
    query_ids = np.array(query)
    losses = []
    for b in range(len(ids)):
        kept = [
            c
            for c in range(len(ids))
            if c == b
            or (ids[c] != ids[b] and not (mask_same_user and query_ids[c] == query_ids[b]))
        ]
        logit = [
            vectors[0][b] @ vectors[1][c] / 0.07
            - logq * np.log(len(ids) * max(counts[ids[c]], 1) / sum(counts))
            for c in range(len(ids))
        ]
        losses.append(np.log(sum(np.exp(logit[c]) for c in kept)) - logit[b])
    return np.array(losses)


@pytest.mark.parametrize(
    "options", [{}, {"logq": False}, {"mask_same_user": False}, {"symmetric": True}], ids=str
)
def test_the_losses_of_a_batch_are_those_of_a_loop_over_pairs(options):
    config = from_dict({"objective": options})
    inputs = {side: {"id": Input(table=side)} for side in ("user", "item")}
    model = TwoTower.build_from(
        config.model, inputs, {side: TableShape(rows=10, width=4) for side in inputs}
    )
    rng = np.random.default_rng(0)
    user, item = (rng.normal(size=(6, 4)).astype(np.float32) / 4 for _ in range(2))
    trainer = Trainer.build(config, model, CorpusSize(4, 8, 0))
    rows = {side: {"counts": jnp.array(COUNTS[side]), "rows": jnp.float32(42.0)} for side in inputs}
    params = {"log_temperature": jnp.log(jnp.float32(0.07))}
    state = TrainState(0, params, {}, {}, {}, {}, rows, {})
    samples = SampledItems(jnp.zeros(0, jnp.int32), jnp.zeros((6, 0), jnp.int32), jnp.zeros((6, 0)))
    by_hand = {k: options.get(k, True) for k in ("logq", "mask_same_user")}
    expected = _by_hand(USER, ITEM, (user, item), COUNTS["item"], **by_hand)
    if options.get("symmetric"):
        expected = (expected + _by_hand(ITEM, USER, (item, user), COUNTS["user"], **by_hand)) / 2
    vectors = {"user": jnp.asarray(user), "item": jnp.asarray(item)}
    sums = _loss_sums(trainer)
    for b in range(6):
        batch = {
            "user": jnp.array(USER),
            "item": jnp.array(ITEM),
            "weight": jnp.zeros(6).at[b].set(2.0),
        }
        got = sums(params, vectors, batch, samples, state)
        np.testing.assert_allclose(got["retrieval"], 2 * expected[b], rtol=1e-4)


@pytest.mark.parametrize("logq", [True, False])
def test_hard_negatives_are_corrected_with_all_others_or_not_at_all(logq):
    options = {"logq": logq, "label": "liked", "negatives": {"explicit": 1}}
    config = from_dict({"objective": options})
    inputs = {side: {"id": Input(table=side)} for side in ("user", "item")}
    model = TwoTower.build_from(
        config.model, inputs, {side: TableShape(rows=10, width=4) for side in inputs}
    )
    trainer = Trainer.build(config, model, CorpusSize(4, 8, 0))
    rng = np.random.default_rng(0)
    user, item = (rng.normal(size=(n, 4)).astype(np.float32) / 4 for n in (2, 4))
    counts = np.array(COUNTS["item"])
    rows = {side: {"counts": jnp.array(COUNTS[side]), "rows": jnp.float32(42.0)} for side in inputs}
    params = {"log_temperature": jnp.log(jnp.float32(0.07))}
    state = TrainState(0, params, {}, {}, {}, {}, rows, {})
    # Two rows, items 4 and 5; each has one hard negative, items 6 and 1, from pools of three.
    samples = SampledItems(
        jnp.zeros(0, jnp.int32), jnp.array([[6], [1]], jnp.int32), jnp.full((2, 1), np.log(1 / 3))
    )
    batch = {
        "user": jnp.array([0, 1]),
        "item": jnp.array([4, 5]),
        "weight": jnp.array([1.0, 0.0]),
        "labels": {"liked": jnp.ones(2)},
    }
    vectors = {"user": jnp.asarray(user), "item": jnp.asarray(item)}
    got = _loss_sums(trainer)(params, vectors, batch, samples, state)["retrieval"]

    def expected_count(i, own):
        return config.training.batch_size * max(counts[i], 1) / 42 + own

    columns = ((0, 4, 0), (1, 5, 0), (2, 6, 1 / 3))
    logits = [
        user[0] @ item[c] / 0.07 - logq * np.log(expected_count(i, own)) for c, i, own in columns
    ]
    np.testing.assert_allclose(got, np.log(np.sum(np.exp(logits))) - logits[0], rtol=1e-5)


def test_an_item_that_its_user_refused_is_a_negative_of_that_user():
    """It is in the batch with label 0, and so nobody's positive: not masked as another positive of
    the user would be."""
    config = from_dict(
        {"objective": {"label": "liked", "logq": False, "negatives": {"uniform": 0}}}
    )
    inputs = {side: {"id": Input(table=side)} for side in ("user", "item")}
    model = TwoTower.build_from(
        config.model, inputs, {side: TableShape(rows=10, width=4) for side in inputs}
    )
    trainer = Trainer.build(config, model, CorpusSize(4, 8, 0))
    rng = np.random.default_rng(0)
    user, item = (rng.normal(size=(3, 4)).astype(np.float32) / 4 for _ in range(2))
    params = {"log_temperature": jnp.log(jnp.float32(0.07))}
    state = TrainState(
        0, params, {}, {}, {}, {}, {"item": {"counts": jnp.ones(8), "rows": jnp.float32(8)}}, {}
    )
    samples = SampledItems(jnp.zeros(0, jnp.int32), jnp.zeros((3, 0), jnp.int32), jnp.zeros((3, 0)))
    # All rows are of user 0, who liked items 4 and 6 and refused item 5.
    batch = {
        "user": jnp.array([0, 0, 0]),
        "item": jnp.array([4, 5, 6]),
        "weight": jnp.array([1.0, 1.0, 0.0]),
        "labels": {"liked": jnp.array([1.0, 0.0, 1.0])},
    }
    vectors = {"user": jnp.asarray(user), "item": jnp.asarray(item)}
    got = _loss_sums(trainer)(params, vectors, batch, samples, state)["retrieval"]
    logits = user[0] @ item[:2].T / 0.07
    np.testing.assert_allclose(got, np.log(np.exp(logits).sum()) - logits[0], rtol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_loss_of_cut_vectors_counts_as_much_as_the_whole(normalize):
    model = {"normalize": normalize, "temperature": 0.5}
    inputs = {side: {"id": Input(table=side)} for side in ("user", "item")}
    tables = {side: TableShape(rows=10, width=8) for side in inputs}
    rng = np.random.default_rng(0)
    vectors = {side: rng.normal(size=(6, 8)).astype(np.float32) for side in inputs}
    batch = {"user": jnp.array(USER), "item": jnp.array(ITEM), "weight": jnp.ones(6)}
    rows = {side: {"counts": jnp.array(COUNTS[side]), "rows": jnp.float32(42.0)} for side in inputs}
    samples = SampledItems(jnp.zeros(0, jnp.int32), jnp.zeros((6, 0), jnp.int32), jnp.zeros((6, 0)))

    def loss(width, **objective):
        config = from_dict({"model": model, "objective": {"symmetric": True} | objective})
        trainer = Trainer.build(
            config, TwoTower.build_from(config.model, inputs, tables), CorpusSize(4, 8, 0)
        )
        cut = {side: x[:, :width] for side, x in vectors.items()}
        cut = {
            side: jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True) if normalize else x)
            for side, x in cut.items()
        }
        params = {"log_temperature": jnp.log(jnp.float32(0.5))}
        state = TrainState(0, params, {}, {}, {}, {}, rows, {})
        return _loss_sums(trainer)(params, cut, batch, samples, state)["retrieval"]

    np.testing.assert_allclose(
        loss(8, matryoshka=(4, 2)), np.mean([loss(width) for width in (8, 4, 2)]), rtol=1e-5
    )
    for wrong in ((8,), (0,), (4, 4)):
        with pytest.raises(
            ConfigError, match="must be different widths below that of the vectors, 8"
        ):
            loss(8, matryoshka=wrong)
