"""Lists that are more than the order of the scores, against what all items at once tell."""

import asyncio
import collections
import threading

import numpy as np
import pytest

from tests.serving.asking import ask, make_app, post, refused, send
from twotower.config import RerankConfig
from twotower.core.errors import ConfigError
from twotower.retrieval.rerank import RERANKERS, Reranking, resolve_rerank
from twotower.retrieval.retriever import Recommendation, Recommendations
from twotower.serving import types
from twotower.serving.answers import Answers
from twotower.serving.lists.hook import Hook
from twotower.serving.lists.options import ListOptions
from twotower.serving.lists.shape import (
    MAX_CANDIDATES,
    Boost,
    Promotion,
    Reorder,
    Shape,
    make_list,
    search_boosted,
)


class Catalogue:
    """Items with a score, a colour and a size, as `Retriever` and a search have them."""

    def __init__(self, count, seed=0):
        rng = np.random.default_rng(seed)
        self.items = []
        for number, score in enumerate(np.sort(rng.normal(size=count))[::-1].tolist()):
            display = {"colour": str(rng.choice(["red", "blue", "green"]))}
            display["size"] = int(rng.integers(3))
            self.items.append(Recommendation(str(number), score, display))
        self.asked = 0

    def search(self, k, where):
        self.asked += k
        return Recommendations([x for x in self.items if self.satisfies(x, where)][:k])

    def satisfies(self, item, where):
        return all(item.display[name] == value for name, _, value in where)

    def meets_each(self, ids, wheres):
        items = [self.items[int(item)] for item in ids]
        return [np.array([self.satisfies(item, where) for item in items]) for where in wheres]


RED = (("colour", "==", "red"),)
SMALL = (("size", "==", 0),)


def ids(items):
    return [item.item_id for item in items]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "boosts",
    [
        [Boost(RED, factor=3)],
        [Boost(RED, add=1.5), Boost(SMALL, add=0.7)],
        [Boost(RED, factor=0.01), Boost(SMALL, add=-9)],
        [Boost(RED, factor=0.5), Boost(RED + SMALL, factor=20)],
    ],
)
def test_boosted_lists_are_those_of_all_items(boosts, seed):
    catalogue = Catalogue(300, seed)
    scores = {}
    for item in catalogue.items:
        score = item.score
        for boost in boosts:
            if catalogue.satisfies(item, boost.where):
                scaled = score * boost.factor if score >= 0 else score / boost.factor
                score = scaled + boost.add
        scores[item.item_id] = score
    expected = sorted(scores, key=lambda item: -scores[item])[:20]
    found = search_boosted(catalogue, catalogue.search, (), 20, boosts)
    assert ids(found) == expected
    assert [item.score for item in found] == [scores[item] for item in expected]


def test_a_boost_that_raises_needs_no_more_than_two_searches():
    catalogue = Catalogue(300)
    search_boosted(catalogue, catalogue.search, (), 20, [Boost(RED, factor=3)])
    assert catalogue.asked == 40


def make(catalogue, **wishes):
    return make_list(catalogue, catalogue.search, Shape(**wishes))


def test_promotions_have_every_so_manieth_position_and_its_best_items():
    catalogue = Catalogue(300)
    promotions = [Promotion(RED, 20), Promotion(SMALL, 100 / 3)]
    placed = make(catalogue, length=31, promotions=promotions)
    # Of two that are due at once, as at 15 and 30, one has the position and the other the next.
    expected = sorted({*range(3, 31, 3), *range(5, 31, 5), 16, 31})
    assert [n for n, place in enumerate(placed, 1) if place.by == "promotion"] == expected
    assert len(expected) == 6 + 10
    only = make(catalogue, length=30, promotions=promotions[:1])
    assert [number for number, place in enumerate(only, 1) if place.by == "promotion"] == [
        *range(5, 31, 5)
    ]
    red = [item for item in catalogue.items if catalogue.satisfies(item, RED)]
    before: list[str] = []
    for place in only:
        left = [item for item in catalogue.items if item.item_id not in before]
        if place.by == "promotion":
            left = [item for item in red if item.item_id not in before]
        assert place.item == left[0]
        before.append(place.item.item_id)
    # The pages of a list are parts of it.
    assert make(catalogue, length=12, promotions=promotions) == placed[:12]


