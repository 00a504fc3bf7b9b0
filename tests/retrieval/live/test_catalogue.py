"""Changes to a loaded bundle: searchable at once, durable, whole at every moment, and in the next
version of the bundle."""

import concurrent.futures
import pathlib
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from twotower.core import files
from twotower.core.errors import ChangesError, UnknownItemError
from twotower.retrieval.bundle import load_bundle
from twotower.retrieval.live import live_bundle
from twotower.retrieval.retriever import Retriever

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(exported, tmp_path):
    """A bundle that a test may change."""
    shutil.copytree(exported, tmp_path / "bundle")
    return tmp_path / "bundle"


USERS = []  # the busiest of the bundle as it was exported


@pytest.fixture(autouse=True, scope="module")
def users(retriever):
    rows = np.argsort(-retriever.bundle.seen.lengths)[:5]
    USERS[:] = retriever.bundle.users["user_id"].take(rows).to_pylist()


def ids(found):
    return [item.item_id for item in found]


def lists_of(retriever, k=20, **options):
    return retriever.recommend_many(USERS, k=k, **options).to_pydict()


def change(retriever):
    """New, changed and deleted items; what is left of them."""
    best = ids(retriever.recommend(USERS[0], k=3))
    retriever.upsert(
        [
            {"item_id": "new1", "price": 3.0, "title": "first"},
            {"item_id": "new2", "price": 900.0, "category": "c"},
        ]
    )
    retriever.upsert([{"item_id": best[1], "price": 5.0, "title": "changed"}])
    assert retriever.delete([best[0], "new2", "never"]) == 2
    return {"there": ["new1", best[1]], "gone": [best[0], "new2"]}


def check_changed(retriever, changed, before):
    size = before  # new1 came, the best of a user went
    assert len(retriever) == size
    everything = lists_of(retriever, k=size + 10, exclude_seen=False)
    assert set(changed["there"]) <= set(everything["item_id"]) and not set(changed["gone"]) & set(
        everything["item_id"]
    )
    assert len(everything["item_id"]) == 5 * size
    # Ids alone are read otherwise than rows with their columns.
    for lists in zip(retriever.popular_items(size), retriever.popular_items(size, columns=())):
        assert lists[0].item_id == lists[1].item_id
    for item in changed["there"]:
        shown = retriever.item(item)
        vector = retriever.encode_items([{"item_id": item, "price": shown.display["price"]}])[0]
        for user in USERS:
            score = dict(
                zip(*[lists_of_user(everything, user, name) for name in ("item_id", "score")])
            )[item]
            row = retriever.bundle.users["user_id"].to_pylist().index(user)
            assert score == pytest.approx(
                float(vector @ retriever.bundle.user_vectors[row]), abs=1e-5
            )
    assert retriever.item(changed["there"][1]).display["title"] == "changed"
    with pytest.raises(UnknownItemError):
        retriever.similar_items(changed["gone"][0])


def lists_of_user(lists, user, column):
    return [value for u, value in zip(lists["user_id"], lists[column]) if u == user]


def test_changes_are_searchable_at_once_survive_a_restart_and_a_compaction(folder):
    retriever = Retriever.load(folder)
    before = len(retriever)
    changed = change(retriever)
    check_changed(retriever, changed, before)
    answers = lists_of(retriever)
    assert lists_of(Retriever.load(folder)) == answers
    for next_step in (retriever.rebalance, retriever.compact, lambda: None):
        next_step()
        for each in (retriever, Retriever.load(folder)):
            check_changed(each, changed, before)
            assert lists_of(each)["item_id"] == answers["item_id"]
            np.testing.assert_allclose(lists_of(each)["score"], answers["score"], atol=1e-6)
    bundle = load_bundle(folder)
    assert (
        len(bundle.items) == before
        and bundle.manifest["compactions"] == 1
        and not set(changed["gone"]) & set(bundle.items["item_id"].to_pylist())
    )
    # The log that was beside the old version is gone, and what was done since is none yet.
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "current", "v-1", "v-2"]
    retriever.upsert([{"item_id": "after", "price": 1.0}])
    assert retriever.delete(["new1"]) == 1
    again = Retriever.load(folder)
    assert again.item("after") and len(again) == before
    with pytest.raises(UnknownItemError):
        again.item("new1")


