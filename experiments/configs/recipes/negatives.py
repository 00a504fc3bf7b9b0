r"""Negatives of a positive: samplers, their mixture, and hard negatives.

    python -m experiments.train --config=experiments/configs/recipes/negatives.py:mined \
        --workdir=runs/mined
    python -m experiments.export --workdir=runs/mined
    python -m experiments.evaluate --workdir=runs/mined --k=10 --baselines

The name after the colon is one of RECIPES. Each source states how often it yields an item, and the
correction knows the sum over all of them, so sources mix freely.
"""

from twotower.experiment import read

RECIPES = {
    # Items that training never saw are negatives too, so that none of them surfaces by chance.
    "uniform": {"objective.negatives.uniform": 256},
    "popularity": {
        "objective.negatives.popularity": 256,
        "objective.negatives.alpha": 0.5,
    },
    # The item vectors of the last four batches, used once the model has settled.
    "queue": {
        "objective.negatives.queue": 2048,
        "objective.negatives.queue_warmup": 50,
        "objective.negatives.queue_age": 4,
    },
    # Ranks 20 to 100 of the model itself, ranked anew every 100 steps; likely positives left out.
    "mined": {
        "objective.negatives.mined": 2,
        "objective.negatives.mined_refresh": 100,
        "objective.negatives.mined_ranks": (20, 100),
        "objective.negatives.mined_margin": 0.05,
    },
    # Items that a user saw and did not like, where the log has labels.
    "explicit": {
        "objective.label": "liked",
        "objective.negatives.explicit": 2,
    },
    "full_softmax": {
        "objective.negatives.catalogue": True,
        "objective.negatives.in_batch": False,
    },
    # Frequencies that are estimated from the stream, for logs without counts beforehand.
    "frequency_by_gaps": {"objective.negatives.frequency": "gap"},
    "frequency_by_sketch": {"objective.negatives.frequency": "sketch"},
}


def get_config(recipe="mined"):
    return read("recipes/shop", RECIPES[recipe])
