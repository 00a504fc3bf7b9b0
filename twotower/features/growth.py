"""An encoder for data that has grown: what was known keeps its row, new values come after it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa

from twotower.core.arrow import pc
from twotower.core.errors import ConfigError
from twotower.features.encoder import Encoder
from twotower.features.encodings import Fitted
from twotower.features.spec import FeatureSpec
from twotower.features.vocabulary import Vocabulary


def grown(
    old: Encoder, spec: FeatureSpec, train: pa.Table, *, users: pa.Table, items: pa.Table
) -> Encoder:
    """`old` with the new values of these tables; see `Encoder.fit` for the arguments.

    Every known value keeps its row, and statistics and bucket boundaries stay as they were, so that
    whatever `old` encodes is encoded alike. A new value gets a row when it has `min_count` training
    rows in the new data.

    Raises:
        ConfigError: the features are not those of `old`, or a sentence encoder is another.
    """
    if spec.to_dict() != old.spec.to_dict():
        raise ConfigError(
            "config.features differs from that of the run to grow from, whose towers read other features."
        )
    new = Encoder.fit(spec, train, users=users, items=items)
    vocabularies = {
        id(f.vocabulary): _extended(f.vocabulary, new.fitted[key].vocabulary)
        for key, f in _with_vocabulary(old)
    }
    fitted = {key: _grown(f, new.fitted[key], vocabularies) for key, f in old.fitted.items()}
    return dataclasses.replace(new, fitted=fitted).reading(items)


def _with_vocabulary(encoder: Encoder) -> list:
    return [
        (key, fitted) for key, fitted in encoder.fitted.items() if fitted.vocabulary is not None
    ]


def _grown(old: Fitted, new: Fitted, vocabularies: dict[int, Vocabulary]) -> Fitted:
    if old.vocabulary is None:
        return old
    vocabulary = vocabularies[id(old.vocabulary)]
    if old.vectors is None:
        return dataclasses.replace(old, vocabulary=vocabulary)
    if old.numbers != new.numbers:
        raise ConfigError(
            f"{old.feature.where}.model={old.feature.model!r} is another model now than the run to grow from read."
        )
    added = new.vocabulary.rows(vocabulary.values[len(old.vectors) :]) - new.vocabulary.first
    return dataclasses.replace(
        old, vocabulary=vocabulary, vectors=np.concatenate([old.vectors, new.vectors[added]])
    )


def _extended(old: Vocabulary, new: Vocabulary) -> Vocabulary:
    added = new.values.filter(pc.invert(pc.is_in(new.values, value_set=old.values)))
    return Vocabulary(values=pa.concat_arrays([old.values, added]), oov_rows=old.oov_rows)
