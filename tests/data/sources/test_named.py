"""Data sets by name, downloaded from a server of this process, or taken from a folder."""

import contextlib
import dataclasses
import functools
import hashlib
import http.server
import importlib
import threading
import zipfile

import pytest

from tests.data.reading import load
from twotower.config import from_dict
from twotower.core.errors import ConfigError
from twotower.data.sources import named
from twotower.data.sources.load import load_dataset

RATINGS = "1\t10\t5\t881250949\n2\t20\t3\t881250950\n"
NAMES = ("user_id", "item_id", "rating", "timestamp")


class Site:
    """Published files under an address, and what was asked for.

    Attributes:
        folder: Folder of the files.
        asked: Paths of the requests.
        refusals: Number of the next requests that end in the middle of the file.
    """

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        self.asked = []
        self.refusals = 0
        self.address = ""
        self._monkeypatch = monkeypatch

    def publish(self, name, files, *, folder="ml-100k"):
        """Publishes a zip of these files as the only publication of a data set."""
        zip_path = self.folder / "ml-100k.zip"
        with zipfile.ZipFile(zip_path, "w") as file:
            for inner, content in files.items():
                file.writestr(f"{folder}/{inner}", content)
        content = zip_path.read_bytes()
        remote = named.RemoteFile(
            file_name=zip_path.name,
            url=f"{self.address}/{zip_path.name}",
            sha256=hashlib.sha256(content).hexdigest(),
            size=len(content),
        )
        known = named.DATASETS[name][0].files
        publication = named.Publication(remote, known, folder="ml-100k")
        self._monkeypatch.setitem(named.DATASETS, name, (publication,))
        return publication