def test_positions_of_a_promotion_that_has_no_items_are_like_others():
    catalogue = Catalogue(50)
    nowhere = Promotion((("colour", "==", "none"),), 50)
    placed = make(catalogue, length=10, promotions=[nowhere])
    assert ids(place.item for place in placed) == ids(catalogue.items[:10])
    assert {place.by for place in placed} == {"score"}


def test_caps_hold_for_the_whole_list_promoted_or_not():
    catalogue = Catalogue(300)
    wishes = {"max_per": {"colour": 2, "size": 3}, "promotions": [Promotion(RED, 50)]}
    placed = make(catalogue, length=10, **wishes)
    colours = collections.Counter(place.item.display["colour"] for place in placed)
    assert colours == {"red": 2, "blue": 2, "green": 2}
    alone = make(catalogue, length=4, max_per={"colour": 2})
    expected: list[Recommendation] = []
    for item in catalogue.items:
        same = [other for other in expected if other.display["colour"] == item.display["colour"]]
        if len(same) < 2:
            expected.append(item)
    assert [place.item for place in alone] == expected[:4]


def test_candidates_are_searched_until_a_capped_list_is_full():
    catalogue = Catalogue(400)
    reds = [item for item in catalogue.items if catalogue.satisfies(item, RED)]
    others = [item for item in catalogue.items if not catalogue.satisfies(item, RED)]
    catalogue.items = [*reds, *others]
    placed = make(catalogue, length=6, max_per={"colour": 3})
    assert ids(place.item for place in placed) == ids([*reds[:3], *others[:3]])


def test_a_list_of_many_wishes_looks_at_a_bounded_number_of_candidates():
    catalogue = Catalogue(1_000)
    boosts = [Boost(RED, factor=1.1), *[Boost((), add=1e-3)] * 15]
    wishes = {"boosts": boosts, "promotions": [Promotion((), 6)] * 16, "max_per": {"size": 1}}
    shown = make(catalogue, length=10, **wishes)
    assert len(shown) == 3 and catalogue.asked < 5 * MAX_CANDIDATES


def test_shares_of_explored_items_are_their_propensities():
    catalogue = Catalogue(8)
    draws = 4_000
    counts = collections.Counter()
    for seed in range(draws):
        (first, second) = make(catalogue, length=2, explore=0.4, seed=seed)
        counts[first.item.item_id] += 1
        counts[first.item.item_id, second.item.item_id] += 1
        assert first.propensity == pytest.approx(0.05 + 0.6 * (first.item.item_id == "0"))
        assert first.is_best == (first.item.item_id == "0")
    assert counts["0"] / draws == pytest.approx(0.65, abs=0.03)
    for item in range(1, 8):
        assert counts[str(item)] / draws == pytest.approx(0.05, abs=0.015)
    # After the best, the second best has the place of the best, among seven.
    expected = 0.6 + 0.4 / 7
    assert counts["0", "1"] / counts["0"] == pytest.approx(expected, abs=0.03)


def test_a_seed_repeats_a_list_page_by_page():
    catalogue = Catalogue(300)
    whole = make(catalogue, length=40, explore=0.5, seed=3)
    assert make(catalogue, length=10, explore=0.5, seed=3) == whole[:10]
    assert make(catalogue, length=40, explore=0.5, seed=4) != whole
    assert [place.item for place in make(catalogue, length=5)] == catalogue.items[:5]


def alternate(pool, k):
    """Takes the best item of another colour than the one before, as MMR would."""
    left = list(range(len(pool)))
    chosen = []
    while left and len(chosen) < k:
        colour = pool[chosen[-1]].display["colour"] if chosen else ""
        others = [row for row in left if pool[row].display["colour"] != colour]
        chosen.append((others or left)[0])
        left.remove(chosen[-1])
    return chosen


def best_last(pool, k):
    """Takes the best, and turns them: its choice of ten is no part of its choice of twenty."""
    return list(range(min(k, len(pool))))[::-1]


