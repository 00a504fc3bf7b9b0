"""The report of a run: one file of HTML with the verdict, the figures and what lies behind."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from twotower.core.arrays import evenly_spaced
from twotower.core.files import atomic
from twotower.core.install import extra
from twotower.data.report import DataReport
from twotower.evaluation.evaluate import query_vectors
from twotower.evaluation.queries import make_queries
from twotower.evaluation.query_table import record_name
from twotower.evaluation.report import quality, vectors
from twotower.evaluation.report.besides_lists import labels_section, sanity_section
from twotower.evaluation.report.figures import scatter_image
from twotower.evaluation.report.neighbourhoods import check_umap, umap_charts
from twotower.evaluation.report.page import Section, bullets, paragraph, render_page
from twotower.evaluation.report.people import describe_people, people_section
from twotower.index.base import Index
from twotower.retrieval.embed import embed_rows
from twotower.retrieval.export import item_counts, served_model
from twotower.retrieval.item_map.plane import (
    Grouping,
    Plane,
    choose_columns,
    item_titles,
    project,
)
from twotower.training.metrics import read_lines
from twotower.training.run import Run

QUERIES = 1_000  # queries whose vectors are looked at, evenly spaced
IMAGE_ITEMS = 20_000  # items of an image, likewise


def check_report(*, umap: bool = False) -> None:
    """Refuses, before anything is measured, a report that could not be drawn.

    Args:
        umap: Whether the items are to be shown by UMAP too.

    Raises:
        ConfigError: Matplotlib or UMAP is missing; the message names the extra to install.
    """
    with extra("plots", "--report"):
        import matplotlib  # noqa: F401  only whether it is there
    if umap:
        check_umap()


def write_report(
    run: Run,
    measured: Mapping[str, Any],
    path: Path,
    *,
    index: Index | None = None,
    columns: Sequence[str] = (),
    umap: bool = False,
) -> None:
    """Writes the report of a run, whole or not at all, and the pictures of its items beside it.

    Args:
        run: Run that was measured.
        measured: Figures, as `twotower.evaluation.measure.measure_run` returns them.
        path: File to write.
        index: Index of the run's bundle; None without one.
        columns: Columns of the items to colour them by; () chooses.
        umap: Whether the items are shown by UMAP too.

    Raises:
        ConfigError: Matplotlib or UMAP is missing, or a column is unknown.
    """
    # Also here, as others than the command write reports: what is missing is told in the same
    # words.
    check_report()
    prepared = run.prepared
    protocol = measured["protocol"]
    split = protocol["split"]
    targets = protocol.get("targets", "")
    counts = item_counts(prepared)
    groupings = choose_columns(prepared.items, columns, counts)
    # At the width of the export: the pictures are of what is searched in.
    model = served_model(run)
    items = embed_rows(model, run.weights, "item", prepared.features["item"])
    every_query = make_queries(prepared, split, run.config.evaluation.query, targets=targets)
    # Of queries, with what people had before, and not of all users once: these vectors are what is
    # searched with.
    users = query_vectors(prepared, model, run.weights, every_query.sample(QUERIES))
    titles = item_titles(prepared.items, run.config.retrieval.display)
    lines = list(read_lines(run.workdir))
    # Once, for all pictures and the map: an item is at one place in each.
    plane = project(items)
    images = _write_images(path, plane, groupings, run.workdir.name)
    workdir = str(run.workdir)
    people = describe_people(prepared, model, run.weights, items, titles, split, targets)
    config = dataclasses.asdict(run.config)
    # Flags of the page itself, which the figures know nothing of.
    drawn: dict[str, Any] = {"report_columns": list(columns)} if columns else {}
    if umap:
        drawn["report_umap"] = True
    sections = [
        quality.how_measured(measured, config, workdir, drawn),
        quality.learning(lines, run.config.training.metric, run.step),
        quality.lists(measured, workdir),
        *filter(None, [labels_section(measured), sanity_section(measured.get("sanity"))]),
        vectors.space(
            plane,
            groupings,
            titles,
            items,
            images,
            further=umap_charts(groupings, items) if umap else (),
        ),
        vectors.index(
            measured,
            getattr(index, "tuning", None),
            users,
            items,
            workdir,
            normalized=run.config.model.normalize,
        ),
        vectors.health(measured, users, items, counts, lines),
        people_section(people, reads_history=prepared.histories is not None),
        data_section(prepared.report),
    ]
    about = f"Evaluation on {record_name(protocol)} rows, model at step {run.step:,}"
    title = run.workdir.resolve().name
    page = render_page(title, about, quality.hero(measured, workdir, prepared.report), sections)
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def data_section(report: DataReport | None) -> Section:
    """Returns what the data of the run is."""
    lead = "What went in. Most odd figures have their cause here."
    if report is None:
        note = paragraph("The run was prepared without a report of its data.", "note")
        return Section("data", "The data", lead, [note])
    blocks = [bullets(report.lines())]
    if report.warnings:
        # Before the figures of the data, most of which nobody reads.
        blocks.insert(0, bullets(report.warnings))
    return Section("data", "The data", lead, blocks)


def _write_images(page: Path, plane: Plane, groupings: Sequence[Grouping], title: str) -> list[str]:
    """Writes an image for each column that the items are coloured by, and returns their names."""
    names = []
    for grouping in groupings:
        # Beside the page, for slides and chats; in the page the pictures are SVG.
        name = f"items_by_{_file_name(grouping.column)}.png"
        _write_image(page.with_name(name), plane, grouping, title)
        names.append(name)
    return names


def _write_image(path: Path, plane: Plane, grouping: Grouping, title: str) -> None:
    # An image of more points is one spot.
    rows = evenly_spaced(np.arange(len(plane.points)), IMAGE_ITEMS)
    buffer = io.BytesIO()
    scatter_image(
        vectors.group_points(grouping, plane, rows),
        x_label=vectors.axis_label(plane, 0),
        y_label=vectors.axis_label(plane, 1),
        title=f"{title}: items by {grouping.column}",
        target=buffer,
    )
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def _file_name(column: str) -> str:
    return re.sub(r"[^\w-]+", "_", column)
