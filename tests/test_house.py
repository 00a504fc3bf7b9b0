"""The rules of the house: imports go down, nothing unasked for is loaded, every option is read by
something."""

import ast
import dataclasses
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from twotower import config

ROOT = Path(__file__).parent.parent
# What each part of the package may import: itself and these.
CORE = ("core",)
BELOW_TRAINING = (
    "core",
    "config",
    "data",
    "features",
    "pipeline",
    "kernels",
    "towers",
    "objectives",
)
BELOW_RETRIEVAL = (*BELOW_TRAINING, "plugins", "training", "index")
MAY_IMPORT = {
    "core": (),
    "runtime": (),
    "config_rules": ("core", "config"),
    "config": ("core", "config_rules"),
    "data": ("core", "config"),
    "features": ("core", "config", "data"),
    "pipeline": ("core", "config", "data", "features"),
    "kernels": ("core",),
    "towers": ("core", "config", "data", "features", "pipeline", "kernels"),
    "objectives": ("core", "config", "data", "features", "pipeline", "kernels", "towers"),
    "plugins": ("core", "config"),
    "training": (*BELOW_TRAINING, "plugins"),
    "index": ("core", "config", "kernels"),
    "retrieval": BELOW_RETRIEVAL,
    "evaluation": (*BELOW_RETRIEVAL, "retrieval"),
    "register": (*BELOW_RETRIEVAL, "retrieval"),
    "integrations": (*BELOW_RETRIEVAL, "retrieval", "evaluation"),
    "serving": (*BELOW_RETRIEVAL, "retrieval"),
    "experiment": ("core", "config"),
    "recommended": ("core", "config", "data"),
    "refitting": (*BELOW_TRAINING, "training", "fitting"),
    "fitting": (*BELOW_TRAINING, "training", "recommended", "experiment"),
    "sweeps": (*BELOW_RETRIEVAL, "retrieval", "evaluation", "experiment"),
    "api": (
        *BELOW_RETRIEVAL,
        "retrieval",
        "evaluation",
        "integrations",
        "serving",
        "experiment",
        "sweeps",
        "recommended",
        "fitting",
        "refitting",
    ),
}
MAY_IMPORT["dry_run"] = (*MAY_IMPORT["api"], "api")
MAY_IMPORT["inspection"] = (*MAY_IMPORT["dry_run"], "dry_run")
MAY_IMPORT["commands"] = (*MAY_IMPORT["inspection"], "inspection", "runtime")
MAY_IMPORT["__main__"] = (*MAY_IMPORT["commands"], "commands")
MAY_IMPORT["experiments"] = MAY_IMPORT["__main__"]
MAY_IMPORT[""] = (*MAY_IMPORT["experiments"], "register")  # the front door hands names on, lazily
MAX_FILES = 15
ADDRESS = re.compile(r"twotower(\.\w+)+:\w+")
# google.cloud itself is an empty namespace that orbax looks into
HEAVY = (
    "apache_beam",
    "array_record",
    "faiss",
    "fastapi",
    "grain",
    "hnswlib",
    "google.cloud.bigquery",
    "google.cloud.storage",
    "matplotlib",
    "mlflow",
    "msgspec",
    "optuna",
    "redis",
    "scann",
    "onnxruntime",
    "sentence_transformers",
    "starlette",
    "tensorboardX",
    "tensorflow",
    "tensorflow_datasets",
    "tokenizers",
    "torch",
    "umap",
    "uvicorn",
)


def sources() -> list[Path]:
    return sorted(
        path for package in ("twotower", "experiments") for path in (ROOT / package).rglob("*.py")
    )


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(module: str) -> str | None:
    """The layer of a module of this project, "" for the bare package, None for other people's
    modules."""
    top, *rest = module.split(".")
    return top if top == "experiments" else (rest[0] if rest else "") if top == "twotower" else None


class Names(NamedTuple):
    """What the text of a file names.

    Attributes:
        imports: Every module that it imports, anywhere in it, and the line.
        addresses: Every kind that it names by its address, to be imported when it is asked for, and
            the line.
        read: The attributes that it reads, and those that a loss names as its constants.
    """

    imports: list[tuple[str, int]]
    addresses: list[tuple[str, int]]
    read: set[str]


def names_of(path: Path) -> Names:
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    return read_names(path.read_text(encoding="utf-8"), package)


