"""Labels from the log to the batch: refused by name, and right answers only where they are 1."""

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from twotower.config import from_dict
from twotower.core.errors import ConfigError
from twotower.evaluation.baselines.make import make_baselines
from twotower.evaluation.queries import make_queries
from twotower.pipeline.batches import Batches, InteractionExamples, gather_rows
from twotower.pipeline.prepare import prepare

NAN = np.nan
CLICK = [1, 0, None, 0, 1, 1, None]
ROWS = 70


def log(click, *, name="click"):
    values = {
        "user_id": [f"u{n % 6}" for n in range(ROWS)],
        "item_id": [f"i{n % 5}" for n in range(ROWS)],
        "timestamp": list(range(ROWS)),
        name: [click[n % len(click)] for n in range(ROWS)],
        "like": [float(n % 3 == 0) for n in range(ROWS)],
        "clicks": [n % 4 for n in range(ROWS)],
    }
    return pa.table(values)


def make(tmp_path, table, *, objective=None, features=None, kind="parquet", **data):
    path = tmp_path / f"log.{kind}"
    write = pq.write_table if kind == "parquet" else csv.write_csv
    write(table, path)
    default = {"label": "click", "heads": {"like": {"label": "like"}}}
    config = {
        "data": {
            "source": kind,
            "interactions": {"path": str(path)},
            "accept": ("old_times",),
            **data,
        },
        "objective": objective or default,
        "features": features or {},
    }
    return prepare(from_dict(config))


def expected(count):
    """The labels of the first rows of `log(CLICK)`, NaN where missing."""
    clicks = [CLICK[n % 7] for n in range(count)]
    return np.array([NAN if click is None else click for click in clicks], np.float32)


FORMS = {
    "numbers": CLICK,
    "floats": [None if x is None else float(x) for x in CLICK],
    "nan": [NAN if x is None else float(x) for x in CLICK],
    "booleans": [None if x is None else bool(x) for x in CLICK],
}


