"""Histories read as spans in training: the steps of windows, at the cost of what a batch holds."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests.training.shop import build_trainer, small_config
from twotower.core.mesh import make_mesh
from twotower.pipeline.batches import SPANS, Batches
from twotower.pipeline.prepare import prepare
from twotower.training import loop
from twotower.training.candidates import count_rows
from twotower.training.init import init_on

pytestmark = pytest.mark.slow

STEPS = 3
BATCH = 96
LENGTH = 60  # events of a history at most


@functools.cache
def prepared_with_history():
    features = {
        "user": {
            "user_id": {"type": "string", "embedding_size": 8},
            "history": {
                "type": "history",
                "max_length": LENGTH,
                "gaps": 6,
                "request_gap": True,
                "weights": {"purchase": 4.0},
                "reads": ("item_id", "words"),
            },
        },
        "item": {
            "item_id": {"type": "string", "embedding_size": 8, "oov_rate": 0.3},
            # Several values of an event.
            "words": {"type": "text", "column": "title", "embedding_size": 4, "buckets": 50},
        },
    }
    model = {
        "user": {"layers": (8,), "dropout": 0.2},
        "item": {"layers": (8,)},
        "history": {"kind": "bag", "recency": True, "dropout": 0.2, "empty_rate": 0.2},
    }
    config = small_config(features=features, model=model, training={"batch_size": BATCH})
    return prepare(config)


def run_steps(prepared, devices, monkeypatch, event_capacity=None, source="resident"):
    """The losses of some steps, the state after them, and the event_capacity of each program."""
    trainer = build_trainer(prepared, prepared.config)
    mesh = make_mesh(devices)
    training = dataclasses.replace(prepared.config.training, input=source)
    batches = loop.make_batches(prepared, training)
    if event_capacity is not None:
        monkeypatch.setattr(Batches, "span_capacity", lambda self, size: event_capacity)
    used = []
    gather_spans = Batches.gather_spans

    def counted(self, data, indices, num_events):
        used.append(num_events)
        return gather_spans(self, data, indices, num_events)

    monkeypatch.setattr(Batches, "gather_spans", counted)
    run = loop.compile_steps(trainer, batches, prepared, mesh)
    state = init_on(mesh, trainer, count_rows(prepared))
    losses = []
    for step in range(STEPS):
        state, metrics, _ = run(state, step, 1)
        losses.append(float(metrics["loss"][0]))
    return losses, jax.device_get((state.params, state.tables)), used


@functools.cache
def steps_of_windows():
    with pytest.MonkeyPatch.context() as patch:
        losses, weights, used = run_steps(prepared_with_history(), 1, patch, event_capacity=0)
    assert not used
    return losses, weights


# On one device a batch holds more events than the first program has event_capacity: none is lost.
@pytest.mark.parametrize(
    "devices, event_capacity, source",
    [(1, 1024, "resident"), (8, 640, "resident"), (8, 640, "host")],
)
def test_steps_of_spans_are_those_of_windows(devices, event_capacity, source, monkeypatch):
    expected_losses, expected = steps_of_windows()
    losses, weights, used = run_steps(
        prepared_with_history(), devices, monkeypatch, event_capacity, source
    )
    # One shape, of fewer places than windows have.
    assert len(set(used)) == 1 and used[0] <= BATCH // devices * LENGTH
    assert devices > 1 or used[0] == 2 * event_capacity
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), weights, expected
    )


def test_places_are_for_nearly_every_batch_and_none_where_little_is_saved():
    prepared = prepared_with_history()
    batches = loop.make_batches(prepared, prepared.config.training)
    spans = prepared.train.context[SPANS]
    lengths = spans[:, 1] - spans[:, 0]
    event_capacity = batches.span_capacity(BATCH)
    assert BATCH * lengths.mean() < event_capacity <= BATCH * LENGTH / 2
    held = [batches.num_events(batches.indices(step), 1) for step in range(50)]
    assert max(held) <= event_capacity
    assert batches.num_events(batches.indices(0), 8) < held[0]
    # Of a few rows the longest histories decide.
    assert batches.span_capacity(4) == 0