def test_a_new_item_is_embedded_from_its_features_alone(folder):
    """What the item tower makes of a row of the corpus under a new name is near it: but for the id
    they are one item."""
    retriever = Retriever.load(folder)
    row = retriever.bundle.items.slice(7, 1).to_pylist()[0]
    retriever.upsert([row | {"item_id": "copy"}])
    expected = retriever.encode_items([row | {"item_id": "copy"}])[0]
    other = retriever.encode_items([row | {"item_id": "copy", "price": 1e6}])[0]
    assert not np.allclose(expected, other)
    found = {
        item.item_id: item.score
        for item in retriever.similar_items(row["item_id"], k=len(retriever))
    }
    assert found["copy"] == pytest.approx(float(expected @ retriever.bundle.vectors[7]), abs=1e-5)
    assert retriever.item("copy").display == {
        name: value for name, value in row.items() if name != "item_id"
    }


def test_seen_items_stay_seen_whatever_happens_to_them(folder):
    retriever = Retriever.load(folder)
    user = USERS[0]
    seen = ids(retriever.latest_items(user, 100))
    retriever.upsert([{"item_id": seen[0], "price": 1.0}])
    retriever.delete(seen[1:2])
    size = len(retriever)
    for _ in range(3):
        found = ids(retriever.recommend(user, k=size))
        assert not set(found) & set(seen) and len(found) == size - len(seen) + 1
        assert ids(retriever.latest_items(user, 100)) == [seen[0], *seen[2:]]
        retriever.compact()


def test_lists_under_conditions_hold_what_is_allowed_and_nothing_else(folder):
    retriever = Retriever.load(folder)
    change(retriever)
    every = {i.item_id: i for i in retriever.recommend("nobody", k=len(retriever))}
    user = USERS[0]
    seen = set(ids(retriever.latest_items(user, 10_000)))
    ranking = [
        item for item in ids(retriever.recommend(user, k=len(retriever), exclude_seen=False))
    ]
    for category in {item.display["category"] for item in every.values()} - {None}:
        allowed = [i for i in ranking if every[i].display["category"] == category and i not in seen]
        assert ids(retriever.recommend(user, k=5, where={"category": category})) == allowed[:5]
        table = retriever.recommend_many(
            [user, "nobody"], k=5, where=[("category", "==", category)], deny=allowed[:2]
        )
        assert lists_of_user(table.to_pydict(), user, "item_id") == allowed[2:7]
    assert ids(
        retriever.recommend(
            user, k=9, allow=["new1", "new2", ranking[4], "never"], exclude_seen=False
        )
    ) == [i for i in ranking if i in ("new1", ranking[4])]
    assert ids(retriever.recommend(user, k=3, allow=[])) == []
    assert (
        ids(retriever.recommend(user, k=3, deny=["new1", *ranking[:30]], exclude_seen=False))
        == [i for i in ranking[30:] if i != "new1"][:3]
    )
    assert "new1" in ids(retriever.similar_items(ranking[0], k=5, where={"title": "first"}))


def test_what_is_not_usable_changes_nothing(folder):
    retriever = Retriever.load(folder)
    before = lists_of(retriever)
    for rows, options in (
        ([{"price": 1.0}], {}),
        ([{"item_id": "a"}, {"item_id": "a"}], {}),
        ([{"item_id": "a"}], {"vectors": np.full((1, 16), np.nan)}),
        ([{"item_id": "a"}], {"vectors": np.ones((1, 15))}),
        ([{"item_id": "a"}], {"vectors": np.zeros((1, 16))}),
        ([{"item_id": "a", "price": "much"}], {}),
    ):
        with pytest.raises(ValueError):
            retriever.upsert(rows, **options)
    assert retriever.delete(["never"]) == 0 and retriever.upsert([]) == len(retriever)
    assert lists_of(retriever) == before
    assert not list(folder.rglob("*.changes"))


