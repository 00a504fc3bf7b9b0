"""The page at `/` in Chromium: all that it offers, at both widths, by keys alone, in Arabic.

    python -m tests.serving.test_page ADDRESS FOLDER

takes screenshots of a server into a folder. Somebody looks at those of the quick start and of the
Arabic shop, and goes through this list:

 1. Nothing is cut and no text lies over another, at 1,280 and at 390 pixels.
 2. What has the focus is seen at once, and what a pointer is over too.
 3. Light and dark: every text is read without effort, borders are there and not loud.
 4. In Arabic the whole card runs from the right: rank, title, facts, source; numbers stand where
    they belong, and lists beside English ones keep their own direction.
 5. Cards of a row have their source, score and bar on one line; two lists stand side by side.
 6. Without a user, without an item, without a server: a sentence says what is the matter and what
    to do, and the page is otherwise as it was.
 7. Nothing jumps while lists, histories and the map are on their way.
 8. The map fills its frame; its key has the shapes and colours of the map.
 9. A phone shows the search and the first recommendation without endless scrolling, and everything
    that is pressed is at least as large as a finger's tip.
10. The figures of the model stand in columns, with equally many digits.
"""

import contextlib
import itertools
import shutil
import socket
import sys
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.extras import extra, program
from tests.retrieval.runs import rewrite_manifest

extra("playwright.sync_api", "dev")
extra("uvicorn", "serve")
import uvicorn  # noqa: E402  only where it is there

from tests.evaluation.report.browser import (  # noqa: E402  likewise
    CONTRAST,
    LEAST_CONTRAST,
    SCHEMES,
    WIDTHS,
    open_browser,
    visit_by_tab,
)
from tests.serving.asking import TOKENS, make_app  # noqa: E402  likewise
from twotower.retrieval.retriever import Retriever  # noqa: E402  likewise
from twotower.serving import types  # noqa: E402  likewise
from twotower.serving.aliases import Aliases  # noqa: E402  likewise
from twotower.serving.answers import Answers  # noqa: E402  likewise
from twotower.serving.limits import Limits  # noqa: E402  likewise
from twotower.serving.versions import routing, versions  # noqa: E402  likewise

pytestmark = pytest.mark.slow

CARD = "[data-list=main] .card:not(.wait)"
BESIDE = "[data-list=beside] .card:not(.wait)"
# Everything that can be operated and is there to be reached by the tabulator.
OPERABLE = """() => [...document.querySelectorAll(
  'a[href], button, input, select, summary, [tabindex="0"]'
)].filter((element) => element.tabIndex >= 0 && !element.disabled && element.checkVisibility()
  && !element.hidden).length"""
WIDER = """() => [...document.querySelectorAll('body *')].filter((element) =>
  element.checkVisibility() && !element.closest('.strip, .scroll, .heard, .skip')
  && element.getBoundingClientRect().right > document.documentElement.clientWidth + 1
).map((element) => `${element.tagName} ${element.className}`)"""
SMALL = """() => [...document.querySelectorAll('button')].filter((element) => {
  const box = element.getBoundingClientRect();
  const size = Math.min(box.width, box.height);
  return element.checkVisibility() && !element.matches('.name') && size < 24;
}).map((element) => element.textContent)"""
# How far what is seen was moved without anybody's doing (Layout Instability, W3C).
SHIFTS = """() => {
  window.shifted = 0;
  new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifted += entry.value;
  }).observe({ type: 'layout-shift', buffered: true });
}"""


@pytest.fixture(scope="module")
def browser():
    with open_browser(program("chromium", "chromium")) as opened:
        yield opened


@contextlib.contextmanager
def serving(app):
    """The address of an application that answers until the end."""
    bound = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    yield f"http://127.0.0.1:{bound.getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def site(retriever, thinned, tmp_path_factory):
    """The address of a server of two versions."""
    app = make_app(retriever, tmp_path_factory.mktemp("site"), limits=Limits())
    other = Answers(Retriever.load(thinned))
    place = versions.location_of(other.retriever, "thinned")
    app.versions.add(other)
    app.versions.apply(routing.add(app.versions.state, other.version, place))
    with serving(app) as address:
        yield address


