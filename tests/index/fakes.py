"""Indexes for tests of what is built on one."""

import numpy as np

from twotower.index.exact import ExactIndex


class UnconditionalIndex:
    """An index that finds everything and knows no conditions, as approximate ones do not."""

    kind = "unconditional"
    normalized = False

    def __init__(self, vectors: np.ndarray):
        self.exact = ExactIndex(vectors)
        self.num_items, self.dim = vectors.shape

    def search(self, queries, k):
        return self.exact.search(queries, k)

    def save(self, folder):
        raise NotImplementedError
