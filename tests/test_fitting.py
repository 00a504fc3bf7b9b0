"""From tables to a run: what is read, said, chosen and kept, before anything is trained."""

import dataclasses
import datetime
import re
import time

import duckdb
import ml_collections
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower import fitting
from twotower.config import Config, from_dict
from twotower.core.arrow import pc
from twotower.core.errors import ConfigError
from twotower.data.sources.kept import locate
from twotower.data.sources.load import load_dataset
from twotower.fitting import Columns

START = 1_700_000_000


def events(*, rows=400, seed=0):
    """A log of 30 users and 50 items as columns, a row an hour."""
    rng = np.random.default_rng(seed)
    users = rng.integers(1, 31, rows)
    items = rng.integers(1, 51, rows)
    times = START + 3600 * np.arange(rows)
    return {"CustomerID": users, "StockCode": items, "time": times}


def read(interactions, *, items=None, users=None, config=None, user="", item="", time=None):
    columns = Columns(user, item, time)
    return fitting.read_log(interactions, items=items, users=users, columns=columns, config=config)


def as_moments(times):
    return [datetime.datetime.fromtimestamp(int(s), datetime.UTC).isoformat() for s in times]


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """One log in every form in which people have it."""
    folder = tmp_path_factory.mktemp("frames")
    columns = events()
    frame = pd.DataFrame(columns)
    frame.to_csv(folder / "comma.csv", index=False)
    frame.to_csv(folder / "semicolon.csv.gz", index=False, sep=";")
    pq.write_table(pa.table(columns), folder / "events.parquet")
    as_text = {name: list(map(str, values)) for name, values in columns.items()}
    as_text["time"] = as_moments(columns["time"])
    days = pl.from_epoch(pl.Series(columns["time"]), time_unit="s")
    categories = frame.assign(StockCode=frame["StockCode"].astype(str).astype("category"))
    return {
        "pandas": frame,
        "pandas, categories and times": categories.assign(
            time=pd.to_datetime(frame["time"], unit="s")
        ),
        "pandas, floats": frame.astype({"CustomerID": "float64"}),
        "polars": pl.DataFrame(columns),
        "polars, texts and times": pl.DataFrame(as_text).with_columns(time=days),
        "polars, categories": pl.DataFrame(as_text).cast({"StockCode": pl.Categorical}),
        "arrow": pa.table(columns),
        "duckdb": duckdb.from_arrow(pa.table(columns)),
        "csv": folder / "comma.csv",
        "csv with semicolons": str(folder / "semicolon.csv.gz"),
        "parquet": folder / "events.parquet",
    }


def test_a_log_is_the_same_in_every_form(frames):
    kept = {name: read(frame).tables["interactions"] for name, frame in frames.items()}
    expected = kept["arrow"]
    assert expected.schema.field("user_id").type == pa.string()
    for name, table in kept.items():
        assert table.equals(expected), name


def test_the_ids_of_a_frame_are_text_digit_for_digit():
    frame = pd.DataFrame(events())
    frame.loc[5, "CustomerID"] = None  # which makes floats of all
    frame["StockCode"] = [f"{code:06d}" for code in frame["StockCode"]]
    log = read(frame)
    table = log.tables["interactions"]
    assert table["user_id"][0].as_py() == str(int(frame["CustomerID"][0]))
    assert table["item_id"][0].as_py() == frame["StockCode"][0]
    assert "1 rows (0.2%) have no 'CustomerID': left out." in " ".join(log.said)


def test_rows_that_cannot_be_used_are_said_with_their_share():
    columns = events()
    columns["time"] = columns["time"].copy()
    columns["time"][7:10] = 0
    columns["time"][20] = int(time.time()) + 3_600  # a clock that is ahead
    columns = {name: np.concatenate([values, values[:40]]) for name, values in columns.items()}
    log = read(pa.table(columns))
    said = " ".join(log.said)
    assert re.search(r"6 rows \(1.4%\) have a 'time' before 1990 or after tomorrow: left out", said)
    assert re.search(r"37 rows \(8.5%\) repeat the user, item and time", said)
    assert len(log.tables["interactions"]) == 434
    # As options, the bounds keep the same rows.
    bounds = {operator: value for _, operator, value in log.where}
    times = log.tables["interactions"]["timestamp"]
    assert bounds[">="] <= pc.min(times).as_py() and pc.max(times).as_py() <= bounds["<="]


