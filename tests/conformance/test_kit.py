"""The kit itself: every trap has a test and a mistake, and the benchmark tells a mistake that is
seen from one that is not."""

import ast
import json
import subprocess
import sys

import pytest

from experiments.benchmarks import mutations
from experiments.benchmarks.mutations import KIT, MISTAKES, ROOT

TRAPS = range(1, 36)


def test_every_trap_has_a_test():
    assert sorted(mutations.tests_by_trap()) == list(TRAPS)


def test_every_trap_has_a_mistake():
    assert sorted({mistake.trap for mistake in MISTAKES}) == list(TRAPS)


def test_every_test_of_the_kit_names_its_trap_and_says_what_it_is():
    for path in sorted(KIT.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if getattr(node, "name", "").startswith("test_") and path.name != "test_kit.py":
                assert mutations.traps_of(node), f"{path.name}: {node.name} has no mark"
                assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: f"{mistake.trap} {mistake.what}")
def test_every_mistake_can_still_be_made(mistake):
    """A snippet that stands in its module no longer: write the mistake anew, for the code as it is
    now."""
    for name, text in mutations.changed_sources(mistake).items():
        compile(text, name, "exec")


RUN = """
import json, tempfile
from experiments.benchmarks.mutations import Attempt, tests_by_trap
from experiments.benchmarks.mistakes import make
module, old = "data.interactions", "order = np.lexsort(keys)  # stable"
mistakes = [make(35, "", module, old, new) for new in (
    "order = np.lexsort((-np.arange(len(users)), *keys))  # ", "order = 1 * np.lexsort(keys)  # ", "order = nothing  # ")]
with tempfile.TemporaryDirectory() as cache:
    tests = [test for test in tests_by_trap()[35] if "order_of_the_file" in test]
    print(json.dumps([Attempt(tests, mistake, cache).outcome().result for mistake in mistakes]))
"""


def test_a_mistake_that_matters_is_caught_and_a_harmless_change_is_missed():
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == ["caught", "missed", "broken"]
