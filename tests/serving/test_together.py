"""Requests that are answered together: each as it is answered alone, whatever stands beside it."""

import gc
import json
import types

import jax
import numpy as np
import pytest

from tests.index.fakes import ShallowIndex
from tests.serving.asking import ask, make_app, reply_together, watch_tower
from twotower.core.errors import ConfigError
from twotower.index.exact import ExactIndex
from twotower.index.vectors import append_coordinate
from twotower.retrieval.retriever import Retriever


@pytest.fixture(scope="module", params=[ExactIndex, ShallowIndex])
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
    # As many as an approximate index is searched for at once.
    made = [{"user_id": user} for user in users[:12]]
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


def encode_together(app):
    """Lets the tower encode several users at once, as a server does."""
    for answers in app.versions:
        answers.max_together = 64
    return app


def assert_alike(reply, alone):
    assert reply.status == alone.status_code, reply.body
    found = json.loads(reply.body)
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


@pytest.mark.parametrize("encodes_together", [True, False])
def test_requests_of_all_kinds_are_answered_as_alone(retriever, tmp_path, encodes_together):
    requests = bodies(retriever)
    apart = make_app(retriever, tmp_path / "apart")
    together = make_app(retriever, tmp_path / "together")
    if encodes_together:
        encode_together(together)
    alone = [ask(apart, "POST", "/v1/retrieve", body) for body in requests]
    assert {response.status_code for response in alone} == {200, 400}
    replies, _ = reply_together(together, requests)
    for reply, expected in zip(replies, alone):
        assert_alike(reply, expected)
    counted = [
        sorted(filter(counts, app.metrics.format().decode().splitlines()))
        for app in (apart, together)
    ]
    assert counted[0] and counted[0] == counted[1]
    assert together.metrics.batches._sum.get() == len(requests)


def counts(line):
    """Whether a line of metrics counts requests, or items by their source."""
    return line.startswith(("twotower_requests_total", "twotower_recommended_items_total"))


def test_one_call_of_the_tower_encodes_those_who_ask_alike(retriever, tmp_path, monkeypatch):
    items = retriever.bundle.items["item_id"].to_pylist()
    requests = [{"history": items[n : n + 4], "k": 5} for n in range(6)]
    sizes = watch_tower(retriever, monkeypatch)
    app = make_app(retriever, tmp_path)
    replies, _ = reply_together(encode_together(app), requests)
    assert {reply.status for reply in replies} == {200} and sizes == [6]
    # Where its programs are compiled for one user alone, it is called for each.
    app.answers.max_together = 1
    reply_together(app, requests)
    assert sizes == [6, *[1] * 6]


def test_plain_lists_are_made_together_and_costly_ones_one_by_one(retriever, tmp_path):
    users = retriever.bundle.users["user_id"].to_pylist()
    costly = [{"user_id": user, "diversity": 0.5, "max_per": {"brand": 1}} for user in users[:2]]
    cheap = [{"user_id": user} for user in users[:3]]
    wrong = {"user_id": users[0], "k": -1}
    app = make_app(retriever, tmp_path)
    replies, together = reply_together(app, [costly[0], *cheap, wrong, costly[1]])
    assert [reply.status for reply in replies] == [200] * 4 + [400, 200]
    # Those alike, and what is refused by its form.
    assert together == [False, True, True, True, True, False]


def test_where_a_batch_fails_each_is_answered_alone(retriever, tmp_path, monkeypatch):
    users = retriever.bundle.users["user_id"].to_pylist()[:3]
    requests = [{"user_id": user, "k": 4} for user in users]
    # Found out when items are compared with it, for all that ask so.
    requests += [{"user_id": user, "where": [["price", "<=", "much"]]} for user in users]
    apart = make_app(retriever, tmp_path)
    alone = [ask(apart, "POST", "/v1/retrieve", body) for body in requests]
    assert [each.status_code for each in alone] == [200] * 3 + [400] * 3
    for number in range(2):
        app = make_app(retriever, tmp_path / str(number))
        replies, _ = reply_together(app, requests)
        for reply, expected in zip(replies, alone):
            assert_alike(reply, expected)

        def fail(*_, **__):
            raise RuntimeError("a device is lost")

        monkeypatch.setattr(retriever, "recommend_each", fail)


