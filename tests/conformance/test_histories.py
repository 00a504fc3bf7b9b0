"""Traps of what a user tower may know of its user's past."""

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

from twotower.config import HistoryConfig
from twotower.data.interactions import Split
from twotower.features.base import Fitted
from twotower.features.history import HistoryFeature
from twotower.features.vocabulary import Vocabulary
from twotower.pipeline.histories import build_histories
from twotower.towers.history import Causal, History

EVENTS = ["a", "b", "c", "d", "e", "f"]


def _known(times, parts):
    """The history of each event of one user, as a string; `parts` (train, validation or test) tells
    the part of each."""
    tables = [
        pa.table(
            {
                "user_id": ["u"] * part.sum(),
                "item_id": np.array(EVENTS)[part].tolist(),
                "timestamp": pa.array(times[part], pa.int64()),
            }
        )
        for part in (parts == which for which in range(3))
    ]
    places = tuple(np.flatnonzero(parts == which) for which in range(3))
    vocabulary = Vocabulary(pa.array(EVENTS, pa.large_string()))
    feature = HistoryFeature(side="user", name="h", max_length=9)
    fitted = Fitted(vocabulary=vocabulary)
    users = [np.zeros(len(t), np.int64) for t in tables]
    moments = [t["timestamp"].to_numpy() for t in tables]
    histories = build_histories(
        feature, fitted, Split(*tables, file_positions=places), users, moments, 1
    )
    found = np.full(len(EVENTS), "", object)
    for which, part in enumerate(("train", "validation", "test")):
        for place, ids in zip(places[which], histories.take(histories.spans[part])["h/item_id"]):
            found[place] = "".join(EVENTS[i - vocabulary.first] for i in ids if i)
    return found.tolist()


@pytest.mark.trap(22)
def test_a_history_holds_neither_its_own_target_nor_anything_of_that_moment_or_later():
    """The label among the inputs: figures near 1 that no served model reaches."""
    train = np.zeros(6, int)
    assert _known(np.array([1, 2, 3, 4, 5, 6]), train) == ["", "a", "ab", "abc", "abcd", "abcde"]
    assert _known(np.array([3, 1, 3, 3, 9, 2]), train) == ["bf", "", "bf", "bf", "bfacd", "b"]


@pytest.mark.trap(22)
def test_training_reads_no_held_out_row():
    """Held-out rows between those of training, as a split at random has them, are nothing that
    training may read."""
    parts = np.array([0, 2, 0, 1, 0, 2])
    assert _known(np.arange(6), parts) == ["", "a", "a", "ac", "ac", "acde"]


@pytest.mark.trap(22)
def test_no_position_of_a_transformer_knows_what_comes_after_it():
    """All positions trained at once, each with the answer of the one before it in sight."""
    module = Causal(HistoryConfig(dropout=0.0, blocks=1, heads=1, expansion=1), 4)
    segment = jnp.array([[1, 1, 1, 2, 2, 0]])
    history = History(
        jnp.zeros((1, 6, 4)), segment > 0, segment=segment, position=jnp.array([[0, 1, 2, 0, 1, 0]])
    )
    params = jax.jit(module.init)(jax.random.key(0), history)
    vectors = jax.jit(
        lambda x: module.apply(params, history._replace(vectors=x))[0] @ jnp.arange(1.0, 5.0)
    )
    x = jax.random.normal(jax.random.key(1), (1, 6, 4))
    knows = np.abs(jax.jacobian(vectors)(x)[:, 0]).max(-1) > 1e-7  # [place, what it knows of]
    expected = np.zeros((6, 6), bool)
    expected[[1, 2, 2, 4], [1, 1, 2, 4]] = (
        True  # start tokens have no item; the last place is empty and counts for nothing
    )
    np.testing.assert_array_equal(knows[:5], expected[:5])


@pytest.mark.trap(25)
def test_padding_of_a_history_is_no_event():
    """Padding attended to as if it were an item: short histories drift with the row of id 0."""
    module = Causal(HistoryConfig(dropout=0.0, blocks=1, heads=1, expansion=1), 4)
    x = jax.random.normal(jax.random.key(1), (2, 4, 4))
    valid = jnp.arange(4)[None] < jnp.array([[2], [0]])
    params = jax.jit(module.init)(jax.random.key(0), History(x, valid))
    apply = jax.jit(lambda x: module.apply(params, History(x, valid)))
    np.testing.assert_array_equal(apply(x), apply(jnp.where(valid[..., None], x, 7.0)))
    assert not np.allclose(apply(x), apply(x[..., ::-1]))
