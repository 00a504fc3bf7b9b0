"""A sentence-transformers model, found and read from its folder: JSON and safetensors alone, never
a pickle."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from twotower.core.errors import ConfigError, choose, extra
from twotower.core.files import digest
from twotower.features.bert import Architecture, Params, architecture, hidden_states, read_params

WEIGHTS, CONFIG, TOKENIZER, POOLING = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "pooling",
)
MODULES, LENGTHS, PROMPTS = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
# Texts are padded to one of these lengths, and calls to _FEW texts or to _TOKENS tokens: a handful
# of programs is compiled.
_LENGTHS = np.array([16, 24, 32, 48, 64, 96, 128, 192, 256, 384])
_TOKENS, _FEW = 2048, 8
# Ways of pooling, and the flag that names each in files from before sentence-transformers 6.
_MODES = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}


@dataclasses.dataclass(frozen=True, eq=False)
class SentenceModel:
    """A frozen encoder.

    Attributes:
        tokenizer: text -> ids, cut to what the model takes.
        params, of: the weights, and what else their forward pass needs.
        pooling: "mean" of the tokens, or the first one ("cls").
        normalize: whether vectors are brought to length 1.
        lower: whether texts are put in lower case first.
    """

    tokenizer: Any
    params: Params
    of: Architecture
    pooling: str
    normalize: bool
    lower: bool

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "N E"]:
        """The vectors of texts."""
        texts = [text.lower() for text in texts] if self.lower else list(texts)
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        allowed = np.append(_LENGTHS[_LENGTHS < self.of.positions], self.of.positions)
        lengths = allowed[np.searchsorted(allowed, [len(row) for row in ids])]
        vectors = np.zeros((len(ids), self.of.width), np.float32)
        for length in np.unique(lengths).tolist():
            rows, most = np.flatnonzero(lengths == length), max(_FEW, _TOKENS // length)
            for start in range(0, len(rows), most):
                part = rows[start : start + most]
                vectors[part] = self._encode(
                    [ids[row] for row in part], length, _FEW if len(part) <= _FEW else most
                )
        return vectors

    def _encode(self, ids: list[list[int]], length: int, rows: int) -> np.ndarray:
        """The vectors of texts that are filled up to `rows` texts of `length` tokens."""
        padded, valid = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
        valid[:, 0] = True  # what fills up attends to something: no NaN
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)], valid[row, : len(tokens)] = tokens, True
        vectors = _pooled(
            self.params, padded, valid, of=self.of, pooling=self.pooling, normalize=self.normalize
        )
        return np.asarray(vectors)[: len(ids)]


@functools.partial(jax.jit, static_argnames=("of", "pooling", "normalize"))
def _pooled(
    params: Params,
    ids: Int32[Array | np.ndarray, "B L"],
    valid: Bool[Array | np.ndarray, "B L"],
    *,
    of: Architecture,
    pooling: str,
    normalize: bool,
) -> Float[Array, "B D"]:
    x = hidden_states(params, ids, valid, of=of)
    weights = valid.astype(x.dtype)[..., None]
    x = x[:, 0] if pooling == "cls" else (x * weights).sum(axis=1) / weights.sum(axis=1)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12) if normalize else x


def find_model(name: str, where: str) -> Path:
    """The folder of a model: `name` itself, or what huggingface_hub has in its cache or can
    download.

    Args:
        name: a folder; or OWNER/MODEL of the Hub, without an owner one of "sentence-transformers".
        where: the feature, as errors call it.

    Raises:
        ConfigError: there is none.
    """
    folder = Path(os.path.expanduser(os.path.expandvars(name)))
    if folder.is_dir():
        return folder
    with extra("text", f"{where}.model={name!r}, which is not a folder,"):
        from huggingface_hub import constants  # comes with tokenizers
    repository = name if "/" in name else f"sentence-transformers/{name}"
    try:
        return _snapshot(repository)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{where}.model={name!r} is neither a folder nor a model in the cache of the Hugging Face Hub "
            f"({constants.HF_HUB_CACHE}), and it could not be downloaded: {str(error).splitlines()[0]} Where there is a network: "
            f"hf download {repository}. Or copy the model's folder here and name its path."
        ) from None


def _snapshot(repository: str) -> Path:
    """From the cache, where it is there, without asking the Hub."""
    from huggingface_hub import snapshot_download

    with contextlib.suppress(FileNotFoundError):
        cached = Path(snapshot_download(repository, local_files_only=True))
        if any(cached.rglob(WEIGHTS)):
            return cached
    return Path(snapshot_download(repository, allow_patterns=[f"*{WEIGHTS}", "*.json"]))


def load_model(folder: Path, where: str) -> SentenceModel:
    """Reads a model.

    Raises:
        ConfigError: the extra is missing; a file is, or cannot be read; or the model is of a kind
            that is not supported.
    """
    with extra("text", f"{where} (type 'sentence')"):
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

    modules = _modules(folder, where)
    files = _files(folder, where)
    of = architecture(_json(files[CONFIG], where), f"{where}: {files[CONFIG]}")
    limits = _json(files[LENGTHS], where) if LENGTHS in files else {}
    try:
        weights = load_file(files[WEIGHTS])
        tokenizer = Tokenizer.from_file(str(files[TOKENIZER]))
    except Exception as error:  # tokenizers raises no narrower kind; the cause is kept
        raise ConfigError(
            f"{where}: {files[WEIGHTS]} or {TOKENIZER} beside it cannot be read: {error}"
        ) from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(min(limits.get("max_seq_length") or of.positions, of.positions))
    params = read_params(weights, of, f"{where}: {files[WEIGHTS]}")
    return SentenceModel(
        tokenizer,
        jax.tree.map(jnp.asarray, params),
        of,
        pooling=_pooling(files, where),
        normalize="Normalize" in modules,
        lower=bool(limits.get("do_lower_case")),
    )


def model_digest(folder: Path, where: str) -> str:
    """SHA-256 of all the files that vectors depend on.

    Raises:
        ConfigError: one of them is missing.
    """
    files = {name: digest(path) for name, path in sorted(_files(folder, where).items())}
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def model_width(folder: Path, where: str) -> int:
    """E of a model's vectors."""
    return _json(_files(folder, where)[CONFIG], where)["hidden_size"]