@contextlib.contextmanager
def serving(site):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            site.asked.append(self.path)
            if not site.refusals:
                super().do_GET()
                return
            site.refusals -= 1
            content = (site.folder / self.path.strip("/")).read_bytes()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])

        def log_message(self, *words):
            pass

    handler = functools.partial(Handler, directory=site.folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        site.address = f"http://127.0.0.1:{server.server_port}"
        yield
        server.shutdown()
        thread.join()


@pytest.fixture
def site(tmp_path, monkeypatch):
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.delenv("TWOTOWER_DATA", raising=False)
    monkeypatch.setenv("TWOTOWER_CACHE", str(tmp_path / "cache"))
    found = Site(folder, monkeypatch)
    with serving(found):
        yield found


def ratings():
    path = "dataset:movielens-100k/u.data"
    data = load(interactions={"path": path, "delimiter": "\t", "names": NAMES})
    return [tuple(row.values()) for row in data.interactions.to_pylist()]


def test_a_file_is_downloaded_once_and_nothing_else_is_unpacked(site, tmp_path):
    site.publish("movielens-100k", {"u.data": RATINGS, "u.item": "1|x\n", "../evil": "x"})
    expected = [("1", "10", "5", 881250949), ("2", "20", "3", 881250950)]
    assert ratings() == expected
    assert ratings() == expected
    assert site.asked == ["/ml-100k.zip"]
    cache = tmp_path / "cache" / "movielens-100k"
    assert sorted(path.name for path in cache.iterdir()) == ["ml-100k.zip", "u.data"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "site"]
    # A second file of the zip needs no second download.
    assert named.find_file("dataset:movielens-100k/u.item", "x").read_text() == "1|x\n"
    assert site.asked == ["/ml-100k.zip"]


def test_a_file_that_is_published_by_itself_is_kept_as_it_is(site, tmp_path, monkeypatch):
    text = b"1 10\n1 20\n2 10\n"
    (site.folder / "ml-1m.txt").write_bytes(text)
    remote = named.RemoteFile(
        file_name="ml-1m.txt",
        url=f"{site.address}/ml-1m.txt",
        sha256=hashlib.sha256(text).hexdigest(),
        size=len(text),
    )
    zipped, _ = named.DATASETS["movielens-1m"]
    own = named.Publication(remote, files=("ml-1m.txt",))
    monkeypatch.setitem(named.DATASETS, "movielens-1m", (zipped, own))
    experiment = importlib.import_module("experiments.configs.movielens_1m_sequential")
    data = load_dataset(from_dict(experiment.get_config()).data)
    assert data.interactions["item_id"].to_pylist() == ["10", "20", "10"]
    assert (tmp_path / "cache" / "movielens-1m" / "ml-1m.txt").read_bytes() == text


def test_a_download_that_ended_too_early_leaves_nothing_and_begins_anew(site, tmp_path):
    publication = site.publish("movielens-100k", {"u.data": RATINGS})
    site.refusals = 1
    with pytest.raises(ConfigError, match=rf"ended after \d+ of {publication.remote.size} bytes"):
        ratings()
    assert list((tmp_path / "cache" / "movielens-100k").iterdir()) == []
    assert len(ratings()) == 2


def test_a_wrong_checksum_is_refused(site, tmp_path):
    site.publish("movielens-100k", {"u.data": RATINGS})
    # As long as the right one, with one letter changed.
    content = (site.folder / "ml-100k.zip").read_bytes()
    (site.folder / "ml-100k.zip").write_bytes(content.replace(b"881250949", b"881250948"))
    with pytest.raises(ConfigError, match="its sha256 is .* damaged or of another version"):
        ratings()
    assert list((tmp_path / "cache" / "movielens-100k").iterdir()) == []


def test_without_a_network_both_ways_are_named(site, tmp_path):
    publication = site.publish("movielens-100k", {"u.data": RATINGS})
    # No server listens at the discard port.
    remote = dataclasses.replace(publication.remote, url="http://127.0.0.1:9/ml-100k.zip")
    named.DATASETS["movielens-100k"] = (dataclasses.replace(publication, remote=remote),)
    with pytest.raises(ConfigError) as caught:
        ratings()
    text = str(caught.value)
    assert f"put it into {tmp_path / 'cache' / 'movielens-100k'}" in text
    assert "http://127.0.0.1:9/ml-100k.zip" in text
    assert "TWOTOWER_DATA" in text
    # The advice is good: both ways.
    cache = tmp_path / "cache" / "movielens-100k"
    (site.folder / "ml-100k.zip").rename(cache / "ml-100k.zip")
    assert len(ratings()) == 2


def test_files_and_zips_of_the_data_folder_are_taken_where_they_lie(site, tmp_path, monkeypatch):
    site.publish("movielens-100k", {"u.data": RATINGS, "u.item": "1|x\n"})
    data = tmp_path / "data"
    monkeypatch.setenv("TWOTOWER_DATA", str(data))
    folder = data / "movielens-100k"
    folder.mkdir(parents=True)
    (folder / "u.data").write_text(RATINGS[: len(RATINGS) // 2])
    assert ratings() == [("1", "10", "5", 881250949)]
    (data / "ml-100k.zip").write_bytes((site.folder / "ml-100k.zip").read_bytes())
    item = named.find_file("dataset:movielens-100k/u.item", "x")
    assert item == tmp_path / "cache" / "movielens-100k" / "u.item"
    assert site.asked == []


@pytest.mark.parametrize(
    "path, words",
    [
        ("dataset:movielens-10k/u.data", r"='movielens-10k' is not known; did you mean 'moviel"),
        ("dataset:movielens-100k/u.dat", r"no file 'u\.dat'; did you mean 'u\.data'\?"),
        ("dataset:movielens-100k/../u.data", "has no file '../u.data'"),
        ("dataset:movielens-100k", "has no file ''. It has u.data, u.item"),
    ],
)
def test_an_unknown_name_is_refused_before_anything_is_asked(site, path, words):
    with pytest.raises(ConfigError, match=words):
        load(interactions={"path": path})
    assert site.asked == []


@pytest.mark.parametrize("name", ["movielens_100k", "movielens_100k_video"])
def test_shipped_configurations_read_downloaded_files_as_those_of_the_folder(
    name, site, shared_data, monkeypatch
):
    config = from_dict(importlib.import_module(f"experiments.configs.{name}").get_config()).data
    downloaded = {}
    for file in named.DATASETS["movielens-100k"][0].files:
        if (shared_data / "movielens-100k" / file).is_file():
            downloaded[file] = (shared_data / "movielens-100k" / file).read_bytes()
    site.publish("movielens-100k", downloaded)
    got = load_dataset(config)
    monkeypatch.setenv("TWOTOWER_DATA", str(shared_data))
    expected = load_dataset(config)
    assert site.asked == ["/ml-100k.zip"]
    assert got.interactions.equals(expected.interactions)
    assert got.users.equals(expected.users)
    assert got.items.equals(expected.items)


def test_hashes_are_those_of_the_files_that_are_here(shared_data):
    zipped = named.DATASETS["movielens-latest-small"][0].remote
    pairs = named.DATASETS["movielens-1m"][1].remote
    paths = {
        zipped: shared_data / "movielens-latest-small" / zipped.file_name,
        pairs: shared_data / "movielens-1m" / pairs.file_name,
    }
    for remote, path in paths.items():
        content = path.read_bytes()
        assert len(content) == remote.size
        assert hashlib.sha256(content).hexdigest() == remote.sha256


def test_hashes_are_those_that_tfds_has_on_record():
    movielens = pytest.importorskip("tensorflow_datasets.structured.movielens")
    for publications in named.DATASETS.values():
        remote = publications[0].remote
        records = movielens.Movielens.url_infos
        record = records.get(remote.url) or records[remote.url.replace("https", "http")]
        assert (remote.sha256, remote.size) == (record.checksum, record.size)