@pytest.fixture(scope="module")
def arabic(served, tmp_path_factory):
    """The retriever of the same bundle, with titles in Arabic alone."""
    folder = tmp_path_factory.mktemp("arabic") / "bundle"
    shutil.copytree(served, folder)
    version = versions.location_of(Retriever.load(folder)).files
    path = Path(version) / "items.parquet"
    items = pq.read_table(path)
    titles = items["title_ar"]
    items = items.drop_columns("title_ar").set_column(
        items.column_names.index("title"), "title", titles
    )
    pq.write_table(items, path)
    rewrite_manifest(Path(version))
    return Retriever.load(folder)


@contextlib.contextmanager
def window(browser, address, width="desktop", scheme="light", hash=""):
    """A page in a window of its own, whose `faults` say what it should not have done."""
    context = browser.new_context(
        viewport={"width": WIDTHS[width], "height": 900},
        color_scheme=scheme,
        reduced_motion="reduce",
    )
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.faults = []

    def watch(request):
        if not request.url.startswith(address):
            page.faults.append(f"request: {request.url}")

    page.on("request", watch)
    page.on("console", lambda message: page.faults.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: page.faults.append(f"error: {error}"))
    page.add_init_script(f"({SHIFTS})()")
    page.goto(address + hash)
    yield page
    context.close()


def settle(page):
    """Waits until all lists are there."""
    page.wait_for_function(
        "() => document.querySelector('.list') && !document.querySelector('[aria-busy=true]')"
    )


def change(page, act):
    """Does something that changes the lists, and waits for them."""
    with page.expect_response(lambda response: "/v1/retrieve" in response.url):
        act()
    settle(page)


def listed(page, cards=CARD):
    return page.locator(cards).evaluate_all("cards => cards.map((card) => card.dataset.item)")


def ids(items):
    return [item.item_id for item in items]


def faults_of(page):
    faults = list(page.faults)
    faults += [f"wide: {name}" for name in page.evaluate(WIDER)]
    faults += [f"small: {name}" for name in page.evaluate(SMALL)]
    for text, contrast in page.evaluate(CONTRAST, LEAST_CONTRAST).items():
        faults.append(f"contrast {contrast}: {text}")
    return faults


def slide(page, name, value):
    page.locator(f"#{name}").evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }",
        str(value),
    )


