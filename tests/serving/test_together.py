"""Requests that are answered together: each as it is answered alone, whatever stands beside it."""

import asyncio
import types

import numpy as np
import pytest

from tests.index.fakes import UnconditionalIndex
from tests.serving.asking import ask, make_app, send
from twotower.core.errors import ConfigError
from twotower.index.exact import ExactIndex
from twotower.index.vectors import append_coordinate
from twotower.retrieval.retriever import Retriever
from twotower.serving.limits import Limits
from twotower.serving.lists.together import MAX_TOGETHER, Together

BATCH = Limits(batch_us=2_000)


@pytest.fixture(scope="module", params=[ExactIndex, UnconditionalIndex])
def retriever(served, request):
    """With an index that is searched once for all, and with one that is searched for each alone."""
    loaded = Retriever.load(served)
    base = loaded._live.catalogue.snapshot.base
    vectors = np.asarray(base.vectors)
    if base.index.dim > vectors.shape[1]:
        vectors = append_coordinate(vectors, base.popularity_coordinate[0])
    # A frozen class: nobody else changes the index of a segment.
    object.__setattr__(base, "index", request.param(vectors))
    return loaded


def bodies(retriever):
    """Requests of all kinds, alike and not, and some that are refused."""
    users = retriever.bundle.users["user_id"].to_pylist()
    items = retriever.bundle.items["item_id"].to_pylist()
    made = [{"user_id": user} for user in users[:5]]
    made += [{"user_id": user, "history": items[n : n + 3]} for n, user in enumerate(users[5:8])]
    made += [{"history": items[n : n + 4]} for n in range(3)]
    made += [{"user_id": f"new-{n}", "features": {"city": "Riyadh"}} for n in range(2)]
    made += [{"user_id": user, "where": [["price", "<=", 10]]} for user in users[:3]]
    made += [{"user_id": user, "k": 3, "columns": []} for user in users[:2]]
    made += [{"user_id": user, "diversity": 0.5, "k": 4} for user in users[:2]]
    made += [{"like": items[:2]}, {"user_id": "nobody"}, {"user_id": users[0], "reasons": True}]
    made += [{"user_id": users[0], "boosts": [{"where": {"price": 3}, "factor": 2}]}]
    # Refused: a column that is none, and a feature that nothing reads.
    made += [{"user_id": users[1], "columns": ["prise"]}, {"features": {"town": "x"}}]
    return made


def ask_at_once(app, requests):
    async def gather():
        calls = [send(app, "POST", "/v1/retrieve", body) for body in requests]
        return await asyncio.gather(*calls)

    return asyncio.run(gather())


def assert_alike(response, alone):
    assert response.status_code == alone.status_code, response.text
    found = response.json()
    expected = alone.json()
    if alone.status_code != 200:
        assert found == expected
        return
    for name in ("known", "note", "model_version"):
        assert found.get(name) == expected.get(name)
    # The last bits are those of a product of matrices.
    scores = [item.pop("score", 0) for item in found["items"]]
    assert scores == pytest.approx([item.pop("score", 0) for item in expected["items"]], abs=1e-5)
    for item in [*found["items"], *expected["items"]]:
        if item.get("reason"):
            item["reason"]["change"] = round(item["reason"].get("change", 0), 4)
    assert found["items"] == expected["items"]


def test_requests_of_all_kinds_are_answered_as_alone(retriever, tmp_path):
    requests = bodies(retriever)
    apart = make_app(retriever, tmp_path / "apart")
    together = make_app(retriever, tmp_path / "together", limits=BATCH)
    alone = [ask(apart, "POST", "/v1/retrieve", body) for body in requests]
    assert {response.status_code for response in alone} == {200, 400}
    for response, expected in zip(ask_at_once(together, requests), alone):
        assert_alike(response, expected)
    counted = dict(
        line.split() for line in together.metrics.format().decode().splitlines() if line[0] != "#"
    )
    # All of them, in fewer batches than there are requests.
    assert float(counted["twotower_batch_requests_sum"]) == len(requests)
    assert float(counted["twotower_batch_requests_count"]) < len(requests) / 2


