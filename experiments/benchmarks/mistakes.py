"""Known mistakes of measuring, indexing and serving, as changes to the modules of twotower.

`experiments.benchmarks.mutations` makes them; those of training are in `mistakes_losses` and
`mistakes_training`.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mistake:
    """One way to fall into a trap.

    Attributes:
        trap: its number, by which tests are marked.
        what: is done wrong.
        edits: that make it: a module of twotower, a snippet that stands in it once, and what takes
            its place.
    """

    trap: int
    what: str
    edits: tuple[tuple[str, str, str], ...]


def make(trap: int, what: str, *parts: str) -> Mistake:
    """The mistake of one edit or more, each of three parts."""
    return Mistake(trap, what, tuple(zip(parts[::3], parts[1::3], parts[2::3], strict=True)))


EVALUATION = (
    make(
        20,
        "ranks among every third item",
        "evaluation.evaluate",
        "scores = scores.astype(jnp.float32).at[",
        "scores = jnp.where(jnp.arange(scores.shape[1]) % 3 == 0, -jnp.inf, scores).astype(jnp.float32).at[",
    ),
    make(
        20,
        "a sample under the name of the whole",
        "evaluation.report",
        'if protocol["asked"] < protocol["available"]:',
        "if False:",
    ),
    make(
        21,
        "ties are hits",
        "evaluation.evaluate",
        "own == 0, -tiny, jnp.where(own == tiny, 0.0, jnp.nextafter(own, -jnp.inf))",
        "own == 0, tiny, jnp.nextafter(own, jnp.inf)",
    ),
    make(
        21,
        "ties by the order of the items",
        "evaluation.evaluate",
        "grouped_top_k(_behind_equals(scores, right_query, right_item), ",
        "grouped_top_k(scores, ",
    ),
    make(22, "the audit warns of nothing", "data.audit", "    if refused:\n", "    if False:\n"),
    make(
        22,
        "what others did later is no finding",
        "data.audit",
        'config.kind != "leave_last_out" or not held',
        "True or not held",
    ),
    make(
        22,
        "fitted on all rows",
        "data.prepare",
        "fit(spec, parts.train, users=users, items=items)",
        "fit(spec, dataset.interactions, users=users, items=dataset.items)",
        "data.audit",
        "if fitted_on != expected:",
        "if False:",
    ),
    make(
        22,
        "statistics over items without training rows",
        "data.fitting",
        "Column(feature, seen[side][name], weights,",
        "Column(feature, tables[side][name], counts[side],",
    ),
    make(
        22,
        "an encoder of other rows is taken",
        "data.audit",
        "if fitted_on != expected:",
        "if False:",
    ),
    make(
        22,
        "the label is a feature",
        "data.fitting",
        '_ANSWERS = ("item_id", "label")',
        "_ANSWERS = ()",
    ),
    make(
        22,
        "history with what is asked for",
        "evaluation.queries",
        '"test": ("train", "validation")}',
        '"test": ("train", "validation", "test")}',
    ),
    make(
        22,
        "a history holds its own target",
        "data.histories",
        'np.searchsorted(keys[order], keys[rows], side="left")',
        'np.searchsorted(keys[order], keys[rows], side="right")',
    ),
    make(
        22,
        "training reads held-out rows",
        "data.histories",
        'KNOWN = {"train": (0,), "validation": (0,),',
        'KNOWN = {"train": (0, 1, 2), "validation": (0, 1, 2),',
    ),
    make(
        22,
        "attention to what comes after",
        "towers.history",
        "(place >= other)[None]",
        "(place >= 0 * other)[None]",
    ),
    make(
        25,
        "the vector of the last place instead of the last event",
        "towers.history",
        "jnp.take_along_axis(x, history.valid.sum(1)[:, None, None], axis=1)[:, 0]",
        "x[:, -1]",
    ),
    make(
        23,
        "nothing is ever masked",
        "evaluation.evaluate",
        "queries.seen_of(part) if mask_seen else none",
        "none",
    ),
    make(
        23,
        "seen items are always masked",
        "evaluation.evaluate",
        "queries.seen_of(part) if mask_seen else none",
        "queries.seen_of(part)",
    ),
    make(
        24,
        "seen items 1e5 lower",
        "evaluation.evaluate",
        '.at[seen_query, seen_item].set(-jnp.inf, mode="drop")',
        '.at[seen_query, seen_item].add(-1e5, mode="drop")',
    ),
    make(
        35,
        "the first in the file is the last in time",
        "data.interactions",
        "keys = (users,) if times is None else (times, users)",
        "keys = (users,) if times is None else (-np.arange(len(users)), times, users)",
    ),
    make(
        35,
        "an unstable sort of the history",
        "retrieval.history",
        'for part in parts]), kind="stable")',
        "for part in parts]))",
    ),
)

INDEX = (
    make(
        7,
        "the correction is left in at serving",
        "retrieval.retriever",
        "return snapshot, *snapshot.search(vectors, k, exclude=exclude, where=where, only=only, popularity_weight=weight)",
        "scores, rows = snapshot.search(vectors, k, exclude=exclude, where=where, only=only)\n"
        "        return snapshot, scores - np.log(np.maximum(live.bundle.counts[rows], 1.0)), rows",
    ),
    make(
        7,
        "the correction is left in at evaluation",
        "evaluation.evaluate",
        "    return dot_scores(query_vectors(prepared, model, weights, queries), items, mesh=mesh_of(weights))",
        "    dots = dot_scores(query_vectors(prepared, model, weights, queries), items)\n"
        "    return lambda chosen: dots(chosen) - np.log(np.maximum(queries.counts, 1.0))[None, :]",
    ),
    make(
        9,
        "the index normalises",
        "retrieval.exact",
        'vectors = check_vectors(vectors, what="item")',
        'vectors = check_vectors(vectors, what="item"); vectors = vectors / '
        "np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)",
    ),
    make(9, "ScaNN by distance", "retrieval.scann_library", '"dot_product"', '"squared_l2"'),
    make(
        9,
        "export compares nothing",
        "retrieval.export",
        "if not (differ <= TOLERANCE * scale + rounding).all():",
        "if False:",
    ),
    make(
        9,
        "the bundle says another normalisation",
        "retrieval.bundle",
        '"normalized": bundle.normalized',
        '"normalized": True',
    ),
    make(
        18,
        "no version of the weights",
        "retrieval.bundle",
        'if model_version(weights) != manifest["model_version"]:',
        "if False:",
    ),
    make(
        18,
        "an index of other weights",
        "retrieval.bundle",
        'if info["model_version"] != manifest["model_version"]:',
        "if False:",
    ),
    make(
        24,
        "excluded items 1e5 lower",
        "retrieval.exact",
        'scores.at[query, item].set(-jnp.inf, mode="drop")',
        'scores.at[query, item].add(-1e5, mode="drop")',
    ),
    make(
        24,
        "excluded items fill a short list",
        "retrieval.search",
        "rows = padded(np.where(kept, np.take_along_axis(rows, order, axis=1), -1), k, -1)",
        "rows = padded(np.take_along_axis(rows, order, axis=1), k, -1)",
    ),
    make(
        32,
        "few leaves, untuned",
        "retrieval.tuned",
        "return min(self.num_leaves, math.ceil(leaves - 1e-9)),",
        "return 2,",
    ),
    make(32, "all leaves, untuned", "retrieval.tuning", "        yield high", "        yield most"),
    make(
        33,
        "zero queries are answered",
        "retrieval.exact",
        "if normalized and zero.any():",
        "if False:",
    ),
    make(33, "NaN queries are answered", "retrieval.exact", "    if bad.any():", "    if False:"),
    make(34, "top_k of the whole row", "retrieval.exact", "    if size == 1:", "    if True:"),
    make(
        34,
        "the last of equal groups",
        "retrieval.exact",
        "groups = jnp.sort(groups, axis=1)",
        "groups = jnp.sort(groups, axis=1)[:, ::-1]",
    ),
    make(
        34,
        "evaluation sorts the whole row",
        "evaluation.evaluate",
        "best, rows = grouped_top_k(",
        "best, rows = jax.lax.top_k(",
    ),
    make(
        34,
        "one block of all items",
        "retrieval.exact",
        "item_block: int = ITEM_BLOCK, mesh",
        "item_block: int = 2**30, mesh",
    ),
    make(
        34,
        "the later block wins ties",
        "retrieval.exact",
        "jnp.concatenate([scores, new_scores], axis=1), jnp.concatenate([rows, new_rows], axis=1)",
        "jnp.concatenate([new_scores, scores], axis=1), jnp.concatenate([new_rows, rows], axis=1)",
    ),
)
