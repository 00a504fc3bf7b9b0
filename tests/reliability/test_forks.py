"""A retriever in other processes: a forked one says at once what does not work, a spawned one loads
the bundle."""

import os
import pickle
import warnings

import numpy as np
import pytest

from twotower.core.errors import ChangesError, ForkError
from twotower.retrieval.retriever import Retriever


def outcomes_in_a_child(calls):
    """The types of the errors that calls end in, in a child that was forked from here."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of JAX, which says that this may hang
        child = os.fork()
    if not child:
        outcomes = []
        for call in calls:
            try:
                call()
                outcomes.append("works")
            except BaseException as error:
                outcomes.append(type(error).__name__)
        os.write(writer, " ".join(outcomes).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        found = file.read().split()
    os.waitpid(child, 0)
    return found


def test_a_forked_child_says_so_at_once_and_leaves_the_bundle_as_it_is(folder):
    retriever = Retriever.load(folder)
    item = retriever.bundle.items["item_id"][0].as_py()
    user = retriever.bundle.users["user_id"][0].as_py()
    vector = np.ones((1, retriever.bundle.towers.dim), np.float32)
    # Whoever holds the lock when the process is forked is not there to let go of it.
    with retriever._lock:
        found = outcomes_in_a_child(
            [
                lambda: retriever.recommend(user),
                lambda: retriever.recommend("nobody"),
                lambda: retriever.upsert([{"item_id": "x"}], vectors=vector),
                lambda: retriever.delete([item]),
                lambda: retriever.compact(),
                lambda: retriever.rebalance(),
                lambda: Retriever.load(folder),
                lambda: retriever.item(item),
                lambda: retriever.latest_items(user),
            ]
        )
    assert found == [ForkError.__name__] * 7 + ["works"] * 2
    assert retriever.delete([item]) == 1


def test_a_pickled_retriever_is_the_path_that_it_loads(folder):
    retriever = Retriever.load(folder)
    data = pickle.dumps(retriever)
    assert len(data) < 1_000
    # With the changes that are in the log when it is loaded.
    retriever.upsert([{"item_id": "later"}])
    assert pickle.loads(data).item("later")
    with pytest.raises(ChangesError, match="export it"):
        pickle.dumps(
            Retriever(retriever.bundle.__class__(**vars(retriever.bundle) | {"folder": None}))
        )
