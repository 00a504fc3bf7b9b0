"""Labels from the log to the batch; what is no label is refused by name, and only rows with label 1
are answers."""

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from twotower.config import from_dict
from twotower.core.errors import ConfigError
from twotower.evaluation.baselines import make_baselines
from twotower.evaluation.queries import make_queries
from twotower.pipeline.batches import Batches, gather
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
    (pyarrow.parquet.write_table if kind == "parquet" else pa.csv.write_csv)(table, path)
    return prepare(
        from_dict(
            {
                "data": {"source": kind, "interactions": {"path": str(path)}, **data},
                "objective": objective or {"label": "click", "heads": {"like": {"label": "like"}}},
                "features": features or {},
            }
        )
    )


def expected(n):
    return np.array([NAN if CLICK[i % 7] is None else CLICK[i % 7] for i in range(n)], np.float32)


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
    found = np.concatenate(
        [getattr(prepared, part).labels[name] for part in ("train", "validation", "test")]
    )
    np.testing.assert_array_equal(found, expected(ROWS))
    assert found.dtype == np.float32 and list(prepared.train.labels) == [name]


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
    batches = Batches(
        prepared.train, prepared.features, batch_size=16, seed=0, resident_megabytes=1
    )
    index = batches.indices(1)
    assert not np.array_equal(index, np.sort(index))
    for batch in (gather(batches.resident, index), jax.jit(gather)(batches.resident, index)):
        np.testing.assert_array_equal(batch["labels"]["click"], expected(ROWS)[index])
        np.testing.assert_array_equal(batch["labels"]["like"], (index % 3 == 0).astype(np.float32))


def test_where_filters_rows_with_their_labels(tmp_path):
    prepared = make(tmp_path, log(CLICK), where=(("clicks", "!=", 2), ("click", "!=", None)))
    kept = np.array([n for n in range(ROWS) if n % 4 != 2 and CLICK[n % 7] is not None])
    np.testing.assert_array_equal(
        prepared.train.labels["click"], expected(ROWS)[kept][: len(prepared.train)]
    )
    np.testing.assert_array_equal(prepared.train.timestamp, kept[: len(prepared.train)])


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
    "text": ([None, "1", "0"], {"label": "click"}, r"'click': '1' in row 2 "),
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


def chosen(part, right):
    """{(user, item)} of the rows of `part` with label 1, or of all."""
    first, last = {"train": (0, 56), "validation": (56, 63), "test": (63, 70)}[part]
    return {
        (f"u{n % 6}", f"i{n % 5}") for n in range(first, last) if not right or CLICK[n % 7] == 1
    }


def pairs(prepared, lists, users):
    names, items = prepared.users["user_id"].to_pylist(), prepared.items["item_id"].to_pylist()
    return {(names[user], items[item]) for user, own in zip(users, lists) for item in own}


@pytest.mark.parametrize("kind", ["user", "interaction"])
@pytest.mark.parametrize("label", ["click", ""])
def test_only_rows_with_label_1_are_right_answers_and_seen(tmp_path, kind, label):
    prepared = make(
        tmp_path, log(CLICK), objective={"label": label, "heads": {"a": {"label": "click"}}}
    )
    queries = make_queries(prepared, "test", kind)
    assert pairs(prepared, queries.right, queries.user) == chosen("test", label)
    everyone = np.arange(len(prepared.users))
    assert pairs(prepared, queries.seen, everyone) == chosen("train", label) | chosen(
        "validation", label
    )
    rows = [n for n in range(56) if not label or CLICK[n % 7] == 1]
    items = prepared.items["item_id"].to_pylist()
    assert queries.counts.tolist() == [sum(items[i] == f"i{n % 5}" for n in rows) for i in range(5)]


def test_an_answer_outside_of_the_corpus_counts_only_with_label_1(tmp_path):
    table = log(CLICK).to_pydict()
    for n, item, click in ((68, "x", 0), (69, "y", 1), (67, "z", 1)):
        table["user_id"][n], table["item_id"][n], table["click"][n] = "u0", item, click
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
    scores = make_baselines(prepared, make_queries(prepared, "test", "user"))["popularity"](
        slice(0, 1)
    )
    assert prepared.items["item_id"][int(np.argmin(scores))].as_py() == "i0"


def test_the_shop_draws_labels_with_the_probabilities_that_it_tells():
    from twotower.data.shop import generate as synthetic

    shop = synthetic.generate(20_000, seed=2)
    user, item = (
        pa.compute.index_in(
            shop.interactions[f"{side}_id"], getattr(shop, f"{side}s")[f"{side}_id"]
        ).to_numpy()
        for side in ("user", "item")
    )
    probabilities = synthetic.label_probabilities(shop.truth, user, item)
    preference = (
        np.float64(shop.truth.user_factors) @ np.float64(shop.truth.item_factors[item[:9]]).T
    )
    lift = np.log(preference[user[:9], np.arange(9)] / preference.mean(0))
    np.testing.assert_allclose(
        probabilities["liked"][:9], 1 / (1 + np.exp(5.4 - 2 * lift)), rtol=1e-3
    )
    for name, known in (("liked", 0.6), ("shared", 1.0)):
        labels, p = shop.interactions[name].to_numpy(), probabilities[name]
        given = ~np.isnan(labels)
        assert given.mean() == pytest.approx(known, abs=0.015) and 0.02 < p.mean() < 0.6
        for low, high in (
            (0, 0.1),
            (0.1, 0.3),
            (0.3, 1),
        ):  # each row its own probability, not one share for all
            rows = given & (p >= low) & (p < high)
            if rows.sum() > 500:
                assert labels[rows].mean() == pytest.approx(p[rows].mean(), abs=0.03)
        # Being known says nothing of the answer.
        assert p[given].mean() == pytest.approx(p.mean(), abs=0.01)
    same = synthetic.generate(20_000, seed=2).interactions
    assert same.equals(shop.interactions)
