"""The specification of features: the columns that each tower reads, and the kind of each.

A JSON file, or the same mappings in Python, names the features of each tower:

    {"user": {"user_id": {"type": "string", "embedding_size": 64}},
     "item": {"item_id": {"type": "string", "embedding_size": 64},
              "genres": {"type": "strings", "separator": "|", "embedding_size": 16},
              "price": {"type": "float", "log": true}}}

A tower that is left out reads its id alone. `twotower.features.encoder.Encoder` is fitted to a
specification.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from twotower.config import FeaturesConfig
from twotower.core.errors import ConfigError, choose
from twotower.core.fields import check_fields, convert, field_types
from twotower.core.kinds import Kinds
from twotower.data.contract import Use
from twotower.features.base import Feature
from twotower.features.inputs import SIDES

if TYPE_CHECKING:  # loaded where a specification has one
    from twotower.features.history import HistoryFeature

# The kinds by the "type" of a specification. A user's module may add its own.
FEATURES: Kinds[type[Feature]] = Kinds(
    "feature type",
    {
        "string": "twotower.features.categorical:StringFeature",
        "strings": "twotower.features.categorical:StringsFeature",
        "int": "twotower.features.numeric:IntFeature",
        "float": "twotower.features.numeric:FloatFeature",
        "text": "twotower.features.text:TextFeature",
        "pretrained": "twotower.features.pretrained:PretrainedFeature",
        "sentence": "twotower.features.sentence:SentenceFeature",
        "timestamp": "twotower.features.timestamp:TimestampFeature",
        "history": "twotower.features.history:HistoryFeature",
    },
    synonyms={
        "str": "string",
        "id": "string",
        "category": "string",
        "categorical": "string",
        "bool": "string",
        "list": "strings",
        "multi": "strings",
        "tags": "strings",
        "multi_categorical": "strings",
        "integer": "int",
        "bucket": "int",
        "number": "float",
        "numeric": "float",
        "double": "float",
        "title": "text",
        "words": "text",
        "embedding": "pretrained",
        "vector": "pretrained",
        "bert": "sentence",
        "date": "timestamp",
        "datetime": "timestamp",
        "time": "timestamp",
        "sequence": "history",
        "events": "history",
    },
)
# Keys of a specification; the longer ones are those of older files.
_SIDE_OF_KEY = {
    "user": "user",
    "item": "item",
    "user_embedding_layers": "user",
    "item_embedding_layers": "item",
}


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """The features of both towers by name, in the order of the specification.

    Raises:
        ConfigError: Features that share a table do not agree on it, there are two histories, or a
            history reads features that items do not have.
    """

    user: dict[str, Feature]
    item: dict[str, Feature]

    def __post_init__(self):
        # Rules between features; each feature has checked itself.
        first_of_table: dict[str, Feature] = {}
        for feature in self:
            # Each is compared with the first that names the table, so that all agree.
            if feature.has_table:
                first = first_of_table.setdefault(feature.table, feature)
                _check_shared(first, feature)
        _check_history(self)

    def __iter__(self) -> Iterator[Feature]:
        return itertools.chain(self.user.values(), self.item.values())

    @property
    def history(self) -> HistoryFeature | None:
        """The feature that is the user's history."""
        for feature in self.user.values():
            if feature.is_history:
                return cast("HistoryFeature", feature)
        return None

    def side(self, side: str) -> dict[str, Feature]:
        """Returns the features of the tower "user" or "item"."""
        return choose({"user": self.user, "item": self.item}, side, "side")

    def uses(self) -> dict[str, dict[str, Use]]:
        """Returns what columns are read as: side -> column -> its use.

        A column that another feature reads as text stays text for both.
        """
        uses: dict[str, dict[str, Use]] = {side: {} for side in SIDES}
        texts = {(feature.side, name) for feature in self for name in _text_columns(feature)}
        for feature in self:
            if feature.use is not None and (feature.side, feature.column) not in texts:
                uses[feature.side].setdefault(feature.column, feature.use)
        return uses

    def to_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Returns the mappings that `from_mappings` takes."""
        return {"user": _to_dicts(self.user), "item": _to_dicts(self.item)}


def _text_columns(feature: Feature) -> tuple[str, ...]:
    return feature.columns_read if feature.use is None else ()


def load_spec(config: FeaturesConfig) -> FeatureSpec:
    """Reads the specification that `config` names or holds.

    Raises:
        ConfigError: The file cannot be read, or a feature has an unknown type, an unknown field or
            a value out of range; the message names the nearest that is known.
    """
    if not config.path:
        return from_mappings({"user": config.user, "item": config.item})
    # Both at once are refused: neither of them may be ignored silently.
    if config.user or config.item:
        raise ConfigError(
            f"config.features.path={config.path!r} and config.features.user/item are both set: "
            "leave the path out, or set config.features.user={} and config.features.item={}."
        )
    # Relative to the folder in which the command runs, as paths of data are.
    path = Path(os.path.expanduser(os.path.expandvars(config.path)))
    try:
        mappings = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"config.features.path={config.path!r} is not a JSON file that can be read: {error}"
        ) from None
    try:
        return from_mappings(mappings)
    except ConfigError as error:
        # The file is named in front, since an error names only the feature.
        raise ConfigError(f"{config.path}: {error}") from None


def from_mappings(mappings: Any) -> FeatureSpec:
    """Builds a specification.

    Args:
        mappings: {"user": {name: {"type": ..., field: value}}, "item": ...}; a side left out is its
            id alone.

    Raises:
        ConfigError: As for `load_spec`.
    """
    if not isinstance(mappings, Mapping):
        raise ConfigError(f"features={mappings!r} must be a mapping with the keys user and item.")
    # Before the sides are read: a misspelt side would be left out in silence.
    check_fields(mappings, _SIDE_OF_KEY, "features")
    by_side: dict[str, Any] = {}
    for key, features in mappings.items():
        side = _SIDE_OF_KEY[key]
        if side in by_side:
            raise ConfigError(
                f"features has both {key!r} and another key for the {side} tower: leave one out."
            )
        by_side[side] = features
    # An empty side too: a tower that reads nothing could tell no two users apart.
    for side in SIDES:
        by_side[side] = by_side.get(side) or {f"{side}_id": {"type": "string"}}
    # In the order user, item, whatever the order of the file.
    return FeatureSpec(
        user=_build_features("user", by_side["user"]), item=_build_features("item", by_side["item"])
    )


def _build_features(side: str, features: Any) -> dict[str, Feature]:
    if not isinstance(features, Mapping):
        raise ConfigError(
            f"features.{side}={features!r} must be a mapping of feature names to their fields."
        )
    return {name: _build_feature(side, name, fields) for name, fields in features.items()}


def _build_feature(side: str, name: str, fields: Any) -> Feature:
    location = f"features.{side}.{name}"
    if not isinstance(fields, Mapping) or "type" not in fields:
        raise ConfigError(
            f"{location}={fields!r} must be a mapping with a type: one of {', '.join(FEATURES)}."
        )
    # As text, so that a list or a number is refused like any unknown name.
    kind = FEATURES.choose(str(fields["type"]), f"{location}.type")
    # Inherited fields too, such as the name of the table.
    known = _spec_fields(kind)
    check_fields(fields, ["type", *(field.name for field in known)], location)
    hints = field_types(kind)
    values = {}
    for field in known:
        name_of_field = f"{location}.{field.name}"
        is_required = field.default is field.default_factory  # both are MISSING
        if field.name in fields:
            values[field.name] = convert(hints[field.name], fields[field.name], name_of_field)
        elif is_required:
            raise ConfigError(
                f"{location} has no {field.name}, which a {fields['type']} feature needs."
            )
    return kind(side=side, name=name, **values)


def _spec_fields(kind: type[Feature]) -> list[dataclasses.Field[Any]]:
    """Returns the fields that a specification may give; side and name are its keys."""
    return [field for field in dataclasses.fields(kind) if field.name not in ("side", "name")]


def _to_dicts(features: Mapping[str, Feature]) -> dict[str, dict[str, Any]]:
    dicts = {}
    for name, feature in features.items():
        # Defaults too: a saved encoder must not change when a default does.
        fields = dataclasses.asdict(feature)
        del fields["side"], fields["name"]
        dicts[name] = {"type": FEATURES.name_of(type(feature))} | fields
    return dicts


def _check_history(spec: FeatureSpec) -> None:
    """Refuses a second history, and one that reads features that items do not have."""
    histories = [feature for feature in spec if feature.is_history]
    # The towers have one sequence of events to read.
    for second in histories[1:]:
        raise ConfigError(
            f"{second.location} is a second history beside {histories[0].location}: a user has "
            "one. Leave one out."
        )
    history = spec.history
    if history is not None:
        for name in history.reads:
            choose(spec.item, name, f"{history.location}.reads")
        first = spec.item[history.reads[0]]
        # Not isinstance: `strings` are a kind of `string`, and their ids are lists.
        if type(first) is not FEATURES["string"] or first.column != "item_id":
            raise ConfigError(
                f"{history.location}.reads={history.reads!r} must begin with a string feature of "
                f"the column 'item_id': {first.location} is another."
            )


def _check_shared(first: Feature, other: Feature) -> None:
    """Refuses two features that name one table but would shape it differently."""
    if first is other:
        return
    if not first.shared_fields or first.shared_fields != other.shared_fields:
        raise ConfigError(
            f"{first.location} and {other.location} cannot share table={first.table!r}: string "
            "and strings features can share one, and text features can; give one of them another "
            "table."
        )
    for field in first.shared_fields:
        expected = getattr(first, field)
        value = getattr(other, field)
        if value != expected:
            raise ConfigError(
                f"{other.location}.{field}={value!r} must be {expected!r}, as in "
                f"{first.location}, which shares table={first.table!r}."
            )