@pytest.mark.parametrize(
    "wishes",
    [
        {},
        {"max_per": {"colour": 8}},
        {"promotions": [Promotion(SMALL, 20)]},
        {"explore": 0.5, "seed": 3},
        {"max_per": {"colour": 9}, "promotions": [Promotion(RED, 10)], "explore": 0.3, "seed": 5},
        {"boosts": [Boost(RED, add=0.3)]},
    ],
    ids=["plain", "caps", "promotions", "explore", "all", "boosts"],
)
@pytest.mark.parametrize("choose", [alternate, best_last])
def test_pages_of_a_re_ranked_list_are_those_of_one_order(choose, wishes):
    catalogue = Catalogue(200)
    wishes = {"reorder": Reorder(choose, 30, is_greedy=choose is alternate), **wishes}
    whole = make(catalogue, length=48, **wishes)
    for length in (6, 12, 24):
        assert make(catalogue, length=length, **wishes) == whole[:length]
    shown = ids(place.item for place in whole)
    assert len(set(shown)) == len(shown) and shown != sorted(shown, key=int)
    if len(wishes) == 1:
        assert sorted(map(int, shown[:30])) == list(range(30))
        assert shown[30:] == [str(row) for row in range(30, 48)]
        assert [place.is_behind for place in whole] == [False] * 30 + [True] * 18


def test_what_a_re_ranker_leaves_out_comes_on_no_page():
    catalogue = Catalogue(60)
    reorder = Reorder(lambda pool, k: [row for row in range(len(pool)) if row % 2], 20)
    placed = make(catalogue, length=30, reorder=reorder)
    assert [place.item for place in placed] == catalogue.items[1:20:2]
    # A corpus that is all in the window.
    small = Catalogue(9)
    reorder = Reorder(alternate, 20, is_greedy=True)
    assert len(make(small, length=30, reorder=reorder)) == 9
    assert make(Catalogue(0), length=3, reorder=reorder) == []


@pytest.fixture(scope="module")
def app(retriever, tmp_path_factory):
    return make_app(retriever, tmp_path_factory.mktemp("events"))


@pytest.mark.parametrize("whose", ["known", "nobody"])
def test_the_api_shapes_lists_of_everybody(app, retriever, whose):
    user = retriever.bundle.users["user_id"][0].as_py() if whose == "known" else "nobody"
    k = 12
    everything = retriever.popular_items(200)
    source = "popular"
    if whose == "known":
        everything = retriever.recommend(user, k=200)
        source = "model"
    heels = {"category": "heels"}
    is_heel = {item.item_id: item.display["category"] == "heels" for item in everything}
    scores = {x.item_id: x.score * (2 if is_heel[x.item_id] else 1) for x in everything}
    if whose == "known":
        for item in everything:
            if item.score < 0 and is_heel[item.item_id]:
                scores[item.item_id] = item.score / 2
    order = sorted(scores, key=lambda item: -scores[item])
    answer = post(app, "retrieve", user_id=user, k=k, boosts=[{"where": heels, "factor": 2}])
    np.testing.assert_allclose(
        [item["score"] for item in answer["items"]], [scores[item] for item in order[:k]], rtol=1e-5
    )
    promotions = [{"where": {"brand": "Zahra"}, "percent": 25}]
    wishes = {"user_id": user, "promotions": promotions, "max_per": {"category": 4}}
    shown = post(app, "retrieve", k=k, **wishes, columns=["brand", "category"])["items"]
    promoted = [item for item in shown if item["source"] == "promoted"]
    assert [item["display"]["brand"] for item in promoted] == ["Zahra"] * 3
    assert {item["source"] for item in shown} == {source, "promoted"}
    labels = collections.Counter(item["display"]["category"] for item in shown)
    assert max(labels.values()) <= 4
    later = post(app, "retrieve", k=4, offset=8, **wishes)["items"]
    assert [x["item_id"] for x in later] == [x["item_id"] for x in shown[8:]]
    explored = post(app, "retrieve", user_id=user, k=k, explore=1, seed=7)["items"]
    assert {item["source"] for item in explored} == {"explored"}
    assert all(0 < item["propensity"] <= 0.02 for item in explored)