def test_a_table_of_items_is_the_corpus_and_its_columns_are_described():
    titles = [f"green lamp number {i}" for i in range(60)]
    items = pd.DataFrame({"sku": range(60), "title": titles, "genres": ["a|b", "b|c"] * 30})
    log = read(pd.DataFrame(events()), items=items)
    assert log.tables["item_table"].column_names == ["item_id", "title", "genres"]
    facts = {column.name: column for column in log.facts.items}
    assert facts["title"].kind == "text" and facts["title"].mean_length == 4
    assert facts["genres"].kind == "list" and facts["genres"].separator == "|"
    assert log.facts.num_items == 60
    config = fitting.make_config(log, None)
    assert config.features.item["title"]["type"] == "text"
    assert config.data.item_table.path == "run:item_table.parquet"


def test_the_log_as_its_own_table_of_items_gives_what_training_rows_say_of_them():
    columns = events()
    items = columns["StockCode"]
    frame = pd.DataFrame(columns | {"kind": items % 3, "order": [f"o{n}" for n in range(400)]})
    frame.loc[399, "kind"] = 7  # a held-out row
    log = read(frame, items=frame)
    rows = {row["item_id"]: row["kind"] for row in log.tables["item_table"].to_pylist()}
    train = items[: log.facts.num_training_rows]
    assert rows == {str(item): item % 3 for item in train}
    assert log.tables["item_table"].column_names == ["item_id", "kind"]
    assert "  Left out, as they differ within items: 'order'." in log.said
    assert "order" not in fitting.make_config(log, None).features.item


def test_facts_are_those_of_the_log():
    log = read(pd.DataFrame(events()))
    facts = log.facts
    assert (facts.num_rows, facts.num_users, facts.num_items) == (400, 30, 50)
    assert facts.has_times and facts.span_days == pytest.approx(399 / 24)
    assert facts.num_training_rows == 320
    assert facts.share_new_users == 0 and facts.items == ()


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (lambda log: log, "time", "split by time: 320 rows to train, 40"),
        (lambda log: log.drop(columns="time"), "leave_last_out", "by the last rows of each user"),
        (lambda log: log.assign(time=START), "leave_last_out", "do not divide the log"),
        (
            lambda log: log.drop(columns="time").assign(CustomerID=range(400)),
            "random",
            "split at random: 320 rows to train",
        ),
    ],
)
def test_the_split_is_one_that_the_log_allows(change, kind, said):
    log = read(change(pd.DataFrame(events())))
    assert log.split["kind"] == kind
    assert said in " ".join(log.said)
    # As training will divide it: the configuration is one that reads the kept rows.
    assert fitting.make_config(log, None).split.kind == kind


def test_a_split_of_the_caller_is_taken():
    accepted = ("future_rows", "repeated_pairs")
    config = {"split": {"kind": "leave_last_out", "accept_leakage": accepted}}
    log = read(pd.DataFrame(events()), config=config)
    assert fitting.make_config(log, config).split.kind == "leave_last_out"
    with pytest.raises(ConfigError, match="leakage audit refuses.*leave_last_out"):
        read(pd.DataFrame(events()), config={"split.kind": "leave_last_out"})


def test_a_log_that_is_too_small_is_refused():
    with pytest.raises(ConfigError, match="At least 20 are needed"):
        read(pd.DataFrame(events(rows=15)))


def test_columns_may_be_named_by_keyword_or_by_option():
    frame = pd.DataFrame(events()).rename(
        columns={"CustomerID": "a", "StockCode": "b", "time": "c"}
    )
    by_keyword = read(frame, user="a", item="b", time="c")
    columns = {"user_id": "a", "item_id": "b", "timestamp": "c"}
    by_option = read(frame, config={"data.interactions.columns": columns})
    assert by_keyword.tables["interactions"].equals(by_option.tables["interactions"])
    # Two columns of ids can be told by what they hold; three cannot.
    assert read(frame).tables["interactions"].equals(by_keyword.tables["interactions"])
    with pytest.raises(ConfigError, match="user's: give user=NAME and item=NAME"):
        read(frame.assign(d=frame["b"]))


