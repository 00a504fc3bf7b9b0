"""Pages of documentation as programs: each block of a page runs, in the order of the page.

What a block is, its language says: `python` runs in the page's one namespace, `bash` line by line,
`sql` in DuckDB, `json` is read, and `text` is what the block before it printed. A comment before a
block says what else is meant:

    <!-- not run: REASON -->     its syntax and the flags of its commands are checked
    <!-- file: PATH -->          it is the text of a file

The first line of a page may name what its reader has already:

    <!-- given: runs/quickstart, events.csv, plots -->

Of these, `redis` is a server at its usual address, `bigquery` one that has the table shop.events,
and `plots` and `stream` are extras of these names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.experiments.commands import loaded
from twotower.__main__ import COMMANDS
from twotower.commands import launch

ROOT = Path(__file__).parents[1]
LANGUAGES = ("python", "bash", "text", "sql", "json")
_FENCE = re.compile(
    r"(?:^<!-- (?P<note>[^\n]*?) -->\n+)?^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*|[-+]?\.\d+")
# Programs that lines of the shell may start here: none that installs or stays.
_PROGRAMS = ("cat", "cp", "head", "ls", "make", "python", "twotower")
# A reader names the same thing by either.
_LAUNCHES = re.compile(r"^(?:python -m experiments\.|python -m twotower |twotower )(\w+)")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: File of the page.
        line: Line of the page on which the text begins, from 1 on.
        language: What follows the fence.
        note: Comment before the block, without its signs.
        text: The block itself.
    """

    page: Path
    line: int
    language: str
    note: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    def remark(self, kind: str) -> str:
        """Returns what the note says of a kind, such as the reason of "not run"."""
        found, _, said = self.note.partition(": ")
        return said if found == kind else ""


def read_blocks(page: Path) -> list[Block]:
    """Returns the blocks of a page, or the cells of code of a notebook, in their order."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        return [Block(page, number, "python", "", text) for number, text in enumerate(sources, 1)]
    blocks = []
    for found in _FENCE.finditer(text):
        line = text.count("\n", 0, found.start("text")) + 1
        note = found["note"] or ""
        blocks.append(Block(page, line, found["language"].strip(), note, found["text"]))
    return blocks


def given(page: Path) -> list[str]:
    """Returns the names of what a page begins with."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        text = "".join(json.loads(text)["cells"][0]["source"])
    found = re.match(r"<!-- given: (.*) -->\n", text)
    return found[1].split(", ") if found else []


def shell_lines(text: str) -> list[str]:
    """Returns the commands of a block, those over several lines as one, without comments."""
    joined = text.replace("\\\n", " ")
    stripped = (line.strip() for line in joined.splitlines())
    return [line for line in stripped if line and not line.startswith("#")]


class Runner:
    """The blocks of a page, run in a folder.

    Args:
        folder: Working folder of every block.
        replace: Texts of the page that stand for others here, such as the address of a server.
    """

    def __init__(self, folder: Path, replace: dict[str, str]):
        self.folder = folder
        self.replace = replace
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.printed = ""
        self.handled: list[Block] = []

    def run(self, block: Block) -> None:
        """Runs a block, or checks what can be checked of one that is not run."""
        text = block.text
        for old, new in self.replace.items():
            text = text.replace(old, new)
        if block.language not in LANGUAGES and not block.note:
            raise AssertionError(
                f"{block}: a block of the language {block.language!r} must say '<!-- not run: "
                f"REASON -->' or '<!-- file: PATH -->'; those that run are {LANGUAGES}"
            )
        with contextlib.chdir(self.folder):
            if block.remark("file"):
                self._write(block.remark("file"), text)
            elif block.remark("not run"):
                check(block)
            else:
                assert not block.note, f"{block}: {block.note!r} is no known note"
                getattr(self, f"_{block.language}")(block, text)
        self.handled.append(block)

    def _write(self, name: str, text: str) -> None:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def _python(self, block: Block, text: str) -> None:
        # Empty lines before it: a traceback shows the line of the page.
        code = compile("\n" * (block.line - 1) + text, str(block.page), "exec")
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(code, self.names)
        self.printed = output.getvalue()
        check_config(self.names.get("config"))

    def _bash(self, block: Block, text: str) -> None:
        printed = []
        for line in shell_lines(text):
            # What is quoted is no operator of the shell.
            bare = re.sub(r"'[^']*'", "", line)
            if _LAUNCHES.match(line) and not re.search(r"[|;&<>`$]", bare):
                printed.append(run_command(shlex.split(line, comments=True)))
            else:
                printed.append(run_shell(line))
        self.printed = "\n".join(printed)

    def _text(self, block: Block, text: str) -> None:
        """Compares the lines but for their numbers; "..." stands for the rest of a line, or lines.

        The rows of a list begin with a number and hold titles, and are left out.
        """
        printed = [shape(line) for line in self.printed.splitlines()]
        for line in text.splitlines():
            expected = shape(line).removesuffix("...").strip()
            if expected and not expected.startswith("#"):
                found = any(line.startswith(expected) for line in printed)
                assert found, f"{block}: not printed: {line!r}\n{self.printed}"

    def _sql(self, block: Block, text: str) -> None:
        duckdb = importlib.import_module("duckdb")
        assert len(duckdb.sql(text).fetchall()), f"{block}: the query finds nothing"

    def _json(self, block: Block, text: str) -> None:
        json.loads(text)


