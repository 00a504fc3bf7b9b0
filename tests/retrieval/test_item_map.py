"""Principal components, groups, titles and neighbours of items."""

import base64

import numpy as np
import pyarrow as pa
import pytest

from twotower.core.errors import ConfigError
from twotower.retrieval.item_map.plane import (
    choose_columns,
    group_items,
    item_titles,
    map_data,
    nearest_rows,
    project,
)

RNG = np.random.default_rng(0)


def test_components_are_those_of_a_singular_value_decomposition():
    vectors = (RNG.normal(size=(200, 6)) * (9, 5, 2, 1, 1, 1)).astype(np.float32) + 3
    plane = project(vectors)
    centred = vectors - vectors.mean(0)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ directions[:2].T
    np.testing.assert_allclose(np.abs(plane.points), np.abs(expected), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(plane.shares, values[:2] ** 2 / np.sum(values**2), rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 4), (3, 1)])
def test_few_vectors_and_narrow_ones_are_points_too(shape):
    assert project(np.ones(shape, np.float32)).points.shape == (shape[0], 2)


def test_neighbours_are_the_nearest_by_cosine_without_the_item_itself():
    vectors = RNG.normal(size=(40, 5)).astype(np.float32)
    vectors[7] = 2 * vectors[3]
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = directions @ directions.T
    np.fill_diagonal(cosines, -2)
    expected = -np.sort(-cosines, axis=1)[:, :4]
    found = nearest_rows(vectors, 4)
    # By cosine, not by row: two of the vectors have one direction.
    found_cosines = np.take_along_axis(cosines, found, axis=1)
    np.testing.assert_allclose(-np.sort(-found_cosines), expected, atol=1e-6)
    # Of many equal vectors none is its own neighbour.
    equal = nearest_rows(np.ones((12, 3), np.float32), 4)
    assert equal.shape == (12, 4) and not (equal == np.arange(12)[:, None]).any()


def test_the_most_frequent_values_have_a_group_and_all_others_one():
    values = [f"v{number}" for number in range(10) for _ in range(20 - number)] + [None, ""]
    grouping = group_items("kind", pa.chunked_array([values]))
    assert grouping.labels == (*(f"v{number}" for number in range(7)), "others (4)")
    assert grouping.groups[0] == 0 and grouping.groups[-1] == 7 == grouping.groups[-3]
    prices = group_items("price", pa.chunked_array([np.arange(100.0)]))
    assert np.bincount(prices.groups).tolist() == [20] * 5
    genres = group_items("genres", pa.chunked_array([[["Drama", "War"], [], None]]))
    assert sorted(genres.labels) == ["(none)", "Drama"]
    with pytest.raises(ConfigError, match="kinds=|no category"):
        group_items("kinds", pa.chunked_array([[{"a": 1}]]))


def test_columns_are_texts_of_few_values_and_else_popularity():
    items = pa.table(
        {
            "item_id": [str(number) for number in range(12)],
            "title": [f"title {number}" for number in range(100, 112)],
            "year": range(12),
            "kind": ["a", "b", "c"] * 4,
            "flag": ["0", "1"] * 6,
        }
    )
    counts = np.arange(12)
    found = choose_columns(items.drop_columns("title"), (), counts)
    assert [grouping.column for grouping in found] == ["kind", "popularity"]
    assert found[1].groups[0] == 0 and found[1].groups[-1] == 4
    named = choose_columns(items, ("flag", "kind"), counts)
    assert [grouping.column for grouping in named] == ["flag", "kind"]


def test_a_column_that_nearly_all_items_share_is_no_colour():
    countries = ["here"] * 57 + ["a", "b", "c"]
    items = pa.table({"item_id": [str(row) for row in range(60)], "country": countries})
    found = choose_columns(items, (), np.arange(60))
    assert [grouping.column for grouping in found] == ["popularity"]
    assert choose_columns(items, ("country",), np.arange(60))[0].column == "country"


def test_a_map_keeps_places_groups_and_neighbours():
    vectors = RNG.normal(size=(30, 4)).astype(np.float32)
    plane = project(vectors)
    grouping = group_items("kind", pa.chunked_array([["a", "b", "c"] * 10]))
    rows = np.arange(0, 30, 2)
    titles = [f"title {row}" for row in rows]
    data = map_data(plane, grouping, titles, vectors, rows)
    assert data["titles"] == titles

    def read(name, kind):
        return np.frombuffer(base64.b64decode(data[name]), kind)

    places = read("places", "<u2").reshape(-1, 2) / 65_535
    points = plane.points[rows]
    # One scale for both axes.
    scale = np.ptp(places[:, 0]) / np.ptp(points[:, 0])
    np.testing.assert_allclose(
        places - places.mean(0), scale * (points - points.mean(0)), atol=1e-4
    )
    np.testing.assert_array_equal(read("groups", "u1"), grouping.groups[rows])
    nearest = read("nearest", "<u2").reshape(len(rows), -1)
    np.testing.assert_array_equal(nearest, nearest_rows(vectors[rows], 8))


def test_a_column_that_is_called_a_title_is_the_title():
    items = pa.table({"item_id": ["a", "b"], "brand": ["x", "y"], "Title_ar": ["u", None]})
    assert item_titles(items, ()) == ["u", "b"]
    assert item_titles(items.drop_columns("Title_ar"), ("brand",)) == ["a", "b"]
    assert item_titles(items.rename_columns(["item_id", "Name", "title"]), ()) == ["u", "b"]
