"""Weights by the kind of event, against a plain reading of the log."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from twotower.config import Config, DataConfig, from_dict
from twotower.core.errors import ConfigError
from twotower.features.inputs import HISTORY_WEIGHT
from twotower.pipeline.event_weights import check_event_weights
from twotower.pipeline.prepare import prepare

WEIGHTS = {"view": 1, "cart": 2.5, "buy": 10}


def write_log(path, kinds=("view", "view", "cart", "buy"), rows=60):
    """A log of seven users with a weight in every second row; returns its rows."""
    lines = []
    for n in range(rows):
        weight = "" if n % 2 else str(n % 5)
        lines.append((str(n % 7), str(n % 4), str(1000 * n), kinds[n % len(kinds)], weight))
    header = ("user_id", "item_id", "timestamp", "action", "weight")
    path.write_text("\n".join(",".join(line) for line in (header, *lines)) + "\n")
    return lines


def config_of(path, weights=WEIGHTS, kind="bag", history=None):
    columns = {"event": "action"}
    fields = {"type": "history", "max_length": 4}
    return from_dict(
        {
            "data": {
                "source": "csv",
                "interactions": {"path": str(path), "columns": columns},
                "event_weights": weights,
                "accept": ("old_times",),
            },
            "split": {"validation": 0.2, "test": 0.2},
            "features": {"user": {"history": fields | (history or {})}},
            "model": {"history": {"kind": kind}},
        }
    )


def test_a_row_weighs_what_its_event_does_times_its_own_weight(tmp_path):
    lines = write_log(tmp_path / "log.csv")
    prepared = prepare(config_of(tmp_path / "log.csv"))
    weights = [part.weight for part in (prepared.train, prepared.validation, prepared.test)]
    expected = [WEIGHTS[kind] * (float(weight) if weight else 1) for *_, kind, weight in lines]
    np.testing.assert_array_equal(np.concatenate(weights), np.float32(expected))
    plain = prepare(config_of(tmp_path / "log.csv", weights={}))
    own = [float(weight) if weight else 1 for *_, weight in lines]
    np.testing.assert_array_equal(plain.train.weight, np.float32(own)[: len(plain.train)])


def weights_of_history(config):
    """The logs of the weights of all events; None where events have none."""
    return prepare(config).histories.events.get(HISTORY_WEIGHT)


def test_a_bag_weighs_events_as_rows_do_unless_it_says_otherwise(tmp_path):
    path = tmp_path / "log.csv"
    write_log(path)
    by_default = weights_of_history(config_of(path))
    np.testing.assert_array_equal(
        by_default, weights_of_history(config_of(path, weights={}, history={"weights": WEIGHTS}))
    )
    assert set(by_default.tolist()) == {0.0, *np.log(np.float32([2.5, 10])).tolist()}
    alike = weights_of_history(config_of(path, history={"weights": {"view": 1}}))
    assert not alike.any()
    assert weights_of_history(config_of(path, weights={})) is None
    # Transformers read no weights: none are made.
    assert weights_of_history(config_of(path, kind="causal")) is None


def test_kinds_without_a_weight_are_said_with_their_share(tmp_path):
    write_log(tmp_path / "log.csv")
    prepared = prepare(config_of(tmp_path / "log.csv", weights={"view": 3, "buys": 9}))
    no_event, no_weight = prepared.report.warnings
    assert "count as 1: 'cart' (25.0%), 'buy' (25.0%)" in no_weight
    assert "no row has the event 'buys'; did you mean 'buy'?" in no_event
    assert prepared.train.weight[1] == 3 and prepared.train.weight[3] == 1


def test_kinds_that_differ_by_case_weigh_alike_when_asked_and_are_said_otherwise(tmp_path):
    kinds = ("view", "View", "BUY", "buy", "view")
    lines = write_log(tmp_path / "log.csv", kinds=kinds)
    config = config_of(tmp_path / "log.csv", weights={"view": 3, "BUY": 9, "buy": 9})
    (warning,) = prepare(config).report.warnings
    assert "'View' differs from 'view' by its case alone: config.data.fold_events=True" in warning
    with pytest.raises(ConfigError, match="differ by more than case"):
        dataclasses.replace(config.data, fold_events=True)
    weights = {"view": 3, "buy": 9}
    data = dataclasses.replace(config.data, event_weights=weights, fold_events=True)
    prepared = prepare(dataclasses.replace(config, data=data))
    assert prepared.report.warnings == ()
    expected = [weights[kind.lower()] * float(weight or 1) for *_, kind, weight in lines]
    found = [part.weight for part in (prepared.train, prepared.validation, prepared.test)]
    np.testing.assert_array_equal(np.concatenate(found), np.float32(expected))
    # The events of a bag weigh as the rows do.
    of_history = np.exp(prepared.histories.events[HISTORY_WEIGHT])
    assert set(np.round(of_history, 3).tolist()) == {3.0, 9.0}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"buy": 5}, r"leaves 75.0% of the rows without a weight: 'view' \(50.0%\), 'cart'"),
        ({"view": 0}, "config.data.event_weights={'view': 0} must be a mapping of events to num"),
        ({"view": "much"}, "must be a mapping of events to numbers above 0"),
    ],
)
def test_weights_that_can_only_be_a_mistake_are_refused(tmp_path, weights, message):
    write_log(tmp_path / "log.csv")
    with pytest.raises(ConfigError, match=message):
        prepare(config_of(tmp_path / "log.csv", weights=weights))


def test_a_log_without_kinds_of_events_is_refused():
    config = Config(data=DataConfig(event_weights=WEIGHTS))
    rows = pa.table({"user_id": ["1"], "item_id": ["2"]})
    with pytest.raises(ConfigError, match="needs a column 'event'.*columns={'event': ...}"):
        check_event_weights(rows, config.data)