@pytest.mark.parametrize(
    "body, field, words",
    [
        ({"boosts": [{"where": {"brand": "a"}}]}, "boosts[0]", "factor or add"),
        ({"boosts": [{"where": {"brnd": "a"}, "add": 1}]}, "boosts[0].where", "'brand'"),
        ({"promotions": [{"where": {"brand": "a"}, "percent": 60}] * 2}, "promotions", "120"),
        ({"max_per": {"categry": 2}}, "max_per.categry", "'category'"),
        ({"explore": 1.5}, "explore", "<= 1"),
        (
            {
                "k": 1_000,
                "boosts": [{"where": {"brand": "a"}, "add": 1}] * 4,
                "promotions": [{"where": {"brand": "a"}, "percent": 5}] * 4,
            },
            "k",
            "20,000 candidates",
        ),
    ],
)
def test_wishes_that_cannot_be_meant_are_refused(app, body, field, words):
    problem = refused(app, "retrieve", user_id="1", **body)
    assert problem["field"] == field and words in problem["detail"] and problem["cure"]


def test_the_reason_is_the_event_whose_absence_costs_most(app, retriever):
    history = retriever.bundle.items["item_id"].to_pylist()[3:7]
    answer = post(app, "retrieve", history=history, k=5, reasons=True)
    items = [item["item_id"] for item in answer["items"]]
    vectors = retriever.item_vectors(items)
    whole = vectors @ retriever.encode_users([{"history": history}])[0]
    without = [[x for x in history if x != event] for event in history]
    scores = retriever.encode_users([{"history": rest} for rest in without]) @ vectors.T
    for column, item in enumerate(answer["items"]):
        lost = whole[column] - scores[:, column]
        assert item["reason"]["item_id"] == history[int(lost.argmax())]
        assert item["reason"]["lost"] == pytest.approx(lost.max(), abs=1e-4)
    plain = post(app, "retrieve", history=history, k=5)["items"]
    assert "reason" not in plain[0]
    # Of a known user the stored history speaks, with what its events were.
    user = retriever.bundle.users["user_id"][0].as_py()
    stored = retriever.user_rows.take([user])["history"][0].as_py()
    shown = post(app, "retrieve", user_id=user, k=3, reasons=True)["items"]
    assert {item["reason"]["item_id"] for item in shown} <= set(stored)


def test_the_reason_of_a_similar_item_is_the_example_that_it_is_most_like(app, retriever):
    items = retriever.items()["item_id"].to_pylist()
    liked = items[2:5]
    shown = post(app, "retrieve", like=liked, unlike=[items[9]], k=4, reasons=True)["items"]
    for item in shown:
        cosines = {}
        for example in liked:
            rest = [other for other in liked if other != example]
            listed = retriever.items_like(rest, 200, unlike=[items[9]])
            (cosines[example],) = [x.score for x in listed if x.item_id == item["item_id"]]
        expected = min(cosines, key=lambda example: cosines[example])
        assert item["reason"]["item_id"] == expected
        lost = item["score"] - cosines[expected]
        assert item["reason"]["lost"] == pytest.approx(lost, abs=1e-5)
    (alone,) = post(app, "retrieve", like=items[:1], k=1, reasons=True)["items"]
    assert alone["reason"] == {"item_id": items[0], "lost": pytest.approx(alone["score"], abs=1e-5)}


@pytest.mark.parametrize("fallback, source", [("latest", "new"), ("none", None)])
def test_somebody_of_whom_nothing_is_known_gets_the_fallback(retriever, fallback, source):
    answers = Answers(retriever, fallback=fallback)
    answer = answers.retrieve(types.Retrieve(user_id="nobody", k=3))
    if source is None:
        assert not answer.items and "no fallback" in answer.note
        return
    assert [item.item_id for item in answer.items] == ids(retriever.newest_items(3))
    assert {item.source for item in answer.items} == {source}


def test_a_fallback_that_the_items_do_not_have_is_refused_at_the_start(retriever, monkeypatch):
    def refuse(*_):
        raise ConfigError("column=None: the bundle has none of times.")

    monkeypatch.setattr(retriever, "newest_items", refuse)
    with pytest.raises(ConfigError, match="--fallback=latest: .*none of times"):
        Answers(retriever, fallback="latest")


def hook(choose, seconds=10.0, multiple=5):
    return Hook(Reranking(RerankConfig(kind="mine", multiple=multiple), choose), seconds)


