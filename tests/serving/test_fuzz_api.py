"""Random and hostile requests against the API in this process; `experiments.benchmarks.fuzz_api`
sends thousands, and measures memory."""

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path

import pytest

from experiments.benchmarks import fuzz_api
from experiments.benchmarks.fuzz_api import (
    TOKEN,
    Case,
    InProcess,
    Response,
    attack,
    check,
    drawn_cases,
    fuzz,
)
from tests.serving.asking import make_app
from twotower.core.files import atomic
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


def kept_cases(document, count):
    """The cases of a description, drawn once: drawing takes ten times as long as asking. They lie
    beside the compiled programs, and are found likewise by all that they depend on."""
    versions = [importlib.metadata.version(name) for name in ("schemathesis", "hypothesis")]
    source = Path(fuzz_api.__file__).read_text(encoding="utf-8")
    key = json.dumps([document, count, versions, source], sort_keys=True)
    name = f"cases-{hashlib.sha256(key.encode()).hexdigest()}.json"
    path = Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) / name
    if not path.exists():
        drawn = [[_as_text(case) for case in cases] for cases in drawn_cases(document, count)]
        with atomic(path) as made:
            made.write_text(json.dumps(drawn), encoding="utf-8")
    drawn = json.loads(path.read_text(encoding="utf-8"))
    return [[_of_text(*case) for case in cases] for cases in drawn]


def _as_text(case):
    # Bodies are bytes of any value.
    return [*case[:3], None if case.body is None else case.body.decode("latin-1")]


def _of_text(method, path, template, body):
    return Case(method, path, template, None if body is None else body.encode("latin-1"))


@pytest.mark.slow
def test_cases_of_the_description_are_answered_as_it_says(server, copied):
    outcomes = fuzz(server, str(copied), 500, kept_cases)
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
