"""The figures of a run as text: tables for a terminal, and a line for each comparison.

The titles of queries and rankings are words for people; the JSON file has the names.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twotower.core.tables import format_table
from twotower.data.report import format_share
from twotower.evaluation.audits.base import spoken_sentences
from twotower.evaluation.audits.sanity import format_sanity
from twotower.evaluation.further import DISTINCT, NAMES
from twotower.evaluation.heads import HEAD_METRICS
from twotower.evaluation.intervals import LEVEL
from twotower.evaluation.measure import INDEX_K
from twotower.evaluation.metrics import CORPUS_METRICS, LIST_METRICS, RANKING_METRICS
from twotower.evaluation.report.slice_table import format_slices
from twotower.evaluation.report.verdict import (
    CURE,
    NOTHING_ASKED,
    Verdict,
    find_verdict,
    was_asked,
)
from twotower.evaluation.tuned import describe_tuning
from twotower.index.base import Index
from twotower.index.shards.divided import DividedIndex
from twotower.index.tuning_report import format_tuning
from twotower.retrieval.bundle import Bundle

# Variants are told apart in the JSON file.
VARIANTS = ("map_of_all", "mrr_of_all")
TABLE_METRICS = tuple(
    name for name in (*RANKING_METRICS, *CORPUS_METRICS, *LIST_METRICS) if name not in VARIANTS
)
EVERY_K_METRICS = ("recall", "ndcg")  # the others are shown for the shortest lists alone
SEED_METRICS = ("recall", "ndcg")  # those that papers report

FURTHER_NAMES = (*NAMES, DISTINCT)  # beginnings of the metrics that were asked for

# By the suffix of the keys that `measure_run` gives.
MASKING_TITLES = {"": "Seen items masked", "_unmasked": "Nothing masked"}
NEW_TITLES = {
    "new_items": "Right answers that training never saw",
    "new_users": "Users that training never saw",
}
QUERY_TITLES = {
    "user": "user",
    "interaction": "held-out interaction",
    "last": "user for the last row, given all rows before it",
    "random": "user for one row drawn, given all rows before it",
    "successive": "row, given all rows before it",
}


_FIRST_COLUMNS = 56  # characters of the columns of a table before those of its baselines
_FIGURE = 8  # characters of a figure
_INTERVAL = 18  # characters of an interval, with the space before it


def format_report(measured: Mapping[str, Any], ks: Sequence[int], width: int = 0) -> str:
    """Returns the figures of `measure_run` and `measure_index` as tables, with comparisons.

    Args:
        measured: Figures by name; "index" is optional.
        ks: Lengths of the lists, rising.
        width: Characters of a line of the terminal, by which the tables of baselines show the best
            of them alone; 0 shows all.
    """
    # First: they say what every figure below is worth, whatever the model is.
    spoken = spoken_sentences(measured.get("audits", {}))
    lines = [f"WARNING: {sentence}" for sentence in spoken]
    lines += test_set_lines(measured.get("test_set", {}))
    lines += _protocol_lines(measured["protocol"])
    if "tuning" in measured:
        lines.append(describe_tuning(measured["tuning"]))
    for suffix, title in MASKING_TITLES.items():
        model = measured[f"model{suffix}"]
        baselines = measured.get(f"baselines{suffix}", {})
        # Masking takes seen items out of the relevant ones too, and may leave none.
        unanswerable = model["queries_without_answer"]
        note = ""
        if unanswerable:
            note = f", {unanswerable:,} without an answer that is left"
        lines += ["", f"{title} ({model['queries']:,} queries{note}):"]
        verdict = find_verdict(measured, f"recall@{min(ks)}", suffix)
        intervals = {"model": measured.get(f"model_intervals{suffix}", {})}
        # Of the model and the best baseline: with those of all a table would be too wide.
        others = measured.get(f"baseline_intervals{suffix}", {})
        intervals |= {name: ends for name, ends in others.items() if name == verdict.rival}
        lines += _beside_baselines(model, baselines, ks, intervals, width)
        lines += _comparisons(verdict, model, baselines)
    for name, title in NEW_TITLES.items():
        # Left out where the split has no such query: a table of zeros would say something else.
        if name in measured:
            queries = measured[name]["model"]["queries"]
            lines += ["", f"{title} ({queries:,} queries, seen items masked):"]
            # Figures of earlier versions have none.
            intervals = measured.get(f"{name}_intervals", {})
            lines.append(format_metrics(measured[name], ks, intervals))
    lines += format_slices(measured.get("slices", {}), min(ks))
    if "baseline_choices" in measured:
        lines += ["", _choices_line(measured["baseline_choices"])]
    lines += _weight_lines(measured.get("popularity_weights", {}), ks)
    lines += _label_lines(measured)
    lines += _without_intervals(measured.get("without_intervals", {}))
    if "sanity" in measured:
        lines += ["", format_sanity(measured["sanity"])]
    if "index" in measured:
        lines += ["", _index_line(measured["index"])]
    return "\n".join(lines)


def _weight_lines(weights: Mapping[str, Mapping[str, float]], ks: Sequence[int]) -> list[str]:
    """Returns the table of weights of popularity, where any were measured."""
    if not weights:
        return []
    columns = {f"weight {weight}": values for weight, values in weights.items()}
    # A column of intervals beside each weight would be too wide for a terminal.
    title = "Popularity weighed, seen items masked (intervals are in the file):"
    return ["", title, format_metrics(columns, ks)]


def _without_intervals(reasons: Mapping[str, str]) -> list[str]:
    """Returns which figures have no interval, and why not."""
    if not reasons:
        return []
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return ["", f"Without an interval: {told}."]


def _beside_baselines(
    model: Mapping[str, float],
    baselines: Mapping[str, Mapping[str, float]],
    ks: Sequence[int],
    intervals: Mapping[str, Mapping[str, Sequence[float]]],
    width: int,
) -> list[str]:
    """Returns the table of the model and its baselines, and the names of those that do not fit."""
    # An interval of the best baseline takes the room of two or three others.
    room = max(1, width - _INTERVAL) if width and len(intervals) > 1 else width
    shown = _best_that_fit(baselines, f"recall@{min(ks)}", room)
    lines = [format_metrics({"model": model, **shown}, ks, intervals)]
    others = [_short_name(name) for name in baselines if name not in shown]
    if others:
        lines.append(f"Too wide for this terminal, but in the file: {', '.join(others)}.")
    return lines


def _best_that_fit(
    baselines: Mapping[str, Mapping[str, float]], metric: str, width: int
) -> dict[str, Mapping[str, float]]:
    """Returns the baselines that a table has room for, in their order: at least the best."""
    if not width:
        return dict(baselines)
    # The names of the metrics, the model's figure and its interval come first.
    left = width - _FIRST_COLUMNS
    kept: set[str] = set()
    for name in sorted(baselines, key=lambda name: -baselines[name][metric]):
        left -= max(len(_short_name(name)), _FIGURE) + 2
        if kept and left < 0:
            break
        kept.add(name)
    return {name: figures for name, figures in baselines.items() if name in kept}


def _label_lines(measured: Mapping[str, Any]) -> list[str]:
    """Returns the tables of a loss on labels and of heads, where they were measured."""
    lines: list[str] = []
    if measured.get("labels"):
        title = "Labels, over the rows that have one (probability: sigmoid of the scaled score):"
        lines += ["", title, format_heads({"label": measured["labels"]})]
    if measured.get("heads"):
        lines += ["", "Heads, over the rows that have a label:", format_heads(measured["heads"])]
    return lines


def format_metrics(
    columns: Mapping[str, Mapping[str, float]],
    ks: Sequence[int],
    intervals: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
) -> str:
    """Returns a table with a column for each ranking and a row for each metric.

    Recall and NDCG have a row for every K, the others one for the shortest lists alone; the JSON
    file has all.

    Args:
        columns: Title of a ranking -> its figures.
        ks: Lengths of the lists, rising.
        intervals: Title of some rankings -> lower and upper ends of its figures, shown after them.
    """
    first = next(iter(columns.values()))
    # Further metrics that were asked for; one without a length, such as AUC, is of the whole
    # corpus.
    further = [name for name in first if name.startswith(FURTHER_NAMES)]
    names = []
    for name in TABLE_METRICS:
        lengths = ks if name in EVERY_K_METRICS else ks[:1]
        names += [f"{name}@{k}" for k in lengths]
    names += [name for name in further if "@" not in name or name.endswith(f"@{ks[0]}")]
    header = [""]
    rows = [[name] for name in names]
    for title, values in columns.items():
        ends = (intervals or {}).get(title)
        header.append(_short_name(title))
        if ends:
            header.append(f"{LEVEL:.0%} interval")
        for row, name in zip(rows, names):
            row.append(_figure(values, name))
            if ends:
                row.append(_interval(ends.get(name)))
    return format_table(rows, header, align="lr")


def _figure(values: Mapping[str, float], name: str) -> str:
    """Returns a figure as text; one that nothing was asked for, or that is not defined, is "-"."""
    if name not in values or not values["queries"]:
        return "-"
    return f"{values[name]:.4f}"


def _interval(ends: Sequence[float] | None) -> str:
    """Returns an interval as text; a few figures have none, see "without_intervals"."""
    if ends is None:
        return "-"
    low, high = ends
    return f"{low:.4f} to {high:.4f}"


def format_heads(heads: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a table with a column for each head and a row for each metric.

    A metric that is not defined for a head is "-".
    """
    header = [""]
    for head, measured in heads.items():
        header.append(head)
        if "intervals" in measured:
            header.append(f"{LEVEL:.0%} interval")
    rows = []
    for name in HEAD_METRICS:
        row = [name]
        for measured in heads.values():
            # Not 0: a head whose rows all have one label has no AUC, for instance.
            figure = "-"
            if name in measured:
                figure = f"{measured[name]:.4f}"
            row.append(figure)
            if "intervals" in measured:
                row.append(_interval(measured["intervals"].get(name)))
        rows.append(row)
    row = ["rows"]
    for measured in heads.values():
        row.append(f"{measured['rows']:,}")
        if "intervals" in measured:
            row.append("")
    rows.append(row)
    return format_table(rows, header, align="lr")


