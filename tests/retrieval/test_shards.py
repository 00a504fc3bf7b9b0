"""A bundle in shards against the bundle as it is."""

import dataclasses
import shutil

import numpy as np
import pyarrow as pa
import pytest

from tests.retrieval.runs import storing, write
from twotower.core.errors import BundleError, ChangesError, ConfigError
from twotower.core.files import current_version
from twotower.index.shards.divided import DividedIndex
from twotower.retrieval import golden
from twotower.retrieval.bundle import load_bundle
from twotower.retrieval.match import MatchModel
from twotower.retrieval.retriever import Retriever
from twotower.retrieval.shards.assign import rows_of_shards, shards_of
from twotower.retrieval.shards.shard import Shard

SHARDS = 3


def divided(run, folder, shards=SHARDS):
    """The folder of the run's bundle, in shards."""
    folder.mkdir(exist_ok=True)
    return write(dataclasses.replace(run, workdir=folder), shards=shards)


@pytest.fixture(scope="module")
def in_shards(run, tmp_path_factory):
    """The folder of the bundle: not to be changed."""
    return divided(run, tmp_path_factory.mktemp("divided"))


def lists(retriever, **options):
    users = retriever.bundle.users["user_id"][:8].to_pylist()
    return retriever.recommend_many(users, 7, **options)


def test_the_shard_of_an_item_stays_what_it_was():
    # Those of bundles that were written: a change would part them from their new items.
    ids = pa.chunked_array([["a", "item-1", "1"], ["", "äö"]])
    assert shards_of(ids, 1_000).tolist() == [345, 811, 553, 535, 43]
    rows = rows_of_shards(pa.chunked_array([[str(number) for number in range(30_000)]]), 3)
    assert all(abs(len(own) - 10_000) < 400 for own in rows)
    assert np.sort(np.concatenate(rows)).tolist() == list(range(30_000))
    with pytest.raises(ConfigError, match="--shards=6 are more than the 5 items"):
        rows_of_shards(ids, 6)


def test_a_divided_bundle_answers_as_the_whole_one_to_the_bit(in_shards, retriever):
    loaded = Retriever.load(in_shards)
    bundle = loaded.bundle
    assert isinstance(bundle.index, DividedIndex) and len(bundle.index.parts) == SHARDS
    for number, rows in enumerate(bundle.index.rows):
        of_rows = shards_of(bundle.items["item_id"].take(pa.array(rows)), SHARDS)
        assert set(of_rows.tolist()) == {number}
    np.testing.assert_array_equal(bundle.vectors, retriever.bundle.vectors)
    assert bundle.items.equals(retriever.bundle.items)
    item = bundle.items["item_id"][3].as_py()
    category = bundle.items["category"][0].as_py()
    for options in (
        {},
        {"exclude_seen": False, "where": {"category": category}},
        {"deny": [item], "rerank": "mmr:diversity=0.5"},
        {"allow": bundle.items["item_id"][:5].to_pylist()},
    ):
        assert lists(loaded, **options).equals(lists(retriever, **options))
    assert loaded.similar_items(item) == retriever.similar_items(item)


def test_changes_of_a_divided_bundle_go_to_the_shard_of_their_hash(in_shards, exported, tmp_path):
    folders = [shutil.copytree(x, tmp_path / str(n)) for n, x in enumerate((in_shards, exported))]
    retrievers = [Retriever.load(folder) for folder in folders]
    gone = retrievers[0].bundle.items["item_id"][2].as_py()
    vectors = retrievers[0].bundle.user_vectors[:4]
    for each in retrievers:
        each.upsert([{"item_id": f"new {number}"} for number in range(4)], vectors=vectors)
        each.delete([gone])
    assert lists(retrievers[0]).equals(lists(retrievers[1]))
    retrievers[0].compact()
    retrievers[1].compact()
    loaded = Retriever.load(folders[0])
    index = loaded.bundle.index
    assert isinstance(index, DividedIndex) and loaded.bundle.manifest["shards"] == SHARDS
    of_item = shards_of(loaded.bundle.items["item_id"], SHARDS)
    for number, rows in enumerate(index.rows):
        assert rows.tolist() == np.flatnonzero(of_item == number).tolist()
    assert "new 3" in loaded.bundle.items["item_id"].to_pylist()
    assert lists(loaded).equals(lists(Retriever.load(folders[1])))


def test_int8_vectors_and_popularity_are_those_of_the_whole(run, tmp_path):
    stored = storing(run, vectors="int8", popularity=True)
    whole = Retriever.load(divided(stored, tmp_path / "whole", 1))
    parts = Retriever.load(divided(stored, tmp_path / "parts"))
    np.testing.assert_array_equal(whole.bundle.vectors.codes, parts.bundle.vectors.codes)
    np.testing.assert_array_equal(whole.bundle.vectors.scales, parts.bundle.vectors.scales)
    for weight in (0.0, 0.7):
        options = {"popularity_weight": weight}
        assert lists(parts, **options).equals(lists(whole, **options))


