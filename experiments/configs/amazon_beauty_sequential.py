r"""Amazon Beauty, protocol P-SEQ: the next item that each customer reviews, from the last 50.

    export TWOTOWER_DATA=folder   # holds amazon-beauty/Beauty.txt
    python -m experiments.repeat --config=experiments/configs/amazon_beauty_sequential.py \
        --workdir=runs/beauty_seeds --baselines
    python -m experiments.train --config=experiments/configs/amazon_beauty_sequential.py \
        --workdir=runs/beauty   # or one seed
    python -m experiments.export --workdir=runs/beauty
    python -m experiments.evaluate --workdir=runs/beauty --k=10 --baselines

Any file of one user a line, "user item item ..." in order of time, has the same protocol:
--config.data.path=FILE. Per user the last item is the test, the one before it validation; at test
time the model sees validation too. All items of training are ranked less those that the user has
seen, and a test item that training never saw is a miss; recall@10 and NDCG@10 are means over all
users.

Tuned on validation alone. On test, training.seed 0, 1 and 2 (mean and deviation), beside the best
published dot products (SASRec, sampled softmax; eSASRec) and EASE of the same training rows:

                 model                                   published        EASE
    recall@10    .0955 +- .0002 (.0956 .0956 .0953)      .0921, .0928     .0695
    NDCG@10      .0578 +- .0003 (.0580 .0575 .0578)      .0531, .0523     .0392

One standard error of recall@10 is .002. A training takes nine to twelve minutes of one core. Its
2,500 steps are 54 passes; another log is given as many.
"""

from twotower.config import defaults


def get_config():
    config = defaults()
    config.data.source = "user_lists"
    config.data.path = "$TWOTOWER_DATA/amazon-beauty/Beauty.txt"

    config.split.kind = "leave_last_out"

    config.features.user = {"history": {"type": "history", "max_length": 50}}
    config.features.item = {
        "item_id": {"type": "string", "embedding_size": 64, "oov_rate": 0.0, "initial_norm": 0.2}
    }
    config.model.history.kind = "causal"
    config.model.history.block = "ligr"
    config.model.history.blocks = 2
    config.model.history.heads = 2
    config.model.history.expansion = 2
    config.model.history.dropout = 0.5
    config.model.normalize = False
    config.model.temperature = 1.0
    config.model.learn_temperature = False
    config.model.dtype = "bfloat16"

    config.objective.negatives.catalogue = True
    config.objective.negatives.in_batch = False

    config.training.examples = "sequences"
    config.training.batch_size = 64
    config.training.steps = 2500
    config.training.steps_for = 2964  # packed rows of this file
    config.training.validate_every = 250
    config.training.patience = 6
    config.training.metric = "ndcg@10"
    config.training.optimizer.learning_rate = 2e-3
    config.training.schedule.kind = "cosine"
    config.training.schedule.warmup_steps = 100
    config.training.tables.kind = "lazy_adam"
    config.training.tables.learning_rate = 2e-3

    config.evaluation.ks = (10,)
    return config
