"""One small bundle of a model that reads what users did, for all tests of serving."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

from tests.retrieval.runs import make_run
from twotower.retrieval.export import export
from twotower.retrieval.retriever import Retriever

# Without the extra serve the lists are tested alone; where nothing may be left out, all fail.
if importlib.util.find_spec("msgspec") is None and not os.environ.get("TWOTOWER_COMPLETE"):
    files = Path(__file__).parent.glob("test_*.py")
    collect_ignore = [path.name for path in files if path.name != "test_lists.py"]
HISTORY = {"type": "history", "max_length": 8, "reads": ["item_id"]}
FEATURES = {
    "user": {"city": {"type": "string", "embedding_size": 4}, "history": HISTORY},
    "item": {"item_id": {"type": "string", "embedding_size": 16}, "price": {"type": "float"}},
}


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """The folder of the bundle: not to be changed."""
    run = make_run(
        tmp_path_factory.mktemp("served"), features=FEATURES, retrieval={"popularity": True}
    )
    export(run, run.workdir / "bundle")
    return run.workdir / "bundle"


@pytest.fixture(scope="session")
def retriever(served):
    return Retriever.load(served)


@pytest.fixture(scope="session")
def thinned(served, tmp_path_factory):
    """The folder of another version of the bundle, without every other item: not to be changed."""
    folder = tmp_path_factory.mktemp("thinned") / "bundle"
    shutil.copytree(served, folder)
    thin(folder)
    return folder


def thin(folder):
    """Makes a new version of a bundle, without every other item."""
    retriever = Retriever.load(folder)
    retriever.delete(retriever.items()["item_id"].to_pylist()[::2])
    retriever.compact()


@pytest.fixture
def copied(served, tmp_path):
    """The folder of a bundle that a test may change."""
    shutil.copytree(served, tmp_path / "bundle")
    return tmp_path / "bundle"
