"""Yelp2018, protocol P-CF: the fixed split of the NGCF and LightGCN papers, ids alone, D = 64.

    export TWOTOWER_DATA=folder   # holds yelp2018/train.txt and test.txt
    python -m experiments.train --config=experiments/configs/yelp2018.py --workdir=runs/yelp
    python -m experiments.export --workdir=runs/yelp
    python -m experiments.evaluate --workdir=runs/yelp --k=20

Recall@20 / NDCG@20 with training items masked, mean of --config.training.seed=0, 1, 2: .0777 /
.0653 (deviations .0002 / .0001). Published: matrix factorisation .0725 / .0599, LightGCN .0744 /
.0617, both with BSL. Training takes 8 minutes on one core.

The lists of the files are in the order of time, and the test rows are the last fifth of each
user's. So a user is a bag of the latest 30 places; the weight of an event, by the number of events
that followed it, is learned. Options were chosen on the latest tenth of each user's training rows
(--config.split.validation=0.1).
"""

from twotower.config import defaults


def get_config():
    config = defaults()
    config.data.source = "user_lists"
    config.data.interactions.path = "$TWOTOWER_DATA/yelp2018/train.txt"
    config.data.test.path = "$TWOTOWER_DATA/yelp2018/test.txt"

    config.split.kind = "fixed"
    config.split.validation = 0.0
    config.split.held = "latest"
    # The protocol has no times: any row may be later than any other.
    config.split.accept_leakage = ("random_split",)

    # No id is dropped: every item of the test is in training, but for a few.
    config.features.user = {"history": {"type": "history", "max_length": 30}}
    config.features.item = {"item_id": {"type": "string", "embedding_size": 64, "oov_rate": 0.0}}
    config.model.history.kind = "bag"
    config.model.history.recency = True
    config.model.history.dropout = 0.1
    config.model.temperature = 0.1
    config.model.learn_temperature = False
    config.model.dtype = "bfloat16"

    config.objective.negatives.uniform = 1024

    config.training.batch_size = 2048
    config.training.steps = 10_000
    config.training.validate_every = 2000
    config.training.schedule.kind = "cosine"
    config.training.steps_per_dispatch = 10
    config.training.log_every = 500
    config.training.optimizer.learning_rate = 0.003
    config.training.tables.kind = "lazy_adam"
    config.training.tables.learning_rate = 0.01
    config.training.metric = "recall@20"

    config.evaluation.ks = (20,)
    config.evaluation.validation_queries = 8000
    return config
