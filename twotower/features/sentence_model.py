"""Sentence encoders as their publishers ship them, run by ONNX Runtime.

A folder of sentence-transformers names the tokenizer, the pooling, the prompt, and whether vectors
are normalised. All of it is read from the model's own files, so that any architecture with an
`onnx/` folder serves, as E5, BGE, GTE and Qwen embeddings have. For a model without such a folder
the package sentence-transformers is used, if it is installed. No pickle is read either way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64

from twotower.core.errors import ConfigError, choose
from twotower.core.files import digest
from twotower.core.install import extra

if TYPE_CHECKING:  # an extra, which is not always installed
    from onnxruntime import InferenceSession
    from tokenizers import Tokenizer

MODULES = "modules.json"
PROMPTS = "config_sentence_transformers.json"
CONFIG = "config.json"
LENGTHS = "sentence_bert_config.json"
TOKENIZER = "tokenizer.json"
WEIGHTS = "model.safetensors"
# Paths of an exported model in the folder of its Transformer, the usual one first.
ONNX_FILES = ("onnx/model.onnx", "model.onnx")
# Names that exporters give to the hidden states of the last layer.
HIDDEN_STATES = ("last_hidden_state", "token_embeddings")
# Keys of the width in the configurations of Transformers.
WIDTHS = ("hidden_size", "dim", "d_model")
# Tokens of one call. Texts of about one length go together, so that little of it is padding.
TOKENS_PER_CALL = 4096
DEFAULT_LENGTH = 512

Hidden = Float[np.ndarray, "B L D"]
Mask = Bool[np.ndarray, "B L"]


def mean_pooling(hidden: Hidden, mask: Mask) -> Float[np.ndarray, "B D"]:
    """Averages the vectors of a text's tokens."""
    # Padding has vectors too: it is left out by weight, not by position.
    weights = mask.astype(hidden.dtype)[..., None]
    # As in sentence-transformers, whose least divisor is 1e-9.
    return (hidden * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1e-9)


def max_pooling(hidden: Hidden, mask: Mask) -> Float[np.ndarray, "B D"]:
    """Takes the greatest value of each column over a text's tokens."""
    # Minus infinity rather than 0, which may be greater than all values of a column.
    return np.where(mask[..., None], hidden, -np.inf).max(axis=1)


def first_token(hidden: Hidden, mask: Mask) -> Float[np.ndarray, "B D"]:
    """Takes the vector of the first token, the one that BERT calls [CLS]."""
    # Padding is on the right, so the first token is a real one.
    return hidden[:, 0]


def last_token(hidden: Hidden, mask: Mask) -> Float[np.ndarray, "B D"]:
    """Takes the vector of a text's last token, as encoders made from decoders do."""
    # `argmax` finds the first True of the reversed mask, hence the last token.
    position = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
    return hidden[np.arange(len(hidden)), position]


POOLINGS: dict[str, Callable[[Hidden, Mask], np.ndarray]] = {
    "mean": mean_pooling,
    "max": max_pooling,
    "cls": first_token,
    "lasttoken": last_token,
}
# The flag that names each in files from before sentence-transformers 6.
POOLING_FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
}


