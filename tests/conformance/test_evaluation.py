"""Traps of measuring: sampled candidates, ties, splits that leak, seen items."""

import numpy as np
import pyarrow as pa
import pytest

from tests.evaluation.test_evaluate import make
from twotower.config import from_dict
from twotower.core.errors import LeakageError
from twotower.data.audit import check_fitted
from twotower.evaluation.evaluate import evaluate
from twotower.evaluation.queries import make_queries
from twotower.evaluation.report import text as report_text
from twotower.features.fit import fit_encoder
from twotower.features.spec import from_mappings
from twotower.pipeline.prepare import prepare
from twotower.retrieval.user_items import items_of_users

pytestmark = pytest.mark.slow

N = 700


def _prepare(tmp_path, rows, **sections):
    path = tmp_path / "log.csv"
    path.write_text(
        "user_id,item_id,timestamp,label\n" + "".join(f"{u},{i},{t},1\n" for u, i, t in rows)
    )
    sides = {
        side: {f"{side}_id": {"type": "string", "embedding_size": 2}} for side in ("user", "item")
    }
    data = {
        "source": "csv",
        "interactions": {"path": str(path)},
        "accept": ("old_times",),
    }
    return prepare(from_dict({"data": data, "features": sides} | sections))


@pytest.mark.trap(20)
def test_every_item_of_the_corpus_competes():
    """Measured among sampled candidates a model looks better than it is; here one right answer has
    a known rank in all N."""
    scores = np.random.default_rng(0).normal(size=(30, N)).astype(np.float32)
    rng = np.random.default_rng(1)
    right = rng.integers(0, N, 30)
    ranks = (scores > np.take_along_axis(scores, right[:, None], 1)).sum(1)
    found = evaluate(
        lambda s: scores[s],
        make(np.arange(30), right[:, None].tolist(), [[]] * 30, N),
        (10, 100),
        mask_seen=True,
    )
    for k in (10, 100):
        assert found[f"recall@{k}"] == pytest.approx((ranks < k).mean())
    assert found["mrr@100"] == pytest.approx(np.where(ranks < 100, 1 / (ranks + 1), 0).mean())


@pytest.mark.trap(20)
def test_a_report_says_how_many_items_and_queries_a_figure_is_over():
    """A figure of sampled candidates under the name of an exact one: the report names the whole
    corpus, and a sample as such."""
    protocol = {
        "split": "test",
        "query": "user",
        "step": 1,
        "items": 1234,
        "asked": 5,
        "available": 9,
    }
    values = {f"{name}@10": 0.0 for name in report_text.TABLE_METRICS} | {
        "queries": 5,
        "queries_without_answer": 0,
    }
    text = report_text.format_report(
        {"protocol": protocol, "model": values, "model_unmasked": values}, (10,)
    )
    assert "exact over all 1,234 items" in text and "A sample: 5 of 9 queries" in text


TINY = float(np.finfo(np.float32).tiny)


@pytest.mark.trap(21)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.5, 1e-38, -1e-38, 1e-45, TINY, 3e38])
def test_a_model_that_scores_all_items_alike_finds_nothing(value):
    """Ties as hits give a collapsed model 100 %: a relevant item ranks behind its equals, and only
    then comes first."""
    relevant = [[0], [5], [19], [3]]
    queries = make(np.zeros(4, int), relevant, [[]], 20)
    scores = np.full((4, 20), value, np.float32)
    found = evaluate(lambda s: scores[s], queries, (19, 20), mask_seen=True)
    assert found["recall@19"] == 0.0 and found["recall@20"] == 1.0
    assert found["mrr@20"] == pytest.approx(1 / 20)
    if abs(value) < 1e3:  # above, a thousandth is less than a step of float32
        scores[np.arange(4), np.ravel(relevant)] += 1e-3
        assert evaluate(lambda s: scores[s], queries, (1,), mask_seen=True)["recall@1"] == 1.0


@pytest.mark.trap(22)
def test_vocabularies_statistics_and_counts_know_training_rows_alone(tmp_path):
    """Statistics on all rows: an item, a user and a price that only held-out rows name are unknown
    to what is fitted."""
    rows = [
        ("u1", "a", 1),
        ("u2", "b", 2),
        ("u1", "b", 3),
        ("u2", "a", 4),
        ("u3", "z", 8),
        ("u1", "z", 9),
    ]
    prepared = _prepare(tmp_path, rows, split={"kind": "time", "validation": 1 / 6, "test": 1 / 6})
    oov = prepared.encoder.inputs["item"]["item_id"].oov_rows
    encode = prepared.encoder.encode
    assert (encode("item", pa.table({"item_id": ["a", "b", "z"]}))["item_id"] <= oov).tolist() == [
        False,
        False,
        True,
    ]
    assert (
        encode("user", pa.table({"user_id": ["u1", "u2", "u3"]}))["user_id"] <= oov
    ).tolist() == [False, False, True]
    assert make_queries(prepared, "test", "user").counts.tolist() == [2, 2]
    spec = from_mappings({"item": {"price": {"type": "float"}}})
    items = pa.table({"item_id": ["a", "b", "z"], "price": [1.0, 3.0, 1e6]})
    encoder = fit_encoder(
        spec, prepared.raw.train, users=prepared.users.select(["user_id"]), items=items
    )
    np.testing.assert_allclose(encoder.encode("item", items)["price"][:2, 0], [-1, 1], atol=1e-5)


