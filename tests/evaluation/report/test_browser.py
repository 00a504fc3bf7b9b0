"""The report in Chromium: what it asks for, how it looks, and whether a keyboard is enough."""

import itertools

import pytest

from tests.evaluation.report.conftest import ARABIC, SCRIPT
from tests.extras import extra, program

extra("playwright.sync_api", "dev")
from tests.evaluation.report.browser import (  # noqa: E402  only where there is playwright
    OPERABLE,
    SCHEMES,
    WIDTHS,
    find_faults,
    open_browser,
    open_report,
    visit_by_tab,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    with open_browser(program("chromium", "chromium")) as opened:
        yield opened


@pytest.mark.parametrize(("width", "scheme"), list(itertools.product(WIDTHS, SCHEMES)))
def test_it_asks_for_nothing_and_nothing_is_cut_or_faint(browser, report, width, scheme):
    with open_report(browser, report.path, width, scheme) as page:
        assert find_faults(page) == []
        assert page.title() == "shop"


def test_the_checks_see_what_is_wrong(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(
        "<body style='background: white'><img src='http://127.0.0.1:9/x.png'>"
        "<p style='color: #999; width: 3000px'>faint</p><article><figure><svg>"
        "<text y='20'>one</text><text y='22'>two</text></svg></figure><figure>"
        "<svg width='100' viewBox='0 0 200 9'><text font-size='20'>three</text></svg></figure>"
        "</article>"
    )
    with open_report(browser, path, "phone", "light") as page:
        said = "\n".join(find_faults(page))
    for fault in (
        "request: http",
        "wider than",
        "contrast 2.8",
        "overlap: one / two",
        "10.0 pixels",
    ):
        assert fault in said


def test_the_tabulator_reaches_all_that_can_be_operated_and_shows_where_it_is(browser, report):
    with open_report(browser, report.path, "desktop", "light") as page:
        expected = page.evaluate(OPERABLE)
        visited, unseen = visit_by_tab(page)
        # The first is the link to the verdict, which skips the rest.
        page.keyboard.press("Tab")
        page.evaluate("document.querySelector('.skip').focus()")
        page.keyboard.press("Enter")
        skipped = page.evaluate("document.activeElement.id")
    assert visited == expected > 20 and unseen == [] and skipped == "main"


def test_the_map_moves_by_keys_and_pointer_and_names_neighbours(browser, report):
    with open_report(browser, report.path, "desktop", "light") as page:
        sheet = page.locator("#map-sheet")
        sheet.scroll_into_view_if_needed()
        page.wait_for_function("document.getElementById('map-sheet').dataset.view")

        def view():
            page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
            return [float(number) for number in sheet.get_attribute("data-view").split()]

        whole = view()
        sheet.focus()
        for key, axis, sign in (("ArrowRight", 0, 1), ("ArrowUp", 1, 1), ("+", 2, 1), ("-", 2, -1)):
            before = view()
            page.keyboard.press(key)
            assert (view()[axis] - before[axis]) * sign > 0, key
        page.keyboard.press("0")
        assert view() == whole
        box = sheet.bounding_box()
        middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.move(*middle)
        page.mouse.down()
        page.mouse.move(middle[0] - 80, middle[1], steps=3)
        page.mouse.up()
        assert view()[0] > whole[0]
        page.mouse.wheel(0, -400)
        assert view()[2] > whole[2]
        # The item nearest to the middle, and from there to a neighbour.
        page.keyboard.press("Enter")
        chosen = page.locator("#map-chosen").inner_text()
        first = page.locator("#map-nearest button").first
        neighbour = first.inner_text()
        first.click()
        assert page.locator("#map-chosen").inner_text() == neighbour != chosen
        assert page.locator("#map-nearest button").count() == 8
        page.locator("#map-search").fill(ARABIC[:8])
        found = page.locator("#map-nearest button").first
        assert found.inner_text() == ARABIC
        assert found.evaluate("element => getComputedStyle(element).direction") == "rtl"
        page.locator("#map-search").fill("<script>")
        assert page.locator("#map-nearest button").first.inner_text() == SCRIPT
        assert page.faults == []


# The share of the width and of the height of the map that its items take.
FILLED = """() => {
  const canvas = document.getElementById("map-canvas");
  const { width, height } = canvas;
  const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
  const columns = new Set();
  const rows = new Set();
  for (let at = 3; at < pixels.length; at += 4) {
    if (!pixels[at]) continue;
    const pixel = (at - 3) / 4;
    columns.add(pixel % width);
    rows.add(Math.floor(pixel / width));
  }
  const share = (seen, all) => (Math.max(...seen) - Math.min(...seen)) / all;
  return [share(columns, width), share(rows, height)];
}"""


def test_the_map_fills_its_frame_on_a_phone(browser, report):
    with open_report(browser, report.path, "phone", "light") as page:
        page.locator("#map-sheet").scroll_into_view_if_needed()
        page.wait_for_function("document.getElementById('map-sheet').dataset.view")
        wide, high = page.evaluate(FILLED)
    assert wide > 0.85 and high > 0.85