def test_a_format_of_the_caller_decides_between_day_and_month():
    frame = pd.DataFrame(events())
    moments = pd.to_datetime(frame["time"], unit="s")
    # Of the first twelve days of the months alone.
    frame["time"] = (moments - pd.to_timedelta((moments.dt.day - 1) // 2, unit="D")).dt.strftime(
        "%d/%m/%Y %H:%M"
    )
    frame = frame[frame["time"].str[:2].astype(int) <= 12]
    with pytest.raises(ConfigError, match="timestamp_format"):
        read(frame)
    log = read(frame, config={"data.interactions.timestamp_format": "%d/%m/%Y %H:%M"})
    first = log.tables["interactions"]["timestamp"][0].as_py()
    assert (
        datetime.datetime.fromtimestamp(first, datetime.UTC).strftime("%d/%m/%Y %H:%M")
        == (frame["time"].iloc[0])
    )


@pytest.fixture(scope="module")
def log():
    return read(pd.DataFrame(events()))


def test_options_of_the_caller_replace_those_recommended(log):
    recommended = fitting.make_config(log, None)
    assert recommended.training.passes > 0 and recommended.training.patience > 0
    changes = [
        {"training.steps": 7, "model.normalize": True},
        {"training": {"steps": 7}, "model": {"normalize": True}},
        ml_collections.ConfigDict({"training": {"steps": 7}, "model": {"normalize": True}}),
    ]
    for changed in changes:
        config = fitting.make_config(log, changed)
        assert (config.training.steps, config.training.passes) == (7, 0)
        assert config.model.normalize and config.features == recommended.features
    with pytest.raises(ConfigError, match="'stepz'; did you mean 'steps'"):
        fitting.make_config(log, {"training.stepz": 7})


def test_a_whole_configuration_is_taken_but_for_its_data(log):
    whole = from_dict({"model": {"normalize": False}, "data": {"source": "shop", "k_core": 2}})
    config = fitting.make_config(log, whole)
    assert config.data.source == "parquet" and config.data.k_core == 2
    assert dataclasses.replace(config, data=whole.data) == whole
    named = fitting.make_config(log, "my_log")
    assert named.data.interactions.path == "run:interactions.parquet"
    assert named.training.metric == "ndcg@10"


def test_requests_have_times_in_the_unit_of_the_log(tmp_path):
    frame = pd.DataFrame(events()).assign(time=lambda x: 1000 * x["time"])
    log = read(frame)
    config = fitting.make_config(log, None)
    fitting.begin(tmp_path / "run", log, config)
    kept = load_dataset(locate(config.data, tmp_path / "run"))
    times = kept.interactions["timestamp"]
    assert times.equals(log.tables["interactions"]["timestamp"])
    moment = times[0].as_py()
    assert kept.contract.times([1000 * moment, "2025-01-31"]).to_pylist() == [moment, 1_738_281_600]


def test_a_folder_is_named_by_the_day_and_never_taken_twice(log, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = fitting.make_config(log, None)
    first = fitting.begin(None, log, config)
    second = fitting.begin(None, log, config)
    assert re.fullmatch(r"runs/\d{4}-\d\d-\d\d-1", str(first))
    assert str(second) == str(first)[:-1] + "2"
    assert pq.read_table(first / "data" / "rows" / "interactions.parquet").num_rows == 400


def test_a_folder_with_a_run_of_other_rows_is_refused(log, tmp_path):
    config = fitting.make_config(log, None)
    folder = fitting.begin(tmp_path / "run", log, config)
    # As long as nothing was trained, rows may be replaced.
    other = read(pd.DataFrame(events(seed=1)))
    fitting.begin(folder, other, config)
    (folder / "checkpoints" / "4").mkdir(parents=True)
    fitting.begin(folder, other, config)
    with pytest.raises(ConfigError, match="trained with other rows"):
        fitting.begin(folder, log, config)


def test_a_folder_with_something_else_is_left_alone(log, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="other files"):
        fitting.begin(tmp_path, log, fitting.make_config(log, Config()))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
