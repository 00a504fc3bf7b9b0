"""Ids of users and items: one text for each, however a source writes it.

A log decides once which form its ids have. Its tables, requests, lists and upserts are then read in
that form, so that 3, 3.0, "3" and "3.0" ask for one user where all users are whole numbers, and
"007" stays "007" where they are codes.
"""

from __future__ import annotations

import decimal
import enum
import math
import numbers
import re
import unicodedata
import uuid
from collections.abc import Collection, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from twotower.core.arrow import (
    BadValue,
    is_list,
    is_missing,
    members_of,
    pc,
    plain_text,
    read_value,
    text_bytes,
)
from twotower.core.errors import ConfigError, echo

_WHOLE = r"^(0|-?[1-9]\d*)(\.0+)?$"
# What frames write for a missing number once it has become text.
_NO_NUMBER = r"^(?i:nan|none|null|nat|<na>)$"
# No id holds them: C code ends a text at NUL, and a byte order mark is part of a file's encoding.
_REFUSED = "\x00\ufeff"
# Larger floats stand for several whole numbers each.
EXACT_FLOAT = 2.0**53
# What 256 bits hold, as hashes and decimals do; Python refuses to write much larger ones.
LARGEST_INTEGER = 2**256

_BYTES = "holds bytes: decode them to text first, or write them in hexadecimal"
_LISTS = "holds lists: write one row for each member (explode in pandas, polars and Arrow)"
_NOT_WHOLE = (
    "is no exact whole number, and no id: make the ids text or integers where they are made"
)
_NO_ID = "is no id: an id is text or a whole number"


class IdForm(enum.Enum):
    """The form of the ids of a log.

    Attributes:
        DIGITS: All ids are whole numbers without leading zeros; an ending ".0" is left out.
        TEXT: Ids are the text that the source has.

    >>> IdForm.find(pa.chunked_array([["7", "12.0"]])).one("7.0")
    '7'
    >>> IdForm.find(pa.chunked_array([["7", "012"]])).one("7.0")
    '7.0'
    """

    DIGITS = "digits"
    TEXT = "text"

    @classmethod
    def find(cls, column: pa.ChunkedArray) -> IdForm:
        """Returns the form that the ids of a column have.

        Args:
            column: Ids of a log, of any type; missing ones have no form.
        """
        texts = plain_text(column)
        if not pa.types.is_string(texts.type):
            return cls.DIGITS if _is_number(texts.type) else cls.TEXT
        if _are_digits(texts):
            return cls.DIGITS
        texts = _without_empty(texts)
        # Most columns of text are told by their first id, without a look at the others.
        first = pc.index(pc.is_valid(texts), True).as_py()
        if first < 0 or not re.match(f"{_WHOLE}|{_NO_NUMBER}", str(texts[first]).strip()):
            return cls.TEXT
        distinct = pc.utf8_trim_whitespace(pc.unique(texts).drop_null())
        is_whole = pc.match_substring_regex(distinct, _WHOLE)
        others = distinct.filter(pc.invert(is_whole))
        are_missing = pc.match_substring_regex(others, f"{_NO_NUMBER}|^$")
        if len(others) < len(distinct) and pc.all(are_missing, min_count=0).as_py():
            return cls.DIGITS
        return cls.TEXT

    def column(self, values: pa.ChunkedArray) -> pa.ChunkedArray:
        """Returns a column of ids as text, trimmed and in Unicode's form NFC; null is missing.

        Args:
            values: Ids of any type.

        Raises:
            BadValue: Values of this type are no ids, or one of them is none.
        """
        texts = plain_text(values)
        if not pa.types.is_string(texts.type):
            return _typed_ids(texts)
        # Nothing is to be done for most columns, and one look at their bytes says so.
        if self is IdForm.DIGITS and _are_digits(texts):
            return _without_empty(texts)
        if not _is_visible_ascii(texts):
            _refuse_marks(texts)
            texts = _compose(pc.utf8_trim_whitespace(texts))
        texts = _without_empty(texts)
        if self is IdForm.TEXT:
            return texts
        is_missing_number = pc.match_substring_regex(texts, _NO_NUMBER)
        if pc.any(is_missing_number).as_py():
            texts = pc.if_else(is_missing_number, None, texts)
        has_fraction = pc.match_substring_regex(texts, r"\.0+$")
        if not pc.any(has_fraction).as_py():
            return texts
        is_whole = pc.match_substring_regex(texts, _WHOLE)
        return pc.if_else(is_whole, pc.replace_substring_regex(texts, r"\.0+$", ""), texts)

    def one(self, value: Any) -> str | None:
        """Returns a single id as text, as `column` does; None for a missing one.

        Args:
            value: Id as a caller has it: text, a whole number of any type of Python or NumPy,
                or a UUID.

        Raises:
            BadValue: The value is no id.
        """
        if isinstance(value, str):
            return self._one_text(value)
        if isinstance(value, pa.Scalar):
            return self.one(value.as_py())
        if is_missing(value):
            return None
        # A boolean is a number for Python, and an id for nobody.
        if isinstance(value, numbers.Integral) and not isinstance(value, bool):
            if abs(int(value)) >= LARGEST_INTEGER:
                raise BadValue(value, "has more digits than any id: give text or an integer")
            return str(int(value))
        if isinstance(value, uuid.UUID):
            return str(value)
        if isinstance(value, (numbers.Real, decimal.Decimal)) and not isinstance(value, bool):
            return _whole_number(value)
        if isinstance(value, (bytes, bytearray, memoryview)):
            raise BadValue(value, "is bytes: decode it to text first")
        raise BadValue(value, f"of type {type(value).__name__} {_NO_ID}")

    def are_plain(self, values: Sequence[Any]) -> bool:
        """Whether all values are ids already, letter for letter: `one` returns each as it is.

        One look at their joined text tells it of most lists, in a fraction of the time.

        Args:
            values: Ids as a caller has them.
        """
        if set(map(type, values)) != {str} or not all(values):
            return False
        joined = "".join(values)
        if not _has_plain_letters(joined):
            return False
        if self is IdForm.TEXT:
            return True
        has_zero = any(text[0] == "0" and len(text) > 1 for text in values)
        return joined.isdigit() and not has_zero

    def _one_text(self, text: str) -> str | None:
        # The usual ids cost no call of Arrow.
        if not _has_plain_letters(text):
            try:
                (found,) = self.column(pa.chunked_array([pa.array([str(text)], pa.string())]))
            except UnicodeEncodeError:
                raise BadValue(text, "holds half of a character (a lone surrogate)") from None
            return found.as_py()
        if not text:
            return None
        if self is IdForm.DIGITS:
            if re.match(_NO_NUMBER, text):
                return None
            if re.match(_WHOLE, text):
                return text.partition(".")[0]
        return str(text)


