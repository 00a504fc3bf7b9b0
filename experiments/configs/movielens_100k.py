"""MovieLens-100K, protocol P-TFRS: 80,000 ratings to train, 20,000 to test, titles as ids, each
test rating one query.

    # Optional: with a folder that holds the files of movielens-100k/, nothing is downloaded.
    export TWOTOWER_DATA=folder
    python -m experiments.train --config=experiments/configs/movielens_100k.py --workdir=runs/ml100k
    python -m experiments.export --workdir=runs/ml100k
    python -m experiments.evaluate --workdir=runs/ml100k --k=10,100 --baselines

Recall@100 (the share of test ratings whose title is among the first 100), mean of
--config.split.seed=S --config.training.seed=S for S = 1, 2, 3: .4090 with nothing masked, .6352
with training titles masked. Dropout, widths, rate and steps were chosen on a validation tenth
(--config.split.validation=0.1 --config.split.seed=7).
"""

from twotower.config import defaults


def get_config():
    config = defaults()
    config.data.source = "csv"
    config.data.interactions.path = "dataset:movielens-100k/u.data"
    config.data.interactions.delimiter = "\t"
    config.data.interactions.names = ("user_id", "item_id", "rating", "timestamp")
    config.data.user_table.path = "dataset:movielens-100k/u.user"
    config.data.user_table.delimiter = "|"
    config.data.user_table.names = ("user_id", "age", "gender", "occupation", "zip")
    config.data.item_table.path = "dataset:movielens-100k/u.item"
    config.data.item_table.delimiter = "|"
    config.data.item_table.encoding = "latin-1"
    config.data.item_table.names = (
        "item_id",
        "title",
        "released",
        "video",
        "imdb",
        "unknown",
        "Action",
        "Adventure",
        "Animation",
        "Children",
        "Comedy",
        "Crime",
        "Documentary",
        "Drama",
        "Fantasy",
        "Film-Noir",
        "Horror",
        "Musical",
        "Mystery",
        "Romance",
        "Sci-Fi",
        "Thriller",
        "War",
        "Western",
    )
    config.data.item_group = "title"

    config.split.kind = "random"
    config.split.validation = 0.0
    config.split.test = 0.2
    # The protocol draws at random, and 18 titles are two films: its figures are comparable with its
    # own kind alone.
    config.split.accept_leakage = ("random_split", "repeated_pairs", "identical_rows")

    # Every user is in training, and all but 35 of the titles: no id is dropped to train rows for
    # unknown ones.
    config.features.user = {
        "user_id": {"type": "string", "embedding_size": 128, "oov_rate": 0.0},
        "age": {"type": "int", "embedding_size": 8},
        "gender": {"type": "string", "embedding_size": 8},
        "occupation": {"type": "string", "embedding_size": 8},
    }
    config.features.item = {"item_id": {"type": "string", "embedding_size": 128, "oov_rate": 0.0}}
    config.model.user.layers = (64,)
    config.model.user.dropout = 0.6
    config.model.item.layers = (64,)
    config.model.item.dropout = 0.6
    config.model.normalize = False
    config.model.temperature = 1.0
    config.model.learn_temperature = False

    config.training.batch_size = 1024
    config.training.steps = 2800
    config.training.validate_every = 1400
    config.training.tables.learning_rate = 0.3
    config.training.schedule.kind = "cosine"

    config.retrieval.display = ("released",)
    config.evaluation.query = "interaction"
    config.evaluation.ks = (10, 100)
    return config
