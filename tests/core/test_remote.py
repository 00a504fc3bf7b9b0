"""Buckets, by the real clients of S3 and Google Cloud against a server of this machine.

Nothing that was sent in part is ever taken for whole, and nothing is lost.
"""

import concurrent.futures
import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest

from tests.buckets import serving, set_addresses
from twotower.core.errors import BundleError, BusyError, ConfigError, FolderError
from twotower.core.files import current_version, digest, exclusive
from twotower.core.remote import mirror
from twotower.core.remote.copies import fetch_bundle, fetch_tables, keep_bundle, source_of
from twotower.core.remote.mirror import MANIFEST, is_copy, pull, push
from twotower.core.remote.objects import Bucket, is_remote

RUN = "s3://shop/runs/a"


@pytest.fixture(scope="module")
def server():
    with serving() as server, pytest.MonkeyPatch.context() as patch:
        set_addresses(patch, server)
        yield server


@pytest.fixture(autouse=True)
def empty(server, tmp_path, monkeypatch):
    """A server without objects, and a machine without copies."""
    server.objects.clear()
    server.writes_left = None
    monkeypatch.setenv("TWOTOWER_CACHE", str(tmp_path / "cache"))


def on_another_machine(monkeypatch, tmp_path, name="other"):
    monkeypatch.setenv("TWOTOWER_CACHE", str(tmp_path / name))


@pytest.mark.parametrize("scheme", ["s3://shop", "gs://anonymous@shop", "file://"])
def test_objects_are_written_listed_read_and_deleted(scheme, tmp_path):
    root = f"{tmp_path}/shop" if scheme == "file://" else ""
    bucket = Bucket(f"{scheme}{root}/runs/a", "--workdir")
    assert bucket.list() == [] and bucket.read("x/y.txt") is None
    content = os.urandom(3_000_000)
    (tmp_path / "source").write_bytes(content)
    size, sha256 = bucket.upload(tmp_path / "source", "x/y.txt")
    assert (size, sha256) == (len(content), digest(tmp_path / "source"))
    bucket.write("z", b"z")
    assert [(found.name, found.size) for found in bucket.list()] == [("x/y.txt", size), ("z", 1)]
    assert bucket.list()[1].modified > 1e18
    assert bucket.download("x/y.txt", tmp_path / "copy" / "y") == sha256
    assert (tmp_path / "copy" / "y").read_bytes() == bucket.read("x/y.txt") == content
    bucket.delete("z")
    assert [found.name for found in bucket.list()] == ["x/y.txt"]


def test_addresses_are_told_from_paths_and_unknown_ones_refused():
    for path in ("runs/mine", "/runs", "dataset:ml/u.data", "C:x", Path("runs")):
        assert not is_remote(path)
    for path in (RUN, "gs://b", Path("gs://b/x"), "hdfs://host/x"):
        assert is_remote(path)
    assert Bucket(Path(RUN), "--workdir").address == RUN
    with pytest.raises(ConfigError, match="--workdir=hdfs://host/x: addresses begin with gs://"):
        Bucket("hdfs://host/x", "--workdir")


@pytest.mark.parametrize("place", ["KEY:hunter2@shop/x", "shop/x?secret_key=hunter2"])
def test_addresses_with_credentials_are_refused_without_them(place):
    with pytest.raises(ConfigError, match="--data: the address holds credentials") as refusal:
        Bucket(f"s3://{place}", "--data")
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize("name", ["../../../../x", "a/../../../../../x", "a//x"])
def test_no_name_of_an_object_leads_out_of_the_copy(server, tmp_path, name):
    server.objects["shop/log/a.csv"] = (b"a", 1.0)
    server.objects[f"shop/log/{name}"] = (b"planted", 1.0)
    server.objects["shop/log/manifest.json"] = (b"{}", 1.0)
    for take in (lambda x: fetch_tables(x, "path"), fetch_bundle, lambda x: pull(x, "--workdir")):
        with pytest.raises(ConfigError, match="holds an object '.*x', which no file below"):
            take("s3://shop/log")
    assert not [path for path in tmp_path.rglob("*") if path.name in ("x", "a.csv")]


