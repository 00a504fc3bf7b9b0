"""Items described by the log: training rows, latest values, and nothing that differs by the row."""

import collections

import numpy as np
import pytest

from tests.data.reading import write
from twotower.config import from_dict
from twotower.core.errors import ConfigError, LeakageError
from twotower.pipeline.prepare import prepare

COLUMNS = ("who", "what", "when", "order", "buyer", "category", "name", "state")


def sales(rows=100):
    """Rows of a shop: a name that changes once, a category that stays, buyers and orders.

    Half of the last tenth is of an item of its own, and every seventh row is a cancelled one, also
    of an item of its own.
    """
    rng = np.random.default_rng(3)
    lines = []
    for row in range(rows):
        item = int(rng.integers(8))
        name = f"item {item}"
        if item == 2 and row > 50:
            name = "item 2, new"
        state = "sold"
        if row % 7 == 0:
            item = 99
            state = "cancelled"
        if row >= 0.9 * rows and row % 2:
            item = 50
        user = f"u{row % 6}"
        category = f"c{item % 3}"
        # Not in the order of time.
        time = 1_700_000_000 + 60 * row
        lines.append((user, f"i{item}", str(time), f"o{row}", f"B {user}", category, name, state))
    head = lines[:50]
    return head[::-1] + lines[50:]


def config_of(tmp_path, lines, *, display=(), features=None, columns=None, **options):
    text = "\n".join(",".join(line) for line in (COLUMNS, *lines)) + "\n"
    path = write(tmp_path / "sales.csv", text.replace("item 2, new", '"item 2, new"'))
    log = {"user_id": "who", "item_id": "what", "timestamp": "when"}
    return from_dict(
        {
            "data": {
                "source": "csv",
                "interactions": {"path": path, "columns": log},
                "item_table": {"path": path, "columns": {"item_id": "what"} | (columns or {})},
                "where": (("state", "==", "sold"),),
                **options.pop("data", {}),
            },
            "split": {"validation": 0.1, "test": 0.1} | options,
            "retrieval": {"display": display},
            "features": {"item": features or {"item_id": {"type": "string"}}},
        }
    )


def test_items_have_the_latest_values_of_training_rows(tmp_path):
    lines = sales()
    prepared = prepare(config_of(tmp_path, lines))
    sold = sorted((line for line in lines if line[-1] == "sold"), key=lambda line: line[2])
    train = sold[: len(prepared.train)]
    latest = {}
    for _, item, _, _, _, category, name, _ in train:
        latest[item] = {"item_id": item, "category": category, "name": name, "state": "sold"}
    found = {row["item_id"]: row for row in prepared.items.to_pylist()}
    # Neither the cancelled item nor that of held-out rows; no buyer, order, user or time.
    assert found == latest and "i50" not in found and "i99" not in found
    assert latest["i2"]["name"] == "item 2, new"
    assert not prepared.has_catalogue
    assert (prepared.test.item == -1).any()


def test_columns_that_differ_within_items_are_said_with_their_share(tmp_path):
    lines = sales()
    report = prepare(config_of(tmp_path, lines)).report
    assert report is not None
    kept, left_out = report.notes
    rows = collections.Counter()
    buyers = collections.defaultdict(set)
    sold = sorted((line for line in lines if line[-1] == "sold"), key=lambda line: line[2])
    for _, item, _, _, buyer, *_ in sold[: report.parts["train"]]:
        rows[item] += 1
        buyers[item].add(buyer)
    several = [item for item, count in rows.items() if count > 1]
    share = sum(len(buyers[item]) > 1 for item in several) / len(several)
    assert f"'buyer' (in {share:.0%} of them)" in left_out and "'order' (in 100% of" in left_out
    assert "latest value" in kept and "'name' (in 12% of them)" in kept


@pytest.mark.parametrize("by", ["display", "feature", "mapping"])
def test_a_column_that_differs_is_kept_when_something_reads_it(tmp_path, by):
    options = {
        "display": {"display": ("order",)},
        "feature": {"features": {"order": {"type": "string"}}},
        "mapping": {"columns": {"last_order": "order"}},
    }[by]
    prepared = prepare(config_of(tmp_path, sales(), **options))
    assert {"order", "last_order"} & set(prepared.items.column_names)
    assert "buyer" not in prepared.items.column_names


def test_all_rows_of_the_file_bring_text_of_held_out_rows_which_is_a_finding(tmp_path):
    data = {"item_rows": "all"}
    with pytest.raises(LeakageError, match=r"held_out_text: \d held-out rows .*item_rows='train'"):
        prepare(config_of(tmp_path, sales(), data=data))
    accepted = config_of(tmp_path, sales(), data=data, accept_leakage=("held_out_text",))
    prepared = prepare(accepted)
    assert {"i50", "i99"} <= set(prepared.items["item_id"].to_pylist()) and prepared.has_catalogue
    assert "buyer" in prepared.items.column_names


def test_a_column_that_was_left_out_is_not_known_to_the_lists(tmp_path):
    with pytest.raises(ConfigError, match="config.retrieval.display"):
        prepare(config_of(tmp_path, sales(), display=("colour",)))