def format_seeds(measured: Sequence[Mapping[str, Any]], ks: Sequence[int], split: str) -> str:
    """Returns tables of the spread of the model's metrics over seeds, beside baselines.

    Args:
        measured: Figures of `measure_run` for each seed; baselines are those of the first.
        ks: Lengths of the lists.
        split: Name of the held-out rows, for the titles.
    """
    lines = []
    for suffix, title in MASKING_TITLES.items():
        models = [values[f"model{suffix}"] for values in measured]
        # They depend on no seed, and are measured with the first alone.
        baselines = measured[0].get(f"baselines{suffix}", {})
        lines += ["", f"{title}, {split}, {len(measured)} seeds:"]
        lines.append(format_spread(models, baselines, ks))
    return "\n".join(lines)


def format_spread(
    models: Sequence[Mapping[str, float]],
    baselines: Mapping[str, Mapping[str, float]],
    ks: Sequence[int],
) -> str:
    """Returns a table of the spread of metrics over trainings of one model.

    A row has the mean, the standard deviation ("-" for a single training), the lowest, the highest,
    then the value of each baseline.
    """
    rows = []
    for name, k in itertools.product(SEED_METRICS, ks):
        metric = f"{name}@{k}"
        values = [model[metric] for model in models]
        figures = [statistics.mean(values), min(values), max(values)]
        mean, lowest, highest = (f"{figure:.4f}" for figure in figures)
        deviation = "-"
        if len(values) > 1:
            # The deviation of a sample (n - 1): other seeds would give other values.
            deviation = f"{statistics.stdev(values):.4f}"
        others = [f"{baseline[metric]:.4f}" for baseline in baselines.values()]
        rows.append([metric, mean, deviation, lowest, highest, *others])
    header = ["", "mean", "deviation", "lowest", "highest", *map(_short_name, baselines)]
    return format_table(rows, header, align="lr")


