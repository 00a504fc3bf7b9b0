"""Every command and every block of code of the README and the guides runs, and every link leads
somewhere.

Trainings are those of the pages but for what `small` replaces: few rows and steps. What is shown
true of a page is its code, not its figures.
"""

import dataclasses
import re
import shutil
from pathlib import Path

import nbformat
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

import twotower as tt
from tests.extras import extra
from tests.pages import ROOT, Runner, check, given, read_blocks, run_command
from twotower import dry_run, fitting
from twotower.config import Config
from twotower.core.arrow import pc
from twotower.data.dataset import Dataset
from twotower.data.shop.generate import generate
from twotower.training import grow, run

GUIDES = sorted((ROOT / "experiments" / "guides").glob("*.md"))
PAGES = [ROOT / "README.md", *GUIDES]
NOTEBOOKS = sorted((ROOT / "experiments" / "examples").glob("*.ipynb"))
# What a page may begin with that is an extra, and the module that it installs.
EXTRAS = {"plots": "matplotlib", "stream": "grain"}
STEPS = 4
FURTHER_STEPS = 8  # in the place of the 4,000 to which a page goes on with a run
CHECKED = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "experiments" / "benchmarks" / "RESULTS.md"]


def small(config: Config) -> Config:
    """Returns the configuration of a page with a training of seconds."""
    # That of a run which a page goes on with: it is small already.
    if (config.training.batch_size, config.training.log_every) == (64, 2):
        return config
    # A page that goes on with a run says so by a number of steps of its own.
    steps = FURTHER_STEPS if config.training.steps == 4000 else STEPS
    training = dataclasses.replace(
        config.training,
        batch_size=64,
        passes=0.0,
        steps=steps,
        steps_for=0,
        validate_every=STEPS,
        log_every=2,
        steps_per_dispatch=1,
    )
    data = dataclasses.replace(config.data, num_interactions=1000)
    drawn = min(config.objective.negatives.uniform, 32)
    negatives = dataclasses.replace(config.objective.negatives, uniform=drawn)
    objective = dataclasses.replace(config.objective, negatives=negatives)
    return dataclasses.replace(config, data=data, objective=objective, training=training)


def no_validation(*_):
    """A validation that compiles nothing: each training would compile one of its own."""
    return lambda weights: {"recall@10": 0.5, "ndcg@10": 0.5}


