"""A tiny run that was never trained and its bundle, for all tests of what may go wrong."""

import shutil

import pytest

from tests.retrieval.runs import FEATURES, make_run, with_other_weights, write


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run with titles to show."""
    item = FEATURES["item"] | {"title": {"type": "text", "embedding_size": 4, "buckets": 64}}
    sections = {
        "data": {"num_interactions": 1000, "num_items": 60},
        "features": FEATURES | {"item": item},
    }
    return make_run(tmp_path_factory.mktemp("reliability"), **sections)


@pytest.fixture(scope="session")
def other_run(run, tmp_path_factory):
    """The same run with other weights."""
    return with_other_weights(run, tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="session")
def exported(run):
    """The folder of the run's bundle: not to be changed."""
    return write(run)


@pytest.fixture
def folder(exported, tmp_path):
    """A bundle that a test may change."""
    shutil.copytree(exported, tmp_path / "bundle")
    return tmp_path / "bundle"
