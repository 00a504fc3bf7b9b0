"""The generated shop: 100,000 views, carts and purchases of 4,000 users and 2,500 items, whose true
preferences are known.

    bash launch_local.sh

or in steps:

    python -m experiments.train --config=experiments/configs/quickstart.py --workdir=runs/quickstart
    python -m experiments.export --workdir=runs/quickstart
    python -m experiments.evaluate --workdir=runs/quickstart --k=10,50,100 --baselines
    python -m experiments.query --workdir=runs/quickstart --user=42 --k=10
"""

from twotower.config import defaults


def get_config():
    config = defaults()
    config.data.source = "shop"
    config.data.num_interactions = 100_000

    config.split.kind = "time"
    config.split.validation = 0.05
    config.split.test = 0.1

    config.features.path = "../features/shop.json"  # beside this file
    config.model.user.layers = (64,)
    config.model.user.dropout = 0.4
    config.model.item.layers = (64,)
    config.model.item.dropout = 0.4
    config.model.history.kind = "bag"
    config.model.history.dropout = 0.2

    config.training.batch_size = 1024
    config.training.steps = 400
    config.training.optimizer.learning_rate = 2e-3
    config.training.tables.learning_rate = 0.05
    config.training.schedule.kind = "cosine"
    config.training.validate_every = 100

    config.retrieval.display = ("title", "title_ar", "category", "price")
    return config