def format_bundle(bundle: Bundle, folder: Path) -> str:
    """Returns the choices and measurements of an export as text.

    These are the tuning of the index, the loss by cut or rounded vectors, and the sizes.

    Args:
        bundle: A bundle that was just written.
        folder: The folder that it was written to.
    """
    lines = []
    # Exact search has nothing to tune.
    tuning = getattr(bundle.index, "tuning", None)
    if tuning is not None:
        lines.append(format_tuning(tuning))
    if "against_full" in bundle.manifest:
        lines.append(_loss_line(bundle))
    if "baseline" in bundle.manifest:
        lines.append(_baseline_line(bundle.manifest))
    users = f"{len(bundle.users):,} users"
    if not len(bundle.users):
        users = "no users (known ones are answered as new ones)"
    sizes = f"{len(bundle.items):,} items, {users}"
    lines.append(f"{folder}: {sizes}, {describe_index(bundle.index)}.")
    return "\n".join(lines)


def _baseline_line(manifest: Mapping[str, Any]) -> str:
    """Returns a line on the baseline that a bundle holds, with what it reaches as it is served."""
    baseline = manifest["baseline"]
    line = f"{baseline['name']}: {baseline['setting']}"
    # One of the numbers is that of popularity.
    if not baseline["exact"]:
        line += f"; {manifest['dim'] - 1} numbers a vector approximate it (--baseline_dim)"
    figures = manifest.get("figures", {}).get("test", {})
    # The first of them: the manifest of the bundle has all.
    shown = [f"{name} {figures[name]:.4f}" for name in list(figures)[:1]]
    if shown:
        line += f"; as it is served, {shown[0]} on test rows"
    return f"{line}."


