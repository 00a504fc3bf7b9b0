"""Known mistakes of two-tower training, each made by a function in the place of the right one.

A mistake takes what it replaces, `right`, and returns what is wrong. The number is that of the
trap, by which the tests that must see it are marked. `experiments.benchmarks.mutations` makes them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twotower.core.arrays import Ragged
from twotower.kernels.top_k import with_maxima


@dataclasses.dataclass(frozen=True)
class Mistake:
    """One way to fall into a trap.

    Attributes:
        trap: Number of the trap.
        what: What is done wrong, in words.
        target: What is replaced, "module:name" or "module:Class.attribute".
        make: Function from the right thing to the wrong one.
    """

    trap: int
    what: str
    target: str
    make: Callable[[Any], Any]

    def find_target(self) -> tuple[Any, str, Any]:
        """Returns the module or class that holds the target, its name there, and the target.

        Raises:
            AttributeError: There is no such thing.
        """
        module, _, path = self.target.partition(":")
        *classes, name = path.split(".")
        owner = functools.reduce(getattr, classes, importlib.import_module(module))
        return owner, name, inspect.getattr_static(owner, name)

    def put_in_place(self) -> None:
        """Puts what is wrong in the place of the target, also where it was imported by its name."""
        owner, name, right = self.find_target()
        wrong = self.make(right)
        setattr(owner, name, wrong)
        if inspect.isclass(owner):
            return
        names = [name for name in sys.modules if name.startswith(("twotower", "tests"))]
        for module in map(sys.modules.__getitem__, names):
            for alias in [alias for alias, value in vars(module).items() if value is right]:
                setattr(module, alias, wrong)


MISTAKES: list[Mistake] = []


def mistake(trap: int, target: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Adds the decorated function to `MISTAKES`; its name says what is done wrong."""

    def add(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
        MISTAKES.append(Mistake(trap, make.__name__.replace("_", " "), target, make))
        return make

    return add


@mistake(1, "twotower.kernels.streaming_softmax:_log_count")
def log_q_is_added(right):
    return lambda values, used, dtype: -right(values, used, dtype)


@mistake(1, "twotower.training.candidates:log_expected_count")
def q_of_an_item_is_its_rarity(right):
    return lambda *args: -right(*args)


@mistake(2, "twotower.kernels.softmax_blocks:_levels")
def scores_are_corrected_before_the_temperature(right):
    return lambda arrays, *rest, **options: arrays.scale * right(arrays, *rest, **options)


@mistake(3, "twotower.objectives.frequency:FREQUENCIES")
def shares_of_rows_are_floored_at_1e_6(right):
    def floored(estimate: Any) -> Any:
        def log_expected_count(arrays, ids, draws):
            return jnp.maximum(estimate(arrays, ids, draws), jnp.log(1e-6 * draws))

        return log_expected_count

    return {
        name: estimator._replace(log_expected_count=floored(estimator.log_expected_count))
        for name, estimator in right.items()
    }


@mistake(3, "twotower.objectives.negatives:uniform_log_expected_count")
def uniform_draws_are_floored_at_1e_6(right):
    return lambda ids, num, items: jnp.maximum(right(ids, num, items), np.log(1e-6))


@mistake(4, "twotower.objectives.frequency:FREQUENCIES")
def an_item_never_counted_has_log_0(right):
    def log_expected_count(arrays, ids, draws):
        return jnp.log(arrays["counts"][ids] * draws / arrays["rows"])

    return right | {"exact": right["exact"]._replace(log_expected_count=log_expected_count)}


@mistake(4, "twotower.objectives.negatives:mixed_log_expected_count")
def an_item_that_no_source_yields_has_log_0(right):
    return lambda ids, sources: jnp.log(sum(jnp.exp(source(ids)) for source in sources))


@mistake(5, "twotower.objectives.negatives:mixed_log_expected_count")
def the_greatest_count_of_all_sources_is_taken(right):
    return lambda ids, sources: jnp.stack([source(ids) for source in sources]).max(0)


@mistake(5, "twotower.training.candidates:log_expected_count")
def hard_negatives_have_the_count_of_their_pool_alone(right):
    def log_expected_count(sampling, frequency, popularity, queued, ids, own=None):
        return right(sampling, frequency, popularity, queued, ids) if own is None else own

    return log_expected_count


@mistake(6, "twotower.objectives.losses:bind_constants")
def the_positive_that_is_always_there_is_corrected(right):
    def bind_constants(loss, objective, num_items):
        bound = right(loss, objective, num_items)
        if loss.corrects and not loss.bilateral:
            return bound._replace(corrects_positive=True)
        return bound

    return bind_constants


@mistake(7, "twotower.retrieval.retriever:Retriever._search")
def the_correction_is_left_in_at_serving(right):
    def search(retriever, *args):
        snapshot, scores, positions = right(retriever, *args)
        counts = np.maximum(retriever.bundle.counts[positions], 1.0)
        return snapshot, scores - np.log(counts), positions

    return search


@mistake(7, "twotower.evaluation.evaluate:model_scores")
def the_correction_is_left_in_at_evaluation(right):
    def model_scores(prepared, model, weights, queries):
        dots = right(prepared, model, weights, queries)
        log_counts = np.log(np.maximum(queries.counts, 1.0))
        return lambda chosen: dots(chosen) - log_counts[None, :]

    return model_scores


@mistake(7, "twotower.training.candidates:log_expected_count")
def the_correction_is_forgotten_in_the_step(right):
    def log_expected_count(sampling, frequency, popularity, queued, ids, own=None):
        return jnp.zeros(ids.shape)

    return log_expected_count


@mistake(8, "twotower.config:ModelConfig.__init__")
def cosines_begin_at_temperature_1(right):
    return lambda self, *args, **fields: right(self, *args, **{"temperature": 1.0} | fields)


@mistake(8, "twotower.training.step:bounded_temperature")
def the_temperature_drifts_without_bounds(right):
    return lambda model, old, new: new["log_temperature"]


@mistake(9, "twotower.index.base:check_vectors")
def the_index_normalises(right):
    def check_vectors(vectors, *, what):
        checked = right(vectors, what=what)
        return checked / np.maximum(np.linalg.norm(checked, axis=1, keepdims=True), 1e-9)

    return check_vectors


@mistake(9, "twotower.retrieval.export:compare_scores")
def export_compares_nothing(right):
    return lambda served, trained, rounding=0.0: None


@mistake(10, "twotower.kernels.softmax_blocks:_positives_among")
def hits_of_the_answer_stay(right):
    return lambda ids, block: ids.candidate_queries[None, :] == block.query_ids[:, None]


@mistake(11, "twotower.kernels.softmax_blocks:_positives_among")
def other_answers_of_the_user_stay(right):
    return lambda ids, block: ids.candidates[None, :] == block.ids[:, None]


@mistake(11, "twotower.training.candidates:gather_candidates")
def users_are_forgotten_in_the_step(right):
    def gather_candidates(*args):
        vectors, ids, users = right(*args)
        return vectors, ids, jnp.full_like(users, -1)

    return gather_candidates


@mistake(12, "twotower.kernels.softmax_blocks:_negative_logits")
def masked_by_adding_finfo_min(right):
    def negative_logits(arrays, ids, block, scores):
        return jnp.maximum(right(arrays, ids, block, scores), jnp.finfo(scores.dtype).min)

    return negative_logits


@mistake(12, "twotower.kernels.softmax_blocks:block_scores")
def logits_are_in_half_precision(right):
    def block_scores(operands, arrays, block):
        return (block.queries @ operands.columns).astype(arrays.positive.dtype)

    return block_scores


@mistake(13, "twotower.objectives.alias:AliasTable.draw")
def duplicates_are_dropped_and_counted(right):
    return lambda table, key, num: jnp.unique(right(table, key, num), size=num, fill_value=0)


@mistake(13, "twotower.objectives.alias:AliasTable.log_expected_count")
def a_probability_stands_for_a_count(right):
    def log_expected_count(table, ids, num):
        return jnp.log1p(-((1 - jnp.exp(right(table, ids, 1))) ** num))

    return log_expected_count


@mistake(14, "twotower.core.mesh:DeviceGroup.pvary")
def gradients_are_summed_twice(right):
    return lambda group, tree: tree


@mistake(14, "twotower.core.mesh:DeviceGroup.gather")
def gathered_items_have_no_gradient(right):
    return lambda group, x: right(group, jax.lax.stop_gradient(x) if group.axis else x)


@mistake(15, "twotower.training.candidates:SampledItems.ids")
def hard_negatives_are_interleaved(right):
    return property(lambda items: jnp.concatenate([items.shared, items.hard.T.ravel()]))


@mistake(15, "twotower.training.candidates:gather_candidates")
def vectors_stand_in_another_order_than_ids(right):
    def gather_candidates(*args):
        vectors, ids, users = right(*args)
        return vectors[::-1], ids, users

    return gather_candidates


@mistake(16, "twotower.pipeline.batches:Batches.indices")
def the_last_batch_of_a_pass_is_short(right):
    def indices(batches, step):
        steps = -(-len(batches._examples) // batches._batch_size)
        start = step % steps * batches._batch_size
        return batches._shuffle(step // steps)[start : start + batches._batch_size]

    return indices


@mistake(16, "twotower.training.step:weight_sums")
def losses_are_divided_by_all_rows(right):
    def weight_sums(objective, batch):
        rows = len(batch["user"])
        return jax.tree.map(lambda x: 0 * x + rows, right(objective, batch))

    return weight_sums


@mistake(17, "twotower.training.checks:_check_parts")
def accumulation_is_accepted_for_every_loss(right):
    return lambda config: None


@mistake(18, "twotower.retrieval.tower_programs:model_version")
def weights_have_no_version(right):
    return lambda weights: "1"


@mistake(19, "twotower.training.candidates:NegativeSampling.build")
def items_never_clicked_are_no_negatives(right):
    def build(cls, config, loss, corpus, **options):
        return right.__func__(cls, config, loss, corpus._replace(unseen=0), **options)

    return classmethod(build)


@mistake(19, "twotower.evaluation.lists:_item_values")
def what_was_never_trained_is_not_told(right):
    return lambda queries: right(queries) | {"never_trained": np.zeros(queries.num_items)}


@mistake(20, "twotower.evaluation.evaluate:_HostRanker.read")
def a_sample_of_the_items_competes(right):
    def read(ranker, scores, relevant):
        is_sampled = np.arange(scores.shape[1]) % 3 > 0
        right(ranker, np.where(is_sampled, scores, -np.inf), relevant)

    return read


@mistake(20, "twotower.evaluation.report.text:format_report")
def a_sample_goes_by_the_name_of_the_whole(right):
    def format_report(measured, ks):
        protocol = measured["protocol"]
        whole = protocol | {"asked": protocol["available"]}
        return right(measured | {"protocol": whole}, ks)

    return format_report


@mistake(21, "twotower.evaluation.evaluate:_HostRanker.read")
def ties_are_hits(right):
    def read(ranker, scores, relevant):
        scores = np.array(scores, np.float32)
        position = (relevant.rows, relevant.values)
        scores[position] = np.nextafter(scores[position], np.float32(np.inf))
        right(ranker, scores, Ragged.empty(len(relevant)))

    return read


@mistake(21, "twotower.evaluation.evaluate:_HostRanker.read")
def ties_go_by_the_order_of_the_items(right):
    return lambda ranker, scores, relevant: right(ranker, scores, Ragged.empty(len(relevant)))


@mistake(22, "twotower.data.audit:audit")
def a_split_that_leaks_is_taken(right):
    return lambda split, config: []


@mistake(22, "twotower.evaluation.queries:EARLIER_PARTS")
def seen_items_hold_what_is_asked_for(right):
    return right | {"test": ("train", "validation", "test")}


@mistake(22, "twotower.pipeline.histories:KNOWN_PARTS")
def histories_of_training_hold_held_out_rows(right):
    return right | {"train": (0, 1, 2)}


@mistake(23, "twotower.evaluation.evaluate:_evaluate_modes")
def seen_items_are_always_masked(right):
    def evaluate_modes(score_block, queries, ks, modes, *rest):
        return right(score_block, queries, ks, [True] * len(modes), *rest)

    return evaluate_modes


@mistake(24, "twotower.evaluation.evaluate:_HostRanker.rank")
def seen_items_are_1e5_lower(right):
    def rank(ranker, seen):
        ranker._scores[seen.rows, seen.values] -= 1e5
        _, ranker._maxima = with_maxima(ranker._scores, ranker._k)
        return right(ranker, Ragged.empty(len(seen)))

    return rank


@mistake(24, "twotower.index.exact_programs:_scores")
def excluded_items_are_1e5_lower(right):
    def scores(queries, items, query, item):
        dots = right(queries, items, query[:0], item[:0])
        return dots.at[query, item].add(-1e5, mode="drop")

    return scores


@mistake(25, "twotower.towers.embeddings:pool")
def padding_is_averaged(right):
    return lambda rows, ids: rows.mean(-2)


@mistake(25, "twotower.features.vocabulary:Vocabulary._oov_rows_of")
def nothing_is_a_value(right):
    return lambda vocabulary, values: right(vocabulary, values.fill_null(""))


@mistake(26, "twotower.towers.embeddings:lookup")
def ids_out_of_range_are_clamped(right):
    return lambda table, ids: table.at[ids].get(mode="clip")


@mistake(26, "twotower.features.vocabulary:Vocabulary._oov_rows_of")
def unknown_values_lie_past_the_end(right):
    return lambda vocabulary, values: vocabulary.size + right(vocabulary, values)


@mistake(27, "twotower.features.vocabulary:Vocabulary._oov_rows_of")
def unknown_values_share_a_row(right):
    return lambda vocabulary, values: np.minimum(right(vocabulary, values), 1)


@mistake(27, "twotower.training.step:oov_dropout")
def rows_of_unknown_values_are_not_trained(right):
    return lambda inputs, features, keys: dict(features)


@mistake(28, "twotower.kernels.sparse_update:apply_gradients")
def tables_decay(right):
    def apply_gradients(optimizer, table, *args, **options):
        return right(optimizer, 0.999 * table, *args, **options)

    return apply_gradients


@mistake(28, "twotower.training.optimizers:_kernels")
def all_that_is_dense_decays(right):
    return lambda params: jax.tree.map(lambda _: True, params)


@mistake(29, "twotower.training.checkpoint:Checkpoints.restore")
def optimizers_begin_cold(right):
    def restore(checkpoints, step, abstract):
        state, record = right(checkpoints, step, abstract)
        slots = jax.tree.map(jnp.zeros_like, state.table_slots)
        return state.replace(table_slots=slots), record

    return restore


@mistake(30, "twotower.training.checkpoint:Checkpoints.restore")
def estimates_begin_anew(right):
    def restore(checkpoints, step, abstract):
        state, record = right(checkpoints, step, abstract)
        frequency = jax.tree.map(jnp.zeros_like, state.frequency)
        return state.replace(frequency=frequency), record

    return restore


@mistake(30, "twotower.objectives.frequency:_multipliers")
def the_hash_is_salted(right):
    salt = np.uint32(hash("twotower") & 0xFFFFFFFE)  # multipliers stay odd
    return lambda depth: right(depth) ^ salt


@mistake(31, "twotower.objectives.alias:popularity_table")
def ids_are_taken_to_be_sorted_by_frequency(right):
    return lambda counts, alpha: right(np.sort(counts)[::-1], alpha)


@mistake(32, "twotower.index.tuning:Tuning.effort")
def one_leaf_is_searched(right):
    return lambda tuning, k: (1, right(tuning, k)[1])


@mistake(33, "twotower.index.base:check_queries")
def every_query_is_answered(right):
    return lambda queries, dim, *, normalized=False: np.asarray(queries, np.float32)


@mistake(34, "twotower.kernels.device_top_k:select_top_k")
def the_whole_row_is_sorted(right):
    return jax.lax.top_k


@mistake(35, "twotower.data.interactions:count_later_rows")
def the_first_of_equal_times_is_the_last(right):
    def count_later_rows(rows):
        later, counts = right(rows.take(np.arange(len(rows))[::-1]))
        return later[::-1], counts[::-1]

    return count_later_rows


@mistake(35, "twotower.retrieval.user_items:time_order")
def a_history_ends_with_the_first_of_equal_times(right):
    def time_order(parts):
        times = np.concatenate([part.timestamp for part in parts])
        return np.argsort(-times, kind="stable")[::-1]

    return time_order
