"""The bundle of a small run that was never trained: not to be changed."""

import pytest

from tests.extras import extra
from tests.retrieval.runs import make_run
from twotower.retrieval.export import export
from twotower.retrieval.retriever import Retriever


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("runs") / "shop", data={"num_interactions": 1000})
    (run.workdir / "config.json").write_text(run.config.to_json())
    export(run, run.workdir / "bundle")
    return run.workdir


@pytest.fixture(scope="session")
def retriever(workdir):
    return Retriever.load(workdir / "bundle")


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """The address of a store of MLflow; made once, for its tables take seconds."""
    extra("mlflow", "mlflow")
    extra("sqlalchemy", "mlflow")
    extra("alembic", "mlflow")
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        yield f"sqlite:///{folder}/mlflow.db"


@pytest.fixture
def client(store):
    import mlflow

    return mlflow.MlflowClient(tracking_uri=store, registry_uri=store)