def test_a_compaction_builds_the_index_as_the_one_before(folder, monkeypatch):
    """Not all builds are compared again."""
    retriever = Retriever.load(folder)
    before = retriever.bundle.index
    models = []

    def build(config, vectors, counts, users, like, shards):
        models.append(like)
        return original(config, vectors, counts, users, like, shards)

    original = live_bundle.index_items
    monkeypatch.setattr(live_bundle, "index_items", build)
    change(retriever)
    retriever.compact()
    assert models[-1] is before


def test_a_bundle_in_memory_is_not_changed(retriever):
    import dataclasses

    unsaved = Retriever(dataclasses.replace(retriever.bundle, folder=None))
    with pytest.raises(ChangesError, match="Export it"):
        unsaved.upsert([{"item_id": "a", "price": 1.0}])
    with pytest.raises(ChangesError, match="Export it"):
        unsaved.compact()


def test_a_damaged_log_is_refused_and_one_of_another_version_is_told(folder, caplog):
    retriever = Retriever.load(folder)
    change(retriever)
    (log,) = folder.glob("*.changes")
    data = log.read_bytes()
    at = data.index(b"changed")
    log.write_bytes(data[:at] + b"x" + data[at + 1 :])
    with pytest.raises(ChangesError, match=f"{log.name} is damaged"):
        Retriever.load(folder)
    log.rename(log.with_name("v-0.0123456789abcdef.changes"))
    assert len(Retriever.load(folder)) == len(retriever.bundle.items)
    assert "another version of the bundle" in caplog.text


def test_a_bundle_without_versions_is_changed_and_gets_them(exported_files, tmp_path):
    """As an older twotower wrote it, or copied out of one with versions."""
    folder = shutil.copytree(exported_files, tmp_path / "plain")
    retriever = Retriever.load(folder)
    before = len(retriever)
    changed = change(retriever)
    (log,) = tmp_path.glob("plain.*.changes")
    answers = lists_of(retriever)
    assert lists_of(Retriever.load(folder)) == answers
    retriever.compact()
    assert not log.exists()
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "current", "v-1"]
    for each in (retriever, Retriever.load(folder)):
        check_changed(each, changed, before)


def test_two_processes_take_turns_at_changing_a_bundle(folder):
    """Neither loses what the other was acknowledged, and both see it when they change something."""
    mine = Retriever.load(folder)
    theirs = Retriever.load(folder)
    mine.upsert([{"item_id": "mine", "price": 1.0}])
    with pytest.raises(UnknownItemError):
        theirs.item("mine")
    theirs.upsert([{"item_id": "theirs", "price": 2.0}])
    assert theirs.item("mine").display["price"] == 1.0
    assert mine.delete(["theirs"]) == 1
    again = Retriever.load(folder)
    assert again.item("mine") and len(again) == len(mine) == len(mine.bundle.items) + 1
    with pytest.raises(UnknownItemError):
        again.item("theirs")


def test_a_version_that_was_replaced_takes_no_more_changes(folder):
    """They would be acknowledged and lost."""
    stale = Retriever.load(folder)
    other = Retriever.load(folder)
    other.upsert([{"item_id": "kept", "price": 1.0}])
    other.compact()
    for attempt in (
        lambda: stale.upsert([{"item_id": "lost", "price": 1.0}]),
        lambda: stale.delete([USERS[0], "kept"]),
        stale.compact,
    ):
        with pytest.raises(ChangesError, match="replaced by another version .v-2.*Load the bundle"):
            attempt()
    assert stale.recommend(USERS[0], k=3)
    assert Retriever.load(folder).item("kept")


