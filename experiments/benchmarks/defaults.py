"""The default options on four kinds of logs, beside popularity, item-kNN and EASE.

    python -m experiments.benchmarks.defaults [--logs=shop,films,news,sparse] [--options=fit,my_log]
    [--rows=100000] [--split=test] [--quick] [--json=FILE]

Each log is divided by time: the last tenth of its rows is the test, the 5 % before it validation.
The whole corpus is ranked for every user of the test rows, with seen items masked. "fit" is
`tt.fit` without any option; "my_log" is `experiments/configs/my_log.py` with one feature line for
each column of the log, categories read by the history, and for the films its lines for new users.
--quick: logs of 3,000 rows, one after the other, to see it run. The films are read from the folder
in TWOTOWER_DATA.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import app, flags

import twotower as tt
from experiments.benchmarks import harness
from experiments.benchmarks.logs import LOGS, Log
from experiments.configs import my_log
from twotower.core.tables import format_table

_LOGS = flags.DEFINE_list("logs", list(LOGS), "Logs to learn.")
_OPTIONS = flags.DEFINE_list("options", ["fit", "my_log"], "Default options to measure.")
_ROWS = flags.DEFINE_integer("rows", 100_000, "Rows of each log.", lower_bound=1000)
_SPLIT = flags.DEFINE_enum("split", "test", ["test", "validation"], "Rows to find.")

METRICS = ("recall@10", "ndcg@10")
BASELINES = ("popularity", "popularity_last_week", "item_knn", "ease")
QUICK_ROWS = 3_000


def fit(log: Log, workdir: Path) -> tt.Run:
    """Trains with the options that `tt.fit` chooses by itself."""
    return tt.fit(
        str(log.interactions), items=_text(log.items), users=_text(log.users), workdir=workdir
    )


def train_my_log(log: Log, workdir: Path) -> tt.Run:
    """Trains `my_log.py` with the feature lines of the log."""
    config = my_log.get_config()
    config.data.source = "parquet"
    config.data.interactions.path = str(log.interactions)
    config.data.item_table.path = str(log.items)
    if log.users:
        config.data.user_table.path = str(log.users)
        config.data.user_table.columns = {"user_id": "user_id"}
    config.features.user.update(log.user_features)
    config.features.item.update(log.item_features)
    config.update_from_flattened_dict(log.options)
    return tt.train(tt.config.from_dict(config), workdir)


TRAINERS: Mapping[str, Callable[[Log, Path], tt.Run]] = {"fit": fit, "my_log": train_my_log}


def measure(name: str, folder: Path) -> dict[str, dict[str, float]]:
    """Trains and measures a log by each of the default options.

    Args:
        name: Name of the log.
        folder: Folder for its files and runs.

    Returns:
        Ranking -> its metrics, and for towers the seconds of their training.
    """
    rows = QUICK_ROWS if harness.QUICK.value else _ROWS.value
    log = LOGS[name](folder / "log", rows)
    figures: dict[str, dict[str, float]] = {}
    for options in _OPTIONS.value:
        start = time.perf_counter()
        run = TRAINERS[options](log, folder / options)
        seconds = time.perf_counter() - start
        measured = run.evaluate(ks=(10,), split=_SPLIT.value, baselines=not figures)
        for baseline in BASELINES:
            # A baseline may be missing where a log is too large for it.
            if baseline in measured.get("baselines", {}):
                figures[baseline] = measured["baselines"][baseline]
        figures[options] = measured["model"] | {"seconds": seconds}
    return figures


def as_row(log: str, ranking: str, values: Mapping[str, float]) -> list[str]:
    """Returns the cells of a line."""
    seconds = ""
    if "seconds" in values:
        seconds = f"{values['seconds']:.0f}"
    return [log, ranking, *(f"{values[metric]:.4f}" for metric in METRICS), seconds]


def main(argv: list[str]) -> None:
    del argv
    found: dict[str, Any] = {}
    rows = []
    for name in _LOGS.value:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = measure(name, Path(folder))
        rows += [as_row(name, ranking, values) for ranking, values in found[name].items()]
    print(format_table(rows, ["log", "ranking", *METRICS, "seconds"], align="llr"))
    harness.write_json("defaults", found, unit=_SPLIT.value, base="popularity")


def _text(path: Path | None) -> str | None:
    return str(path) if path else None


if __name__ == "__main__":
    app.run(main)
