"""MovieLens by the real TFDS builders, with no network and without TensorFlow."""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import types
import zipfile

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from twotower.config import DataConfig
from twotower.core.errors import ConfigError
from twotower.data.sources import tfds
from twotower.data.sources.load import load_dataset

needs_tfds = pytest.mark.skipif(
    not (
        importlib.util.find_spec("tensorflow_datasets") and importlib.util.find_spec("array_record")
    ),
    reason="tensorflow-datasets or array-record is not installed: the extra 'tfds'",
)
SMALL = "movielens/latest-small-ratings"
# A process of its own in which nobody can import TensorFlow, be it installed or not.
WITHOUT_TENSORFLOW = """
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "tensorflow" else super().find_spec(name, path, target)

sys.meta_path = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
from twotower.config import DataConfig
from twotower.data.sources.load import load_dataset

load_dataset(DataConfig(source="tfds", dataset=sys.argv[1], data_dir=sys.argv[2]))
assert "tensorflow" not in sys.modules
"""


def load(dataset, folder):
    return load_dataset(DataConfig(source="tfds", dataset=dataset, data_dir=str(folder)))


@needs_tfds
def test_latest_small_from_the_original_zip(shared_data, tmp_path):
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    shutil.copy(shared_data / "movielens-latest-small" / "ml-latest-small.zip", manual)
    environment = {"HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW, SMALL, tmp_path], check=True, env=environment
    )
    shutil.rmtree(tmp_path / "downloads")
    for record in tmp_path.rglob("*.array_record-*"):
        record.unlink()  # what is left is the columns: the second reading needs nothing else
    data = load(SMALL, tmp_path)
    assert (len(data.interactions), len(data.users), len(data.items)) == (100_836, 610, 9_742)
    assert (
        data.interactions.schema.names == ["user_id", "item_id", "rating", "timestamp"]
        and data.has_catalogue
    )
    first = data.items.filter(pc.equal(data.items["item_id"], "1")).to_pylist()
    assert first == [
        {
            "item_id": "1",
            "title": "Toy Story (1995)",
            "genres": ["Adventure", "Animation", "Children", "Comedy", "Fantasy"],
        }
    ]
    same = (pc.equal(data.interactions[name], "1") for name in ("user_id", "item_id"))
    first = data.interactions.filter(pc.and_(*same))
    assert first.to_pylist() == [
        {"user_id": "1", "item_id": "1", "rating": 4.0, "timestamp": 964982703}
    ]


@needs_tfds
def test_100k_has_features_of_its_users(shared_data, tmp_path, monkeypatch):
    from tensorflow_datasets.structured import movielens

    archive = tmp_path / "downloads" / "ml-100k.zip"
    archive.parent.mkdir()
    ratings = (
        (shared_data / "movielens-100k" / "u.data").read_text().splitlines(keepends=True)[:500]
    )
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("ml-100k/u.data", "".join(ratings))
        for name in ("u.item", "u.user"):
            file.write(shared_data / "movielens-100k" / name, f"ml-100k/{name}")
    infos = dict(movielens.Movielens.url_infos)
    url = next(url for url in infos if url.endswith("ml-100k.zip"))
    known = type(infos[url])(
        archive.stat().st_size, hashlib.sha256(archive.read_bytes()).hexdigest(), "ml-100k.zip"
    )
    monkeypatch.setattr(movielens.Movielens, "url_infos", {**infos, url: known})
    data = load("movielens/100k-ratings", tmp_path)
    expected = sorted(tuple(line.split()) for line in ratings)
    read = data.interactions.set_column(2, "rating", data.interactions["rating"].cast(pa.int64()))
    assert sorted(tuple(map(str, row.values())) for row in read.to_pylist()) == expected
    assert len(data.items) == 1_682
    assert data.users.filter(pc.equal(data.users["user_id"], "196")).to_pylist() == [
        {"user_id": "196", "gender": "M", "age": 49, "occupation": "writer", "zip": "55105"}
    ]


def builder(checksum, url="file:///nowhere/ml-latest-small.zip"):
    known = types.SimpleNamespace(filename="ml-latest-small.zip", checksum=checksum)
    config = types.SimpleNamespace(name="latest-small-ratings", download_url=url)
    return types.SimpleNamespace(name="movielens", builder_config=config, url_infos={url: known})


def test_a_zip_that_is_nowhere_is_asked_for_by_name_and_place(tmp_path, monkeypatch):
    monkeypatch.delenv("TWOTOWER_DATA", raising=False)
    message = (
        r"ml-latest-small\.zip is in none of .*cannot be downloaded .*Put the zip into .*manual"
    )
    with pytest.raises(ConfigError, match=message):
        tfds._archive(builder("0"), tmp_path / "downloads")


def test_a_damaged_zip_is_refused_wherever_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setenv("TWOTOWER_DATA", str(tmp_path / "data"))
    found = tmp_path / "data" / "movielens" / "ml-latest-small.zip"
    found.parent.mkdir(parents=True)
    found.write_bytes(b"x")
    good = hashlib.sha256(b"x").hexdigest()
    assert tfds._archive(builder(good), tmp_path / "downloads") == found
    with pytest.raises(ConfigError, match=rf"its sha256 is {good}"):
        tfds._archive(builder("0"), tmp_path / "downloads")
    monkeypatch.delenv("TWOTOWER_DATA")
    with pytest.raises(ConfigError, match="its sha256 is"):
        tfds._archive(builder("0", found.as_uri()), tmp_path / "downloads")
    assert not list((tmp_path / "downloads" / "manual").iterdir())
    downloaded = tfds._archive(builder(good, found.as_uri()), tmp_path / "downloads")
    assert downloaded.read_bytes() == b"x" and downloaded.parent.name == "manual"


def test_an_unknown_dataset_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(
        ConfigError, match=r"'movielens/100k-rating'.*did you mean 'movielens/100k-ratings'"
    ):
        load("movielens/100k-rating", tmp_path)
