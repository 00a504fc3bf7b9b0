"""Hostile requests in this process; `experiments.benchmarks.fuzz_requests` makes thousands, against
every kind of index."""

import dataclasses

import pytest

from experiments.benchmarks.fuzz_requests import Attack, attack
from twotower.retrieval.retriever import Retriever


@pytest.fixture(scope="module")
def in_memory(retriever):
    """The retriever of a bundle that no call can change."""
    return Retriever(dataclasses.replace(retriever.bundle, folder=None))


# The types of an index are checked by the set-up of tests before it can check them itself.
@pytest.mark.slow
def test_no_request_raises_anything_but_an_error_of_the_package(in_memory):
    outcomes = attack(in_memory, calls=300, seed=0, of_index=False)
    # Right and wrong requests both, or nothing was tried.
    answered = sum(count for name, count in outcomes.items() if name.endswith("answered"))
    assert 60 < answered < 260


def test_an_attack_notices_what_may_not_be(in_memory, monkeypatch):
    def crash(self, *arguments, **options):
        raise TypeError("unhashable type")

    monkeypatch.setattr(Retriever, "recommend", crash)
    with pytest.raises(AssertionError, match="raised TypeError: unhashable type"):
        requests = Attack(in_memory, 0, of_index=False)
        for _ in range(40):
            requests.one()
