"""What a report measures, and on which queries."""

import dataclasses
import json

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.retrieval.runs import make_run
from twotower.core.errors import ConfigError
from twotower.evaluation import evaluate as module
from twotower.evaluation import measure, metrics, slices
from twotower.evaluation.baselines import cheap
from twotower.evaluation.baselines.make import make_baselines
from twotower.evaluation.baselines.tuning import Baselines
from twotower.evaluation.comparison.compare import compare_records, parts_of
from twotower.evaluation.comparison.gate import judge, read_thresholds
from twotower.evaluation.comparison.records import read_record
from twotower.evaluation.evaluate import (
    evaluate,
    make_validate,
    model_scores,
    validation_queries,
)
from twotower.evaluation.queries import make_queries
from twotower.evaluation.report import text as report_text
from twotower.evaluation.report.verdict import find_verdict
from twotower.retrieval.embed import shard_weights

pytestmark = pytest.mark.slow

KS = (5, 10)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), evaluation={"ks": KS, "validation_queries": 50})


def seen_first(prepared, model, weights, queries):
    """Scores of a model that knows what a user has seen, and after that the right answers."""
    scores = np.zeros((len(queries), queries.num_items), np.float32)
    scores[queries.relevant.rows, queries.relevant.values] = 1
    for query, seen in enumerate(queries.seen_lists(slice(0, len(queries)))):
        scores[query, seen] = 2
    return lambda chosen: scores[chosen]


def test_masked_is_masked_and_unmasked_is_not(run, monkeypatch):
    monkeypatch.setattr(measure, "model_scores", seen_first)
    monkeypatch.setattr(
        measure,
        "make_baselines",
        lambda prepared, queries, *_, **__: Baselines(
            {"seen": seen_first(prepared, 0, 0, queries)}
        ),
    )
    measured = measure.measure_run(run, ks=(1,), baselines=True)
    # Masked, what is left of the right answers comes first; unmasked, it stands behind all that was
    # seen.
    assert measured["model"]["mrr@1"] == measured["baselines"]["seen"]["mrr@1"] > 0.9
    assert (
        measured["model_unmasked"]["mrr@1"] == measured["baselines_unmasked"]["seen"]["mrr@1"] < 0.5
    )
    queries = make_queries(run.prepared, "test", run.config.evaluation.query)
    for suffix, mask_seen in (("", True), ("_unmasked", False)):
        scores = seen_first(run.prepared, 0, 0, queries)
        assert measured[f"model{suffix}"] == evaluate(scores, queries, (1,), mask_seen=mask_seen)


def test_a_column_of_users_rows_or_items_tells_queries_apart(run, measured):
    parts = measured["slices"]
    users = make_queries(run.prepared, "test", "user").without_seen()
    asked = users.user[users.num_relevant > 0]
    cities = run.prepared.users["city"].take(asked).to_pylist()
    city, values = next(iter(parts["city"].items()))
    assert values["queries"] == cities.count(city) >= 3
    first = {}
    for row, user in enumerate(run.prepared.test.user):
        first.setdefault(user, run.prepared.raw.test["event"][row].as_py())
    events = [first[user] for user in asked]
    for event, values in parts["row.event"].items():
        if event in events:
            assert values["queries"] == events.count(event)
    assert set(run.prepared.items["category"].to_pylist()) & set(parts["item.category"])
    with pytest.raises(ConfigError, match="--slices=item.categorie .*'item.category'"):
        measure.measure_run(run, ks=KS, slices=("item.categorie",))


WEIGHTS = (0.0, 0.1, 1e4)


@pytest.fixture(scope="module")
def measured(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "MIN_QUERIES", 3)
        return measure.measure_run(
            run,
            ks=KS,
            baselines=True,
            popularity_weights=WEIGHTS,
            slices=("city", "row.event", "item.category"),
            keep_queries=True,
        )


def test_the_table_of_queries_holds_what_the_figures_are_means_of(run, measured):
    table = pq.read_table(run.workdir / "evaluation" / "queries.parquet")
    queries = make_queries(run.prepared, "test", run.config.evaluation.query)
    assert len(table) == len(queries)
    users = run.prepared.users["user_id"].take(queries.user)
    assert table["user"].to_pylist() == users.to_pylist()
    protocol = json.loads(table.schema.metadata[b"twotower"])
    assert protocol == measured["protocol"] | {"ks": list(KS)}
    answered = table.filter(table["answered"])
    for ranking, figures in {"model": measured["model"], **measured["baselines"]}.items():
        assert len(answered) == figures["queries"]
        for name, value in figures.items():
            if name.partition("@")[0] in metrics.RANKING_METRICS:
                assert np.mean(answered[f"{ranking}/{name}"]) == pytest.approx(value, abs=1e-12)


