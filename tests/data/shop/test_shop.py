"""The generated shop: true to what it says, the same bytes for the same seed, learnable."""

import numpy as np
import pyarrow.compute as pc
import pytest
from scipy import sparse
from scipy.sparse.linalg import svds

from twotower.config import DataConfig, TableConfig
from twotower.data.shop import generate as shop_module
from twotower.data.shop import log as log_module
from twotower.data.shop.words import CATEGORIES
from twotower.data.sources.load import load_dataset


@pytest.fixture(scope="module")
def shop():
    return load_dataset(DataConfig(source="shop", num_interactions=100_000))


def rows_of_tables(shop):
    """The rows of the users and of the items table that the log names."""
    users = pc.index_in(shop.interactions["user_id"], shop.users["user_id"]).to_numpy()
    items = pc.index_in(shop.interactions["item_id"], shop.items["item_id"]).to_numpy()
    return users, items


FILES = {
    "interactions.parquet",
    "users.parquet",
    "items.parquet",
    "user_factors.npy",
    "item_factors.npy",
}


@pytest.mark.parametrize("num_rows", [1_000, 12_345])
def test_exactly_as_many_rows_as_asked_and_the_same_bytes_for_the_same_seed(tmp_path, num_rows):
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        generated = shop_module.generate(num_rows, seed=seed)
        assert len(generated.interactions) == num_rows
        shop_module.write(generated, tmp_path / folder)
    assert {path.name for path in (tmp_path / "a").iterdir()} == FILES
    for name in FILES:
        one, same, other = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert one == same and one != other, name


def test_what_is_written_reads_back_as_what_was_generated(tmp_path):
    generated = shop_module.generate(2_000, seed=1)
    shop_module.write(generated, tmp_path)
    names = ("interactions", "users", "items")
    log, users, items = (TableConfig(path=str(tmp_path / f"{name}.parquet")) for name in names)
    config = DataConfig(source="parquet", interactions=log, user_table=users, item_table=items)
    read = load_dataset(config)
    generated = generated.with_codes()
    for name in names:
        assert getattr(read, name).equals(getattr(generated, name)), name


def test_nobody_acts_before_joining_and_nothing_is_seen_before_it_exists(shop):
    users, items = rows_of_tables(shop)
    time = shop.interactions["timestamp"].to_numpy()
    joined = shop.users["joined"].to_numpy()
    created = shop.items["created"].to_numpy()
    assert (np.diff(time) >= 0).all()
    assert (time >= joined[users]).all()
    assert (time >= created[items]).all()
    for arrivals in (joined, created):
        assert 0.05 < (arrivals > log_module.START).mean() < 0.2


def test_a_cart_follows_a_view_of_the_item_and_a_purchase_follows_a_cart(shop):
    event_before = {"add_to_cart": "view", "purchase": "add_to_cart"}
    done = set()
    counts = dict.fromkeys(log_module.EVENTS, 0)
    for row in shop.interactions.slice(0, 30_000).to_pylist():
        user, item, event = row["user_id"], row["item_id"], row["event"]
        assert event == "view" or (user, item, event_before[event]) in done
        done.add((user, item, event))
        counts[event] += 1
    assert counts["view"] > 3 * counts["add_to_cart"] > 3 * counts["purchase"] > 0


def test_items_are_drawn_by_the_true_preference():
    rng = np.random.default_rng(0)
    mixture = rng.dirichlet(np.full(4, 0.3), 1).astype(np.float32)
    tastes = rng.dirichlet(np.full(6, 1.0), 4).astype(np.float32)
    created = np.array([0, 0, 0, 0, 10, 0])
    users = np.zeros(200_000, int)
    for time in (5, 20):
        times = np.full(len(users), time)
        item = log_module._draw_items(rng, users, times, mixture, created, tastes)
        shares = np.bincount(item, minlength=6) / len(item)
        expected = (mixture @ tastes)[0] * (created <= time)
        np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.005)


