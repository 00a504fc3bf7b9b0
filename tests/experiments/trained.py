"""One trained run of seconds and its bundle, for every test of the commands; read it only."""

import shutil

import pytest

from twotower import api
from twotower.config import from_dict

CONFIG = {
    "data": {"source": "shop", "num_interactions": 3000},
    "features": {
        "user": {"user_id": {"type": "string", "embedding_size": 8}},
        "item": {"item_id": {"type": "string", "embedding_size": 8}},
    },
    "training": {"batch_size": 64, "steps": 4, "validate_every": 4, "log_every": 2},
    "retrieval": {"display": ("title", "price")},
}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a run without a bundle."""
    workdir = tmp_path_factory.mktemp("trained") / "shop"
    # On all devices, as outside the tests; what is done with the run is done on one.
    api.train_in_folder(from_dict(CONFIG), workdir, devices=8)
    return workdir


@pytest.fixture(scope="session")
def exported(trained, tmp_path_factory):
    """The folder of the same run with its bundle."""
    workdir = shutil.copytree(trained, tmp_path_factory.mktemp("exported") / "shop")
    api.export(api.load_run(workdir))
    return workdir
