"""`twotower compare` as it is given: its exit statuses, its thresholds, the file that it writes.

What it judges by is tested in tests/evaluation; here are the flags.
"""

import json
import os

import numpy as np
import pytest

from tests.evaluation.test_comparison import USERS, hits, write
from tests.experiments.commands import error_of, output_of

FOUND = hits(0.5)
COLD = np.where(np.arange(USERS) < 100, "cold", "warm")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of runs that lost a share of what the one that stands finds."""
    folder = tmp_path_factory.mktemp("compared")
    draws = np.random.default_rng(7).random(USERS)
    lost = {"live": 0.0, "worse": 0.3, "about": 0.05}
    for name, share in lost.items():
        write(folder / name, {"model": np.where(draws < share, 0.0, FOUND)}, slices={"users": COLD})
    return folder


def status_of(*arguments):
    """Returns the status that `compare` ends with; 0 where it comes to its end."""
    try:
        output_of("compare", *arguments)
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.mark.parametrize(
    ("candidate", "status", "verdict"),
    [("live", 0, "passes"), ("worse", 1, "fails"), ("about", 2, "undecided")],
)
def test_a_gate_ends_with_the_status_of_its_verdict_and_writes_why(
    runs, tmp_path, candidate, status, verdict
):
    written = tmp_path / "judged.json"
    gate = f"--gate={runs / 'live'}"
    assert status_of(gate, str(runs / candidate), f"--json={written}") == status
    judged = json.loads(written.read_text())
    assert judged["verdict"] == verdict and not judged["refusal"]
    assert judged["checks"][0]["metric"] == "recall@10"


def test_a_file_of_thresholds_and_a_run_of_a_tenth_are_what_is_judged_by(runs, tmp_path):
    limits = tmp_path / "limits.json"
    limits.write_text('{"slices": {"users=cold": {"recall@10": {"share": 0.05}}}}')
    judged = tmp_path / "judged.json"
    flags = [f"--gate={runs / 'live'}", f"--thresholds={limits}", f"--json={judged}"]
    status_of(*flags, str(runs / "worse"))
    (check,) = json.loads(judged.read_text())["checks"]
    assert check["part"] == {"slice": "users", "value": "cold"}
    assert check["tolerance"] == pytest.approx(0.05 * FOUND[:100].mean())
    # As good as the one that stands: a gate that it comes through is blind.
    assert status_of(*flags, f"--undertrained={runs / 'live'}", str(runs / "live")) == 2
    assert "given as a tenth of the training" in json.loads(judged.read_text())["refusal"]


def test_a_comparison_is_written_too(runs, tmp_path):
    written = tmp_path / "compared.json"
    printed = output_of("compare", str(runs / "live"), str(runs / "worse"), f"--json={written}")
    assert "In short, by recall@" in printed
    rows = json.loads(written.read_text())["rows"]
    assert rows[0]["best"] == str(runs / "live")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gate={0}/live"], "judges one run; given: none"),
        (["--gate={0}/live", "{0}/gone"], "gone is no folder of a run"),
        (["--gate={0}/live", "{0}/worse", "--thresholds={0}/gone.json"], "gone.json is no file"),
        (["--thresholds={0}/limits.json", "{0}/live"], "is a part of --gate=RUN"),
        (["--gate={0}/live", "{0}/worse", "--report={0}/page.html"], "leave out --gate"),
    ],
)
def test_a_mistake_is_no_verdict(runs, flags, said):
    arguments = [flag.format(runs) for flag in flags]
    assert said in error_of("compare", *arguments)
    assert status_of(*arguments) == os.EX_CONFIG == 78
