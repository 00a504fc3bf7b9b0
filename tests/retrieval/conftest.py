"""A small run that was never trained, and its bundle, for all tests of retrieval."""

import pytest

from tests.retrieval.runs import make_run
from twotower.core.files import current_version
from twotower.retrieval.export import export
from twotower.retrieval.retriever import Retriever


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def exported(run):
    """The folder of the run's bundle: not to be changed."""
    export(run, run.workdir / "bundle")
    return run.workdir / "bundle"


@pytest.fixture(scope="session")
def exported_files(exported):
    """The folder of the files of that bundle, which is a bundle of its own where it is copied."""
    return current_version(exported)


@pytest.fixture(scope="session")
def retriever(exported):
    return Retriever.load(exported)
