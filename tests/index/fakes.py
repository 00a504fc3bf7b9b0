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


class ShallowIndex(UnconditionalIndex):
    """Looks at more items for longer lists, as approximate ones do."""

    def __init__(self, vectors: np.ndarray):
        super().__init__(vectors)
        self.vectors = vectors

    def search(self, queries, k):
        return ExactIndex(self.vectors[: 3 * k + 40]).search(queries, k)
