"""Validation at the door: every refusal names the field, echoes the value and offers the nearest
right one."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be run: the message names the field, its value and what would be
    right."""


class ScoreError(ValueError):
    """Scores that cannot be ranked or measured, being no numbers."""


@contextlib.contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Turns a failed import into a `ConfigError` that says which extra of setup.py `what` needs."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"{what} needs the extra {name!r} ({error}): pip install 'twotower[{name}]'."
        ) from error


def choose(kinds: Mapping[str, Any], name: str, field: str) -> Any:
    """`kinds[name]`, or a `ConfigError` that names the field, the value and the nearest kind."""
    if name not in kinds:
        raise ConfigError(
            f"{field}={name!r} is not known{_nearest(name, kinds)} Known: {', '.join(sorted(kinds))}."
        )
    return kinds[name]


def check_fields(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuses the first key of `values` that is not in `known`, naming the nearest one."""
    known = list(known)
    for name in values:
        if name not in known:
            raise ConfigError(
                f"{where} has no field {name!r}{_nearest(name, known)} Known: {', '.join(known)}."
            )


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "."


def build(cls: type, values: Any, where: str) -> Any:
    """A dataclass `cls` of a mapping of its fields, likewise nested; `where` is what the mapping is
    called."""
    if not isinstance(values, Mapping) and not hasattr(values, "to_dict"):
        raise ConfigError(
            f"{where}={values!r} must be a mapping with the fields of {cls.__name__}."
        )
    values = values.to_dict() if hasattr(values, "to_dict") else values
    hints = typing.get_type_hints(cls)
    check_fields(values, hints, where)
    return cls(
        **{name: convert(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    )


def convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `hint`, or a `ConfigError` that names the field `where`."""
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where)
    origin = typing.get_origin(hint) or hint
    if origin in (typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return None if value is None else convert(inner[0], value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        (inner, *_) = typing.get_args(hint) or (Any,)
        return tuple(convert(inner, v, f"{where}[{i}]") for i, v in enumerate(value))
    if (
        isinstance(origin, type)
        and issubclass(origin, Mapping)
        and (isinstance(value, Mapping) or hasattr(value, "to_dict"))
    ):
        (_, inner) = typing.get_args(hint) or (Any, Any)
        values = value.to_dict() if hasattr(value, "to_dict") else value
        deep = dataclasses.is_dataclass(inner)
        return {
            name: convert(inner, x, f"{where}.{name}") if deep else x for name, x in values.items()
        }
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any or (
        isinstance(value, origin) and not (hint in (int, float) and isinstance(value, bool))
    ):
        return value
    raise ConfigError(
        f"{where}={value!r} must be of type {getattr(hint, '__name__', hint)}, not {type(value).__name__}."
    )
