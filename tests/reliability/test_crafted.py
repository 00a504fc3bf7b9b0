"""Bundles that somebody made by hand, with hashes made anew: each is refused in one line, or serves
what it can; none ends in an error of another library, and none takes memory that it only names."""

import json
import os
import shutil
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.retrieval.runs import rewrite_manifest
from twotower.core.errors import BundleError, TwotowerError
from twotower.core.files import content_digest, current_version, digest
from twotower.retrieval.bundle import load_bundle
from twotower.retrieval.retriever import Retriever

VALUES = [None, "x", -1, 2**70, [], {}, [None], {"x": {}}]
DOCUMENTS = ["[]", "null", "5", '"x"', "{}", "[" * 100_000, '{"a":' * 50_000, "\x00", "NaN"]


@pytest.fixture(scope="module")
def files(exported):
    return current_version(exported)


def json_mutations(path):
    """Whole documents in the place of a JSON file, and each entry taken out or replaced."""
    for number, document in enumerate(DOCUMENTS):
        yield f"document {number}", lambda document=document: path.write_text(document)
    content = json.loads(path.read_text())
    for keys in key_paths(content):
        for value in ["gone", *VALUES]:

            def change(keys=keys, value=value):
                new = json.loads(json.dumps(content))
                parent = new
                for key in keys[:-1]:
                    parent = parent[key]
                if value == "gone":
                    del parent[keys[-1]]
                else:
                    parent[keys[-1]] = value
                if path.name == "encoder.json":
                    new["sha256"] = content_digest(new)
                path.write_text(json.dumps(new))

            yield f"{'.'.join(map(str, keys))}={value!r:.20}", change


def key_paths(content, depth=3):
    """The keys of nested mappings, the first of a list."""
    if depth and isinstance(content, dict):
        for key, value in content.items():
            yield (key,)
            yield from ((key, *rest) for rest in key_paths(value, depth - 1))


def array_mutations(path):
    array = np.load(path)
    header = np.lib.format.header_data_from_array_1_0(array)

    def lie(**changes):
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header | changes)
            file.write(array.tobytes())

    yield "huge", lambda: lie(shape=(10**12, *array.shape[1:]))
    yield "huge in all", lambda: lie(shape=(2**40,) * max(array.ndim, 1))
    yield "header alone", lambda: path.write_bytes(path.read_bytes()[:128])
    others = {
        "empty": array[:0],
        "shorter": array[:-1],
        "scalar": np.float32(3),
        "deep": array[None],
        "flat": array.ravel()[:, None],
        "text": array.astype("<U8"),
        "float64": array.astype(np.float64),
        "int8": array.astype(np.int8),
        "complex": array.astype(np.complex64),
        "times": array.astype("M8[s]"),
        "records": np.zeros(len(array), [("a", np.float32)]),
    }
    if array.dtype.kind == "f":
        others |= {"NaN": np.full_like(array, np.nan), "inf": np.full_like(array, np.inf)}
    else:
        others |= {
            "minus one": (np.zeros_like(array).astype(np.int64) - 1).astype(array.dtype),
            "large": np.full_like(array, np.iinfo(array.dtype).max),
            "falling": array[::-1],
        }
    for name, other in others.items():
        yield name, lambda other=other: np.save(path, other)
    objects = np.array([None, {}], object)
    yield "objects", lambda: np.save(path, objects, allow_pickle=True)


def table_mutations(path):
    table = pq.read_table(path)
    for place, name in enumerate(table.column_names):

        def with_column(column, place=place, name=name):
            pq.write_table(table.set_column(place, name, column), path)

        size = len(table)
        columns = {
            "nulls": pa.nulls(size),
            "some nulls": pa.array([None] + table[name].to_pylist()[1:], table[name].type),
            "all alike": pa.array(table[name].to_pylist()[:1] * size, table[name].type),
            "numbers": pa.array(np.arange(size)),
            "NaN": pa.array(np.full(size, np.nan)),
            "lists": pa.array([[1]] * size),
            "structs": pa.array([{"a": 1}] * size),
            "bytes": pa.array([b"\xff"] * size),
            "times": pa.array([0] * size, pa.timestamp("ns")),
            "flags": pa.array([True] * size),
            "dictionary": pa.array(["x"] * size).dictionary_encode(),
        }
        for kind, column in columns.items():
            yield f"{name} {kind}", lambda column=column, f=with_column: f(column)
        yield f"{name} gone", lambda name=name: pq.write_table(table.drop_columns([name]), path)
        yield (
            f"{name} twice",
            lambda name=name: pq.write_table(table.append_column(name, table[name]), path),
        )
    yield "no rows", lambda: pq.write_table(table.slice(0, 0), path)
    yield "twice the rows", lambda: pq.write_table(pa.concat_tables([table, table]), path)
    # A handful of bytes that name a billion rows.
    many = pa.table({"item_id": pa.nulls(10**9)})
    yield "a billion rows", lambda: pq.write_table(many, path)
    yield "no Parquet", lambda: path.write_bytes(b"PAR1 no PAR1")


def arrow_mutations(path):
    table = pa.ipc.open_file(path.read_bytes()).read_all()

    def write(other):
        with pa.OSFile(str(path), "wb") as file:
            with pa.ipc.new_file(file, other.schema) as writer:
                writer.write_table(other)

    yield "other columns", lambda: write(pa.table({"x": pa.nulls(len(table))}))
    yield "shorter", lambda: write(table.slice(1))
    lists = pa.array([[1.5]] * len(table))
    for place, name in enumerate(table.column_names):
        yield f"{name} lists", lambda p=place, n=name: write(table.set_column(p, n, lists))
    yield "no Arrow", lambda: path.write_bytes(b"ARROW1\0\0 no")


