"""Runs side by side: what is paired, what is called equal, and what is refused."""

import dataclasses
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.core.errors import ConfigError
from twotower.evaluation.comparison.compare import (
    ALL,
    Difference,
    adjust,
    compare_records,
    differences_of,
    effect_size,
)
from twotower.evaluation.comparison.records import Record, read_record
from twotower.evaluation.comparison.text import format_comparison

PROTOCOL = {"split": "test", "query": "user", "step": 3, "items": 100, "asked": 400}
USERS = 400


def write(
    folder, rankings, *, protocol=PROTOCOL, order=None, relevant=None, slices=None, answers=None
):
    """Writes what an evaluation would have recorded in the folder of a run."""
    count = len(next(iter(rankings.values())))
    order = np.arange(count) if order is None else order
    relevant = np.ones(count, np.int32) if relevant is None else relevant
    columns = {"user": [f"u{row}" for row in order], "query": np.arange(count)}
    columns |= {"answered": relevant[order] > 0, "relevant": relevant[order]}
    answers = np.arange(len(relevant)) if answers is None else answers
    columns["answers"] = answers[order].astype(np.uint64)
    for name, values in rankings.items():
        for metric in ("recall@10", "ndcg@10"):
            half = 1.0 if metric == "recall@10" else 0.5
            columns[f"{name}/{metric}"] = pa.array(half * values[order], mask=relevant[order] == 0)
    for name, values in (slices or {}).items():
        columns[f"slice/{name}"] = values[order].astype(str)
    table = pa.table(columns).replace_schema_metadata({b"twotower": json.dumps(protocol).encode()})
    path = folder / "evaluation" / "queries.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return str(folder)


def hits(rate, seed=0):
    return (np.random.default_rng(seed).random(USERS) < rate).astype(float)


def record(name, values, users=None, **fields):
    users = np.array([f"u{row}" for row in range(len(values))]) if users is None else users
    ones = np.ones(len(values), int)
    return Record(name, PROTOCOL, users, ones, {"recall@10": values}, {}, **fields)


def test_a_pair_is_told_apart_that_intervals_of_each_could_not_tell():
    """Users differ far more than the runs: unpaired, a lead of .02 for all would drown."""
    rng = np.random.default_rng(0)
    ease = rng.beta(0.3, 1.0, USERS)
    better = ease + 0.02 + 0.01 * rng.normal(size=USERS)
    found = compare_records([record("a", ease), record("b", better)])
    (one,) = found.differences
    assert 0.0 < one.low < one.difference < one.high < 0.03
    # By its own standard error, the lead of the unpaired means is one sixth of a deviation.
    assert 2 * ease.std() / math.sqrt(USERS) > 0.02
    error = (better - ease).std() / math.sqrt(USERS)
    assert one.high - one.low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert one.effect == pytest.approx((better - ease).mean() / (better - ease).std(ddof=1))
    assert one.is_real and found.rows[0].best == "b" and found.rows[0].equals == ()


def test_p_values_of_equals_are_uniform():
    """Of 150 pairs of equals a twentieth is below .05, within four deviations."""
    low = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        base = rng.random(80)
        pair = [record("a", base), record("b", base + rng.normal(size=80))]
        (one,) = differences_of(pair, ["recall@10"], ALL, np.ones(80, bool))
        low += one.p_value < 0.05
    assert abs(low - 7.5) <= 4 * math.sqrt(150 * 0.05 * 0.95), low


def test_values_are_corrected_for_their_number_as_benjamini_and_hochberg_do():
    values = [0.01, 0.04, 0.03, 0.005, 0.9]
    blank = Difference("b", "a", "recall@10", ALL, 0.0, 0.0, 0.0, 0.0, 1.0)
    adjusted = adjust([dataclasses.replace(blank, p_value=value) for value in values])
    ranks = np.argsort(np.argsort(values)) + 1
    steps = [value * len(values) / rank for value, rank in zip(values, ranks)]
    expected = [min(s for s, r in zip(steps, ranks) if r >= rank) for rank in ranks]
    np.testing.assert_allclose([one.adjusted for one in adjusted], expected)


def test_few_users_tell_nothing_apart_and_effects_without_a_deviation_are_none():
    perfect = compare_records([record("a", np.zeros(20)), record("b", np.ones(20))])
    assert not perfect.differences[0].is_real and perfect.rows[0].equals == ("a",)
    assert perfect.to_dict()["differences"][0]["effect"] is None
    many = compare_records([record("a", np.zeros(40)), record("b", np.ones(40))])
    assert many.differences[0].is_real
    assert effect_size(np.zeros(3)) == 0.0


def test_queries_of_one_user_count_as_one_draw():
    """400 queries of 40 users, alike within each: as uncertain as 40 queries."""
    rng = np.random.default_rng(1)
    by_user = rng.normal(size=40)
    users = np.repeat([f"u{user}" for user in range(40)], 10)
    many = [record("a", np.zeros(400), users), record("b", np.repeat(by_user, 10), users)]
    one = [record("a", np.zeros(40)), record("b", by_user)]
    widths = [compare_records(pair).differences[0] for pair in (many, one)]
    assert widths[0].high - widths[0].low == pytest.approx(widths[1].high - widths[1].low, rel=0.2)
    assert widths[0].effect == pytest.approx(widths[1].effect)


