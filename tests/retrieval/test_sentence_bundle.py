"""A bundle whose items are embedded by a sentence encoder: it says which, and only texts that are
new need it."""

import logging
import sys

import numpy as np
import pyarrow as pa
import pytest

from tests.extras import extra
from tests.features.tiny_sentence_model import write_model
from tests.retrieval.runs import FEATURES, make_run
from twotower.core.errors import ConfigError
from twotower.core.install import install_line
from twotower.features import sentence as sentences
from twotower.features.sentence_model import load_model, model_digest
from twotower.retrieval.export import export
from twotower.retrieval.retriever import Retriever

extra("tokenizers", "text")
extra("onnxruntime", "text")
extra("onnx", "dev")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a run with a bundle, and of the model beside it."""
    folder = tmp_path_factory.mktemp("sentences")
    model = str(write_model(folder / "model"))
    cache = str(folder / "cache")
    title = {
        "type": "sentence",
        "column": "title",
        "model": model,
        "cache": cache,
        "embedding_size": 8,
    }
    made = make_run(
        folder / "run", features=FEATURES | {"item": FEATURES["item"] | {"words": title}}
    )
    export(made, folder / "bundle")  # which proves that the bundle scores as the trainer does
    return folder


def test_the_manifest_says_which_model_new_texts_need(folder):
    bundle = Retriever.load(folder / "bundle").bundle
    model = str(folder / "model")
    assert bundle.manifest["sentence_models"] == {
        "features.item.words": {"model": model, "sha256": model_digest(folder / "model", "x")}
    }


def test_a_new_item_is_embedded_by_the_same_model(folder):
    retriever = Retriever.load(folder / "bundle")
    titles = ["a ring of gold", "lamp of oak"]
    bundle = retriever.bundle
    rows = pa.table({"item_id": ["new", "new"], "price": [9.0, 9.0]})
    served = retriever.encode_items(rows.append_column("title", [titles]))
    encoded = bundle.encoder.encode("item", rows) | {
        "words": load_model(folder / "model", "x").encode(titles)
    }
    np.testing.assert_allclose(served, bundle.towers.embed("item", encoded), atol=1e-5)
    assert (
        np.abs(served - retriever.encode_items(rows)).max() > 1e-3
        and np.abs(served[0] - served[1]).max() > 1e-3
    )


def test_without_the_extra_all_but_new_texts_is_served(folder, monkeypatch, caplog):
    sentences._model.cache_clear()
    for module in ("tokenizers", "onnxruntime"):
        monkeypatch.setitem(sys.modules, module, None)
    with caplog.at_level(logging.WARNING):
        retriever = Retriever.load(folder / "bundle")
    assert (
        "features.item.words: new texts need model" in caplog.text
        and install_line("text") in caplog.text
    )
    assert len(retriever.recommend("1", k=5)) == 5
    known = retriever.bundle.items["title"][0].as_py()
    assert retriever.encode_items([{"title": known}]).any()
    with pytest.raises(ConfigError, match=r"features.item.words .* needs the extra 'text'"):
        retriever.encode_items([{"title": "a new ring"}])
