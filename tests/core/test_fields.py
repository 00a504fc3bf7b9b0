"""Dataclasses are made from mappings, or refused with the field, its value and the right ones."""

import dataclasses
import pickle
from typing import Any, Literal

import pytest

from twotower.core.errors import ConfigError
from twotower.core.fields import FieldChecks, build, convert


@dataclasses.dataclass(frozen=True)
class Part:
    size: float = 1.0
    kind: Literal["round", "square"] = "round"

    def __post_init__(self):
        FieldChecks(self, "Part").at_least(0, "size")


@dataclasses.dataclass(frozen=True)
class Whole:
    first: Part = Part()
    parts: tuple[Part, ...] = ()
    named: dict[str, Part] = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize(
    "hint, value, expected",
    [
        (int | None, None, None),
        (float | None, 2, 2.0),
        (float, 2, 2.0),
        (tuple[int, ...], [1, 2], (1, 2)),
        (Any, [1, "x"], [1, "x"]),
        (dict[str, int], {"a": 1}, {"a": 1}),
        (Literal["a", "b"], "a", "a"),
    ],
)
def test_a_value_is_converted_to_its_annotation(hint, value, expected):
    converted = convert(hint, value, "x")
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize("hint, value", [(int, True), (float, "1"), (Literal["a", "b"], 3)])
def test_a_value_of_another_type_is_refused(hint, value):
    with pytest.raises(ConfigError, match="^x=.* must be of type"):
        convert(hint, value, "x")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"first": {"size": -1}}, r"^c\.first\.size=-1\.0 must be at least 0\."),
        ({"parts": [{}, {"size": -1}]}, r"^c\.parts\[1\]\.size=-1\.0 must be at least 0\."),
        ({"named": {"a": {"size": float("nan")}}}, r"^c\.named\.a\.size=nan must be at least 0\."),
        (
            {"first": {"kind": "squared"}},
            r"^c\.first\.kind='squared' is not known; did you mean 'square'\? Known: round, ",
        ),
    ],
)
def test_a_part_that_refuses_itself_is_named_by_where_it_lies(values, message):
    with pytest.raises(ConfigError, match=message):
        build(Whole, values, "c")


def test_a_part_made_in_code_is_named_by_its_class():
    with pytest.raises(ConfigError, match=r"^Part\.size=-1 must be at least 0\.") as refused:
        Part(size=-1)
    # Processes that workers start send their exceptions back.
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)