def test_the_table_of_queries_tells_the_slices_apart(run, measured):
    table = pq.read_table(run.workdir / "evaluation" / "queries.parquet")
    answered = table.filter(table["answered"])
    # The lists of categories are of items, and no value of a query.
    names = [name for name in table.column_names if name.startswith("slice/")]
    assert names == ["slice/users", "slice/history", "slice/city", "slice/row.event"]
    for name in names:
        parts = measured["slices"][name.removeprefix("slice/")]
        assert set(answered[name].to_pylist()) == set(parts)
        for value, part in parts.items():
            of_value = answered.filter(pc.equal(answered[name], value))
            assert len(of_value) == part["queries"]
            figure = part["model"]["recall@5"]
            assert np.mean(of_value["model/recall@5"]) == pytest.approx(figure, abs=1e-12)
    record = read_record(str(run.workdir))
    lengths = [part.value for part, _ in parts_of(record) if part.slice == "history"]
    order = [value for value in slices.HISTORY_BUCKETS.values() if value in lengths]
    assert lengths == order and len(order) > 2


def test_slices_of_items_are_compared_by_the_figures_that_are_reported(run, measured):
    name = str(run.workdir)
    record = read_record(name)
    compared = compare_records([record, read_record(f"{name}:popularity")])
    found = {
        (row.part.slice, row.part.value): row for row in compared.rows if row.metric == "map@5"
    }
    for part in ("items", "item_popularity", "item.category"):
        assert [key[1] for key in found if key[0] == part]
        for value, figures in measured["slices"][part].items():
            row = found[part, value]
            assert row.queries == figures["queries"]
            assert row.figures[name] == pytest.approx(figures["model"]["map@5"], abs=1e-12)
    limits = {"slices": {"items=warm": {"recall@5": {"tolerance": 0.1}}}}
    (check, *_) = judge(record, record, read_thresholds(limits, record)).checks
    assert check.standing == pytest.approx(measured["slices"]["items"]["warm"]["model"]["recall@5"])
    # Two test sets of as many users and answers.
    answers = record.answers.copy()
    answers[0] += np.uint64(1)
    with pytest.raises(ConfigError, match="1 queries have other right answers"):
        compare_records([record, dataclasses.replace(record, name="b", answers=answers)])


def test_weights_of_popularity_move_lists_from_the_model_to_popularity(measured):
    """Weight 0 is the model, a great one popularity, whatever the model says."""
    weighed = measured["popularity_weights"]
    assert list(weighed) == ["0", "0.1", "10000"] and weighed["0"] == measured["model"]
    novelty = [weighed[weight]["novelty@10"] for weight in weighed]
    assert novelty[0] > novelty[1] > novelty[2]
    assert novelty[2] == pytest.approx(measured["baselines"]["popularity"]["novelty@10"], abs=0.02)
    assert "weight 0.1" in report_text.format_report(measured, KS)


