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
    # A cart or a purchase repeats the view before it. Lists that leave out what was seen are of new
    # items, of which a repeat says nothing: it hardly counts, as a target and in a history.
    config.data.event_weights = {"view": 1.0, "add_to_cart": 0.01, "purchase": 0.01}

    config.split.kind = "time"
    config.split.validation = 0.05
    config.split.test = 0.1

    config.features.path = "../features/shop.json"  # beside this file
    # Both vectors are sums of rows: what a user had and what an item is are told by the same ones.
    # With dense layers after them lists were worse on validation rows.
    config.model.user.combine = "sum"
    config.model.user.dropout = 0.3
    config.model.item.combine = "sum"
    config.model.item.dropout = 0.3
    config.model.history.kind = "bag"
    config.model.history.dropout = 0.0

    config.training.batch_size = 2048
    config.training.steps = 250
    config.training.optimizer.learning_rate = 2e-3
    config.training.tables.learning_rate = 0.12
    config.training.schedule.kind = "cosine"
    config.training.validate_every = 100
    config.training.metric = "ndcg@10"

    config.retrieval.display = ("title", "title_ar", "category", "price")
    return config
