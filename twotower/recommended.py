"""Recommended options for a log: features of its columns, towers, negatives and training.

`tt.fit` starts from them. They were chosen on the validation rows of a shop, of films, of a news
site and of a sparse log; `experiments/benchmarks/defaults.py` measures them beside popularity,
item-kNN and EASE.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twotower.data.facts import ColumnFacts, LogFacts

WIDTH = 64  # D, and the width of the tables of ids
# Words that a text has at the mean, from which on it is read word by word and not as one value.
WORDS_OF_A_TEXT = 1.5
# Share of the items from which on a column of single words tells each item apart, as an id does.
SHARE_OF_A_CODE = 0.5
# Share of held-out rows with new items from which on items must be found by their columns.
SHARE_OF_NEWS = 0.2
# Share of held-out rows with new users from which on the towers must serve them too, and from
# which on they must serve hardly anybody else.
SHARE_OF_NEW_USERS = 0.2
SHARE_OF_STRANGERS = 0.5
USERS_OF_A_PERIOD = 100  # users at least of the last period, by whom tomorrow is told

Options = dict[str, Any]


def recommended_config(facts: LogFacts) -> dict[str, Options]:
    """Returns the options for a log that differ from the defaults, section by section.

    A user is an id, the columns of the users table, the time of the query and a bag of the items
    that they had. An item is an id and the columns of the items table. Columns of the log are left
    out: of a request nobody knows the price or the rating beforehand.

    Args:
        facts: Facts about the log and its columns.

    Returns:
        Section of the configuration -> its options, for `twotower.config.from_dict`.
    """
    return {
        "features": {"user": _user_features(facts), "item": _item_features(facts)},
        "model": _model(facts),
        "objective": _objective(facts),
        "training": _training(facts),
    }


def _user_features(facts: LogFacts) -> Options:
    # The rows for unknown ids are trained by many examples: most logs end with new users.
    oov_rate = 0.3
    if facts.share_new_users > SHARE_OF_STRANGERS:
        oov_rate = 0.6
    features: Options = {"user_id": _id_feature(oov_rate=oov_rate)}
    if facts.has_times:
        # The last of the periods, which have equally many rows, stands for tomorrow.
        features["period"] = {
            "type": "int",
            "column": "timestamp",
            "buckets": _num_periods(facts),
            "embedding_size": WIDTH,
        }
    items = _item_features(facts)
    # Words of texts would make each event as long as a text; values and lists are read at once.
    values = [name for name in items if items[name]["type"] in ("string", "strings")]
    length = 100
    if _has_new_ones(facts):
        length = 50
    features["history"] = {"type": "history", "max_length": length, "reads": tuple(values)}
    columns = _column_features(facts.users, facts.num_users, width=8, reads_text=False)
    return _with_columns(features, columns)


def _num_periods(facts: LogFacts) -> int:
    """Returns the number of periods of equally many rows that the time is divided into."""
    periods = 32
    users = facts.newest_users
    # Where a period is the visits of a few users, its vector would be their taste.
    while periods > 4 and users < USERS_OF_A_PERIOD:
        periods //= 2
        users *= 2
    return periods


def _item_features(facts: LogFacts) -> Options:
    columns = _column_features(facts.items, facts.num_items, width=16, reads_text=True)
    is_news = facts.share_new_items > SHARE_OF_NEWS
    for feature in columns.values():
        if is_news and feature["type"] == "timestamp":
            # By age, what is published tomorrow would be younger than all that was learned.
            feature["parts"] = ("period",)
    oov_rate = 0.01
    if columns:
        # An item that training never saw has no row of its own, and is known by its columns.
        oov_rate = 0.1
    if columns and is_news:
        oov_rate = 0.5
    return _with_columns({"item_id": _id_feature(oov_rate=oov_rate)}, columns)


def _with_columns(features: Options, columns: Options) -> Options:
    """Returns features and those of columns; one whose name is taken gets another."""
    together = dict(features)
    for name, feature in columns.items():
        if name in features:
            together[f"{name}_column"] = feature | {"column": name}
        else:
            together[name] = feature
    return together


def _id_feature(*, oov_rate: float) -> Options:
    return {"type": "string", "embedding_size": WIDTH, "oov_rate": oov_rate}


def _column_features(
    columns: Sequence[ColumnFacts], num_rows: int, *, width: int, reads_text: bool
) -> Options:
    """Returns a feature for each column that is worth one, by the name of the column.

    Args:
        columns: Facts about the columns of a table.
        num_rows: Number of users, or of items.
        width: Width of the table of a column's values.
        reads_text: Whether texts are read word by word; else they are left out.
    """
    features: Options = {}
    for column in columns:
        feature = _column_feature(column, num_rows, width=width, reads_text=reads_text)
        if feature:
            features[column.name] = feature
    return features


def _column_feature(
    column: ColumnFacts, num_rows: int, *, width: int, reads_text: bool
) -> Options | None:
    # A column of one value, or of none, says nothing.
    if column.num_values < 2 and column.kind != "vector":
        return None
    if column.kind == "text":
        return _text_feature(column, num_rows, width=width, reads_text=reads_text)
    if column.kind == "list":
        return {"type": "strings", "separator": column.separator, "embedding_size": width}
    if column.kind == "flag":
        return {"type": "string", "embedding_size": 4}
    if column.kind == "number":
        # Buckets of equally many rows need no scale, and may rise and fall again.
        return {"type": "int", "buckets": 16, "embedding_size": width}
    if column.kind == "time" and column.is_readable:
        return {
            "type": "timestamp",
            "parts": ("age",),
            "embedding_size": width,
        }
    return None


def _text_feature(
    column: ColumnFacts, num_rows: int, *, width: int, reads_text: bool
) -> Options | None:
    is_distinct = column.num_values > SHARE_OF_A_CODE * num_rows
    if column.mean_length < WORDS_OF_A_TEXT and is_distinct:
        # A code, a link or the name of a file: as good as the id, which is there already.
        return None
    few_values = column.num_values < num_rows / 10
    if few_values or column.mean_length < WORDS_OF_A_TEXT:
        return {"type": "string", "embedding_size": width}
    if not reads_text:
        # Names and addresses of people.
        return None
    # Words alone: runs of characters take several times as long, and pay for short texts only.
    length = min(64, max(8, round(2 * column.mean_length)))
    return {"type": "text", "characters": (), "max_length": length, "embedding_size": 32}


def _model(facts: LogFacts) -> Options:
    options: Options = {
        # Of wide rows of ids nearly half are dropped: they overfit within a few passes.
        "user": {"layers": (WIDTH,), "dropout": 0.4},
        "item": {"layers": (WIDTH,), "dropout": 0.4},
        # New users have no history, and nearly all training rows one: some are emptied.
        "history": {"kind": "bag", "dropout": 0.2, "empty_rate": 0.1},
        # Where the machine multiplies bfloat16, lists were as good, sooner.
        "dtype": "auto",
    }
    if facts.share_new_users > SHARE_OF_NEW_USERS:
        options["history"]["empty_rate"] = 0.3
    if _has_new_ones(facts):
        # Cosines and the latest events served new users and items best; plain dot products and
        # all events alike those that are known.
        options["item"]["dropout"] = 0.2
        options["history"]["recency"] = True
        return options
    return options | {"normalize": False, "temperature": 1.0, "learn_temperature": False}


def _has_new_ones(facts: LogFacts) -> bool:
    """Returns whether many users or items of tomorrow are new."""
    return facts.share_new_users > SHARE_OF_NEW_USERS or facts.share_new_items > SHARE_OF_NEWS


def _objective(facts: LogFacts) -> Options:
    if facts.share_new_items <= SHARE_OF_NEWS:
        return {}
    # Items of tomorrow as negatives would teach that what is new is never chosen.
    return {"negatives": {"uniform": 0}}


def _training(facts: LogFacts) -> Options:
    batch_size = 1024
    # Small logs: some steps a pass remain, and batches are never larger than the log.
    while batch_size > 32 and batch_size * 50 > facts.num_training_rows:
        batch_size //= 2
    options: Options = {
        "batch_size": batch_size,
        # On a shop eight passes were no better on validation rows.
        "passes": 5,
        "schedule": {"kind": "cosine"},
        "metric": "ndcg@10",
        "patience": 3,
    }
    if _has_new_ones(facts):
        options["passes"] = 8
        # The rates that suit cosines.
        options["optimizer"] = {"learning_rate": 2e-3}
        options["tables"] = {"learning_rate": 0.05}
    return options