def test_every_figure_has_an_interval_around_it(measured):
    for suffix in measure.SUFFIXES:
        model = measured[f"model{suffix}"]
        intervals = measured[f"model_intervals{suffix}"]
        means = {name for name in model if "@" in name}
        assert set(intervals) == means
        for name, (low, high) in intervals.items():
            assert low - 1e-6 <= model[name] <= high + 1e-6, name
        low, high = intervals["recall@5"]
        assert low < high
        of_baselines = measured[f"baseline_intervals{suffix}"]
        differences = measured[f"baseline_differences{suffix}"]
        assert set(of_baselines) == set(differences) == set(measured[f"baselines{suffix}"])
        for name, figures in measured[f"baselines{suffix}"].items():
            assert set(of_baselines[name]) == set(differences[name]) == means
            low, high = of_baselines[name]["ndcg@10"]
            assert low - 1e-6 <= figures["ndcg@10"] <= high + 1e-6
            low, high = differences[name]["ndcg@10"]
            assert low - 1e-6 <= model["ndcg@10"] - figures["ndcg@10"] <= high + 1e-6
        low, high = intervals["coverage@5"]
        assert low < model["coverage@5"] < high
    for name in ("new_items", "new_users", "popularity_weights"):
        for ranking, figures in measured[name].items():
            intervals = measured[f"{name}_intervals"][ranking]
            assert set(intervals) == {one for one in figures if "@" in one}
            low, high = intervals["novelty@5"]
            assert low < figures["novelty@5"] < high
    # Of one draw of counts: weight 0 is the model.
    assert measured["popularity_weights_intervals"]["0"] == measured["model_intervals"]
    for parts in measured["slices"].values():
        for part in parts.values():
            for figures, ends in (("model", "intervals"), ("baseline", "baseline_intervals")):
                assert set(part[figures]) == set(part[ends])
                low, high = part[ends]["map@10"]
                assert low - 1e-6 <= part[figures]["map@10"] <= high + 1e-6
            difference = part["model"]["map@10"] - part["baseline"]["map@10"]
            low, high = part["baseline_differences"]["map@10"]
            assert low - 1e-6 <= difference <= high + 1e-6
    rival = find_verdict(measured, "recall@5").rival
    (line, *_) = [
        line
        for line in report_text.format_report(measured, KS).splitlines()
        if line.startswith("recall@5 ")
    ]
    for low, high in (
        measured["model_intervals"]["recall@5"],
        measured["baseline_intervals"][rival]["recall@5"],
    ):
        assert f"{low:.4f} to {high:.4f}" in line
    # Two intervals: the table is as wide as its terminal with those of all others left out.
    assert line.count(" to ") == 2


@pytest.mark.parametrize(
    ("ease", "ends", "words"),
    [
        (0.29, (0.002, 0.02), "is ahead of the best baseline, ease: recall@5 0.3000 against"),
        (0.1, (-0.01, 0.3), "cannot be told from the best baseline, ease"),
        (0.31, (-0.02, -0.002), "BEHIND the best baseline, ease"),
    ],
)
def test_the_paired_difference_from_the_best_baseline_decides_the_verdict(
    measured, ease, ends, words
):
    """The intervals of the two, which overlap in every case, do not."""
    figures = dict(measured["model"])
    baselines = {name: figures | {"recall@5": 0.05} for name in measured["baselines"]}
    # The truth of a generated shop is no baseline that one could use.
    baselines |= {"ease": figures | {"recall@5": ease}}
    baselines |= {"true_preferences": figures | {"recall@5": 0.9}}
    changed = measured | {
        "model": figures | {"recall@5": 0.3},
        "model_intervals": {"recall@5": [0.05, 0.35]},
        "baselines": baselines,
        "baseline_differences": {"ease": {"recall@5": ends}},
    }
    masked, _ = report_text.format_report(changed, KS).split("Nothing masked")
    assert words in masked and f"{ends[0]:+.4f} to {ends[1]:+.4f} (95% interval)" in masked


def test_validation_asks_no_more_queries_than_a_tenth_of_the_training_pays_for(
    run, monkeypatch, caplog
):
    full = make_validate(run.prepared, run.model)(run.weights)
    asked = full["queries"] + full["queries_without_answer"]
    # A batch of 8 makes a step of 6 x 64 operations, a query takes 2 x 120.
    monkeypatch.setattr(module, "MIN_VALIDATION_QUERIES", 7)
    config = run.config.training
    short = dataclasses.replace(config, batch_size=8, steps=200, validate_every=100)
    config = dataclasses.replace(run.config, training=short)
    prepared = dataclasses.replace(run.prepared, config=config)
    affordable = int(0.1 * 100 * 6 * 8**2 / (2 * len(prepared.items)))
    assert 7 < affordable < asked
    with caplog.at_level("INFO", logger="absl"):
        few = make_validate(prepared, run.model)(run.weights)
    assert few["queries"] + few["queries_without_answer"] == affordable
    assert f"Validations ask {affordable} queries" in caplog.text
    # What is compared with a validation is measured over the same queries.
    assert len(validation_queries(prepared)) == affordable


def test_validation_asks_a_sample_of_the_validation_queries_with_seen_items_masked(run):
    found = make_validate(run.prepared, run.model)(run.weights)

    def measure(split, *, mask_seen):
        queries = make_queries(run.prepared, split, run.config.evaluation.query).sample(50)
        scores = model_scores(run.prepared, run.model, run.weights, queries)
        return evaluate(scores, queries, KS, mask_seen=mask_seen)

    expected = measure("validation", mask_seen=True)
    assert found == expected
    assert found != measure("validation", mask_seen=False) and found != measure(
        "test", mask_seen=True
    )


