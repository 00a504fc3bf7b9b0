"""The small shop that the other recipes start from: item ids, titles and a user's past.

    python -m experiments.train --config=experiments/configs/recipes/shop.py --workdir=runs/recipe
    python -m experiments.export --workdir=runs/recipe
    python -m experiments.evaluate --workdir=runs/recipe --k=10 --baselines

A training takes seconds.
"""

from twotower.config import defaults

# The plain corrected softmax over in-batch negatives, to compare the other recipes with.
RECIPES = {"plain": {}}


def get_config(recipe="plain"):
    config = defaults()
    config.data.source = "shop"
    config.data.num_interactions = 30_000
    config.data.shop_seed = 1

    config.split.kind = "time"
    config.split.validation = 0.1
    config.split.test = 0.1

    config.features.user = {
        "city": {"type": "string", "embedding_size": 8},
        "history": {"type": "history", "max_length": 20},
    }
    config.features.item = {
        "item_id": {"type": "string", "embedding_size": 32, "oov_rate": 0.1},
        "title": {"type": "text", "embedding_size": 16, "buckets": 4096, "max_length": 24},
    }
    config.model.history.kind = "bag"
    config.model.user.layers = (32,)
    config.model.item.layers = (32,)

    config.training.seed = 1
    config.training.batch_size = 512
    config.training.steps = 300
    config.training.validate_every = 100
    config.training.log_every = 100
    config.training.tables.learning_rate = 0.05
    config.evaluation.ks = (10, 50)
    config.update_from_flattened_dict(RECIPES[recipe])
    return config
