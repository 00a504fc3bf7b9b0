"""A small run that was never trained (its weights are as good as any to check that they arrive),
and its bundle."""

import jax
import pytest

from twotower.config import from_dict
from twotower.core.files import current_version
from twotower.pipeline.prepare import prepare
from twotower.retrieval.export import export
from twotower.retrieval.retriever import Retriever
from twotower.towers.two_tower import TwoTower
from twotower.training.run import Run

FEATURES = {
    "user": {
        "user_id": {"type": "string", "embedding_size": 16},
        "city": {"type": "string", "embedding_size": 4},
        "event": {"type": "string", "embedding_size": 4},  # of the interaction: context
    },
    "item": {"item_id": {"type": "string", "embedding_size": 16}, "price": {"type": "float"}},
}


def make_run(workdir, *, seed=0, **sections):
    """A run of the generated shop with fresh weights."""
    values = {
        "data": {"source": "shop", "num_interactions": 3000},
        "features": FEATURES,
        "model": {"user": {"layers": (16,)}, "item": {"layers": (16,)}},
        "retrieval": {"index": "exact"},
    }
    config = from_dict(
        {name: values.get(name, {}) | sections.get(name, {}) for name in values | sections}
    )
    prepared = prepare(config)
    model = TwoTower.build(config.model, prepared.encoder)
    workdir.mkdir(exist_ok=True)
    return Run(workdir, config, prepared, model, model.init(jax.random.key(seed)), 7)


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
