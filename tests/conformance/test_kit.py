"""The benchmark of known mistakes: every trap has a test and a mistake, and a mistake that is seen
is told from one that is not."""

import subprocess
import sys

import pytest

from experiments.benchmarks.mistakes import MISTAKES
from experiments.benchmarks.mutations import ROOT, find_tests

pytestmark = pytest.mark.slow

TRAPS = range(1, 36)


def test_every_trap_has_a_test_and_a_mistake():
    assert sorted(find_tests()) == list(TRAPS)
    assert sorted({mistake.trap for mistake in MISTAKES}) == list(TRAPS)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_a_mistake_replaces_what_exists(mistake):
    """Where a function was renamed or moved, its mistakes must follow it."""
    mistake.find_target()


# In a process of its own, since this one has threads that a fork would not survive.
RUN = """
import jax, jaxtyping, pyarrow.compute, pytest  # once, before the forks
from experiments.benchmarks.mistakes import Mistake
from experiments.benchmarks.mutations import attempt, find_tests

def crashing(rows):
    raise NameError

wrong = {
    "matters": lambda right: lambda rows: (right(rows)[0][::-1], right(rows)[1]),
    "harmless": lambda right: lambda rows: right(rows),
    "crashes": lambda right: crashing,
}
tests = [test for test in find_tests()[35] if "order_of_the_file" in test]
target = "twotower.data.interactions:count_later_rows"
for what, make in wrong.items():
    print(attempt(tests, Mistake(35, what, target, make)).result)
"""


def test_a_mistake_that_matters_is_caught_and_a_harmless_change_is_missed():
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["caught", "missed", "broken"]