def test_files_are_joined_by_users_and_queries_without_an_answer_are_left_out(tmp_path):
    relevant = (np.arange(USERS) % 4 > 0).astype(np.int32)
    first = hits(0.3)
    second = hits(0.6, 1)
    decile = np.arange(USERS) % 20
    mixed = np.random.default_rng(3).permutation(USERS)
    slices = {"decile": decile}
    both = {"model": first, "ease": second}
    names = [
        write(tmp_path / "a", both, relevant=relevant, slices=slices),
        write(tmp_path / "b", {"model": second}, order=mixed, relevant=relevant, slices=slices),
    ]
    found = compare_records([read_record(name) for name in [*names, f"{names[0]}:ease"]])
    asked = relevant > 0
    row = found.rows[0]
    assert (row.queries, row.users, row.best) == (300, 300, names[1])
    assert row.figures[names[0]] == pytest.approx(first[asked].mean())
    # The same ranking under another name, and in another order.
    assert row.figures[names[1]] == row.figures[f"{names[0]}:ease"]
    assert row.equals == (f"{names[0]}:ease",)
    parts = [row.part for row in found.rows if row.metric == "recall@10"]
    # By the numbers that they are; every fourth decile asks nobody.
    assert [part.value for part in parts[1:6]] == ["1", "2", "3", "5", "6"]
    by_slice = next(row for row in found.rows if row.part.value == "13")
    of_slice = asked & (decile == 13)
    assert by_slice.figures[names[1]] == pytest.approx(second[of_slice].mean())
    text = format_comparison(found)
    assert text.splitlines()[-1].startswith("In short, by recall@")
    best = f"* {second[asked].mean():.4f}"
    line = text.splitlines()[3].split("  ")
    assert [x.strip() for x in line if x] == [
        "recall@10",
        f"{first[asked].mean():.4f}",
        best,
        best.replace("*", "="),
    ]
    assert "decile=13" in text
    json.dumps(found.to_dict(), allow_nan=False)


def test_seeds_are_averaged_for_each_query_and_their_spread_stands_apart(tmp_path):
    drawn = [hits(0.3, seed) for seed in range(3)]
    for seed, values in enumerate(drawn):
        rankings = {"model": values} | ({"ease": hits(0.2, 9)} if seed == 0 else {})
        write(tmp_path / "many" / f"seed-{seed}", rankings, protocol=PROTOCOL | {"step": seed})
    one = write(tmp_path / "one", {"model": drawn[0]})
    many = str(tmp_path / "many")
    found = compare_records([read_record(name) for name in (one, many, f"{many}:ease")])
    means = [values.mean() for values in drawn]
    assert found.rows[0].figures[many] == pytest.approx(np.mean(means))
    spread = found.spreads[many]["recall@10"]
    assert list(found.spreads) == [many]
    assert (spread.seeds, spread.lowest, spread.highest) == (3, min(means), max(means))
    assert spread.deviation == pytest.approx(np.std(means, ddof=1))
    assert f"{spread.deviation:.4f}" in format_comparison(found)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"protocol": PROTOCOL | {"items": 99}}, "items is 100 and 99"),
        ({"protocol": PROTOCOL | {"targets": "all"}}, "targets is None and 'all'"),
        ({"relevant": np.full(USERS, 2, np.int32)}, "400 queries have other right answers"),
        ({"answers": np.arange(USERS) // 2}, "399 queries have other right answers, .*as many of"),
        ({"order": np.arange(USERS - 1)}, "400 and 399 queries"),
    ],
    ids=["value", "entry", "numbers", "answers", "number"],
)
def test_runs_that_were_not_measured_alike_are_refused_with_both_values(tmp_path, changed, said):
    a = write(tmp_path / "a", {"model": hits(0.3)})
    rankings = {"model": hits(0.3)[: len(changed.get("order", hits(0.3)))]}
    b = write(tmp_path / "b", rankings, **changed)
    with pytest.raises(ConfigError, match=f"{a} and {b} were not measured alike: .*{said}"):
        compare_records([read_record(a), read_record(b)])


def test_evaluations_of_before_are_compared_by_the_number_of_answers_and_it_is_said(tmp_path):
    a = write(tmp_path / "a", {"model": hits(0.3)})
    b = write(tmp_path / "b", {"model": hits(0.3)})
    assert not compare_records([read_record(a), read_record(b)]).notes
    path = tmp_path / "b" / "evaluation" / "queries.parquet"
    pq.write_table(pq.read_table(path).drop_columns("answers"), path)
    found = compare_records([read_record(a), read_record(b)])
    (note,) = found.notes
    assert note.startswith(f"The right answers are compared by their numbers alone, as {b}")
    assert note in format_comparison(found)


def test_what_was_not_recorded_is_refused_with_what_to_do(tmp_path):
    a = write(tmp_path / "a", {"model": hits(0.3), "ease": hits(0.2)})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="evaluate .*--workdir=.*empty --baselines"):
        read_record(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="did you mean 'ease'"):
        read_record(f"{a}:eaze")
    with pytest.raises(ConfigError, match="no folder of a run"):
        read_record(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="given 2 times"):
        compare_records([read_record(a), read_record(a)])
    with pytest.raises(ConfigError, match="two runs or more"):
        compare_records([read_record(a)])
    (tmp_path / "a" / "evaluation" / "queries.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match="Evaluate again"):
        read_record(a)
