"""One process of a run of several, as `experiments.train` starts it, that also tells what it did:
see test_processes.py.

    python -m tests.training.one_of_several FOLDER DEVICES VALIDATIONS COORDINATOR PROCESSES PROCESS
    [OVERRIDES]

It has DEVICES devices of its own, joins the others, trains in FOLDER until so many validations were
asked for (-1: to the end) and writes FOLDER.PROCESS.json.
"""

import json
import sys

import jax
import numpy as np


class Stopped(Exception):
    pass


def main(workdir, devices, validations, coordinator, processes, process, overrides="{}"):
    jax.config.update("jax_num_cpu_devices", int(devices))
    from tests.training.test_processes import config_of
    from twotower.evaluation.evaluate import make_validate
    from twotower.pipeline.batches import Batches
    from twotower.retrieval.mining import make_miner
    from twotower.training.processes import join
    from twotower.training.run import train

    loaded = []
    load = Batches.load
    Batches.load = lambda self, indices: (
        loaded.append(np.asarray(indices).tolist()) or load(self, indices)
    )

    def stopping(prepared, model):
        validate = make_validate(prepared, model)
        calls = iter(range(10**9))

        def count(weights):
            if next(calls) == int(validations):
                raise Stopped
            return validate(weights)

        return count

    join(coordinator, int(processes), int(process))
    stopped = False
    try:
        train(
            config_of(**json.loads(overrides)),
            workdir,
            make_validate=stopping,
            make_miner=make_miner,
        )
    except Stopped:
        stopped = True
    report = {
        "loaded": loaded,
        "stopped": stopped,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }
    with open(f"{workdir}.{process}.json", "w", encoding="utf-8") as file:
        json.dump(report, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
