"""Recommends items to a user or to many users, or lists the items that are like one, by a bundle.

    twotower query --workdir=runs/quickstart --user=42 --k=10

    twotower query --workdir=runs/quickstart --item=17

    twotower query --workdir=runs/quickstart --users=users.csv --out=lists.parquet

Prints the recommendations for the user, or the items most like the item. The lists of many users
are written as Parquet: user_id, rank, item_id, score.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The folder of the run.", required=True, flag_values=FLAGS
)
_USER = flags.DEFINE_string(
    "user", None, "A user id: prints its latest items and its recommendations.", flag_values=FLAGS
)
_ITEM = flags.DEFINE_string("item", None, "An item id: prints similar items.", flag_values=FLAGS)
_USERS = flags.DEFINE_string(
    "users",
    None,
    "A file of user ids (CSV or Parquet with a column user_id, or an id a line).",
    flag_values=FLAGS,
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "File that --users writes; by default WORKDIR/recommendations.parquet.",
    flag_values=FLAGS,
)
_K = flags.DEFINE_integer("k", 10, "Length of the lists.", lower_bound=1, flag_values=FLAGS)
_EXCLUDE_SEEN = flags.DEFINE_bool(
    "exclude_seen", True, "Leave out the items that a user has seen.", flag_values=FLAGS
)


def main() -> None:
    from twotower import api
    from twotower.core.errors import ConfigError
    from twotower.retrieval import listing

    if sum(flag.value is not None for flag in (_USER, _ITEM, _USERS)) != 1:
        raise ConfigError("Give one of --user=ID, --item=ID and --users=FILE.")
    retriever = api.load_exported(_WORKDIR.value)
    k = _K.value
    exclude_seen = _EXCLUDE_SEEN.value
    if _USER.value is not None:
        print(listing.format_user(retriever, _USER.value, k, exclude_seen=exclude_seen))
    elif _ITEM.value is not None:
        print(listing.format_similar(retriever, _ITEM.value, k))
    elif _USERS.value is not None:
        users = Path(_USERS.value)
        out = Path(_OUT.value or Path(_WORKDIR.value) / "recommendations.parquet")
        print(listing.write_lists(retriever, users, out, k, exclude_seen=exclude_seen))
