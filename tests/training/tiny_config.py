"""The configuration of runs that are killed: little to compile, with all that a resumed run must
restore or draw again: dropout, a history, slots of both optimizers and a plateau schedule."""

from tests.training.shop import TINY_FEATURES
from twotower.config import defaults


def get_config():
    config = defaults()
    config.data.source = "shop"
    config.data.num_interactions = 1000
    history = {"type": "history", "max_length": 4}
    config.features.user = TINY_FEATURES["user"] | {"history": history}
    config.features.item = TINY_FEATURES["item"]
    config.model.user.layers = (8,)
    config.model.user.dropout = 0.4
    config.model.item.layers = (8,)
    config.model.history.kind = "bag"
    config.model.history.dropout = 0.2
    config.training.batch_size = 64
    config.training.tables.kind = "lazy_adam"
    config.training.schedule.kind = "plateau"
    return config
