r"""Smaller vectors, another index, and re-ranked lists: all that a bundle may do otherwise.

    python -m experiments.train --config=experiments/configs/recipes/vectors.py:cut_int8 \
        --workdir=runs/small
    python -m experiments.export --workdir=runs/small
    python -m experiments.evaluate --workdir=runs/small --k=10

`export` measures the loss by cutting and rounding against whole float32 vectors, and prints it.
"""

from twotower.experiment import read

RECIPES = {
    # Trained at 16 and 32 numbers at once (Matryoshka), so that the first 16 serve alone.
    "cut_int8": {
        "objective.matryoshka": (16,),
        "retrieval.dim": 16,
        "retrieval.vectors": "int8",
    },
    # Of a large catalogue ScaNN's trees and FAISS's inverted files (extra faiss) are timed on its
    # own vectors; of a small one all items are compared.
    "index_for_long_lists": {
        "retrieval.k": 50,
        "retrieval.target_recall": 0.9,
        "retrieval.index": "fastest",
        "retrieval.optimize_for": "batches",
    },
    # A graph with half of the links, built with less care: smaller and sooner there; a search of it
    # looks at more items for the same recall. Needs the extra faiss.
    "graph": {
        "retrieval.index": "faiss",
        "retrieval.hnsw_m": 16,
        "retrieval.hnsw_ef_construction": 100,
    },
    # One coordinate more, the log count of an item: a query may ask for more popular lists.
    "popularity_knob": {"retrieval.popularity": True},
    # Of 4 K candidates the K that are least alike, or at most two of a category.
    "diverse_lists": {
        "retrieval.rerank.kind": "mmr",
        "retrieval.rerank.multiple": 4,
        "retrieval.rerank.options": {"diversity": 0.4},
    },
    "two_of_a_category": {
        "retrieval.rerank.kind": "caps",
        "retrieval.rerank.options": {"column": "category", "max_items": 2},
    },
}


def get_config(recipe="cut_int8"):
    return read("recipes/shop", RECIPES[recipe])
