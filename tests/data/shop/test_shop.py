"""The generated shop: what it says of itself is so, the same seed gives the same bytes, and it can
be learnt."""

import numpy as np
import pyarrow.compute as pc
import pytest
from scipy import sparse
from scipy.sparse.linalg import svds

from twotower.config import DataConfig, TableConfig
from twotower.data.shop import generate as synthetic
from twotower.data.shop import log as shop_log
from twotower.data.sources.load import load_dataset


@pytest.fixture(scope="module")
def shop():
    return load_dataset(DataConfig(source="shop", num_interactions=100_000))


def codes(shop):
    users = pc.index_in(shop.interactions["user_id"], shop.users["user_id"]).to_numpy()
    items = pc.index_in(shop.interactions["item_id"], shop.items["item_id"]).to_numpy()
    return users, items


@pytest.mark.parametrize("rows", [1_000, 12_345])
def test_exactly_as_many_rows_as_asked_and_the_same_bytes_for_the_same_seed(tmp_path, rows):
    for run, seed in (("a", 3), ("b", 3), ("c", 4)):
        synthetic.write(synthetic.generate(rows, seed=seed), tmp_path / run)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {
        "interactions.parquet",
        "users.parquet",
        "items.parquet",
        "user_factors.npy",
        "item_factors.npy",
    }
    for name in names:
        one, same, other = ((tmp_path / run / name).read_bytes() for run in "abc")
        assert one == same and one != other, name
    assert len(synthetic.generate(rows, seed=3).interactions) == rows


def test_what_is_written_reads_back_as_what_was_generated(tmp_path):
    made = synthetic.generate(2_000, seed=1)
    synthetic.write(made, tmp_path)
    names = ("interactions", "users", "items")
    log, users, items = (TableConfig(path=str(tmp_path / f"{name}.parquet")) for name in names)
    read = load_dataset(
        DataConfig(source="parquet", interactions=log, user_table=users, item_table=items)
    )
    for name in names:
        assert getattr(read, name).equals(getattr(made, name)), name


def test_nobody_acts_before_joining_and_nothing_is_seen_before_it_exists(shop):
    users, items = codes(shop)
    time = shop.interactions["timestamp"].to_numpy()
    joined, created = shop.users["joined"].to_numpy(), shop.items["created"].to_numpy()
    assert (np.diff(time) >= 0).all()
    assert (time >= joined[users]).all() and (time >= created[items]).all()
    assert (
        0.05 < (joined > shop_log.START).mean() < 0.2
        and 0.05 < (created > shop_log.START).mean() < 0.2
    )


def test_a_cart_follows_a_view_of_the_item_and_a_purchase_follows_a_cart(shop):
    needs = {"add_to_cart": "view", "purchase": "add_to_cart"}
    done = set()
    counts = dict.fromkeys(synthetic.EVENTS, 0)
    for row in shop.interactions.slice(0, 30_000).to_pylist():
        assert (
            row["event"] == "view" or (row["user_id"], row["item_id"], needs[row["event"]]) in done
        )
        done.add((row["user_id"], row["item_id"], row["event"]))
        counts[row["event"]] += 1
    assert counts["view"] > 3 * counts["add_to_cart"] > 3 * counts["purchase"] > 0


def test_items_are_drawn_by_the_true_preference():
    rng = np.random.default_rng(0)
    theta = rng.dirichlet(np.full(4, 0.3), 1).astype(np.float32)
    phi = rng.dirichlet(np.full(6, 1.0), 4).astype(np.float32)
    created = np.array([0, 0, 0, 0, 10, 0])
    for time in (5, 20):
        item = shop_log._draw_items(
            rng, np.zeros(200_000, int), np.full(200_000, time), theta, created, phi
        )
        expected = (theta @ phi)[0] * (created <= time)
        np.testing.assert_allclose(
            np.bincount(item, minlength=6) / len(item), expected / expected.sum(), atol=0.005
        )