def shape(line: str) -> str:
    """Returns a line with its numbers as # and its spaces and rules shortened."""
    line = _NUMBER.sub("#", line)
    return re.sub(r"\s+", " ", re.sub(r"-{3,}", "---", line)).strip()


def check_config(config: Any) -> None:
    """Makes the configuration of a page, so that what it shows is accepted."""
    # A page may also show a `Config`, or configure something else by this name.
    if type(config).__name__ == "ConfigDict":
        importlib.import_module("twotower.config").from_dict(config)


def command_of(argv: list[str]) -> contextlib.AbstractContextManager[launch.Command]:
    """Returns `loaded` of a command line: twotower NAME or python -m experiments.NAME."""
    found = _LAUNCHES.match(shlex.join(argv))
    assert found and found[1] in COMMANDS, f"{shlex.join(argv)!r} is no command"
    # The command itself is the last word of what was found.
    first = len(found[0].split())
    return loaded(found[1], argv[first:])


@contextlib.contextmanager
def mistakes_raised() -> Iterator[None]:
    """Raises what a command says of a mistake, in the place of ending the program."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as ended:
        raise AssertionError(f"{ended.code}: {said.getvalue()}") from ended


def run_command(argv: list[str]) -> str:
    """Returns what one of the commands prints that runs in this process."""
    output = io.StringIO()
    with command_of(argv) as module, contextlib.redirect_stdout(output), mistakes_raised():
        launch.call(module.main, launch.parse(module, sys.argv))
    return output.getvalue()


def run_shell(line: str) -> str:
    """Returns what a line of the shell prints."""
    assert line.split()[0] in _PROGRAMS, f"{line!r} must say '<!-- not run: REASON -->'"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", line],
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def check(block: Block) -> None:
    """Checks the syntax of a block that cannot run here, and the flags of its commands."""
    if block.language == "python":
        compile(block.text, str(block.page), "exec")
    if block.language != "bash":
        return
    done = subprocess.run(["bash", "-n", "-c", block.text], capture_output=True, text=True)
    assert not done.returncode, f"{block}: {done.stderr}"
    for line in shell_lines(block.text):
        words = shlex.split(line, comments=True)
        while re.fullmatch(r"\w+=\S*", words[0]):
            words = words[1:]
        if _LAUNCHES.match(shlex.join(words)):
            with command_of(words) as module, mistakes_raised():
                launch.parse(module, sys.argv)
        for word in words:
            if word.endswith(".sh"):
                assert (ROOT / word).is_file(), f"{block}: there is no {word}"
        # A launcher that knows --dry-run prints what it would do, and reads its flags for it.
        script = ROOT / words[min(1, len(words) - 1)]
        if words[0] == "bash" and "--dry-run" in script.read_text(encoding="utf-8"):
            dry = ["bash", str(script), "--dry-run", *words[2:]]
            done = subprocess.run(dry, capture_output=True, text=True, cwd=ROOT)
            assert not done.returncode, f"{block}: {done.stderr}"