@pytest.mark.parametrize("kind", ["parquet", "csv"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["click", "label"])
def test_a_label_is_0_1_or_nan_however_it_is_written(tmp_path, kind, form, name):
    prepared = make(
        tmp_path,
        log(FORMS[form], name=name),
        kind=kind,
        objective={"heads": {"a": {"label": name}}},
    )
    parts = (prepared.train, prepared.validation, prepared.test)
    labels = np.concatenate([rows.labels[name] for rows in parts])
    np.testing.assert_array_equal(labels, expected(ROWS))
    assert labels.dtype == np.float32
    assert list(prepared.train.labels) == [name]


def test_a_column_named_twice_is_read_once_and_no_column_is_read_unasked(tmp_path):
    prepared = make(
        tmp_path,
        log(CLICK),
        objective={"label": "like", "heads": {"a": {"label": "like"}, "b": {"label": "click"}}},
    )
    assert sorted(prepared.test.labels) == ["click", "like"]
    assert make(tmp_path, log(CLICK), objective={"loss": "softmax"}).train.labels == {}


def test_a_batch_has_the_labels_of_its_rows_on_the_host_and_on_the_device(tmp_path):
    prepared = make(tmp_path, log(CLICK))
    examples = InteractionExamples(prepared.train, prepared.features)
    batches = Batches(examples, batch_size=16, seed=0, resident_megabytes=1)
    index = batches.indices(1)
    assert not np.array_equal(index, np.sort(index))
    on_host = gather_rows(batches.resident, index)
    on_device = jax.jit(gather_rows)(batches.resident, index)
    for batch in (on_host, on_device):
        np.testing.assert_array_equal(batch["labels"]["click"], expected(ROWS)[index])
        np.testing.assert_array_equal(batch["labels"]["like"], (index % 3 == 0).astype(np.float32))


def test_where_filters_rows_with_their_labels(tmp_path):
    prepared = make(tmp_path, log(CLICK), where=(("clicks", "!=", 2), ("click", "!=", None)))
    kept = np.array([n for n in range(ROWS) if n % 4 != 2 and CLICK[n % 7] is not None])
    kept = kept[: len(prepared.train)]
    np.testing.assert_array_equal(prepared.train.labels["click"], expected(ROWS)[kept])
    np.testing.assert_array_equal(prepared.train.timestamp, kept)


REFUSED = {
    "no such column, the nearest named": (
        CLICK,
        {"label": "clik"},
        r"objective\.label='clik'.*no field 'clik'.*mean 'click'",
    ),
    "of a head": (
        CLICK,
        {"heads": {"x": {"label": "lik"}}},
        r"heads\.x\.label='lik'.*did you mean 'like'",
    ),
    "a head without one": (CLICK, {"heads": {"x": {}}}, r"heads\.x\.label='' must name"),
    "a count": (
        CLICK,
        {"label": "clicks"},
        r"label='clicks': 2 in row 3 .*user_id='u2', item_id='i2', timestamp=2",
    ),
    "minus one": ([1, 0, 1, -1], {"label": "click"}, r"'click': -1 in row 4 "),
    "a share": ([1, 0.5, 0], {"label": "click"}, r"'click': 0\.5 in row 2 "),
    "infinite": ([1.0, 0.0, 1.0, float("inf")], {"label": "click"}, r"'click': inf in row 4 "),
    "text": ([None, "yes", "0"], {"label": "click"}, r"'click': 'yes' is no label"),
    "no ones": (
        [0, None],
        {"label": "click"},
        r"of 56 training rows none has label 1 \(28 have none at all\)",
    ),
    "no zeros": (
        [1, None, 1, 1],
        {"heads": {"x": {"label": "click"}}},
        r"heads\.x\.label='click'.*none has label 0",
    ),
    "nothing": ([None], {"label": "click"}, r"none has label 0 \(56 have none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_label_is_refused(tmp_path, case):
    click, objective, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, log(click), objective=objective)


def test_both_labels_must_occur_in_training_not_just_in_the_log(tmp_path):
    table = log([1])
    late = pa.array([int(n < 56) for n in range(ROWS)])
    with pytest.raises(ConfigError, match="none has label 0"):
        make(tmp_path, table.set_column(3, "click", late), objective={"label": "click"})


def test_a_query_may_not_know_a_label(tmp_path):
    text = {"type": "string", "embedding_size": 2}
    features = {
        "user": {"user_id": text, "told": text | {"column": "click"}},
        "item": {"item_id": text | {"embedding_size": 4}},
    }
    with pytest.raises(
        ConfigError, match=r"'told' reads column 'click', which is config\.objective\.label"
    ):
        make(tmp_path, log(CLICK), features=features)
    assert make(
        tmp_path, log(CLICK), features=features, objective={"label": "like"}
    ).encoder.context == ("told",)


ROWS_OF_PART = {"train": range(56), "validation": range(56, 63), "test": range(63, 70)}


def expected_pairs(part, label):
    """{(user, item)} of the rows of a part, or with a label of those alone where it is 1."""
    rows = [n for n in ROWS_OF_PART[part] if not label or CLICK[n % 7] == 1]
    return {(f"u{n % 6}", f"i{n % 5}") for n in rows}


def pairs(prepared, lists, users):
    names = prepared.users["user_id"].to_pylist()
    items = prepared.items["item_id"].to_pylist()
    return {(names[user], items[item]) for user, own in zip(users, lists) for item in own}


@pytest.mark.parametrize("kind", ["user", "interaction"])
@pytest.mark.parametrize("label", ["click", ""])
def test_only_rows_with_label_1_are_right_answers_and_seen(tmp_path, kind, label):
    objective = {"label": label, "heads": {"a": {"label": "click"}}}
    prepared = make(tmp_path, log(CLICK), objective=objective)
    queries = make_queries(prepared, "test", kind)
    right = pairs(prepared, queries.relevant, queries.user)
    assert right == expected_pairs("test", label)
    everyone = np.arange(len(prepared.users))
    seen = pairs(prepared, queries.seen, everyone)
    assert seen == expected_pairs("train", label) | expected_pairs("validation", label)
    rows = [n for n in range(56) if not label or CLICK[n % 7] == 1]
    items = prepared.items["item_id"].to_pylist()
    assert queries.counts.tolist() == [sum(items[i] == f"i{n % 5}" for n in rows) for i in range(5)]


def test_an_answer_outside_of_the_corpus_counts_only_with_label_1(tmp_path):
    table = log(CLICK).to_pydict()
    for n, item, click in ((68, "x", 0), (69, "y", 1), (67, "z", 1)):
        table["user_id"][n] = "u0"
        table["item_id"][n] = item
        table["click"][n] = click
    queries = make_queries(make(tmp_path, pa.table(table)), "test", "user")
    assert queries.missing.sum() == 2


def test_without_any_right_answer_there_is_nothing_to_evaluate(tmp_path):
    late = pa.array([int(n < 40) for n in range(ROWS)])
    prepared = make(tmp_path, log(CLICK).set_column(3, "click", late))
    with pytest.raises(
        ConfigError, match=r"None of the 7 test rows has config\.objective\.label='click' 1"
    ):
        make_queries(prepared, "test", "user")


def test_popularity_counts_only_rows_with_label_1(tmp_path):
    # Most rows are of i0, and none of them was clicked.
    table = log(CLICK).to_pydict()
    table["item_id"] = ["i0" if n % 2 else f"i{n % 5}" for n in range(ROWS)]
    table["click"] = [0 if item == "i0" else 1 for item in table["item_id"]]
    prepared = make(tmp_path, pa.table(table))
    baselines = make_baselines(prepared, make_queries(prepared, "test", "user"))
    scores = baselines["popularity"](slice(0, 1))
    assert prepared.items["item_id"][int(np.argmin(scores))].as_py() == "i0"