@pytest.fixture(scope="module")
def trainings_are_small():
    """Every way to train leads through these functions."""
    train = run.train
    make_grown = grow.grow
    make_config = fitting.make_config
    describe = dry_run.describe_training

    def train_small(config, workdir, **options):
        train(small(config), workdir, **(options | {"make_validate": no_validation}))

    def describe_small(config, workdir, **options):
        return describe(small(config), workdir, **options)

    def grow_small(config, source, workdir, **options):
        make_grown(small(config), source, workdir, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "make_config", lambda *args: small(make_config(*args)))
        patch.setattr(dry_run, "describe_training", describe_small)
        patch.setattr(run, "train", train_small)
        patch.setattr(grow, "grow", grow_small)
        yield


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, trainings_are_small):
    """A folder with all that a page may begin with, made by commands of the README."""
    folder = tmp_path_factory.mktemp("shelf")
    link_project(folder)
    shop = generate(1000)
    for name, table in (
        ("events", shop.interactions),
        ("items", shop.items),
        ("users", shop.users),
    ):
        pyarrow.csv.write_csv(table, folder / f"{name}.csv")
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet")
    write_films(shop, folder)
    commands = [
        "train --config=quickstart --workdir=runs/quickstart",
        "export --workdir=runs/quickstart",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands:
            run_command(["twotower", *command.split()])
        tt.fit("ratings.csv", items="movies.csv", workdir="runs/films")
    # A run by the name that pages give to one of their reader's.
    shutil.copytree(folder / "runs" / "quickstart", folder / "runs" / "mine")
    return folder


def write_films(shop: Dataset, folder: Path) -> None:
    """Writes the shop in the form of MovieLens, for the pages that read that."""
    users = pc.cast(shop.interactions["user_id"], pa.int64())
    films = pc.cast(pc.utf8_slice_codeunits(shop.interactions["item_id"], 1), pa.int64())
    times = shop.interactions["timestamp"]
    ratings = {"userId": users, "movieId": films, "rating": [4.0] * len(users), "timestamp": times}
    pyarrow.csv.write_csv(pa.table(ratings), folder / "ratings.csv")
    films = pc.cast(pc.utf8_slice_codeunits(shop.items["item_id"], 1), pa.int64())
    movies = {"movieId": films, "title": shop.items["title"], "genres": shop.items["category"]}
    pyarrow.csv.write_csv(pa.table(movies), folder / "movies.csv")


def link_project(folder: Path) -> None:
    """Makes a folder look like that of the project, from which pages give their commands."""
    (folder / "experiments").symlink_to(ROOT / "experiments")


@pytest.fixture
def redis_server(tmp_path):
    # Here, as the module skips where Redis is not installed.
    from tests.integrations.test_redis_store import Server

    server = Server(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def warehouse(shelf, bigquery_server):
    """A server of BigQuery that has the table shop.events, and runs scripts."""
    extra("google.cloud.bigquery", "bigquery")
    # Here, as most pages need no DuckDB.
    from tests.bigquery_sql import Database

    bigquery_server.database = Database("my-project")
    bigquery_server.add("shop.events", pyarrow.parquet.read_table(shelf / "events.parquet"))


@pytest.fixture
def runner(trainings_are_small, own_kinds, tmp_path, request):
    """The runner of a page, in a folder with what the page begins with."""
    page = request.param
    link_project(tmp_path)
    replace = {}
    for name in given(page):
        if name == "redis":
            replace["redis://localhost:6379/0"] = request.getfixturevalue("redis_server").url
            continue
        if name == "bigquery":
            request.getfixturevalue("warehouse")
            continue
        if name in EXTRAS:
            extra(EXTRAS[name], name)
            continue
        source = request.getfixturevalue("shelf") / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name)
        else:
            shutil.copy(source, tmp_path / name)
    return Runner(tmp_path, replace)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runner", "page"),
    [pytest.param(page, page, id=page.stem) for page in [*PAGES, *NOTEBOOKS]],
    indirect=["runner"],
)
def test_every_block_of_a_page_runs(runner, page):
    blocks = read_blocks(page)
    for block in blocks:
        try:
            runner.run(block)
        except Exception as error:
            error.add_note(f"in {block}")
            raise
    assert runner.handled == blocks


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_fence_of_a_page_is_that_of_a_block(page):
    """A block that the reader of blocks overlooks would never run."""
    fences = re.findall(r"^\s*(?:```|~~~)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) == 2 * len(read_blocks(page))


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
def test_a_notebook_is_whole_and_shows_what_it_prints(page):
    notebook = nbformat.read(page, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs and not [output for output in outputs if output.output_type == "error"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


def anchors(page: Path) -> set[str]:
    """Returns the names by which links reach the headings of a page."""
    text = page.read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", CHECKED, ids=lambda page: page.stem)
def test_every_link_of_a_page_leads_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_the_readme_takes_five_minutes_and_names_every_guide():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert [page.name for page in GUIDES if f"experiments/guides/{page.name}" not in text] == []


# What the runner itself refuses.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```\nls\n```\n", "must say"),
        ("```python\n1 / 0\n```\n", "division by zero"),
        ("```bash\nfalse\n```\n", "false"),
        ("```bash\ntwotower train --workdr=runs/mine\n```\n", "workdr"),
        ("```python\nprint(1, 'a')\n```\n```text\n2 b\n3 a\n```\n", ""),
        ("```python\nprint(1, 'a')\n```\n```text\nb 2\n```\n", "not printed: 'b 2'"),
        ("<!-- not run: slow -->\n```bash\ntwotower export --workdr=x\n```\n", "workdr"),
        ("<!-- not run: slow -->\n```python\nif\n```\n", "invalid syntax"),
        ("```json\n{\n```\n", "property name"),
    ],
)
def test_a_block_that_is_wrong_fails(text, message, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text)
    runner = Runner(tmp_path, {})

    def run_all():
        for block in read_blocks(page):
            runner.run(block)

    if not message:
        return run_all()
    with pytest.raises(Exception, match=re.escape(message)):
        run_all()


def test_a_block_becomes_a_file(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- file: mine/loss.py -->\n```python\nx = 1\n```\n")
    Runner(tmp_path, {}).run(read_blocks(page)[0])
    assert (tmp_path / "mine" / "loss.py").read_text() == "x = 1\n"
    check(read_blocks(page)[0])
