"""The report as one file of HTML that opens anywhere: sections, figures, tables and words.

Nothing in it is fetched when it is opened, and its own policy forbids it: styles and the script are
allowed by their hashes alone. All texts, which may be titles of items, are escaped here.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import re
from collections.abc import Iterable, Sequence
from importlib import resources

from twotower.evaluation.report.figures import style_sheet, styles_to_classes
from twotower.retrieval.item_map.plane import map_script

_PACKAGE = "twotower.evaluation.report"
# Dates and options, which no line may end within; longer ones have no place on a phone otherwise.
_WHOLE = re.compile(
    r"\d{4}-\d\d-\d\d(?: \d\d:\d\d(?::\d\d)?)?"
    r"|--[a-z][\w.=,/:@-]*\w"
    r"|config\.[\w.]+\w(?:=[\w./:-]*\w)?"
)
_SHORT_CELL = 22  # characters of a cell, such as an interval, that stays on one line
_LONGEST_WHOLE = 36  # characters
_START_MAP = 'showItemMap(JSON.parse(document.getElementById("map-data").textContent));'


@dataclasses.dataclass(frozen=True)
class Table:
    """Numbers and texts in rows.

    Attributes:
        header: Names of the columns.
        rows: Cells as text, numbers among them already formatted.
        caption: What the table holds.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str


