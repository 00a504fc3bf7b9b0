"""Bundles, and the folders of a `MatchModel`, as models of MLflow: its flavour "pyfunc".

A bundle becomes a model by a few files beside its own, which name this module as the loader: no
pickle and no code is stored. `mlflow.pyfunc.load_model` and MLflow's scoring server then answer as
`Retriever` does.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

import twotower
from twotower.core.errors import ConfigError
from twotower.core.files import current_version, read_json
from twotower.core.ids import read_ids
from twotower.integrations.mlflow_store import VERSION_TAG, require_mlflow
from twotower.retrieval.match import MatchModel
from twotower.retrieval.retriever import Retriever

if TYPE_CHECKING:  # extras, which are not always installed
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec

LOADER = "twotower.integrations.mlflow_model"
MANIFEST = "manifest.json"
MANIFEST_TAG = "twotower.manifest"  # sha256 of the manifest, which names a bundle
# Packages of the manifest that a server of the bundle needs in the version that wrote it; ScaNN is
# missing on some platforms, and the search is then exact.
REQUIRED = ("jax", "numpy", "pyarrow")


@dataclasses.dataclass(frozen=True)
class BundleModel:
    """A bundle behind the interface of a pyfunc model.

    Attributes:
        retriever: Retriever of the bundle.
    """

    retriever: Retriever

    def predict(
        self, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None
    ) -> pd.DataFrame:
        """Returns the list of each row's user; or, of rows with an item, its score for the user.

        Args:
            model_input: A row a request: user_id, or raw features of the user, or both; with
                item_id in every row to score pairs. Missing values are left out.
            params: "k", length of the lists, and "exclude_seen"; see `Retriever.recommend`.

        Returns:
            Columns items and scores, a list in each row; or the column score.
        """
        import pandas as pd

        # MLflow gives None where a request has no params.
        options = dict(params or {})
        rows = _read_rows(model_input)
        self._check(model_input, rows)
        are_pairs = ["item_id" in row for row in rows]
        # No rows at all are an empty table of lists.
        if rows and all(are_pairs):
            return pd.DataFrame({"score": self._scores(rows)})
        if any(are_pairs):
            raise ConfigError(
                f"{sum(are_pairs)} of {len(rows)} rows have an item_id. Give one in every row for "
                "scores, or in none for lists."
            )
        items, scores = self._lists(rows, options.pop("k", 10), options.pop("exclude_seen", True))
        return pd.DataFrame({"items": items, "scores": scores})

    def _check(self, model_input: pd.DataFrame, rows: Sequence[Mapping[str, Any]]) -> None:
        """Refuses rows without a user.

        MLflow leaves out columns that the signature lacks, and rows with the last of them.
        """
        problem = ""
        if not len(model_input.columns):
            problem = "the request has no column that is known"
        for number, row in enumerate(rows):
            if not row.keys() - {"item_id"}:
                problem = f"row {number} of the request says nothing of the user"
        if problem:
            columns = ", ".join(self.retriever.user_rows.columns)
            raise ConfigError(f"{problem}; it may have: {columns}.")

    def _lists(
        self, rows: Sequence[dict[str, Any]], k: int, exclude_seen: bool
    ) -> tuple[list[list[str]], list[list[float]]]:
        """Returns the items and the scores of the list of each row."""
        retriever = self.retriever
        items: list[list[str]] = [[] for _ in rows]
        scores: list[list[float]] = [[] for _ in rows]
        requests_of_user: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            # Users with nothing but an id are answered together, each of them once.
            if row.keys() == {"user_id"}:
                user = read_ids([row["user_id"]], retriever.forms.user_id, "user_id")[0]
                requests_of_user.setdefault(user, []).append(number)
                continue
            # One by one: each of them may have a history and features of its own.
            best = retriever.recommend(rows=[row], k=k, exclude_seen=exclude_seen)
            items[number] = [item.item_id for item in best]
            scores[number] = [item.score for item in best]
        if requests_of_user:
            table = retriever.recommend_many(list(requests_of_user), k, exclude_seen=exclude_seen)
            columns = [table[name].to_pylist() for name in ("user_id", "item_id", "score")]
            for user, item, score in zip(*columns):
                # A user who asked twice gets the list twice.
                for number in requests_of_user[user]:
                    items[number].append(item)
                    scores[number].append(score)
        return items, scores

    def _scores(self, rows: Sequence[dict[str, Any]]) -> np.ndarray:
        """Returns the dot product of each row's user and item, float32 [B]."""
        retriever = self.retriever
        items = retriever.item_vectors([row.pop("item_id") for row in rows])
        users = np.zeros_like(items)
        # Known users by their stored vectors, all others through the tower.
        is_known = np.array([row.keys() == {"user_id"} for row in rows])
        ids = [row["user_id"] for row in rows if row.keys() == {"user_id"}]
        others = [row for row in rows if row.keys() != {"user_id"}]
        if ids:
            users[is_known] = retriever.embed_users(ids)
        if others:
            users[~is_known] = retriever.encode_users(others)
        return np.einsum("bd,bd->b", users, items)