@runtime_checkable
class ReadsIds(Protocol):
    """A form of ids, or the ids of a log, which give one text for each."""

    def one(self, value: Any) -> str | None:
        """Returns a single id; None for a missing one."""
        ...

    def are_plain(self, values: Sequence[Any]) -> bool:
        """Whether `one` returns each value as it is; False where it takes a look at each."""
        ...

    def column(self, values: pa.ChunkedArray) -> pa.ChunkedArray:
        """Returns a column of ids; null is missing."""
        ...


def _has_plain_letters(text: str) -> bool:
    """Whether all characters are ASCII and neither spaces nor marks."""
    return text.isascii() and text.isprintable() and " " not in text


def read_id(value: Any, form: ReadsIds, what: str) -> str:
    """Returns a single id in the form of the log.

    Args:
        value: Id of a caller.
        form: Form of the ids.
        what: Name of the id in messages, such as "user".

    Raises:
        ConfigError: It is missing, or no id.
    """
    found = read_value(form.one, value, what)
    if found is None:
        raise ConfigError(f"{what}: {echo(value)} is missing: give an id.")
    return found


def read_ids(values: Any, form: ReadsIds, what: str, known: Collection[str] = ()) -> list[str]:
    """Returns a list of ids in the form of the log.

    Args:
        values: List, set, iterable, NumPy or Arrow array, series, or a frame with one column.
        form: Form of the ids.
        what: Name of the list in messages, such as "deny".
        known: Ids that are in the form already.

    Raises:
        ConfigError: It is no list, or one of it is missing or no id; the message says which.
    """
    listed = list(members_of(values, what))
    # Most lists are of known ids, letter for letter: two passes without a step of Python.
    if set(map(type, listed)) == {str} and all(map(known.__contains__, listed)):
        return listed
    ids = []
    for number, value in enumerate(listed):
        if isinstance(value, str) and value in known:
            ids.append(str(value))
        else:
            ids.append(read_id(value, form, f"{what}[{number}]"))
    return ids


def written_forms(*columns: pa.ChunkedArray) -> dict[str, str]:
    """Returns the ids that a log writes in another form than NFC: NFC -> the first written form.

    Args:
        columns: Ids as the parts of the log have them, of any type, those to train on first.
    """
    first: dict[str, str] = {}
    for column in columns:
        texts = plain_text(column)
        if not pa.types.is_string(texts.type) or _is_visible_ascii(texts):
            continue
        distinct = pc.utf8_trim_whitespace(pc.unique(texts).drop_null())
        normal = _compose(distinct)
        # The first of equal ids decides, whether it is in NFC or not.
        for form, written in zip(normal.to_pylist(), distinct.to_pylist(), strict=True):
            first.setdefault(form, written)
    return {form: written for form, written in first.items() if form != written}


