"""Bounds by client, the log and the figures that a server tells of what it serves."""

import json
import logging
import math

import numpy as np
import pytest

from tests.serving.asking import TOKENS, ask, make_app, post
from twotower.serving.limits import Limits
from twotower.serving.metrics import BUCKETS, Metrics
from twotower.serving.monitoring.log import JsonFormatter, RequestLog
from twotower.serving.monitoring.served import FEWEST, WAITING, Served, reference_of, stability
from twotower.serving.processes.rates import Rates
from twotower.serving.types import Answer, Item, Retrieve


def test_a_second_slides_over_all_processes(tmp_path):
    path = tmp_path / "rates"
    first, second = (Rates(10, 2, path=path, process=number, count=2) for number in range(2))
    taken = [first.take(0, 5.0) for _ in range(6)] + [second.take(0, 5.0) for _ in range(6)]
    assert taken == [True] * 10 + [False] * 2
    # Another client is not bounded by it.
    assert second.take(1, 5.0)
    # Half a second later half of the ten count.
    assert [second.take(0, 6.5) for _ in range(6)] == [True] * 5 + [False]
    assert first.take(0, 100.0)


def test_times_that_are_told_together_count_as_one_by_one():
    rng = np.random.default_rng(0)
    together = Metrics()
    one_by_one = Metrics()
    # Bounds of buckets belong to them; the last one has no bound.
    for seconds in [*rng.exponential(0.01, 200).tolist(), *BUCKETS, 0.0, 7.5]:
        together.count_request("retrieve", 200, "v", seconds)
        one_by_one._seconds.labels("retrieve", "v").observe(seconds)
    lines = [
        [
            line
            for line in metrics.format().decode().splitlines()
            if line.startswith("twotower_request_seconds_") and "created" not in line
        ]
        for metrics in (together, one_by_one)
    ]
    sums = [[line for line in part if "_sum" in line] for part in lines]
    assert [line for line in lines[0] if "_sum" not in line] == [
        line for line in lines[1] if "_sum" not in line
    ]
    first, second = (float(line.split()[-1]) for (line,) in sums)
    assert math.isclose(first, second) and len(lines[0]) == len(BUCKETS) + 3
    # What was told is told once.
    assert together.format() == together.format()


class OneMoment(Rates):
    """Rates of requests that all come at once, so that the clock decides nothing."""

    def take(self, client, now=None):
        return super().take(client, 1.0)


def test_a_client_that_asks_too_often_is_told_when_to_come_back(retriever, tmp_path):
    app = make_app(retriever, tmp_path, tokens=TOKENS, limits=Limits(rate=3))
    app.rates = OneMoment(3, app.access.clients)
    statuses = [ask(app, "GET", "/v1/info").status_code for _ in range(4)]
    assert statuses == [401, 401, 401, 429]
    named = {"x-api-key": TOKENS["read"]}
    responses = [ask(app, "GET", "/v1/info", headers=named) for _ in range(4)]
    assert [response.status_code for response in responses] == [200, 200, 200, 429]
    assert responses[3].headers["retry-after"] == "1"
    assert ask(app, "GET", "/readyz").status_code == 200


def test_the_log_is_json_and_says_nothing_of_a_person(capsys):
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("twotower.requests")
    logger.addHandler(handler)
    counts = []
    try:
        log = RequestLog(lambda *values: counts.append(values), 0.0)
        log("retrieve", 200, "abc", 0.001)
        log("retrieve", 500, "abc", 0.0015)
        logger.propagate = False
        try:
            raise ValueError("user 42")
        except ValueError:
            logger.exception("A request ended in a defect.")
    finally:
        logger.propagate = True
        logger.removeHandler(handler)
    assert len(counts) == 2
    line, defect = map(json.loads, capsys.readouterr().err.splitlines())
    assert line["request"] == "retrieve" and line["status"] == 500 and line["version"] == "abc"
    assert line["ms"] == 1.5 and line["level"] == "error"
    assert defect["exception"] == "ValueError" and "42" not in json.dumps(defect["message"])
    assert "test_monitoring.py" in defect["stack"][0] and "user" not in defect["message"]