@dataclasses.dataclass(frozen=True)
class PairModel:
    """A `MatchModel` behind the interface of a pyfunc model.

    Attributes:
        match: Vectors of users and items.
    """

    match: MatchModel

    def predict(
        self, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None
    ) -> pd.DataFrame:
        """Returns the column score, a row for each pair of user_id and item_id; NaN of an id that
        has no vector."""
        import pandas as pd

        users = model_input["user_id"].tolist()
        items = model_input["item_id"].tolist()
        return pd.DataFrame({"score": self.match(users, items, unknown="nan")})


def _load_pyfunc(path: str) -> BundleModel | PairModel:
    """Loads the model in a folder; MLflow finds this function by its name."""
    # A bundle has a manifest, and a MatchModel's folder none.
    if (current_version(path) / MANIFEST).exists():
        return BundleModel(Retriever.load(path))
    return PairModel(MatchModel.load(path))


def save_model(source: str | os.PathLike, path: str | os.PathLike) -> None:
    """Writes a model of MLflow: a folder that `mlflow.pyfunc.load_model` and `mlflow models serve`
    take.

    Args:
        source: Folder of a bundle, or one that `MatchModel.save` wrote.
        path: Folder to write, which must not exist.

    Raises:
        ConfigError: The extra is missing, or there is such a folder.
    """
    target = Path(path)
    if target.exists():
        raise ConfigError(f"{target} exists already. Name a new folder.")
    # First, since MLflow writes into new folders alone.
    write_flavor(Path(source), target)
    shutil.copytree(current_version(source), target, dirs_exist_ok=True)


def write_flavor(source: Path, target: Path) -> None:
    """Writes the files that make a model of MLflow of a folder, to lie beside that folder's own.

    Args:
        source: Folder of a bundle or of a `MatchModel`.
        target: Folder to write, which must not exist.
    """
    require_mlflow("a model of MLflow")
    import mlflow.pyfunc

    model = _load_pyfunc(str(source))
    # A MatchModel multiplies by NumPy, of whatever version.
    packages: Mapping[str, str] = {}
    if isinstance(model, BundleModel):
        packages = model.retriever.bundle.manifest["packages"]
    # MLflow says at this level that it checks the example against the signature.
    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
    pins = [f"{name}=={packages[name]}" for name in REQUIRED if name in packages]
    mlflow.pyfunc.save_model(
        path=str(target),
        loader_module=LOADER,
        signature=make_signature(model),
        input_example=make_example(model),
        pip_requirements=[f"twotower[mlflow]=={twotower.__version__}", *pins],
    )