def test_the_day_has_a_rhythm_and_events_of_a_session_are_minutes_apart(shop):
    time = shop.interactions["timestamp"].to_numpy()
    by_hour = np.bincount(time // 3600 % 24, minlength=24)
    assert by_hour[20] > 4 * by_hour[3]
    users, _ = rows_of_tables(shop)
    order = np.argsort(users, kind="stable")
    is_same_user = np.diff(users[order]) == 0
    gaps = np.diff(time[order])[is_same_user]
    assert 30 < np.median(gaps) < 600
    assert (gaps > 86_400).mean() > 0.05


def test_titles_say_what_the_item_is_in_both_languages(shop):
    rings = [row for row in shop.items.to_pylist() if row["category"] == "rings"]
    assert rings
    for row in rings:
        assert "ring" in row["title"] and row["material"] in row["title"]
    gold = [row for row in rings if row["material"] == "gold" and "wedding" not in row["title"]]
    assert gold
    for row in gold:
        assert row["title_ar"].startswith("خاتم ذهب")
    assert len(pc.unique(shop.items["category"])) == len(CATEGORIES)


def test_sizes_grow_with_the_log(shop):
    assert (len(shop.users), len(shop.items)) == (4_000, 2_500)
    assert shop_module.count_shoppers(10_000_000) == 400_000
    assert shop_module.count_items(10_000_000) == 99_527
    assert shop.truth.user_factors.shape == (4_000, 32)
    assert shop.truth.item_factors.shape == (2_500, 32)
    np.testing.assert_allclose(shop.truth.user_factors.sum(axis=1), 1, rtol=1e-5)


def test_as_many_items_as_asked_all_of_them_to_be_met():
    config = DataConfig(source="shop", num_interactions=2_000, num_items=700)
    shop = load_dataset(config)
    _, items = rows_of_tables(shop)
    assert len(shop.interactions) == 2_000
    assert len(shop.items) == len(shop.truth.item_factors) == 700
    assert len(np.unique(items)) > 350
    assert items.max() > 600


def test_the_truth_beats_popularity_and_a_simple_model_comes_near_it(shop):
    users, items = rows_of_tables(shop)
    shape = (len(shop.users), len(shop.items))
    train_end = int(0.8 * len(users))
    test_start = int(0.9 * len(users))

    def matrix(rows):
        counts = np.ones(len(users[rows]), np.float32)
        return sparse.csr_matrix((counts, (users[rows], items[rows])), shape)

    counts = matrix(slice(train_end))
    queries = np.unique(users[test_start:])
    is_seen = matrix(slice(test_start))[queries].toarray() > 0
    is_right = (matrix(slice(test_start, None))[queries].toarray() > 0) & ~is_seen
    has_answer = is_right.any(axis=1)
    queries = queries[has_answer]
    is_seen = is_seen[has_answer]
    is_right = is_right[has_answer]

    def recall_at_10(scores):
        scores = np.where(is_seen, np.inf, -scores)
        top = np.argpartition(scores, 10, axis=1)[:, :10]
        hits = np.take_along_axis(is_right, top, 1).sum(axis=1)
        return (hits / is_right.sum(axis=1)).mean()

    vectors = svds(counts.sign(), k=32, rng=np.random.default_rng(0))[2]
    popularity = recall_at_10(np.broadcast_to(counts.sum(0), is_seen.shape))
    oracle = recall_at_10(shop.truth.user_factors[queries] @ shop.truth.item_factors.T)
    model = recall_at_10(counts.sign()[queries] @ vectors.T @ vectors)
    assert oracle > 4 * popularity
    assert model > 0.6 * oracle
    assert model > 2 * popularity


@pytest.fixture(scope="module")
def small_shop():
    return shop_module.generate(20_000, seed=2)


def test_the_label_probabilities_are_what_their_formula_says(small_shop):
    users, items = rows_of_tables(small_shop)
    probabilities = shop_module.label_probabilities(small_shop.truth, users, items)
    user_factors = np.float64(small_shop.truth.user_factors)
    item_factors = np.float64(small_shop.truth.item_factors[items[:9]])
    preference = user_factors @ item_factors.T
    log_lift = np.log(preference[users[:9], np.arange(9)] / preference.mean(0))
    expected = 1 / (1 + np.exp(5.4 - 2 * log_lift))
    np.testing.assert_allclose(probabilities["liked"][:9], expected, rtol=1e-3)


@pytest.mark.parametrize("name, known_share", [("liked", 0.6), ("shared", 1.0)])
def test_labels_are_drawn_with_their_probabilities(small_shop, name, known_share):
    users, items = rows_of_tables(small_shop)
    probability = shop_module.label_probabilities(small_shop.truth, users, items)[name]
    labels = small_shop.interactions[name].to_numpy()
    is_known = ~np.isnan(labels)
    assert is_known.mean() == pytest.approx(known_share, abs=0.015)
    assert 0.02 < probability.mean() < 0.6
    # Each row has its own probability, not one share for all.
    for low, high in ((0, 0.1), (0.1, 0.3), (0.3, 1)):
        rows = is_known & (probability >= low) & (probability < high)
        if rows.sum() > 500:
            assert labels[rows].mean() == pytest.approx(probability[rows].mean(), abs=0.03)
    # Being known says nothing of the answer.
    assert probability[is_known].mean() == pytest.approx(probability.mean(), abs=0.01)
