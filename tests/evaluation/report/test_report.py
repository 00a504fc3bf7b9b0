"""What stands in a report: the verdict, all parts, and nothing that data could do to it."""

import base64
import dataclasses
import hashlib
import html
import inspect
import json
import re
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from tests.evaluation.report.conftest import ARABIC, LABELS, SANITY, SCRIPT, TITLES
from twotower import api
from twotower.commands.evaluation.evaluate import FLAGS
from twotower.core.arrays import Ragged
from twotower.core.errors import ConfigError
from twotower.evaluation.measure import write_metrics
from twotower.evaluation.queries import Queries
from twotower.evaluation.repeat import given_options
from twotower.evaluation.report import people, quality
from twotower.evaluation.report.besides_lists import labels_section, sanity_section
from twotower.evaluation.report.figures import Points, scatter_chart
from twotower.evaluation.report.neighbourhoods import umap_charts
from twotower.evaluation.report.page import Section, Table, render_page, table
from twotower.evaluation.report.quality import hero
from twotower.evaluation.report.text import format_summary
from twotower.evaluation.report.vectors import storage_recall
from twotower.evaluation.report.verdict import Verdict, find_verdict
from twotower.evaluation.report.write import check_report, write_report
from twotower.integrations.results import figure_rows
from twotower.retrieval.item_map.plane import Grouping

KINDS = (
    *("verdict", "protocol", "learning", "lists", "labels", "sanity", "space", "index", "health"),
    *("people", "data"),
)


def measured_as(model, low, high, **baselines):
    """Figures of an evaluation in which recall@10 alone counts."""
    return {
        "protocol": {"items": 50, "split": "test"},
        "model": {"recall@10": model},
        "model_intervals": {"recall@10": [low, high]},
        "baselines": {name: {"recall@10": value} for name, value in baselines.items()},
    }


@pytest.mark.parametrize(
    ("rival", "standing"), [(0.1, "ahead"), (0.25, "even"), (0.4, "behind"), (None, "alone")]
)
def test_the_verdict_is_against_the_best_baseline_that_anybody_could_use(rival, standing):
    rivals = {} if rival is None else {"ease": rival, "popularity": rival / 2}
    measured = measured_as(0.25, 0.2, 0.3, random=0.9, true_preferences=0.95, **rivals)
    verdict = find_verdict(measured, "recall@10")
    assert verdict.standing == standing
    assert verdict.rival == ("ease" if rivals else "")


def test_ends_of_an_interval_decide():
    assert Verdict("recall@10", 0.25, 0.2, 0.3, "ease", 0.2).standing == "even"
    assert Verdict("recall@10", 0.25, 0.2, 0.3, "ease", 0.1999).standing == "ahead"
    # Of the paired difference, where it was measured.
    assert Verdict("recall@10", 0.25, 0.2, 0.3, "ease", 0.24, (0.001, 0.02)).standing == "ahead"
    assert Verdict("recall@10", 0.25, 0.2, 0.3, "ease", 0.26, (-0.02, 0.0)).standing == "even"
    assert Verdict("recall@10", 0.25, 0.2, 0.3, "ease", 0.26, (-0.02, -0.01)).standing == "behind"


def test_every_line_by_length_has_its_band_and_the_caption_says_what_it_is(monkeypatch):
    drawn = []
    monkeypatch.setattr(quality, "line_chart", lambda name, lines, **_: drawn.extend(lines) or "")
    measured = {
        "model": {"recall@5": 0.2, "recall@10": 0.25},
        "model_intervals": {"recall@5": [0.15, 0.25], "recall@10": [0.2, 0.3]},
        "baselines": {"ease": {"recall@5": 0.1, "recall@10": 0.15}},
        "baseline_intervals": {"ease": {"recall@5": [0.05, 0.12], "recall@10": [0.1, 0.2]}},
    }
    chart = quality._by_length(measured, "recall")
    assert [(line.label, *line.low, *line.high) for line in drawn] == [
        ("model", 0.15, 0.2, 0.25, 0.3),
        ("EASE", 0.05, 0.1, 0.12, 0.2),
    ]
    assert "band around a line is its 95% interval" in chart.caption
    assert chart.table.rows[1] == ["EASE", "0.1000 (0.0500 to 0.1200)", "0.1500 (0.1000 to 0.2000)"]
    # Figures of earlier versions have no intervals, and no words on them.
    plain = quality._by_length({"model": measured["model"]}, "recall")
    assert "band" not in plain.caption and plain.table.rows == [["model", "0.2000", "0.2500"]]


