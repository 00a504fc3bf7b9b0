"""The columns of a log that hold users, items and times, guessed by names and content."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Collection

import pyarrow as pa

from twotower.core.arrow import BadValue, pc
from twotower.core.errors import ConfigError
from twotower.core.ids import IdForm
from twotower.core.times import TimeForm, find_time_forms
from twotower.data.facts import ColumnFacts, column_facts

# Words of names, in the order of preference: a user goes before a session.
_USERS = (
    "user customer client visitor member shopper buyer consumer reviewer subscriber reader "
    "listener viewer player patient student account person profile uid kunde nutzer benutzer "
    "cliente usuario utilisateur utente asiakas kund bruger",
    "household session device cookie",
)
_ITEMS = (
    "item product article sku stock asin isbn movie film show track song artist album book game "
    "video recipe business venue poi listing property hotel restaurant offer ad document doc post "
    "news course job content app anime podcast episode iid pid artikel produkt producto articulo "
    "produit prodotto artikkel tuote ware",
    "title url",
)
_EVENTS = ("event action behavior behaviour interaction activity", "type")
_RATINGS = ("rating stars score overall",)
_TIMES = (
    "timestamp time datetime date ts created occurred day dt t unix epoch at when datum zeit "
    "zeitpunkt fecha data heure aika"
).split()
# Words that say of an id that it is one, or nothing at all.
_IDS = "id ids code key no nr num number hash uuid guid identifier idx index".split()
_FILLERS = "the my full anonymous unique parent raw".split()
_KINDS_OF_EVENT = "type kind name".split()
# Times of something other than the event.
_OTHER_TIMES = (
    "birth release released publish published updated modified end expiry delivery shipped "
    "duration spent zone watch dwell reading".split()
)
MAX_RATINGS = 20  # different numbers that ratings and counts have, where ids have more
MAX_EVENTS = 50  # kinds of events that a column may have
MAX_KINDS = 5  # different words that a column of events has, where ids have more
LONGEST_ID = 4.0  # words


@dataclasses.dataclass(frozen=True)
class LogColumns:
    """The columns of a log by their use, under their names in the source.

    Attributes:
        user: Column of the user's id.
        item: Column of the item's id.
        time: Column of the time; empty for a log without times.
        form: Form of the times, where it was found out.
        event: Column of the kind of event; empty for none.
        rating: Column of the rating; empty for none.
    """

    user: str
    item: str
    time: str = ""
    form: TimeForm | None = None
    event: str = ""
    rating: str = ""

    def mapping(self) -> dict[str, str]:
        """Returns our names of the columns, each with its name in the source."""
        names = {
            "user_id": self.user,
            "item_id": self.item,
            "timestamp": self.time,
            "event": self.event,
            "rating": self.rating,
        }
        return {ours: theirs for ours, theirs in names.items() if theirs}


def guess_columns(
    table: pa.Table,
    *,
    user: str = "",
    item: str = "",
    time: str | None = None,
    has_form: bool = False,
    now: float,
) -> LogColumns:
    """Guesses the columns of a log that are not given.

    >>> log = pa.table({"CustomerID": [1, 1, 2], "StockCode": ["a", "b", "a"], "Price": [1, 2, 3]})
    >>> guess_columns(log, now=0.0).mapping()
    {'user_id': 'CustomerID', 'item_id': 'StockCode'}

    Args:
        table: The log as it was read.
        user: Name of the user's column; empty to guess it.
        item: Name of the item's column, likewise.
        time: Name of the time's column; None to guess it, empty for a log without times.
        has_form: Whether the caller says in which form the times are.
        now: Seconds since the epoch: times are sought between 1990 and tomorrow.

    Raises:
        ConfigError: A given column is not there, or one that is not given cannot be told; the
            message shows what each column looks like.
    """
    log = _Log(table, now)
    for keyword, name in (("user", user), ("item", item), ("time", time)):
        if name and name not in table.column_names:
            raise ConfigError(f"{keyword}={name!r} is no column of the interactions.\n{log}")
    # Columns that the caller gives are taken out first, so that they are guessed for nothing else.
    named_user = user or log.id_column("user", _USERS, taken={item, time})
    named_item = item or log.id_column("item", _ITEMS, taken={named_user, time})
    # Names tell nothing in many languages: what is left is told by the values.
    if not (named_user and named_item):
        user, item = log.id_pair(named_user, named_item, time)
    else:
        user = named_user
        item = named_item
    # Only where the caller gave both: a guess never takes a column twice.
    if user == item:
        raise ConfigError(f"user={user!r} and item={item!r} must be two columns.\n{log}")
    if time is None:
        time = log.time_column(taken={user, item})
        # The form that the caller gives must be of some column.
        if has_form and not time:
            raise ConfigError(f"The column of the times cannot be told: give time=NAME.\n{log}")
    form = None
    if time and not has_form:
        form = log.time_form(time)
    taken = {user, item, time}
    return LogColumns(
        user=user,
        item=item,
        time=time,
        form=form,
        event=log.event_column(taken),
        rating=log.rating_column(taken),
    )


def guess_key(table: pa.Table, column: str, ids: pa.ChunkedArray, side: str, *, now: float) -> str:
    """Guesses the column of a table of users or items that holds their ids.

    Args:
        table: Table of users or items as it was read.
        column: Name of the ids' column in the log, which is taken where the table has it too.
        ids: Ids of the log, text.
        side: "user" or "item".
        now: Seconds since the epoch.

    Raises:
        ConfigError: No column can be told, or it has none of the log's ids.
    """
    words = _USERS if side == "user" else _ITEMS
    # The same name in both files is meant to be the same thing.
    candidates = [column]
    if column not in table.column_names:
        ranked = _by_name(table.column_names, words)
        candidates = ranked[0] if ranked else []
        if not candidates:
            # A table of users may call its key plainly "id" or "user".
            candidates = [name for name in table.column_names if _words(name) in ([side], ["id"])]
    shares = _shares_of_ids(table, candidates, ids)
    if not any(shares.values()):
        # No name tells it: the ids that the log has too.
        shares |= _shares_of_ids(table, table.column_names, ids)
    # By how many ids of the log it knows, as tables have several columns of ids.
    best = max(shares, key=lambda name: shares[name], default="")
    if shares.get(best):
        return best
    problem = f"no column of the {side}s looks like the ids of the log's column {column!r}"
    if best:
        problem = f"column {best!r} of the {side}s has none of the ids in the log's {column!r}"
    raise ConfigError(
        f"{side}s=: {problem}. Rename the column of their ids to {column!r}.\n{_Log(table, now)}"
    )


def describe(table: pa.Table, *, now: float) -> str:
    """Returns a line on each column of a table: the kind of its values, an example, their number.

    Args:
        table: Table as it was read.
        now: Seconds since the epoch.
    """
    return str(_Log(table, now))


def _shares_of_ids(
    table: pa.Table, names: Collection[str], ids: pa.ChunkedArray
) -> dict[str, float]:
    """Returns the share of a log's ids that each of some columns has, from 0 to 1."""
    known = pc.unique(ids)
    shares = {}
    for name in names:
        try:
            values = IdForm.find(table[name]).column(table[name])
        # A column that cannot be read as ids is no candidate.
        except BadValue:
            continue
        is_known = pc.is_in(known, value_set=pc.unique(values).drop_null())
        shares[name] = pc.mean(is_known.cast(pa.float64())).as_py() or 0.0
    return shares


