"""Ids that a log and a table write in two ways are refused, with what keeps them apart."""

import dataclasses
import re

import pytest

from tests.data.reading import write
from twotower.config import FeaturesConfig, from_dict
from twotower.core.errors import ConfigError
from twotower.experiment import load_config
from twotower.pipeline.prepare import prepare, read_parts


def make_config(tmp_path, log, *, items="", users="", split=None, **data):
    """The configuration of a log, and of tables, that are given as text."""
    tables = {"interactions": {"path": write(tmp_path / "log.csv", log)}}
    if items:
        tables["item_table"] = {"path": write(tmp_path / "items.csv", items)}
    if users:
        tables["user_table"] = {"path": write(tmp_path / "users.csv", users)}
    split = split or {"validation": 0.2, "test": 0.2}
    return from_dict({"data": {"source": "csv", **tables, **data}, "split": split})


def events(*, user="u{}", item="i{}", rows=60, columns=""):
    """A log of 6 users and 10 items, a row a minute from 14 November 2023 on."""
    lines = [f"user_id,item_id,timestamp{columns}"]
    for row in range(rows):
        time = 1_700_000_000 + 60 * row
        lines.append(f"{user.format(row % 6)},{item.format(row % 10)},{time}")
    return "\n".join(lines) + "\n"


def titles(item="i{}", count=10):
    return "item_id,title\n" + "".join(f"{item.format(n)},Title {n}\n" for n in range(count))


# name: (form of the ids in the log, form in the table, words for what keeps them apart)
FORMS = {
    "leading zeros": ("0001{}", "1{}", "leading zeros"),
    "case": ("I{}", "i{}", "the case of letters"),
    "quotes": ("'i{}'", "i{}", "quotes around them"),
    "a prefix": ("{}", "item-{}", "the letters before a number"),
    "an ending": ("{}x", "{}x.0", "an ending .0"),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_table_whose_ids_are_written_otherwise_is_refused(tmp_path, name):
    in_log, in_table, cause = FORMS[name]
    config = make_config(tmp_path, events(item=in_log), items=titles(in_table))
    with pytest.raises(ConfigError) as refused:
        read_parts(config)
    message = str(refused.value)
    assert message.startswith("log and item_table do not match. items: 0.0% of the log's 10 ids")
    assert repr(in_log.format(0)) in message and repr(in_table.format(0)) in message
    assert f"most would match without {cause}" in message
    assert "config.data.accept=('unmatched_items',)" in message


def test_a_table_of_other_users_is_refused_unless_it_is_accepted(tmp_path):
    users = "user_id,city\nu0,Riyadh\nx1,Jeddah\nx2,Jeddah\n"
    config = make_config(tmp_path, events(), users=users)
    with pytest.raises(ConfigError, match=r"16\.7% of the log's 6 ids are in the user_table"):
        prepare(config)
    accepted = make_config(tmp_path, events(), users=users, accept=("unmatched_users",))
    assert len(prepare(accepted).users) == 8


def test_a_table_with_half_of_the_ids_is_taken(tmp_path):
    dataset, _ = read_parts(make_config(tmp_path, events(), items=titles(count=5)))
    (match,) = dataset.matches
    assert (match.of_log, match.of_table, match.shared) == (10, 5, 5)
    assert (match.only_log, match.only_table) == ("i5", "")


def test_ids_in_two_forms_are_told_though_most_match(tmp_path):
    items = titles(count=7) + "I7,Title 7\nI8,Title 8\nI9,Title 9\n"
    report = prepare(make_config(tmp_path, events(), items=items)).report
    assert report is not None
    (warning, of_case) = report.warnings
    assert of_case == "items: 3 ids differ from others only by case, as 'I7' and 'i7' do."
    assert warning.startswith("items: 70.0% of the log's 10 ids are in the item_table")
    assert warning.endswith("most would match without the case of letters.")


def test_a_finding_that_is_not_known_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="config.data.accept='unmatched_item'.*unmatched_items"):
        from_dict({"data": {"accept": ("unmatched_item",)}})


def without_times(rows=240, *, time=""):
    """A log of 6 users who come back to items, without times or all with one."""
    lines = ["user_id,item_id" + ",timestamp" * bool(time)]
    for row in range(rows):
        line = f"u{row % 6},i{row * row % 50}"
        if time:
            # Nearly constant: one row in twenty is a second earlier.
            line += f",{int(time) - (row % 20 == 0)}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def options_of(message):
    """The options that a message says to set."""
    found = dict(re.findall(r"config\.(split\.kind|data\.duplicates)='(\w+)'", message))
    return {"split": {"kind": found["split.kind"]}, "duplicates": found["data.duplicates"]}


@pytest.mark.parametrize("time", ["", "1700000000"])
def test_a_log_whose_times_give_no_order_needs_one_message(tmp_path, time):
    """Its options are taken: no second refusal sends back to a split by time."""
    text = without_times(time=time)
    with pytest.raises(ConfigError) as refused:
        read_parts(make_config(tmp_path, text, split={"kind": "time"}))
    message = str(refused.value).split("the log has none.")[-1]
    options = options_of(message.split("or set ")[-1])
    assert options == {"split": {"kind": "leave_last_out"}, "duplicates": "first"}
    for kind in ("leave_last_out", "random"):
        options["split"]["kind"] = kind
        _, parts = read_parts(make_config(tmp_path, text, **options))
        assert len(parts.test)


def test_features_of_the_time_are_named_where_a_log_has_none(tmp_path):
    user = {"user_id": {"type": "string"}, "period": {"type": "int", "column": "timestamp"}}
    config = make_config(tmp_path, without_times())
    config = dataclasses.replace(config, features=FeaturesConfig(user=user))
    with pytest.raises(ConfigError, match=r"leave out config\.features\.user\['period'\]"):
        read_parts(config)


def test_my_log_reads_a_log_without_times(tmp_path):
    path = write(tmp_path / "log.csv", without_times())
    options = {"data.interactions.path": path, "split.validation": 0.2}
    config = load_config("my_log:no_times", **options)
    report = prepare(config).report
    assert report is not None and report.first_time is None
    with pytest.raises(ConfigError) as refused:
        prepare(load_config("my_log", **options))
    for word in ("columns=", "config.split.kind='leave_last_out'", "read the column 'timestamp'"):
        assert word in str(refused.value)
