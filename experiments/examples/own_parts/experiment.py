r"""A log in SQLite, trained with parts of one's own: see parts.py beside this file.

    python experiments/examples/own_parts/write_log.py shop.db
    twotower train --config=experiments/examples/own_parts/experiment.py --workdir=runs/own_parts
    twotower export --workdir=runs/own_parts
    twotower evaluate --workdir=runs/own_parts --k=10
    twotower query --workdir=runs/own_parts --user=u7

Every command imports parts.py: the run remembers where it is, and says so if it has changed.
"""

from twotower.config import defaults


def get_config():
    config = defaults()
    # A path beside this file; a module on the Python path would be "mine.parts".
    config.plugins = ("parts.py",)

    config.data.source = "sqlite"
    config.data.path = "shop.db"
    config.data.options = {
        "interactions": "SELECT user AS user_id, product AS item_id, time AS timestamp FROM events",
        "items": "SELECT id AS item_id, title, category, price FROM products",
    }

    config.features.item = {
        "item_id": {"type": "string"},
        "category": {"type": "string", "embedding_size": 8},
        "words": {"type": "num_words", "column": "title", "longest": 5},
    }

    config.objective.loss = "poly"
    config.objective.options = {"epsilon": 0.5}

    config.model.user.layers = (32,)
    config.model.item.layers = (32,)
    config.model.item.kind = "cross"
    config.model.item.options = {"depth": 1}

    config.training.batch_size = 256
    config.training.steps = 200
    config.training.validate_every = 100

    config.retrieval.rerank.kind = "boost"
    config.retrieval.rerank.options = {"column": "category", "value": "lamps", "weight": 0.2}
    return config
