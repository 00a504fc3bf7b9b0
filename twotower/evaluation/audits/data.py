"""Audits of the data and the protocol: what figures of any model are worth on them.

Each says what it looked at, and speaks where figures mean less than they seem to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from twotower.config import Config, SplitConfig
from twotower.core.arrays import Ragged, pair_keys
from twotower.data.audit import FINDINGS, accepted_findings
from twotower.data.interactions import Split
from twotower.data.report import format_share
from twotower.data.sources.load import describes_items, takes_items_of_log
from twotower.evaluation.audits.base import Audit
from twotower.evaluation.baselines.item_graph import WINDOW
from twotower.evaluation.queries import Queries
from twotower.pipeline.batches import InteractionRows

# From where on an audit speaks.
SHARE_OF_NEWS = 0.2  # of the right answers, items that training never saw
SHARE_OF_TIES = 0.05  # of the users, those whose answer depends on the order of equal times
SHARE_OF_DUPLICATES = 0.01  # of the right answers, those the user had before


def audit_unreachable(answers: Mapping[str, Any]) -> Audit:
    """Says how many right answers no ranking of the corpus can find.

    Args:
        answers: Result of `twotower.evaluation.measure.measure_answers`.
    """
    figures = {name: answers[name] for name in ("all", "outside_corpus", "greatest_recall")}
    # Made where the figures are made, which must say it even where nothing is audited.
    if "warning" in answers:
        return Audit("unreachable", True, answers["warning"], figures)
    return Audit("unreachable", False, "Every right answer is in the corpus.", figures)


def audit_leakage(parts: Split, config: Config) -> Audit:
    """Says which kinds of leakage of the split the configuration accepts.

    Others are none: a split that has them is refused before anything is trained.

    Args:
        parts: The parts of the log.
        config: Configuration that the log was divided for.
    """
    # Items that are described by the rows of the log are so by held-out rows too, unless training
    # rows alone are taken.
    held_out_text = describes_items(config.data) and not takes_items_of_log(config.data)
    findings = accepted_findings(parts, config.split, describes_items=held_out_text)
    figures: dict[str, Any] = {"rows": {finding.name: finding.rows for finding in findings}}
    if not findings:
        return Audit("leakage", False, "Training rows reveal no held-out row.", figures)
    facts = []
    details = {}
    for finding in findings:
        # The example row is for whoever looks closer.
        facts.append(f"{finding.message.partition(', for example ')[0]} ({finding.name})")
        # The first sentence says why it leaks; those after it say what to do.
        why = FINDINGS[finding.name].reason.split(". ")[0].rstrip(".")
        details[finding.name] = f"{finding.message}. {why}."
    figures["details"] = details
    sentence = (
        f"The split leaks, as config.split.accept_leakage accepts: {'; '.join(facts)}. Compare the "
        "figures with those of the same split alone: no served model reaches them."
    )
    return Audit("leakage", True, sentence, figures)


def audit_never_trained(queries: Queries) -> Audit:
    """Says how many right answers are items of the corpus that no training row has."""
    # Counts are of training rows, so that 0 says that a tower has only the columns to go by.
    count = int((queries.counts[queries.relevant.values] == 0).sum())
    total = int(queries.num_relevant.sum())
    share = count / max(total, 1)
    figures = {"answers": count, "share": share}
    sentence = (
        f"{format_share(count, total)} of the {total:,} right answers ({count:,}) are items of the "
        "corpus that training never saw"
    )
    if share < SHARE_OF_NEWS:
        return Audit("never_trained", False, f"{sentence}.", figures)
    sentence += (
        ": they are found by their columns alone, and baselines that count rows find none. Read "
        "the figures of new items apart, and give items columns that describe them."
    )
    return Audit("never_trained", True, sentence, figures)


def audit_ties(
    held_out: InteractionRows, earlier: Sequence[InteractionRows], config: SplitConfig
) -> Audit:
    """Says for how many users the held-out answer depends on the order of equal times.

    It does where a held-out row has the time of a row of the same user in an earlier part: another
    order of the file would have held out that one.

    Args:
        held_out: Rows of the part that is measured.
        earlier: Rows of the parts before it.
        config: Kind of the split, and its order of ties.
    """
    if held_out.timestamp is None:
        # An order that nobody can check is no tie.
        sentence = "The log has no times: the order of the file is its order."
        return Audit("ties", False, sentence)
    parts = [part for part in (*earlier, held_out) if len(part)]
    moments = _moment_keys(parts)
    # The held-out part is the last of those that were joined.
    start = len(moments) - len(held_out)
    is_tied = np.isin(moments[start:], moments[:start])
    # By users and not by rows: under leave-one-out each of them is one query.
    users = len(np.unique(held_out.user))
    tied = len(np.unique(held_out.user[is_tied]))
    moments = np.sort(moments)
    # Each user has one neighbour less than rows.
    neighbours = len(moments) - len(np.unique(np.concatenate([part.user for part in parts])))
    # Keys of one user and one time follow each other once they are sorted.
    tied_neighbours = int((moments[1:] == moments[:-1]).sum())
    share = tied / max(users, 1)
    figures = {
        "users": users,
        "tied_users": tied,
        "share": share,
        "neighbour_share": tied_neighbours / max(neighbours, 1),
    }
    sentence = (
        f"The held-out answer of {tied:,} of {users:,} users ({format_share(tied, users)}) has the "
        "time of an earlier row of theirs"
    )
    # A split by time keeps rows of one second together, and one by chance asks for no order.
    has_order = config.kind in ("leave_last_out", "fixed")
    if not has_order or share < SHARE_OF_TIES:
        return Audit("ties", False, f"{sentence}.", figures)
    # A split that came with the log has options of its own, wherever they were.
    if config.kind == "fixed":
        sentence += (
            ", and whoever divided the log decided which of them is to be found. Ask by what "
            "order, or divide it by config.split.kind='leave_last_out' with ties='together'."
        )
        return Audit("ties", True, sentence, figures)
    by = "a draw" if config.ties == "drawn" else "the order of the file"
    sentence += (
        f", and {by} decides which of them is to be found. config.split.ties='together' holds all "
        "rows of the last moment out, any of which is right, and 'drawn' draws one by "
        "config.split.seed: compare two seeds."
    )
    return Audit("ties", True, sentence, figures)


def _moment_keys(parts: Sequence[InteractionRows]) -> np.ndarray:
    """Returns a number for the user and the time of each row, int64 [rows of all parts]."""
    users = np.concatenate([part.user for part in parts])
    times = np.concatenate([part.timestamp for part in parts if part.timestamp is not None])
    since_first = times - times.min()
    if since_first.max() >= 2**32:
        # Seconds of more than a century do not fit beside the user.
        since_first = np.unique(times, return_inverse=True)[1]
    return pair_keys(users, since_first)


def audit_duplicates(queries: Queries, natural: float) -> Audit:
    """Says how many right answers are items that the user had before.

    Args:
        queries: Queries with all of their relevant items, those that users had seen among them.
        natural: Share of the earlier rows that repeat the user and item of one.
    """
    repeated = int(queries.is_repeat().sum())
    total = len(queries.relevant.values)
    share = repeated / max(total, 1)
    figures = {"answers": repeated, "share": share, "share_of_earlier_rows": natural}
    sentence = (
        f"{format_share(repeated, total)} of the right answers ({repeated:,} of {total:,}) are "
        f"items that the user had before, as are {natural:.1%} of the earlier rows"
    )
    if share < SHARE_OF_DUPLICATES:
        return Audit("duplicates", False, f"{sentence}.", figures)
    # Repeats are no fault of the split where training repeats itself at least half as much.
    if natural >= share / 2:
        sentence += (
            ": users come back, so repeats are natural here. They are left out where seen items "
            "are masked, and count where nothing is."
        )
        return Audit("duplicates", False, sentence, figures)
    sentence += (
        ": answers repeat what training holds far more than its own rows do. Figures with nothing "
        "masked count what is remembered; see config.data.duplicates, and how the parts were "
        "divided."
    )
    return Audit("duplicates", True, sentence, figures)


def audit_shortcut(
    queries: Queries,
    sequences: Ragged,
    metric: str,
    interval: Sequence[float],
    graph: float,
) -> Audit:
    """Says how far the untrained graph of items that follow each other gets.

    Args:
        queries: Queries with their relevant and their seen items.
        sequences: Items of each user in training, the latest last.
        metric: Name of the metric to compare, such as "recall@10".
        interval: Lower and upper end of the model's metric.
        graph: Metric of the baseline "item_graph".
    """
    adjacent = adjacent_share(queries, sequences)
    low, high = interval
    figures = {"adjacent_share": adjacent, "metric": metric, "item_graph": graph}
    sentence = (
        f"{adjacent:.1%} of the right answers stand within {WINDOW} rows of the user's last item "
        f"with some user in training, and the untrained item graph has {metric} {graph:.4f}"
    )
    # Against the interval and not the figure: a lead within it may be luck.
    if graph < low:
        return Audit("shortcut", False, f"{sentence}, less than the model.", figures)
    if graph > high:
        sentence += f", more than the model (at most {high:.4f})"
    else:
        sentence += f", no less than the model ({low:.4f} to {high:.4f})"
    sentence += (
        ": what was trained adds nothing to counting which items follow each other. Serve the "
        "graph, or train further."
    )
    return Audit("shortcut", True, sentence, figures)


def adjacent_share(queries: Queries, sequences: Ragged) -> float:
    """Returns the share of right answers next to the last seen item of their user, for any user.

    Of queries with a last item; right answers outside of the corpus are next to none.

    Args:
        queries: Queries with their relevant and their seen items.
        sequences: Items of each user in training, the latest last.
    """
    seen = queries.seen
    has_last = seen.lengths[queries.seen_row] > 0
    if not has_last.any():
        # Nobody has a last item where every user is new.
        return 0.0
    last = np.zeros(len(queries), np.int64)
    last[has_last] = seen.values[seen.offsets[queries.seen_row[has_last] + 1] - 1]
    is_asked = has_last[queries.relevant.rows]
    asked = pair_keys(last[queries.relevant.rows], queries.relevant.values)[is_asked]
    # The pairs that are asked for, not those of the log, are kept in memory.
    pairs, answer = np.unique(asked, return_inverse=True)
    if not len(pairs):
        return 0.0
    is_joined = np.zeros(len(pairs), bool)
    users = sequences.rows
    items = sequences.values
    for distance in range(1, WINDOW + 1):
        is_one_user = users[:-distance] == users[distance:]
        earlier = items[:-distance][is_one_user]
        later = items[distance:][is_one_user]
        # Both ways, as the graph is walked: a user's last item may follow what is asked for.
        for keys in (pair_keys(earlier, later), pair_keys(later, earlier)):
            # Looked up among the few that are asked for: `np.isin` would sort those of the log.
            position = np.searchsorted(pairs, keys).clip(max=len(pairs) - 1)
            is_joined[position[pairs[position] == keys]] = True
    total = int(queries.num_relevant[has_last].sum())
    return float(is_joined[answer].sum() / max(total, 1))
