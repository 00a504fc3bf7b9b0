"""Random and hostile requests against the API in this process; `experiments.benchmarks.fuzz_api`
sends thousands, and measures memory."""

import json

import pytest

from experiments.benchmarks.fuzz_api import (
    TOKEN,
    Case,
    InProcess,
    Response,
    attack,
    check,
    fuzz,
)
from tests.serving.asking import make_app
from twotower.retrieval.retriever import Retriever


@pytest.fixture
def server(copied, tmp_path):
    retriever = Retriever.load(copied)
    made = InProcess(make_app(retriever, tmp_path, tokens={"admin": TOKEN}))
    yield made
    made.close()


def test_hostile_bodies_change_nothing_and_are_told_nothing(server, copied):
    outcomes = attack(server, str(copied), 300)
    assert outcomes["400"] > 200 and outcomes["200"] > 3


@pytest.mark.slow
def test_cases_of_the_description_are_answered_as_it_says(server, copied):
    outcomes = fuzz(server, str(copied), 500)
    assert outcomes.total() >= 450 and outcomes["200"] > 30 and outcomes["400"] > 60


@pytest.mark.parametrize(
    "status, text",
    [
        (500, "The server failed."),
        (400, 'Traceback: File "/usr/lib/x.py", line 3, in f'),
        (400, "FOLDER/items.arrow is damaged."),
        (400, "msgspec 0.19 cannot read it."),
    ],
)
def test_answers_that_tell_too_much_are_found(status, text):
    """The check itself."""
    body = json.dumps({"status": status, "detail": text}).encode()
    response = Response(status, {"content-type": "application/problem+json"}, body)
    case = Case("POST", "/v1/retrieve", "/v1/retrieve", b"{}")
    with pytest.raises(AssertionError):
        check(case, response, "FOLDER")