def test_a_list_that_cannot_be_counted_is_a_failure_of_its_own(retriever, tmp_path, monkeypatch):
    users = retriever.bundle.users["user_id"].to_pylist()[:3]
    app = make_app(retriever, tmp_path)
    tell = app._tell_list

    def fail(answers, request, made):
        if request.user_id == users[1]:
            raise OSError("no space is left")
        tell(answers, request, made)

    monkeypatch.setattr(app, "_tell_list", fail)
    replies, _ = reply_together(app, [{"user_id": user} for user in users])
    assert [reply.status for reply in replies] == [200, 503, 200]


def test_one_that_cannot_be_compared_with_others_is_refused_alone(retriever, tmp_path, monkeypatch):
    users = retriever.bundle.users["user_id"].to_pylist()[:3]
    app = make_app(retriever, tmp_path)
    is_shaped = app.answers._is_shaped

    def fail(request, way):
        if request.user_id == users[1]:
            raise RecursionError("too deep")
        return is_shaped(request, way)

    monkeypatch.setattr(app.answers, "_is_shaped", fail)
    replies, together = reply_together(app, [{"user_id": user} for user in users])
    assert [reply.status for reply in replies] == [200, 400, 200]
    assert together == [True, False, True]


@pytest.mark.parametrize("option", [{"diversity": 0.5}, {"reasons": True}])
def test_lists_that_take_long_take_turns_of_their_own(retriever, tmp_path, option):
    users = retriever.bundle.users["user_id"].to_pylist()[:4]
    app = make_app(retriever, tmp_path)
    requests = [{"user_id": user, **(option if n % 2 else {})} for n, user in enumerate(users)]
    _, together = reply_together(app, requests)
    assert together == [True, False, True, False]


def test_refusals_of_many_leave_nothing_to_the_garbage_collector(retriever, tmp_path):
    users = retriever.bundle.users["user_id"].to_pylist()[:2]
    app = make_app(retriever, tmp_path)
    wrong = [{"user_id": user, "columns": ["prise"]} for user in users]
    reply_together(app, wrong)
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(each, Exception) for each in gc.get_objects())
        replies, _ = reply_together(app, wrong)
        assert {reply.status for reply in replies} == {400}
        assert sum(isinstance(each, Exception) for each in gc.get_objects()) == before
    finally:
        gc.enable()


def test_an_item_that_is_denied_and_in_a_history_counts_once(retriever, tmp_path):
    """More that is left out means more effort of an approximate index, and another list."""
    items = retriever.bundle.items["item_id"].to_pylist()
    asked = [{"rows": [{"history": items[n : n + 4]}]} for n in range(9)]
    options = {"k": 8, "deny": items[2:8]}
    together = retriever.recommend_each(asked, **options)
    for found, each in zip(together, asked):
        alone = retriever.recommend(**each, **options)
        assert [item.item_id for item in found] == [item.item_id for item in alone]


def test_lists_of_a_refused_batch_are_not_counted(retriever, tmp_path):
    users = retriever.bundle.users["user_id"].to_pylist()[:3]
    app = make_app(retriever, tmp_path)
    requests = [{"user_id": user} for user in users]
    wrong = {**requests[0], "columns": ["prise"]}
    batch = {"requests": [*requests, wrong]}
    assert ask(app, "POST", "/v1/retrieve/batch", batch).status_code == 400
    assert "twotower_recommended_items_total{" not in app.metrics.format().decode()
    assert ask(app, "POST", "/v1/retrieve/batch", {"requests": requests}).status_code == 200
    assert "twotower_recommended_items_total{" in app.metrics.format().decode()


@pytest.mark.parametrize("retriever", [ExactIndex], indirect=True)
def test_after_warming_no_requests_of_the_same_moment_compile(retriever, caplog):
    users = retriever.bundle.users["user_id"].to_pylist()
    items = retriever.bundle.items["item_id"].to_pylist()
    retriever.warm(8)
    with jax.log_compiles(True):
        for count in (1, 2, 5, 8):
            retriever.recommend_each([{"user": user} for user in users[:count]])
            retriever.recommend_each([{"user": user} for user in users[:count]], deny=items[:20])
            histories = [{"rows": [{"history": items[n : n + 9]}]} for n in range(count)]
            retriever.recommend_each(histories)
            retriever.recommend_each(histories, exclude_seen=False)
    assert "Compiling" not in caplog.text


def test_each_is_answered_by_its_version(retriever, tmp_path):
    users = retriever.bundle.users["user_id"].to_pylist()[:3]
    app = make_app(retriever, tmp_path)
    requests = [{"user_id": user} for user in users]
    requests[1]["model_version"] = "none"
    replies, _ = reply_together(app, requests)
    assert [reply.status for reply in replies] == [200, 404, 200]


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