@pytest.mark.parametrize("whose", ["known", "nobody"])
def test_pages_by_diversity_repeat_and_lose_nothing(app, retriever, whose):
    user = retriever.bundle.users["user_id"][0].as_py() if whose == "known" else "nobody"
    wishes = {"user_id": user, "diversity": 0.7}
    answers = [post(app, "retrieve", k=8, offset=8 * page, **wishes) for page in range(6)]
    pages = [[item["item_id"] for item in answer["items"]] for answer in answers]
    shown = sum(pages, [])
    everything = retriever.popular_items(48)
    if whose == "known":
        everything = retriever.recommend(user, k=48)
        assert pages[0] == ids(retriever.recommend(user, k=8, rerank="mmr:diversity=0.7"))
    # The best forty by score are re-ranked; those behind them follow, and the answer says so.
    assert sorted(shown[:40]) == sorted(ids(everything)[:40]) and pages[1] != ids(everything)[8:16]
    assert pages[5] == ids(everything)[40:]
    assert ["behind the window" in answer.get("note", "") for answer in answers] == [False] * 5 + [
        True
    ]
    # Pages of several lengths fit together by a window of their own.
    for k, offset in ((5, 0), (11, 5), (24, 16)):
        page = post(app, "retrieve", k=k, offset=offset, window=40, **wishes)["items"]
        assert [item["item_id"] for item in page] == shown[offset : offset + k]
    assert refused(app, "retrieve", user_id=user, window=9)["field"] == "window"


def test_pages_of_a_hook_are_those_of_one_order(retriever):
    user = retriever.bundle.users["user_id"][0].as_py()

    def turn(candidates, k):
        return np.arange(len(candidates.scores))[:k][::-1]

    answers = Answers(retriever, hook=hook(turn, multiple=3))
    pages = []
    for offset in range(0, 24, 6):
        answer = answers.retrieve(types.Retrieve(user_id=user, k=6, offset=offset))
        pages.append([item.item_id for item in answer.items])
    best = ids(retriever.recommend(user, k=24))
    assert sum(pages, []) == [*best[:18][::-1], *best[18:]]


def test_pages_of_a_re_ranker_of_the_bundle_are_those_of_one_order(retriever, monkeypatch):
    user = retriever.bundle.users["user_id"][0].as_py()
    best = ids(retriever.recommend(user, k=24))

    def turn(candidates, k):
        return np.arange(len(candidates.scores))[:k][::-1]

    def pages(kind, **options):
        reranking = resolve_rerank({"kind": kind, "multiple": 3, **options}, RerankConfig())
        monkeypatch.setattr(retriever, "configured_rerank", reranking)
        answers = Answers(retriever)
        made = []
        for offset in range(0, 24, 6):
            answer = answers.retrieve(types.Retrieve(user_id=user, k=6, offset=offset))
            made.append([item.item_id for item in answer.items])
        return made

    monkeypatch.setitem(RERANKERS, "turned", turn)
    assert sum(pages("turned"), []) == [*best[:18][::-1], *best[18:]]
    # What caps leave out of the window comes on no page, nor what is behind it.
    capped = pages("caps", options={"column": "category", "max_items": 2})
    labels = collections.Counter(
        retriever.item(item).display["category"] for page in capped for item in page
    )
    assert set(labels.values()) <= {1, 2} and len(sum(capped, [])) == labels.total() < 18
    assert capped[0] == ids(retriever.recommend(user, k=6))


def test_others_are_answered_while_a_hook_works(retriever, tmp_path):
    user = retriever.bundle.users["user_id"][0].as_py()
    begun = threading.Event()
    going_on = threading.Event()

    def slow(candidates, k):
        begun.set()
        # Until somebody else was answered.
        assert going_on.wait(5)
        return np.arange(k)[::-1]

    mine = hook(slow)
    app = make_app(retriever, tmp_path, hook=mine)

    async def ask_both():
        lists = [send(app, "POST", "/v1/retrieve", {"user_id": user, "k": 3}) for _ in range(4)]
        waiting = asyncio.gather(*lists)
        await asyncio.to_thread(begun.wait)
        popular = await send(app, "POST", "/v1/popular", {"k": 1})
        going_on.set()
        return popular, await waiting

    popular, answers = asyncio.run(ask_both())
    assert popular.status_code == 200
    best = ids(retriever.recommend(user, k=15))
    for answer in answers:
        assert [item["item_id"] for item in answer.json()["items"]] == best[:11:-1]
    # Lists that are made together wait for each other, and none is given up.
    assert not mine.failures


