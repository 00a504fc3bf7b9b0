"""A run whose folder is in a bucket: it goes on anywhere, and answers as one of this machine."""

import contextlib
import json

import pytest

from tests.buckets import serving, set_addresses
from tests.training.shop import TINY_FEATURES, small_config
from twotower import api
from twotower.training.monitoring.heartbeat import read_heartbeat
from twotower.training.run import local_folder

RUN = "s3://shop/runs/a"


class Stopped(Exception):
    pass


def read_checksum(workdir):
    path = workdir / "checkpoints" / "6" / "record" / "metadata"
    return json.loads(path.read_text())["checksum"]


@pytest.mark.slow
def test_a_run_in_a_bucket_goes_on_elsewhere_and_ends_in_the_same_bits(tmp_path, monkeypatch):
    training = {"steps": 6, "validate_every": 2, "log_every": 2}
    retrieval = {"index": "exact"}
    config = small_config(
        data={"num_interactions": 1000},
        features=TINY_FEATURES,
        training=training,
        retrieval=retrieval,
    )

    def stop(step, values):
        if step == 4:
            raise Stopped

    with serving() as server, monkeypatch.context() as patch:
        set_addresses(patch, server)

        def move_to(machine):
            patch.setenv("TWOTOWER_CACHE", str(tmp_path / machine))

        move_to("first")
        with contextlib.suppress(Stopped):
            api.train_in_folder(config, RUN, devices=1, on_validation=stop)
        # Its last save is in the bucket, and that machine is gone.
        move_to("second")
        api.train_in_folder(config, RUN, devices=1)
        copy = local_folder(RUN)
        assert read_heartbeat(copy)["starts"] == 2
        api.train_in_folder(config, tmp_path / "here", devices=1)
        assert read_checksum(copy) == read_checksum(tmp_path / "here")
        move_to("third")
        run = api.load_run(RUN)
        run.export()
        user = run.prepared.users["user_id"][0].as_py()
        move_to("fourth")
        for address in (f"{RUN}/bundle", RUN):
            retriever = api.load_retriever(address)
            assert retriever.recommend(user, k=3) == run.recommend(user, k=3)
