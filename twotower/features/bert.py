"""BERT's encoder as a pure function of published weights, which are read from safetensors: no
PyTorch, nothing trained.

The families are BERT and XLM-RoBERTa (Devlin et al. 2019, arXiv 1810.04805; Conneau et al. 2020,
arXiv 1911.02116), which differ in where positions begin. The multilingual MiniLM models are BERT
with the tokenizer of XLM-RoBERTa.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from twotower.core.errors import ConfigError, choose

# Of the RoBERTa family position 0 belongs to padding (row 1 of the table), and that of the first
# token follows it.
FAMILIES = {"bert": 0, "roberta": 2, "xlm-roberta": 2, "camembert": 2}
ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}
# Our name of a block's part -> its name in the file.
_BLOCK = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "mix": "attention.output.dense",
    "mix_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "down_norm": "output.LayerNorm",
}
_EMBEDDINGS = ("word_embeddings", "position_embeddings", "token_type_embeddings")

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What the forward pass must know beside the weights; hashable, so that programs are compiled
    once for each.

    Attributes:
        layers, heads, width: of the Transformer; each head has width / heads columns.
        positions: tokens of the longest text.
        first_position: of the first token, in the table of positions.
        activation: a key of `ACTIVATIONS`.
        epsilon: of the layer normalisation.
    """

    layers: int
    heads: int
    width: int
    positions: int
    first_position: int
    activation: str
    epsilon: float


def architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """Of a model's config.json.

    Args:
        where: what the file is called in errors.

    Raises:
        ConfigError: the model is of another family, or lacks a field.
    """
    first = choose(FAMILIES, str(config.get("model_type")), f"{where}: model_type")
    activation = str(config.get("hidden_act", "gelu"))
    choose(ACTIVATIONS, activation, f"{where}: hidden_act")
    choose(
        {"absolute": 0},
        config.get("position_embedding_type", "absolute"),
        f"{where}: position_embedding_type",
    )
    try:
        return Architecture(
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            width=config["hidden_size"],
            positions=config["max_position_embeddings"] - first,
            first_position=first,
            activation=activation,
            epsilon=config.get("layer_norm_eps", 1e-12),
        )
    except KeyError as error:
        raise ConfigError(f"{where} has no field {error}, which a BERT model needs.") from None


def read_params(weights: Mapping[str, np.ndarray], of: Architecture, where: str) -> Params:
    """The weights by our names, float32; those of the blocks stacked, [layers, ...], for one loop
    over them.

    Args:
        weights: those of the file, by their names there; a prefix such as "bert." is left out.
        where: what the file is called in errors.

    Raises:
        ConfigError: a weight is missing, or of another shape than the configuration says.
    """
    prefix = next(
        (
            n.removesuffix("embeddings.word_embeddings.weight")
            for n in weights
            if n.endswith("word_embeddings.weight")
        ),
        "",
    )

    def read(name: str) -> np.ndarray:
        if prefix + name not in weights:
            raise ConfigError(
                f"{where} has no weight {prefix + name!r}: it is not a model of the BERT family."
            )
        return np.asarray(weights[prefix + name], np.float32)

    def pair(name: str) -> tuple[np.ndarray, np.ndarray]:
        return read(f"{name}.weight"), read(f"{name}.bias")

    blocks = [
        {ours: pair(f"encoder.layer.{i}.{theirs}") for ours, theirs in _BLOCK.items()}
        for i in range(of.layers)
    ]
    params = {name: read(f"embeddings.{name}.weight") for name in _EMBEDDINGS}
    if params["word_embeddings"].shape[1] != of.width:
        raise ConfigError(
            f"{where} has vectors of width {params['word_embeddings'].shape[1]}, config.json says {of.width}."
        )
    return params | {
        "norm": pair("embeddings.LayerNorm"),
        "blocks": jax.tree.map(lambda *x: np.stack(x), *blocks),
    }


@functools.partial(jax.jit, static_argnames="of")
def hidden_states(
    params: Params, ids: Int32[Array, "B L"], valid: Bool[Array, "B L"], *, of: Architecture
) -> Float[Array, "B L D"]:
    """The last hidden states of texts of at most L tokens.

    Args:
        ids: of the tokens, padded at the end.
        valid: which of them are no padding.
    """
    positions = params["position_embeddings"][of.first_position :][: ids.shape[1]]
    x = (
        params["word_embeddings"][ids]
        + positions[None]
        + params["token_type_embeddings"][0][None, None]
    )
    # Frozen vectors are compared and kept: they must not depend on how a device rounds products.
    with jax.default_matmul_precision("highest"):
        x = _normalise(x, params["norm"], of)
        return jax.lax.scan(
            lambda x, block: (_block(x, block, valid, of), None), x, params["blocks"]
        )[0]


def _block(x: Array, block: Params, valid: Array, of: Architecture) -> Array:
    def heads(name: str) -> Array:
        return _dense(x, block[name]).reshape(*x.shape[:2], of.heads, -1)

    scores = (
        jnp.einsum("bqhd,bkhd->bhqk", heads("query"), heads("key")) * (of.width // of.heads) ** -0.5
    )
    share = jax.nn.softmax(jnp.where(valid[:, None, None], scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", share, heads("value")).reshape(x.shape)
    x = _normalise(x + _dense(mixed, block["mix"]), block["mix_norm"], of)
    inner = ACTIVATIONS[of.activation](_dense(x, block["up"]))
    return _normalise(x + _dense(inner, block["down"]), block["down_norm"], of)


def _dense(x: Array, weights: tuple[Array, Array]) -> Array:
    kernel, bias = weights
    return jnp.einsum("bld,ed->ble", x, kernel) + bias[None, None]


def _normalise(x: Array, weights: tuple[Array, Array], of: Architecture) -> Array:
    scale, bias = weights
    centred = x - x.mean(axis=-1, keepdims=True)
    unit = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + of.epsilon)
    return unit * scale[None, None] + bias[None, None]