def _modules(folder: Path, where: str) -> dict[str, str]:
    """Kind of each module of a model -> its folder; a model that lists none is a Transformer whose
    tokens are averaged.

    Raises:
        ConfigError: it has others than a Transformer, pooling and normalisation, or texts are to be
            put behind a prompt.
    """
    path = folder / MODULES
    listed = _json(path, where) if path.exists() else [{"type": "Transformer", "path": ""}]
    modules = {str(module["type"]).rpartition(".")[2]: module["path"] for module in listed}
    if not {"Transformer"} <= set(modules) <= {"Transformer", "Pooling", "Normalize"}:
        raise ConfigError(
            f"{where}: {path} lists {', '.join(modules)}; a model of a Transformer, Pooling and Normalize alone can be read."
        )
    prompts = _json(folder / PROMPTS, where) if (folder / PROMPTS).exists() else {}
    if prompts.get("default_prompt_name"):
        raise ConfigError(
            f"{where}: {folder / PROMPTS} puts the prompt {prompts['default_prompt_name']!r} before texts, which cannot be done."
        )
    return modules


def _files(folder: Path, where: str) -> dict[str, Path]:
    """The files that are read, by what they are."""
    modules = _modules(folder, where)
    transformer = folder / modules["Transformer"]
    files = {name: transformer / name for name in (CONFIG, TOKENIZER, WEIGHTS)}
    if "Pooling" in modules:
        files[POOLING] = folder / modules["Pooling"] / CONFIG
    missing = next((path for path in files.values() if not path.is_file()), None)
    if missing:
        raise ConfigError(
            f"{where}: {folder} is not a sentence encoder that can be read: it has no {missing.relative_to(folder)}. "
            f"Weights must be in {WEIGHTS} and the tokenizer in {TOKENIZER}; no pickle (pytorch_model.bin) is read."
        )
    beside = {MODULES: folder / MODULES, LENGTHS: transformer / LENGTHS}
    return files | {name: path for name, path in beside.items() if path.is_file()}


def _pooling(files: dict[str, Path], where: str) -> str:
    config = _json(files[POOLING], where) if POOLING in files else {"pooling_mode": "mean"}
    named = config.get("pooling_mode") or _flagged(config) or "mean"
    modes = [named] if isinstance(named, str) else list(named)
    if len(modes) > 1:
        raise ConfigError(
            f"{where}: {files[POOLING]} joins {' and '.join(modes)}; one way of pooling can be read."
        )
    choose(_MODES, modes[0], f"{where}: {files.get(POOLING)}: pooling_mode")
    return modes[0]


def _flagged(config: dict[str, Any]) -> list[str]:
    """The modes that are on in a file of flags; of those that are not known, what the flag is
    called."""
    names = {flag: mode for mode, flag in _MODES.items()}
    return [
        names.get(key, key) for key, on in config.items() if key.startswith("pooling_mode_") and on
    ]


def _json(path: Path, where: str) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: {path} is not JSON that can be read: {error}") from None