def describe_index(index: Index) -> str:
    """Returns the index in words, with its recall where it was tuned."""
    if isinstance(index, DividedIndex):
        parts = [describe_index(part) for part in index.parts]
        return f"{len(parts)} shards ({'; '.join(parts)})"
    tuning = getattr(index, "tuning", None)
    if tuning is None or not tuning.efforts:
        return f"{index.kind} index"
    # The first effort is that for the lists of `config.retrieval.k`; others are for longer ones.
    effort = tuning.efforts[0]
    return (
        f"{index.kind} index that searches {effort.leaves} of {tuning.num_leaves} leaves and finds "
        f"{effort.recall:.1%} of the exact top {effort.k}"
    )


def _loss_line(bundle: Bundle) -> str:
    against_full = bundle.manifest["against_full"]
    kind = bundle.config.retrieval.vectors
    # Beside the metrics, such as recall@10, stand the width and the number of users.
    metrics = [f"{name} {value:.4f}" for name, value in against_full.items() if "@" in name]
    stored = f"{kind} vectors {bundle.towers.dim} wide"
    full = f"float32 ones {against_full['dim']} wide"
    users = f"{against_full['users']:,} users"
    return f"{stored} against {full}, exact lists of {users}: {', '.join(metrics)}."


def test_set_lines(test_set: Mapping[str, Any]) -> list[str]:
    """Returns what a reader must know of a further test set; nothing of the rows of the log."""
    if not test_set:
        return []
    rows = test_set["rows"]
    unknown = test_set["rows_of_unknown_items"]
    lines = [
        f"Test set {test_set['name']} ({test_set['source']}): {rows:,} rows; "
        f"{test_set['unknown_users']:,} users are not in the log, and {unknown:,} rows "
        f"({format_share(unknown, rows)}) are of items that are not in the corpus."
    ]
    return lines + [f"  {note}" for note in test_set["notes"]]