def weight_mutations(path):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    first = sorted(arrays)[0]

    def lie():
        with zipfile.ZipFile(path, "w") as archive, archive.open(f"{first}.npy", "w") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (10**11,)}
            np.lib.format.write_array_header_1_0(file, header)

    yield "huge", lie
    yield "no zip", lambda: path.write_bytes(b"PK\x03\x04 no")
    yield "nothing", lambda: np.savez(path)
    yield "other shape", lambda: np.savez(path, **(arrays | {first: np.zeros((3, 3))}))
    yield "other names", lambda: np.savez(path, a=np.zeros(3))


def program_mutations(path):
    yield "no program", lambda: path.write_bytes(b"no")
    yield "empty", lambda: path.write_bytes(b"")
    other = path.with_name("item_tower.stablehlo").read_bytes()
    yield "of items", lambda: path.write_bytes(other)


MUTATIONS = {
    "*.json": json_mutations,
    "encoder/*.json": json_mutations,
    "index/*.json": json_mutations,
    "*.npy": array_mutations,
    "encoder/*.npy": array_mutations,
    "tables/*.npy": array_mutations,
    "*.parquet": table_mutations,
    "*.arrow": arrow_mutations,
    "params.npz": weight_mutations,
    "user_tower.stablehlo": program_mutations,
}


def use(folder):
    """Loads a bundle and asks it for lists."""
    retriever = Retriever.load(folder)
    user = retriever.bundle.users["user_id"][0].as_py()
    item = retriever.bundle.items["item_id"][0].as_py()
    retriever.recommend(user, k=3)
    retriever.recommend_many([user], k=3, exclude_seen=False)
    retriever.similar_items(item, k=3)
    retriever.latest_items(user)
    retriever.latest_events(user)
    return retriever


def sweep(files, tmp_path, pattern, share, use=use):
    """Tries a share of the mutations of some files.

    Returns:
        Those that end in an error which is not the library's own, and the number of all.
    """
    folder = tmp_path / "bundle"
    rng = np.random.default_rng(0)
    raw = []
    count = 0
    shutil.copytree(files, folder)
    for original in sorted(files.glob(pattern)):
        path = folder / original.relative_to(files)
        for name, mutate in MUTATIONS[pattern](path):
            if rng.random() > share:
                continue
            mutate()
            if path.name == "manifest.json":
                sign(path)
            else:
                rewrite_manifest(folder)
            count += 1
            try:
                use(folder)
            except TwotowerError as error:
                assert "\n" not in str(error), (path.name, name)
            except Exception as error:
                raw.append(f"{path.name} {name}: {type(error).__name__}: {str(error)[:100]}")
            # Anew, since what was loaded before is still mapped into memory.
            for file in (original, files / "manifest.json"):
                target = folder / file.relative_to(files)
                target.unlink()
                shutil.copyfile(file, target)
    return raw, count


def sign(path):
    """Gives a manifest the hash of what it holds now."""
    try:
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"sha256": content_digest(content)}))
    except (ValueError, TypeError, RecursionError, AttributeError):
        pass


# All of them are tried by hand: `SHARE=1 pytest ...`, two minutes.
SHARE = float(os.environ.get("SHARE", "0"))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", MUTATIONS)
def test_no_crafted_file_ends_in_an_error_of_another_library(files, tmp_path, pattern):
    usual = 0.006 if pattern == "*.json" else 0.1
    raw, count = sweep(files, tmp_path, pattern, SHARE or usual)
    assert not raw, f"{len(raw)} of {count}: {raw[:20]}"


def test_what_would_be_served_wrongly_is_refused_by_name(files, tmp_path):
    """These once loaded."""
    folder = shutil.copytree(files, tmp_path / "bundle")
    users = pq.read_table(folder / "users.parquet")
    items = pq.read_table(folder / "items.parquet")
    vectors = np.load(folder / "user_vectors.npy")
    seen = np.load(folder / "seen_items.npy")
    ids = items["item_id"].to_pylist()
    spoilt = {
        "user_vectors.npy": (np.full_like(vectors, np.nan), "not finite"),
        "seen_items.npy": (np.full_like(seen, len(items)), "names items that there are not"),
        "users.parquet": (
            users.set_column(0, "user_id", pa.nulls(len(users), pa.string())),
            "text",
        ),
        "items.parquet": (items.set_column(0, "item_id", pa.array([ids[1], *ids[1:]])), "twice"),
    }
    for name, (content, message) in spoilt.items():
        path = folder / name
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        else:
            np.save(path, content)
        rewrite_manifest(folder)
        with pytest.raises(BundleError, match=message):
            load_bundle(folder)
        shutil.copyfile(files / name, path)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "encoder/../../outside"])
def test_a_manifest_that_names_files_outside_the_bundle_is_refused(files, tmp_path, name):
    folder = shutil.copytree(files, tmp_path / "bundle")
    (tmp_path / "outside").write_text("x")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = digest(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    sign(folder / "manifest.json")
    with pytest.raises(BundleError, match="no file of the bundle"):
        load_bundle(folder)
