"""The wheel: what is in it, what it says of itself, and that it works from an empty folder."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import twotower
from tests.extras import extra

ROOT = Path(__file__).parents[1]
# One process for the commands that follow a training: each start costs seconds. `evaluate` is left
# out: that the wheel holds every file of the package is seen in its list.
COMMANDS = """
import sys
import twotower
from twotower.__main__ import main
print(twotower.__file__)
for arguments in (["export"], ["query", "--user=1", "--k=3"]):
    sys.argv = ["twotower", arguments[0], "--workdir=run", *arguments[1:]]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, ended.code
sys.argv = ["twotower", "export", "--workdir=nowhere"]
main()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built without a network."""
    extra("setuptools.command.bdist_wheel", "dev")
    folder = tmp_path_factory.mktemp("wheel")
    # A copy: a build leaves folders behind, which a later one would take files from.
    source = folder / "source"
    for name in ("twotower", "experiments"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_it_holds_the_package_and_what_it_ships(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    version = twotower.__version__
    assert {name.split("/")[0] for name in names} == {
        "twotower",
        f"twotower-{version}.dist-info",
    }
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "twotower").rglob("*.py")}
    experiments = ROOT / "experiments"
    configs = [path for path in (experiments / "configs").rglob("*.py") if path.stem != "__init__"]
    others = [*(experiments / "features").glob("*"), *(experiments / "examples/tables").glob("*")]
    shipped = {f"twotower/shipped/{path.relative_to(experiments)}" for path in [*configs, *others]}
    held = {name for name in names if name.startswith("twotower/")}
    endings = ("*.css", "*.html", "*.js", "*.sql", "*.svg")
    pages = [path for ending in endings for path in (ROOT / "twotower").rglob(ending)]
    static = {str(path.relative_to(ROOT)) for path in pages}
    assert held == package | shipped | static | {"twotower/py.typed"}


@pytest.mark.slow
def test_its_metadata_is_complete(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = HeaderParser().parsestr(archive.read(name).decode())
        (name,) = [name for name in archive.namelist() if name.endswith("/entry_points.txt")]
        assert "twotower = twotower.__main__:main" in archive.read(name).decode()
    assert metadata["Name"] == "twotower" and metadata["Version"] == twotower.__version__
    assert metadata["License-Expression"] == "MIT" and metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    # Messages tell users to install extras by these names.
    assert extras_of_messages() <= set(metadata.get_all("Provides-Extra"))


def extras_of_messages() -> set[str]:
    """Returns the names of extras that the package tells its users to install."""
    names = set()
    for path in (ROOT / "twotower").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        names |= set(re.findall(r"\b(?:extra|install_line)\(\s*[\"'](\w+)[\"']", text))
        names |= set(re.findall(r"\bextra=[\"'](\w+)[\"']", text))
    return names


def test_messages_name_extras():
    assert {"bigquery", "mlflow", "plots", "redis", "text"} <= extras_of_messages()


def test_what_is_shipped_needs_the_package_alone():
    """In a wheel there is no package `experiments` for it to import from."""
    for path in (ROOT / "experiments" / "configs").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in getattr(node, "names", [])]
            module = getattr(node, "module", None)
            assert not any(name.startswith("experiments") for name in [*names, module or ""]), path


@pytest.mark.slow
def test_it_trains_and_answers_in_an_empty_folder(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    folder = tmp_path / "empty"
    folder.mkdir()
    env = os.environ | {"PYTHONPATH": str(tmp_path / "installed"), "JAX_PLATFORMS": "cpu"}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True
        )

    train = ["-m", "twotower", "train", "--config=quickstart", "--workdir=run"]
    options = ["data.num_interactions=1000", "training.batch_size=64", "training.steps=4"]
    options.append("training.validate_every=4")
    done = run(*train, *(f"--config.{option}" for option in options))
    assert done.returncode == 0, done.stderr
    done = run("-c", COMMANDS)
    # Of the last command, as it is given where no checkout is.
    assert "twotower train --config=quickstart --workdir=nowhere" in done.stderr, done.stderr
    assert str(tmp_path / "installed") in done.stdout
    assert "Recommended to user 1:" in done.stdout
    assert [path.name for path in folder.iterdir()] == ["run"]
