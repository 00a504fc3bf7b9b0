"""Every file of a bundle of everything, of the log of its changes and of a match model: cut off,
emptied, changed, missing, of another run or of another version. None is read, each is named; only
an index that is missing is done without."""

import json
import shutil

import pytest

from tests.retrieval.runs import make_run, rewrite_manifest, with_other_weights, write
from twotower.core.errors import BundleError, ChangesError, FolderError
from twotower.core.files import current_version
from twotower.retrieval.bundle import load_bundle
from twotower.retrieval.match import MatchModel
from twotower.retrieval.retriever import Retriever

pytestmark = pytest.mark.slow

FEATURES = {
    "user": {
        "user_id": {"type": "string", "embedding_size": 8},
        "history": {"type": "history", "max_length": 5},
    },
    "item": {
        "item_id": {"type": "string", "embedding_size": 8},
        "title": {"type": "text", "embedding_size": 4},
        "price": {"type": "float"},
    },
}
KIND = "scann_tree_ah"  # with the most files
DAMAGES = {
    "cut off": lambda data, other: data[: len(data) // 2],
    "emptied": lambda data, other: b"",
    "changed": lambda data, other: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]
    ),
    "of another run": lambda data, other: other,
    "missing": lambda data, other: None,
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Two folders with bundles of all that a bundle may hold, each with a match model and a log of
    changes beside it."""
    pytest.importorskip("scann.scann_ops.py.scann_ops_pybind", reason="scann has no wheel here")
    sections = {
        "data": {"num_items": 1_200},
        "features": FEATURES,
        "model": {"history": {"kind": "bag"}},
        "retrieval": {"index": KIND, "popularity": True},
    }
    one = make_run(tmp_path_factory.mktemp("run"), **sections)
    other = with_other_weights(one, tmp_path_factory.mktemp("other"))
    folders = []
    for row, run in enumerate((one, other)):
        retriever = Retriever.load(write(run))
        MatchModel.from_bundle(retriever.bundle).save(run.workdir / "match")
        retriever.upsert([{"item_id": "new", "title": "lamp", "price": 3.0}])
        assert retriever.delete([retriever.bundle.items["item_id"][row].as_py()]) == 1
        assert retriever.bundle.index.kind == KIND
        folders.append(run.workdir)
    return folders


def each_damaged(folder, other, damage):
    """Yields each file after it was damaged, and puts it back."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert {path.relative_to(folder) for path in files} == {
        p.relative_to(other) for p in other.rglob("*") if p.is_file()
    }
    for path in files:
        original = path.read_bytes()
        spoilt = DAMAGES[damage](original, (other / path.relative_to(folder)).read_bytes())
        if spoilt == original:  # what two runs share
            continue
        path.unlink() if spoilt is None else path.write_bytes(spoilt)
        yield path
        path.write_bytes(original)


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_of_a_bundle(bundles, damage):
    folder, other = (current_version(run / "bundle") for run in bundles)
    hashed = set(json.loads((folder / "manifest.json").read_text())["files"])
    assert hashed == {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {
        "manifest.json"
    }
    damaged = set()
    whole = load_bundle(folder).index
    for path in each_damaged(folder, other, damage):
        damaged.add(str(path.relative_to(folder)))
        if damage == "missing" and path.parent.name == "index":
            index = load_bundle(folder).index
            # With the coordinate of popularity, as the index had it.
            assert (index.kind, index.dim) == ("exact", whole.dim)
            continue
        with pytest.raises(BundleError) as refused:
            load_bundle(folder)
        # Another manifest is whole: the first file that is not its own is named.
        named = refused.value.args[0]
        assert path.name in named or (
            path.name == "manifest.json" and damage == "of another run" and "is corrupt" in named
        )
    assert load_bundle(folder).index.kind == KIND
    for part in (
        "manifest.json",
        "params.npz",
        "item_vectors.npy",
        "user_vectors.npy",
        "index/index.json",
    ):
        assert part in damaged
    assert {name.split("/")[0] for name in damaged} >= {"tables", "index", "manifest.json"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_of_a_match_model(bundles, damage):
    folder, other = (run / "match" for run in bundles)
    damaged = []
    for path in each_damaged(folder, other, damage):
        with pytest.raises(FolderError) as refused:
            MatchModel.load(folder)
        # Of another run match.json is whole, and the first file that is not its own is named.
        assert path.name in str(refused.value) or (
            path.name == "match.json" and damage == "of another run"
        )
        damaged.append(path.name)
    assert MatchModel.load(folder).dim == 16 and len(damaged) >= 3


@pytest.mark.parametrize("damage", ["cut off", "changed", "of another run", "of another version"])
def test_the_log_of_changes(bundles, damage):
    """See test_log for every byte of it. Without a log there are no changes."""
    logs = [next(run.glob("bundle/*.changes")) for run in bundles]
    original = logs[0].read_bytes()
    spoil = DAMAGES | {"of another version": lambda data, _: data[:60] + b"9999" + data[64:]}
    logs[0].write_bytes(spoil[damage](original, logs[1].read_bytes()))
    try:
        with pytest.raises(ChangesError, match=logs[0].name):
            Retriever.load(bundles[0] / "bundle")
    finally:
        logs[0].write_bytes(original)
    retriever = Retriever.load(bundles[0] / "bundle")
    assert len(retriever) == len(retriever.bundle.items) and retriever.changes == 2


def test_files_of_another_version_though_their_hashes_fit(bundles, tmp_path):
    """As a newer or older twotower would leave them."""
    folder = shutil.copytree(current_version(bundles[0] / "bundle"), tmp_path / "bundle")
    versioned = [
        path for path in folder.rglob("*.json") if "version" in json.loads(path.read_text())
    ]
    assert versioned
    for path in versioned:
        original = path.read_bytes()
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"version": 99}))
        rewrite_manifest(folder)
        with pytest.raises(BundleError, match=rf"{path.name} has version 99"):
            load_bundle(folder)
        path.write_bytes(original)
    rewrite_manifest(folder, format_version=1)
    with pytest.raises(BundleError, match=r"manifest\.json has format version 1"):
        load_bundle(folder)
    match = shutil.copytree(bundles[0] / "match", tmp_path / "match")
    content = json.loads((match / "match.json").read_text())
    (match / "match.json").write_text(json.dumps(content | {"version": 99}))
    with pytest.raises(FolderError, match=r"match\.json has version 99"):
        MatchModel.load(match)
