"""The generated shop with Arabic titles: a buyer is the weighted events of the past, and new items are found by their text.

    python -m experiments.train --config=experiments/configs/arabic_shop.py --workdir=runs/arabic
    python -m experiments.export --workdir=runs/arabic
    python -m experiments.evaluate --workdir=runs/arabic --k=10,50 --baselines

A view weighs 1, an item in the cart 5, a purchase 10, and half of that after 30 days. An eighth of the item ids is dropped in
training, so that title, category, brand and price learn to stand alone; what `evaluate` prints of right answers that training
never saw is found by them. One cut in time. Not yet measured.
"""

from twotower.config import defaults


def get_config():
    config = defaults()
    config.data.source = "shop"
    config.data.num_interactions = 100_000

    config.split.kind = "time"
    config.split.validation = 0.05
    config.split.test = 0.1

    config.features.user = {
        "city": {"type": "string", "embedding_size": 8},
        "gender": {"type": "string", "embedding_size": 8},
        "history": {
            "type": "history", "max_length": 50, "reads": ("item_id", "title_ar", "category", "brand"), "half_life": 30.0,
            "weights": {"view": 1.0, "add_to_cart": 5.0, "purchase": 10.0},
        },
    }  # fmt: skip
    config.features.item = {
        "item_id": {"type": "string", "embedding_size": 64, "oov_rate": 0.125},
        "title_ar": {"type": "text", "embedding_size": 32, "max_length": 48},
        "category": {"type": "string", "embedding_size": 16},
        "brand": {"type": "string", "embedding_size": 16},
        "price": {"type": "float", "log": True},
    }
    config.model.history.kind = "bag"
    config.model.history.dropout = 0.2
    config.model.user.layers = (64,)
    config.model.user.dropout = 0.2
    config.model.item.layers = (64,)
    config.model.item.dropout = 0.2

    config.training.batch_size = 512
    config.training.steps = 1200
    config.training.optimizer.learning_rate = 2e-3
    config.training.tables.learning_rate = 0.05
    config.training.schedule.kind = "cosine"
    config.training.validate_every = 200

    config.retrieval.display = ("title_ar", "title", "category", "price")
    config.evaluation.ks = (10, 50)
    return config
