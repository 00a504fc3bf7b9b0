r"""Takes a day's rows into the model that is served.

    python experiments/examples/nightly/nightly.py --runs=runs/nightly \
        --day=2026-11-28 --rows=day.csv

The first day's rows are the whole log so far. A night that was killed is begun again by the same
command. Servers load RUNS/current/refit/bundle, which is always whole: one link is replaced, last.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import twotower as tt

METRIC = "ndcg@10"
CURRENT = "current"  # link to the day that is served


def main() -> None:
    parser = argparse.ArgumentParser(description="Takes a day's rows into the served model.")
    parser.add_argument("--runs", type=Path, required=True, help="folder of all days")
    parser.add_argument("--day", required=True, help="name of the day, such as 2026-11-28")
    parser.add_argument("--rows", required=True, help="file with the rows of the day")
    parser.add_argument("--items", help="file of new and changed items")
    parser.add_argument("--passes", type=float, default=1.0, help="passes over all rows")
    parser.add_argument("--least", type=float, default=0.9, help="least share of the last figure")
    parser.add_argument("--keep", type=int, default=7, help="days to keep")
    args = parser.parse_args()

    run = train(args)
    figure = run.evaluate(ks=(10,))["model"][METRIC]
    # Of the day that is served, not of the last one: bad days must not lower the bar. The two days
    # have other held-out rows, so that `tt.judge` has no pairs to judge by.
    before = figure_of(args.runs / CURRENT)
    line = f"{args.day}: {METRIC} {figure:.4f}, served now {before:.4f}"
    if figure < args.least * before:
        sys.exit(f"{line}: not good enough, what is served stays.")
    print(f"{line}: good enough.")
    # The held-out rows are the newest ones: the served model has to know them.
    tt.refit(run, on_top=True).export()
    swap(args.runs / CURRENT, args.day)
    forget_old(args.runs, keep=args.keep)


def train(args: argparse.Namespace) -> tt.Run:
    """Trains the last day's run on with the new rows; on the first day, a new run."""
    today = args.runs / args.day
    # Also of days that were not good enough: their rows are part of the log.
    earlier = [path for path in days(args.runs) if path.name < args.day]
    if not earlier:
        return tt.fit(args.rows, items=args.items, workdir=today)
    if (today / "config.json").exists():
        # Begun in a night that was killed.
        config = tt.load_run(today, checkpoint="latest").config
        return tt.train(config, today)
    rows = {"interactions": args.rows, "items": args.items}
    return tt.grow(earlier[-1], **rows, workdir=today, passes=args.passes)


def days(runs: Path) -> list[Path]:
    """Returns the folders of all days that have a run, the oldest first."""
    found = [path.parent for path in runs.glob("*/config.json")]
    return sorted(path for path in found if path.name != CURRENT)


def figure_of(day: Path) -> float:
    """Returns what a day's run had reached; 0 before there is any."""
    path = day / "evaluation" / "metrics.json"
    if not path.exists():
        return 0.0
    return json.loads(path.read_text(encoding="utf-8"))["model"][METRIC]


def swap(link: Path, day: str) -> None:
    """Makes a link name another day, in one step."""
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(day)
    os.replace(new, link)


def forget_old(runs: Path, *, keep: int) -> None:
    """Deletes all days but the newest ones and the one that is served."""
    served = (runs / CURRENT).resolve()
    for path in days(runs)[:-keep]:
        if path.resolve() != served:
            shutil.rmtree(path)


if __name__ == "__main__":
    main()