# Several tests ask of all files: a second walk would cost what the first one does.
@functools.cache
def read_names(text: str, package: str) -> Names:
    """Returns what a file of a package names."""
    names = Names([], [], set())
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names.imports.extend((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            module = ".".join([*above, *filter(None, [node.module])])
            names.imports.extend((f"{module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, str) and ADDRESS.fullmatch(node.value):
                names.addresses.append((node.value.replace(":", "."), node.lineno))
        elif isinstance(node, ast.Attribute):
            if isinstance(node.ctx, ast.Load):
                names.read.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg == "constants":
            names.read.update(name.value for name in getattr(node.value, "elts", ()))
    return names


def imports(path: Path) -> list[tuple[str, int]]:
    """Every module that a file imports or names by its address, and the line."""
    names = names_of(path)
    return names.imports + names.addresses


def arrows_up(path: Path) -> list[str]:
    """The imports of a file that its layer may not make."""
    source = layer(module_of(path))
    wrong = []
    for module, line in imports(path):
        target = layer(module)
        # The package itself is above nothing: it holds a version and lazy names.
        if target in (None, source, "", "__version__") or target in MAY_IMPORT[source]:
            continue
        arrow = f"({source or 'the package itself'}) imports {module} ({target})"
        wrong.append(f"{path.relative_to(ROOT)}:{line} {arrow}")
    return wrong


def import_graph() -> dict[str, set[str]]:
    """The modules of this project that each one imports, wherever in its file."""
    modules = {module_of(path): path for path in sources()}
    graph = {}
    for module, path in modules.items():
        names = {name for name, _ in imports(path)}
        parents = {name.rpartition(".")[0] for name in names}
        graph[module] = (names | parents) & modules.keys() - {module, "twotower"}
    return graph


# Modules that a reader of an entry point meets, which are those that its import loads; at most.
# Counted as experiments/benchmarks/house.py counts them: packages hold no code of their own.
MAX_LOADED = {
    "twotower.retrieval.match": 5,
    "twotower.training.checkpoint": 10,
    "twotower.training.loop": 40,
    "twotower.retrieval.retriever": 40,
}
DEFERRED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that an import of the file executes: no body of a function, nothing that is for
    type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, DEFERRED):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from run_at_import(child)


def loaded_by(entry: str) -> set[str]:
    """The modules of this project that an import of one loads, itself and packages included."""
    modules = {module_of(path): path for path in sources()}
    loaded = set()
    ahead = [entry]
    while ahead:
        name = ahead.pop()
        if name not in modules or name in loaded:
            continue
        loaded.add(name)
        ahead.append(name.rpartition(".")[0])
        for node in run_at_import(ast.parse(modules[name].read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                ahead += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                ahead += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return loaded


def files_loaded_by(entry: str) -> set[str]:
    packages = {module_of(path) for path in sources() if path.name == "__init__.py"}
    return loaded_by(entry) - packages


@pytest.mark.parametrize("entry", MAX_LOADED)
def test_what_a_reader_of_an_entry_point_must_load_is_little(entry):
    loaded = files_loaded_by(entry)
    assert entry in loaded and len(loaded) <= MAX_LOADED[entry], "\n".join(sorted(loaded))


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import each other in a loop."""
    reached = {}
    for start in graph:
        seen, ahead = set(), list(graph[start])
        while ahead:
            module = ahead.pop()
            if module not in seen:
                seen.add(module)
                ahead += graph[module]
        reached[start] = seen
    groups = {frozenset(b for b in seen if a in reached[b]) for a, seen in reached.items()}
    return sorted(sorted(group) for group in groups if group)


def test_every_module_belongs_to_a_layer():
    assert {layer(module_of(path)) for path in sources()} - {""} <= set(MAY_IMPORT)


def test_no_modules_import_each_other_in_a_circle():
    assert circles(import_graph()) == []


def test_a_circle_is_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_no_folder_has_more_files_than_a_reader_takes_in():
    folders = {path.parent for path in sources() if path.is_relative_to(ROOT / "twotower")}
    counts = {str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) for folder in folders}
    assert {name: count for name, count in counts.items() if count > MAX_FILES} == {}


def test_imports_go_down_only():
    up = [arrow for path in sources() for arrow in arrows_up(path)]
    assert not up, "\n".join(up)


@pytest.mark.parametrize(
    "line",
    [
        "from twotower.training import loop",
        "import twotower.training.loop",
        "from twotower import training",
        "from ..training.loop import train",
        "from .. import training",
        "def f():\n    from experiments import train",
        "from twotower.nowhere import x",
        "import twotower.experiments",
        "KINDS = {'fast': 'twotower.training.loop:train'}",
    ],
)
def test_an_arrow_up_is_seen_however_it_is_written(line, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "twotower" / "data" / "low.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from twotower.config import Config\nfrom twotower import data\n"
        "from . import batches\nimport numpy\n"
    )
    assert arrows_up(path) == []
    path.write_text(line)
    assert len(arrows_up(path)) == 1


IMPORT_ALL = """
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
    loaded = [heavy for heavy in {heavy!r} if heavy in sys.modules]
    if loaded:
        sys.exit(f"import {{name}} loads {{', '.join(loaded)}}")
"""


def load(modules: list[str], heavy: tuple[str, ...]) -> str:
    """Imports `modules` in a fresh Python; says which of them was the first to load one of
    `heavy`."""
    code = IMPORT_ALL.format(modules=modules, heavy=heavy)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    ).stderr.strip()


def test_no_module_loads_what_was_not_asked_for():
    modules = [
        module_of(path)
        for path in sources()
        if layer(module_of(path)) not in ("experiments", "serving")
    ]
    assert load(modules, HEAVY) == ""


def test_the_package_and_its_configuration_load_the_standard_library_alone():
    assert (
        load(
            ["twotower", "twotower.config"],
            (*HEAVY, "jax", "flax", "numpy", "pyarrow", "ml_collections"),
        )
        == ""
    )


def test_what_serves_loads_no_kind_of_feature_or_index_before_a_bundle_has_it():
    registries = [ROOT / "twotower" / file for file in ("features/spec.py", "index/build.py")]
    kinds = {name for path in registries for name, _ in names_of(path).addresses}
    modules = {kind.rpartition(".")[0] for kind in kinds}
    assert len(modules) >= 9
    # The times of a request are read as those of a feature are.
    modules -= {"twotower.features.timestamp", "twotower.features.numeric"}
    assert load(["twotower.retrieval.retriever"], tuple(sorted(modules))) == ""


def test_the_list_of_a_known_user_needs_no_jax():
    """JAX comes with the first user whose vector is not stored, or an index that is exact."""
    answer = ["commands.query", "plugins", "retrieval.batch.listing", "index.scann"]
    assert load([f"twotower.{name}" for name in answer], ("jax", "jaxtyping")) == ""


def test_a_module_that_loads_too_much_is_named():
    assert load(["json", "decimal"], ("decimal",)) == "import decimal loads decimal"


@functools.cache
def attributes_read() -> set[str]:
    """The names of all attributes that the project reads, its configuration and its experiment
    files apart."""
    read = set()
    for path in sources():
        if path.name in ("config.py", "config_rules.py") or "configs" in path.parts:
            continue
        read |= names_of(path).read
    return read


CLASSES = [cls for cls in vars(config).values() if dataclasses.is_dataclass(cls)]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_option_is_read_by_something(cls):
    unread = {field.name for field in dataclasses.fields(cls)} - attributes_read()
    assert not unread, f"{cls.__name__}: nothing reads {', '.join(sorted(unread))}"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_option_is_described(cls):
    """In the docstring of its class; the sections of the whole are described by their own
    classes."""
    names = [
        field.name
        for field in dataclasses.fields(cls)
        if cls not in (config.Config, config.FeaturesConfig)
    ]
    missing = [
        name
        for name in names
        if not re.search(rf"^ +([\w, ]+, )?{name}(, [\w, ]+)?:", cls.__doc__, re.MULTILINE)
    ]
    assert not missing, f"{cls.__name__}: not described: {', '.join(missing)}"


ELSEWHERE = re.compile(
    r"(^|[^A-Za-z0-9_.])/(tmp|work|farm|root|home/[a-z]+|Users/[A-Za-z]+)/"  # paths of one machine
    r"|py"
    r"pi\.org|python"
    r"hosted\.org|npm"
    r"js\.(org|com)|registry\.[a-z]+\.[a-z]+"  # package registries
)


def test_no_file_names_a_machine_or_a_package_registry():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: nothing says which files are the project's")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        found += [
            f"{name}:{n}: {line.strip()}"
            for n, line in enumerate(text.splitlines(), 1)
            if ELSEWHERE.search(line)
        ]
    assert not found, "\n".join(found)
