"""Queries of both kinds from a log small enough to work out by hand."""

import dataclasses

import numpy as np
import pytest

from twotower.config import from_dict
from twotower.core.arrays import Ragged
from twotower.core.errors import ConfigError
from twotower.evaluation.audits.base import audit_table
from twotower.evaluation.audits.data import audit_unreachable
from twotower.evaluation.measure import measure_answers
from twotower.evaluation.queries import Queries, make_queries
from twotower.evaluation.report import text as report_text
from twotower.pipeline.prepare import prepare

# user, item, split; in order of time. Item z is never in training, so it is not in the corpus;
# neither is y.
LOG = [
    ("ann", "a", "train"),
    ("ann", "b", "train"),
    ("ben", "a", "train"),
    ("ben", "c", "train"),
    ("cat", "d", "train"),
    ("ann", "c", "validation"),
    ("dan", "a", "validation"),
    ("ann", "d", "test"),
    ("ann", "c", "test"),
    ("ann", "z", "test"),
    ("ann", "z", "test"),
    ("ann", "y", "test"),
    ("ann", "d", "test"),
    ("ben", "a", "test"),
    ("dan", "b", "test"),
    ("cat", "z", "test"),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "log.csv"
    path.write_text(
        "user_id,item_id,timestamp,hour\n"
        + "".join(f"{u},{i},{t},{t}\n" for t, (u, i, _) in enumerate(LOG))
    )
    config = from_dict(
        {
            "data": {
                "source": "csv",
                "interactions": {"path": str(path)},
                "accept": ("old_times",),
            },
            "split": {"kind": "time", "validation": 2 / 16, "test": 9 / 16},
            "features": {
                "user": {
                    "user_id": {"type": "string", "embedding_size": 2},
                    "hour": {"type": "string", "embedding_size": 2},
                },
                "item": {"item_id": {"type": "string", "embedding_size": 4}},
            },
        }
    )
    prepared = prepare(config)
    assert [len(part) for part in (prepared.train, prepared.validation, prepared.test)] == [5, 2, 9]
    return prepared


def names(prepared, queries):
    """[(user, right answers, missing)] by name."""
    users = prepared.users["user_id"].to_pylist()
    items = prepared.items["item_id"].to_pylist()
    return [
        (users[u], [items[i] for i in right], int(missing))
        for u, right, missing in zip(queries.user, queries.relevant, queries.missing)
    ]


def test_one_query_a_user_with_all_its_distinct_items(prepared):
    assert sorted(names(prepared, make_queries(prepared, "test", "user"))) == [
        ("ann", ["d", "c"], 2),
        ("ben", ["a"], 0),
        ("cat", [], 1),
        ("dan", ["b"], 0),
    ]


def test_one_query_a_row_with_one_right_answer(prepared):
    assert names(prepared, make_queries(prepared, "test", "interaction")) == [
        (user, [item] if item in "abcd" else [], int(item not in "abcd"))
        for user, item, part in LOG
        if part == "test"
    ]


def test_test_sees_training_and_validation_and_validation_only_training(prepared):
    items = prepared.items["item_id"].to_pylist()
    by_name = {
        split: {
            user: [items[i] for i in seen]
            for user, seen in zip(
                prepared.users["user_id"].to_pylist(), make_queries(prepared, split, "user").seen
            )
        }
        for split in ("validation", "test")
    }
    assert by_name["validation"]["ann"] == ["a", "b"] and by_name["validation"]["dan"] == []
    assert by_name["test"]["ann"] == ["a", "b", "c"] and by_name["test"]["dan"] == ["a"]


def test_answers_that_were_seen_are_dropped_and_missing_ones_are_not(prepared):
    left = make_queries(prepared, "test", "user").without_seen()
    assert sorted(names(prepared, left)) == [
        ("ann", ["d"], 2),
        ("ben", [], 0),
        ("cat", [], 1),
        ("dan", ["b"], 0),
    ]
    assert sorted(left.num_relevant.tolist()) == [0, 1, 1, 3]


@pytest.mark.parametrize("targets", ["", "last"])
@pytest.mark.parametrize("kind", ["user", "interaction"])
def test_a_sample_is_that_of_all_queries_with_what_its_users_had_seen(prepared, kind, targets):
    expected = make_queries(prepared, "test", kind, targets=targets).sample(3)
    found = make_queries(prepared, "test", kind, targets=targets, sample=3)
    assert names(prepared, found) == names(prepared, expected)
    seen = [queries.seen_lists(slice(0, 3)) for queries in (expected, found)]
    assert [x.tolist() for x in seen[0]] == [x.tolist() for x in seen[1]]
    if not targets:
        others = np.setdiff1d(np.arange(len(prepared.users)), found.user)
        assert not found.seen.lengths[others].any() and expected.seen.lengths[others].any()


def test_the_context_is_that_of_the_row_or_of_the_first_held_out_row(prepared):
    rows = make_queries(prepared, "test", "interaction")
    np.testing.assert_array_equal(rows.context["hour"], prepared.test.context["hour"])
    users = make_queries(prepared, "test", "user")
    first = [int(np.flatnonzero(prepared.test.user == user)[0]) for user in users.user]
    np.testing.assert_array_equal(users.context["hour"], prepared.test.context["hour"][first])


def test_counts_are_of_training_rows(prepared):
    counts = make_queries(prepared, "test", "user").counts
    assert dict(zip(prepared.items["item_id"].to_pylist(), counts.tolist())) == {
        "a": 2,
        "b": 1,
        "c": 1,
        "d": 1,
    }


def test_a_split_without_rows_and_an_unknown_kind_are_refused(prepared):
    import dataclasses

    empty = dataclasses.replace(
        prepared, validation=dataclasses.replace(prepared.validation, user=np.zeros(0, np.int32))
    )
    with pytest.raises(ConfigError, match="no validation rows"):
        make_queries(empty, "validation", "user")
    with pytest.raises(ConfigError, match="did you mean 'interaction'"):
        make_queries(prepared, "test", "interactions")


def test_a_sample_asks_some_queries_of_the_whole_corpus():
    right = Ragged.from_pairs(np.arange(10), np.arange(10), num_rows=10)
    queries = Queries(
        np.arange(10, dtype=np.int32),
        right,
        np.zeros(10, np.int32),
        Ragged.empty(10),
        np.ones(10, np.int64),
    )
    assert queries.sample(0) is queries and queries.sample(10) is queries
    some = queries.sample(4)
    assert some.user.tolist() == [0, 3, 6, 9] == some.relevant.values.tolist()
    assert some.num_items == 10


# By hand: of ann's d, c, z and y two are in the corpus, ben's a and dan's b are, cat's z is not.
ANSWERS = {
    "user": {"all": 7, "outside_corpus": 3, "greatest_recall": (0.5 + 1 + 1 + 0) / 4},
    "interaction": {"all": 9, "outside_corpus": 4, "greatest_recall": 5 / 9},
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_outside_of_the_corpus_bound_the_recall_and_are_said_first(prepared, kind):
    queries = make_queries(prepared, "test", kind)
    measured = measure_answers(queries, "test", has_item_table=False)
    audits = audit_table([audit_unreachable(measured)])
    measured.pop("warning")
    assert measured == pytest.approx(ANSWERS[kind])
    model = dict.fromkeys(
        [f"{name}@10" for name in report_text.TABLE_METRICS] + ["queries_without_answer"], 0.0
    )
    figures = {
        "protocol": {
            "split": "test",
            "query": kind,
            "step": 1,
            "items": 4,
            "asked": 1,
            "available": 1,
        },
        "answers": measured,
        "audits": audits,
        "model": model | {"queries": 1},
        "model_unmasked": model | {"queries": 1},
    }
    first = report_text.format_report(figures, (10,)).splitlines()[0]
    share = {"user": "42.9% of the 7", "interaction": "44.4% of the 9"}[kind]
    assert first.startswith(f"WARNING: {share} test answers")
    assert f"greatest recall possible is {measured['greatest_recall']:.4f}" in first


def test_the_report_before_training_has_the_greatest_recall_of_the_evaluation(prepared):
    for kind, answers in ANSWERS.items():
        config = dataclasses.replace(
            prepared.config, evaluation=dataclasses.replace(prepared.config.evaluation, query=kind)
        )
        held_out = prepare(config).report.held_out["test"]
        assert held_out.greatest_recall == pytest.approx(answers["greatest_recall"])
        assert (held_out.rows, held_out.outside_corpus) == (9, 4)
