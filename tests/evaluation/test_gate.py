"""The gate: what passes, what fails, what it cannot tell, and when it refuses to judge."""

import dataclasses
import json

import numpy as np
import pytest

from twotower.core.errors import ConfigError
from twotower.evaluation.comparison import gate
from twotower.evaluation.comparison.compare import ALL, QueryPart
from twotower.evaluation.comparison.gate import Threshold, judge
from twotower.evaluation.comparison.records import Record
from twotower.evaluation.comparison.text import format_judgement
from twotower.evaluation.metrics import ranking_figures

ITEMS = 1_000
USERS = 2_000


def record(rate, *, name="run", seed=10, users=USERS, slices=None):
    """A run that finds the right answer of each user with a probability, at any rank up to 20."""
    rng = np.random.default_rng(seed)
    hits = np.zeros((users, 20), bool)
    found = rng.random(users) < rate
    hits[found, rng.integers(0, 20, found.sum())] = True
    relevant = np.ones(users, int)
    return Record(
        name=name,
        protocol={"items": ITEMS},
        users=np.array([f"u{user:05d}" for user in range(users)]),
        relevant=relevant,
        values=ranking_figures(hits, relevant, (10, 20)),
        slices=slices or {},
    )


STANDING = record(0.4)
LIMITS = gate.default_thresholds(STANDING)


def changed(share, by, seed=3):
    """The run that stands, with other values for a share of the users."""
    is_changed = np.random.default_rng(seed).random(USERS) < share
    values = {m: np.where(is_changed, by, v) for m, v in STANDING.values.items()}
    return dataclasses.replace(STANDING, name="new", values=values)


@pytest.mark.parametrize(
    ("candidate", "verdict", "code"),
    [
        (STANDING, "passes", 0),
        (record(0.6, name="new", seed=11), "passes", 0),
        (changed(0.01, 0.0), "passes", 0),
        (changed(0.3, 0.0), "fails", 1),
        # About a twentieth less: the limit itself lies within the interval.
        (changed(0.07, 0.0), "undecided", 2),
    ],
    ids=["itself", "better", "hardly worse", "worse", "at the limit"],
)
def test_the_whole_interval_decides(candidate, verdict, code):
    found = judge(STANDING, candidate, LIMITS)
    assert not found.refusal and [trial.verdict for trial in found.preflight] == [
        "passes",
        "fails",
        "fails",
        "fails",
    ]
    assert (found.verdict, found.exit_code) == (verdict, code)
    one = found.checks[0]
    assert one.metric == "recall@10" and one.tolerance == pytest.approx(0.05 * one.standing)
    if verdict == "fails":
        assert one.high < -one.tolerance
    if verdict == "undecided":
        assert one.low < -one.tolerance < one.high
    assert f"{candidate.name}: {verdict.upper()}." in format_judgement(found)


@pytest.mark.parametrize(
    ("standing", "limits", "name"),
    [
        # A twentieth of nothing: shuffled scores are as good.
        (record(0.001), None, "a model of shuffled scores"),
        # 40 users tell a model of four fifths of the answers from nothing.
        (record(0.4, users=40), None, "a model of 20% shuffled answers"),
        # So much may be lost that nothing fails.
        (STANDING, [Threshold("recall@10", ALL, 0.3)], "a model of shuffled scores"),
    ],
    ids=["as bad as chance", "few users", "wide limits"],
)
def test_a_gate_that_known_bad_models_come_through_refuses_to_judge(standing, limits, name):
    better = dataclasses.replace(standing, name="new")
    found = judge(standing, better, limits or gate.default_thresholds(standing))
    assert (found.verdict, found.exit_code) == ("undecided", 2)
    assert found.refusal.startswith(f"The gate refuses to judge: {name}")
    assert "UNDECIDED. The gate refuses" in format_judgement(found)


def test_shuffled_answers_are_those_of_a_random_order():
    """Against orders that are really drawn, of one to five right answers among 200 items."""
    rng = np.random.default_rng(0)
    relevant = rng.integers(0, 6, 4_000)
    hits = np.zeros((len(relevant), 200), bool)
    for query, count in enumerate(relevant):
        hits[query, rng.permutation(200)[:count]] = True
    real = ranking_figures(hits[:, :20], relevant, (10, 20))
    users = np.arange(len(relevant)).astype(str)
    blank = Record("run", {"items": 200}, users, relevant, real, {})
    for name, values in gate.random_order(blank).values.items():
        error = 2**0.5 * real[name].std() / np.sqrt(len(values))
        assert values.mean() == pytest.approx(real[name].mean(), abs=4 * error), name


def test_a_tenth_of_the_training_is_taken_from_the_validations():
    key = "validation/ndcg@10"
    curve = [{"step": 1, "loss": 3.0}, *({"step": s, key: s**0.5} for s in (50, 100, 400, 1_000))]
    name, found = gate.undertrained_by_curve(STANDING, curve, "ndcg@10")
    assert "10% of the training (step 100, 32% of" in name
    share = found.values["recall@10"].mean() / STANDING.values["recall@10"].mean()
    assert share == pytest.approx(0.1**0.5 + 0.9**0.5 * 0.02, abs=0.06)
    # The first one after a tenth, where there is none before it.
    name, _ = gate.undertrained_by_curve(STANDING, [{"step": 200, key: 20.0}, curve[-1]], "ndcg@10")
    assert "20% of the training (step 200" in name
    late = [{"step": 500, key: 0.1}, {"step": 1_000, key: 0.2}]
    assert gate.undertrained_by_curve(STANDING, late, "ndcg@10") is None
    assert gate.undertrained_by_curve(STANDING, [], "ndcg@10") is None