def test_processes_that_copy_one_table_together_wait_for_each_other(server, tmp_path):
    server.objects["shop/log/a.csv"] = (os.urandom(1_000_000), 1.0)
    copy = Path(fetch_tables("s3://shop/log/a.csv", "path"))
    copy.unlink()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        with exclusive(copy.parent, "copy"):
            waiting = pool.submit(fetch_tables, "s3://shop/log/a.csv", "path")
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.1)
        assert Path(waiting.result()) == copy and copy.stat().st_size == 1_000_000


def write_run(folder, step):
    """A run that has come to a step: each state of it has other content in the same file."""
    for name in (f"checkpoints/{step}/state/a", f"checkpoints/{step}/_METADATA"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name} of {step}")
    (folder / "config.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("line\n" * step)
    # Neither is ever sent.
    (folder / ".lock").touch()
    unfinished = folder / "checkpoints" / "99.orbax-checkpoint-tmp"
    unfinished.mkdir(exist_ok=True)
    (unfinished / "a").write_text("half")


def content_of(folder):
    """The content of all files but locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def check_whole(folder):
    """Every checkpoint is whole, and of one step; returns their steps."""
    steps = []
    for path in (folder / "checkpoints").glob("*[0-9]"):
        step = int(path.name)
        for name in (f"checkpoints/{step}/state/a", f"checkpoints/{step}/_METADATA"):
            assert (folder / name).read_text() == f"{name} of {step}"
        steps.append(step)
    return sorted(steps)


def test_a_run_goes_on_from_the_bucket_on_another_machine(tmp_path, monkeypatch):
    first = pull(RUN, "--workdir")
    assert not first.exists() and is_copy(first)
    write_run(first, 2)
    push(first)
    push(first / "checkpoints")
    on_another_machine(monkeypatch, tmp_path)
    second = pull(RUN, "--workdir")
    assert second != first and check_whole(second) == [2]
    sent = {name: text for name, text in content_of(first).items() if "99" not in name}
    assert content_of(second) == sent
    # The first checkpoint goes, another one comes.
    shutil.rmtree(second / "checkpoints" / "2")
    write_run(second, 4)
    push(second)
    # Of a folder that is no copy nothing is sent.
    push(tmp_path)
    monkeypatch.setenv("TWOTOWER_CACHE", str(tmp_path / "cache"))
    with pytest.raises(BusyError, match="changed by somebody else since it was read"):
        write_run(first, 3)
        push(first)
    assert check_whole(pull(RUN, "--workdir")) == [4]


def test_a_push_that_is_cut_off_anywhere_leaves_whole_checkpoints(server, tmp_path, monkeypatch):
    copy = pull(RUN, "--workdir")
    write_run(copy, 2)
    push(copy)
    before = dict(server.objects)
    shutil.rmtree(copy / "checkpoints" / "2")
    write_run(copy, 4)
    record = copy.with_name(f"{copy.name}.json").read_text()
    outcomes = []
    for writes in range(10):
        server.objects = dict(before)
        server.writes_left = writes
        copy.with_name(f"{copy.name}.json").write_text(record)
        is_done = True
        try:
            push(copy)
        except OSError:
            is_done = False
        on_another_machine(monkeypatch, tmp_path, f"other{writes}")
        steps = check_whole(pull(RUN, "--workdir"))
        outcomes.append((is_done, steps))
        monkeypatch.setenv("TWOTOWER_CACHE", str(tmp_path / "cache"))
        if is_done:
            break
        # Given again, the push comes to its end.
        server.writes_left = None
        push(copy)
        on_another_machine(monkeypatch, tmp_path, f"again{writes}")
        assert check_whole(pull(RUN, "--workdir")) == [4]
        monkeypatch.setenv("TWOTOWER_CACHE", str(tmp_path / "cache"))
    assert outcomes[-1] == (True, [4]) and len(outcomes) > 3
    assert all(outcome == (False, [2]) for outcome in outcomes[:-1])


def test_what_was_changed_or_lost_in_the_bucket_is_named(server, tmp_path, monkeypatch):
    copy = pull(RUN, "--workdir")
    write_run(copy, 2)
    push(copy)
    on_another_machine(monkeypatch, tmp_path)
    key = "shop/runs/a/checkpoints/2/state/a"
    content, modified = server.objects[key]
    server.objects[key] = (content[::-1], modified + 100)
    with pytest.raises(FolderError, match="checkpoints/2/state/a is damaged"):
        pull(RUN, "--workdir")
    del server.objects[key]
    with pytest.raises(FolderError, match="checkpoints/2/state/a is missing"):
        pull(RUN, "--workdir")
    server.objects[key] = (content, modified)
    # A pull that failed is done again.
    assert check_whole(pull(RUN, "--workdir")) == [2]
    manifest = server.objects[f"shop/runs/a/{MANIFEST}"][0]
    server.objects[f"shop/runs/a/{MANIFEST}"] = (manifest.replace(b"{}", b"{ }") + b" ", 1.0)
    on_another_machine(monkeypatch, tmp_path, "third")
    assert check_whole(pull(RUN, "--workdir")) == [2]
    spoilt = json.loads(manifest) | {"sha256": "0"}
    server.objects[f"shop/runs/a/{MANIFEST}"] = (json.dumps(spoilt).encode(), 1.0)
    on_another_machine(monkeypatch, tmp_path, "fourth")
    with pytest.raises(FolderError, match="is corrupt: its sha256 does not match"):
        pull(RUN, "--workdir")


def test_a_training_is_sent_while_it_saves_and_a_bucket_that_is_away_waited_for(
    server, monkeypatch
):
    monkeypatch.setattr(mirror, "PERIOD", 0.02)
    copy = pull(RUN, "--workdir")
    server.writes_left = 0
    with mirror.mirrored(copy):
        write_run(copy, 2)
        server.writes_left = None
        mirror_until(server, "shop/runs/a/checkpoints/2/_METADATA")
        write_run(copy, 4)
    assert "shop/runs/a/checkpoints/4/_METADATA" in server.objects
    with pytest.raises(KeyError), mirror.mirrored(copy):
        write_run(copy, 6)
        # What ends a training is told, and its last checkpoint sent.
        raise KeyError
    assert "shop/runs/a/checkpoints/6/_METADATA" in server.objects


def mirror_until(server, key):
    for _ in range(1000):
        if key in server.objects:
            return
        mirror.threading.Event().wait(0.01)
    raise AssertionError(key)


def test_tables_are_copied_once_and_again_when_they_change(server, monkeypatch):
    for name in ("events/2025-01.csv", "events/2025-02.csv", "events/deep/x.csv", "other.csv"):
        server.objects[f"shop/{name}"] = (name.encode(), 1_000_000.0)

    def fetch(address):
        server.log.clear()
        path = fetch_tables(f"s3://shop/{address}", "path")
        reads = [key for command, key, query in server.log if command == "GET" and not query]
        return Path(path), len(reads)

    path, reads = fetch("other.csv")
    assert path.read_text() == path.name == "other.csv" and reads == 1
    path, reads = fetch("events/2025-*.csv")
    found = sorted(each.name for each in path.parent.glob(path.name))
    assert found == ["2025-01.csv", "2025-02.csv"] and reads == 2
    folder, reads = fetch("events")
    assert (folder / "deep" / "x.csv").read_text() == "events/deep/x.csv" and reads == 1
    assert fetch("events")[1] == 0
    server.objects["shop/events/2025-01.csv"] = (b"changed", 1_000_001.0)
    del server.objects["shop/events/2025-02.csv"]
    folder, reads = fetch("events")
    assert (folder / "2025-01.csv").read_text() == "changed" and reads == 1
    assert not (folder / "2025-02.csv").exists()
    with pytest.raises(ConfigError, match="path='s3://shop/none': there is no such object"):
        fetch("none")


def test_a_bundle_is_copied_whole_or_not_at_all(server, tmp_path):
    files = {"current": "v-2\n", "v-2/manifest.json": "{}", "v-2/a.npy": "a", "changes": "log"}
    for name, text in (files | {"v-1/manifest.json": "{}"}).items():
        server.objects[f"shop/bundle/{name}"] = (text.encode(), 1.0)
    copy = fetch_bundle("s3://shop/bundle")
    assert content_of(copy) == files
    assert fetch_bundle("s3://shop/bundle") == copy
    server.objects["shop/bundle/current"] = (b"v-3\n", 2.0)
    with pytest.raises(BundleError, match="s3://shop/bundle is no bundle: there is no v-3/man"):
        fetch_bundle("s3://shop/bundle")
    server.objects["shop/bundle/v-3/manifest.json"] = (b"{}", 2.0)
    assert fetch_bundle("s3://shop/bundle") != copy and copy.exists()


def test_the_copy_that_a_server_follows_has_what_is_new_as_its_next_version(server, tmp_path):
    address = "s3://shop/bundle"
    with pytest.raises(BundleError, match="there is no manifest.json below it"):
        keep_bundle(address)
    objects = {"v-7/manifest.json": b"{}", "v-7/index/a": b"a", "v-7.abc.changes": b"log"}
    objects |= {"current": b"v-7\n", "v-6/manifest.json": b"{ }", "v-6.abc.changes": b"other"}
    for name, content in objects.items():
        server.objects[f"shop/bundle/{name}"] = (content, 1.0)
    copy = keep_bundle(address)
    files = {"current": "v-1\n", "v-1/manifest.json": "{}", "v-1/index/a": "a"}
    files["v-1.abc.changes"] = "log"
    found = {name: text for name, text in content_of(copy).items() if name != ".lock"}
    assert found == files and source_of(copy) == address and source_of(tmp_path) == ""
    server.log.clear()
    assert keep_bundle(address) == copy and current_version(copy).name == "v-1"
    # A look costs two small objects.
    read = [key for method, key, _ in server.log if method == "GET" and "/v-7/index" in key]
    assert not read and len(server.log) < 9
    server.objects["shop/bundle/v-8/manifest.json"] = (b'{"new": 1}', 2.0)
    server.objects["shop/bundle/current"] = (b"v-8\n", 2.0)
    keep_bundle(address)
    new = current_version(copy)
    assert new.name == "v-2" and (new / "manifest.json").read_text() == '{"new": 1}'
    # Half of a version is never the one that counts.
    server.objects["shop/bundle/v-9/manifest.json"] = (b'{"new": 2}', 3.0)
    server.objects["shop/bundle/v-9/../x"] = (b"planted", 3.0)
    server.objects["shop/bundle/current"] = (b"v-9\n", 3.0)
    with pytest.raises(ConfigError, match="holds an object"):
        keep_bundle(address)
    assert current_version(copy) == new


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff", b'{"sha256": "", "files": {}}'])
def test_a_manifest_that_is_damaged_is_named(server, content):
    server.objects["shop/runs/a/config.json"] = (b"{}", 1.0)
    server.objects[f"shop/runs/a/{MANIFEST}"] = (content, 1.0)
    with pytest.raises(FolderError, match=f"{RUN}/{MANIFEST} is corrupt"):
        pull(RUN, "--workdir")


def test_two_that_send_one_copy_together_keep_each_other_from_nothing(monkeypatch):
    copy = pull(RUN, "--workdir")
    write_run(copy, 2)
    write = Bucket.write
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        others = []

        def write_beside_another(bucket, name, content):
            write(bucket, name, content)
            # As a command that looks at a run while its training sends a checkpoint.
            if not others:
                (copy / "notes").write_text("new")
                others.append(pool.submit(push, copy))
                with contextlib.suppress(TimeoutError):
                    others[0].result(timeout=0.3)

        monkeypatch.setattr(Bucket, "write", write_beside_another)
        push(copy)
        others[0].result()
    write_run(copy, 4)
    push(copy)
    assert Bucket(RUN, "--workdir").read("notes") == b"new"