def _protocol_lines(protocol: Mapping[str, Any]) -> list[str]:
    query = QUERY_TITLES[protocol["query"]]
    corpus = f"exact over all {protocol['items']:,} items"
    if "dim" in protocol:
        corpus += f", vectors cut to {protocol['dim']}"
    step = f"Step {protocol['step']} on {protocol.get('test_set', protocol['split'])}"
    lines = [f"{step}: one query per {query}, {corpus}."]
    if protocol["split"] == "train":
        lines.append("The model was trained on these rows: the figures say how much it remembers.")
    # Metrics of a sample may not pass for those of all queries.
    if protocol["asked"] < protocol["available"]:
        sample = f"{protocol['asked']:,} of {protocol['available']:,}"
        lines.append(f"A sample: {sample} queries were measured.")
    return lines


def _comparisons(
    verdict: Verdict, model: Mapping[str, float], baselines: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """Returns lines that compare the model with the best baseline, with popularity and with the
    best that is possible."""
    # The table says "-" of each figure.
    if not was_asked(model):
        return []
    lines = []
    metric = verdict.metric
    recall = verdict.value
    if verdict.rival:
        lines.append(_format_verdict(verdict))
    # Missing, or 0 in a tiny split: no ratio can be formed.
    popularity = baselines.get("popularity", {}).get(metric, 0.0)
    if popularity:
        lines.append(f"{metric}: {recall / popularity:.2f} times popularity's.")
    best = baselines.get("true_preferences", {}).get(metric, 0.0)
    if best:
        share = f"{recall / best:.0%}"
        lines.append(f"{metric}: {share} of what ranking by the true preferences reaches.")
    return lines


def format_summary(measured: Mapping[str, Any], ks: Sequence[int]) -> str:
    """Returns the verdict on new items to each user, in one sentence.

    Args:
        measured: Figures of `measure_run`.
        ks: Lengths of the lists, rising.
    """
    metric = f"recall@{min(ks)}"
    model = measured["model"]
    if not was_asked(model):
        return f"In short: {metric} -: {NOTHING_ASKED}"
    verdict = find_verdict(measured, metric)
    if verdict.rival:
        return f"In short: {_format_verdict(verdict)}"
    return (
        f"In short: {metric} {verdict.value:.4f} over {model['queries']:,} queries, which only "
        "--baselines can say whether it is much."
    )


def _format_verdict(verdict: Verdict) -> str:
    """Returns the sentence that compares the model with the best of the baselines."""
    figures = f"{verdict.metric} {verdict.value:.4f} against {verdict.rival_value:.4f}"
    if verdict.difference:
        low, high = verdict.difference
        figures += (
            f"; over the same users the difference is {low:+.4f} to {high:+.4f} ({LEVEL:.0%} "
            "interval)"
        )
    title = f"the best baseline, {_short_name(verdict.rival)}"
    if verdict.standing == "ahead":
        return f"The model is ahead of {title}: {figures}."
    if verdict.standing == "behind":
        return f"The model is BEHIND {title}: {figures}. Try {CURE}."
    return f"The model cannot be told from {title}: {figures}."


def _index_line(index: Mapping[str, Any]) -> str:
    return (
        f"Index ({index['kind']}, {index['items']:,} items, step {index['step']}): "
        f"recall@{INDEX_K} {index[f'recall@{INDEX_K}']:.4f} against exact, "
        f"{index['queries_per_second']:,.0f} queries/s in a batch, "
        f"{index['single_query_ms']:.3f} ms for one."
    )


def _choices_line(choices: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the settings of the baselines, with how many were tried of those that were tuned."""
    entries = []
    for name, choice in choices.items():
        tried = ""
        # A baseline that was chosen among many is told as the model is: each try finds some of its
        # figure by chance.
        if choice["tried"] > 1:
            tried = f" (the best of {choice['tried']} on validation)"
        entries.append(f"{_short_name(name)}: {choice['setting']}{tried}")
    return f"Baselines: {'; '.join(entries)}."


def _short_name(ranking: str) -> str:
    return ranking.replace("popularity_", "").replace("_", " ")
