"""The report of the data says what the rows say, counted by loops, and what can never be found."""

import collections
import re

import numpy as np
import pytest

from tests.data.test_cases_told import events, make_config, titles
from twotower.config import from_dict
from twotower.core.errors import ConfigError, FolderError
from twotower.data.report import DataReport
from twotower.pipeline.prepare import prepare


def report_of(*args, **options) -> DataReport:
    report = prepare(make_config(*args, **options)).report
    assert report is not None
    return report


def news(*, rows=400, new=0.9, seed=0):
    """A log in time whose last fifth is mostly of items, and half of users, of its own."""
    rng = np.random.default_rng(seed)
    lines = ["user_id,item_id,timestamp"]
    for row in range(rows):
        is_late = row >= 0.8 * rows
        user = f"new{row % 7}" if is_late and row % 2 else f"u{rng.integers(9)}"
        item = f"late{row % 60}" if is_late and rng.random() < new else f"i{rng.integers(20)}"
        lines.append(f"{user},{item},{1_700_000_000 + 60 * row}")
    return "\n".join(lines) + "\n"


def count_by_hand(text, *, held_out):
    """The facts of a log by loops: its last rows are held out, its items are those before them."""
    rows = [line.split(",") for line in text.splitlines()[1:]]
    train = rows[: -2 * held_out]
    test = rows[-held_out:]
    users = {user for user, _, _ in train}
    items = {item for _, item, _ in train}
    answers = collections.defaultdict(set)
    for user, item, _ in test:
        answers[user].add(item)
    recalls = [len(right & items) / len(right) for right in answers.values()]
    return {
        "users": len({user for user, _, _ in rows}),
        "items": len({item for _, item, _ in rows}),
        "corpus": len(items),
        "repeats": len(rows) - len({(user, item) for user, item, _ in rows}),
        "outside": sum(item not in items for _, item, _ in test),
        "new_users": sum(user not in users for user, _, _ in test),
        "recall": np.mean(recalls),
    }


@pytest.mark.parametrize("seed", range(3))
def test_the_report_of_a_news_log_is_what_loops_count(tmp_path, seed):
    text = news(seed=seed)
    report = report_of(tmp_path, text, split={"validation": 0.1, "test": 0.1})
    right = count_by_hand(text, held_out=40)
    test = report.held_out["test"]
    assert (report.users, report.items, report.corpus, report.repeats) == (
        right["users"],
        right["items"],
        right["corpus"],
        right["repeats"],
    )
    assert (test.outside_corpus, test.new_items) == (right["outside"], right["outside"])
    assert test.new_users == right["new_users"]
    assert test.greatest_recall == pytest.approx(right["recall"])
    assert (report.first_time, report.last_time) == (1_700_000_000, 1_700_000_000 + 60 * 399)


def test_what_can_never_be_found_is_said_first_with_the_cure(tmp_path):
    report = report_of(tmp_path, news(), split={"validation": 0.1, "test": 0.1})
    test = report.held_out["test"]
    assert test.outside_corpus / test.rows > 0.8
    first = report.warnings[0]
    assert re.match(rf"\d\d\.\d% of the 40 test answers \({test.outside_corpus}\) are items", first)
    assert f"greatest recall possible is {test.greatest_recall:.4f}" in first
    assert "config.data.item_table.path" in first and "config.split.test" in first
    assert "answers can be found" in "\n".join(report.lines())


def test_a_sound_log_has_no_warning(tmp_path):
    report = report_of(tmp_path, events(), items=titles())
    assert report.warnings == () and len(report.lines()) <= 10


