"""One report of a small run, whose titles are as unkind as data may be, for all tests of it."""

import dataclasses
from types import SimpleNamespace

import pyarrow as pa
import pytest

from tests.extras import extra
from tests.retrieval.runs import make_run
from twotower.evaluation import measure
from twotower.evaluation.baselines.make import BaselineOptions
from twotower.evaluation.report.write import write_report

FEATURES = {
    "user": {
        "city": {"type": "string", "embedding_size": 4},
        "history": {"type": "history", "max_length": 12, "reads": ("item_id",)},
    },
    "item": {
        "item_id": {"type": "string", "embedding_size": 16},
        "category": {"type": "string", "embedding_size": 4},
    },
}
SCRIPT = "<script>document.title = 'taken'</script>"
ARABIC = "سوار فضي من دار الهلال"
# A title of data may end an element, look like a formula, or be without an end.
TITLES = (SCRIPT, ARABIC, "</style><b>bold $5 & $6", "a title that does not end " * 20)
KS = (5, 10)
# What a run with labels, and one that was asked for sanity, have measured.
LABELS = {
    "auc": 0.7321,
    "log_loss": 0.41,
    "calibration_error": 0.02,
    "rows": 1500,
    "calibration_curve": [
        {"from": 0.1, "to": 0.2, "rows": 1100, "predicted": 0.15, "observed": 0.1312},
        {"from": 0.6, "to": 0.7, "rows": 400, "predicted": 0.66, "observed": 0.7},
    ],
}
SANITY = {
    "titles": {
        "column": "title",
        "auc": 0.815,
        "interval": [0.79, 0.84],
        "pairs": 640,
        "examples": [[ARABIC, SCRIPT, 0.9312]],
    },
    "categories": {
        "column": "category",
        "events": 5,
        "k": 10,
        "share": 0.62,
        "interval": [0.5, 0.7],
        "chance": 0.081,
        "categories": 9,
        "examples": [["rings", 0.7, ["gold ring", SCRIPT]]],
    },
    "cannot": ["Brands were not asked for."],
}


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run of a bag of history, never trained."""
    small = make_run(
        tmp_path_factory.mktemp("report") / "shop",
        features=FEATURES,
        data={"source": "shop", "num_interactions": 4_000},
        evaluation={"ks": KS},
        model={"user": {"layers": (16,)}, "item": {"layers": (16,)}, "normalize": False},
        retrieval={"index": "exact", "display": ("title",)},
    )
    items = small.prepared.items
    titles = items["title"].to_pylist()
    for row in range(len(titles)):
        titles[row] = TITLES[row % 40] if row % 40 < len(TITLES) else titles[row]
    categories = items["category"].to_pylist()
    words = {name: word for name, word in zip(sorted(set(categories)), ("<b>", ARABIC, "$x_1$"))}
    renamed = [words.get(name, name) for name in categories]
    for name, values in (("title", titles), ("category", renamed)):
        items = items.set_column(items.column_names.index(name), name, pa.array(values))
    lines = [
        '{"step": 2, "loss": 6.5, "temperature": 0.08}',
        '{"step": 4, "loss": 6.1, "temperature": 0.07, "validation/recall@10": 0.1}',
        '{"step": 7, "loss": 6.0, "temperature": 0.06, "validation/recall@10": 0.2}',
    ]
    (small.workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return dataclasses.replace(small, prepared=dataclasses.replace(small.prepared, items=items))


@pytest.fixture(scope="session")
def measured(run):
    """Figures of the run, with those of what other parts of the library measure."""
    quick = BaselineOptions(without=("ease", "als", "item_knn", "item_graph"))
    figures = measure.measure_run(run, ks=KS, max_queries=200, baseline_options=quick)
    model = figures["model"]
    part = {
        "queries": 40,
        "model": model,
        "intervals": figures["model_intervals"],
        "baseline": figures["baselines"]["popularity"],
    }
    slices = {str(number): part for number in range(10)} | {ARABIC: part, SCRIPT: part}
    return figures | {
        "slices": {"item popularity": slices, "city": {"Fez": part, "a very long name " * 4: part}},
        "audits": {
            "ties": {"speaks": True, "sentence": "A fifth of the answers depend on ties."},
            "leakage": {"speaks": False, "sentence": "Training rows reveal no held-out row."},
        },
        "popularity_weights": {"0": model, "0.05": model, "0.1": model},
        "health": {"hubness": {"skewness": 1.25}, "mean_cosine": 0.02},
        "labels": LABELS,
        "heads": {"like": {"auc": 0.61, "log_loss": 0.5, "rows": 1200}},
        "sanity": SANITY,
        "baseline_choices": {"popularity": {"setting": "half-life 7 days", "tried": 5}},
    }


@pytest.fixture(scope="session")
def report(run, measured):
    """The file of the report, and its text."""
    extra("matplotlib", "plots")
    path = run.workdir / "report.html"
    write_report(run, measured, path)
    return SimpleNamespace(path=path, text=path.read_text(encoding="utf-8"))
