"""What a short training on the generated shop makes of Arabic titles, of items that nobody has
seen."""

import numpy as np
import pyarrow as pa
import pytest

from experiments.configs import arabic_shop
from twotower.config import from_dict
from twotower.data.shop.words import CATEGORIES
from twotower.retrieval.embed import embed_rows
from twotower.training.run import load_run, train

pytestmark = pytest.mark.slow

# Every noun of the shop with every material of its shelf: (title, shelf).
TITLES = [
    (f"{noun} {material}", shelf)
    for shelf, category in enumerate(CATEGORIES)
    for noun in category.nouns.values()
    for material in category.materials.values()
]
RING = "خاتم ذهب"
CHAIN = "سلسال ذهب"


@pytest.fixture(scope="module")
def embed(tmp_path_factory):
    """Titles -> the vectors of items whose id is unknown, by a smaller kin of `arabic_shop`."""
    config = arabic_shop.get_config()
    config.data.num_interactions = 20_000
    config.features.user = {"user_id": {"type": "string", "embedding_size": 32}}
    config.features.item.item_id["embedding_size"] = 16
    config.features.item.title_ar["embedding_size"] = 48
    config.model.user.layers = config.model.item.layers = (32,)
    config.training.batch_size = 128
    config.training.steps = config.training.validate_every = 120
    config.training.tables.learning_rate = 0.1
    config.model.user.dropout = config.model.item.dropout = 0.0
    workdir = tmp_path_factory.mktemp("runs") / "arabic"
    train(from_dict(config), workdir, devices=1)
    run = load_run(workdir, checkpoint="latest")

    def embed(titles):
        rows = pa.table({"item_id": ["never seen"] * len(titles), "title_ar": titles})
        return embed_rows(run.model, run.weights, "item", run.prepared.encoder.encode("item", rows))

    return embed


def test_titles_of_like_products_are_closer_than_unlike_ones(embed):
    titles = [title for title, _ in TITLES]
    shelves = np.array([shelf for _, shelf in TITLES])
    vectors = embed(titles)
    cosines = vectors @ vectors.T
    ring = titles.index(RING)
    chain = titles.index(CHAIN)
    unlike = np.array(["ذهب" not in title for title in titles]) & ~np.isin(
        shelves, shelves[[ring, chain]]
    )
    for one in (ring, chain):
        assert cosines[ring, chain] > cosines[one, unlike].mean() + 0.1
        assert np.mean(cosines[ring, chain] > cosines[one, unlike]) > 0.75
    np.fill_diagonal(cosines, -1)
    nearest = shelves[cosines.argmax(axis=1)]
    assert (
        np.mean(nearest == shelves) > 0.85
    )  # what shoppers of one shelf buy together, whatever it is made of


@pytest.mark.parametrize(
    "title, others",
    [
        (
            RING,
            ["خَاتَمُ ذَهَبٍ", "خـــاتم ذهــب", "  خاتم   ذهب ", "خاتم\u200f ذهب"],
        ),  # vowels, tatweel, blanks, marks of direction
        (
            "ألماس أبيض",
            ["الماس ابيض", "آلماس إبيض", "ٱلماس أَبيض"],
        ),  # alef with and without hamza, madda, wasla
        (
            "إصدار كلاسيكي",
            ["اصدار كلاسيكى", "إصدار کلاسیکی"],
        ),  # yaa, alef maqsura, the Persian keyboard's letters
        ("ساعة فضة", ["ساعه فضه", "سَاعَة فِضَّة"]),  # taa marbuta
        ("سوار رقم 12", ["سوار رقم ١٢", "سوار رقم ۱۲"]),  # digits
    ],
)
def test_another_spelling_of_a_title_has_the_very_same_vector(embed, title, others):
    vectors = embed([title, *others, CHAIN])
    np.testing.assert_array_equal(vectors[1:-1], np.repeat(vectors[:1], len(others), axis=0))
    assert np.abs(vectors[-1] - vectors[0]).max() > 1e-2