def test_what_speaks_against_the_figures_stands_in_the_first_paragraph():
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    measured = measured_as(0.25, 0.2, 0.3, ease=0.1)
    measured["audits"] = {
        "unreachable": {"speaks": True, "sentence": "90% of the answers are <outside>."},
        "collapse": {"speaks": True, "sentence": "The vectors have collapsed."},
        "ties": {"speaks": False, "sentence": "No ties."},
    }
    said = hero(measured, "runs/x", None)
    assert said.index("90% of the answers are &lt;outside&gt;.") < said.index('class="numbers"')
    assert said.index("The vectors have collapsed.") < said.index('class="numbers"')
    assert "No ties." not in said


@pytest.mark.slow
def test_it_has_every_part_within_its_budget_and_a_table_for_each_picture(report):
    sections = re.findall(r'<section [^>]*id="(\w+)"', report.text)
    assert tuple(sections) == KINDS
    assert report.path.stat().st_size < 1.5 * 2**20
    figures = report.text.count('<figure role="img" aria-labelledby=')
    assert figures == report.text.count("<figcaption") == report.text.count(' focusable="false"')
    assert figures == report.text.count('<article class="chart">') >= 15
    for article in re.findall(r'<article class="chart">.*?</article>', report.text, re.DOTALL):
        assert article.count("<table>") == 1 and article.count("<tr>") > 1
    # What was set stands before all that was not.
    changed, _, every = report.text.partition("<summary>All options")
    assert "&quot;num_interactions&quot;: 4000" in changed and "accumulate" not in changed
    assert "&quot;accumulate&quot;: 1" in every
    ids = re.findall(r'\bid="([^"]+)"', report.text)
    assert len(ids) == len(set(ids))
    assert {path.suffix for path in report.path.parent.glob("items_by_*")} == {".png"}


@pytest.mark.slow
def test_titles_are_data_in_their_own_direction(report):
    assert SCRIPT not in report.text
    assert f'<bdi dir="auto">{html.escape(SCRIPT)}</bdi>' in report.text
    assert f'<bdi dir="auto">{ARABIC}</bdi>' in report.text
    # The two scripts are the map's own and its data, the style is one.
    assert report.text.count("<script") == 2 and report.text.count("<style") == 1
    data = re.search(r'id="map-data">(.*?)</script>', report.text, re.DOTALL)[1]
    titles = json.loads(data)["titles"]
    assert titles[:3] == list(TITLES[:3]) and len(titles[3]) <= 70


