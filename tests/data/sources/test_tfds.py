"""MovieLens by TFDS and from its files, with no network and without TensorFlow."""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile

import pyarrow.compute as pc
import pytest

from twotower.config import DataConfig
from twotower.core.errors import ConfigError
from twotower.data.sources import tfds
from twotower.data.sources.download import RemoteFile
from twotower.data.sources.load import load_dataset

needs_tfds = pytest.mark.skipif(
    not (
        importlib.util.find_spec("tensorflow_datasets") and importlib.util.find_spec("array_record")
    ),
    reason="tensorflow-datasets or array-record is not installed",
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
from twotower.data.sources import tfds
from twotower.data.sources.load import load_dataset

_, name, folder, sha256, size = sys.argv
# The zip is a part of the real one: its hash stands in TFDS's records in the place of that one.
_, movielens = tfds._import_tfds(name)
record = next(
    info
    for info in movielens.Movielens.url_infos.values()
    if info.filename == "ml-latest-small.zip"
)
object.__setattr__(record, "checksum", sha256)
object.__setattr__(record, "size", int(size))
load_dataset(DataConfig(source="tfds", dataset=name, data_dir=folder))
assert "tensorflow" not in sys.modules
"""


def load(dataset, folder):
    return load_dataset(DataConfig(source="tfds", dataset=dataset, data_dir=str(folder)))


def rows_where(table, **values):
    """The rows of a table that have these values."""
    for name, value in values.items():
        table = table.filter(pc.equal(table[name], value))
    return table.to_pylist()


def cut_zip(source, target, *, ratings):
    """Copies a zip of MovieLens with the first ratings alone."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("ratings.csv"):
                content = b"".join(content.splitlines(keepends=True)[: ratings + 1])
            new.writestr(name, content)


@needs_tfds
@pytest.mark.slow
def test_latest_small_by_tfds_itself(shared_data, tmp_path):
    """TFDS prepares 100,000 ratings in half a minute, so a part of them."""
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    path = manual / "ml-latest-small.zip"
    cut_zip(shared_data / "movielens-latest-small" / "ml-latest-small.zip", path, ratings=1_000)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    command = [sys.executable, "-c", WITHOUT_TENSORFLOW, SMALL, tmp_path, sha256]
    environment = {"HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    subprocess.run([*command, str(path.stat().st_size)], check=True, env=environment)
    # What is left is the columns: the second reading needs nothing else.
    shutil.rmtree(tmp_path / "downloads")
    for record in tmp_path.rglob("*.array_record-*"):
        record.unlink()
    data = load(SMALL, tmp_path)
    assert (len(data.interactions), len(data.users), len(data.items)) == (1_000, 7, 9_742)
    assert data.interactions.schema.names == ["user_id", "item_id", "rating", "timestamp"]
    assert data.has_catalogue
    genres = ["Adventure", "Animation", "Children", "Comedy", "Fantasy"]
    toy_story = {"item_id": "1", "title": "Toy Story (1995)", "genres": genres}
    assert rows_where(data.items, item_id="1") == [toy_story]
    first = {"user_id": "1", "item_id": "1", "rating": 4.0, "timestamp": 964982703}
    assert rows_where(data.interactions, user_id="1", item_id="1") == [first]


def put_zip(monkeypatch, folder, name, contents):
    """Puts a zip of these files where it is looked for, under a hash of its own."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.zip"
    with zipfile.ZipFile(path, "w") as file:
        for inner, text in contents.items():
            file.writestr(f"{name}/{inner}", text)
    archive = archive_with(path.read_bytes(), file_name=path.name)
    monkeypatch.setattr(tfds, "archive_of", lambda dataset: archive)


def test_100k_has_features_of_its_users(shared_data, tmp_path, monkeypatch):
    folder = shared_data / "movielens-100k"
    contents = {name: (folder / name).read_bytes() for name in ("u.item", "u.user")}
    ratings = (folder / "u.data").read_text().splitlines()[:500]
    contents["u.data"] = "\n".join(ratings)
    put_zip(monkeypatch, tmp_path / "downloads", "ml-100k", contents)
    data = load("movielens/100k-ratings", tmp_path)
    read = data.interactions.to_pylist()
    assert [tuple(row.values()) for row in read] == [
        (user, item, float(rating), int(time))
        for user, item, rating, time in (line.split("\t") for line in ratings)
    ]
    assert len(data.items) == 1_682
    genres = ["Animation", "Children", "Comedy"]
    toy_story = {"item_id": "1", "title": "Toy Story (1995)", "genres": genres}
    assert rows_where(data.items, item_id="1") == [toy_story]
    # A letter outside of ASCII shows that the file is Latin-1.
    assert rows_where(data.items, item_id="543")[0]["title"] == "Misérables, Les (1995)"
    writer = {"user_id": "196", "gender": "M", "age": 49, "occupation": "writer", "zip": "55105"}
    assert rows_where(data.users, user_id="196") == [writer]


def test_1m_has_the_words_that_its_numbers_stand_for(shared_data, tmp_path, monkeypatch):
    folder = shared_data / "movielens-1m"
    contents = {name: (folder / name).read_bytes() for name in ("movies.dat", "users.dat")}
    contents["ratings.dat"] = "1::1193::5::978300760\n2::1::4::978300761\n"
    put_zip(monkeypatch, tmp_path / "downloads", "ml-1m", contents)
    data = load("movielens/1m-ratings", tmp_path)
    assert data.interactions.to_pylist() == [
        {"user_id": "1", "item_id": "1193", "rating": 5.0, "timestamp": 978300760},
        {"user_id": "2", "item_id": "1", "rating": 4.0, "timestamp": 978300761},
    ]
    genres = ["Animation", "Children", "Comedy"]
    toy_story = {"item_id": "1", "title": "Toy Story (1995)", "genres": genres}
    assert rows_where(data.items, item_id="1") == [toy_story]
    pupil = {"user_id": "1", "gender": "F", "age": 1, "occupation": "K-12 student", "zip": "48067"}
    assert rows_where(data.users, user_id="1") == [pupil]


@needs_tfds
def test_the_hash_of_an_archive_is_the_one_that_tfds_has(shared_data, monkeypatch, tmp_path):
    monkeypatch.setenv("TWOTOWER_DATA", str(shared_data))
    archive = tfds.archive_of(SMALL)
    expected = shared_data / "movielens-latest-small" / "ml-latest-small.zip"
    assert tfds.find_archive(archive, tmp_path) == expected


def archive_with(content, *, file_name="ml-1m.zip", url="file:///nowhere/ml-1m.zip"):
    """An archive of this content."""
    sha256 = hashlib.sha256(content).hexdigest()
    return RemoteFile(file_name=file_name, url=url, sha256=sha256, size=len(content))


def test_a_zip_that_is_nowhere_is_asked_for_by_name_and_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("TWOTOWER_DATA", raising=False)
    ways = r"put it into .*manual; or .*TWOTOWER_DATA"
    message = rf"ml-1m\.zip is in none of .*cannot be downloaded .*{ways}"
    with pytest.raises(ConfigError, match=message):
        tfds.find_archive(archive_with(b""), tmp_path)


def test_a_damaged_zip_is_refused_wherever_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setenv("TWOTOWER_DATA", str(tmp_path / "data"))
    path = tmp_path / "data" / "movielens" / "ml-1m.zip"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    good = archive_with(b"x", url=path.as_uri())
    bad = archive_with(b"y", url=path.as_uri())
    assert tfds.find_archive(good, tmp_path) == path
    with pytest.raises(ConfigError, match=rf"its sha256 is {good.sha256}"):
        tfds.find_archive(bad, tmp_path)
    monkeypatch.delenv("TWOTOWER_DATA")
    with pytest.raises(ConfigError, match="its sha256 is"):
        tfds.find_archive(bad, tmp_path)
    manual = tmp_path / "downloads" / "manual"
    assert not list(manual.iterdir())
    downloaded = tfds.find_archive(good, tmp_path)
    assert downloaded.read_bytes() == b"x"
    assert downloaded.parent == manual


def test_an_unknown_dataset_is_refused_with_the_nearest(tmp_path):
    message = r"'movielens/100k-rating'.*did you mean 'movielens/100k-ratings'"
    with pytest.raises(ConfigError, match=message):
        load("movielens/100k-rating", tmp_path)