@pytest.mark.parametrize("step", ["write_bundle", "publish_version", "unlink"])
def test_a_compaction_that_is_killed_loses_nothing(folder, monkeypatch, step):
    """Killed after each step, with nothing tidied up; another change was made meanwhile."""
    retriever = Retriever.load(folder)
    before = len(retriever)
    changed = change(retriever)

    class Killed(BaseException):
        pass

    def killed(*args, **options):
        function(*args, **options)
        raise Killed

    owner = pathlib.Path if step == "unlink" else live_bundle
    function = getattr(owner, step)
    compact = retriever._live.compact
    with monkeypatch.context() as patch, pytest.raises(Killed):
        for module in (live_bundle, files):
            patch.setattr(module, "discard", lambda path: None)
        if step == "write_bundle":
            patch.setattr(owner, step, killed)
        compaction = compact()
        retriever.upsert([{"item_id": "meanwhile", "price": 1.0}])
        patch.setattr(owner, step, killed)
        retriever._live.switch_to(compaction)
    again = Retriever.load(folder)
    if step != "write_bundle":
        assert again.item("meanwhile")
        assert again.delete(["meanwhile"]) == 1
    check_changed(again, changed, before)


WRITER = """if True:
    import itertools, sys, threading
    from twotower.retrieval.retriever import Retriever
    retriever = Retriever.load(sys.argv[1])
    def compact():
        while True:
            retriever.compact()
    threading.Thread(target=compact, daemon=True).start()
    vectors = retriever.bundle.vectors[:1]
    for n in itertools.count():
        retriever.upsert([{"item_id": f"n{n}", "price": float(n)}], vectors=vectors)
        if n % 3 == 2:
            retriever.delete([f"n{n - 1}"])
        print(n, flush=True)
"""


def test_killed_at_any_moment_nothing_acknowledged_is_lost(folder):
    """A process that changes a bundle and compacts it all the while."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    done = -1
    for line in writer.stdout:
        done = int(line)
        if done >= 40:
            writer.kill()
            break
    done = max([done, *map(int, writer.stdout.read().split())])
    writer.wait()
    assert done >= 40
    retriever = Retriever.load(folder)
    deleted = {f"n{n - 1}" for n in range(2, done + 1, 3)}
    known = {f"n{n}" for n in range(done + 1)} - deleted
    everything = ids(retriever.recommend("nobody", k=len(retriever)))
    found = {item for item in everything if item[0] == "n" and item[1:].isdigit()}
    assert known <= found
    assert found - known <= {f"n{done + 1}"}  # which may have been made or not
    assert all(retriever.item(f"n{n}").display["price"] == n for n in range(0, done, 3))


def write_pairs(retriever, name):
    """Changes a pair of items together, and takes it away after every third time."""
    vectors = retriever.bundle.vectors[3:5]
    for n in range(60):
        rows = [{"item_id": f"{name}{part}", "price": float(n)} for part in ("a", "b")]
        retriever.upsert(rows, vectors=vectors)
        if n % 3 == 2:
            assert retriever.delete([f"{name}a", f"{name}b"]) == 2


def read_pairs(retriever, steady, size, stop):
    """Asks for everything until told to stop."""
    while not stop.is_set():
        everything = retriever.recommend("nobody", k=size + 9)
        prices = {item.item_id: item.display["price"] for item in everything}
        for name in ("p", "q"):
            assert prices.get(f"{name}a") == prices.get(f"{name}b")
        assert steady in prices
        assert size <= len(prices) <= size + 4


def test_answers_of_many_threads_are_of_one_moment(folder):
    """A pair of items is changed, taken away and brought back together: nobody ever sees one
    without the other, or two generations of them; items never touched are always there."""
    retriever = Retriever.load(folder)
    steady = retriever.bundle.items["item_id"][3].as_py()
    size = len(retriever)
    stop = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read_pairs, retriever, steady, size, stop) for _ in range(2)]
        writers = [pool.submit(write_pairs, retriever, name) for name in ("p", "q")]
        try:
            retriever.rebalance()
            retriever.compact()
            for writer in writers:
                writer.result()
        finally:
            stop.set()
        for reader in readers:
            reader.result()
    assert len(retriever) == len(Retriever.load(folder)) == size
