"""Drift: a rotation is none, what moved is found, neighbours are those of a NumPy sort."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import scipy.linalg

from tests.extras import extra
from tests.integrations.test_embedding_history import block, version
from twotower.core.errors import ConfigError, HistoryError
from twotower.core.install import install_line
from twotower.integrations import drift
from twotower.integrations.drift import aligned_cosines, compare, neighbour_overlap, rotation
from twotower.integrations.embedding_history import EmbeddingHistory

pytestmark = pytest.mark.slow


def draw(rows=200, width=8, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def orthogonal(width, seed=1):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0].astype(
        np.float32
    )


def named(vectors, order=None):
    order = np.arange(len(vectors)) if order is None else order
    return pa.chunked_array([[f"e{n}" for n in order]]), vectors[order]


def test_a_rotation_is_no_drift():
    old = draw()
    np.testing.assert_allclose(aligned_cosines(old, 3 * old @ orthogonal(8)), 1.0, atol=1e-5)
    assert aligned_cosines(old, draw(seed=5)).mean() < 0.5


def test_the_rotation_is_scipys_and_no_other_makes_the_mean_cosine_greater():
    old = drift._normalize(draw())
    new = drift._normalize(old @ orthogonal(8) + 0.3 * draw(seed=2))
    np.testing.assert_allclose(
        rotation(old, new), scipy.linalg.orthogonal_procrustes(old, new)[0], atol=1e-5
    )
    best = aligned_cosines(old, new).mean()
    near = [
        scipy.linalg.expm(0.01 * (a - a.T)) @ rotation(old, new)
        for a in draw(50 * 8).reshape(50, 8, 8)
    ]
    assert max((old @ other * new).sum(1).mean() for other in near) < best


def test_a_wider_model_that_says_the_same_has_not_drifted():
    old = draw(width=5)
    wider = np.pad(old, ((0, 0), (0, 3))) @ orthogonal(8)
    for a, b in ((old, wider), (wider, old)):
        np.testing.assert_allclose(aligned_cosines(a, b), 1.0, atol=1e-5)
        np.testing.assert_array_equal(neighbour_overlap(a, b, np.arange(20), k=5), 1.0)


def test_a_zero_vector_has_cosine_0():
    old = draw()
    new = draw()
    new[3] = 0
    cosines = aligned_cosines(old, new)
    assert cosines[3] == 0 and np.isfinite(cosines).all()


def test_neighbours_are_those_of_a_sort_without_the_entity_itself():
    old = draw(60)
    new = draw(60, width=4, seed=9)
    rows = np.array([0, 7, 59])

    def nearest(x, row):
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        return [n for n in np.argsort(-(x @ x[row]), kind="stable") if n != row][:10]

    expected = [len(set(nearest(old, row)) & set(nearest(new, row))) / 10 for row in rows]
    np.testing.assert_allclose(neighbour_overlap(old, new, rows), expected, atol=1e-6)
    assert 0 < np.mean(expected) < 1


def test_entities_are_matched_by_id_and_what_moved_is_found():
    old = draw()
    new = old @ orthogonal(8)
    new[[5, 17]] = -new[[5, 17]]
    order = np.random.default_rng(3).permutation(np.r_[0:150, 180:200])
    found = compare(named(old[:180]), (named(new, order)[0], new[order]), sample=40)
    assert (found.added, found.removed, len(found.ids), len(found.overlaps)) == (20, 30, 150, 40)
    moved = {found.ids[int(row)].as_py() for row in np.argsort(found.cosines)[:2]}
    assert moved == {"e5", "e17"} and np.median(found.cosines) > 0.99
    text = drift.format_drift(found)
    assert "150 in both, 20 only in the new, 30 only in the old." in text
    assert "Moved most: e5 (" in text or "Moved most: e17 (" in text


def test_what_cannot_be_compared_is_refused():
    old = named(draw())
    with pytest.raises(HistoryError, match="1 ids are in both versions"):
        compare(old, (pa.chunked_array([["e1", "x"]]), draw(2)))
    with pytest.raises(HistoryError, match="an id stands twice among the 2 of the new vectors"):
        compare(old, (pa.chunked_array([["e1", "e1"]]), draw(2)))


def test_a_plot_is_a_picture_and_needs_its_extra(tmp_path, monkeypatch):
    extra("matplotlib", "plots")
    found = compare(named(draw()), named(draw(seed=1)))
    drift.plot(found, tmp_path / "new" / "drift.png", title="items")
    assert (tmp_path / "new" / "drift.png").read_bytes().startswith(b"\x89PNG") and len(
        list((tmp_path / "new").iterdir())
    ) == 1
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        ConfigError, match=r"a plot needs the extra 'plots' .*" + re.escape(install_line("plots"))
    ):
        drift.plot(found, tmp_path / "no.png", title="items")


def test_the_command_compares_two_dates(tmp_path):
    history = EmbeddingHistory(tmp_path / "history")
    ids, vectors = block(50)
    history.append(version(), {"item": [(ids, vectors)]})
    history.append(version("again"), {"item": [(ids, vectors @ orthogonal(4))]})

    def launch(*flags):
        command = [
            sys.executable,
            "-m",
            "experiments.history",
            f"--history={history.folder}",
            *flags,
        ]
        where = {"cwd": Path(__file__).parents[2], "env": os.environ | {"JAX_PLATFORMS": "cpu"}}
        return subprocess.run(command, capture_output=True, text=True, **where)

    done = launch("--drift=2026-11-25/shop,2026-11-25/again")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("cosine"))
    assert line.split()[2:] == ["1.000"] * 6
