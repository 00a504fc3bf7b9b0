"""Does the conformance kit see every known mistake of two-tower training? Each is made on purpose,
and must turn a test red.

    python -m experiments.benchmarks.mutations [--quick] [--trap=N] [--jobs=N] [--json=FILE]

The mistakes are listed in the files `mistakes*.py` beside this one: a snippet of a module of
twotower and what takes its place. A child process compiles the module with the change (no file is
touched) and runs the tests of `tests/conformance` that are marked with the trap's number. First
they run without any change, to show that they are green. Exits with 1 unless they are and every
mistake is caught. "broken" is a mistake that fails in another way than by what a test asserts: one
that cannot be made as it is written.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

from experiments.benchmarks import harness
from experiments.benchmarks.mistakes import EVALUATION, INDEX, Mistake
from experiments.benchmarks.mistakes_losses import CORRECTION, NEGATIVES
from experiments.benchmarks.mistakes_training import DEVICES, STATE, TABLES

TRAP = flags.DEFINE_integer("trap", 0, "Only the mistakes of this number; 0 makes all.")
JOBS = flags.DEFINE_integer("jobs", os.cpu_count() or 1, "Processes at once.", lower_bound=1)

THEMES = (CORRECTION, NEGATIVES, DEVICES, TABLES, STATE, EVALUATION, INDEX)
MISTAKES = tuple(sorted(itertools.chain(*THEMES), key=lambda mistake: mistake.trap))
ROOT = Path(__file__).resolve().parents[2]
KIT = ROOT / "tests" / "conformance"
SECONDS = 900  # that a child may take
# Imported once, before the children are forked; none of it starts a backend of JAX.
COMMON = (
    "jax",
    "flax.linen",
    "optax",
    "orbax.checkpoint",
    "pyarrow.compute",
    "pyarrow.csv",
    "pyarrow.parquet",
    "pytest",
    "beartype",
    "jaxtyping",
    "ml_collections",
    "tqdm",
)
# A test that fails by one of these has not seen the mistake: the changed text does not run.
UNFIT = (
    "NameError",
    "AttributeError",
    "SyntaxError",
    "ImportError",
    "UnboundLocalError",
    "TypeError",
    "TypeCheckError",
    "ValueError",
    "IndexError",
    "KeyError",
)


class Outcome(NamedTuple):
    """What came of some tests.

    Attributes:
        result: "caught", "missed" or "broken" with a mistake; "green" or "red" without one.
        by: the first test that failed, and how.
        times: test -> seconds.
    """

    result: str
    by: str
    seconds: float
    times: Mapping[str, float]


def tests_by_trap() -> dict[int, list[str]]:
    """Trap -> the ids of the tests that are marked with it, read from the files of the kit."""
    found: dict[int, list[str]] = {}
    for path in sorted(KIT.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for number in traps_of(node):
                found.setdefault(number, []).append(f"{path.relative_to(ROOT)}::{node.name}")
    return found


def traps_of(node: ast.AST) -> list[int]:
    """The numbers of `@pytest.mark.trap(number)` over a function."""
    calls = [d for d in getattr(node, "decorator_list", []) if isinstance(d, ast.Call)]
    return [d.args[0].value for d in calls if ast.unparse(d.func) == "pytest.mark.trap"]


def changed_sources(mistake: Mistake) -> dict[str, str]:
    """Module -> its text with the mistake.

    Raises:
        ValueError: a snippet does not stand in its module exactly once.
    """
    texts: dict[str, str] = {}
    for module, old, new in mistake.edits:
        path = ROOT / "twotower" / f"{module.replace('.', '/')}.py"
        text = texts.get(module) or path.read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise ValueError(
                f"{mistake.trap}, {mistake.what}: twotower.{module} holds {text.count(old)} times, not once:\n{old}"
            )
        texts[module] = text.replace(old, new)
    return {f"twotower.{module}".removesuffix(".__init__"): text for module, text in texts.items()}


class Attempt:
    """Tests in a child process, with a mistake if there is one; started when it is made.

    Args:
        cache: a folder for compiled programs: most of a mistake's programs are those without it.
    """

    def __init__(self, tests: Sequence[str], mistake: Mistake | None, cache: str) -> None:
        context, self.mistake, self._start = (
            multiprocessing.get_context("fork"),
            mistake,
            time.perf_counter(),
        )
        self.answer, send = context.Pipe(duplex=False)
        sources = changed_sources(mistake) if mistake else {}
        self._child = context.Process(target=_child, args=(list(tests), sources, cache, send))
        self._child.start()
        send.close()

    def outcome(self, seconds: float = SECONDS) -> Outcome:
        """Waits for the child, and ends it when it takes longer than `seconds`."""
        code, error, test, times = None, "", f"no answer within {seconds} s", {}
        if self.answer.poll(seconds):
            with contextlib.suppress(EOFError):
                code, error, test, times = self.answer.recv()
        self._child.kill()
        self._child.join()
        result = _judge(code, error)
        if self.mistake is None:
            result = "green" if result == "missed" else "red"
        return Outcome(
            result,
            ": ".join(filter(None, (error, test))),
            round(time.perf_counter() - self._start, 1),
            times,
        )


def attempt_all(
    mistakes: Sequence[Mistake], tests: Mapping[int, list[str]], jobs: int, cache: str
) -> Iterator[tuple[Mistake, Outcome]]:
    """What comes of each mistake, as it comes; `jobs` children at once."""
    left, running = list(mistakes), []
    while left or running:
        while left and len(running) < jobs:
            mistake = left.pop(0)
            running.append(Attempt(tests[mistake.trap], mistake, cache))
        ready = connection.wait([attempt.answer for attempt in running], SECONDS)
        for attempt in [a for a in running if a.answer in ready] or running[:1]:
            running.remove(attempt)
            yield attempt.mistake, attempt.outcome(0)


def _judge(code: int | None, error: str) -> str:
    if code == 0:
        return "missed"
    return "caught" if code == 1 and error and not error.endswith(UNFIT) else "broken"


def _child(tests: list[str], sources: Mapping[str, str], cache: str, send: Any) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1), os.dup2(silence, 2)
    os.chdir(ROOT)
    sys.dont_write_bytecode = True
    import jax
    import pytest

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    changed, watch = _change(sources), _Watch()
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], plugins=[watch])
    unread = ", ".join(sources.keys() - changed)
    send.send(
        (None, "", f"{unread} is not imported", {})
        if unread
        else (int(code), watch.error, watch.test, watch.times)
    )
    send.close()
    os._exit(0)  # without waiting for threads of what was imported


def _change(sources: Mapping[str, str]) -> set[str]:
    """Modules are compiled from `sources` instead of their files, under whatever import hook; those
    that were, as it goes on."""
    original, changed = SourceFileLoader.get_code, set()

    def get_code(self: SourceFileLoader, name: str) -> Any:
        if name not in sources:
            return original(self, name)
        changed.add(name)
        return self.source_to_code(sources[name].encode(), self.path)

    SourceFileLoader.get_code = get_code
    return changed


class _Watch:
    """A plugin of pytest: what failed first, by which error, and how long each test took, whatever
    its parameters."""

    def __init__(self) -> None:
        self.test, self.error, self.times = "", "", dict[str, float]()

    def pytest_exception_interact(self, node: Any, call: Any) -> None:
        if not self.test:
            self.test, self.error = (
                node.nodeid.removeprefix("tests/conformance/"),
                call.excinfo.type.__name__,
            )

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = report.nodeid.partition("[")[0]
        self.times[test] = self.times.get(test, 0.0) + report.duration


def chosen(*, trap: int, quick: bool) -> list[Mistake]:
    """The mistakes to make: all, those of a trap, or the first of each theme."""
    known = [theme[0] for theme in THEMES] if quick else MISTAKES
    return [mistake for mistake in known if trap in (0, mistake.trap)]


def main(argv: list[str]) -> None:
    for module in COMMON:
        importlib.import_module(module)
    mistakes, tests, rows = chosen(trap=TRAP.value, quick=harness.QUICK.value), tests_by_trap(), []
    with tempfile.TemporaryDirectory() as cache:
        before = Attempt(
            list(dict.fromkeys(t for m in mistakes for t in tests[m.trap])), None, cache
        ).outcome()
        print(
            f"Without a mistake the kit is {before.result} ({before.seconds} s) {before.by}",
            flush=True,
        )
        # Quick tests first: a mistake is caught by the first that fails.
        tests = {
            trap: sorted(names, key=lambda name: before.times.get(name, 0.0))
            for trap, names in tests.items()
        }
        for mistake, outcome in (
            attempt_all(mistakes, tests, JOBS.value, cache) if before.result == "green" else ()
        ):
            where = ", ".join(dict.fromkeys(module for module, *_ in mistake.edits))
            rows.append(
                {"trap": mistake.trap, "mistake": mistake.what, "where": where}
                | outcome._replace(times={})._asdict()
            )
            print(
                f"{mistake.trap:4}  {outcome.result:8}{outcome.seconds:5.1f} s  {mistake.what:52}  {where}",
                flush=True,
            )
    rows.sort(key=lambda row: row["trap"])
    caught = [row for row in rows if row["result"] == "caught"]
    for row in [row for row in rows if row not in caught]:
        print(
            f"Not caught: {row['trap']}, {row['mistake']} ({row['where']}): {row['result']} {row['by']}"
        )
    print(
        f"{len(caught)} of {len(mistakes)} mistakes caught, of {len({m.trap for m in mistakes})} traps."
    )
    if harness.JSON.value:
        measured = {"benchmark": "mutations", "kit": before._asdict(), "results": rows}
        Path(harness.JSON.value).write_text(json.dumps(measured, indent=2))
    sys.exit(len(caught) < len(mistakes))


if __name__ == "__main__":
    app.run(main)
