"""Refusals as `application/problem+json` (RFC 9457): the field, its value, and what to do.

What the library refuses is told in its own words. What concerns the server alone, such as a disk
that is full, is logged there, and the answer says no more than that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from absl import logging
from msgspec import inspect

from twotower.core.errors import (
    ConfigError,
    QueryError,
    TwotowerError,
    UnknownItemError,
    did_you_mean,
    echo,
)
from twotower.serving.types import Problem, PutItem, PutItems

# Refusals for the load, which routers tell from those of a shard that cannot answer.
TOO_MANY_REQUESTS = "Too many requests are waiting."
TOO_MANY_CONNECTIONS = "Too many connections are open."
# Beginning of a refusal of the library -> the field of the request that it means; the first that
# fits. The library names its own arguments, which requests call otherwise in these places.
_FIELDS = (
    (re.compile(r"rows, (?:row \d+, )?column '([^']+)'"), r"features.\1"),
    (re.compile(r"config\.retrieval\.rerank\.options\.diversity"), "diversity"),
    (re.compile(r"events\b"), "history"),
    (re.compile(r"rows\b|upsert\b"), "features"),
    (re.compile(r"user\b"), "user_id"),
    (re.compile(r"item\b"), "item_id"),
    (re.compile(r"items\b"), "like"),
    (re.compile(r"where\b"), "where"),
    (re.compile(r"([a-z_]+)(?:\[\d+\])?[=:]"), r"\1"),
)
_ROW = re.compile(r"^rows(?:, (?:row \d+, )?column '[^']+'|(?=: nothing reads))")
_NUMBER = re.compile(r"rows, row (?P<row>\d+), ")
_UNREAD = re.compile(r"rows: nothing reads '(?P<name>[^']*)'")
MAX_DETAIL = 1_000  # letters of a refusal, which may hold a value of a megabyte
# The forms in which msgspec words what is wrong, which it gives in no other way.
_INVALID = re.compile(r"(?P<problem>.*?)(?: - at `(?P<path>[^`]*)`)?", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`", re.DOTALL)
_SEGMENT = re.compile(r"\.(?P<name>\w+)|\[(?P<index>[^\]]*)\]")


class RequestError(Exception):
    """A request that is not answered.

    Attributes:
        status: Status of the answer.
        field: Field of the request that is wrong; "" where it is the whole.
        value: Value of the field, as shown.
        cure: Sentence on what to do.
        retry_after: Seconds after which the same request may be answered; 0 where it never is.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        field: str = "",
        value: str = "",
        cure: str = "",
        retry_after: int = 0,
    ):
        super().__init__(detail)
        self.status = status
        self.field = field
        self.value = value
        self.cure = cure
        self.retry_after = retry_after

    def to_problem(self) -> Problem:
        """Returns the body of the answer."""
        return Problem(
            title=HTTPStatus(self.status).phrase,
            status=self.status,
            detail=str(self),
            field=self.field,
            value=self.value,
            cure=self.cure,
        )


def explain(error: Exception, kind: Any, body: bytes) -> RequestError:
    """Returns the refusal that an exception means.

    Args:
        error: Exception that reading or answering a request raised.
        kind: Type of the request; None where it has no body.
        body: Body of the request.
    """
    if isinstance(error, RequestError):
        return error
    if isinstance(error, msgspec.ValidationError):
        return _explain_invalid(str(error), kind, body)
    # RecursionError: brackets within brackets, thousands deep, are no defect of the server.
    if isinstance(error, (msgspec.DecodeError, UnicodeDecodeError, RecursionError)):
        return RequestError(
            400,
            f"The body is no JSON that can be read: {_first_line(error)}.",
            cure="Send one JSON object in UTF-8.",
        )
    # 404, as of any resource that is not there: the request itself may be right.
    if isinstance(error, UnknownItemError):
        return _explain_refusal(404, error, kind, body)
    if isinstance(error, (ConfigError, QueryError)):
        return _explain_refusal(400, error, kind, body)
    if isinstance(error, (TwotowerError, OSError)):
        # Only logged: its message may name files of the server.
        logging.error("%s: %s", type(error).__name__, error)
        return RequestError(
            503,
            "The server could not do this now, and has changed nothing.",
            cure="Send the request again; the server's log says what is wrong.",
            retry_after=5,
        )
    logging.exception("A request ended in a defect.", exc_info=error)
    return RequestError(500, "The server failed on this request; its log says where.")


