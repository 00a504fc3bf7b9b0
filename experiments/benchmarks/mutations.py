"""Does the suite see every known mistake of two-tower training? Each is made on purpose, and must
turn a test red.

    python -m experiments.benchmarks.mutations [--quick] [--trap=N] [--jobs=N] [--json=FILE]

`mistakes.py` holds the mistakes: functions in the place of right ones. A child process puts one in
its place, in memory alone, and runs the tests that are marked with the number of its trap. First
these run without any mistake, to show that they are green. Exits with 1 unless they are and every
mistake is caught. A mistake is "broken" where a test fails in another way than by what it asserts.
"""

from __future__ import annotations

import ast
import importlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from twotower.runtime import program_folder

# As tests/conftest.py has it: JAX reads its environment when it is imported, which is here before
# the children are forked.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(program_folder("twotower-tests")))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import pytest
from absl import app, flags

from experiments.benchmarks import harness
from experiments.benchmarks.mistakes import MISTAKES, Mistake

TRAP = flags.DEFINE_integer("trap", 0, "Only the mistakes of this number; 0 makes all.")
JOBS = flags.DEFINE_integer("jobs", os.cpu_count() or 1, "Processes at once.", lower_bound=1)

ROOT = Path(__file__).resolve().parents[2]
QUICK_TRAPS = (2, 10, 19, 21, 26, 33)  # one of each theme, with tests of seconds
MAX_SECONDS = 1_800  # for some tests in a child
# Imported once, before children are forked; none of it starts a backend of JAX.
COMMON_IMPORTS = ("flax.linen", "optax", "orbax.checkpoint", "pyarrow.parquet", "jaxtyping")
# A test that fails by one of these has not seen the mistake: the wrong function does not run.
CRASHES = (NameError, AttributeError, ImportError, LookupError, TypeError, ValueError)


class Outcome(NamedTuple):
    """The outcome of some tests."""

    result: str  # "caught", "missed" or "broken" with a mistake; "green" or "red" without one
    by: str  # first test that failed, and its error
    seconds: float
    times: Mapping[str, float]  # seconds of each test


def find_tests() -> dict[int, list[str]]:
    """Returns the ids of the tests marked with each trap, wherever they are."""
    tests: dict[int, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        nodes = ast.parse(text).body if "mark.trap(" in text else []
        for test in [node for node in nodes if isinstance(node, ast.FunctionDef)]:
            marks = [ast.unparse(decorator) for decorator in test.decorator_list]
            for trap in re.findall(r"pytest\.mark\.trap\((\d+)\)", " ".join(marks)):
                tests.setdefault(int(trap), []).append(f"{path.relative_to(ROOT)}::{test.name}")
    return tests


class _Watch:
    """A plugin of pytest that makes the mistake, and keeps what fails first and the time of each
    test, whatever its parameters."""

    def __init__(self, mistake: Mistake | None) -> None:
        self._mistake = mistake
        self.by = ""
        self.crashed = False
        self.times: dict[str, float] = {}

    def pytest_sessionstart(self) -> None:
        # No earlier: the package must be imported after the hook that tests/conftest.py installs.
        if self._mistake:
            self._mistake.put_in_place()

    def pytest_exception_interact(self, node: Any, call: Any) -> None:
        if not self.by:
            kind = call.excinfo.type
            self.by = f"{kind.__name__}: {node.nodeid}"
            # Errors of the package say that it refused something: it works as it should.
            own = kind.__module__.startswith("twotower")
            self.crashed = issubclass(kind, CRASHES) and not own

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = report.nodeid.partition("[")[0]
        self.times[test] = self.times.get(test, 0.0) + report.duration


def _run_tests(tests: Sequence[str], mistake: Mistake | None, answer: Path) -> None:
    """Runs tests, with a mistake if there is one, and writes what happened to a file."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os.chdir(ROOT)
    sys.dont_write_bytecode = True
    watch = _Watch(mistake)
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], plugins=[watch])
    result = {0: "missed", 1: "broken" if watch.crashed else "caught"}.get(code, "broken")
    if mistake is None:
        result = "red" if code else "green"
    answer.write_text(json.dumps([result, watch.by, watch.times]))
    os._exit(0)  # without waiting for threads of what was imported


def attempt(tests: Sequence[str], mistake: Mistake | None = None) -> Outcome:
    """Returns the outcome of tests in a child process, with a mistake if there is one."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        arguments = (tests, mistake, answer)
        child = multiprocessing.get_context("fork").Process(target=_run_tests, args=arguments)
        child.start()
        child.join(MAX_SECONDS)
        child.kill()
        child.join()
        result, by, times = "broken" if mistake else "red", "no answer", {}
        if answer.exists():
            result, by, times = json.loads(answer.read_text())
    return Outcome(result, by, round(time.perf_counter() - start, 1), times)


def main(argv: list[str]) -> None:
    del argv
    for module in COMMON_IMPORTS:
        importlib.import_module(module)
    mistakes = [mistake for mistake in MISTAKES if TRAP.value in (0, mistake.trap)]
    if harness.QUICK.value:
        mistakes = [mistake for mistake in mistakes if mistake.trap in QUICK_TRAPS]
    tests = find_tests()
    all_tests = dict.fromkeys(test for mistake in mistakes for test in tests[mistake.trap])
    rows = []
    with ThreadPoolExecutor(JOBS.value) as pool:
        before = attempt(list(all_tests))
        shown = f"{before.result} ({before.seconds} s) {before.by}"
        print(f"Without a mistake the tests are {shown}", flush=True)
        # Quick tests first: a mistake is caught by the first that fails.
        for names in tests.values():
            names.sort(key=lambda name: before.times.get(name, 0.0))
        made = mistakes if before.result == "green" else []
        outcomes = pool.map(lambda m: attempt(tests[m.trap], m), made)
        for mistake, outcome in zip(made, outcomes):
            line = (
                f"{mistake.trap:4}  {outcome.result:8}{outcome.seconds:5.1f} s  {mistake.what:52}"
            )
            print(f"{line}  {outcome.by}", flush=True)
            row = {"trap": mistake.trap, "mistake": mistake.what, "target": mistake.target}
            rows.append(row | outcome._replace(times={})._asdict())
    caught = sum(row["result"] == "caught" for row in rows)
    print(
        f"{caught} of {len(mistakes)} mistakes caught, of {len({m.trap for m in mistakes})} traps."
    )
    if harness.JSON.value:
        measured = {"benchmark": "mutations", "kit": before._asdict(), "results": rows}
        Path(harness.JSON.value).write_text(json.dumps(measured, indent=2))
    sys.exit(caught < len(mistakes))


if __name__ == "__main__":
    app.run(main)
