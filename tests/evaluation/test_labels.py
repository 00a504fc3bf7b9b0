"""A loss on labels: its probabilities are measured, may choose the checkpoint, and are served."""

import dataclasses

import numpy as np
import pytest
from scipy.special import expit

from twotower import api
from twotower.config import from_dict
from twotower.core.errors import ConfigError
from twotower.evaluation import heads
from twotower.evaluation.report import text as report_text
from twotower.objectives.labels import label_logit
from twotower.retrieval.match import MatchModel, to_probability
from twotower.retrieval.retriever import Retriever

ID = {"type": "string", "embedding_size": 8}
CONFIG = {
    "data": {"source": "shop", "num_interactions": 3000},
    "features": {"user": {"user_id": ID}, "item": {"item_id": ID}},
    "objective": {"loss": "binary_cross_entropy", "label": "liked", "pos_weight": 3.0},
    "training": {"batch_size": 256, "steps": 40, "metric": "label/auc", "validate_every": 20},
    "evaluation": {"ks": (5,)},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return api.train(from_dict(CONFIG), tmp_path_factory.mktemp("labels") / "run")


@pytest.mark.slow
def test_a_loss_on_labels_is_measured_and_answers_probabilities(run):
    assert {"label/auc", "label/log_loss"} <= run.validated.keys()
    measured = api.evaluate(run, ks=(5,), baselines=False)
    rows = run.prepared.test
    labels = rows.labels["liked"]
    known = np.flatnonzero(~np.isnan(labels) & (rows.item >= 0) & (rows.weight > 0))
    labels = labels[known]
    users = run.prepared.users["user_id"].to_pylist()
    items = run.prepared.items["item_id"].to_pylist()
    pairs = ([users[row] for row in rows.user[known]], [items[row] for row in rows.item[known]])
    bundle = run.export()
    retriever = Retriever(bundle)
    scores = retriever.score(*pairs)
    params = run.weights.params
    logits = scores / float(run.model.temperature(params)) + float(params["bias"]) - np.log(3)
    ones = logits[labels == 1]
    zeros = logits[labels == 0]
    # The share of pairs in their right order, equal ones by half.
    auc = np.mean((np.sign(ones[:, None] - zeros) + 1) / 2)
    assert measured["labels"]["auc"] == pytest.approx(auc, abs=1e-4)
    assert measured["labels"]["rows"] == len(known)
    curve = measured["labels"]["calibration_curve"]
    assert sum(point["rows"] for point in curve) == len(known)
    told = report_text.format_report(measured, (5,))
    assert "Labels, over the rows" in told
    ends = measured["labels"]["intervals"]
    assert ends["auc"][0] < measured["labels"]["auc"] < ends["auc"][1]
    assert f"{ends['log_loss'][0]:.4f} to {ends['log_loss'][1]:.4f}" in told
    assert list(measured["without_intervals"]) == ["calibration_error"]
    assert "Without an interval: calibration_error: it is a sum of distances" in told
    for probabilities in (
        retriever.score(*pairs, probability=True),
        MatchModel.load(run.workdir / "bundle").probability(*pairs),
    ):
        np.testing.assert_allclose(probabilities, expit(logits), atol=1e-5)
    # Positives count three times in the loss, and not in the probabilities.
    assert np.mean(probabilities) == pytest.approx(labels.mean(), abs=0.1)
    with pytest.raises(ConfigError, match="2 user ids do not go with 1 item ids"):
        retriever.score(pairs[0][:2], pairs[1][:1])


def test_a_loss_that_ranks_knows_no_probability(run):
    ranking = dataclasses.replace(run.config.objective, loss="softmax", label="")
    assert label_logit(ranking, run.model, run.weights.params) is None
    with pytest.raises(ConfigError, match="learned from no label.*binary_cross_entropy"):
        to_probability(np.zeros(1, np.float32), None)


def test_a_curve_of_calibration_compares_what_was_said_with_what_happened():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=5_000)
    weights = rng.integers(0, 3, 5_000).astype(float)
    labels = (rng.random(5_000) < expit(logits - 1)).astype(float)
    probabilities = expit(logits)
    for point in heads.calibration_curve(logits, labels, weights):
        inside = (probabilities >= point["from"]) & (probabilities < point["to"])
        predicted = np.average(probabilities[inside], weights=weights[inside])
        observed = np.average(labels[inside], weights=weights[inside])
        assert point["rows"] == inside.sum()
        assert (point["predicted"], point["observed"]) == pytest.approx((predicted, observed))
