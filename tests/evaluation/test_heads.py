"""Metrics of heads against loops and other people's code; which rows they are measured on; where
they are reported."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from tests.retrieval.runs import make_run
from twotower.config import ObjectiveConfig, from_dict
from twotower.core.errors import ScoreError
from twotower.data.shop.generate import label_probabilities
from twotower.evaluation import heads, measure
from twotower.evaluation.evaluate import make_validate
from twotower.evaluation.report import text as report_text
from twotower.objectives.heads import head_logits, init_heads
from twotower.training.run import load_run, train

pytestmark = pytest.mark.slow

HEADS = {
    "like": {"label": "liked", "combine": "multiply"},
    "share": {"label": "shared", "layers": (4,)},
}


@pytest.fixture(params=[0, 1, 2])
def sample(request):
    """(logits with many ties, labels, weights) of 300 rows."""
    rng = np.random.default_rng(request.param)
    logits = np.round(rng.normal(size=300) * 3) / 2
    return (
        logits,
        (rng.random(300) < expit(logits + 0.5)).astype(float),
        rng.integers(0, 4, 300).astype(float),
    )


def repeated(logits, labels, weights):
    """Each row as often as its weight says, each of weight 1."""
    times = weights.astype(int)
    return np.repeat(logits, times), np.repeat(labels, times)


def test_auc_is_the_share_of_pairs_in_the_right_order_with_equals_half(sample):
    logits, labels, weights = sample
    ones = np.flatnonzero(labels == 1)
    zeros = np.flatnonzero(labels == 0)
    won = total = 0.0
    for i in ones:
        for j in zeros:
            won += (
                weights[i]
                * weights[j]
                * (float(logits[i] > logits[j]) + 0.5 * float(logits[i] == logits[j]))
            )
            total += weights[i] * weights[j]
    assert heads.auc(*sample) == pytest.approx(won / total, rel=1e-12)


def test_auc_is_the_statistic_of_mann_and_whitney(sample):
    logits, labels = repeated(*sample)
    # Their U over all pairs: those in the right order, equal ones by half.
    differences = logits[labels == 1][:, None] - logits[labels == 0]
    expected = np.mean((np.sign(differences) + 1) / 2)
    assert heads.auc(*sample) == pytest.approx(expected, rel=1e-12)
    assert heads.auc(logits, labels, np.ones(len(logits))) == pytest.approx(expected, rel=1e-12)


def test_the_others_are_what_counting_rows_one_by_one_gives(sample):
    logits, labels = repeated(*sample)
    rows = [(float(expit(s)), bool(s >= 0), bool(y)) for s, y in zip(logits, labels)]
    count = len(rows)
    expected = {
        "log_loss": -sum(np.log(p if y else 1 - p) for p, _, y in rows) / count,
        "accuracy": sum(said == y for _, said, y in rows) / count,
        "precision": sum(y for _, said, y in rows if said) / sum(said for _, said, _ in rows),
        "recall": sum(said for _, said, y in rows if y) / sum(y for _, _, y in rows),
        "calibration": sum(p for p, _, _ in rows) / sum(y for _, _, y in rows),
    }
    error = 0.0
    for b in range(15):
        inside = [(p, y) for p, _, y in rows if b / 15 <= p < (b + 1) / 15 or (b == 14 and p == 1)]
        if inside:
            error += (
                len(inside)
                / count
                * abs(np.mean([p for p, _ in inside]) - np.mean([y for _, y in inside]))
            )
    expected["calibration_error"] = error
    found = heads.measure_head(*sample)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-10)
    assert found["rows"] == 300


def test_what_is_not_defined_is_left_out_and_nothing_overflows():
    one = np.ones(1)
    for logits, labels, missing in (
        ([2.0, -1.0], [1.0, 1.0], {"auc"}),
        ([-2.0, -1.0], [0.0, 1.0], {"precision"}),
        ([-2.0, -1.0], [0.0, 0.0], {"auc", "precision", "recall", "calibration"}),
    ):
        found = heads.measure_head(np.array(logits), np.array(labels), np.ones(2))
        assert set(heads.HEAD_METRICS) - set(found) == missing
    assert heads.log_loss(np.array([800.0]), np.array([0.0]), one) == 800.0
    # Probability 1 is in the last bin, not one of its own.
    error = heads.calibration_error(np.array([800.0, 5.0]), np.array([0.0, 1.0]), np.ones(2))
    assert error == pytest.approx(expit(5.0) / 2)


def test_a_head_that_tells_nothing_apart_has_an_auc_of_one_half():
    assert heads.auc(np.zeros(50), (np.arange(50) < 5).astype(float), np.ones(50)) == 0.5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    sections = {"objective": {"heads": HEADS}, "evaluation": {"ks": (5,), "validation_queries": 40}}
    run = make_run(tmp_path_factory.mktemp("run"), **sections)
    params = init_heads(run.config.objective.heads, run.model.dim, jax.random.key(1))
    return dataclasses.replace(
        run, weights=run.weights._replace(params=run.weights.params | {"heads": params})
    )


def logits_by_row(run, rows):
    """The towers and the heads on each row apart."""
    features = {
        "user": {n: x[rows.user] for n, x in run.prepared.features["user"].items()}
        | dict(rows.context),
        "item": {n: x[rows.item] for n, x in run.prepared.features["item"].items()},
    }
    users, items = (
        run.model.embed(side, run.weights, jax.tree.map(jnp.asarray, features[side]))
        for side in ("user", "item")
    )
    return head_logits(run.config.objective.heads, run.weights.params["heads"], users, items)


def measured_by_row(run, part, *, among=None):
    rows = getattr(run.prepared, part)
    found = {}
    logits = logits_by_row(run, rows)
    for name, head in HEADS.items():
        labels = rows.labels[head["label"]]
        known = np.flatnonzero(~np.isnan(labels))
        known = known if among is None else known[np.linspace(0, len(known) - 1, among).astype(int)]
        found[name] = heads.measure_head(
            np.asarray(logits[name])[known], labels[known], rows.weight[known]
        )
    return found


def approx(measured):
    return {name: pytest.approx(values, rel=1e-3, abs=1e-5) for name, values in measured.items()}


@pytest.mark.parametrize("part", ["validation", "test"])
def test_heads_are_measured_on_the_labelled_rows_of_a_part(run, part, monkeypatch):
    monkeypatch.setattr(heads, "BLOCK_ROWS", 50)
    expected = measured_by_row(run, part)
    assert (
        100
        < expected["like"]["rows"]
        < expected["share"]["rows"]
        == len(getattr(run.prepared, part))
    )
    assert heads.make_head_metrics(run.prepared, run.model, part)(run.weights) == approx(expected)


def test_a_sample_is_of_the_labelled_rows_of_each_head_and_evenly_spaced(run):
    found = heads.make_head_metrics(run.prepared, run.model, "test", max_rows=30)(run.weights)
    assert found["like"]["rows"] == found["share"]["rows"] == 30
    assert found == approx(measured_by_row(run, "test", among=30))


def test_rows_without_label_item_or_weight_are_left_out(run):
    rows = run.prepared.test
    labels = {
        "liked": np.where(np.arange(len(rows)) % 2, rows.labels["liked"], np.nan),
        "shared": rows.labels["shared"],
    }
    weight = rows.weight.copy()
    item = rows.item.copy()
    weight[10:20] = 0
    item[30:40] = -1
    odd = dataclasses.replace(
        run.prepared, test=dataclasses.replace(rows, labels=labels, weight=weight, item=item)
    )
    kept = np.setdiff1d(np.arange(len(rows)), [*range(10, 20), *range(30, 40)])
    expected = {}
    for name, head in HEADS.items():
        known = kept[~np.isnan(labels[head["label"]][kept])]
        logits = np.asarray(logits_by_row(run, rows)[name])[known]
        expected[name] = heads.measure_head(logits, labels[head["label"]][known], weight[known])
    assert heads.make_head_metrics(odd, run.model, "test")(run.weights) == approx(expected)
    none = dataclasses.replace(
        rows, labels=labels | {"liked": np.full(len(rows), np.nan, np.float32)}
    )
    unlabelled = dataclasses.replace(run.prepared, test=none)
    assert list(heads.make_head_metrics(unlabelled, run.model, "test")(run.weights)) == ["share"]


def test_validation_has_the_metrics_of_heads_beside_those_of_retrieval(run):
    found = make_validate(run.prepared, run.model)(run.weights)
    expected = measured_by_row(run, "validation", among=40)
    assert {"recall@5", "like/auc", "share/log_loss"} <= set(found) and "like/rows" not in found
    for name, values in expected.items():
        assert found[f"{name}/auc"] == pytest.approx(values["auc"], rel=1e-3)


def test_a_head_that_became_nan_is_not_passed_over(run):
    params = run.weights.params
    spoilt = params | {
        "heads": params["heads"]
        | {"share": jax.tree.map(lambda x: x * jnp.nan, params["heads"]["share"])}
    }
    with pytest.raises(ScoreError, match="head 'share' are NaN"):
        heads.make_head_metrics(run.prepared, run.model, "test")(
            run.weights._replace(params=spoilt)
        )


def test_the_report_has_a_table_of_heads(run):
    measured = measure.measure_run(run, ks=(5,), baselines=False)
    for figures in measured["heads"].values():
        low, high = figures.pop("intervals")["auc"]
        assert low < figures["auc"] < high
    assert measured["heads"] == approx(measured_by_row(run, "test"))
    printed = report_text.format_report(measured, (5,))
    row = next(line for line in printed.splitlines() if line.startswith("auc"))
    assert row.split()[1:] == [f"{measured['heads'][name]['auc']:.4f}" for name in HEADS]
    del measured["heads"]["share"]["precision"]
    row = next(
        line
        for line in report_text.format_heads(measured["heads"]).splitlines()
        if line.startswith("precision")
    )
    assert row.split()[2] == "-"


def test_a_model_without_heads_reports_none(run):
    config = dataclasses.replace(run.config, objective=ObjectiveConfig())
    plain = dataclasses.replace(
        run, config=config, prepared=dataclasses.replace(run.prepared, config=config)
    )
    assert "heads" not in measure.measure_run(plain, ks=(5,), baselines=False)
    assert not any(
        "/" in name for name in make_validate(plain.prepared, plain.model)(plain.weights)
    )


def test_a_head_trained_alone_learns_whom_an_item_suits(tmp_path):
    """End to end, on the generated shop, whose probabilities are known; the best checkpoint is
    chosen by the head."""
    ids = {"type": "string", "embedding_size": 16}
    config = from_dict(
        {
            "data": {"source": "shop", "num_interactions": 3000},
            "features": {"user": {"user_id": ids}, "item": {"item_id": ids}},
            "objective": {"weight": 0.0, "heads": {"like": HEADS["like"]}},
            "training": {
                "batch_size": 512,
                "steps": 30,
                "validate_every": 15,
                "metric": "like/auc",
                "optimizer": {"learning_rate": 0.02},
                "tables": {"learning_rate": 0.3},
            },
        }
    )
    train(config, tmp_path / "run", make_validate=make_validate)
    run = load_run(tmp_path / "run")
    rows = run.prepared.test
    found = heads.make_head_metrics(run.prepared, run.model, "test")(run.weights)["like"]
    known = ~np.isnan(rows.labels["liked"]) & (rows.item >= 0)
    true = label_probabilities(run.prepared.truth, rows.user[known], rows.item[known])["liked"]
    best = heads.auc(np.float64(true), rows.labels["liked"][known], rows.weight[known])
    assert 0.6 < found["auc"] < best
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if "validation/like/auc" in line] == [15, 30]


def test_metrics_of_labels_move_with_their_columns():
    """Against the metrics of rows that are weighed anew, user by user."""
    rng = np.random.default_rng(5)
    users = rng.integers(0, 150, 900)
    logits = rng.normal(size=900).round(1) + rng.normal(size=150)[users].round(1)
    labels = (rng.random(900) < 1 / (1 + np.exp(-logits))).astype(float)
    weights = rng.integers(1, 4, 900).astype(float)
    columns = heads.resampled_columns(logits, labels, weights)
    assert set(columns) == set(heads.HEAD_METRICS) - {"calibration_error"}
    resamples = []
    for _ in range(200):
        counts = rng.poisson(1.0, 150)[users]
        figures = [heads.HEAD_METRICS[name](logits, labels, weights * counts) for name in columns]
        by_columns = [np.average(column, weights=counts) for column in columns.values()]
        resamples.append((figures, by_columns))
    exact, linear = np.moveaxis(np.array(resamples), 1, 0)
    for number, name in enumerate(columns):
        figure = heads.HEAD_METRICS[name](logits, labels, weights)
        assert columns[name].mean() == pytest.approx(figure)
        assert np.corrcoef(exact[:, number], linear[:, number])[0, 1] > 0.98, name
        assert linear[:, number].std() == pytest.approx(exact[:, number].std(), rel=0.1), name
    # One label alone has no AUC.
    assert "auc" not in heads.resampled_columns(logits, np.ones(900), weights)
