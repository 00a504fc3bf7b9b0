"""The feature specification: what each tower reads, from which column, and how it becomes numbers.

A JSON file, or the same mappings in Python, names the features of each tower:

    {"user": {"user_id": {"type": "string", "embedding_size": 64}},
     "item": {"item_id": {"type": "string", "embedding_size": 64},
              "genres": {"type": "strings", "separator": "|", "embedding_size": 16},
              "price": {"type": "float", "log": true}}}

The keys "user_embedding_layers" and "item_embedding_layers" are read as "user" and "item". A tower
that is left out reads its id alone. `twotower.features.encoder.Encoder` is fitted to a specification.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from twotower.config import FeaturesConfig
from twotower.core.errors import ConfigError, choose
from twotower.core.fields import check_fields, convert
from twotower.features.base import SIDES, Feature
from twotower.features.kinds import (
    FEATURES,
    HistoryFeature,
    StringFeature,
    StringsFeature,
    TextFeature,
)

_KEYS = {
    "user": "user",
    "item": "item",
    "user_embedding_layers": "user",
    "item_embedding_layers": "item",
}


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """The features of both towers by name, in the order of the specification.

    Raises:
        ConfigError: features that share a table do not agree on it.
    """

    user: dict[str, Feature]
    item: dict[str, Feature]

    def __post_init__(self):
        by_table: dict[str, Feature] = {}
        for feature in self:
            if feature.has_table:
                _check_shared(by_table.setdefault(feature.table, feature), feature)
        _check_history([f for f in self if isinstance(f, HistoryFeature)], self.item)

    def __iter__(self) -> Iterator[Feature]:
        return itertools.chain(self.user.values(), self.item.values())

    @property
    def history(self) -> HistoryFeature | None:
        """The feature that is the user's history."""
        return next((f for f in self.user.values() if isinstance(f, HistoryFeature)), None)

    def side(self, side: str) -> dict[str, Feature]:
        """The features of the tower "user" or "item"."""
        return choose({"user": self.user, "item": self.item}, side, "side")

    def to_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The mappings that `from_mappings` takes."""
        return {
            side: {name: _to_dict(feature) for name, feature in self.side(side).items()}
            for side in SIDES
        }


def load_spec(config: FeaturesConfig) -> FeatureSpec:
    """The specification that `config` names or holds.

    Raises:
        ConfigError: the file cannot be read, or a feature has an unknown type, an unknown field or
            a value out of range; the message names the nearest that is known.
    """
    if not config.path:
        return from_mappings({"user": config.user, "item": config.item})
    if config.user or config.item:
        raise ConfigError(
            f"config.features.path={config.path!r} and config.features.user/item are both given: leave the path out, "
            "or set config.features.user={} and config.features.item={}."
        )
    try:
        mappings = json.loads(
            Path(os.path.expanduser(os.path.expandvars(config.path))).read_text("utf-8")
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"config.features.path={config.path!r} is not a JSON file that can be read: {error}"
        ) from None
    try:
        return from_mappings(mappings)
    except ConfigError as error:
        raise ConfigError(f"{config.path}: {error}") from None


def from_mappings(mappings: Any) -> FeatureSpec:
    """The specification of {"user": {name: {"type": ..., field: value}}, "item": ...}; a side left
    out is its id."""
    if not isinstance(mappings, Mapping):
        raise ConfigError(f"features={mappings!r} must be a mapping with the keys user and item.")
    check_fields(mappings, _KEYS, "features")
    sides: dict[str, Any] = {}
    for key, features in mappings.items():
        if _KEYS[key] in sides:
            raise ConfigError(
                f"features has both {key!r} and another key for the {_KEYS[key]} tower: leave one out."
            )
        sides[_KEYS[key]] = features
    return FeatureSpec(
        **{
            side: _features(side, sides.get(side) or {f"{side}_id": {"type": "string"}})
            for side in SIDES
        }
    )


def _features(side: str, features: Any) -> dict[str, Feature]:
    if not isinstance(features, Mapping):
        raise ConfigError(
            f"features.{side}={features!r} must be a mapping of feature names to their fields."
        )
    return {name: _feature(side, name, fields) for name, fields in features.items()}


def _feature(side: str, name: str, fields: Any) -> Feature:
    where = f"features.{side}.{name}"
    if not isinstance(fields, Mapping) or "type" not in fields:
        raise ConfigError(
            f"{where}={fields!r} must be a mapping with a type: one of {', '.join(FEATURES)}."
        )
    cls = choose(FEATURES, str(fields["type"]), f"{where}.type")
    hints = {
        field: hint
        for field, hint in typing.get_type_hints(cls).items()
        if field not in ("side", "name")
    }
    check_fields(fields, ["type", *hints], where)
    required = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name in hints and f.default is f.default_factory
    ]
    for field in required:
        if field not in fields:
            raise ConfigError(f"{where} has no {field}, which a {fields['type']} feature needs.")
    values = {
        field: convert(hints[field], value, f"{where}.{field}")
        for field, value in fields.items()
        if field != "type"
    }
    return cls(side=side, name=name, **values)


def _to_dict(feature: Feature) -> dict[str, Any]:
    kind = next(kind for kind, cls in FEATURES.items() if cls is type(feature))
    return {"type": kind} | {
        k: v for k, v in dataclasses.asdict(feature).items() if k not in ("side", "name")
    }


def _check_history(histories: list[HistoryFeature], item: Mapping[str, Feature]) -> None:
    """Refuses a second history, and one that reads what items do not have."""
    for history in histories[1:]:
        raise ConfigError(
            f"{history.where} is a second history beside {histories[0].where}: a user has one. Leave one out."
        )
    for history in histories:
        for name in history.reads:
            choose(item, name, f"{history.where}.reads")
        first = item[history.reads[0]]
        if (
            not isinstance(first, StringFeature)
            or isinstance(first, StringsFeature)
            or first.column != "item_id"
        ):
            raise ConfigError(
                f"{history.where}.reads={history.reads!r} must begin with a string feature of the column 'item_id': "
                f"{first.where} is another."
            )


def _check_shared(first: Feature, other: Feature) -> None:
    """Refuses two features that name one table but would shape it differently."""
    if first is other:
        return
    vocabulary = isinstance(first, StringFeature) and isinstance(other, StringFeature)
    text = isinstance(first, TextFeature) and isinstance(other, TextFeature)
    if not (vocabulary or text):
        raise ConfigError(
            f"{first.where} and {other.where} cannot share table={first.table!r}: string and strings features "
            f"can share one, and text features can; give one of them another table."
        )
    for field in (
        ("embedding_size", "min_count", "oov_rows", "initial_norm")
        if vocabulary
        else ("embedding_size", "buckets")
    ):
        if getattr(first, field) != getattr(other, field):
            raise ConfigError(
                f"{other.where}.{field}={getattr(other, field)!r} must be {getattr(first, field)!r}, as in "
                f"{first.where}, which shares table={first.table!r}."
            )
