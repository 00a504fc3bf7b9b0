"""Bounds by client, the log and the figures that a server tells of what it serves."""

import json
import logging

from tests.serving.asking import TOKENS, ask, make_app
from twotower.serving.limits import Limits
from twotower.serving.monitoring.log import JsonFormatter, RequestLog
from twotower.serving.processes.rates import Rates


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