@dataclasses.dataclass(frozen=True)
class Chart:
    """A picture with what a reader needs beside it.

    Attributes:
        name: Name that no other chart of the page has.
        title: What is shown.
        svg: The picture; see `twotower.evaluation.report.figures`.
        caption: Sentences on how to read it and what to see.
        table: Its numbers.
    """

    name: str
    title: str
    svg: str
    caption: str
    table: Table

    def html(self) -> str:
        title = f"{self.name}-title"
        caption = f"{self.name}-caption"
        return (
            f'<article class="chart"><h3 id="{title}">{escape(self.title)}</h3>'
            # The picture as one thing with its caption as its words: nobody wants to hear 500
            # points.
            f'<figure role="img" aria-labelledby="{title} {caption}">{self.svg}'
            f'<figcaption id="{caption}">{prose(self.caption)}</figcaption></figure>'
            f"{collapsible('The numbers', table(self.table), of=self.title)}</article>"
        )


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page with a heading.

    Attributes:
        name: Name that links lead to.
        title: Heading.
        lead: What the part answers, for someone who is no scientist.
        blocks: Its content as HTML.
    """

    name: str
    title: str
    lead: str
    blocks: Sequence[str]

    def html(self) -> str:
        heading = f'<h2 id="{self.name}-heading">{escape(self.title)}</h2>'
        lead = ""
        if self.lead:
            lead = f'<p class="lead">{prose(self.lead)}</p>'
        body = "".join(self.blocks)
        return (
            f'<section id="{self.name}" aria-labelledby="{self.name}-heading">'
            f"{heading}{lead}{body}</section>"
        )


def render_page(title: str, about: str, hero: str, sections: Sequence[Section]) -> str:
    """Returns the whole page.

    Args:
        title: Name of what is reported on.
        about: Line above it.
        hero: What stands first, as HTML.
        sections: The parts, in order.
    """
    links = "".join(
        f'<li><a href="#{section.name}">{escape(section.title)}</a></li>' for section in sections
    )
    body = "".join(section.html() for section in sections)
    # Before the style sheet is hashed, which the classes of the charts are a part of.
    classes: dict[str, str] = {}
    hero = styles_to_classes(hero, classes)
    body = styles_to_classes(body, classes)
    style = f"{static('page.css')}\n{style_sheet(classes)}"
    script = ""
    script_policy = "'none'"
    # Only the map needs one.
    if 'id="map-data"' in body:
        code = f"{map_script()}\n{_START_MAP}"
        script = f"<script>{code}</script>"
        script_policy = f"'{_hash(code)}'"
    policy = (
        # By hashes, since a file that is opened from a disk has no server to send a policy, and
        # "unsafe-inline" would allow what a title might smuggle in.
        f"default-src 'none'; style-src '{_hash(style)}'; script-src {script_policy}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        # An empty icon: browsers would ask a server for one.
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#main">Skip to the verdict</a>\n'
        f'<header><p class="about">{escape(about)}</p><h1>{bidi_text(title)}</h1></header>\n'
        f'<main id="main" tabindex="-1">{hero}\n'
        f'<nav aria-label="Parts of the report"><ol>{links}</ol></nav>\n{body}</main>\n'
        "<footer><p>Made by twotower. This file holds all that it shows and loads nothing.</p>"
        f"</footer>\n{script}\n</body>\n</html>\n"
    )


def escape(text: object) -> str:
    """Returns a text as HTML."""
    return html.escape(str(text))


def prose(text: object) -> str:
    """Returns sentences as HTML, in which dates and options stand on one line each.

    >>> prose("until 2026-11-29 & on")
    'until <span class="whole">2026-11-29</span> &amp; on'
    """

    def keep(found: re.Match[str]) -> str:
        whole = found[0]
        rest = ""
        if len(whole) > _LONGEST_WHOLE:
            # The name of an option at least, whose value may be the path of a folder.
            name, equals, rest = whole.partition("=")
            whole = name + equals
        return f'<span class="whole">{whole}</span>{rest}'

    return _WHOLE.sub(keep, escape(text))


def bidi_text(text: object) -> str:
    """Returns a text of the data as HTML, in the direction of its own script."""
    # Titles may be Arabic or Hebrew: what stands beside them must not change its order.
    return f'<bdi dir="auto">{escape(text)}</bdi>'


def paragraph(text: str, kind: str = "") -> str:
    """Returns a paragraph; `kind` is a class of page.css, such as "note"."""
    kind = f' class="{kind}"' if kind else ""
    return f"<p{kind}>{prose(text)}</p>"


def bullets(texts: Iterable[str]) -> str:
    """Returns a list of sentences."""
    rows = "".join(f"<li>{prose(text)}</li>" for text in texts)
    return f"<ul>{rows}</ul>"


def missing_note(what: str, command: str) -> str:
    """Returns a note on what was not measured, and the command that measures it."""
    return f'<p class="note">{prose(what)} To have it: <code>{prose(command)}</code></p>'


def charts(parts: Sequence[Chart]) -> str:
    """Returns charts side by side where there is room."""
    inner = "".join(part.html() for part in parts)
    return f'<div class="charts">{inner}</div>'


def collapsible(title: str, content: str, *, of: str = "", is_open: bool = False) -> str:
    """Returns content that is shown when its title is pressed.

    Args:
        title: Title to press.
        content: What is shown, as HTML.
        of: What the title belongs to, for those who hear the page.
        is_open: Whether it is shown at first.
    """
    # A page with twenty buttons "The numbers" cannot be told apart by ear.
    heard = f'<span class="heard"> of {escape(of)}</span>' if of else ""
    opened = " open" if is_open else ""
    return (
        f"<details{opened}><summary>{escape(title)}{heard}</summary>"
        f'<div class="inside">{content}</div></details>'
    )


def table(content: Table) -> str:
    """Returns a table, which scrolls by itself where it is wider than the page."""
    head = "".join(f'<th scope="col">{_breakable(escape(name))}</th>' for name in content.header)
    rows = []
    for cells in content.rows:
        # The first cell names its row, for those who hear the table.
        first = f'<th scope="row">{_breakable(bidi_text(cells[0]))}</th>'
        others = "".join(map(_cell, cells[1:]))
        rows.append(f"<tr>{first}{others}</tr>")
    label = escape(content.caption)
    return (
        # With a tabindex, or whoever uses the keyboard alone could not scroll it.
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table>'
        f"<caption>{label}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _breakable(name: str) -> str:
    """Returns a name, as HTML, that may go on in the next line after each of its parts.

    >>> _breakable("training.tables.learning_rate")
    'training.<wbr>tables.<wbr>learning_<wbr>rate'
    """
    # Options have no spaces, and would make a table wider than a phone.
    return re.sub(r"(?<=[a-z][._])(?=[a-z])", "<wbr>", name)


def _cell(text: str) -> str:
    whole = ' class="whole"' if len(text) <= _SHORT_CELL else ""
    return f"<td{whole}>{bidi_text(text)}</td>"


def static(name: str) -> str:
    """Returns a file that is shipped beside this module."""
    return resources.files(_PACKAGE).joinpath("static", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Returns the hash by which a policy allows an inline style or script."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
