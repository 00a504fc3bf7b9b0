"""The page of several runs."""

import math
import re

import pytest

from tests.evaluation.report.conftest import SCRIPT
from twotower.evaluation.comparison.compare import ALL, Comparison, Difference, QueryPart, Row
from twotower.evaluation.report.comparison import write_comparison

RUNS = ("runs/a", "runs/b", f"runs/c{SCRIPT[:8]}")


def compared(equals):
    """Three runs of which the second is the best, by the same difference for every user."""
    rows = []
    differences = []
    parts = [ALL, *(QueryPart("country", value) for value in ("<b>", "France"))]
    for part in parts:
        for metric in ("recall@5", "recall@10", "ndcg@5", "ndcg@10"):
            figures = dict(zip(RUNS, (0.2, 0.3, 0.1)))
            rows.append(Row(metric, part, 40, 30, figures, RUNS[1], equals))
            for run, difference in ((RUNS[1], 0.1), (RUNS[2], -0.1)):
                ends = (difference - 0.02, difference + 0.02)
                one = Difference(run, RUNS[0], metric, part, difference, *ends, math.inf, 0.0, 0.0)
                differences.append(one)
    return Comparison(RUNS, {"split": "test"}, tuple(rows), tuple(differences), {})


@pytest.mark.parametrize(
    ("equals", "verdict"),
    [
        ((), "b is ahead of all others"),
        ((RUNS[0],), "b is not to be told from a"),
        ((RUNS[0], RUNS[2]), "The runs cannot be told apart"),
    ],
)
def test_the_verdict_names_the_best_and_what_cannot_be_told_from_it(tmp_path, equals, verdict):
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    write_comparison(compared(equals), tmp_path / "compared.html")
    text = (tmp_path / "compared.html").read_text()
    said = re.search(r'<p class="verdict \w+">(.*?)</p>', text)[1]
    assert verdict in said
    # By the last parts of folders; and what these hold is data.
    assert "runs/a" not in text and "c&lt;script&gt;" in text
    assert text.count("<script") == 0 and "<b>" not in text
    assert text.count('<article class="chart">') == 5
    assert "inf" not in re.sub("<[^>]*>", "", text).lower().replace("information", "")
    for shown in ("0.3000", "+0.1000", "+0.0800 to +0.1200", "&lt;0.001"):
        assert shown in text
