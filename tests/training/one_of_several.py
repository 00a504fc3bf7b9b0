"""One process of a run of several, as `experiments.train` starts it, that also tells what it did:
see test_processes.py.

    python -m tests.training.one_of_several FOLDER VALIDATIONS COORDINATOR PROCESSES PROCESS

It joins the others, trains in FOLDER until so many validations were asked for (-1: to the end) and
writes FOLDER.PROCESS.json.
"""

import json
import sys
from unittest import mock

import jax
import numpy as np

from twotower.evaluation.evaluate import make_validate
from twotower.pipeline.batches import Batches
from twotower.retrieval.mining import make_miner
from twotower.training.processes import join
from twotower.training.run import train


class Stopped(Exception):
    pass


def train_until(config, workdir, validations, devices=0):
    """Trains until so many validations were asked for; a report of what this process did."""
    loaded = []
    load = Batches.load

    def recorded(self, indices, **options):
        loaded.append(np.asarray(indices).tolist())
        return load(self, indices, **options)

    def stopping(prepared, model):
        validate = make_validate(prepared, model)
        calls = iter(range(10**9))

        def count(weights):
            if next(calls) == validations:
                raise Stopped
            return validate(weights)

        return count

    stopped = False
    with mock.patch.object(Batches, "load", recorded):
        try:
            parts = {"make_validate": stopping, "make_miner": make_miner}
            train(config, workdir, devices=devices, **parts)
        except Stopped:
            stopped = True
    return {
        "loaded": loaded,
        "stopped": stopped,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }


def main(workdir, validations, coordinator, processes, process):
    from tests.training.test_processes import config_of

    join(coordinator, int(processes), int(process))
    report = train_until(config_of(), workdir, int(validations))
    with open(f"{workdir}.{process}.json", "w", encoding="utf-8") as file:
        json.dump(report, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