def test_one_call_of_the_tower_encodes_those_who_ask_alike(retriever, tmp_path, monkeypatch):
    items = retriever.bundle.items["item_id"].to_pylist()
    requests = [{"history": items[n : n + 4], "k": 5} for n in range(6)]
    sizes = []
    embed = type(retriever.bundle.towers).embed

    def count(self, side, features, **options):
        sizes.append(len(next(iter(features.values()))))
        return embed(self, side, features, **options)

    monkeypatch.setattr(type(retriever.bundle.towers), "embed", count)
    app = make_app(retriever, tmp_path, limits=BATCH)
    assert {each.status_code for each in ask_at_once(app, requests)} == {200}
    assert sizes == [6]


def test_where_a_batch_fails_each_is_answered_alone(retriever, tmp_path, monkeypatch):
    users = retriever.bundle.users["user_id"].to_pylist()[:3]
    requests = [{"user_id": user, "k": 4} for user in users]
    # Found out when items are compared with it, for all that ask so.
    requests += [{"user_id": user, "where": [["price", "<=", "much"]]} for user in users]
    apart = make_app(retriever, tmp_path)
    alone = [ask(apart, "POST", "/v1/retrieve", body) for body in requests]
    assert [each.status_code for each in alone] == [200] * 3 + [400] * 3
    for number in range(2):
        app = make_app(retriever, tmp_path / str(number), limits=BATCH)
        for response, expected in zip(ask_at_once(app, requests), alone):
            assert_alike(response, expected)

        def fail(*_, **__):
            raise RuntimeError("a device is lost")

        monkeypatch.setattr(retriever, "recommend_each", fail)


def test_what_was_collected_is_answered_when_the_server_stops(retriever, tmp_path):
    app = make_app(retriever, tmp_path, limits=Limits(batch_us=20_000))
    users = retriever.bundle.users["user_id"].to_pylist()[:4]

    async def stop_amid():
        calls = [send(app, "POST", "/v1/retrieve", {"user_id": user}) for user in users]
        tasks = [asyncio.create_task(call) for call in calls]
        while len(app._together._waiting) < len(users):
            await asyncio.sleep(0)
        app.drain()
        return await asyncio.gather(*tasks)

    for response in asyncio.run(stop_amid()):
        assert response.status_code == 200 and response.headers["connection"] == "close"


def test_batches_are_bounded_and_each_answer_is_its_own():
    sizes = []

    def double(numbers):
        return [2 * n if n % 10 else ValueError(str(n)) for n in numbers]

    async def ask_all(answer_all, count):
        together = Together(answer_all, 0.0, sizes.append)
        calls = [together.answer(number) for number in range(count)]
        return await asyncio.gather(*calls, return_exceptions=True)

    found = asyncio.run(ask_all(double, MAX_TOGETHER + 6))
    assert sizes == [MAX_TOGETHER, 6]
    for number, answer in enumerate(found):
        assert str(answer) == (str(2 * number) if number % 10 else str(number))
        assert isinstance(answer, ValueError) == (number % 10 == 0)

    def fail(numbers):
        raise KeyError("all")

    assert all(isinstance(each, KeyError) for each in asyncio.run(ask_all(fail, 3)))


@pytest.mark.parametrize("other", ["rerank", "shard_urls", "shard"])
def test_flags_that_no_batch_goes_with_are_refused(other, monkeypatch):
    from twotower.commands import serve

    names = ("bundles", "bundle", "shard_urls", "shard", "processes", "batch_us", "rerank")
    values: dict = dict.fromkeys(names) | {"processes": 1, "batch_us": 200}
    values[other] = {"rerank": "mmr", "shard_urls": ["http://127.0.0.1:1"], "shard": 0}[other]
    for name, value in values.items():
        monkeypatch.setattr(serve, f"_{name.upper()}", types.SimpleNamespace(value=value))
    with pytest.raises(ConfigError, match=r"--batch_us.* does not go with|not go with --batch_us"):
        serve._check_shard_flags()