@pytest.mark.slow
def test_its_policy_allows_its_own_style_and_script_alone(report):
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', report.text)[1]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    for element in ("style", "script"):
        inside = re.search(rf"<{element}>(.*?)</{element}>", report.text, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy
    # Neither is allowed as an attribute.
    assert not re.search(r"<[^>]+\s(?:style|on\w+)=", report.text)


@pytest.mark.slow
def test_a_part_that_was_not_measured_says_how_to_have_it(run, measured, report):
    few = {name: measured[name] for name in ("protocol", "model")}
    path = report.path.with_name("few.html")
    write_report(run, few, path)
    # Each flag is one that no line ends within, which takes elements.
    text = re.sub("</?span[^>]*>", "", path.read_text())
    for flag in ("--baselines --report", "--popularity_weights=", "export --workdir="):
        assert flag in text
    with pytest.raises(ConfigError, match="--report_columns.*categry.*category"):
        write_report(run, few, path, columns=["categry"])


def test_a_name_has_one_mark_in_all_figures_by_length(monkeypatch):
    drawn = []

    def line_chart(name, lines, **options):
        drawn.append([line.label for line in lines])
        return "<svg></svg>"

    monkeypatch.setattr(quality, "line_chart", line_chart)
    figures = {"recall@5": 0.5, "recall@9": 0.6, "ndcg@5": 0.3, "ndcg@9": 0.4}
    measured = measured_as(0.1, 0.0, 0.2) | {"model": figures}
    # The one is better by recall, the other by NDCG.
    measured["baselines"] = {
        "ease": figures | {"recall@5": 0.4, "ndcg@5": 0.1},
        "popularity": figures | {"recall@5": 0.2, "ndcg@5": 0.2},
    }
    for metric in ("recall", "ndcg"):
        quality._by_length(measured, metric)
    assert drawn[0] == drawn[1] and len(drawn[0]) == 3


def test_what_was_missed_is_all_or_says_of_how_many():
    person = people.Person("u", "busy", 3, [], ["a"], [True], ["b", "c"], 2, 1.0, [])
    assert "not in the list</h4>" in people._card(person, is_open=True, reads_history=True)
    many = dataclasses.replace(person, num_wanted=1200)
    assert "(the first 2 of 1,200)" in people._card(many, is_open=True, reads_history=True)


@pytest.mark.parametrize(("fewest", "kind"), [(0, "new"), (2, "few events")])
def test_only_who_had_nothing_before_is_called_new(fewest, kind):
    users = np.arange(12)
    rows = np.repeat(users, users + fewest)
    queries = Queries(
        user=users,
        relevant=Ragged.from_pairs(users, np.full(12, 19), num_rows=12),
        missing=np.zeros(12, np.int32),
        seen=Ragged.from_pairs(rows, np.zeros(len(rows), np.int64), num_rows=12),
        counts=np.ones(20, np.int64),
    )
    chosen = people.choose_queries(queries)
    assert chosen[0] == (11, "busy") and chosen[-3] == (0, kind)
    section = people.people_section(
        [person_of(kind, fewest), person_of("busy", 9)], reads_history=False
    ).html()
    assert ("Nobody here is new: everybody had 2 items or more before." in section) == bool(fewest)
    assert ("nothing before" in section) == (not fewest)


def person_of(kind, seen):
    return people.Person("u", kind, seen, [], ["a"], [True], [], 0, 1.0, [])


def test_equal_figures_are_equal_text_and_two_share_no_id():
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    groups = [Points("$a", [1, 2], [3, 4]), Points("b", [1, 2], [2, 1])]

    def draw(name):
        return scatter_chart(name, groups, x_label="x (m)", y_label="y (s)")

    assert draw("one") == draw("one") and "$a" in draw("one")
    ids = [set(re.findall(r'id="(\w+)"', draw(name))) for name in ("one", "two")]
    assert ids[0] and not ids[0] & ids[1]


def test_a_page_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="--report needs the extra 'plots'"):
        check_report()


def test_a_page_with_umap_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ConfigError, match="--report_umap needs the extra 'umap'"):
        check_report(umap=True)


def test_items_by_umap_are_the_same_items_in_the_same_groups(monkeypatch):
    """UMAP itself is replaced by the first two numbers of each vector."""

    class First:
        def __init__(self, **options):
            assert options["n_neighbors"] == 15 and options["metric"] == "cosine"

        def fit_transform(self, vectors):
            return vectors[:, :2]

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=First))
    groups = np.arange(50, dtype=np.uint8) % 2
    vectors = np.stack([groups, np.arange(50), np.ones(50)], 1).astype(np.float32)
    (chart,) = umap_charts([Grouping("category", ("a", "b"), groups)], vectors)
    assert chart.table.rows == [["a", "25", "0.000", "24.000"], ["b", "25", "1.000", "25.000"]]
    assert "means nothing" in chart.caption and "sample" not in chart.caption
    assert umap_charts([Grouping("category", ("a", "b"), groups[:3])], vectors[:3]) == []


