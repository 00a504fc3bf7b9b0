"""Your own log: one CSV (or Parquet, with --config.data.source=parquet) of users, items and times.

    python -m experiments.train --config=experiments/configs/my_log.py --workdir=runs/mine
    python -m experiments.export --workdir=runs/mine
    python -m experiments.evaluate --workdir=runs/mine --baselines
    python -m experiments.query --workdir=runs/mine --user=42

`twotower inspect FILE` writes such a file for a log of any form, also one without times or header.
This one reads events.csv; for another file, --config.data.interactions.path=FILE, and for columns
of other names, --config.data.interactions.columns.user_id=CustomerID. A table of items, for the
printed lists and for features: --config.data.item_table.path=items.csv. Copy this file to change
more. For a log without times, whose rows are in order, name it my_log.py:no_times.

Where many items or users of tomorrow are new, as news are and people who come once or twice, set
features.item.item_id.oov_rate and model.history.empty_rate to 0.3. Where most users are new, as
where people come once and rate many films, set model.history.empty_rate to 0.3,
features.user.user_id.oov_rate to 0.6, features.item.item_id.oov_rate to 0.1, the layers to (64,),
model.item.dropout to 0.2, model.history.recency to True, leave model.normalize, the temperature and
negatives.uniform at their defaults, and set the learning rates to 2e-3 and (of tables) 0.05 and
training.steps to 800. `tt.fit` looks at the log and chooses by itself.
"""

from twotower.config import defaults


def get_config(form="with_times"):
    config = defaults()
    config.data.source = "csv"
    config.data.interactions.path = "events.csv"
    config.data.interactions.columns = {
        "user_id": "user_id",
        "item_id": "item_id",
        "timestamp": "timestamp",
    }
    config.data.item_table.columns = {"item_id": "item_id"}

    config.split.kind = "time"
    config.split.validation = 0.05
    config.split.test = 0.1

    # A user is an id, the time of the query (the last of 8 periods stands for tomorrow) and the
    # items that they had. A high oov_rate trains the rows that new users get.
    # Columns of the users and of the items go here, each as a feature; what an item keeps for
    # life, such as its category, also into "reads", by which the history knows more than ids.
    config.features.user = {
        "user_id": {"type": "string", "embedding_size": 64, "oov_rate": 0.3},
        "period": {"type": "int", "column": "timestamp", "buckets": 8, "embedding_size": 64},
        "history": {"type": "history", "max_length": 100, "reads": ("item_id",)},
    }
    config.features.item = {
        "item_id": {"type": "string", "embedding_size": 64, "oov_rate": 0.01},
        # "title": {"type": "text", "characters": (), "max_length": 12, "embedding_size": 32},
        # "category": {"type": "string", "embedding_size": 16},
        # "published": {"type": "timestamp", "parts": ("period",), "embedding_size": 16},
    }
    config.model.user.layers = (128,)
    config.model.user.dropout = 0.4
    config.model.item.layers = (128,)
    config.model.item.dropout = 0.4
    config.model.history.kind = "bag"
    # Half the time of the loss where the machine has it; lists were as good.
    config.model.dtype = "auto"
    config.model.normalize = False
    config.model.temperature = 1.0
    config.model.learn_temperature = False
    # New users have no history, and nearly all training rows one.
    config.model.history.empty_rate = 0.1
    # Negatives from the whole corpus would teach that what is published tomorrow is never chosen.
    config.objective.negatives.uniform = 0

    config.training.batch_size = 1024
    # For 100,000 rows; with more or fewer of them there are more or fewer steps.
    config.training.steps = 500
    config.training.steps_for = 100_000
    config.training.validate_every = 100
    config.training.schedule.kind = "cosine"
    config.training.patience = 3
    config.training.metric = "ndcg@10"
    if form == "no_times":
        config.data.interactions.columns = {"user_id": "user_id", "item_id": "item_id"}
        config.data.duplicates = "first"
        config.split.kind = "leave_last_out"
        del config.features.user["period"]
    return config