def _explain_refusal(status: int, error: Exception, kind: Any, body: bytes) -> RequestError:
    """Returns a refusal of the library, in its words."""
    detail = str(error)
    field = ""
    for pattern, name in _FIELDS:
        found = pattern.match(detail)
        if found:
            field = found.expand(name)
            break
    if kind in (PutItem, PutItems) and field.startswith("features"):
        field = _field_of_item(field, detail, kind)
    value = _value_at(body, field)
    # The column of histories is no feature of a request: they have a field of their own.
    if field.startswith("features.") and not value and _value_at(body, "history"):
        field = "history"
        value = _value_at(body, field)
    # The library knows rows and arguments of Python, of which the client knows nothing.
    detail = _ROW.sub(lambda _: field, detail).partition(" names={")[0]
    detail = _shorten(detail)
    return RequestError(status, detail, field=field, value=value, cure=_last_sentence(detail))


def _field_of_item(field: str, detail: str, kind: Any) -> str:
    """Returns the field of a request that changes items, which the library calls rows.

    Args:
        field: Field as that of a user would be called: "features", or "features.price".
        detail: Refusal of the library.
        kind: Type of the request.
    """
    unread = _UNREAD.match(detail)
    if unread:
        field = f"{field}.{unread['name']}"
    columns = field.replace("features", "columns", 1)
    if kind is PutItem:
        return columns
    row = _NUMBER.match(detail)
    return f"items[{int(row['row']) - 1}].{columns}" if row else "items"


def _shorten(detail: str) -> str:
    """Returns a refusal of a length to read: its beginning and its end, which says what to do."""
    if len(detail) <= MAX_DETAIL:
        return detail
    half = MAX_DETAIL // 2
    return f"{detail[:half]}… …{detail[-half:]}"


def _explain_invalid(message: str, kind: Any, body: bytes) -> RequestError:
    """Returns the refusal of a body that does not have its type."""
    found = _INVALID.fullmatch(message)
    problem = message
    path = "$"
    if found:
        problem = found["problem"]
        path = found["path"] or "$"
    # "`key` in `$.features`" is how a wrong name of a mapping is told.
    path = path.removeprefix("key` in `").removeprefix("key in ")
    unknown = _UNKNOWN.fullmatch(problem)
    missing = _MISSING.fullmatch(problem)
    field = path.removeprefix("$").removeprefix(".")
    if unknown:
        name = unknown["name"]
        known = _fields_at(kind, path)
        field = f"{field}.{name}".removeprefix(".")
        detail = f"{echo(field)} is no field of this request{did_you_mean(name, known)}"
        cure = f"Leave it out, or write one of {', '.join(known)}."
    elif missing:
        field = f"{field}.{missing['name']}".removeprefix(".")
        detail = f"{field} is missing."
        cure = f"Give {field}."
    else:
        subject = field or "The body"
        expected = problem.replace("`", "")
        # The message of msgspec names types alone; who sees the value finds the mistake at once.
        shown = _value_at(body, field)
        # Of a key of a mapping there is none to show.
        equals = "=" if shown else ""
        detail = f"{subject}{equals}{shown}: {expected[:1].lower()}{expected[1:]}."
        cure = f"{expected.partition(', got')[0].replace('Expected', 'Give')}."
    return RequestError(400, detail, field=field, value=_value_at(body, field), cure=cure)


def _fields_at(kind: Any, path: str) -> list[str]:
    """Returns the names of the fields of the object at a path of a request."""
    info: Any = inspect.type_info(kind)
    for segment in _SEGMENT.finditer(path):
        info = _struct_or_list(info)
        if segment["name"] and isinstance(info, inspect.StructType):
            by_name = {field.encode_name: field.type for field in info.fields}
            info = by_name.get(segment["name"])
        elif isinstance(info, inspect.ListType):
            info = info.item_type
    info = _struct_or_list(info)
    if not isinstance(info, inspect.StructType):
        return []
    return [field.encode_name for field in info.fields]


def _struct_or_list(info: Any) -> Any:
    """Returns the member of a union that has fields or members of its own."""
    if not isinstance(info, inspect.UnionType):
        return info
    for member in info.types:
        if isinstance(member, (inspect.StructType, inspect.ListType)):
            return member
    return info


def _value_at(body: bytes, field: str) -> str:
    """Returns the value of a field in the body of a request, as messages show it."""
    try:
        value: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return ""
    for segment in _SEGMENT.finditer(f".{field}" if field else ""):
        index = segment["index"]
        if segment["name"] and isinstance(value, Mapping) and segment["name"] in value:
            value = value[segment["name"]]
        elif index and index.isdigit() and isinstance(value, list) and int(index) < len(value):
            value = value[int(index)]
        else:
            return ""
    # Shortened: a refusal must not send a megabyte back.
    return echo(value)


def _last_sentence(detail: str) -> str:
    """Returns the end of a refusal, which says what to do."""
    sentences = re.split(r"(?<=[.?]) (?=[A-Z])", detail)
    if len(sentences) > 1:
        return sentences[-1]
    # In a single sentence the cure stands after the last colon or semicolon.
    return re.split(r"[:;] ", detail)[-1]


def _first_line(error: Exception) -> str:
    text = str(error).splitlines() or [type(error).__name__]
    return text[0].rstrip(".")
