"""Recommended options: what they make of columns, that they are valid, and that they are no worse
than popularity where most answers are new."""

import dataclasses

import pyarrow as pa
import pytest

from experiments.benchmarks.logs import news_log
from twotower import api
from twotower.config import from_dict
from twotower.data.contract import Contract
from twotower.data.facts import ColumnFacts, LogFacts, column_facts
from twotower.data.tables import read_uses
from twotower.evaluation.baselines.popularity import order_scores, popularity_order
from twotower.evaluation.evaluate import evaluate, model_scores
from twotower.evaluation.queries import make_queries
from twotower.features.spec import load_spec
from twotower.features.timestamp import as_seconds
from twotower.recommended import recommended_config

TITLE = ColumnFacts(name="title", kind="text", num_values=90, mean_length=5)
CATEGORY = ColumnFacts(name="category", kind="text", num_values=10, mean_length=1)
PUBLISHED = ColumnFacts(name="published", kind="time", num_values=90)
FACTS = LogFacts(
    num_rows=3_000,
    num_users=120,
    num_items=90,
    num_training_rows=2_550,
    has_times=True,
    span_days=20,
    share_new_items=0.5,
    share_new_users=0.1,
    newest_users=75,
    items=(TITLE, CATEGORY, PUBLISHED),
)


def features_of(facts):
    """The features that a log with such facts gets, as the encoder reads them."""
    return load_spec(from_dict(recommended_config(facts)).features)


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (TITLE, "TextFeature"),
        (CATEGORY, "StringFeature"),
        (PUBLISHED, "TimestampFeature"),
        (ColumnFacts(name="price", kind="number", num_values=50), "IntFeature"),
        (ColumnFacts(name="is_open", kind="flag", num_values=2), "StringFeature"),
        (ColumnFacts(name="tags", kind="list", num_values=9, separator="|"), "StringsFeature"),
        # One word that tells each item apart: another id.
        (ColumnFacts(name="link", kind="text", num_values=90, mean_length=1), None),
        (ColumnFacts(name="shop", kind="text", num_values=1, mean_length=2), None),
    ],
)
def test_a_column_of_items_becomes_a_feature_of_its_kind(column, kind):
    spec = features_of(dataclasses.replace(FACTS, items=(column,)))
    feature = spec.item.get(column.name)
    assert kind == (type(feature).__name__ if feature else None)


def test_names_of_people_are_not_read_and_columns_of_the_log_neither():
    name = ColumnFacts(name="name", kind="text", num_values=120, mean_length=2)
    price = ColumnFacts(name="paid", kind="number", num_values=50)
    spec = features_of(dataclasses.replace(FACTS, users=(name,), context=(price,)))
    assert set(spec.user) == {"user_id", "period", "history"}


def test_a_column_may_have_the_name_of_a_feature_of_ours():
    columns = [ColumnFacts(name=name, kind="text", num_values=9) for name in ("period", "history")]
    spec = features_of(dataclasses.replace(FACTS, users=tuple(columns)))
    assert sorted(feature.column for feature in spec.user.values()) == sorted(
        ["user_id", "timestamp", "history", "period", "history"]
    )
    assert spec.history is not None


@pytest.mark.parametrize(("share_new_items", "parts"), [(0.05, ("age",)), (0.6, ("period",))])
def test_news_are_known_by_the_period_that_they_are_of(share_new_items, parts):
    spec = features_of(dataclasses.replace(FACTS, share_new_items=share_new_items))
    assert spec.item["published"].parts == parts


def test_a_log_without_times_has_no_period():
    spec = features_of(dataclasses.replace(FACTS, has_times=False))
    assert "period" not in spec.user


@pytest.mark.parametrize(("newest_users", "periods"), [(3, 4), (30, 8), (60, 16), (500, 32)])
def test_a_period_is_of_many_users(newest_users, periods):
    spec = features_of(dataclasses.replace(FACTS, newest_users=newest_users))
    assert spec.user["period"].buckets == periods


@pytest.mark.parametrize("num_training_rows", [40, 300, 5_000, 10**6, 10**9])
def test_batches_are_never_larger_than_the_log(num_training_rows):
    facts = dataclasses.replace(FACTS, num_training_rows=num_training_rows)
    assert from_dict(recommended_config(facts)).training.batch_size <= num_training_rows


@pytest.mark.slow
def test_news_of_tomorrow_are_found_better_than_by_popularity(tmp_path):
    log = news_log(tmp_path, 2_000)
    # Without the titles, whose words take long to compile.
    options = recommended_config(dataclasses.replace(FACTS, items=(CATEGORY, PUBLISHED)))
    options["data"] = {
        "source": "parquet",
        "interactions": {"path": str(log.interactions)},
        "item_table": {"path": str(log.items)},
    }
    options["split"] = {"validation": 0.05, "test": 0.1}
    options["training"] |= {"batch_size": 128, "passes": 4, "validate_every": 54, "log_every": 54}
    run = api.train(from_dict(options), tmp_path / "run")
    queries = make_queries(run.prepared, "test", "user")
    order = popularity_order(run.prepared.positives("train"), queries.num_items)
    model = evaluate(
        model_scores(run.prepared, run.model, run.weights, queries), queries, (10,), mask_seen=True
    )
    popularity = evaluate(order_scores(order), queries, (10,), mask_seen=True)
    assert model["ndcg@10"] > 1.5 * popularity["ndcg@10"]


@pytest.mark.parametrize(
    ("values", "is_read"),
    [
        ([1_700_000_000_000, 1_700_000_001_000], True),
        (["2024-01-02", "2024-05-06"], True),
        (["13/02/2024", "14/02/2024"], True),
        (["2024-01-02T10:00:00+02:00", "2024-01-03T10:00:00+02:00"], True),
        (["2024-01-02"] * 30 + ["soon"], False),
    ],
)
def test_times_become_a_feature_where_all_of_them_are_read(values, is_read):
    column = pa.chunked_array([pa.array(values)])
    facts = column_facts("published", column, now=1_750_000_000)
    assert facts.kind == "time"
    feature = features_of(dataclasses.replace(FACTS, items=(facts,))).item.get("published")
    assert (feature is not None) == is_read
    if feature is None:
        return
    table, _ = read_uses(
        pa.table({"published": column}), "item", {"item": {"published": feature.use}}, Contract()
    )
    seconds, missing = as_seconds(table["published"], "published")
    assert not missing.any()
    assert seconds.min() > 1_600_000_000