class SentenceModel(Protocol):
    """A frozen sentence encoder."""

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "N E"]:
        """Returns the vectors of texts."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class OnnxSentenceModel:
    """An encoder that ONNX Runtime runs.

    Attributes:
        tokenizer: A `tokenizers.Tokenizer` that cuts texts to the length of the model.
        session: An `onnxruntime.InferenceSession`.
        output: Name of the session's output that holds the hidden states.
        pooling: Function from hidden states and their mask to vectors.
        normalize: Whether vectors are scaled to length 1.
        lower: Whether texts are put in lower case first.
        prompt: Text put before each text.
        skip: Number of leading tokens, those of the prompt, that pooling leaves out.
    """

    tokenizer: Tokenizer
    session: InferenceSession
    output: str
    pooling: Callable[[Hidden, Mask], np.ndarray]
    normalize: bool
    lower: bool
    prompt: str
    skip: int

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "N E"]:
        texts = [self.prompt + text for text in texts]
        # After the prompt was added, as sentence-transformers does.
        if self.lower:
            texts = [text.lower() for text in texts]
        tokens = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        lengths = np.array([len(ids) for ids in tokens], dtype=np.int64)
        order = np.argsort(lengths, kind="stable")
        blocks: list[np.ndarray] = []
        start = 0
        while start < len(order):
            rows = order[start : start + _texts_per_call(lengths[order], start)]
            blocks.append(self._encode([tokens[row] for row in rows]))
            start += len(rows)
        if not blocks:
            return np.zeros((0, self._width()), np.float32)
        # Back into the order of the texts.
        vectors = np.concatenate(blocks)
        return vectors[np.argsort(order, kind="stable")]

    def _encode(self, tokens: Sequence[Sequence[int]]) -> Float32[np.ndarray, "B E"]:
        ids, mask = padded(tokens)
        # Models take some of these; the session's own list of inputs decides.
        arrays = {
            "input_ids": ids,
            "attention_mask": mask.astype(np.int64),
            "token_type_ids": np.zeros_like(ids),
            "position_ids": np.broadcast_to(np.arange(ids.shape[1]), ids.shape),
        }
        feeds = {each.name: arrays[each.name] for each in self.session.get_inputs()}
        # One output by name: exporters add others, such as a pooled one.
        (hidden,) = self.session.run([self.output], feeds)
        # After the run: attention sees the prompt, pooling does not.
        mask[:, : self.skip] = False
        # Half-precision exports too are pooled in float32.
        vectors = self.pooling(np.asarray(hidden, np.float32), mask)
        if self.normalize:
            norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
            # PyTorch's least norm, so that zeros stay zeros.
            vectors = vectors / np.maximum(norms, 1e-12)
        return vectors.astype(np.float32)

    def _width(self) -> int:
        # Without texts nothing was encoded that the width could be read from.
        return self._encode([self.tokenizer.encode("").ids or [0]]).shape[1]


def padded(
    tokens: Sequence[Sequence[int]],
) -> tuple[Int64[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
    """Pads lists of tokens to one length.

    Returns:
        The ids, 0 in padding, and the mask of the tokens.
    """
    length = max(len(ids) for ids in tokens)
    ids = np.zeros((len(tokens), length), np.int64)
    mask = np.zeros((len(tokens), length), bool)
    for row, values in enumerate(tokens):
        ids[row, : len(values)] = values
        mask[row, : len(values)] = True
    return ids, mask


def _texts_per_call(sorted_lengths: np.ndarray, start: int) -> int:
    """Returns the number of texts from `start` on that fit into one call, with their padding."""
    # Lengths rise, so the last text of a call decides how far all are padded.
    sizes = sorted_lengths[start:] * np.arange(1, len(sorted_lengths) - start + 1)
    return max(1, int(np.searchsorted(sizes, TOKENS_PER_CALL, side="right")))


@dataclasses.dataclass(frozen=True, eq=False)
class PackageSentenceModel:
    """An encoder that the package sentence-transformers runs, for a model without an ONNX file.

    Attributes:
        model: A `sentence_transformers.SentenceTransformer`.
        prompt: Text put before each text.
    """

    model: Any
    prompt: str

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "N E"]:
        # Sent as text, so that it counts even where the model's files name another by default.
        vectors = self.model.encode(list(texts), prompt=self.prompt, show_progress_bar=False)
        return np.asarray(vectors, np.float32)


def find_model(name: str, location: str) -> Path:
    """Returns a model's folder: a local one, or that of the Hub's cache, downloaded if need be.

    Args:
        name: Path of a folder; or OWNER/MODEL of the Hugging Face Hub, in which a name without an
            owner is one of "sentence-transformers".
        location: Name of the feature in error messages.

    Raises:
        ConfigError: There is no such model.
    """
    # A folder first: no network is used for a model that lies here.
    folder = Path(os.path.expanduser(os.path.expandvars(name)))
    if folder.is_dir():
        return folder
    with extra("text", f"{location}.model={name!r}, which is not a folder,"):
        from huggingface_hub import constants  # comes with tokenizers
    repository = name
    if "/" not in name:
        repository = f"sentence-transformers/{name}"
    try:
        return _snapshot(repository)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{location}.model={name!r} is neither a folder nor a model in the cache of the "
            f"Hugging Face Hub ({constants.HF_HUB_CACHE}), and it could not be downloaded: "
            f"{reason} Where there is a network: hf download {repository}. Or copy the model's "
            "folder here and name its path."
        ) from None


def _snapshot(repository: str) -> Path:
    """Returns the folder of a repository, from the cache if it is complete there."""
    from huggingface_hub import snapshot_download

    with contextlib.suppress(FileNotFoundError):
        # Without asking the Hub: a server may have no network.
        cached = Path(snapshot_download(repository, local_files_only=True))
        if onnx_file(cached) or any(cached.rglob(WEIGHTS)):
            return cached
    # Not the whole repository, which often holds the weights in several formats.
    patterns = ["*.json", *(f"{file}*" for file in ONNX_FILES)]
    folder = Path(snapshot_download(repository, allow_patterns=patterns))
    if onnx_file(folder) is None and _has_package():
        folder = Path(snapshot_download(repository, allow_patterns=["*.json", f"*{WEIGHTS}"]))
    return folder


def _has_package() -> bool:
    return importlib.util.find_spec("sentence_transformers") is not None


def onnx_file(folder: Path) -> Path | None:
    """Returns the path of the exported model in the folder of a Transformer, or None."""
    paths = [folder / name for name in ONNX_FILES]
    return next((path for path in paths if path.is_file()), None)


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """The files of a model that its vectors depend on, and their settings.

    Attributes:
        folder: Folder of the model.
        weights: ONNX file, or safetensors without one.
        by_name: Every file, by a name that does not depend on the path of the folder.
        pooling: Key of POOLINGS.
        include_prompt: Whether pooling counts the tokens of the prompt.
        normalize: Whether vectors are scaled to length 1.
        prompts: Prompts of the model by name.
        default_prompt: Name of the prompt that the model puts before texts by itself, if any.
    """

    folder: Path
    weights: Path
    by_name: Mapping[str, Path]
    pooling: str
    include_prompt: bool
    normalize: bool
    prompts: Mapping[str, str]
    default_prompt: str | None

    def read_json(self, name: str, location: str) -> dict[str, Any]:
        """Returns the content of a JSON file, {} if the model has no such file."""
        if name not in self.by_name:
            return {}
        return _json(self.by_name[name], location)


def model_files(folder: Path, location: str) -> ModelFiles:
    """Finds a model's files and reads its settings of pooling, prompts and normalisation.

    Raises:
        ConfigError: One is missing, or asks for something that cannot be done.
    """
    modules = _modules(folder, location)
    transformer = folder / modules["Transformer"]
    weights = onnx_file(transformer) or transformer / WEIGHTS
    by_name = {name: transformer / name for name in (CONFIG, TOKENIZER)}
    by_name[str(weights.relative_to(transformer))] = weights
    if "Pooling" in modules:
        by_name["pooling"] = folder / modules["Pooling"] / CONFIG
    # All files are looked for before the first is read.
    missing = [path for path in by_name.values() if not path.is_file()]
    if missing:
        raise ConfigError(
            f"{location}: {folder} is not a sentence encoder that can be read: it has no "
            f"{missing[0].relative_to(folder)}. It must have {ONNX_FILES[0]} (or {WEIGHTS}, which "
            f"needs the package sentence-transformers) and {TOKENIZER}; no pickle "
            "(pytorch_model.bin) is read."
        )
    optional = {
        MODULES: folder / MODULES,
        PROMPTS: folder / PROMPTS,
        LENGTHS: transformer / LENGTHS,
        # Weights beyond 2 GB lie in a second file beside the ONNX file.
        "data": weights.with_name(f"{weights.name}_data"),
    }
    by_name |= {name: path for name, path in optional.items() if path.is_file()}
    pooling: dict[str, Any] = {}
    if "pooling" in by_name:
        pooling = _json(by_name["pooling"], location)
    prompts: dict[str, Any] = {}
    if PROMPTS in by_name:
        prompts = _json(by_name[PROMPTS], location)
    return ModelFiles(
        folder=folder,
        weights=weights,
        by_name=by_name,
        pooling=_pooling_mode(pooling, by_name.get("pooling"), location),
        include_prompt=bool(pooling.get("include_prompt", True)),
        normalize="Normalize" in modules,
        prompts=prompts.get("prompts") or {},
        default_prompt=prompts.get("default_prompt_name"),
    )


def choose_prompt(files: ModelFiles, prompt: str, location: str) -> str:
    """Returns the text that is put before each text.

    Args:
        files: Files of the model.
        prompt: Name of one of the model's prompts, or the text itself, which has a space or a
            colon ("passage: "); empty for the prompt that the model names as its default.
        location: Name of the feature in error messages.

    Raises:
        ConfigError: The model has no prompt of this name.
    """
    name = prompt or files.default_prompt or ""
    if name in files.prompts:
        return files.prompts[name]
    # One word is meant as a name, and a misspelt name must not become a prompt.
    if re.fullmatch(r"[\w-]+", name):
        choose(files.prompts, name, f"{location}.prompt")
    return name


def load_model(folder: Path, location: str, *, prompt: str = "") -> SentenceModel:
    """Reads a model.

    Args:
        folder: Folder of the model.
        location: Name of the feature in error messages.
        prompt: Prompt, see `choose_prompt`.

    Raises:
        ConfigError: The extra is missing; a file is, or cannot be read; or the model asks for
            something that cannot be done.
    """
    files = model_files(folder, location)
    text = choose_prompt(files, prompt, location)
    if files.weights.suffix != ".onnx":
        return _load_by_package(files, text, location)
    with extra("text", f"{location} (type 'sentence')"):
        import onnxruntime
        from tokenizers import Tokenizer

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    try:
        # The CPU even beside an accelerator: ONNX Runtime for GPUs is another package.
        session = onnxruntime.InferenceSession(
            str(files.weights), options, providers=["CPUExecutionProvider"]
        )
        tokenizer = Tokenizer.from_file(str(files.by_name[TOKENIZER]))
    except Exception as error:  # both raise no narrower kind; the cause is kept
        raise ConfigError(
            f"{location}: {files.weights} or {TOKENIZER} beside it cannot be read: {error}"
        ) from error
    _check_inputs(session, files, location)
    limits = files.read_json(LENGTHS, location)
    # Padding is added by `padded`, call by call; that of the file would be to a fixed length.
    tokenizer.no_padding()
    tokenizer.enable_truncation(_max_length(files, limits, location))
    # All but the token that ends every text belongs to the prompt.
    skip = 0
    if text and not files.include_prompt:
        skip = len(tokenizer.encode(text).ids) - 1
    return OnnxSentenceModel(
        tokenizer=tokenizer,
        session=session,
        output=_output(session, files, location),
        pooling=POOLINGS[files.pooling],
        normalize=files.normalize,
        lower=bool(limits.get("do_lower_case")),
        prompt=text,
        skip=skip,
    )


def model_digest(folder: Path, location: str, *, prompt: str = "") -> str:
    """Returns the SHA-256 of everything that vectors depend on: the model's files and the prompt.

    Raises:
        ConfigError: One of the files is missing.
    """
    files = model_files(folder, location)
    # By name and content: a copy of the folder elsewhere has the same digest.
    parts = {name: digest(path) for name, path in sorted(files.by_name.items())}
    parts["prompt"] = choose_prompt(files, prompt, location)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def model_width(folder: Path, location: str) -> int:
    """Returns the width E of a model's vectors.

    Raises:
        ConfigError: The model's configuration does not hold it.
    """
    # Read rather than measured: no model needs to be loaded for it.
    config = model_files(folder, location).read_json(CONFIG, location)
    for key in WIDTHS:
        if key in config:
            return int(config[key])
    raise ConfigError(
        f"{location}: {folder / CONFIG} does not say the width of the vectors: it has none of "
        f"{', '.join(WIDTHS)}."
    )


def _load_by_package(files: ModelFiles, prompt: str, location: str) -> PackageSentenceModel:
    try:
        package = importlib.import_module("sentence_transformers")
    except ImportError:
        raise ConfigError(
            f"{location}: {files.folder} has no {ONNX_FILES[0]}, and the package "
            "sentence-transformers, which reads such a model, is not installed. Install it, or "
            "put the ONNX file of the model there (its repository often has one; else "
            "`optimum-cli export onnx` writes it)."
        ) from None
    # Safetensors alone: without this a pickle would be read where both are there.
    model = package.SentenceTransformer(str(files.folder), model_kwargs={"use_safetensors": True})
    return PackageSentenceModel(model, prompt)


def _modules(folder: Path, location: str) -> dict[str, str]:
    """Returns the folder of each module of a model by its kind.

    A model that lists none is a Transformer whose tokens are averaged.

    Raises:
        ConfigError: The model has modules other than a Transformer, pooling and normalisation.
    """
    path = folder / MODULES
    listed = [{"type": "Transformer", "path": ""}]
    if path.exists():
        listed = _json(path, location)
    # Types are Python paths, such as sentence_transformers.models.Pooling.
    modules = {str(module["type"]).rpartition(".")[2]: module["path"] for module in listed}
    # A further dense module would be left out silently otherwise.
    if not {"Transformer"} <= set(modules) <= {"Transformer", "Pooling", "Normalize"}:
        raise ConfigError(
            f"{location}: {path} lists {', '.join(modules)}; a model of a Transformer, Pooling and "
            "Normalize alone can be read."
        )
    return modules


def _pooling_mode(config: Mapping[str, Any], path: Path | None, location: str) -> str:
    # Older files have a flag for each way, newer ones a name.
    flags = [key for key, on in config.items() if key.startswith("pooling_mode_") and on]
    names = config.get("pooling_mode") or [POOLING_FLAGS.get(flag, flag) for flag in flags]
    if isinstance(names, str):
        names = [names]
    # Sentence-transformers averages tokens if nothing else is configured.
    modes = list(names) or ["mean"]
    if len(modes) > 1:
        raise ConfigError(
            f"{location}: {path} joins {' and '.join(modes)}; one way of pooling can be read."
        )
    choose(POOLINGS, modes[0], f"{location}: {path}: pooling_mode")
    return modes[0]


def _check_inputs(session: InferenceSession, files: ModelFiles, location: str) -> None:
    """Refuses a model that asks for more than tokens, their mask, types and positions."""
    known_inputs = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    others = [each.name for each in session.get_inputs() if each.name not in known_inputs]
    if others:
        raise ConfigError(
            f"{location}: {files.weights} asks for {', '.join(others)}; a model of "
            f"{', '.join(known_inputs)} can be run. Export it for feature extraction, "
            "without a cache of keys and values."
        )


def _output(session: InferenceSession, files: ModelFiles, location: str) -> str:
    """Returns the name of the output that holds the hidden states."""
    names = [each.name for each in session.get_outputs()]
    for name in HIDDEN_STATES:
        if name in names:
            return name
    raise ConfigError(
        f"{location}: {files.weights} yields {', '.join(names)}, none of which is "
        f"{' or '.join(HIDDEN_STATES)}: export it for feature extraction."
    )


def _max_length(files: ModelFiles, limits: Mapping[str, Any], location: str) -> int:
    """Returns the number of tokens that a text is cut to."""
    config = files.read_json(CONFIG, location)
    positions = config.get("max_position_embeddings") or DEFAULT_LENGTH
    if config.get("model_type") in ("roberta", "xlm-roberta", "camembert"):
        # These number positions from the padding's id on.
        positions -= config.get("pad_token_id", 1) + 1
    # The publisher's limit may be lower than that of the architecture, never higher.
    return min(limits.get("max_seq_length") or positions, positions)


def _json(path: Path, location: str) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{location}: {path} is not JSON that can be read: {error}") from None