@pytest.mark.parametrize(("width", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_lists_follow_the_user_the_history_and_the_options(
    browser, site, retriever, thinned, width, scheme
):
    with window(browser, site, width, scheme) as page:
        page.wait_for_selector(CARD)
        settle(page)
        assert listed(page) == ids(retriever.popular_items(10))
        assert page.locator(f"{CARD} .source").first.inner_text() == "popular"
        assert page.locator("#health").inner_text() == "Ready"
        assert page.locator("#suggested-users button").count() == 6
        assert faults_of(page) == []
        user = page.locator("#suggested-users bdi").first.inner_text()
        change(page, page.locator("#suggested-users button").first.click)
        assert page.evaluate("location.hash") == f"#user={user}"
        check_history(page, retriever, user)
        if width == "phone":
            page.locator("#options summary").click()
        check_options(page, retriever, user)
        check_comparisons(page, retriever, thinned, user)
        change(page, page.locator("#forget").click)
        assert page.locator("#who").inner_text() == "A visitor"


def check_history(page, retriever, user):
    """A user's list, and how it changes with a history of one's own."""
    past = retriever.latest_items(user, 200)
    assert listed(page, "#history li") == ids(past)
    assert listed(page) == ids(retriever.recommend(user, k=10))
    assert page.locator(f"{CARD} .source").first.inner_text() == "model"
    because = page.locator(f"{CARD} .reason").first.inner_text()
    assert because in [item.display["title"] for item in past]
    added = listed(page)[1]
    change(page, page.locator(f"{CARD} .add").nth(1).click)
    assert listed(page, "#history li")[0] == added and added not in listed(page)
    assert page.locator(f"{CARD} .moved").count() > 0
    assert "with a history of your making" in page.locator("#who-more").inner_text()
    # As if the server had been told of the click.
    events = [{"item_id": added}]
    assert listed(page) == ids(retriever.recommend(user, events=events, k=10))
    change(page, page.locator("#history .remove").nth(1).click)
    assert ids(past[:1])[0] not in listed(page, "#history li")
    change(page, page.locator("#restore").click)
    assert listed(page) == ids(retriever.recommend(user, k=10))


def check_options(page, retriever, user):
    """Sliders and conditions."""
    change(page, lambda: slide(page, "k", 5))
    assert page.locator("#k-shown").inner_text() == "5"
    change(page, lambda: slide(page, "popularity", 0.3))
    assert listed(page) == ids(retriever.recommend(user, k=5, popularity_weight=0.3))
    change(page, lambda: slide(page, "diversity", 0.5))
    expected = retriever.recommend(user, k=5, popularity_weight=0.3, rerank="mmr:diversity=0.5")
    assert listed(page) == ids(expected)
    page.locator("#add-condition").click()
    selects = page.locator(".condition select")
    selects.nth(0).select_option("price")
    selects.nth(1).select_option("<=")
    change(page, lambda: page.locator(".condition input").fill("60"))
    prices = [retriever.item(item).display["price"] for item in listed(page)]
    assert len(prices) == 5 and max(prices) <= 60
    assert faults_of(page) == []
    change(page, page.locator("#reset-options").click)
    assert listed(page) == ids(retriever.recommend(user, k=10))


def check_comparisons(page, retriever, thinned, user):
    """A baseline, and another version, beside the list."""
    change(page, lambda: page.locator("#beside").select_option("popular"))
    deny = ids(retriever.latest_items(user, 200))
    assert listed(page, BESIDE) == ids(retriever.popular_items(10, deny=deny))
    change(page, lambda: page.locator("#beside").select_option(index=4))
    other = Retriever.load(thinned)
    assert listed(page, BESIDE) == ids(other.recommend(user, k=10))
    assert page.locator("[data-list=beside] h2").inner_text() == "Version thinned"
    shared = set(listed(page)) & set(listed(page, BESIDE))
    assert page.locator(f"{CARD}.shared").count() == len(shared) > 0
    assert faults_of(page) == []


@pytest.mark.parametrize(("width", "scheme"), [("desktop", "dark"), ("phone", "light")])
def test_items_the_map_and_the_model_have_views(browser, site, retriever, width, scheme):
    with window(browser, site, width, scheme) as page:
        settle(page)
        first = listed(page)[0]
        page.locator(f"{CARD} .name").first.click()
        page.wait_for_selector("#item .rows li[data-item]")
        near = listed(page, "#item .rows li")
        assert near == ids(retriever.similar_items(first, 12))
        assert faults_of(page) == []
        page.locator("#item .rows .name").nth(2).click()
        title = retriever.item(near[2]).display["title"]
        assert page.locator("#item-title").inner_text() == title
        assert page.evaluate("document.activeElement.id") == "item-title"
        page.locator("#item-back").click()
        assert page.locator("#item-title").inner_text() == retriever.item(first).display["title"]
        page.keyboard.press("Escape")
        assert page.locator("#item").is_hidden()
        assert page.evaluate("document.activeElement.className") == "name"
        # The map.
        page.locator("#tab-map").click()
        page.wait_for_function("() => document.getElementById('map-sheet').dataset.view")
        whole = page.locator("#map-sheet").get_attribute("data-view")
        page.locator("#map-sheet").press("+")
        page.wait_for_function(
            "(view) => document.getElementById('map-sheet').dataset.view !== view", arg=whole
        )
        page.locator("#map-nearest button").first.click()
        chosen = page.locator("#map-chosen").inner_text()
        assert page.locator("#map-key li").count() == 8
        assert faults_of(page) == []
        page.locator("#map-open").click()
        page.wait_for_selector("#item .rows li[data-item]")
        assert page.locator("#item-title").inner_text() == chosen
        page.locator("#item-close").click()
        # The model.
        page.locator("#tab-model").click()
        page.wait_for_selector(".figures")
        said = page.locator("#model").inner_text()
        assert f"{len(retriever):,}" in said and "Rows of the log" in said
        assert faults_of(page) == []


def test_keys_are_enough_and_the_focus_is_always_seen(browser, site, retriever):
    with window(browser, site) as page:
        settle(page)
        expected = page.evaluate(OPERABLE)
        visited, unseen = visit_by_tab(page)
        assert visited == expected > 20 and unseen == []
        page.reload()
        settle(page)
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Tab")
        for key, tab in (("ArrowRight", "map"), ("End", "model"), ("Home", "lists")):
            page.keyboard.press(key)
            assert page.evaluate("document.activeElement.id") == f"tab-{tab}"
            assert page.locator(f"#view-{tab}").is_visible()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "find"
        item = retriever.item(listed(page)[3])
        with page.expect_response(lambda response: "search_items" in response.url):
            page.keyboard.type(item.display["title"])
        page.wait_for_selector("[role=option] small")
        page.keyboard.press("ArrowDown")
        active = page.locator("#find").get_attribute("aria-activedescendant")
        assert page.locator(f"#{active}").get_attribute("aria-selected") == "true"
        page.keyboard.press("Enter")
        page.wait_for_selector("#item .rows li[data-item]")
        assert page.locator("#item-title").inner_text() == item.display["title"]
        page.keyboard.press("Tab")
        change(page, lambda: page.keyboard.press("Enter"))
        assert listed(page, "#history li") == [item.item_id]
        # A list that changes keeps the focus where it was.
        page.locator(f"{CARD} .add").nth(2).focus()
        change(page, lambda: page.keyboard.press("Enter"))
        assert page.locator(f"{CARD} .add").nth(2).evaluate("it => it === document.activeElement")
        assert "recommendations" in page.locator("#said").inner_text()
        page.keyboard.press("Escape")
        assert page.faults == []


def test_arabic_runs_from_the_right_and_is_found_as_people_type_it(browser, arabic, tmp_path):
    with (
        serving(make_app(arabic, tmp_path, limits=Limits())) as address,
        window(browser, address, "phone") as page,
    ):
        settle(page)
        card = page.locator(CARD).first
        assert card.evaluate("card => getComputedStyle(card).direction") == "rtl"
        places = {
            name: card.locator(f".{name}").first.bounding_box() for name in ("rank", "name", "add")
        }
        assert places["rank"]["x"] > places["name"]["x"] > places["add"]["x"]
        text = card.locator(".name span")
        assert text.evaluate("text => getComputedStyle(text).direction") == "rtl"
        title = next(
            title for title in arabic.items()["title"].to_pylist() if "أ" in title or "ة" in title
        )
        page.locator("#find").fill(title.replace("أ", "ا").replace("ة", "ه"))
        option = page.locator("[role=option]", has_text=title).first
        assert option.evaluate("it => getComputedStyle(it).direction") == "rtl"
        assert faults_of(page) == []


def test_a_token_is_asked_for_and_kept_nowhere_and_a_shops_names_are_used(
    browser, retriever, tmp_path
):
    names = Aliases({"product_id": "item_id", "buyer_id": "user_id"}, types.field_names())
    app = make_app(retriever, tmp_path, tokens=TOKENS, aliases=names, limits=Limits())
    with serving(app) as address, window(browser, address) as page:
        page.wait_for_selector("#token[open]")
        page.locator("#token-text").fill("a wrong token")
        page.keyboard.press("Enter")
        page.wait_for_selector("#token[open] >> text=not known")
        assert [fault for fault in faults_of(page) if "401" not in fault] == []
        page.locator("#token-text").fill(TOKENS["read"])
        page.keyboard.press("Enter")
        page.wait_for_selector(CARD)
        assert page.evaluate("localStorage.length + sessionStorage.length") == 0
        assert page.context.cookies() == [] and TOKENS["read"] not in page.content()
        user = page.locator("#suggested-users bdi").first.inner_text()
        change(page, page.locator("#suggested-users button").first.click)
        assert listed(page, "#history li") == ids(retriever.latest_items(user, 200))
        assert listed(page) == ids(retriever.recommend(user, k=10))


def test_what_is_empty_unknown_or_broken_says_so_and_what_to_do(browser, site):
    with window(browser, site, hash="#user=nobody") as page:
        settle(page)
        assert "not known when the bundle" in page.locator("#who-more").inner_text()
        page.locator("#add-condition").click()
        page.locator(".condition select").nth(0).select_option("price")
        page.locator(".condition select").nth(1).select_option("<=")
        change(page, lambda: page.locator(".condition input").fill("-1"))
        assert "No item remains" in page.locator("[data-list=main]").inner_text()
        assert faults_of(page) == []
        # What is refused is said in the server's words.
        page.locator(".condition select").nth(1).select_option("==")
        change(page, lambda: page.locator("#beside").select_option("similar"))
        assert "no history yet" in page.locator("[data-list=beside] .problem").inner_text()
        page.faults.clear()
        page.route("**/v1/retrieve", lambda route: route.abort())
        page.locator(".condition .value button").click()
        page.wait_for_selector("[data-list=main] .problem")
        page.faults.clear()
        assert "does not answer" in page.locator("[data-list=main] .problem").inner_text()
        assert faults_of(page) == []
        page.unroute("**/v1/retrieve")
        change(page, page.locator("[data-list=main] .problem button").click)
        assert len(listed(page)) == 10


def test_a_list_is_awaited_as_soon_as_an_option_changes(browser, site):
    with window(browser, site) as page:
        settle(page)
        slide(page, "k", 20)
        busy = """() => {
          document.getElementById('k').dispatchEvent(new Event('input'));
          return document.querySelector('[data-list=main]').getAttribute('aria-busy');
        }"""
        # Within the moment that a further change is waited for.
        assert page.evaluate(busy) == "true"
        settle(page)
        assert len(listed(page)) == 20


def test_nothing_jumps_while_lists_are_on_their_way(browser, site):
    with window(browser, site) as page:
        settle(page)
        # Input within half a second excuses a shift; here there was none.
        assert page.evaluate("window.shifted") < 0.02
        page.evaluate("document.querySelector('#suggested-users button').click()")
        page.wait_for_selector("#history li")
        settle(page)
        before = page.evaluate("window.shifted")
        held = []
        page.route("**/v1/retrieve", lambda route: held.append(route))
        page.evaluate("document.querySelector('[data-list=main] .add').click()")
        page.wait_for_selector("[data-list=main][aria-busy=true]")
        assert page.locator(CARD).count() == 10
        page.wait_for_timeout(200)
        held[0].continue_()
        settle(page)
        assert page.evaluate("window.shifted") - before < 0.02


def shoot(address, folder):
    """Takes screenshots of all that the page offers."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open_browser("/usr/bin/chromium") as browser:
        for width, scheme in itertools.product(WIDTHS, SCHEMES):
            with window(browser, address, width, scheme) as page:
                name = f"{folder}/{width}-{scheme}"
                settle(page)
                page.screenshot(path=f"{name}-0-start.png")
                with page.expect_response(lambda response: "search_items" in response.url):
                    page.locator("#find").fill("2")
                page.wait_for_timeout(100)
                page.screenshot(path=f"{name}-1-find.png")
                page.keyboard.press("Escape")
                change(page, page.locator("#suggested-users button").first.click)
                change(page, page.locator(f"{CARD} .add").nth(1).click)
                page.screenshot(path=f"{name}-2-user.png", full_page=True)
                page.evaluate("document.getElementById('options').open = true")
                page.locator("#add-condition").click()
                change(page, lambda: page.locator("#beside").select_option("popular"))
                page.screenshot(path=f"{name}-3-beside.png", full_page=True)
                page.locator(f"{CARD} .name").first.click()
                page.wait_for_selector("#item .rows li[data-item]")
                page.screenshot(path=f"{name}-4-item.png")
                page.keyboard.press("Escape")
                page.route("**/v1/popular", lambda route: route.abort())
                page.locator(".condition select").nth(0).select_option("price")
                page.locator(".condition select").nth(1).select_option("<=")
                change(page, lambda: page.locator(".condition input").fill("-1"))
                page.screenshot(path=f"{name}-5-empty.png", full_page=True)
                page.locator("#tab-map").click()
                page.wait_for_function("() => document.getElementById('map-sheet').dataset.view")
                page.screenshot(path=f"{name}-6-map.png", full_page=True)
                page.locator("#tab-model").click()
                page.wait_for_selector(".figures")
                page.screenshot(path=f"{name}-7-model.png", full_page=True)


if __name__ == "__main__":
    shoot(*sys.argv[1:])
