"""The first parts of the report: the verdict in words, and how good the lists are."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from twotower.config import Config, non_defaults
from twotower.core.install import command
from twotower.data.report import DataReport
from twotower.evaluation.audits.base import spoken_sentences
from twotower.evaluation.baselines.tuning import Choice
from twotower.evaluation.intervals import LEVEL
from twotower.evaluation.repeat import evaluate_command
from twotower.evaluation.report.figures import (
    Line,
    Mark,
    Points,
    line_chart,
    row_chart,
    scatter_chart,
)
from twotower.evaluation.report.page import (
    Chart,
    Section,
    Table,
    bullets,
    charts,
    collapsible,
    escape,
    missing_note,
    paragraph,
    prose,
    table,
)
from twotower.evaluation.report.text import test_set_lines
from twotower.evaluation.report.verdict import (
    CURE,
    NOTHING_ASKED,
    Standing,
    Verdict,
    find_verdict,
    was_asked,
)
from twotower.evaluation.tuned import describe_tuning

Measured = Mapping[str, Any]
LONG_WARNING = 170  # characters from which on a warning is folded
# Up to the first colon or the end of a sentence, of a length that says something.
_FIRST_PART = re.compile(r".{30,}?(?::|\.)(?=\s)")
MOST_ROWS = 12  # rows of a chart of slices
MOST_LINES = 8  # lines of a chart: as many as there are colours
# Kinds of queries, as the subject of a sentence.
QUERIES = {
    "user": "person",
    "interaction": "held-out event",
    "last": "person, for the last event given all before it,",
    "random": "person, for one event drawn given all before it,",
    "successive": "event, given all before it,",
}
# Rankings whose names are no words, or longer than a chart has room for.
TITLES = {
    "ease": "EASE",
    "als": "ALS",
    "item_knn": "item-kNN",
    "popularity_in_categories": "popular in category",
    "popularity_top_quantile": "random of the top",
}
# Ways to divide queries or answers, as the title of a chart.
SLICES = {
    "item_popularity": "By popularity of the item",
    "items": "By item: in training (warm) or not (cold)",
    "users": "By user: in training (warm) or not (cold)",
    "history": "By number of items that the user had before",
}
SIGNS: dict[Standing, str] = {"ahead": "▲", "behind": "▼", "even": "≈", "alone": "•"}
SENTENCES: dict[Standing, str] = {
    "ahead": "The model is ahead of the best baseline, {name}.",
    "behind": "The model is behind the best baseline, {name}.",
    "even": "The model cannot be told from the best baseline, {name}.",
    "alone": "The model was measured alone.",
}


def list_lengths(measured: Measured) -> list[int]:
    """Returns the K of the figures, rising."""
    names = (name for name in measured["model"] if name.startswith("recall@"))
    return sorted(int(name.partition("@")[2]) for name in names)


def hero(measured: Measured, workdir: str, data_report: DataReport | None) -> str:
    """Returns the verdict, the figures behind it and all that speaks against them, as HTML."""
    # The shortest lists are what somebody sees without scrolling, and recall is what everybody
    # understands.
    metric = f"recall@{list_lengths(measured)[0]}"
    # Above the figures and not in a footnote: what speaks against them must be met first.
    warnings = [_warning(text) for text in find_warnings(measured, data_report)]
    if not was_asked(measured["model"]):
        return _unasked_hero(measured, metric, warnings)
    verdict = find_verdict(measured, metric)
    standing = verdict.standing
    sentence = SENTENCES[standing].format(name=title_of(verdict.rival))
    k = verdict.metric.partition("@")[2]
    numbers = [
        big_number(
            f"Model, {verdict.metric}",
            f"{verdict.value:.4f}",
            f"{LEVEL:.0%} interval {verdict.low:.4f} to {verdict.high:.4f}",
        )
    ]
    if verdict.rival:
        beside = _difference(verdict)
        choice = measured.get("baseline_choices", {}).get(verdict.rival)
        if choice is not None:
            beside += f"; {_setting(choice)}"
        title = f"Best baseline, {title_of(verdict.rival)}"
        numbers.append(big_number(title, f"{verdict.rival_value:.4f}", beside))
    # The one figure in words, for somebody who has never heard of recall.
    meaning = (
        f"On average, {verdict.value:.0%} of what a person really took was among the {k} items "
        f"that the model put first for them, out of {measured['protocol']['items']:,}."
    )
    if "tuning" in measured:
        meaning += f" {describe_tuning(measured['tuning'])}"
    evaluate = command("evaluate", f"--workdir={workdir}", "--baselines", "--report")
    if standing == "alone":
        cure = missing_note("Without baselines nobody can say whether this is much.", evaluate)
    elif standing == "behind":
        cure = paragraph(f"What to try: {CURE}.")
    else:
        cure = ""
    left = (
        f'<p class="verdict {standing}"><span aria-hidden="true">{SIGNS[standing]} </span>'
        f"{escape(sentence)}</p>{''.join(warnings)}"
        f'<dl class="numbers">{"".join(numbers)}</dl>{paragraph(meaning)}{cure}'
    )
    chart = _ranking_chart(measured, verdict.metric).html()
    return (
        '<section class="hero" id="verdict" aria-label="Verdict">'
        f'<div class="grid"><div>{left}</div>{chart}</div></section>'
    )


def _unasked_hero(measured: Measured, metric: str, warnings: Sequence[str]) -> str:
    """Returns the verdict where there was no query, which has neither a figure nor a chart."""
    number = big_number(f"Model, {metric}", "-", "nothing was asked")
    unanswered = measured["model"].get("queries_without_answer", 0)
    meaning = (
        f"{unanswered:,} queries have no right answer left among the items when those are taken "
        "out that the person had before. Figures need rows that hold something new."
    )
    return (
        '<section class="hero" id="verdict" aria-label="Verdict"><p class="verdict alone">'
        f'<span aria-hidden="true">{SIGNS["alone"]} </span>'
        f"{escape(NOTHING_ASKED.capitalize())}</p>{''.join(warnings)}"
        f'<dl class="numbers">{number}</dl>{paragraph(meaning)}</section>'
    )


def _setting(choice: Mapping[str, Any]) -> str:
    """Returns the setting of a baseline, with how many validation chose from."""
    return str(Choice(**choice))


def find_warnings(measured: Measured, data_report: DataReport | None) -> list[str]:
    """Returns the sentences that speak against the figures: answers out of reach, and audits."""
    # The audits say what the other two do, and more; figures of earlier versions have none.
    if "audits" in measured:
        return spoken_sentences(measured["audits"])
    sentences = []
    if "warning" in measured.get("answers", {}):
        sentences.append(measured["answers"]["warning"])
    if data_report is not None:
        sentences += data_report.warnings
    # The data's own report and the answers may say the same.
    return list(dict.fromkeys(sentences))


def _warning(text: str) -> str:
    """Returns a sentence that speaks against the figures: its first part, and all when pressed."""
    found = _FIRST_PART.match(text)
    if found is None or len(text) <= LONG_WARNING:
        return f'<p class="warning"><strong>Mind:</strong> {prose(text)}</p>'
    first = found[0].rstrip(":,; ")
    more = collapsible("In full", paragraph(text), of=first)
    return f'<div class="warning"><strong>Mind:</strong> {prose(first)}. {more}</div>'


def title_of(ranking: str) -> str:
    """Returns the name of a ranking in words."""
    return TITLES.get(ranking, ranking.replace("popularity_", "popular ").replace("_", " "))


def slice_title(name: str) -> str:
    """Returns the title of a chart of the parts that a slice has."""
    return SLICES.get(name, f"By {name.replace('_', ' ')}")


def big_number(title: str, big: str, beside: str) -> str:
    """Returns a figure that is read first, for a list of such."""
    return (
        f'<div><dt>{escape(title)}</dt><dd><span class="big">{escape(big)}</span>'
        f'<span class="beside">{escape(beside)}</span></dd></div>'
    )


def _difference(verdict: Verdict) -> str:
    """Returns how far the model lies from the best baseline, in words."""
    if not verdict.rival_value:
        return "it finds nothing"
    share = verdict.value / verdict.rival_value - 1
    # A smaller share would be told as 0 %.
    if abs(share) < 0.005:
        return f"the same as the model{_paired(verdict)}"
    side = "more" if share > 0 else "less"
    return f"the model finds {abs(share):.0%} {side}{_paired(verdict)}"


def _paired(verdict: Verdict) -> str:
    """Returns the interval that decides the verdict, as a part of a sentence."""
    if verdict.difference is None:
        return ""
    low, high = verdict.difference
    return f"; over the same people {low:+.4f} to {high:+.4f}"


def _ranking_chart(measured: Measured, metric: str) -> Chart:
    """Returns the figure of the model and of each baseline, the best first."""
    intervals = measured.get("model_intervals", {})
    figures = _rankings(measured)
    # The model stands where it belongs among the others, and is marked.
    order = _best_first(figures, metric)
    # Beside every tuned figure: each setting tried finds some of it by chance.
    choices = dict(measured.get("baseline_choices", {}))
    if "tuning" in measured:
        choices["model"] = {"setting": "its configuration", "tried": measured["tuning"]["tried"]}
    marks = []
    rows = []
    for name in order:
        value = figures[name][metric]
        ends = _interval_of(measured, name).get(metric)
        low, high = ends or (None, None)
        marks.append(Mark(title_of(name), value, low, high, strong=name == "model"))
        setting = _setting(choices[name]) if name in choices else "-"
        rows.append([title_of(name), f"{value:.4f}", _ends(ends), setting])
    caption = (
        f"Each row is one way to make lists; further right is better. The pale bar is the "
        f"{LEVEL:.0%} interval: where the mean would lie if other people of the same kind had come."
    )
    # Figures of earlier versions have none.
    if not intervals:
        caption = "Each row is one way to make lists; further right is better."
    # Only generated data has them, since its preferences are known.
    if "true_preferences" in figures:
        caption += (
            " True preferences are what the data was made of: no ranking can be expected to reach "
            "them."
        )
    svg = row_chart("ranking", marks, x_label=f"{metric} (share of right answers found, 0 to 1)")
    header = ["", metric, f"{LEVEL:.0%} interval", "setting"]
    return Chart("ranking", f"{metric}, model and baselines", svg, caption, Table(header, rows, ""))


def _rankings(measured: Measured) -> dict[str, Mapping[str, float]]:
    """Returns the figures of the model and of each baseline by name."""
    return {"model": measured["model"], **measured.get("baselines", {})}


def _best_first(figures: Mapping[str, Mapping[str, float]], metric: str) -> list[str]:
    return sorted(figures, key=lambda name: -figures[name][metric])


def _model_first(figures: Mapping[str, Mapping[str, float]], metric: str) -> list[str]:
    """Returns the names that a chart has room for: the model, then the best baselines."""
    # Baselines that fit no more are in the table of the chart.
    names = dict.fromkeys(["model", *_best_first(figures, metric)])
    return list(names)[:MOST_LINES]


def _interval_of(measured: Measured, ranking: str) -> Mapping[str, Sequence[float]]:
    if ranking == "model":
        return measured.get("model_intervals", {})
    # Evaluations of earlier versions have those of the model alone.
    return measured.get("baseline_intervals", {}).get(ranking, {})


def _ends(ends: Sequence[float] | None) -> str:
    if ends is None:
        return "-"
    return f"{ends[0]:.4f} to {ends[1]:.4f}"


def _answer_sentences(measured: Measured) -> list[str]:
    """Returns what is said of the right answers that no list could hold."""
    sentences = []
    unanswered = measured["model"].get("queries_without_answer", 0)
    if unanswered:
        sentences.append(
            f"Of {unanswered:,} queries no answer is left without these items: no mean counts them."
        )
    answers = measured.get("answers", {})
    # Else an audit says so already.
    if answers.get("outside_corpus"):
        sentences.append(
            f"{answers['outside_corpus']:,} of {answers['all']:,} right answers are not among the "
            f"items at all; they count as missed. A perfect ranking without an end would find "
            f"{answers['greatest_recall']:.1%}."
        )
    return sentences


def how_measured(
    measured: Measured,
    config: Mapping[str, Any],
    workdir: str,
    drawn: Mapping[str, Any] | None = None,
) -> Section:
    """Returns the protocol, the command and the configuration.

    Args:
        measured: Figures of the run.
        config: Its configuration.
        workdir: Its folder.
        drawn: Flags that the page was drawn with.
    """
    protocol = measured["protocol"]
    query = QUERIES.get(protocol["query"], "query")
    rows = protocol.get("test_set", protocol["split"])
    sentences = [
        f"Each {query} of the {rows} rows asks once, and every time all {protocol['items']:,} "
        "items are ranked, exactly; none is left out to make it easier.",
        f"{protocol['asked']:,} of {protocol['available']:,} queries were asked, of the model at "
        f"step {protocol['step']:,}.",
        "Items that the person had before are taken out of the lists; of equal scores the wrong "
        "item goes first.",
    ]
    sentences += [line.strip() for line in test_set_lines(measured.get("test_set", {}))]
    sentences += _answer_sentences(measured)
    for audit in measured.get("audits", {}).values():
        # Audits that speak against the figures stand on top of the page; here are those that found
        # nothing.
        if not audit.get("speaks") and audit.get("sentence"):
            sentences.append(audit["sentence"])
    details = measured.get("audits", {}).get("leakage", {}).get("details", {})
    leaks: list[str] = []
    if details:
        rows_of_leaks = [[name, text] for name, text in details.items()]
        caption = "Leakage that config.split.accept_leakage accepts"
        leaks = [
            collapsible(
                "How the split leaks", table(Table(["kind", "what"], rows_of_leaks, caption))
            )
        ]
    line = evaluate_command(measured, config, workdir, drawn)
    # What was set first: of the hundreds of options most have their defaults.
    changed = non_defaults(config, dataclasses.asdict(Config()))
    inside = (
        f"<pre><code>{prose(line)}</code></pre>{paragraph('Options that are not the defaults:')}"
        f"{_code(changed)}{collapsible('All options', _code(config))}"
    )
    return Section(
        "protocol",
        "How it was measured",
        "What a reader needs to repeat the figures, or to compare them with others.",
        [bullets(sentences), *leaks, collapsible("Command and configuration", inside)],
    )


def _code(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, indent=1, ensure_ascii=False, default=str)
    return f"<pre><code>{escape(text)}</code></pre>"


def learning(lines: Sequence[Mapping[str, float]], metric: str, step: int) -> Section:
    """Returns the curves of the training.

    Args:
        lines: Metrics of the training by step, as `read_lines` yields them.
        metric: Validation metric that chose the checkpoint.
        step: Step of the checkpoint.
    """
    # Losses and validations are lines of their own, at steps of their own.
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    key = f"validation/{metric}"
    checks = [(line["step"], line[key]) for line in lines if key in line]
    parts = []
    if losses:
        parts.append(
            _curve(
                "loss",
                "The loss while it learned",
                losses,
                "loss (nats a query, less is better)",
                "The loss says how surprised the model is by what people took. It should fall fast "
                "at first and then level off; one that still falls at the end wants more steps.",
                step,
            )
        )
    if checks:
        parts.append(
            _curve(
                "validation",
                f"{metric} on validation rows",
                checks,
                f"{metric} (0 to 1, more is better)",
                "Measured now and then on rows that are not trained on. The dotted line is the "
                "step that was kept; a curve that falls after it had begun to learn by heart.",
                step,
            )
        )
    blocks = [charts(parts)]
    if not losses:
        blocks = [paragraph("The run has no metrics.jsonl: it was copied without it.", "note")]
    elif not checks:
        blocks.append(
            paragraph("The split has no validation rows, so the last step is kept.", "note")
        )
    return Section(
        "learning", "Learning", "Did the training go well, and was it long enough?", blocks
    )


def _curve(
    name: str,
    title: str,
    points: Sequence[tuple[float, float]],
    y_label: str,
    caption: str,
    step: int,
) -> Chart:
    x, y = zip(*points)
    svg = line_chart(
        name,
        [Line(name, x, y)],
        x_label="step of the training (batches)",
        y_label=y_label,
        mark_x=step,
        mark_label=f"kept: step {step:,}",
    )
    rows = [[f"{int(at):,}", f"{value:.4f}"] for at, value in points]
    return Chart(name, title, svg, caption, Table(["step", y_label], rows, title))


def lists(measured: Measured, workdir: str) -> Section:
    """Returns metrics by the length of lists, by slice, and beyond accuracy."""
    title = "How good the lists are"
    if not was_asked(measured["model"]):
        return Section("lists", title, "", [paragraph(NOTHING_ASKED.capitalize(), "note")])
    # Recall beside NDCG: a model may be ahead in one and behind in the other.
    blocks = [charts([_by_length(measured, "recall"), _by_length(measured, "ndcg")])]
    run_again = [f"--workdir={workdir}", "--baselines", "--report"]
    slices = _slice_charts(measured)
    if slices:
        blocks.append(charts(slices))
    else:
        blocks.append(
            missing_note(
                "Parts of the people and items were not measured apart.",
                command("evaluate", *run_again),
            )
        )
    beyond = _beyond_charts(measured)
    blocks.append(charts(beyond))
    if "popularity_weights" not in measured:
        weighed = command("evaluate", *run_again, "--popularity_weights=0,.02,.05,.1")
        blocks.append(missing_note("Lists with popularity weighed were not measured.", weighed))
    blocks.append(collapsible("All figures", table(_all_figures(measured))))
    choices = measured.get("baseline_choices", {})
    if choices:
        rows = [
            [title_of(name), one["setting"], f"{one['tried']:,}"] for name, one in choices.items()
        ]
        header = ["baseline", "setting", "settings tried on validation"]
        settings = Table(header, rows, "How the baselines were set")
        blocks.append(collapsible("Settings of the baselines", table(settings)))
    return Section(
        "lists",
        title,
        "Longer lists find more; what matters is who finds more at the same length, for whom, and "
        "whether everybody is shown the same few things.",
        blocks,
    )


def _by_length(measured: Measured, metric: str) -> Chart:
    ks = list_lengths(measured)
    figures = _rankings(measured)
    # By recall in every figure, so that a name has one mark and colour in all of them.
    shown = _model_first(figures, f"recall@{ks[0]}")
    lines = []
    for name in shown:
        values = [figures[name][f"{metric}@{k}"] for k in ks]
        ends = [_interval_of(measured, name).get(f"{metric}@{k}") for k in ks]
        known = [end for end in ends if end is not None]
        # A band with gaps would be drawn as if it were whole.
        if len(known) < len(ks):
            known = []
        low, high = zip(*known) if known else ((), ())
        lines.append(Line(title_of(name), ks, values, low, high))
    words = {
        "recall": (
            "recall (share of right answers found, 0 to 1)",
            "Recall is the share of the right answers that a list of K holds.",
        ),
        "ndcg": (
            "NDCG (0 to 1, more is better)",
            "NDCG also asks how far up the right answers stand: first is worth most. A model that "
            "is ahead here and even in recall puts the right things higher.",
        ),
    }
    y_label, caption = words[metric]
    # Evaluations of earlier versions may have none.
    if any(len(line.low) for line in lines):
        caption += (
            f" The pale band around a line is its {LEVEL:.0%} interval: where it would lie if "
            "other people had come. All are measured on the same people, so that lines may be told "
            "apart though their bands overlap: the verdict goes by the difference."
        )
    caption += " The names stand in the order of the right ends."
    rows = []
    for name in _best_first(figures, f"{metric}@{ks[0]}"):
        ends = _interval_of(measured, name)
        cells = []
        for k in ks:
            cell = f"{figures[name][f'{metric}@{k}']:.4f}"
            if f"{metric}@{k}" in ends:
                cell += f" ({_ends(ends[f'{metric}@{k}'])})"
            cells.append(cell)
        rows.append([title_of(name), *cells])
    title = f"{metric.upper() if metric == 'ndcg' else metric.capitalize()} by length of the list"
    svg = line_chart(
        metric,
        lines,
        x_label="K, length of the list (items)",
        y_label=y_label,
        log_x=len(ks) > 1,
        x_ticks=ks,
    )
    return Chart(metric, title, svg, caption, Table(["", *(f"K = {k}" for k in ks)], rows, title))


def _slice_charts(measured: Measured) -> list[Chart]:
    """Returns a chart for each way to divide queries or answers."""
    made = []
    k = list_lengths(measured)[0]
    metric = f"recall@{k}"
    for number, (name, values) in enumerate(measured.get("slices", {}).items()):
        # Parts without a query that has an answer have no figures.
        known = {label: part for label, part in values.items() if metric in part.get("model", {})}
        # A single part is the whole.
        if len(known) < 2:
            continue
        # In the order given, which is that of deciles; of many the ones with most queries.
        large = sorted(known, key=lambda label: -known[label]["queries"])[:MOST_ROWS]
        marks = []
        rows = []
        for label, part in known.items():
            value = part["model"][metric]
            ends = part.get("intervals", {}).get(metric)
            low, high = ends or (None, None)
            other = part.get("baseline", {}).get(metric)
            if label in large:
                marks.append(Mark(label, value, low, high, other))
            baseline = "-"
            best = ""
            if other is not None:
                baseline = f"{other:.4f}"
                best = title_of(part.get("baseline_name", ""))
            queries = f"{part['queries']:,}"
            rows.append([label, queries, f"{value:.4f}", baseline, best, _ends(ends)])
        caption = (
            f"{metric} of each part apart. Filled: the model with its interval; hollow: the best "
            "baseline. Wide intervals are parts with few people: they say little."
        )
        if len(marks) < len(known):
            caption += f" The {MOST_ROWS} largest of {len(known)} parts; the table has all."
        svg = row_chart(
            f"slice{number}", marks, x_label=f"{metric} (0 to 1)", other_label="best baseline"
        )
        title = slice_title(name)
        header = ["part", "queries", "model", "best baseline", "which", "model's interval"]
        made.append(Chart(f"slice{number}", title, svg, caption, Table(header, rows, title)))
    return made


def _beyond_charts(measured: Measured) -> list[Chart]:
    """Returns recall against coverage and against novelty, and what weighing popularity does."""
    k = list_lengths(measured)[0]
    figures = _rankings(measured)
    shown = _model_first(figures, f"recall@{k}")
    axes = {
        "coverage": (
            f"coverage@{k} (share of all items in some list, 0 to 1)",
            "Up is more right answers, right is more of the assortment shown to somebody. "
            "Popularity shows everybody the same few things; a good model lies high and to the "
            "right.",
        ),
        "novelty": (
            f"novelty@{k} (bits; one bit more is half as popular)",
            "Up is more right answers, right are rarer things. High and to the left is a ranking "
            "that lives on best sellers; high and to the right finds what people had not met.",
        ),
    }
    made = []
    for name, (x_label, caption) in axes.items():
        groups = []
        rows = []
        for ranking in shown:
            x = figures[ranking][f"{name}@{k}"]
            y = figures[ranking][f"recall@{k}"]
            # A group of one point each, for a marker and a colour of its own.
            groups.append(Points(title_of(ranking), [x], [y]))
            rows.append([title_of(ranking), f"{x:.4f}", f"{y:.4f}"])
        title = f"Right answers against {name}"
        svg = scatter_chart(name, groups, x_label=x_label, y_label=f"recall@{k} (0 to 1)")
        made.append(Chart(name, title, svg, caption, Table(["", name, "recall"], rows, title)))
    if measured.get("popularity_weights"):
        made.append(_frontier(measured["popularity_weights"], k))
    return made


def _frontier(weights: Mapping[str, Mapping[str, float]], k: int) -> Chart:
    # Keys of JSON are text.
    x = [float(weight) for weight in weights]
    names = {"recall": "recall", "coverage": "coverage", "long_tail": "long tail"}
    lines = []
    for metric, label in names.items():
        lines.append(Line(label, x, [values[f"{metric}@{k}"] for values in weights.values()]))
    svg = line_chart(
        "frontier",
        lines,
        x_label="weight of popularity in the score",
        y_label=f"figures @{k} (shares, 0 to 1)",
    )
    rows = []
    for weight, values in weights.items():
        rows.append([weight, *(f"{values[f'{metric}@{k}']:.4f}" for metric in names)])
    caption = (
        "A server may add popularity to the scores, by a weight that a request can choose. From "
        "left to right lists follow it more: coverage, and the share of rare things (long tail), "
        "fall; where recall rises too, the model knows too little of what everybody likes."
    )
    title = "What a weight of popularity does"
    return Chart("frontier", title, svg, caption, Table(["weight", *names.values()], rows, title))


def _all_figures(measured: Measured) -> Table:
    figures = _rankings(measured)
    rows = []
    for metric, value in measured["model"].items():
        # Counts of queries and nested figures are told elsewhere.
        if "@" not in metric or not isinstance(value, (int, float)):
            continue
        cells = [values.get(metric) for values in figures.values()]
        rows.append([metric, *("-" if cell is None else f"{cell:.4f}" for cell in cells)])
    return Table(["", *map(title_of, figures)], rows, "All figures, seen items masked")