def test_cells_and_headings_are_escaped():
    page = render_page("<a>", "<b>", "", [Section("x", "<c>", "<d>", [])])
    assert not re.search(r"<[abcd]>", page.partition("<header>")[2])
    assert "<i>" not in table(Table(["<i>"], [["<i>", "<i>"]], "<i>"))


def test_rounding_loses_less_than_cutting_and_nothing_is_lost_whole():
    rng = np.random.default_rng(0)
    users = rng.normal(size=(20, 16)).astype(np.float32)
    items = rng.normal(size=(300, 16)).astype(np.float32)
    found = {
        (kind, width): (size, recall)
        for kind, width, size, recall in storage_recall(users, items, normalized=False)
    }
    assert found["float32", 16] == (64, 1.0)
    assert found["int8", 16][0] == 20
    assert found["int8", 16][1] > 0.9 > found["float32", 8][1] > found["float32", 4][1]


def text_of(part):
    """The words of a part of the page, a space between any two elements."""
    return " ".join(html.unescape(re.sub("<[^>]+>", " ", part)).split())


def test_labels_heads_and_the_calibration_curve_are_shown():
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    heads = {"like": {"auc": 0.61, "rows": 1200}}
    ends = {"intervals": {"auc": [0.58, 0.64]}}
    with_ends = labels_section({"labels": LABELS | ends, "heads": heads})
    assert "auc 0.7321 0.5800 to 0.6400 0.6100" in text_of(with_ends.html())
    part = labels_section({"labels": LABELS, "heads": heads}).html()
    said = text_of(part)
    # A metric that a head has not is no 0.
    assert "auc 0.7321 0.6100" in said and "log loss 0.4100 -" in said
    assert "rows with a label 1,500 1,200" in said
    assert "0.10 to 0.20 1,100 0.1500 0.1312" in said and "0.60 to 0.70 400" in said
    assert part.count("<figcaption") == 1 and "promises too much" in said
    assert "<figure" not in labels_section({"heads": heads}).html()
    assert labels_section({}) is None


def test_sanity_is_shown_with_examples_and_what_could_not_be_asked():
    part = sanity_section(SANITY).html()
    said = text_of(part)
    assert "81.5% 79.0% to 84.0% 50.0% 640 pairs" in said
    assert "62.0% 50.0% to 70.0% 8.1% 9 categories" in said
    assert "rings 70.0% gold ring; " in said and ARABIC in said and "0.93" in said
    assert "Brands were not asked for." in said and SCRIPT not in part
    # Nothing was like anything: examples alone.
    few = {"titles": {"column": "title", "pairs": 0, "examples": []}, "cannot": []}
    assert "- - 50.0% 0 pairs" in text_of(sanity_section(few).html())
    assert sanity_section(None) is None


def test_settings_and_the_number_tried_stand_beside_tuned_figures():
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    measured = measured_as(0.25, 0.2, 0.3, ease=0.1, popularity=0.05)
    measured["baseline_choices"] = {"ease": {"setting": "ridge 100.0", "tried": 9}}
    measured["tuning"] = {"tried": 40, "metric": "recall@10", "value": 0.3}
    said = text_of(hero(measured, "runs/x", None))
    best = "ridge 100.0, the best of 9 on validation"
    assert f"% more; {best}" in said and f"EASE 0.1000 - {best}" in said
    assert "popularity 0.0500 - -" in said
    assert "0.2000 to 0.3000 its configuration, the best of 40 on validation" in said


PROTOCOL = {"query": "user", "split": "test", "items": 50, "asked": 9, "available": 9, "step": 7}


def test_a_further_test_set_says_what_it_does_not_know():
    measured = measured_as(0.25, 0.2, 0.3) | {"protocol": PROTOCOL}
    measured["test_set"] = {
        "name": "july",
        "source": "july.csv",
        "rows": 400,
        "unknown_users": 31,
        "rows_of_unknown_items": 20,
        "notes": ["12 of 412 rows without a time are left out."],
    }
    said = text_of(quality.how_measured(measured, {}, "runs/x").html())
    assert "31 users are not in the log, and 20 rows (5.0%)" in said
    assert "12 of 412 rows without a time are left out." in said
    assert "--test=july.csv --test_name=july" in said