def _compose(texts: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """Returns texts in NFC, each distinct one composed once."""
    # Not by Arrow's utf8_normalize, which leaves letters decomposed before version 26.
    coded = texts.dictionary_encode()
    chunks = [coded]
    if isinstance(coded, pa.ChunkedArray):
        chunks = coded.chunks
    composed = []
    for chunk in chunks:
        distinct = chunk.dictionary.to_pylist()
        normal = [unicodedata.normalize("NFC", text) for text in distinct]
        composed.append(pa.array(normal, texts.type).take(chunk.indices))
    if isinstance(coded, pa.ChunkedArray):
        return pa.chunked_array(composed, texts.type)
    return composed[0]


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def _typed_ids(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns ids of numbers and UUIDs as text.

    Raises:
        BadValue: Values of another type, or a number that is not whole.
    """
    kind = column.type
    if pa.types.is_null(kind) or pa.types.is_integer(kind):
        return column.cast(pa.string())
    if pa.types.is_floating(kind):
        return _whole_floats(column).cast(pa.string())
    if pa.types.is_decimal(kind):
        return _whole_decimals(column)
    if isinstance(kind, pa.UuidType):
        texts = [value and str(value) for value in column.to_pylist()]
        return pa.chunked_array([pa.array(texts, pa.string())])
    if is_list(kind):
        raise BadValue(None, _LISTS)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or _is_other_binary(kind):
        raise BadValue(None, _BYTES)
    raise BadValue(None, f"holds values of type {kind}; an id is text or a whole number")


def _is_other_binary(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_binary(kind) or pa.types.is_binary_view(kind)


def _whole_floats(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns floats as integers; NaN, with which frames write a missing number, is null."""
    values = column.cast(pa.float64())
    values = pc.if_else(pc.is_nan(values), None, values)
    is_exact = pc.and_(
        pc.equal(pc.floor(values), values), pc.less(pc.abs(values), pa.scalar(EXACT_FLOAT))
    )
    row = pc.index(is_exact, False).as_py()
    if row >= 0:
        raise BadValue(column[row].as_py(), _NOT_WHOLE, row)
    return values.cast(pa.int64())


def _whole_decimals(column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type
    try:
        # Through a scale of 0, since others are written with zeros or an exponent. Arrow refuses
        # to drop digits other than 0.
        whole = column.cast(pa.decimal256(76 - kind.scale, 0))
    except pa.ArrowInvalid:
        values = column.to_pylist()
        row = next(row for row, value in enumerate(values) if value is not None and value % 1)
        raise BadValue(str(values[row]), _NOT_WHOLE, row) from None
    return whole.cast(pa.string())


def _whole_number(value: Any) -> str:
    """Returns a float or a decimal as the digits of a whole number."""
    is_exact = isinstance(value, decimal.Decimal) or abs(value) < EXACT_FLOAT
    is_finite = value.is_finite() if isinstance(value, decimal.Decimal) else math.isfinite(value)
    if not is_finite or not is_exact or value != int(value):
        raise BadValue(value, _NOT_WHOLE)
    return str(int(value))


def _are_digits(texts: pa.ChunkedArray) -> bool:
    """Returns whether all texts are of digits alone, none of which has a leading zero."""
    for chunk in texts.chunks:
        data, starts, lengths = text_bytes(chunk)
        if not data.size:
            continue
        if data.min() < ord("0") or data.max() > ord("9"):
            return False
        longer = starts[lengths > 1]
        if (data[longer] == ord("0")).any():
            return False
    return True


def _is_visible_ascii(texts: pa.ChunkedArray) -> bool:
    """Returns whether all characters are ASCII and neither spaces nor marks."""
    for chunk in texts.chunks:
        data, _, _ = text_bytes(chunk)
        if data.size and (data.min() <= ord(" ") or data.max() >= np.uint8(127)):
            return False
    return True


def _refuse_marks(texts: pa.ChunkedArray) -> None:
    """Refuses ids that hold NUL or a byte order mark."""
    for mark in _REFUSED:
        row = pc.index(pc.match_substring(texts, mark), True).as_py()
        if row >= 0:
            name = "NUL" if mark == "\x00" else "a byte order mark"
            raise BadValue(
                texts[row].as_py(), f"holds {name}, which no id has: clean the file", row
            )


def _without_empty(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns texts with null for empty ones: a file writes both alike."""
    if pc.min(pc.binary_length(texts)).as_py() != 0:
        return texts
    return pc.if_else(pc.equal(texts, ""), None, texts)
