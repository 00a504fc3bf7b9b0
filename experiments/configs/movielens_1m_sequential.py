r"""MovieLens-1M, protocol P-SEQ: the next film of each user, from the last 200.

The data is the 5-core file of the SASRec paper.

    # Optional: with a folder that holds movielens-1m/ml-1m.txt, nothing is downloaded.
    export TWOTOWER_DATA=folder
    python -m experiments.repeat --config=experiments/configs/movielens_1m_sequential.py \
        --workdir=runs/ml1m_seeds --baselines
    python -m experiments.train --config=experiments/configs/movielens_1m_sequential.py \
        --workdir=runs/ml1m   # or one seed
    python -m experiments.export --workdir=runs/ml1m
    python -m experiments.evaluate --workdir=runs/ml1m --k=10 --baselines

Any file of one pair "user item" a line, a user's items in order of time, has the same protocol:
--config.data.path=FILE. Per user the last item is the test, the one before it validation; at test
time the model sees validation too. All items of training are ranked less those that the user has
seen; HR@10 (hit_rate) and NDCG@10 are means over all users.

Tuned on validation alone. On test, training.seed 0, 1 and 2 (mean and deviation), beside the best
published dot products (SASRec, full cross-entropy; SASRec, 3,000 negatives) and EASE of the same
training rows:

                 model                                   published        EASE
    HR@10        .3261 +- .0039 (.3217 .3293 .3273)      .3152, .3159     .1086
    NDCG@10      .1905 +- .0023 (.1881 .1907 .1927)      .1821, .1857     .0536

One standard error of HR@10 is .005. A training takes 28 to 45 minutes of one core. Its 4,000 steps
are 39 passes; another log is given as many.
"""

from twotower.config import defaults


def get_config():
    config = defaults()
    config.data.source = "pairs"
    config.data.path = "dataset:movielens-1m/ml-1m.txt"

    config.split.kind = "leave_last_out"

    # No id is dropped: all but a few items of validation and test are in training.
    config.features.user = {"history": {"type": "history", "max_length": 200}}
    config.features.item = {
        "item_id": {"type": "string", "embedding_size": 128, "oov_rate": 0.0, "initial_norm": 0.2}
    }
    config.model.history.kind = "causal"
    config.model.history.block = "ligr"
    config.model.history.blocks = 2
    config.model.history.heads = 2
    config.model.history.expansion = 2
    config.model.history.dropout = 0.2
    config.model.normalize = False
    config.model.temperature = 1.0
    config.model.learn_temperature = False
    config.model.dtype = "bfloat16"

    # Full softmax: a catalogue of thousands costs less than sampling from it loses.
    config.objective.negatives.catalogue = True
    config.objective.negatives.in_batch = False

    config.training.examples = "sequences"
    config.training.crop = "random"
    config.training.batch_size = 32
    config.training.steps = 4000
    config.training.steps_for = 3265  # packed rows of this file
    config.training.validate_every = 500
    config.training.patience = 6
    config.training.metric = "ndcg@10"
    config.training.optimizer.learning_rate = 2e-3
    config.training.schedule.kind = "cosine"
    config.training.schedule.warmup_steps = 200
    config.training.tables.kind = "lazy_adam"
    config.training.tables.learning_rate = 2e-3

    config.evaluation.ks = (10,)
    return config