# Each option of the command that changes a figure, in a form that no default has.
GIVEN = {
    "split": "validation",
    "targets": "successive",
    "baselines": True,
    "without_baselines": ["ease", "als"],
    "popularity_window": "30d",
    "quantile_threshold": 0.0,
    "max_queries": 200,
    "popularity_weights": (0.0, 0.05),
    "slices": ["country", "item.two words"],
    "further_metrics": ["auc", "distinct.brand"],
    "sanity": True,
    "sanity_columns": ("", "brand"),
    "devices": 2,
}
# Flags that say where figures and pages go, and not what is measured.
ELSEWHERE = {"tracking_uri", "history", "results_table", "bigquery", "sanity_title"}


def test_the_command_has_every_option_that_was_given():
    call = {"run": None, "ks": (5, 10), "log": False, **GIVEN}
    # An option that is new must be tried here.
    assert set(call) == set(inspect.signature(api.evaluate).parameters)
    measured = measured_as(0.25, 0.2, 0.3) | {"protocol": PROTOCOL}
    measured["test_set"] = {"name": "sale", "source": "july.csv", "rows": 1, "notes": []}
    measured["test_set"] |= {"unknown_users": 0, "rows_of_unknown_items": 0}
    # As a file gives it back.
    measured["options"] = json.loads(json.dumps(given_options(api.evaluate, call)))
    drawn = {"report_columns": ["brand"], "report_umap": True}
    config = {"retrieval": {"dim": 32}}
    page = quality.how_measured(measured, config, "runs/x", drawn).html()
    line = html.unescape(re.sub("</?span[^>]*>", "", re.search("<code>(.*?)</code>", page)[1]))
    flags = shlex.split(line.partition("evaluate")[2])
    values: dict[str, str] = {}
    for flag in flags:
        key, _, value = flag.removeprefix("--").partition("=")
        values[key] = value
    of_mlflow = {flag for flag in FLAGS if flag.startswith("mlflow_")}
    assert set(values) == set(FLAGS) - ELSEWHERE - of_mlflow
    assert values["slices"] == "country,item.two words" and values["queries"] == "200"
    assert values["quantile_threshold"] == "0.0" and values["popularity_weights"] == "0.0,0.05"
    assert values["checkpoint"] == "7" and values["dim"] == "32" and values["k"] == "5,10"
    parameters = inspect.signature(api.evaluate).parameters
    usual = {name: parameter.default for name, parameter in parameters.items()}
    assert given_options(api.evaluate, usual) == {}


def test_where_nothing_was_asked_nothing_is_said_to_be_found(tmp_path):
    figures = {"recall@10": 0.0, "coverage@10": 0.0, "queries": 0, "queries_without_answer": 12}
    measured = measured_as(0.0, 0.0, 0.0) | {
        "protocol": PROTOCOL,
        "model": figures,
        "model_intervals": {},
        "baselines": {"ease": figures},
    }
    said = text_of(hero(measured, "runs/x", None))
    said += text_of(quality.lists(measured, "runs/x").html()) + format_summary(measured, [10])
    assert said.lower().count("nothing was asked, as no query has a right answer") == 3
    assert "12 queries have no right answer left" in said and "recall@10 -" in said
    assert not re.search(r"0\.0000|0%|cannot be told|best baseline", said)
    write_metrics(measured, tmp_path / "metrics.json")
    written = json.loads((tmp_path / "metrics.json").read_text())
    nothing = figures | {"recall@10": None, "coverage@10": None}
    assert written["model"] == written["baselines"]["ease"] == nothing
    for kept in (measured, written):
        metrics = {row["metric"] for row in figure_rows(kept)}
        assert metrics == {"queries", "queries_without_answer"}
    # With queries a figure of 0 is one.
    figures["queries"] = 3
    write_metrics(measured, tmp_path / "metrics.json")
    assert json.loads((tmp_path / "metrics.json").read_text())["model"] == figures
