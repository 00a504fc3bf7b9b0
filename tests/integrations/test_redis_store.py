"""Redis: what is published is found, whole versions only; without Redis everything goes on. A real
server, on loopback."""

import dataclasses
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.extras import extra, program
from tests.integrations.test_embedding_history import block
from twotower.core.errors import ConfigError, QueryError, StoreError
from twotower.core.install import install_line
from twotower.integrations.embedding_history import vector_blocks
from twotower.integrations.redis_store import CachedRetriever, RedisStore, bundle_version
from twotower.retrieval.retriever import Retriever

pytestmark = pytest.mark.slow

redis = extra("redis", "redis")


class Server:
    """A redis-server on a free port of loopback, without files."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder = folder
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        options = [
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            str(self.folder),
        ]
        self.process = subprocess.Popen(
            [program("redis-server", "redis-server"), *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.client = redis.Redis(port=self.port)
        for _ in range(200):
            try:
                return self.client.ping()
            except redis.ConnectionError:
                assert self.process.poll() is None, "redis-server ended"
                time.sleep(0.05)
        raise AssertionError("redis-server did not answer")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def own_server(tmp_path):
    """A server that a test may end and start again."""
    server = Server(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def server(started):
    started.client.flushall()
    return started


@pytest.fixture
def store(server):
    return RedisStore(server.url, name="shop", timeout=5.0, retry_after=0.0)


def test_the_vectors_of_a_bundle_are_found_by_id(store, retriever):
    counts = store.publish(bundle_version(retriever), vector_blocks(retriever, block=16))
    ids = retriever.bundle.items["item_id"].to_pylist()
    vectors, found = store.vectors("item", [ids[5], "nothing", ids[0]])
    np.testing.assert_array_equal(vectors[[0, 2]], retriever.bundle.vectors[[5, 0]])
    assert found.tolist() == [True, False, True] and not vectors[1].any()
    users = retriever.bundle.users["user_id"].to_pylist()
    np.testing.assert_allclose(
        store.vectors("user", users)[0], retriever.embed_users(users), atol=1e-6
    )
    assert counts == {"user": len(users), "item": len(ids)}


def test_every_key_lives_as_long_as_it_was_told(server, store):
    store.publish("v1", {"item": [block(20)]}, ttl=500)
    keys = list(server.client.scan_iter())
    assert len(keys) == 21 and all(0 < server.client.ttl(key) <= 500 for key in keys)


def test_many_vectors_take_few_round_trips(server, store):
    before = server.client.info("commandstats").get("cmdstat_set", {"calls": 0})["calls"]
    reads = server.client.info("stats")["total_reads_processed"]
    store.publish("v1", {"item": [block(10_000)]})
    after = server.client.info("stats")["total_reads_processed"]
    assert server.client.info("commandstats")["cmdstat_set"]["calls"] - before == 10_001
    assert after - reads < 500  # reads of the server's socket, of up to 16 kB each


def test_readers_find_the_older_version_until_the_new_one_is_whole(store):
    ids, old = block(30)
    _, new = block(30, seed=1)
    store.publish("v1", {"item": [(ids, old)]})

    def blocks():
        for start in (0, 10, 20):
            yield ids.slice(start, 10), new[start : start + 10]
            np.testing.assert_array_equal(store.vectors("item", ids.to_pylist())[0], old)

    store.publish("v2", {"item": blocks()})
    np.testing.assert_array_equal(store.vectors("item", ids.to_pylist())[0], new)
    assert store.current() == {"version": "v2", "width": 4}


def test_publishing_that_fails_in_the_middle_leaves_the_older_version_current(store):
    ids, old = block(30)
    store.publish("v1", {"item": [(ids, old)]})
    bad = np.full((30, 4), np.nan, np.float32)
    with pytest.raises(QueryError, match="item vector 0 is not finite"):
        store.publish("v2", {"item": [block(30, seed=1), (ids, bad)]})
    np.testing.assert_array_equal(store.vectors("item", ids.to_pylist())[0], old)


def test_a_server_without_memory_refuses_and_the_older_version_stays(server, store):
    store.publish("v1", {"item": [block(3)]})
    server.client.config_set("maxmemory", 1)
    try:
        with pytest.raises(StoreError, match="the older ones stay current: .*OOM|maxmemory"):
            store.publish("v2", {"item": [block(3)]})
    finally:
        server.client.config_set("maxmemory", 0)
    assert store.current()["version"] == "v1"


def test_odd_ids_stay_apart_and_models_do_not_meet(server, store):
    names = ["1", "item:1", "a b", "ü\n", "1:", "", "x" * 5000, "*"]
    vectors = np.arange(len(names) * 4, dtype=np.float32).reshape(-1, 4)
    store.publish("v1", {"item": [(pa.array(names), vectors)], "user": [block(2)]})
    np.testing.assert_array_equal(store.vectors("item", names)[0], vectors)
    assert store.vectors("item", ["\ud800", "1"])[1].tolist() == [False, True]
    other = RedisStore(server.url, name="other", timeout=5.0)
    assert other.current() is None and other.vectors("item", names)[1].tolist() == [False] * len(
        names
    )
    with pytest.raises(ConfigError, match="name='a:b' must be of"):
        RedisStore(server.url, name="a:b")


def test_a_value_of_another_length_is_not_found(server, store):
    store.publish("v1", {"item": [block(2)]})
    server.client.set("shop:v1:item:e0", b"abc")
    assert store.vectors("item", ["e0", "e1"])[1].tolist() == [False, True]
    assert store.vectors("item", [])[0].shape == (0, 0)


def test_lists_come_from_redis_and_are_the_retrievers(server, store, retriever):
    cached = CachedRetriever(retriever, store, ttl=60)
    user = retriever.bundle.users["user_id"][0].as_py()
    for asked in (user, "nobody"):
        for exclude in (True, False):
            for _ in range(2):
                found = cached.recommend(asked, k=3, exclude_seen=exclude)
                expected = retriever.recommend(asked, k=3, exclude_seen=exclude)
                assert list(found) == list(expected) and found.known == expected.known
    keys = list(server.client.scan_iter("shop:*:list:*"))
    assert len(keys) == 4 and all(0 < server.client.ttl(key) <= 60 for key in keys)
    key = f"shop:{bundle_version(retriever)}.0:list:3:1:{user}"
    server.client.set(key, '{"known": true, "items": [["from redis", 1.5, {}]]}')
    assert [item.item_id for item in cached.recommend(user, k=3)] == ["from redis"]
    unwritten = Retriever(dataclasses.replace(retriever.bundle, manifest={}, folder=None))
    with pytest.raises(StoreError, match="a bundle that was not written has no version"):
        CachedRetriever(unwritten, store)
    assert "from redis" not in [item.item_id for item in cached.recommend(user, k=4)]


def test_no_list_outlives_a_change_of_the_items(store, workdir, tmp_path):
    shutil.copytree(workdir / "bundle", tmp_path / "bundle")
    live = Retriever.load(tmp_path / "bundle")
    cached = CachedRetriever(live, store)
    user = live.bundle.users["user_id"][0].as_py()
    best = cached.recommend(user, k=3)[0].item_id
    live.delete([best])
    assert best not in [item.item_id for item in cached.recommend(user, k=3)]


@pytest.mark.parametrize(
    "garbage",
    [b"", b"{", b"[]", b"7", b'{"known": true}', b'{"known": true, "items": [[1]]}', b"\xff"],
)
def test_what_is_no_list_is_answered_anew(server, store, retriever, garbage):
    cached = CachedRetriever(retriever, store)
    server.client.set(f"shop:{bundle_version(retriever)}.0:list:3:1:1", garbage)
    assert list(cached.recommend("1", k=3)) == list(retriever.recommend("1", k=3))
    server.client.set("shop:current", garbage)
    assert store.current() is None and not store.vectors("item", ["1"])[1].any()


def test_without_redis_work_goes_on_and_with_it_again_too(own_server, retriever):
    store = RedisStore(own_server.url, timeout=5.0, retry_after=0.0)
    cached = CachedRetriever(retriever, store)
    store.publish("v1", {"item": [block(3)]})
    own_server.stop()
    assert list(cached.recommend("1", k=3)) == list(retriever.recommend("1", k=3))
    assert store.vectors("item", ["e0"])[0].shape == (1, 0) and store.current() is None
    with pytest.raises(StoreError, match="Redis did not take the vectors"):
        store.publish("v2", {"item": [block(3)]})
    own_server.start()
    cached.recommend("1", k=3)
    assert own_server.client.dbsize() == 1


class Deaf:
    """Takes connections and never answers; counts them."""

    def __enter__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.connections = []
        self.thread = threading.Thread(target=self.accept)
        self.thread.start()
        return self

    def accept(self):
        try:
            while True:
                self.connections.append(self.socket.accept()[0])
        except OSError:
            pass

    def __exit__(self, *exception):
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.thread.join()
        for connection in self.connections:
            connection.close()


@pytest.mark.parametrize("retry_after, times", [(3600.0, 1), (0.0, 6)])
def test_a_redis_that_does_not_answer_is_asked_once_and_then_left_alone(
    retriever, retry_after, times
):
    """Each of three questions would ask twice (for the list, and to keep it); the client's own
    retries would add to that."""
    with Deaf() as deaf:
        url = f"redis://127.0.0.1:{deaf.socket.getsockname()[1]}/0"
        cached = CachedRetriever(retriever, RedisStore(url, timeout=0.01, retry_after=retry_after))
        for _ in range(3):
            assert list(cached.recommend("1", k=3)) == list(retriever.recommend("1", k=3))
    assert len(deaf.connections) == times


def test_urls_and_the_extra_are_checked_and_no_password_is_shown(monkeypatch):
    with pytest.raises(
        ConfigError, match="the Redis URL that begins with 'http' cannot be used"
    ) as error:
        RedisStore("http://:secret@localhost")
    assert "secret" not in str(error.value)
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(
        ConfigError, match=r"Redis needs the extra 'redis' .*" + re.escape(install_line("redis"))
    ):
        RedisStore("redis://localhost")


def test_the_command_publishes_a_bundle(server, store, workdir, retriever):
    command = [
        sys.executable,
        "-m",
        "experiments.publish",
        f"--workdir={workdir}",
        f"--redis={server.url}",
        "--name=shop",
    ]
    where = {"cwd": Path(__file__).parents[2], "env": os.environ | {"JAX_PLATFORMS": "cpu"}}
    done = subprocess.run(command, capture_output=True, text=True, **where)
    assert done.returncode == 0, done.stderr
    assert (
        store.current()["version"] == bundle_version(retriever)
        and "item vectors, for 86,400 seconds" in done.stdout
    )
    ids = retriever.bundle.items["item_id"].to_pylist()
    np.testing.assert_array_equal(store.vectors("item", ids)[0], retriever.bundle.vectors)


def test_a_server_finds_the_vectors_of_new_users_and_goes_on_without_redis(own_server, retriever):
    pytest.importorskip("msgspec")
    from twotower.serving.answers import Answers
    from twotower.serving.types import Retrieve

    store = RedisStore(own_server.url, timeout=5.0, retry_after=0.0)
    vectors = np.asarray(retriever.bundle.user_vectors[:1])
    store.publish(bundle_version(retriever), {"user": [(pa.array(["new"]), vectors)]})
    answers = Answers(retriever, find_vector=store.user_vector)
    request = Retrieve(user_id="new", k=5, exclude_seen=False)
    known = Retrieve(user_id=retriever.bundle.users["user_id"][0].as_py(), k=5, exclude_seen=False)

    def listed(request):
        return [item.item_id for item in answers.retrieve(request).items]

    assert listed(request) == listed(known) and not answers.retrieve(request).known
    # Somebody of whom Redis knows nothing either.
    assert answers.retrieve(Retrieve(user_id="other", k=5)).items[0].source != "model"
    own_server.stop()
    assert answers.retrieve(request).items[0].source != "model"
    own_server.start()
    assert listed(request) != listed(known)
    store.publish(bundle_version(retriever), {"user": [(pa.array(["new"]), vectors)]})
    assert listed(request) == listed(known)
