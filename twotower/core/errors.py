"""The exceptions of the package, and the words with which a wrong name is refused.

Every refusal names the field, echoes the value and offers the nearest right one.
"""

from __future__ import annotations

import bisect
import difflib
import os
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


class TwotowerError(Exception):
    """Base of all exceptions that the package raises on purpose.

    Its message names what is wrong, shows the value and says what to do.

    >>> try:
    ...     tt.load_run("runs/nowhere")
    ... except tt.TwotowerError as error:
    ...     print(str(error)[:53])
    --workdir=runs/nowhere is no run: it has no config.js
    """


# Each class is also the builtin error that callers without this module would catch.
class ConfigError(TwotowerError, ValueError):
    """A configuration that cannot be run; the message names the field, its value and the cure."""


class LeakageError(ConfigError):
    """A split whose figures would be too good: the message says why, shows a row, and how to accept
    it knowingly."""


class FolderError(TwotowerError, ValueError):
    """A folder of another kind, or with content that has changed since it was written."""


class BusyError(TwotowerError, RuntimeError):
    """A folder that another process writes to; the message names the process."""


class ForkError(TwotowerError, RuntimeError):
    """A use of JAX in a process that was forked from one that had used it."""


class PreemptedError(TwotowerError, SystemExit):
    """A training that was asked to end by SIGTERM, and has saved where it was.

    Uncaught, it ends a program with the status 75, by which a scheduler knows to start it again.
    """

    def __init__(self, message: str):
        super().__init__(message)
        self.code = os.EX_TEMPFAIL


class TrainingError(TwotowerError, RuntimeError):
    """Training cannot go on; the message names the step and the last good checkpoint."""


class CheckpointError(TwotowerError, ValueError):
    """A checkpoint that is missing, corrupt, or of another model."""


class ScoreError(TwotowerError, ValueError):
    """Scores that are no numbers, so that nothing can be ranked or measured."""


class QueryError(ScoreError):
    """Query vectors that no ranking can be made from; the message names the first bad row."""


class BadIndexError(TwotowerError, ValueError):
    """An index that cannot be built or read."""


class BundleError(TwotowerError, ValueError):
    """A bundle that is missing, changed, or made of parts that do not belong together."""


class UnknownIdError(TwotowerError, ValueError):
    """An id without a vector; the message names the first and counts them."""


class UnknownItemError(TwotowerError, ValueError):
    """An item id that is not in the corpus; the message names the nearest ones."""


class ChangesError(TwotowerError, ValueError):
    """A log of changes that is damaged, of another bundle, or written by another process."""


class SupersededError(ChangesError):
    """A change to a version of a bundle that another version has replaced."""


class HistoryError(TwotowerError, ValueError):
    """Vectors that the embedding history cannot keep, or does not have."""


class StoreError(TwotowerError, ValueError):
    """Redis did not take the vectors that were to be published."""


MAX_ECHOED = 60  # characters of a value that a message shows
MAX_COMPARED = 64  # texts that are compared with an unknown one, at 20 to 50 µs each
# Text that means no more than its letters and digits say.
_SEPARATORS = re.compile(r"[\s_-]+")


def choose(
    kinds: Mapping[str, T], name: str, field: str, *, synonyms: Mapping[str, str] | None = None
) -> T:
    """Returns `kinds[name]`.

    Args:
        kinds: Kinds by name.
        name: Name to look up.
        field: Name of the field that holds it, for the message.
        synonyms: Other words for kinds -> the name that they have here.

    Raises:
        ConfigError: There is none; the message names the field, the value and the nearest kind.
    """
    if name not in kinds:
        # Listed by name: the dict may be in the order in which modules registered their kinds.
        known = ", ".join(sorted(kinds))
        hint = did_you_mean(name, kinds, synonyms=synonyms)
        raise ConfigError(f"{field}={name!r} is not known{hint} Known: {known}.")
    return kinds[name]


def echo(value: object) -> str:
    """Returns a value as messages show it: as Python writes it, but short, whatever it is.

    >>> echo("x" * 1_000)[-6:]
    'xxxxx…'
    >>> echo(10**5_000)
    'a long int'
    """
    # Only the beginning of a text is written: a request may bring megabytes.
    if isinstance(value, str):
        text = repr(value[: MAX_ECHOED + 1])
    else:
        try:
            text = reprlib.repr(value)
        # Python refuses to write integers of very many digits, and an object may refuse by itself.
        except Exception:
            return f"a long {type(value).__name__}"
    if len(text) > MAX_ECHOED:
        return f"{text[:MAX_ECHOED]}…"
    return text


def did_you_mean(
    name: str, known: Iterable[str], *, synonyms: Mapping[str, str] | None = None
) -> str:
    """Returns the end of a sentence about an unknown name: "; did you mean 'x'?", or a full stop.

    Args:
        name: The unknown name.
        known: Right names.
        synonyms: Other words -> right names; a word may be written in any case, and with any
            separators.

    >>> did_you_mean("sofmax", ["bpr", "softmax"])
    "; did you mean 'softmax'?"
    >>> did_you_mean("InfoNCE", ["bpr", "softmax"], synonyms={"info_nce": "softmax"})
    "; did you mean 'softmax'?"
    """
    known = list(known)
    name = str(name)[:MAX_ECHOED]
    by_word = {_bare(word): right for word, right in (synonyms or {}).items()}
    # The same thing by another word is nearer than another thing by a similar word.
    right = by_word.get(_bare(name))
    if right in known:
        return f"; did you mean {right!r}?"
    # At half of the letters alike a name is still a help; below, it misleads.
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:
        return "."
    return f"; did you mean {close[0]!r}?"


def most_alike(name: str, known: Sequence[str], count: int) -> list[str]:
    """Returns the texts that look most like another one, in a millisecond or two.

    A server tells them of any wrong request, while all others wait.

    >>> most_alike("P10x", sorted(f"P{n}" for n in range(1_000)), 2)
    ['P10', 'P120']

    Args:
        name: The unknown text.
        known: Known texts, in their order where they are more than `MAX_COMPARED`.
        count: Largest number of texts to return.
    """
    # The time of a comparison grows with the product of both lengths.
    name = name[:MAX_ECHOED]
    if len(known) > MAX_COMPARED:
        known = _neighbours(name, known)
    return difflib.get_close_matches(name, known, n=count, cutoff=0.0)


def _neighbours(name: str, known: Sequence[str]) -> list[str]:
    """Returns up to `MAX_COMPARED` texts that begin as another one does, from texts in order."""
    # Most mistakes are at the end of a text: what is meant stands beside it, or is a part of it.
    first = max(0, bisect.bisect(known, name) - MAX_COMPARED // 4)
    found = dict.fromkeys(known[first : first + MAX_COMPARED // 2])
    for length in range(len(name) - 1, 0, -1):
        first = bisect.bisect_left(known, name[:length])
        found.update(dict.fromkeys(known[first : first + 2]))
    return list(found)[:MAX_COMPARED]


def _bare(word: str) -> str:
    return _SEPARATORS.sub("", word).lower()
