"""Files of every kind with random damage: read, or refused in words, and never a traceback."""

import contextlib
import csv
import dataclasses
import functools
import gzip
import io
import json
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.config import TableConfig
from twotower.core.errors import ConfigError
from twotower.data.sources import files, lists
from twotower.data.sources.frames import read_table

ROWS = [(f"u{n % 7}", f"i{n % 5}", n, 'a "b", c') for n in range(40)]
NAMES = ("user_id", "item_id", "timestamp", "text")


def sound_files():
    """Names of files, each with its content."""
    text = io.StringIO()
    csv.writer(text).writerows([NAMES, *ROWS])
    plain = text.getvalue().encode()
    objects = [dict(zip(NAMES, row)) for row in ROWS]
    columnar = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(objects), columnar)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as members:
        members.writestr("log.csv", plain)
    matrix = [["", *(f"i{k}" for k in range(20))], *([f"u{n}", *"1" * 20] for n in range(9))]
    return {
        "log.csv": plain,
        "utf16.csv": text.getvalue().encode("utf-16"),
        "log.jsonl": "\n".join(map(json.dumps, objects)).encode(),
        "log.json": json.dumps(objects).encode(),
        "users.json": b'{"u1": {"i1": 3}, "u2": {"i2": 4}}',
        "log.parquet": columnar.getvalue(),
        "log.zip": archive.getvalue(),
        "log.csv.gz": gzip.compress(plain),
        "log.dat": gzip.compress(plain),
        "lists.txt": b"1 2 3\n4 5\n",
        "matrix.csv": "\n".join(map(",".join, matrix)).encode(),
    }


SOUND = sound_files()
PIECES = [b'"', b"\n", b",", b"\0", b"\xef\xbb\xbf", b"{", b"]", b";", b"\t", b"\r", b"\xe9", b"::"]
OPTIONS = (
    {},
    {"quoting": "off"},
    {"bad_rows": "pad"},
    {"bad_rows": "skip"},
    {"comment": "#"},
    {"skip_lines": 2},
    {"delimiter": "whitespace"},
    {"names": ("a", "b")},
    {"delimiter": "::"},
    {"encoding": "utf-16"},
)


def damage(data, rng):
    """The bytes with one of some damages: another byte, further bytes, some missing, or the end."""
    data = bytearray(data)
    at = int(rng.integers(len(data)))
    kind = rng.integers(4)
    if kind == 0:
        data[at] = rng.integers(256)
    elif kind == 1:
        data[at:at] = PIECES[rng.integers(len(PIECES))]
    elif kind == 2:
        del data[at : at + int(rng.integers(1, 30))]
    else:
        del data[at:]
    return bytes(data)


@pytest.mark.parametrize("name", SOUND)
def test_damage_is_read_around_or_refused_in_words(tmp_path, name):
    rng = np.random.default_rng(len(name))
    path = tmp_path / name
    for _ in range(10):
        path.write_bytes(damage(SOUND[name], rng))
        plain = TableConfig(path=str(path))
        config = dataclasses.replace(plain, **OPTIONS[rng.integers(len(OPTIONS))])
        readers = (
            functools.partial(files.read_raw, config, "interactions", "csv"),
            functools.partial(read_table, path, TableConfig(), "interactions"),
            functools.partial(lists.read_baskets, plain, "interactions"),
            functools.partial(lists.read_matrix, plain, "interactions"),
        )
        for read in readers:
            with contextlib.suppress(ConfigError):
                read()
