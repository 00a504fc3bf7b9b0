"""What a browser can tell of a report, for tests and for whoever looks at screenshots.

    python -m tests.evaluation.report.browser REPORT.html FOLDER

checks a report at both widths and in both schemes, prints what is wrong, and leaves screenshots in
the folder; screenshots.md beside this file says what to look at.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

WIDTHS = {"desktop": 1280, "phone": 390}
SCHEMES = ("light", "dark")
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
LEAST_CONTRAST = 4.5  # WCAG 2.2, level AA
LEAST_TEXT = 11  # pixels of the text of a picture
HEIGHT = 1_600  # pixels of a screenshot

# Pairs of texts of one picture that lie over each other, and texts outside of their card.
OVERLAPS = """() => {
  const wrong = [];
  for (const svg of document.querySelectorAll("figure svg")) {
    const card = svg.closest("article").getBoundingClientRect();
    const boxes = [...svg.querySelectorAll("text")].map((text) => {
      const box = text.getBoundingClientRect();
      return [text.textContent, box];
    });
    boxes.forEach(([name, a], i) => {
      if (a.left < card.left - 1 || a.right > card.right + 1 || a.bottom > card.bottom) {
        wrong.push(`cut: ${name}`);
      }
      for (const [other, b] of boxes.slice(i + 1)) {
        const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (wide > 1 && high > 2) wrong.push(`overlap: ${name} / ${other}`);
      }
    });
  }
  return wrong;
}"""
# Texts of pictures that are smaller than this, as they are shown.
SMALL = """(least) => [...document.querySelectorAll("figure svg")].flatMap((svg) => {
  const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  return [...svg.querySelectorAll("text")].flatMap((text) => {
    const size = parseFloat(getComputedStyle(text).fontSize) * scale;
    return size < least ? [`${size.toFixed(1)} pixels: ${text.textContent}`] : [];
  });
})"""
# Texts whose contrast with what lies behind them is too low, with the contrast.
CONTRAST = """(least) => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((n) => {
      n /= 255;
      return n <= 0.04045 ? n / 12.92 : ((n + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const wrong = {};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || element.closest("script, style")) continue;
    if (!element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const colour = parse(element.closest("svg") ? style.fill : style.color);
    const [a, b] = [light(colour), light(behind(element))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < least) wrong[element.textContent.slice(0, 40)] = contrast.toFixed(2);
  }
  return wrong;
}"""
# Number of everything that can be operated and is there to be reached.
OPERABLE = """() => [...document.querySelectorAll(
  'a[href], button, input, summary, [tabindex="0"]'
)].filter((element) => element.checkVisibility()).length"""
# Marks what has the focus now, and says whether a reader sees it.
MARK = """() => {
  const element = document.activeElement;
  if (!element || element === document.body) return null;
  if (element.dataset.visited) return null;
  element.dataset.visited = "yes";
  const style = getComputedStyle(element);
  const box = element.getBoundingClientRect();
  const seen = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
  return [element.tagName, seen && box.bottom > 0 && box.top < innerHeight];
}"""


@contextlib.contextmanager
def open_browser(chromium: str) -> Iterator[Browser]:
    """Yields a browser, closed at the end."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(ARGUMENTS))
        yield browser
        browser.close()


@contextlib.contextmanager
def open_report(browser: Browser, path: Path, width: str, scheme: str) -> Iterator[Page]:
    """Yields a report in a window of its own, and notes what it asks for and complains of.

    The page has the attribute `faults`, a list of sentences.
    """
    context = browser.new_context(
        viewport={"width": WIDTHS[width], "height": 900},
        color_scheme=scheme,
        reduced_motion="reduce",
    )
    page = context.new_page()
    faults: list[str] = []
    page.faults = faults
    address = path.resolve().as_uri()

    def answer(route):
        if route.request.url == address:
            return route.continue_()
        faults.append(f"request: {route.request.url[:100]}")
        return route.abort()

    page.route("**/*", answer)
    page.on("console", lambda message: faults.append(f"console: {message.text[:200]}"))
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.goto(address)
    yield page
    context.close()


def find_faults(page: Page) -> list[str]:
    """Returns what is wrong with a report in its window, with all that can be unfolded open."""
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    # The map draws itself in the next frame.
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    faults = list(page.faults)
    wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    if wide > 0:
        faults.append(f"{wide} pixels wider than the window")
    faults += page.evaluate(OVERLAPS)
    faults += page.evaluate(SMALL, LEAST_TEXT)
    for text, contrast in page.evaluate(CONTRAST, LEAST_CONTRAST).items():
        faults.append(f"contrast {contrast}: {text}")
    return faults


def visit_by_tab(page: Page) -> tuple[int, list[str]]:
    """Returns how many elements the tabulator reaches, and those whose focus is not seen."""
    visited = 0
    unseen = []
    while True:
        page.keyboard.press("Tab")
        found = page.evaluate(MARK)
        if found is None:
            return visited, unseen
        visited += 1
        if not found[1]:
            unseen.append(found[0])


def shoot(page: Page, folder: Path, name: str) -> list[Path]:
    """Takes screenshots of a whole report from the top, and returns their files."""
    page.set_viewport_size({"width": page.viewport_size["width"], "height": HEIGHT})
    total = page.evaluate("document.documentElement.scrollHeight")
    files = []
    for number, top in enumerate(range(0, total, HEIGHT)):
        page.evaluate(f"scrollTo(0, {top})")
        file = folder / f"{name}-{number}.png"
        page.screenshot(path=file)
        files.append(file)
    return files


def main(report: str, folder: str) -> None:
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with open_browser("/usr/bin/chromium") as browser:
        for width, scheme in itertools.product(WIDTHS, SCHEMES):
            with open_report(browser, Path(report), width, scheme) as page:
                files = shoot(page, target, f"{width}-{scheme}")
                faults = find_faults(page)
            print(width, scheme, f"{len(files)} screenshots", *(faults or ["no fault"]), sep="\n  ")


if __name__ == "__main__":
    main(*sys.argv[1:])
