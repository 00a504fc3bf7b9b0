"""Audits speak where figures mean less than they seem to, and only there."""

import dataclasses

import numpy as np

from twotower.config import SplitConfig, defaults, from_dict
from twotower.core.arrays import Ragged
from twotower.data.shop.generate import generate
from twotower.data.split import split
from twotower.evaluation import audits
from twotower.evaluation.queries import Queries


def test_a_leak_that_is_accepted_is_said_and_a_split_by_time_has_none():
    log = generate(1_000).interactions
    config = from_dict(defaults())
    said = {}
    for kind, accepted in (("time", ()), ("leave_last_out", ("future_rows", "repeated_pairs"))):
        options = SplitConfig(kind=kind, accept_leakage=accepted)
        config = dataclasses.replace(config, split=options)
        said[kind] = audits.audit_leakage(split(log, options), config)
    assert not said["time"].speaks
    leak = said["leave_last_out"]
    assert leak.speaks and set(leak.figures["rows"]) == {"future_rows", "repeated_pairs"}
    assert all(f"{rows:,} of" in leak.sentence for rows in leak.figures["rows"].values())
    assert "future_rows: Training knows what other users liked" in leak.sentence


def make_queries_of(relevant, counts):
    """A query for each item of `relevant`, of a user of its own who has seen nothing."""
    count = len(relevant)
    return Queries(
        user=np.arange(count, dtype=np.int32),
        relevant=Ragged.from_pairs(np.arange(count), np.array(relevant), num_rows=count),
        missing=np.zeros(count, np.int32),
        seen=Ragged.empty(count),
        counts=np.array(counts),
    )


def test_answers_that_training_never_saw_are_said_from_a_fifth_on():
    counts = [5, 5, 5, 5, 0]
    few = audits.audit_never_trained(make_queries_of([0, 1, 2, 3, 0, 4], counts))
    many = audits.audit_never_trained(make_queries_of([0, 1, 2, 4], counts))
    assert not few.speaks and few.figures == {"answers": 1, "share": 1 / 6}
    assert many.speaks and "25.0% of the 4 right answers" in many.sentence


def test_the_table_has_every_audit_and_those_that_speak_are_said_in_its_order():
    found = [
        audits.Audit("a", True, "First.", {"share": 0.5}),
        audits.Audit("b", False, "Nothing."),
        audits.Audit("c", True, "Second."),
    ]
    table = audits.audit_table(found)
    assert table["a"] == {"speaks": True, "sentence": "First.", "share": 0.5}
    assert list(table) == ["a", "b", "c"]
    assert audits.spoken_sentences(table) == ["First.", "Second."]
