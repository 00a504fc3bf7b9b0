"""Dataclasses made from mappings, such as parsed JSON, with every field checked by its type."""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NoReturn, TypeVar, cast

from twotower.core.errors import ConfigError, did_you_mean

T = TypeVar("T")
# Here, where no array library is needed, for options and parsers alike.
TimeUnit = Literal["s", "ms", "us", "ns"]


class FieldError(ConfigError):
    """A field of a dataclass that has a wrong value.

    Attributes:
        location: Name of the dataclass in the configuration.
        field: Name of the field.
        problem: Rest of the message: the value, and the right ones.
    """

    def __init__(self, location: str, field: str, problem: str):
        # The parts, not the message: `build` replaces the location, and pickle calls this again.
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
        instance: Dataclass to check, typically in its `__post_init__`.
        location: Name of the dataclass in messages. `build` replaces it by the name of the mapping
            that it reads, so a dataclass that several sections hold passes the name of its class.

    Raises (the methods too):
        FieldError: The first wrong field, with its value and the right ones.
    """

    def __init__(self, instance: Any, location: str):
        self._instance = instance
        self._location = location
        # At once: every other check may then rely on the kind that a Literal names.
        check_literals(instance, location)

    def refuse(self, field: str, problem: str) -> NoReturn:
        """Refuses a field, with the rest of the message."""
        raise FieldError(self._location, field, problem)

    def require(self, ok: bool, field: str, right: str) -> None:
        """Refuses a field unless `ok`.

        Args:
            ok: Whether the value of the field is right.
            field: Name of the field, dotted for one of a nested dataclass.
            right: Right values, after the words "must be".
        """
        if not ok:
            value = operator.attrgetter(field)(self._instance)
            self.refuse(field, f"={value!r} must be {right}.")

    def between(self, low: float, high: float, *fields: str) -> None:
        """Refuses fields outside of [low, high], and NaN."""
        for field in fields:
            value = getattr(self._instance, field)
            # Written so that NaN, which compares as False, is refused.
            self.require(low <= value <= high, field, f"between {low} and {high}")

    def at_least(self, low: float, *fields: str) -> None:
        """Refuses fields below `low`, and NaN."""
        for field in fields:
            value = getattr(self._instance, field)
            # NaN is refused here too.
            self.require(value >= low, field, f"at least {low}")

    def widths(self, *fields: str) -> None:
        """Refuses tuples of widths of layers with one below 1."""
        for field in fields:
            layers = getattr(self._instance, field)
            are_positive = min(layers, default=1) >= 1
            self.require(are_positive, field, "widths of at least 1")


# A configuration is made of a dozen classes, whose annotations take tens of times longer to resolve
# than its values to check.
@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Returns the types of the fields of a dataclass."""
    # Annotations are text under `from __future__ import annotations`: this resolves them.
    return typing.get_type_hints(cls)


@functools.cache
def _literals(cls: type) -> dict[str, tuple[Any, ...]]:
    """Returns the values that the fields of `Literal` types may have."""
    literals = {}
    for name, hint in field_types(cls).items():
        if typing.get_origin(hint) is typing.Literal:
            literals[name] = typing.get_args(hint)
    return literals


def check_fields(values: Mapping[str, Any], known: Iterable[str], location: str) -> None:
    """Refuses a mapping with a key that is not in `known`.

    Raises:
        ConfigError: The first such key, with the nearest known one.
    """
    # A copy, since an iterator could be read only once.
    known = list(known)
    for name in values:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ConfigError(f"{location} has no field {name!r}{hint} Known: {', '.join(known)}.")


def differences(old: Any, new: Any, field: str) -> list[str]:
    """Returns the differences between two values of a configuration, a sentence for each field.

    Args:
        old: Value of the run.
        new: Value of the new configuration.
        field: Name of the field, with its sections.
    """
    if old == new:
        return []
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [f"{field} was {old!r} and is now {new!r}"]
    changed = []
    # A field that one side lacks was added or removed by another version: it counts as None.
    for name in sorted(old.keys() | new.keys()):
        changed += differences(old.get(name), new.get(name), f"{field}.{name}")
    return changed