def make_signature(model: BundleModel | PairModel) -> ModelSignature:
    """Returns what a model takes and answers, as MLflow checks and shows it."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
    from mlflow.types.schema import Array

    string = DataType.string
    if isinstance(model, PairModel):
        pair: list[ColSpec | TensorSpec] = [ColSpec(string, "user_id"), ColSpec(string, "item_id")]
        return ModelSignature(Schema(pair), Schema([ColSpec(DataType.double, "score")]))
    retriever = model.retriever
    types = retriever.bundle.users.schema
    columns = [_column(name, types) for name in retriever.user_rows.columns]
    # Beside the features of users: with it a request is for scores.
    item = ColSpec(string, "item_id", required=False)
    lists: list[ColSpec | TensorSpec] = [
        ColSpec(Array(string), "items"),
        ColSpec(Array(DataType.double), "scores"),
    ]
    params = [
        ParamSpec("k", DataType.long, 10),
        ParamSpec("exclude_seen", DataType.boolean, True),
    ]
    return ModelSignature(Schema([*columns, item]), Schema(lists), ParamSchema(params))


def _column(name: str, types: pa.Schema) -> ColSpec:
    """Returns a column of requests, which every row may leave out."""
    from mlflow.types import ColSpec, DataType
    from mlflow.types.schema import AnyType

    # Lists of a history, say, and columns of requests that the users' table has not.
    column_type: Any = AnyType()
    if name in types.names:
        stored = types.field(name).type
        if pa.types.is_string(stored) or pa.types.is_large_string(stored):
            column_type = DataType.string
        # Whole numbers too: pandas has them as floats where a row leaves them out.
        elif pa.types.is_integer(stored) or pa.types.is_floating(stored):
            column_type = DataType.double
    return ColSpec(column_type, name, required=False)


def make_example(model: BundleModel | PairModel) -> pd.DataFrame:
    """Returns requests that the model answers."""
    import pandas as pd

    if isinstance(model, PairModel):
        return pd.DataFrame({"user_id": ["somebody"], "item_id": ["something"]})
    users = model.retriever.bundle.users["user_id"][:2].to_pylist()
    # Nobody is known to a bundle without users, which answers strangers too.
    return pd.DataFrame({"user_id": users or ["somebody"]})


def _read_rows(model_input: pd.DataFrame) -> list[dict[str, Any]]:
    """Returns the rows of a request without their missing values."""
    import pandas as pd

    rows = []
    for record in model_input.to_dict("records"):
        row = {}
        for name, value in record.items():
            # MLflow turns the lists of JSON into arrays.
            if isinstance(value, np.ndarray):
                value = value.tolist()
            # `isna` of a list is a list.
            if not (pd.api.types.is_scalar(value) and pd.isna(value)):
                row[name] = value
        rows.append(row)
    return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Registration:
    """A name in MLflow's registry of models that a bundle becomes a version of.

    Attributes:
        name: Name of the model, made where there is none.
        alias: Name that the version has from now on, such as "champion"; "" for none.
    """

    name: str
    alias: str = ""


def log_bundle(client: MlflowClient, run_id: str, bundle: Path, path: str = "bundle") -> None:
    """Logs a bundle as files of a run, a bundle and a model of MLflow in one folder.

    Args:
        client: Client of the store.
        run_id: MLflow run.
        bundle: Folder of the bundle.
        path: Folder among the files of the run.
    """
    files = current_version(bundle)
    with tempfile.TemporaryDirectory() as folder:
        flavor = Path(folder) / "model"
        write_flavor(bundle, flavor)
        client.log_artifacts(run_id, str(files), path)
        client.log_artifacts(run_id, str(flavor), path)


def register(client: MlflowClient, run_id: str, bundle: Path, registration: Registration) -> str:
    """Makes a bundle a version in the registry, or finds the version that it is already.

    Args:
        client: Client of the store.
        run_id: MLflow run that the bundle belongs to.
        bundle: Folder of the bundle.
        registration: Name and alias.

    Returns:
        The number of the version.
    """
    name = registration.name
    manifest = read_json(current_version(bundle) / MANIFEST)
    digest = manifest["sha256"]
    # Looked for first: MLflow refuses a name that exists.
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    versions = client.search_model_versions(f"name = '{name}'")
    # By content: a command that is given twice must not make two versions of one bundle.
    found = [one.version for one in versions if one.tags.get(MANIFEST_TAG) == digest]
    if found:
        version = str(found[0])
    else:
        # A folder of its own: the next export replaces the bundle of the run, not this version.
        path = f"registered/{digest[:12]}"
        log_bundle(client, run_id, bundle, path)
        source = f"{client.get_run(run_id).info.artifact_uri}/{path}"
        tags = {MANIFEST_TAG: digest, VERSION_TAG: manifest["model_version"]}
        version = str(client.create_model_version(name, source, run_id, tags=tags).version)
    # For a version that was there already too: that is how one goes back.
    if registration.alias:
        client.set_registered_model_alias(name, registration.alias, version)
    return version