def test_pairs_are_matched_by_the_vectors_of_all_shards(in_shards, exported):
    users = load_bundle(exported).users["user_id"][:3].to_pylist()
    items = load_bundle(exported).items["item_id"][-3:].to_pylist()
    scores = [MatchModel.load(folder).match(users, items) for folder in (in_shards, exported)]
    np.testing.assert_array_equal(*scores)


def test_shards_that_do_not_belong_together_are_refused(in_shards, tmp_path):
    folder = shutil.copytree(current_version(in_shards), tmp_path / "bundle")
    first = folder / "shards" / "0"
    first.rename(tmp_path / "kept")
    shutil.copytree(folder / "shards" / "1", first)
    with pytest.raises(BundleError, match="shards/0/.* is corrupt"):
        load_bundle(folder)
    shutil.rmtree(first)
    with pytest.raises(BundleError, match="shards/0/.* is missing"):
        load_bundle(folder)


class InProcess:
    """Shards of this process, of which some do not answer."""

    def __init__(self, folder):
        self.shards = [Shard.load(folder, number) for number in range(SHARDS)]
        self.silent = set()

    def search(self, queries):
        found = [shard.search(query) for shard, query in zip(self.shards, queries, strict=True)]
        return [None if n in self.silent else each for n, each in enumerate(found)]

    def vectors(self, rows):
        return [shard.vectors(own) for shard, own in zip(self.shards, rows, strict=True)]


@pytest.fixture(scope="module")
def apart(in_shards):
    """The bundle without its vectors, and its shards in objects of their own."""
    shards = InProcess(in_shards)
    return Retriever(load_bundle(in_shards, shards=shards)), shards


def test_shards_apart_answer_as_the_whole_bundle_to_the_bit(apart, retriever):
    router, _ = apart
    bundle = retriever.bundle
    item = bundle.items["item_id"][3].as_py()
    category = bundle.items["category"][0].as_py()
    for options in ({}, {"deny": [item], "rerank": "mmr:diversity=0.5"}):
        assert lists(router, **options).equals(lists(retriever, **options))
    # NumPy compares the items that satisfy conditions, whose sums depend on their number.
    for options in (
        {"exclude_seen": False, "where": {"category": category}},
        {"allow": bundle.items["item_id"][:5].to_pylist()},
        {"where": [("price", "latest", 9)]},
    ):
        found, expected = lists(router, **options), lists(retriever, **options)
        assert found.drop(["score"]).equals(expected.drop(["score"])) and len(found)
        np.testing.assert_allclose(found["score"], expected["score"], atol=1e-6)
    assert router.similar_items(item) == retriever.similar_items(item)
    assert router.popular_items() == retriever.popular_items()
    assert golden.make(router.bundle) == golden.make(bundle)
    rows = np.array([9, 2, 2, 30])
    np.testing.assert_array_equal(router.bundle.vectors[rows], bundle.vectors[rows])
    np.testing.assert_array_equal(router.bundle.vectors[1:4], bundle.vectors[1:4])


def test_without_a_shard_the_lists_are_those_of_the_others(apart, retriever, in_shards):
    router, shards = apart
    shards.silent = {1}
    missing = load_bundle(in_shards).index.rows[1]
    gone = retriever.bundle.items["item_id"].take(pa.array(missing)).to_pylist()
    assert lists(router).equals(lists(retriever, deny=gone))
    shards.silent = set()


def test_what_shards_apart_do_not_answer_is_said(apart, in_shards, exported, tmp_path):
    router, _ = apart
    with pytest.raises(ConfigError, match="popularity_weight=1.0 is not answered by shards"):
        lists(router, popularity_weight=1.0)
    with pytest.raises(ChangesError, match="change the bundle in one process, compact it"):
        router.upsert([{"item_id": "a"}], vectors=router.bundle.user_vectors[:1])
    with pytest.raises(ConfigError, match="--shard=3: .* has 3 shards, from 0 on"):
        Shard.load(in_shards, SHARDS)
    with pytest.raises(ConfigError, match="--shard=0: .* has no shards. `twotower export --shards"):
        Shard.load(exported, 0)
    changed = shutil.copytree(in_shards, tmp_path / "changed")
    Retriever.load(changed).delete([router.bundle.items["item_id"][0].as_py()])
    for load in (
        lambda: Shard.load(changed, 0),
        lambda: load_bundle(changed, shards=InProcess(in_shards)),
    ):
        with pytest.raises(ConfigError, match=r"holds 1 changes, .*changed'\).compact"):
            load()


def test_a_shard_reads_its_own_files_and_a_router_no_vectors(in_shards, tmp_path):
    folder = shutil.copytree(current_version(in_shards), tmp_path / "bundle")
    for path in sorted(folder.rglob("*")):
        own = path.is_relative_to(folder / "shards" / "1")
        if path.is_file() and not own and path.name not in ("manifest.json", "config.json"):
            path.unlink()
    assert Shard.load(folder, 1).number == 1
    folder = shutil.copytree(current_version(in_shards), tmp_path / "router")
    for path in (folder / "shards").rglob("*"):
        if path.is_file() and (path.parent.name == "index" or path.name == "item_vectors.npy"):
            path.unlink()
    shards = InProcess(in_shards)
    assert len(Retriever(load_bundle(folder, shards=shards)).recommend("new", k=3)) == 3