def test_the_day_has_a_rhythm_and_events_of_a_session_are_minutes_apart(shop):
    by_hour = np.bincount(shop.interactions["timestamp"].to_numpy() // 3600 % 24, minlength=24)
    assert by_hour[20] > 4 * by_hour[3]
    users, _ = codes(shop)
    order = np.argsort(users, kind="stable")
    gaps = np.diff(shop.interactions["timestamp"].to_numpy()[order])[np.diff(users[order]) == 0]
    assert 30 < np.median(gaps) < 600 and (gaps > 86_400).mean() > 0.05


def test_titles_say_what_the_item_is_in_both_languages(shop):
    rings = [row for row in shop.items.to_pylist() if row["category"] == "rings"]
    assert rings and all(
        "ring" in row["title"] and row["material"] in row["title"] for row in rings
    )
    gold = [
        row["title_ar"]
        for row in rings
        if row["material"] == "gold" and "wedding" not in row["title"]
    ]
    assert gold and all(title.startswith("خاتم ذهب") for title in gold)
    assert len(pc.unique(shop.items["category"])) == len(synthetic.words.CATEGORIES)


def test_sizes_grow_with_the_log(shop):
    assert (len(shop.users), len(shop.items)) == (4_000, 2_500)
    assert synthetic._sizes(10_000_000) == (400_000, 99_527)
    assert shop.truth.user_factors.shape == (4_000, 32) and shop.truth.item_factors.shape == (
        2_500,
        32,
    )
    np.testing.assert_allclose(shop.truth.user_factors.sum(axis=1), 1, rtol=1e-5)


def test_as_many_items_as_asked_all_of_them_to_be_met():
    config = DataConfig(source="shop", num_interactions=2_000, num_items=700)
    shop = load_dataset(config)
    _, items = codes(shop)
    assert (
        len(shop.items) == len(shop.truth.item_factors) == 700 and len(shop.interactions) == 2_000
    )
    assert len(np.unique(items)) > 350 and items.max() > 600


def test_the_truth_beats_popularity_and_a_simple_model_comes_near_it(shop):
    users, items = codes(shop)
    train, known = int(0.8 * len(users)), int(0.9 * len(users))
    shape = (len(shop.users), len(shop.items))

    def seen(rows):
        return sparse.csr_matrix(
            (np.ones(len(users[rows]), np.float32), (users[rows], items[rows])), shape
        )

    counts, before, after = seen(slice(train)), seen(slice(known)), seen(slice(known, None))
    queries = np.unique(users[known:])
    masked = before[queries].toarray() > 0
    right = (after[queries].toarray() > 0) & ~masked
    queries, masked, right = queries[right.any(1)], masked[right.any(1)], right[right.any(1)]

    def recall(scores):
        top = np.argpartition(np.where(masked, np.inf, -scores), 10, axis=1)[:, :10]
        return (np.take_along_axis(right, top, 1).sum(1) / right.sum(1)).mean()

    vectors = svds(counts.sign(), k=32, rng=np.random.default_rng(0))[2]
    popularity = recall(np.broadcast_to(counts.sum(0), masked.shape))
    oracle = recall(shop.truth.user_factors[queries] @ shop.truth.item_factors.T)
    model = recall(counts.sign()[queries] @ vectors.T @ vectors)
    assert oracle > 4 * popularity and model > 0.6 * oracle and model > 2 * popularity


def test_the_shop_draws_labels_with_the_probabilities_that_it_tells():
    shop = synthetic.generate(20_000, seed=2)
    user, item = (
        pc.index_in(
            shop.interactions[f"{side}_id"], getattr(shop, f"{side}s")[f"{side}_id"]
        ).to_numpy()
        for side in ("user", "item")
    )
    probabilities = synthetic.label_probabilities(shop.truth, user, item)
    preference = (
        np.float64(shop.truth.user_factors) @ np.float64(shop.truth.item_factors[item[:9]]).T
    )
    lift = np.log(preference[user[:9], np.arange(9)] / preference.mean(0))
    np.testing.assert_allclose(
        probabilities["liked"][:9], 1 / (1 + np.exp(5.4 - 2 * lift)), rtol=1e-3
    )
    for name, known in (("liked", 0.6), ("shared", 1.0)):
        labels, p = shop.interactions[name].to_numpy(), probabilities[name]
        given = ~np.isnan(labels)
        assert given.mean() == pytest.approx(known, abs=0.015) and 0.02 < p.mean() < 0.6
        for low, high in (
            (0, 0.1),
            (0.1, 0.3),
            (0.3, 1),
        ):  # each row its own probability, not one share for all
            rows = given & (p >= low) & (p < high)
            if rows.sum() > 500:
                assert labels[rows].mean() == pytest.approx(p[rows].mean(), abs=0.03)
        # Being known says nothing of the answer.
        assert p[given].mean() == pytest.approx(p.mean(), abs=0.01)
    same = synthetic.generate(20_000, seed=2).interactions
    assert same.equals(shop.interactions)
