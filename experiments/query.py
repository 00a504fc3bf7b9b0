"""Asks the bundle of a run.

python -m experiments.query --workdir=runs/quickstart --user=42 --k=10           # items for a user
python -m experiments.query --workdir=runs/quickstart --item=17                  # items like an
item python -m experiments.query --workdir=runs/quickstart --users=users.csv --out=lists.parquet
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from experiments import launch

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.")
_USER = flags.DEFINE_string(
    "user", None, "A user id: prints its latest items and what to recommend."
)
_ITEM = flags.DEFINE_string("item", None, "An item id: prints similar items.")
_USERS = flags.DEFINE_string(
    "users", None, "A file of user ids (CSV or Parquet with a column user_id, or an id a line)."
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "Where --users writes its Parquet file; by default WORKDIR/recommendations.parquet.",
)
_K = flags.DEFINE_integer("k", 10, "Length of the lists.", lower_bound=1)
_EXCLUDE_SEEN = flags.DEFINE_bool("exclude_seen", True, "Leave out the items that a user has seen.")


def main() -> None:
    from twotower.core.errors import ConfigError
    from twotower.retrieval.retriever import Retriever
    from twotower.training.run import load_config

    if sum(value is not None for value in (_USER.value, _ITEM.value, _USERS.value)) != 1:
        raise ConfigError("Give one of --user=ID, --item=ID and --users=FILE.")
    load_config(Path(_WORKDIR.value))  # says what to do where the folder is no run
    retriever = Retriever.load(Path(_WORKDIR.value) / "bundle")
    if _USER.value is not None:
        print_user(retriever, _USER.value, _K.value, exclude_seen=_EXCLUDE_SEEN.value)
    elif _ITEM.value is not None:
        print_item(retriever, _ITEM.value, _K.value)
    else:
        out = Path(_OUT.value or Path(_WORKDIR.value) / "recommendations.parquet")
        write_lists(retriever, Path(_USERS.value), out, _K.value, exclude_seen=_EXCLUDE_SEEN.value)


def print_user(retriever, user: str, k: int, *, exclude_seen: bool) -> None:
    """The user's latest items above a table of recommendations."""
    from twotower.retrieval.listing import format_items

    found = retriever.recommend(user, k=k, exclude_seen=exclude_seen)
    if not found.known:
        print(f"User {user} is not known: these are the recommendations for somebody new.\n")
    latest = retriever.latest_items(user, 5)
    if latest:
        print(f"Latest items of user {user}, the latest first:")
        print(format_items(latest, ranked=False) + "\n")
    print(f"Recommended to user {user}:")
    print(format_items(found))


def print_item(retriever, item: str, k: int) -> None:
    """The item above a table of similar ones."""
    from twotower.retrieval.listing import format_items

    found = retriever.similar_items(item, k)
    print(f"Items like {item}:")
    print(format_items([retriever.item(item)], ranked=False) + "\n")
    print(format_items(found))


def write_lists(retriever, users: Path, out: Path, k: int, *, exclude_seen: bool) -> None:
    """Lists of many users as Parquet: user_id, rank, item_id, score. Written whole or not at
    all."""
    import pyarrow.parquet as pq

    from twotower.core.errors import ConfigError
    from twotower.core.files import atomic
    from twotower.retrieval.listing import read_ids

    if out.is_dir():
        raise ConfigError(f"--out={out} is a folder; name a Parquet file.")
    ids = read_ids(users)
    lists = retriever.recommend_many(ids, k, exclude_seen=exclude_seen)
    with atomic(out) as temporary:
        pq.write_table(lists, temporary)
    unknown = sum(not retriever.knows(user) for user in ids)
    print(
        f"{out}: {len(lists):,} rows, lists of {k} for {len(ids):,} users ({unknown:,} of them not known)."
    )


if __name__ == "__main__":
    launch.run(main, required=["workdir"])
