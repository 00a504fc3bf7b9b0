"""A divided corpus against one device and against a stable sort."""

import jax
import numpy as np
import pytest

from tests.index.test_exact import oracle
from twotower.core.errors import QueryError
from twotower.core.mesh import make_mesh
from twotower.core.ragged import Ragged
from twotower.index import exact
from twotower.index.exact import ExactIndex


@pytest.fixture(scope="module")
def vectors():
    """Small integers: ties are plenty, also between devices."""
    rng = np.random.default_rng(1)
    return rng.integers(-2, 3, (37, 5)).astype(np.float32), rng.integers(-2, 3, (301, 5)).astype(
        np.float32
    )


def some_excluded():
    rng = np.random.default_rng(2)
    lists = [rng.permutation(301)[: min(299, 8 * q)] for q in range(37)]
    return Ragged.from_pairs(
        np.repeat(np.arange(37), [len(x) for x in lists]), np.concatenate(lists), num_rows=37
    )


@pytest.mark.parametrize(
    "devices, k, item_block", [(2, 10, 16), (8, 1, 16), (8, 50, 99), (8, 301, 16), (8, 400, 99)]
)
def test_equals_a_stable_sort_less_what_is_excluded(vectors, devices, k, item_block, monkeypatch):
    monkeypatch.setattr(exact, "HOST_BLOCK_QUERIES", 16)
    queries, items = vectors
    exclude = some_excluded()
    index = ExactIndex(items, mesh=make_mesh(devices), item_block=item_block)
    for skip in (None, exclude) if k == 50 else (exclude,):
        scores, rows = index.search(queries, k, exclude=skip)
        expected = oracle(queries, items, k, skip)
        np.testing.assert_array_equal(rows, expected[1])
        np.testing.assert_array_equal(scores, expected[0])


@pytest.mark.parametrize("count", [0, 1, 7])
def test_fewer_items_than_devices(count):
    items, queries = np.eye(8, dtype=np.float32)[:count], np.ones((3, 8), np.float32)
    index = ExactIndex(items, mesh=make_mesh(8))
    for one, other in zip(index.search(queries, 4), ExactIndex(items).search(queries, 4)):
        np.testing.assert_array_equal(one, other)


def test_devices_hold_their_own_items_and_send_lists_alone(vectors):
    queries, items = vectors
    mesh = make_mesh(8)
    index = ExactIndex(items, mesh=mesh)
    (block,) = index._blocks
    assert {shard.data.shape for shard in block.addressable_shards} == {(38, 5)}
    given = (
        np.zeros((4, 5), np.float32),
        np.zeros(1, np.int32),
        np.zeros(1, np.int32),
        np.int32(0),
        np.int32(301),
    )
    text = exact._block_search(mesh, 6, 1.0).lower(block, *given).compile().as_text()
    gathered = [line for line in text.splitlines() if "all-gather" in line and "= " in line]
    assert gathered and all(
        "[4,48]" in line or "[8,4,6]" in line or "[4,8,6]" in line for line in gathered
    ), gathered
    assert "all-to-all" not in text and "all-reduce" not in text


def test_what_cannot_be_ranked_is_refused(vectors):
    queries, items = vectors
    index = ExactIndex(items, mesh=make_mesh(8), normalized=True)
    with pytest.raises(QueryError, match="4 wide"):
        index.search(queries[:, :4], 3)
    with pytest.raises(QueryError, match="is zero"):
        index.search(queries * 0, 3)
    with pytest.raises(ValueError, match="k=0"):
        index.search(queries + 9, 0)
    with pytest.raises(ValueError, match="exclude holds 1 lists"):
        index.search(queries + 9, 3, exclude=Ragged.empty(1))
    assert len(jax.devices()) == 8