@pytest.mark.trap(22)
def test_an_encoder_of_other_rows_is_refused_and_a_label_is_no_feature(tmp_path):
    """An encoder fitted before the split is refused by its fingerprint; the answer and its label
    cannot be read by a tower."""
    rows = [(f"u{n % 3}", f"i{n % 4}", n) for n in range(12)]
    prepared = _prepare(tmp_path, rows)
    everything = pa.concat_tables([prepared.raw.train, prepared.raw.validation, prepared.raw.test])
    items = pa.table({"item_id": [f"i{n}" for n in range(4)]})
    whole = fit_encoder(prepared.encoder.spec, everything, users=prepared.users, items=items)
    with pytest.raises(LeakageError, match="fitted on rows with fingerprint"):
        check_fitted(whole.fitted_on, prepared.raw)
    for column in ("label", "item_id"):
        spec = from_mappings({"user": {"leak": {"type": "string", "column": column}}})
        with pytest.raises(ValueError, match=column):
            fit_encoder(spec, everything, users=prepared.users, items=items)


@pytest.mark.trap(22)
def test_seen_items_of_a_query_are_of_earlier_parts_alone(tmp_path):
    """History with its own label: what validation and test ask for is not among what was seen
    before."""
    rows = [
        *(("u", item, time) for time, item in enumerate("abc")),
        *(("v", item, 2) for item in "de"),
    ]
    rows += [("u", "d", 4), ("u", "e", 5), ("v", "a", 6)]
    prepared = _prepare(tmp_path, rows, split={"kind": "time", "validation": 1 / 8, "test": 2 / 8})
    items = prepared.items["item_id"].to_pylist()
    user = prepared.users["user_id"].to_pylist().index("u")
    seen = {
        part: {items[i] for i in make_queries(prepared, part, "user").seen[user]}
        for part in ("validation", "test")
    }
    assert seen == {"validation": {"a", "b", "c"}, "test": {"a", "b", "c", "d"}}


@pytest.mark.trap(23)
def test_seen_items_are_masked_where_it_says_so_and_only_there():
    """Masked in one harness and not in another: both are measured and named, by one code for models
    and baselines."""
    queries = make([0], [[3]], [[0, 1]], 6)
    scores = np.array([[6, 5, 4, 3, 2, 1]], np.float32)
    masked, unmasked = (
        evaluate(lambda s: scores[s], queries, (2, 4), mask_seen=m) for m in (True, False)
    )
    assert masked["mrr@2"] == 1 / 2 and masked["recall@2"] == 1.0
    assert unmasked["recall@2"] == 0.0 and unmasked["mrr@4"] == 1 / 4
    values = {f"{name}@2": 0.0 for name in report_text.TABLE_METRICS} | {
        "queries": 1,
        "queries_without_answer": 0,
    }
    protocol = {"split": "test", "query": "user", "step": 1, "items": 6, "asked": 1, "available": 1}
    text = report_text.format_report(
        {"protocol": protocol, "model": values, "model_unmasked": values}, (2,)
    )
    assert "Seen items masked" in text and "Nothing masked" in text


@pytest.mark.trap(24)
def test_seen_items_never_come_back_though_fewer_than_k_remain():
    """Pushed down by 1e5 they come back when fewer than K remain: here the best are seen, three
    remain, and the list ends after them."""
    queries = make([0], [[19]], [list(range(17))], 20)
    scores = np.arange(20, 0, -1, dtype=np.float32)[None]
    found = evaluate(lambda s: scores[s], queries, (10,), mask_seen=True)
    assert found["coverage@10"] == pytest.approx(3 / 20)
    assert found["precision@10"] == pytest.approx(1 / 10)
    assert found["mrr@10"] == pytest.approx(1 / 3)
    assert evaluate(lambda s: scores[s], queries, (10,), mask_seen=False)["recall@10"] == 0.0


@pytest.mark.trap(35)
def test_the_latest_item_of_a_user_is_the_last_of_equal_times_in_the_file(tmp_path):
    """The same tie in the history of a user, which is what a served list excludes and shows: file
    order again."""
    times = np.random.default_rng(0).integers(0, 3, 200)
    rows = [("u", f"i{n}", t) for n, t in enumerate(times)] + [("v", "i0", 6)]
    prepared = _prepare(tmp_path, rows, split={"kind": "time", "validation": 0, "test": 1 / 201})
    items = prepared.items["item_id"].to_pylist()
    expected = [f"i{n}" for time in range(3) for n in np.flatnonzero(times == time)]
    assert [items[i] for i in items_of_users([prepared.train], num_users=2)[0]] == expected


@pytest.mark.trap(19)
def test_the_share_of_a_list_that_was_never_trained_is_measured():
    """Items never clicked surface with the direction they began in: how many of them a list holds
    is reported."""
    queries = make([0], [[3]], [[]], 6, counts=np.array([4, 0, 2, 1, 0, 0]))
    found = evaluate(
        lambda s: np.array([[6, 5, 4, 3, 2, 1]], np.float32), queries, (2, 5), mask_seen=True
    )
    assert found["never_trained@2"] == 1 / 2 and found["never_trained@5"] == pytest.approx(2 / 5)
    assert "never_trained" in report_text.TABLE_METRICS
