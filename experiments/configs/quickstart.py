"""The generated shop: 100,000 events of a shop whose true preferences are known.

    bash launch_local.sh
    python -m experiments.train --config=experiments/configs/quickstart.py --workdir=runs/quickstart
"""

from twotower.config import defaults


def get_config():
    config = defaults()
    config.data.source = "shop"
    config.data.num_interactions = 100_000

    config.split.kind = "time"
    config.split.validation = 0.05
    config.split.test = 0.1

    config.features.path = "experiments/features/shop.json"
    config.model.user.layers = (64,)
    config.model.item.layers = (64,)

    config.training.batch_size = 1024
    config.training.steps = 1500
    config.training.validate_every = 250
    return config
