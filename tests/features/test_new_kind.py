"""A new kind of feature is one class and one line in FEATURES; everything else follows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

from tests.features.encoder_shop import assert_same, fitted, shop
from twotower.config import ModelConfig
from twotower.core.errors import ConfigError
from twotower.features.base import Feature, Fitted
from twotower.features.encoder import Encoder
from twotower.features.fit import extend_encoder, fit_encoder
from twotower.features.inputs import Input, TableShape
from twotower.features.spec import FEATURES, from_mappings
from twotower.features.vocabulary import as_strings
from twotower.towers.two_tower import TwoTower


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthFeature(Feature):
    """The number of letters of a text, counted up to the longest text of training."""

    embedding_size: int = 4
    shortest: int = 1

    def __post_init__(self):
        super().__post_init__()
        self._check_at_least(1, "shortest")

    def fit(self, column):
        longest = max(map(len, as_strings(column.values).drop_null().to_pylist()))
        return Fitted(statistics={"longest": longest})

    def encode(self, fitted, column):
        texts = as_strings(column).to_pylist()
        lengths = [0 if text is None else max(len(text), self.shortest) for text in texts]
        return np.minimum(lengths, fitted.statistics["longest"]).astype(np.int32)

    def input(self, fitted):
        return Input(table=self.table)

    def table_shape(self, fitted):
        return TableShape(rows=fitted.statistics["longest"] + 1, width=self.embedding_size)


SPEC = {
    "user": {"user_id": {"type": "string", "embedding_size": 4}},
    "item": {"letters": {"type": "length", "column": "title", "shortest": 2}},
}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(FEATURES, "length", LengthFeature)


def test_it_is_specified_like_the_others():
    spec = from_mappings(SPEC)
    assert spec.item["letters"] == LengthFeature(
        side="item", name="letters", column="title", shortest=2
    )
    assert from_mappings(spec.to_dict()) == spec
    with pytest.raises(ConfigError, match=r"features.item.letters.shortest=0 must be at least 1"):
        from_mappings({"item": {"letters": {"type": "length", "shortest": 0}}})
    with pytest.raises(ConfigError, match=r"letters has no field 'short'; did you mean 'shortest'"):
        from_mappings({"item": {"letters": {"type": "length", "short": 3}}})


def test_it_is_fitted_encoded_saved_loaded_and_extended(tmp_path):
    encoder = fitted(SPEC)
    titles = pa.table({"title": ["a", "shoe", "s" * 99, None]})
    longest = encoder.fitted["item", "letters"].statistics["longest"]
    arrays = encoder.encode("item", titles)
    assert arrays["letters"].tolist() == [2, 4, longest, 0]
    encoder.save(tmp_path / "encoder")
    loaded = Encoder.load(tmp_path / "encoder")
    assert_same(loaded.encode("item", titles), arrays)
    train, users, items = shop(items=300)
    longer = fit_encoder(encoder.spec, train, users=users, items=items)
    assert longer.fitted["item", "letters"].statistics["longest"] > longest
    larger = extend_encoder(encoder, encoder.spec, train, users=users, items=items)
    assert_same(larger.encode("item", titles), arrays)


def test_the_item_tower_reads_and_trains_its_rows():
    encoder = fitted(SPEC)
    model = TwoTower.build(ModelConfig(), encoder)
    weights = model.init(jax.random.key(0))
    arrays = encoder.encode("item", pa.table({"title": ["shoe", "a shoe"]}))
    features = jax.tree.map(jnp.asarray, arrays)

    def total(tables):
        return model.embed("item", weights._replace(tables=tables), features)[:, 0].sum()

    gradient = jax.jit(jax.grad(total))(weights.tables)["item.letters"]
    trained = np.flatnonzero(np.abs(np.asarray(gradient)).max(axis=1))
    assert trained.tolist() == [4, 6]


def test_a_kind_that_shares_no_fields_has_a_table_of_its_own():
    shared = SPEC["item"]["letters"] | {"table": "t"}
    with pytest.raises(ConfigError, match="cannot share table='t'"):
        from_mappings({"item": {"letters": shared, "again": shared}})
