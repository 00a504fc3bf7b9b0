"""Sentence encoders of two blocks that are made here, the same on every machine: no package and no
network brings them."""

import json

import numpy as np

from tests.extras import extra
from tests.features.onnx_bert import write_bert

WIDTH, INNER, WORDS = (
    8,
    16,
    ["gold", "silver", "ring", "chain", "of", "خاتم", "ذهب", "سلسال", "lamp", "oak"],
)
FAMILIES = {
    "bert": {
        "specials": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
        "first": 0,
        "types": 2,
    },
    "xlm-roberta": {
        "specials": ["<s>", "<pad>", "</s>", "<unk>"],
        "first": 2,
        "types": 1,
    },
}


def write_model(folder, *, family="bert", pooling="mean", normalize=True, positions=12, salt=0.0):
    """Writes a sentence-transformers model; `salt` makes its weights others."""
    kind = FAMILIES[family]
    vocabulary = {word: row for row, word in enumerate([*kind["specials"], *WORDS])}
    of = {
        "model_type": family,
        "architectures": ["BertModel" if family == "bert" else "XLMRobertaModel"],
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": positions + kind["first"],
        "type_vocab_size": kind["types"],
        "vocab_size": len(vocabulary),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "pad_token_id": 0 if family == "bert" else 1,
    }
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", of)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": positions - 2})
    flags = {
        f"pooling_mode_{name}": name.startswith(pooling)
        for name in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    }
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": WIDTH} | flags)
    modules = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    write_json(
        folder / "modules.json",
        [
            {
                "idx": i,
                "name": str(i),
                "path": paths[name],
                "type": f"sentence_transformers.models.{name}",
            }
            for i, name in enumerate(modules)
        ],
    )
    _write_tokenizer(folder, vocabulary, kind["specials"])
    _write_weights(folder, of, salt)
    return folder


def write_json(path, content):
    path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")


def _write_tokenizer(folder, vocabulary, specials):
    tokenizers = extra("tokenizers", "text")
    begin, end = ("[CLS]", "[SEP]") if "[CLS]" in specials else ("<s>", "</s>")
    unknown, pad = ("[UNK]", "[PAD]") if "[CLS]" in specials else ("<unk>", "<pad>")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        special_tokens=[(begin, vocabulary[begin]), (end, vocabulary[end])],
    )
    tokenizer.enable_padding(
        length=9, pad_id=vocabulary[pad], pad_token=pad
    )  # published files ask for it; it is not wanted
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"unk_token": unknown, "pad_token": pad, "cls_token": begin, "sep_token": end}
    write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | names
    )


def _write_weights(folder, of, salt):
    shapes = {
        "embeddings.word_embeddings.weight": (of["vocab_size"], WIDTH),
        "embeddings.position_embeddings.weight": (of["max_position_embeddings"], WIDTH),
        "embeddings.token_type_embeddings.weight": (of["type_vocab_size"], WIDTH),
        **_norm("embeddings.LayerNorm"),
    }
    for layer in range(of["num_hidden_layers"]):
        block = f"encoder.layer.{layer}."
        for name in (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
        ):
            shapes |= _dense(block + name, WIDTH, WIDTH)
        shapes |= _dense(block + "intermediate.dense", INNER, WIDTH) | _dense(
            block + "output.dense", WIDTH, INNER
        )
        shapes |= _norm(block + "attention.output.LayerNorm") | _norm(block + "output.LayerNorm")
    weights, count = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        values = np.sin(np.arange(count, count + size) * 12.9898 + salt).reshape(shape)
        # Near what training leaves, or all texts would have about one vector.
        values = (
            1 + 0.2 * values
            if name.endswith("LayerNorm.weight")
            else 0.1 * values
            if name.endswith("bias")
            else values
        )
        weights[name] = values.astype(np.float32)
        count += size
    write_bert(folder / "onnx" / "model.onnx", weights, of)


def _dense(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name):
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