def build(cls: type[T], values: Any, location: str) -> T:
    """Returns a dataclass made from a mapping of its fields; nested dataclasses likewise.

    Args:
        cls: Dataclass to make.
        values: Field -> value: a mapping, or an `ml_collections.ConfigDict`.
        location: Name of the mapping in messages, such as "config.training".

    Raises:
        ConfigError: A field is unknown or missing, or its value is of the wrong type.
    """
    # Refused by its own sentence: `cls(**values)` would fail with a message about Python.
    if not _is_mapping(values):
        raise ConfigError(
            f"{location}={values!r} must be a mapping with the fields of {cls.__name__}."
        )
    values = _as_mapping(values)
    hints = field_types(cls)
    check_fields(values, hints, location)
    for field in dataclasses.fields(cast(Any, cls)):
        is_required = field.default is field.default_factory  # both are MISSING
        if is_required and field.name not in values:
            raise ConfigError(f"{location} has no {field.name}, which {cls.__name__} needs.")
    fields = {}
    for name, value in values.items():
        fields[name] = convert(hints[name], value, f"{location}.{name}")
    try:
        return cls(**fields)
    except FieldError as error:
        # A dataclass that checks itself need not know which field of which section holds it.
        raise FieldError(location, error.field, error.problem) from None


def convert(hint: Any, value: Any, location: str) -> Any:
    """Returns `value` as the annotated type `hint`.

    Lists become tuples, whole numbers floats, and mappings dataclasses, if the annotation says so;
    nothing else is converted.

    Args:
        hint: Annotation, resolved.
        value: Value of the field.
        location: Name of the field in messages.

    Raises:
        ConfigError: The value is of another type.
    """
    # A dataclass that was made in code has checked itself.
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        return build(hint, value, location)
    # `tuple[int, ...]` has the origin tuple; a plain type is its own.
    origin: Any = typing.get_origin(hint) or hint
    # Before `isinstance` below, which does not take a Literal.
    if origin is typing.Literal:
        return _convert_literal(hint, value, location)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return convert(inner[0], value, location)
    if origin is tuple and isinstance(value, (list, tuple)):
        return _convert_tuple(hint, value, location)
    if isinstance(origin, type) and issubclass(origin, Mapping) and _is_mapping(value):
        return _convert_mapping(hint, value, location)
    return _convert_plain(hint, value, location)


def _convert_plain(hint: Any, value: Any, location: str) -> Any:
    """Returns a value of a type without members: a number, text, or anything at all."""
    # JSON has one type of number, but Python's booleans are integers too.
    is_bool = isinstance(value, bool)
    if hint is float and isinstance(value, int) and not is_bool:
        return float(value)
    if hint is Any:
        return value
    if isinstance(value, typing.get_origin(hint) or hint) and not (
        is_bool and hint in (int, float)
    ):
        return value
    name = getattr(hint, "__name__", hint)
    raise ConfigError(f"{location}={value!r} must be of type {name}, not {type(value).__name__}.")


def _convert_literal(hint: Any, value: Any, location: str) -> Any:
    """Returns the value, which must be of the type of the literals.

    `FieldChecks` compares it with the literals, however the dataclass is made.
    """
    # All literals of one field are of one type.
    kind = type(typing.get_args(hint)[0])
    return convert(kind, value, location)


def _convert_tuple(hint: Any, values: Iterable[Any], location: str) -> tuple[Any, ...]:
    """Returns the values as a tuple, each converted to the type of its members."""
    # All tuples of fields have members of one type, tuple[X, ...]; a plain tuple has any.
    (inner, *_) = typing.get_args(hint) or (Any,)
    converted = []
    for index, value in enumerate(values):
        converted.append(convert(inner, value, f"{location}[{index}]"))
    return tuple(converted)


def _convert_mapping(hint: Any, value: Any, location: str) -> dict[str, Any]:
    """Returns a plain dict, with its values converted where they are dataclasses."""
    (_, inner) = typing.get_args(hint) or (Any, Any)
    values = _as_mapping(value)
    # Values of other types are checked by the code that reads them, such as a feature's kind.
    if not dataclasses.is_dataclass(inner):
        return dict(values)
    converted = {}
    for name, fields in values.items():
        converted[name] = convert(inner, fields, f"{location}.{name}")
    return converted


def _is_mapping(values: Any) -> bool:
    # A FrozenConfigDict is no Mapping, but has `to_dict`.
    return isinstance(values, Mapping) or hasattr(values, "to_dict")


def _as_mapping(values: Any) -> Mapping[str, Any]:
    if hasattr(values, "to_dict"):
        return values.to_dict()
    return values