class _Log:
    """A table whose columns are looked at when they are asked for.

    Args:
        table: Table as it was read.
        now: Seconds since the epoch.
    """

    def __init__(self, table: pa.Table, now: float):
        self._table = table
        self._now = now
        self._facts: dict[str, ColumnFacts] = {}

    def __str__(self) -> str:
        lines = []
        for name in self._table.column_names:
            lines.append(f"  {name!r}: {_describe(self._table[name], self.facts(name))}")
        return "The columns are:\n" + "\n".join(lines)

    def facts(self, name: str) -> ColumnFacts:
        """Returns the facts about a column."""
        # A column of a large log takes a while to look at, and is asked for by several guesses.
        if name not in self._facts:
            self._facts[name] = column_facts(name, self._table[name], now=self._now)
        return self._facts[name]

    def id_column(self, keyword: str, words: tuple[str, ...], taken: Collection[str | None]) -> str:
        """Returns the column of the user's or the item's id by its name; empty for none.

        Raises:
            ConfigError: Several might be.
        """
        names = [name for name in self._table.column_names if name not in taken]
        ranked = _by_name(names, words)
        # The first tier with a likely column decides: "user_id" wins over "session_id".
        for candidates in ranked:
            likely = [name for name in candidates if self._may_be_id(name)]
            if len(likely) == 1:
                return likely[0]
            # Two that are equally likely are a question to the caller: a wrong guess trains without
            # a sound.
            if likely:
                listed = " or ".join(map(repr, likely))
                raise ConfigError(
                    f"The column of the {keyword} may be {listed}: give {keyword}=NAME.\n{self}"
                )
        return ""

    def id_pair(self, user: str, item: str, time: str | None) -> tuple[str, str]:
        """Returns the columns of the user and of the item by what they hold.

        Of two columns of ids the first one is the user's, as logs are written.

        Args:
            user: Column of the user by name; empty for none.
            item: Column of the item, likewise.
            time: Column of the time; None if it is not known.

        Raises:
            ConfigError: They cannot be told.
        """
        taken = {user, item, time}
        names = [name for name in self._table.column_names if name not in taken]
        likely = [name for name in names if self._looks_like_ids(name)]
        missing = [keyword for keyword, name in (("user", user), ("item", item)) if not name]
        # As many as are needed and no more, or the guess would be a draw.
        if len(likely) == len(missing):
            return user or likely.pop(0), item or likely.pop(0)
        cures = " and ".join(f"{keyword}=NAME" for keyword in missing)
        raise ConfigError(f"No column can be told to be the {missing[0]}'s: give {cures}.\n{self}")

    def _looks_like_ids(self, name: str) -> bool:
        """Returns whether a column may hold ids by its values alone."""
        facts = self.facts(name)
        if not self._may_be_id(name) or facts.kind == "time":
            return False
        if facts.kind == "number":
            # Ratings, counts and flags have few values.
            return facts.num_values > MAX_RATINGS
        texts = self._table[name].drop_null().slice(0, 1)
        if pc.any(pc.match_substring_regex(texts, r"^-?\d+,\d+$")).as_py():
            # A number with a decimal comma.
            return False
        # The words of a few kinds of events come again in every user's rows.
        return facts.num_values > MAX_KINDS

    def _may_be_id(self, name: str) -> bool:
        facts = self.facts(name)
        # A constant tells nobody from another.
        if facts.num_values < 2:
            return False
        if facts.kind == "number":
            # A price is no id.
            return facts.is_whole
        # Ids of eight digits may look like days.
        if facts.kind == "time":
            return not pa.types.is_temporal(self._table[name].type) and not _is_time_name(name)
        return facts.kind == "text" and facts.mean_length <= LONGEST_ID

    def time_column(self, taken: Collection[str | None]) -> str:
        """Returns the column of the time; empty where no column holds times.

        Raises:
            ConfigError: Several might be.
        """
        times = []
        for name in self._table.column_names:
            if name not in taken and self.facts(name).kind == "time":
                times.append(name)
        if len(times) <= 1:
            return "".join(times)
        ranked = sorted((_rank_of_time(name), name) for name in times)
        best = [name for rank, name in ranked if rank == ranked[0][0]]
        # Of several times the one with the plainest name is that of the event.
        if len(best) == 1:
            return best[0]
        listed = " or ".join(map(repr, best))
        raise ConfigError(
            f"The time of an event may be {listed}: give time=NAME, or time='' for none.\n{self}"
        )

    def time_form(self, name: str) -> TimeForm:
        """Returns the form of the times in a column.

        Raises:
            ConfigError: It holds no times between 1990 and tomorrow, or day and month cannot be
                told apart.
        """
        forms = find_time_forms(self._table[name], now=self._now)
        if len(forms) == 1:
            return forms[0]
        cure = (
            "Say what they are by config={'data.interactions.timestamp_format': '%d/%m/%Y'} (or "
            "'data.interactions.timestamp_unit': 'ms'), to `inspect` by "
            "--timestamp_format='%d/%m/%Y', or give time='' for none"
        )
        if forms:
            listed = " and ".join(form.format for form in forms)
            raise ConfigError(
                f"The times of {name!r} can be read as {listed}: {_example(self._table[name])}. "
                f"{cure}."
            )
        raise ConfigError(
            f"time={name!r}: {_describe(self._table[name], self.facts(name))}. In no unit or "
            f"format these are times between 1990 and tomorrow. {cure}."
        )

    def event_column(self, taken: Collection[str | None]) -> str:
        """Returns the column of the kind of event; empty where none can be told."""
        names = [name for name in self._table.column_names if name not in taken]
        # By name and content both: a column "type" may be that of the item.
        for candidates in _by_name(names, _EVENTS, allowed=(*_IDS, *_KINDS_OF_EVENT)):
            for name in candidates:
                facts = self.facts(name)
                if facts.kind == "text" and facts.num_values <= MAX_EVENTS:
                    return name
        return ""

    def rating_column(self, taken: Collection[str | None]) -> str:
        """Returns the column of the rating; empty where none can be told."""
        names = [name for name in self._table.column_names if name not in taken]
        for candidates in _by_name(names, _RATINGS, allowed=()):
            for name in candidates:
                if self.facts(name).kind == "number":
                    return name
        return ""


