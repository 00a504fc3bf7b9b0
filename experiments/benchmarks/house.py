"""Measures how the package reads: its size, its density and what a reader must load to follow it.

    python -m experiments.benchmarks.house [--root=FOLDER] [--quick] [--suite] [--json=FILE]

`--root` names another checkout, to compare with. Lines are counted after the formatter has laid the
code out at 100 columns without suppressions, whatever the layout in the files is; `--quick` leaves
the type checker out; `--suite` runs the tests too, as `launch_local.sh test` does, for their time.
"""

from __future__ import annotations

import ast
import io
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import tokenize
from pathlib import Path

from absl import app, flags

from experiments.benchmarks import harness

_ROOT = flags.DEFINE_string("root", "", "The checkout to measure; by default this one.")
_SUITE = flags.DEFINE_bool("suite", False, "Runs the test suite, which takes minutes.")

FOR_TOOLS = re.compile(r"#\s*(fmt|noqa|type|pyright|!)")
SUPPRESSION = re.compile(r"#\s*fmt:\s*(skip|off)")
# The modules whose imports tell how much a reader needs, by the file that holds each.
ENTRIES = ("match", "checkpoint", "loop", "retriever")
COUNT_MODULES = """
import importlib, sys
importlib.import_module(sys.argv[1])
files = [m for m in sys.modules.values() if getattr(m, "__name__", "").startswith("twotower.")]
print(sum(not hasattr(m, "__path__") for m in files))
"""


def package_files(root: Path) -> list[Path]:
    """Returns the package's modules that hold anything."""
    paths = sorted((root / "twotower").rglob("*.py"))
    return [path for path in paths if path.read_text(encoding="utf-8").strip()]


def docstring_lines(tree: ast.AST) -> set[int]:
    """Returns the numbers of the lines that docstrings take."""
    lines: set[int] = set()
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            first = node.body[0]
            lines |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def comments_of(text: str) -> list[tokenize.TokenInfo]:
    """Returns the comments of a file, those for tools left out."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    return [token for token in comments if not FOR_TOOLS.match(token.string)]


def density(paths: list[Path]) -> dict[str, float]:
    """Returns the mean columns of code lines, and lines with a comment as a share of code lines."""
    columns: list[int] = []
    comments = 0
    for path in paths:
        text = path.read_text(encoding="utf-8")
        found = comments_of(text)
        comments += len(found)
        alone = {c.start[0] for c in found if not c.line[: c.start[1]].strip()}
        apart = docstring_lines(ast.parse(text)) | alone
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip() and number not in apart:
                columns.append(len(line.rstrip()))
    return {
        "mean columns of a code line": round(sum(columns) / len(columns), 1),
        "lines with a comment, % of code lines": round(100 * comments / len(columns), 1),
    }


def lines_when_formatted(root: Path) -> int:
    """Returns the package's lines as the formatter lays them out at 100 columns."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "twotower"
        shutil.copytree(root / "twotower", copy)
        paths = sorted(copy.rglob("*.py"))
        for path in paths:
            path.write_text(SUPPRESSION.sub("#", path.read_text(encoding="utf-8")))
        command = [sys.executable, "-m", "ruff", "format", "--quiet", "--isolated"]
        subprocess.run([*command, "--line-length=100", folder], check=True)
        return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def count_modules(root: Path, name: str) -> int:
    """Returns how many modules of the package an import of the file `name` loads."""
    path = next((root / "twotower").rglob(f"{name}.py"))
    module = ".".join(path.relative_to(root).with_suffix("").parts)
    command = [sys.executable, "-c", COUNT_MODULES, module]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def type_errors(root: Path) -> int:
    """Returns how many errors pyright finds in standard mode."""
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run([*command, "twotower"], cwd=root, capture_output=True, text=True)
    return json.loads(done.stdout)["summary"]["errorCount"]


def time_of_suite(root: Path) -> dict[str, float]:
    """Runs the test suite of a checkout; returns its minutes, and the seconds of processors."""
    options = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "-q"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=root, stdout=subprocess.PIPE, text=True
    )
    minutes = (time.perf_counter() - start) / 60
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(done.stdout.strip().splitlines()[-1])
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "minutes of the test suite": round(minutes, 1),
        "seconds of processors in it": round(seconds),
    }


def measure(root: Path, *, types: bool) -> dict[str, float]:
    """Returns the figures of a checkout by name."""
    paths = package_files(root)
    sources = [
        path for top in ("twotower", "experiments", "tests") for path in (root / top).rglob("*.py")
    ]
    texts = [path.read_text(encoding="utf-8") for path in sources]
    folders = {path.parent for path in paths}
    figures: dict[str, float] = {
        "files of the package": len(paths),
        "lines at 100 columns": lines_when_formatted(root),
        "formatter suppressions": sum(len(SUPPRESSION.findall(text)) for text in texts),
        **density(paths),
        "files in the largest folder": max(len(list(f.glob("*.py"))) for f in folders),
    }
    figures |= {f"modules that {name} loads": count_modules(root, name) for name in ENTRIES}
    if types:
        figures["errors of the type checker"] = type_errors(root)
    return figures


def main(argv: list[str]) -> None:
    del argv
    root = Path(_ROOT.value).resolve() if _ROOT.value else Path(__file__).resolve().parents[2]
    figures = measure(root, types=not harness.QUICK.value)
    if _SUITE.value:
        figures |= time_of_suite(root)
    for name, value in figures.items():
        print(f"{name:34} {value:>10,}")
    if harness.JSON.value:
        Path(harness.JSON.value).write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    app.run(main)
