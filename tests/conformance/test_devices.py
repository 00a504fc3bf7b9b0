"""Traps of several devices and of how a step is reduced: everything must be as on one device."""

import jax
import numpy as np
import pytest

from tests.conformance import tiny
from twotower.core.errors import ConfigError
from twotower.objectives.losses import LOSSES
from twotower.pipeline.batches import Batches, InteractionExamples, InteractionRows

pytestmark = pytest.mark.slow


def _steps(devices, count=3):
    """What `count` steps come to on some devices: losses, and the state."""
    trainer = tiny.everything()
    losses = []
    state = tiny.start(trainer, devices)
    for seed in range(count):
        state, metrics, heard = tiny.step(trainer, devices)(state, tiny.batch(seed))
        losses.append((metrics["loss"], metrics["grad_norm"]))
    return jax.tree.map(np.asarray, (losses, state, heard))


@pytest.mark.trap(14)
def test_eight_devices_do_what_one_does():
    """Gradients summed, averaged twice, or without the items of other devices: loss, gradients and
    tables equal one device's.

    By plain gradient descent: Adam would hide a factor.
    """
    losses, state, _ = _steps(8)
    expected, alone, _ = _steps(1)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    for (path, array), other in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(alone), strict=True
    ):
        np.testing.assert_allclose(
            array, other, rtol=1e-4, atol=2e-5, err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.trap(15)
@pytest.mark.parametrize("devices", [1, 8])
def test_answers_and_hard_negatives_are_gathered_apart(devices):
    """Interleaved by rank, labels point at negatives: on any number of devices each row has its own
    answer and negatives, and the candidates are all answers of the batch, in its order, then what
    was drawn."""
    trainer = tiny.everything()
    rows = tiny.batch()
    heard = jax.tree.map(
        np.asarray, tiny.step(trainer, devices)(tiny.start(trainer, devices), rows)[2]
    )
    np.testing.assert_array_equal(heard["own"]["ids"], rows["item"])
    np.testing.assert_array_equal(heard["own"]["query_ids"], rows["user"])
    pools = tiny.catalogue(trainer)["explicit"]["items"][rows["user"]]
    assert heard["own"]["hard"].shape == (tiny.B, 3)
    assert (heard["own"]["hard"][:, :, None] == pools[:, None, :]).any(-1).all()
    answers = heard["shared"]["query_ids"] >= 0
    pairs = set(zip(heard["shared"]["ids"][answers], heard["shared"]["query_ids"][answers]))
    assert answers.sum() == tiny.B and pairs == set(zip(rows["item"], rows["user"]))


@pytest.mark.trap(15)
@pytest.mark.parametrize("devices", [1, 8])
def test_vectors_are_those_of_their_ids(devices):
    """Ids in order and vectors interleaved: the loss of a step is that of the rows that its ids
    name, hard negatives too."""
    trainer = tiny.mixed()
    state = tiny.start(trainer, devices)
    _, metrics, heard = tiny.step(trainer, devices)(state, tiny.batch())
    assert (np.asarray(heard["own"]["hard"]) >= 0).all()
    np.testing.assert_allclose(metrics["loss"], tiny.loss_by_hand(state, heard), rtol=1e-5)


@pytest.mark.trap(10)
@pytest.mark.trap(15)
def test_every_device_compares_with_the_same_candidates():
    """Hits and owners are known by id on every device: eight devices tell the loss what one tells
    it."""
    alone, many = (jax.tree.map(np.asarray, _steps(devices)[2]) for devices in (1, 8))
    for name in ("ids", "hard", "query_ids", "log_count", "hard_log_count"):
        np.testing.assert_allclose(many["own"][name], alone["own"][name], rtol=1e-5, err_msg=name)
    ours, theirs = (
        sorted(zip(x["shared"]["ids"], x["shared"]["query_ids"])) for x in (many, alone)
    )
    assert [pair for pair in ours if pair[0] >= 0] == [pair for pair in theirs if pair[0] >= 0]


@pytest.mark.trap(10)
@pytest.mark.trap(11)
def test_a_step_masks_by_id_and_by_user():
    """By place alone, the twins of an answer and the user's other answers would be negatives:
    against a loop over pairs."""
    trainer = tiny.plain()
    rows = tiny.batch(users=np.arange(tiny.B) % 5, items=np.arange(tiny.B) % 7)
    _, metrics, heard = tiny.step(trainer)(tiny.start(trainer), rows)
    np.testing.assert_array_equal(heard["shared"]["ids"], rows["item"])
    np.testing.assert_array_equal(heard["shared"]["query_ids"], rows["user"])
    np.testing.assert_allclose(
        metrics["loss"], tiny.loss_by_hand(tiny.start(trainer), heard), rtol=1e-5
    )


@pytest.mark.trap(16)
def test_every_batch_is_full_and_no_row_is_lost():
    """A short last batch changes the scale of the loss: batches run on over the passes, each of
    which holds every row once."""
    rows = InteractionRows(
        np.arange(10, dtype=np.int32),
        np.arange(10, dtype=np.int32),
        np.ones(10, np.float32),
        None,
        {},
    )
    features = {side: {"id": np.arange(10)} for side in ("user", "item")}
    examples = InteractionExamples(rows, features)
    batches = Batches(examples, batch_size=4, seed=0, resident_megabytes=1)
    drawn = [batches.indices(step) for step in range(5)]
    assert {len(part) for part in drawn} == {4}
    passes = np.concatenate(drawn).reshape(2, 10)
    assert (
        np.array_equal(np.sort(passes, axis=1), np.tile(np.arange(10), (2, 1)))
        and (passes[0] != passes[1]).any()
    )


@pytest.mark.trap(16)
@pytest.mark.parametrize("devices", [1, 8])
def test_a_loss_is_divided_by_the_weight_that_counts(devices):
    """Rows that fill a batch up weigh nothing: the loss of the others is a mean over them, not over
    all, on every device."""
    trainer = tiny.plain() if devices == 1 else tiny.everything()
    rows = tiny.batch()
    rows["weight"] = np.where(np.arange(tiny.B) < 5, 2.0, 0.0).astype(np.float32)
    state = tiny.start(trainer, devices)
    once, half = (
        tiny.step(trainer, devices)(state, rows | {"weight": rows["weight"] * factor})[1]["loss"]
        for factor in (1.0, 0.5)
    )
    np.testing.assert_allclose(once, half, rtol=1e-5)
    if devices == 1:
        heard = tiny.step(trainer)(state, rows)[2]
        np.testing.assert_allclose(once, tiny.loss_by_hand(state, heard), rtol=1e-5)


@pytest.mark.trap(17)
@pytest.mark.parametrize("loss", LOSSES)
def test_accumulation_is_no_larger_batch(loss):
    """Parts of a batch have their own negatives alone: accumulating is refused where negatives come
    from the batch."""
    with pytest.raises(ConfigError, match=r"accumulate=2.*raise config.training.batch_size=16"):
        tiny.build(objective={"loss": loss}, training={"accumulate": 2})
    tiny.build(objective={"loss": "binary_cross_entropy", "label": "l"}, training={"accumulate": 2})
