r"""Learned vectors of a large catalogue in minutes, to measure an index on.

The log is a generated shop of many items with few rows each.

    python -m experiments.train  --config=experiments/configs/large_catalogue.py \
        --workdir=runs/large
    python -m experiments.export --workdir=runs/large
    python -m experiments.evaluate --workdir=runs/large --queries=10000
    python -m experiments.benchmarks.index --workdir=runs/large --target_recall=.95

200,000 items and 64 dimensions; a million with --config.data.num_items=1_000_000
--config.data.num_interactions=4_000_000, wider with --config.model.user.layers="(128, 128)" and the
same of model.item. The bundle searches its vectors exactly: the benchmark builds the indexes
itself.
"""

from twotower.config import defaults


def get_config():
    config = defaults()
    config.data.source = "shop"
    config.data.num_interactions = 2_000_000
    config.data.num_items = 200_000

    config.split.kind = "time"
    config.split.validation = 0.0
    config.split.test = 0.05

    config.features.user = {
        "user_id": {"type": "string", "embedding_size": 64},
        "city": {"type": "string", "embedding_size": 8},
        "gender": {"type": "string", "embedding_size": 8},
    }
    config.features.item = {
        "item_id": {"type": "string", "embedding_size": 64},
        "category": {"type": "string", "embedding_size": 16},
        "brand": {"type": "string", "embedding_size": 16},
        "material": {"type": "string", "embedding_size": 16},
        "price": {"type": "float"},
    }
    config.model.user.layers = (128, 64)
    config.model.item.layers = (128, 64)

    config.training.batch_size = 4096
    config.training.steps = 400
    config.training.optimizer.learning_rate = 2e-3
    config.training.tables.learning_rate = 0.05

    config.retrieval.display = ("category",)
    config.retrieval.index = "exact"
    return config