def test_fit_compares_with_the_best_of_the_cheap_baselines(run, tmp_path, monkeypatch):
    queries = validation_queries(run.prepared)
    scores = model_scores(run.prepared, run.model, run.weights, queries)
    monkeypatch.setattr(cheap, "MAX_EASE_ITEMS", 20)
    rival = cheap.find_rival(run.prepared, scores, queries, "ndcg@10", tmp_path)
    # Neither the truth of the generator, which is ahead of all, nor what takes long.
    assert list(rival.left_out) == ["als", "ease"]
    assert rival.left_out["ease"] == f"{len(run.prepared.items):,} items are more than 20"
    every = make_baselines(run.prepared, queries)
    assert "true_preferences" in every
    figures = {
        name: evaluate(one, queries, (10,), mask_seen=True)["ndcg@10"]
        for name, one in every.items()
        if name not in {"random", "true_preferences", *rival.left_out}
    }
    assert rival.name == max(figures, key=figures.__getitem__) and rival.tried == len(figures)
    assert rival.value == figures[rival.name]
    own = evaluate(scores, queries, (10,), mask_seen=True)["ndcg@10"]
    assert rival.low < own - rival.value < rival.high
    # What it fitted is there for the evaluation.
    assert (tmp_path / "evaluation" / "baselines" / "item_knn").is_dir()
    monkeypatch.setattr(cheap, "MAX_ITEM_PAIRS", 1)
    monkeypatch.setattr(cheap, "MAX_GRAPH_ROWS", 1)
    monkeypatch.setattr(cheap, "MAX_WORDS_ITEMS", 1)
    assert {"item_knn", "item_graph", "last_item_words"} < set(cheap.too_dear(run.prepared))


def test_a_run_on_a_mesh_has_the_figures_of_one_device(run, measured):
    weights = shard_weights(run.weights, 8)
    queries = make_queries(run.prepared, "test", run.config.evaluation.query)
    scores = model_scores(run.prepared, run.model, weights, queries)
    assert len(scores(slice(0, 3)).sharding.device_set) == 8
    on_mesh = measure.measure_run(dataclasses.replace(run, weights=weights), ks=KS, baselines=False)
    for name in ("model", "model_unmasked"):
        assert on_mesh[name] == pytest.approx(measured[name])


def test_a_sample_of_the_queries_is_measured(run):
    sampled = measure.measure_run(run, ks=KS, baselines=False, max_queries=20)
    assert sampled["protocol"]["asked"] == 20 < sampled["protocol"]["available"]
    assert "A sample: 20 of" in report_text.format_report(sampled, KS)
    every_query = make_queries(run.prepared, "test", run.config.evaluation.query)
    queries = every_query.sample(20)
    scores = model_scores(run.prepared, run.model, run.weights, queries)
    assert sampled["model"] == evaluate(scores, queries, KS, mask_seen=True)


def test_items_and_users_that_training_never_saw_are_measured_apart(run, measured):
    queries = make_queries(run.prepared, "test", "user").without_seen()
    trained = set(run.prepared.train.user.tolist())
    of_new_items = [(queries.counts[items] == 0).any() for items in queries.relevant]
    assert measured["new_items"]["model"]["queries"] == sum(of_new_items) > 3
    of_new_users = [
        user not in trained and count > 0 for user, count in zip(queries.user, queries.num_relevant)
    ]
    assert measured["new_users"]["model"]["queries"] == sum(of_new_users) > 0
    assert "Right answers that training never saw" in report_text.format_report(measured, KS)


def test_a_narrow_terminal_shows_the_best_baselines_and_names_the_others():
    figures = {"recall@10": 0.2, "queries": 9, "queries_without_answer": 0}
    baselines = {}
    for name, recall in (("random", 0.01), ("popularity", 0.1), ("ease", 0.19), ("als", 0.15)):
        baselines[name] = figures | {"recall@10": recall}
    shown = report_text._best_that_fit(baselines, "recall@10", 80)
    assert list(shown) == ["ease", "als"]
    assert list(report_text._best_that_fit(baselines, "recall@10", 10)) == ["ease"]
    assert list(report_text._best_that_fit(baselines, "recall@10", 0)) == list(baselines)