def test_a_hook_ranks_the_candidates_of_the_model(retriever):
    seen = []

    def cheapest(candidates, k):
        seen.append(candidates.user)
        return np.argsort(candidates.column("price"))[:k]

    user = retriever.bundle.users["user_id"][0].as_py()
    answers = Answers(retriever, hook=hook(cheapest))
    answer = answers.retrieve(types.Retrieve(user_id=user, k=4))
    pool = sorted(retriever.recommend(user, k=20), key=lambda item: item.display["price"])
    assert [item.item_id for item in answer.items] == ids(pool[:4]) and seen == [user]
    # Its own choice of a re-ranker comes first, and popular items are not the model's.
    diverse = answers.retrieve(types.Retrieve(user_id=user, k=4, diversity=0.5))
    expected = retriever.recommend(user, k=4, rerank="mmr:diversity=0.5")
    assert [item.item_id for item in diverse.items] == ids(expected)
    assert answers.retrieve(types.Retrieve(k=4)).items[0].source == "popular"
    assert len(seen) == 1


def test_a_hook_that_fails_or_is_late_costs_its_order_alone(retriever):
    user = retriever.bundle.users["user_id"][0].as_py()
    expected = ids(retriever.recommend(user, k=4))
    going_on = threading.Event()

    def late(candidates, k):
        going_on.wait(10)
        return np.arange(k)

    hooks = {
        "failed": hook(lambda *_: 1 / 0),
        "wrong": hook(lambda candidates, k: np.zeros(k, int)),
        "late": hook(late, seconds=0.001),
    }
    for name, each in hooks.items():
        answers = Answers(retriever, hook=each)
        for _ in range(2):
            answer = answers.retrieve(types.Retrieve(user_id=user, k=4))
            assert [item.item_id for item in answer.items] == expected, name
    going_on.set()
    assert hooks["failed"].failures == {"failed": 2} == hooks["wrong"].failures
    assert hooks["late"].failures == {"late": 1, "busy": 1}


def test_the_sources_of_a_mixed_list_are_counted_each(retriever, tmp_path):
    app = make_app(retriever, tmp_path)
    promotions = [{"where": {"brand": "Zahra"}, "percent": 25}]
    post(app, "retrieve", k=8, promotions=promotions)
    text = ask(app, "GET", "/metrics").text
    for source, count in [("popular", 6), ("promoted", 2)]:
        (line,) = [x for x in text.splitlines() if f'items_total{{source="{source}"' in x]
        assert line.endswith(f" {count}.0")


PLUGIN = """
import numpy as np
from twotower.retrieval.rerank import RERANKERS

RERANKERS.register("worst_first", lambda candidates, k: np.argsort(candidates.scores)[:k])
"""


def test_a_plugin_names_the_hook_of_a_server(retriever, tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(PLUGIN)
    user = retriever.bundle.users["user_id"][0].as_py()
    options = ListOptions(plugins=[str(plugin)], rerank="worst_first", rerank_ms=1e4)
    try:
        answers = options.prepare(tmp_path / "bundle")(retriever)
        shown = answers.retrieve(types.Retrieve(user_id=user, k=3)).items
        assert [item.item_id for item in shown] == ids(retriever.recommend(user, k=15)[:11:-1])
        with pytest.raises(ConfigError, match="lies inside"):
            options.prepare(tmp_path)
        with pytest.raises(ConfigError, match="--rerank=worst_fist.*'worst_first'"):
            ListOptions(rerank="worst_fist").prepare(tmp_path)
    finally:
        del RERANKERS["worst_first"]


def test_batches_of_popular_and_of_the_newest_items(app):
    requests = [{"k": 2}, {"k": 3, "where": {"category": "heels"}}]
    for name in ("popular", "latest"):
        answers = post(app, f"{name}/batch", requests=requests)["answers"]
        alone = [post(app, name, **request)["items"] for request in requests]
        assert [answer["items"] for answer in answers] == alone
