r"""Recommends items to a user or to many users, or lists the items that are like one, by a bundle.

    twotower query --workdir=runs/quickstart --user=42 --k=10 --where='price <= 20'

    twotower query --workdir=runs/quickstart --item=17 --where=category=lamp,clock

    twotower query --workdir=runs/quickstart --user=42 --rerank=caps:column=category,max_items=2

    twotower query --bundle=shop_bundle --rows='{"city": "Cairo", "history": ["17", "3"]}'

    twotower query --workdir=runs/quickstart --users=users.csv --out=lists.parquet

Prints the recommendations for the user, or the items most like the item. The lists of many users
are written as Parquet: user_id, rank, item_id, score. A bundle needs nothing of its run: --bundle
names its folder alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from twotower.commands import launch, mlflow_flags

if TYPE_CHECKING:
    from twotower.retrieval.batch.listing import ListOptions
    from twotower.retrieval.retriever import Retriever

FLAGS = flags.FlagValues()
_RUN = mlflow_flags.define_run(FLAGS, "bundle")
_BUNDLE = flags.DEFINE_string(
    "bundle",
    None,
    "The folder of a bundle, in the place of --workdir, or models:/NAME@ALIAS of MLflow.",
    flag_values=FLAGS,
)
_USER = flags.DEFINE_string(
    "user", None, "A user id: prints its latest items and its recommendations.", flag_values=FLAGS
)
_ITEM = flags.DEFINE_string("item", None, "An item id: prints similar items.", flag_values=FLAGS)
_ROWS = flags.DEFINE_string(
    "rows",
    None,
    "The features of somebody new, history and all, as JSON or a .json file: one object or a list.",
    flag_values=FLAGS,
)
_USERS = flags.DEFINE_string(
    "users",
    None,
    "A file of user ids: a column user_id of any file that logs are read from, or an id a line.",
    flag_values=FLAGS,
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "File that --users writes; by default recommendations.parquet beside the bundle.",
    flag_values=FLAGS,
)
_K = flags.DEFINE_integer("k", 10, "Length of the lists.", lower_bound=1, flag_values=FLAGS)
_EXCLUDE_SEEN = flags.DEFINE_bool(
    "exclude_seen", True, "Leave out the items that a user has seen.", flag_values=FLAGS
)
_WHERE = flags.DEFINE_multi_string(
    "where",
    [],
    "Condition on the columns of items, such as 'price <= 20', category=lamp,clock, 'genres "
    "contains Drama' or 'released latest 50'; several flags must all hold.",
    flag_values=FLAGS,
)
_ACCEPT = flags.DEFINE_list(
    "accept",
    [],
    "Findings that are right here: unmatched_users writes lists though most users are not known.",
    flag_values=FLAGS,
)

_RERANK = launch.define_rerank(FLAGS)


def main() -> None:
    from twotower.retrieval.batch import listing
    from twotower.retrieval.live.conditions import parse_condition

    launch.require_one(_USER, _ITEM, _ROWS, _USERS)
    launch.require_one(_RUN.workdir, _RUN.mlflow_experiment, _BUNDLE)
    folder = None
    if _BUNDLE.value is None:
        folder = _RUN.folder()
    retriever = load(folder)
    where = ()
    # The columns of all items are made for conditions alone.
    if _WHERE.value:
        items = retriever.items()
        # By the columns of the items: the text of a flag does not say whether 20 is a number.
        where = tuple(parse_condition(text, items, retriever.forms) for text in _WHERE.value)
    options = listing.ListOptions(_K.value, _EXCLUDE_SEEN.value, where, _RERANK.value)
    answer(retriever, options, folder)


def load(workdir: Path | None) -> Retriever:
    """Returns the retriever of a run, or of the bundle of --bundle."""
    from twotower.integrations.mlflow_store import is_address
    from twotower.plugins import run_of
    from twotower.retrieval.retriever import Retriever

    # Known users, and items, have stored vectors: their lists take less time than JAX to load.
    if workdir is not None:
        return launch.load_exported(workdir, load_towers=False)
    folder = _BUNDLE.value or ""
    if not is_address(folder) and run_of(Path(folder)) is None:
        return Retriever.load(folder, load_towers=False)
    # Training is loaded for the folder of a run alone: it takes longer than to answer.
    from twotower import api

    return api.load_retriever(folder)


def find_output(workdir: Path | None) -> Path:
    """Returns the file that the lists of many users are written to by default."""
    name = "recommendations.parquet"
    if workdir is not None:
        return _RUN.output(workdir, name)
    # Beside the bundle and not in it, whose next version would replace it.
    return Path(_BUNDLE.value or "", "..", name)


def answer(retriever: Retriever, options: ListOptions, workdir: Path | None) -> None:
    """Prints, or writes, what the flags ask for.

    Args:
        retriever: Retriever of the bundle.
        options: Lists that the flags ask for.
        workdir: Folder of the run; None of a bundle alone.
    """
    from twotower.retrieval.batch import listing

    # By None and not by emptiness: an empty id is told as one, and not taken for a flag that was
    # left out.
    if _USER.value is not None:
        print(listing.format_user(retriever, _USER.value, options))
    elif _ITEM.value is not None:
        print(listing.format_similar(retriever, _ITEM.value, options))
    elif _ROWS.value is not None:
        for row in listing.read_rows(_ROWS.value, retriever):
            print(listing.format_new_user(retriever, row, options))
    elif _USERS.value is not None:
        out = Path(_OUT.value or find_output(workdir))
        users = Path(_USERS.value)
        print(listing.write_lists(retriever, users, out, options, _ACCEPT.value))