def served(scores, ids, *, offset=0):
    """What a request for a list and its answer look like."""
    items = [Item(item, score, "model", {}) for item, score in zip(ids, scores)]
    return Retrieve(user_id="1", offset=offset), Answer("r", "v", items)


def test_scores_that_move_and_lists_that_narrow_are_told():
    rng = np.random.default_rng(0)
    figures = Served(rng.normal(size=5_000))
    for _ in range(2 * WAITING):
        figures.add(*served(rng.normal(size=10), rng.integers(1_000, size=10).astype(str)))
        # Another page, and somebody else's scale, are no drift.
        figures.add(*served(rng.normal(size=10) - 5, ["0"] * 10, offset=10))
    assert math.isnan(figures.look(1_000).drift)
    for _ in range(4):
        for _ in range(WAITING):
            figures.add(*served(rng.normal(size=10), rng.integers(1_000, size=10).astype(str)))
        figures.look(1_000)
    same = figures.look(1_000)
    assert same.drift < 0.05 and same.coverage > 0.9
    for _ in range(30):
        for _ in range(WAITING):
            figures.add(*served(rng.normal(size=10) + 1, [str(n) for n in range(10)]))
        figures.look(1_000)
    moved = figures.look(1_000)
    assert moved.drift > 0.25 and moved.coverage == 0.01 and moved.concentration == 1.0


def test_of_more_lists_than_are_counted_the_latest_are_left_out():
    """What is kept is bounded however many are asked for, and none of it is given up meanwhile."""
    figures = Served(np.zeros(0))
    for number in range(2 * WAITING):
        figures.add(*served([1.0], [str(number)]))
    # Each list shows an item of its own.
    assert figures.look(1_000).coverage == WAITING / 1_000
    assert set(figures._counts) == set(map(str, range(WAITING)))


def test_the_stability_of_scores_is_that_of_its_formula():
    counts = np.array([10, 20, 30, 40])
    shares = counts / 100
    expected = sum((p - 0.25) * math.log(p / 0.25) for p in shares)
    assert stability(counts) == pytest.approx(expected)


def test_a_bundle_tells_what_it_served_and_its_own_users_are_no_drift(retriever, tmp_path):
    app = make_app(retriever, tmp_path)
    app.answers.served = Served(reference_of(retriever))
    for user in retriever.bundle.users["user_id"].to_pylist()[:FEWEST]:
        post(app, "retrieve", user_id=user)
    app.answers.served.count()
    app._tell_figures()
    text = ask(app, "GET", "/metrics").text
    lines = [line.split() for line in text.splitlines() if not line.startswith("#")]
    told = {name: float(value) for name, value in lines}
    version = f'{{version="{app.answers.version}"}}'
    assert told[f"twotower_served_drift{version}"] < 0.1
    assert 0 < told[f"twotower_served_coverage{version}"] <= 1
    assert told[f"twotower_version_share{version}"] == 1
    assert told[f"twotower_version_age_seconds{version}"] > 0


def test_a_user_with_new_events_is_encoded_once_for_each_of_them(retriever, tmp_path):
    app = make_app(retriever, tmp_path)
    answers = app.answers
    user = retriever.bundle.users["user_id"][0].as_py()
    items = retriever.bundle.items["item_id"].to_pylist()
    for number in range(2):
        event = {"event_id": f"e{number}", "user_id": user, "item_id": items[number]}
        post(app, "events", events=[event])
        lists = [post(app, "retrieve", user_id=user, k=5)["items"] for _ in range(2)]
        assert lists[0] == lists[1]
        whole = retriever.recommend(user, events=items[: number + 1], k=5)
        assert [item["item_id"] for item in lists[0]] == [item.item_id for item in whole]
    assert (answers.cache.hits, answers.cache.misses) == (2, 2)