def is_known_name(name: str) -> bool:
    """Returns whether a text is the name of a column that logs have.

    >>> is_known_name("CustomerID"), is_known_name("B00X7")
    (True, False)
    """
    words = set(_words(name))
    uses = " ".join([*_USERS, *_ITEMS, *_EVENTS, *_RATINGS]).split()
    known = {*uses, *_TIMES}
    return bool(words & known) and words <= {*known, *_IDS, *_FILLERS}


def _words(name: str) -> list[str]:
    """Returns the words of a column's name, in lower case.

    >>> _words("parentASIN"), _words("visitorid"), _words("Stock Code")
    (['parent', 'asin'], ['visitor', 'id'], ['stock', 'code'])
    """
    spaced = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name)
    words = []
    for word in re.split(r"[\W_]+", spaced.lower()):
        # Names in small letters throughout: "userid" is two words.
        parts = re.fullmatch(r"(.{2,}?)(id|code|hash|time|date)", word)
        if parts and word not in ("datetime", "uuid", "guid", "iid", "pid", "uid"):
            words += parts.groups()
        elif word:
            words.append(word)
    return words


def _by_name(
    names: list[str], tiers: tuple[str, ...], allowed: tuple[str, ...] = tuple(_IDS)
) -> list[list[str]]:
    """Returns the columns whose names are of a use, the likeliest first, equals together.

    Args:
        names: Names of columns.
        tiers: Words of the use, separated by spaces, in the order of preference.
        allowed: Further words that a name may have. Any other, such as the "price" of
            "item_price", makes it a column of something else.
    """
    ranked: dict[tuple[int, bool, bool], list[str]] = {}
    for name in names:
        words = set(_words(name))
        for tier, tier_words in enumerate(tiers):
            # What is left must say that the column is an id, or say nothing.
            others = words - set(tier_words.split())
            if others == words or others - {*allowed, *_FILLERS}:
                continue
            # "user_id" before "user", and "parent_asin" after "asin".
            rank = (tier, not others & set(_IDS), bool(others & set(_FILLERS)))
            ranked.setdefault(rank, []).append(name)
            break
    return [ranked[rank] for rank in sorted(ranked)]


def _rank_of_time(name: str) -> tuple[bool, bool, int]:
    """Returns the rank of a column of times by its name, the likeliest time of an event first."""
    words = _words(name)
    is_other = bool(set(words) & set(_OTHER_TIMES))
    # False sorts before True.
    return is_other, not _is_time_name(name), len(set(words) - set(_TIMES) - {"event"})


def _is_time_name(name: str) -> bool:
    return bool(set(_words(name)) & set(_TIMES))


def _describe(column: pa.ChunkedArray, facts: ColumnFacts) -> str:
    """Returns what a column looks like, in a few words."""
    if facts.share_missing == 1:
        return "nothing but missing values"
    kind = facts.kind
    if kind == "number" and facts.is_whole:
        kind = "whole number"
    kinds = f"{kind}s" if kind != "text" else "text"
    words = f"{kinds} such as {_example(column)}, {facts.num_values:,} different"
    if facts.share_missing:
        words += f", {facts.share_missing:.1%} missing"
    return words


def _example(column: pa.ChunkedArray) -> str:
    row = pc.index(pc.is_valid(column), True).as_py()
    # Reviews and URLs would fill the screen.
    text = str(column[row].as_py())
    return textwrap.shorten(text, 40, placeholder=" ...")
