"""Dataclasses made from mappings, such as parsed JSON, with every field checked by its type."""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, TypeVar

from twotower.core.errors import ConfigError, did_you_mean

T = TypeVar("T")


class FieldError(ConfigError):
    """A field of a dataclass that has a wrong value.

    Attributes:
        location: The name of the dataclass in the configuration.
        field: The name of the field.
        problem: The rest of the message: the value, and what would be right.
    """

    def __init__(self, location: str, field: str, problem: str):
        super().__init__(location, field, problem)
        self.location = location
        self.field = field
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.location}.{self.field}{self.problem}"


def check_literals(instance: Any, location: str) -> None:
    """Refuses a dataclass with a field that is not one of the values its `Literal` type lists.

    Raises:
        FieldError: The field, its value, the nearest right one and all of them.
    """
    for name, known in _literals(type(instance)).items():
        value = getattr(instance, name)
        if value not in known:
            listed = ", ".join(map(str, known))
            hint = did_you_mean(value, map(str, known))
            raise FieldError(location, name, f"={value!r} is not known{hint} Known: {listed}.")


class FieldChecks:
    """The checks with which a dataclass refuses wrong values of its own fields.

    A field whose type is a `Literal` is checked at once; the methods check the others.

    Args:
        instance: The dataclass, typically in its `__post_init__`.
        location: Its name in messages. `build` puts the name of the mapping that it reads in its
            place, so a dataclass that lies in several places gives the name of its class.

    Raises (the methods too):
        FieldError: The first wrong field, with its value and what would be right.
    """

    def __init__(self, instance: Any, location: str):
        self._instance = instance
        self._location = location
        check_literals(instance, location)

    def refuse(self, field: str, problem: str) -> NoReturn:
        """Refuses a field, with the rest of the message."""
        raise FieldError(self._location, field, problem)

    def true(self, ok: bool, field: str, right: str) -> None:
        """Refuses a field unless `ok`.

        Args:
            ok: Whether its value is right.
            field: Its name, dotted where it is one of a nested dataclass.
            right: The right values, after the words "must be".
        """
        if not ok:
            value = operator.attrgetter(field)(self._instance)
            self.refuse(field, f"={value!r} must be {right}.")

    def between(self, low: float, high: float, *fields: str) -> None:
        """Refuses fields outside of [low, high], and NaN."""
        for field in fields:
            value = getattr(self._instance, field)
            self.true(low <= value <= high, field, f"between {low} and {high}")

    def at_least(self, low: float, *fields: str) -> None:
        """Refuses fields below `low`, and NaN."""
        for field in fields:
            value = getattr(self._instance, field)
            self.true(value >= low, field, f"at least {low}")

    def widths(self, *fields: str) -> None:
        """Refuses tuples of widths of layers with one below 1."""
        for field in fields:
            value = getattr(self._instance, field)
            self.true(min(value, default=1) >= 1, field, "widths of at least 1")


@functools.cache
def _literals(cls: type) -> dict[str, tuple[Any, ...]]:
    """Returns the values that the fields of `Literal` types may have."""
    hints = typing.get_type_hints(cls).items()
    return {name: typing.get_args(h) for name, h in hints if typing.get_origin(h) is typing.Literal}


def check_fields(values: Mapping[str, Any], known: Iterable[str], location: str) -> None:
    """Refuses a mapping with a key that is not in `known`.

    Raises:
        ConfigError: The first such key, with the nearest known one.
    """
    known = list(known)
    for name in values:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ConfigError(f"{location} has no field {name!r}{hint} Known: {', '.join(known)}.")


def build(cls: type[T], values: Any, location: str) -> T:
    """Returns a dataclass made from a mapping of its fields; nested dataclasses likewise.

    Args:
        cls: The dataclass.
        values: Field -> value: a mapping, or an `ml_collections.ConfigDict`.
        location: The name of the mapping in messages, such as "config.training".

    Raises:
        ConfigError: A field is unknown, or its value is of the wrong type.
    """
    if not _is_mapping(values):
        raise ConfigError(
            f"{location}={values!r} must be a mapping with the fields of {cls.__name__}."
        )
    values = _as_mapping(values)
    hints = typing.get_type_hints(cls)
    check_fields(values, hints, location)
    fields = {}
    for name, value in values.items():
        fields[name] = convert(hints[name], value, f"{location}.{name}")
    try:
        return cls(**fields)
    except FieldError as error:
        # A dataclass that checks itself need not know where it lies.
        raise FieldError(location, error.field, error.problem) from None


def convert(hint: Any, value: Any, location: str) -> Any:
    """Returns `value` as the annotated type `hint`.

    Lists become tuples, whole numbers floats, and mappings dataclasses, where the annotation says
    so; nothing else is converted.

    Args:
        hint: The annotation, resolved.
        value: The value of the field.
        location: The name of the field in messages.

    Raises:
        ConfigError: The value is of another type.
    """
    # A dataclass that was made in code has checked itself.
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else build(hint, value, location)
    origin: Any = typing.get_origin(hint) or hint
    if origin is typing.Literal:
        return _convert_literal(hint, value, location)
    if origin in (typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return None if value is None else convert(inner[0], value, location)
    if origin is tuple and isinstance(value, (list, tuple)):
        # All tuples of fields are of one type, tuple[X, ...].
        (inner, *_) = typing.get_args(hint) or (Any,)
        return tuple(convert(inner, v, f"{location}[{i}]") for i, v in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping) and _is_mapping(value):
        return _convert_mapping(hint, value, location)
    # JSON has one type of number, but Python's booleans are integers too.
    is_bool = isinstance(value, bool)
    if hint is float and isinstance(value, int) and not is_bool:
        return float(value)
    if hint is Any:
        return value
    if isinstance(value, origin) and not (is_bool and hint in (int, float)):
        return value
    name = getattr(hint, "__name__", hint)
    raise ConfigError(f"{location}={value!r} must be of type {name}, not {type(value).__name__}.")


def _convert_literal(hint: Any, value: Any, location: str) -> Any:
    """Returns the value, which must be of the type of the literals.

    `FieldChecks` says which of them are right, however the dataclass is made.
    """
    kind = type(typing.get_args(hint)[0])
    return convert(kind, value, location)


def _convert_mapping(hint: Any, value: Any, location: str) -> dict[str, Any]:
    """Returns a plain dict, with its values converted where they are dataclasses."""
    (_, inner) = typing.get_args(hint) or (Any, Any)
    values = _as_mapping(value)
    if not dataclasses.is_dataclass(inner):
        return dict(values)
    return {name: convert(inner, x, f"{location}.{name}") for name, x in values.items()}


def _is_mapping(values: Any) -> bool:
    # A FrozenConfigDict is no Mapping, but has `to_dict`.
    return isinstance(values, Mapping) or hasattr(values, "to_dict")


def _as_mapping(values: Any) -> Mapping[str, Any]:
    return values.to_dict() if hasattr(values, "to_dict") else values
