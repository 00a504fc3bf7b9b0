"""Evaluation with the items divided over a mesh: the numbers of one device, and no device sees
another's scores."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.evaluation.test_evaluate import KS, make, oracle
from twotower.core.errors import ScoreError
from twotower.core.mesh import AXIS, REPLICATED, make_mesh, put
from twotower.evaluation import evaluate as module
from twotower.evaluation.evaluate import dot_scores, evaluate
from twotower.evaluation.measure import measure_popularity_weights

pytestmark = pytest.mark.slow


def problem(num_items, largest=9):
    """40 queries of 25 users; their vectors are their scores, small integers, so that many are
    equal, also between devices."""
    rng = np.random.default_rng(3)
    seen = [rng.permutation(num_items)[: rng.integers(0, num_items)] for _ in range(25)]
    right = [rng.permutation(num_items)[: rng.integers(1, largest)] for _ in range(40)]
    queries = make(
        rng.integers(0, 25, 40),
        right,
        seen,
        num_items,
        missing=rng.integers(0, 2, 40),
        counts=rng.integers(0, 4, num_items),
    )
    return rng.integers(-3, 4, (40, num_items)).astype(np.float32), queries


@pytest.mark.parametrize(
    "devices, num_items, masked", [(2, 43, 1), (4, 43, 0), (8, 43, 1), (8, 40, 0), (8, 5, 1)]
)
def test_every_figure_is_that_of_one_device(devices, num_items, masked):
    mask_seen = bool(masked)
    scores, queries = problem(num_items, min(9, num_items))
    items = np.eye(num_items, dtype=np.float32)
    alone = evaluate(dot_scores(scores, items), queries, KS, mask_seen=mask_seen)
    divided = dot_scores(scores, items, mesh=make_mesh(devices))
    assert (
        evaluate(divided, queries, KS, mask_seen=mask_seen, block_bytes=4 * num_items * 16) == alone
    )
    for k in KS:
        for name, value in oracle(scores, queries, k, mask_seen)[0].items():
            assert alone[f"{name}@{k}"] == pytest.approx(value, rel=1e-5), f"{name}@{k}"


def test_a_weight_of_popularity_is_added_on_a_mesh_too():
    scores, queries = problem(43)
    items = np.eye(43, dtype=np.float32)
    alone, divided = (
        measure_popularity_weights(dot_scores(scores, items, mesh=mesh), queries, KS, (0.0, 2.0))
        for mesh in (None, make_mesh(8))
    )
    weights = alone["popularity_weights"]
    assert divided == alone and weights["0"] != weights["2"]


@pytest.mark.parametrize("where", [0, 42])
def test_a_score_that_is_nan_on_any_device_is_refused(where):
    scores, queries = problem(43)
    items = np.eye(43, dtype=np.float32)
    items[where, where] = np.nan
    with pytest.raises(ScoreError, match="queries 0 to 39 hold NaN"):
        evaluate(dot_scores(scores, items, mesh=make_mesh(8)), queries, KS, mask_seen=True)


def test_devices_score_their_own_items_and_send_lists_alone():
    mesh = make_mesh(8)
    scores = dot_scores(
        np.ones((6, 4), np.float32), np.ones((800, 4), np.float32), mesh=make_mesh(8)
    )
    found = scores(slice(0, 6))
    assert found.sharding.spec == P(None, AXIS) and {
        x.data.shape for x in found.addressable_shards
    } == {(6, 100)}
    pairs = put(mesh, module._Pairs(*[np.zeros(3, np.int32)] * 4), REPLICATED)
    text = module._rank.lower(found, pairs, k=5, mesh=mesh).compile().as_text()
    moved = [
        line
        for line in text.splitlines()
        if ("all-gather" in line or "all-to-all" in line) and "= " in line
    ]
    assert moved and not any("800" in line or "100]" in line for line in moved), moved
    assert len(jax.devices()) == 8
