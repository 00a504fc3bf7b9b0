"""A corpus divided over devices against one device and against a stable sort."""

import jax
import numpy as np
import pytest

from tests.index.oracles import assert_same_lists, integer_vectors, rising_exclusions, stable_sort
from twotower.core.arrays import Ragged
from twotower.core.errors import QueryError
from twotower.core.mesh import make_mesh
from twotower.index import exact, exact_programs
from twotower.index.exact import ExactIndex

pytestmark = pytest.mark.slow

QUERIES = integer_vectors(37, seed=1)
ITEMS = integer_vectors(301, seed=3)  # ties are plenty, also between devices


@pytest.mark.parametrize("devices, k, item_block", [(2, 10, 16), (8, 1, 16), (8, 400, 99)])
def test_equals_a_stable_sort_less_what_is_excluded(devices, k, item_block, monkeypatch):
    monkeypatch.setattr(exact, "HOST_BLOCK_QUERIES", 16)
    exclude = rising_exclusions(37, 301, most=305)
    index = ExactIndex(ITEMS, mesh=make_mesh(devices), item_block=item_block)
    found = index.search(QUERIES, k, exclude=exclude)
    assert_same_lists(found, stable_sort(QUERIES, ITEMS, k, exclude))
    if k == 10:
        assert_same_lists(index.search(QUERIES, k), stable_sort(QUERIES, ITEMS, k))


@pytest.mark.parametrize("count", [0, 1, 7])
def test_fewer_items_than_devices(count):
    items = np.eye(8, dtype=np.float32)[:count]
    queries = np.ones((3, 8), np.float32)
    index = ExactIndex(items, mesh=make_mesh(8))
    assert_same_lists(index.search(queries, 4), ExactIndex(items).search(queries, 4))


def test_devices_hold_their_own_items_and_send_lists_alone():
    mesh = make_mesh(8)
    (block,) = ExactIndex(ITEMS, mesh=mesh)._blocks
    assert {shard.data.shape for shard in block.addressable_shards} == {(38, 5)}
    queries = np.zeros((4, 5), np.float32)
    pair = (np.zeros(1, np.int32), np.zeros(1, np.int32))
    program = exact_programs.block_search(mesh, 6, 1.0).lower(
        block, queries, *pair, np.int32(0), np.int32(301)
    )
    text = program.compile().as_text()
    gathered = [line for line in text.splitlines() if "all-gather" in line and "= " in line]
    assert gathered
    for line in gathered:
        assert "[4,48]" in line or "[8,4,6]" in line or "[4,8,6]" in line, line
    assert "all-to-all" not in text
    assert "all-reduce" not in text


def test_queries_that_cannot_be_ranked_are_refused():
    index = ExactIndex(ITEMS, mesh=make_mesh(8), normalized=True)
    with pytest.raises(QueryError, match="4 wide"):
        index.search(QUERIES[:, :4], 3)
    with pytest.raises(QueryError, match="is zero"):
        index.search(QUERIES * 0, 3)
    with pytest.raises(ValueError, match="k=0"):
        index.search(QUERIES + 9, 0)
    with pytest.raises(ValueError, match="exclude holds 1 lists"):
        index.search(QUERIES + 9, 3, exclude=Ragged.empty(1))
    assert len(jax.devices()) == 8
