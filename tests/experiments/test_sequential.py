"""The sequential configurations take any file of their format, and learn what comes next in it."""

import importlib

import numpy as np
import pytest

from twotower.config import from_dict
from twotower.evaluation import measure
from twotower.evaluation.baselines.popularity import order_scores, popularity_order
from twotower.evaluation.evaluate import evaluate, make_validate
from twotower.evaluation.queries import make_queries
from twotower.pipeline.prepare import prepare
from twotower.retrieval.export import export
from twotower.retrieval.retriever import Retriever
from twotower.training.run import load_run, train

pytestmark = pytest.mark.slow

ITEMS = 40


def sequences(users=120, seed=0):
    """Walks through 40 items, each of which is followed by the next one but for a tenth of the
    steps; of 3 to 15 steps."""
    rng = np.random.default_rng(seed)
    walks = []
    for _ in range(users):
        steps = np.where(rng.random(rng.integers(3, 16)) < 0.9, 1, rng.integers(2, ITEMS))
        walks.append((rng.integers(ITEMS) + np.cumsum(steps)) % ITEMS + 1)
    return walks


def small(name, path):
    config = importlib.import_module(f"experiments.configs.{name}").get_config()
    config.data.path = str(path)
    config.split.accept_leakage = ("repeated_pairs",)
    config.features.item["item_id"]["embedding_size"] = 16
    config.features.user["history"]["max_length"] = 12
    config.model.history.dropout = 0.0
    config.training.batch_size = 16
    config.training.tables.learning_rate = 0.01
    config.training.optimizer.learning_rate = 0.003
    config.training.steps = config.training.validate_every = 120
    config.training.schedule.warmup_steps = 0
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("walks")
    (folder / "pairs.txt").write_text(
        "".join(f"{u} {i}\n" for u, walk in enumerate(sequences(), 1) for i in walk)
    )
    train(
        from_dict(small("movielens_1m_sequential", folder / "pairs.txt")),
        folder / "run",
        make_validate=make_validate,
    )
    return load_run(folder / "run")


def test_from_a_file_of_pairs_to_the_next_item(run):
    model = measure.measure_run(run, ks=(10,), baselines=False)["model_unmasked"]
    queries = make_queries(run.prepared, "test", run.config.evaluation.query)
    order = popularity_order(run.prepared.positives("train"), queries.num_items)
    popular = evaluate(order_scores(order), queries, (10,), mask_seen=False)
    assert model["queries"] == sum(len(walk) >= 3 for walk in sequences())
    assert model["mrr@10"] > 0.6 and popular["mrr@10"] < 0.2
    export(run, run.workdir / "bundle")
    retriever = Retriever.load(run.workdir / "bundle")
    answers = [
        retriever.recommend(rows=[{"history": [str(i - 1), str(i)]}], k=1)[0].item_id
        for i in range(2, 40)
    ]
    assert np.mean([answer == str(i + 1) for i, answer in enumerate(answers, 2)]) > 0.8


def test_a_test_item_that_training_never_saw_is_a_miss(tmp_path):
    walks = [*sequences(users=20), np.array([1, 2, 3, 999])]
    (tmp_path / "lists.txt").write_text(
        "".join(f"{u} {' '.join(map(str, walk))}\n" for u, walk in enumerate(walks, 1))
    )
    prepared = prepare(from_dict(small("amazon_beauty_sequential", tmp_path / "lists.txt")))
    assert (
        "999" not in prepared.items["item_id"].to_pylist() and (prepared.test.item == -1).sum() >= 1
    )
    assert len(prepared.test) == 21 and prepared.packing.num_slots == 13