def test_as_good_after_a_tenth_of_the_training_is_refused():
    curve = [{"step": 100, "validation/ndcg@10": 0.2}, {"step": 1_000, "validation/ndcg@10": 0.2}]
    early = gate.undertrained_by_curve(STANDING, curve, "ndcg@10")
    assert early is None, "the best is the first: nothing came before it"
    rising = [curve[0], {"step": 1_000, "validation/ndcg@10": 0.201}]
    early = gate.undertrained_by_curve(STANDING, rising, "ndcg@10")
    found = judge(STANDING, record(0.9, name="new"), LIMITS, undertrained=early)
    assert found.exit_code == 2 and "10% of the training" in found.refusal


def test_a_slice_can_fail_what_all_queries_would_let_pass():
    cold = np.where(np.arange(USERS) % 10 == 0, "new", "old")
    standing = dataclasses.replace(STANDING, slices={"users": cold})
    values = {m: np.where(cold == "new", 0.0, v + 0.1) for m, v in STANDING.values.items()}
    candidate = dataclasses.replace(standing, name="new", values=values)
    limit = {"recall@10": {"tolerance": 0.005}}
    assert judge(standing, candidate, gate.read_thresholds(limit, standing)).verdict == "passes"
    limit["slices"] = {"users=new": {"recall@10": {"share": 0.1}}}
    thresholds = gate.read_thresholds(limit, standing)
    assert [one.part for one in thresholds] == [ALL, QueryPart("users", "new")]
    found = judge(standing, candidate, thresholds)
    assert [one.verdict for one in found.checks] == ["passes", "fails"] and found.exit_code == 1
    # Without a value: each of them.
    both = gate.read_thresholds({"slices": {"users": limit["slices"]["users=new"]}}, standing)
    assert [one.part.value for one in both] == ["new", "old"]


def of_items(found):
    """A run of which the first half of the users finds cold items, and some warm ones too."""
    cold = np.arange(USERS) < USERS // 2
    pairs = np.concatenate([np.flatnonzero(cold), np.arange(USERS)])
    part = dataclasses.replace(
        STANDING,
        users=STANDING.users[pairs],
        relevant=np.ones(len(pairs), int),
        values={m: np.concatenate([found[m][cold], v]) for m, v in STANDING.values.items()},
        slices={"items": np.repeat(["cold", "warm"], [cold.sum(), USERS])},
    )
    return dataclasses.replace(STANDING, of_items={"items": part})


def test_a_slice_of_items_is_judged_by_its_own_right_answers():
    standing = of_items(STANDING.values)
    nothing = {m: np.zeros(USERS) for m in STANDING.values}
    candidate = dataclasses.replace(of_items(nothing), name="new")
    limits = {"recall@10": {"tolerance": 0.01}, "slices": {"items": {"recall@10": {"share": 0.1}}}}
    thresholds = gate.read_thresholds(limits, standing)
    assert [str(one.part) for one in thresholds] == ["all", "items=cold", "items=warm"]
    found = judge(standing, candidate, thresholds)
    # The models of known worth have those of items too, or the gate would refuse.
    alone = gate.read_thresholds({"slices": limits["slices"]}, standing)
    assert not found.refusal and not judge(standing, standing, alone).refusal
    assert [one.verdict for one in found.checks] == ["passes", "fails", "passes"]
    cold = STANDING.values["recall@10"][: USERS // 2].mean()
    assert found.checks[1].standing == pytest.approx(cold)
    assert found.checks[1].candidate == pytest.approx(0.0)
    # Of other training rows: other items are cold.
    other = of_items(STANDING.values).of_items["items"]
    moved = dataclasses.replace(other, slices={"items": other.slices["items"][::-1]})
    with pytest.raises(ConfigError, match="run and run divide the items otherwise by items"):
        judge(standing, dataclasses.replace(candidate, of_items={"items": moved}), thresholds)
    old = dataclasses.replace(candidate, of_items={})
    with pytest.raises(ConfigError, match="new has no figures of the slice items: evaluate"):
        judge(standing, old, thresholds)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"recal@10": {"tolerance": 0.1}}, "did you mean 'recall@10'"),
        ({"recall@10": {"tolerence": 0.1}}, "did you mean 'tolerance'"),
        ({"recall@10": 0.1}, "recall@10 is 0.1, and must be a mapping"),
        ({"recall@10": {"tolerance": 0.1, "share": 0.1}}, "either a tolerance or a share"),
        ({"recall@10": {"tolerance": -0.1}}, "from 0 to below 1"),
        ({"slices": {"user": {"recall@10": {"share": 0.1}}}}, "did you mean 'users'"),
        ({"slices": {"users=nwe": {"recall@10": {"share": 0.1}}}}, "did you mean 'users=new'"),
        ({"slices": {"users": {"recal@10": {"share": 0.1}}}}, "did you mean 'recall@10'"),
        ({"slices": {"items=new": {}}}, "not known. Known: .*run recorded no slices of items"),
        ({"slices": {"item.brand": {}}}, "not known. Known: .*run recorded no slices of items"),
        ({}, "name no metric"),
    ],
)
def test_unknown_names_and_numbers_out_of_range_are_refused(content, said, tmp_path):
    slices = {"users": np.where(np.arange(USERS) % 2, "new", "old")}
    standing = dataclasses.replace(STANDING, slices=slices)
    path = tmp_path / "limits.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=f"limits.json: .*{said}"):
        gate.load_thresholds(path, standing)