def test_held_out_rows_of_which_none_can_be_found_are_refused(tmp_path):
    text = "user_id,item_id,timestamp\n"
    text += "".join(f"u{row % 5},i{row},{1_700_000_000 + row}\n" for row in range(100))
    # The reason first: every row has an item of its own.
    message = (
        r"100 rows have 100 different items: .* 100\.0% of the 20 \w+ answers .*nothing_to_find"
    )
    with pytest.raises(ConfigError, match=message):
        report_of(tmp_path, text)
    accepted = report_of(tmp_path, text, accept=("nothing_to_find",))
    assert accepted.held_out["test"].greatest_recall == 0
    assert any("100 different items" in warning for warning in accepted.warnings)


@pytest.mark.parametrize("side", ["user", "item"])
def test_a_log_of_one_user_or_one_item_is_refused_unless_it_is_accepted(tmp_path, side):
    text = events(**{side: "x"})
    with pytest.raises(ConfigError, match=f"all 60 rows have {side}_id='x'.*'one_{side}'"):
        report_of(tmp_path, text)
    assert report_of(tmp_path, text, accept=(f"one_{side}",)).rows == 60


def test_baskets_taken_for_users_are_told(tmp_path):
    text = "user_id,item_id,timestamp\n"
    text += "".join(f"b{row // 4},i{row % 9},{1_700_000_000 + row // 4}\n" for row in range(400))
    warnings = report_of(tmp_path, text).warnings
    assert any("users without a training row" in warning for warning in warnings)
    assert any("leave_last_out" in warning for warning in warnings)


def test_users_of_one_row_each_are_told(tmp_path):
    text = "user_id,item_id,timestamp\n"
    text += "".join(f"u{row},i{row % 9},{1_700_000_000 + row}\n" for row in range(100))
    warnings = report_of(tmp_path, text).warnings
    assert any("100 rows have 100 different users" in warning for warning in warnings)


def with_features(config, **features):
    values = {"features": features, "data": {}, "split": {}}
    return from_dict({**vars(config), **values, "data": config.data, "split": config.split})


def test_a_constant_column_and_a_separator_that_occurs_nowhere_are_told(tmp_path):
    items = "item_id,shop,genres\n" + "".join(f"i{n},one,a{n};b\n" for n in range(10))
    features = {
        "shop": {"type": "string"},
        "genres": {"type": "strings", "separator": "|"},
    }
    config = make_config(tmp_path, events(), items=items)
    report = prepare(with_features(config, item=features)).report
    assert report is not None
    constant, separator = report.warnings
    assert constant.startswith("config.features.item.shop: the column 'shop' is 'one' in all 10")
    assert "config.features.item.genres.separator='|' occurs in no text" in separator
    assert "set config.features.item.genres.separator=';'" in separator


def test_values_of_conditions_that_no_row_has_are_told(tmp_path):
    text = events(columns=",event").replace("\n", ",view\n").replace("event,view", "event")
    where = (("event", "in", ("view", "purchase")), ("event", "not starts with", "C"))
    assert report_of(tmp_path, text, where=where).warnings == (
        "config.data.where: no row has event='purchase'.",
        "config.data.where: no event starts with 'C'.",
    )


def test_the_column_weight_is_said_with_its_heaviest_rows(tmp_path):
    lines = events(rows=200, columns=",weight").splitlines()
    weights = [1 if row else 100 for row in range(200)]
    rows = [f"{line},{weight}" for line, weight in zip(lines[1:], weights)]
    report = report_of(tmp_path, "\n".join([lines[0], *rows]) + "\n")
    # Two rows are the heaviest hundredth: 101 of 299.
    assert "the heaviest 1% of the rows hold 34% of it" in report.notes[0]


def test_a_report_is_read_as_it_was_written(tmp_path):
    report = report_of(tmp_path, news(), items=titles(), accept=("unmatched_items",))
    report.save(tmp_path / "data")
    assert DataReport.load(tmp_path / "data") == report
    assert DataReport.load(tmp_path) is None
    (tmp_path / "data" / "report.json").write_text("[]")
    with pytest.raises(FolderError, match=r"report\.json is damaged"):
        DataReport.load(tmp_path / "data")
