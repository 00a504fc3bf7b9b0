"""The ids that a log and a table of users or items share, and why others are not shared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable
from typing import Literal

import pyarrow as pa

from twotower.core.arrow import pc
from twotower.core.errors import ConfigError

# Share of the ids of a log that a table must hold: below it the two are hardly of one shop.
LEAST_MATCH = 0.5
# Ids by which the cause of a mismatch is looked for.
SAMPLE = 10_000
# What to do about a cause, where there is more to say than to write the ids alike.
CURES = {
    "leading zeros": "Spreadsheets drop leading zeros: export the table again with ids as text",
    "quotes around them": (
        "Set the option quoting of the file that has them, such as "
        'config.data.interactions.quoting="\'"'
    ),
}
# Words for what may keep equal ids apart -> the ids without it.
CAUSES: dict[str, Callable[[pa.Array], pa.Array]] = {
    "the case of letters": lambda ids: pc.utf8_lower(ids),
    "leading zeros": lambda ids: pc.utf8_ltrim(ids, "0"),
    "spaces around them": lambda ids: pc.utf8_trim_whitespace(ids),
    "quotes around them": lambda ids: pc.utf8_trim(ids, "'\"`"),
    "an ending .0": lambda ids: pc.replace_substring_regex(ids, r"\.0+$", ""),
    "the letters before a number": lambda ids: pc.replace_substring_regex(ids, r"^\D+", ""),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """The ids of a log beside those of a table of users or items.

    Attributes:
        side: Side that the table describes.
        of_log: Number of distinct ids of the log.
        of_table: Number of distinct ids of the table.
        shared: Number of ids that both have.
        only_log: An id of the log that the table lacks; empty where there is none.
        only_table: An id of the table that the log lacks; empty where there is none.
        cause: Words for what keeps most ids apart, such as "leading zeros"; empty if nothing known.
    """

    side: Literal["user", "item"]
    of_log: int
    of_table: int
    shared: int
    only_log: str = ""
    only_table: str = ""
    cause: str = ""

    @property
    def share(self) -> float:
        """Share of the ids of the log that the table has, from 0 to 1."""
        return self.shared / max(self.of_log, 1)

    def describe(self) -> str:
        """Returns the numbers of ids on either side in words, each with an example."""
        side = self.side
        if self.shared == self.of_log == self.of_table:
            return f"{side}s: log and {side}_table have the same {self.of_log:,} ids."
        words = (
            f"{side}s: {self.share:.1%} of the log's {self.of_log:,} ids are in the {side}_table"
        )
        if self.only_log:
            words += f" ({self.only_log!r} is not)"
        others = self.of_table - self.shared
        words += f"; {others:,} of the table's {self.of_table:,} ids have no row of the log"
        if self.only_table:
            words += f" ({self.only_table!r})"
        if self.cause:
            words += f"; most would match without {self.cause}"
        return f"{words}."


def match_ids(of_log: pa.Array, of_table: pa.Array, side: Literal["user", "item"]) -> Match:
    """Compares the ids of a log with those of a table.

    Args:
        of_log: Distinct ids of the log, text.
        of_table: Distinct ids of the table, likewise.
        side: Side that the table describes.
    """
    is_shared = pc.is_in(of_log, value_set=of_table)
    absent = of_log.filter(pc.invert(is_shared))
    shared = len(of_log) - len(absent)
    example = ""
    # Ids of the log are distinct, so that fewer shared than the table has leaves one over.
    if shared < len(of_table):
        is_used = pc.is_in(of_table, value_set=of_log)
        # -1 cannot be: some ids of the table are not shared.
        example = of_table[pc.index(is_used, False).as_py()].as_py()
    cause = ""
    only_log = ""
    if len(absent):
        cause = _find_cause(absent, of_table)
        only_log = absent[0].as_py()
    return Match(
        side=side,
        of_log=len(of_log),
        of_table=len(of_table),
        shared=shared,
        only_log=only_log,
        only_table=example,
        cause=cause,
    )


def check_matches(matches: Iterable[Match], accept: Collection[str]) -> None:
    """Refuses a table that lacks most ids of the log.

    Args:
        matches: Tables of users and items beside the log.
        accept: Option `config.data.accept`.

    Raises:
        ConfigError: A table has less than half of the ids of the log.
    """
    for match in matches:
        finding = f"unmatched_{match.side}s"
        # Where half of them match, the rest have no row, and are not written in another form.
        if match.share >= LEAST_MATCH or finding in accept:
            continue
        accepted = (*accept, finding)
        cure = CURES.get(match.cause, "Write the ids alike in both")
        raise ConfigError(
            f"log and {match.side}_table do not match. {match.describe()} An id without a row "
            f"in the table has no features; one in two forms stands twice. {cure}, or name the "
            f"column that holds the log's ids by config.data.{match.side}_table.columns="
            f"{{'{match.side}_id': ...}}. If so few are right: config.data.accept={accepted!r}."
        )


def _find_cause(absent: pa.Array, of_table: pa.Array) -> str:
    """Returns words for what keeps most of the absent ids apart from those of the table."""
    # A cause keeps most ids apart or is none, which a part of them shows as well.
    sample = absent[:SAMPLE]
    for words, without in CAUSES.items():
        # Both sides without it: either may be the one that has the zeros.
        is_found = pc.is_in(without(sample), value_set=pc.unique(without(of_table)))
        if (pc.mean(is_found.cast(pa.float64())).as_py() or 0.0) > LEAST_MATCH:
            return words
    return ""
