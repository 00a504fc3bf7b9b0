"""The commands: what they print and write, and how they name a mistake.

Two are really launched (evaluate and query; `tests/training/test_killed.py` launches train); all
others run in this process.
"""

import datetime
import errno
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.experiments.commands import error_of, launched, output_of
from tests.experiments.trained import CONFIG
from twotower.api import load_retriever
from twotower.commands import launch
from twotower.config import from_dict
from twotower.core.errors import ConfigError, TrainingError
from twotower.core.files import current_version
from twotower.data.sources.load import load_dataset
from twotower.retrieval.bundle import load_bundle
from twotower.retrieval.embed import embed_rows
from twotower.training.run import load_run, train

pytestmark = pytest.mark.slow


def test_the_best_checkpoint_is_not_the_latest(tmp_path):
    """Of a run that gets worse: export takes the best unless it is told otherwise, and evaluate
    measures the same."""
    values = iter([0.0, 0.5, 0.9, 0.1])  # the first before training
    config = CONFIG | {"training": CONFIG["training"] | {"steps": 6, "validate_every": 2}}
    train(
        from_dict(config),
        tmp_path / "run",
        make_validate=lambda *_: lambda weights: {"recall@10": next(values)},
    )
    flag = f"--workdir={tmp_path / 'run'}"
    output_of("export", flag)
    bundle = tmp_path / "run" / "bundle"
    assert load_bundle(bundle).manifest["step"] == 4
    assert "Step 4 on test" in output_of("evaluate", flag, "--k=5")
    output_of("export", flag, "--checkpoint=latest")
    assert load_bundle(bundle).manifest["step"] == 6
    assert [
        load_run(tmp_path / "run", checkpoint=which).step for which in ("best", "latest", "4")
    ] == [4, 6, 4]


def test_a_bundle_is_asked_for_before_it_is_there(trained):
    error = error_of("query", f"--workdir={trained}", "--user=1")
    assert f"python -m experiments.export --workdir={trained}" in error


def test_export_prints_what_it_wrote(trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    printed = output_of("export", f"--workdir={workdir}", "--vectors=int8")
    bundle = load_bundle(workdir / "bundle")
    assert bundle.config.retrieval.vectors == "int8"
    sizes = f"{len(bundle.items):,} items, {len(bundle.users):,} users"
    assert f"{workdir / 'bundle'}: {sizes}, {bundle.index.kind} index" in printed
    assert "int8 vectors 8 wide against float32 ones 8 wide" in printed


def test_evaluate_writes_what_it_prints(exported):
    printed = launched("evaluate", f"--workdir={exported}", "--k=10,5", "--baselines")
    measured = json.loads((exported / "evaluation" / "metrics.json").read_text())
    assert set(measured) == {
        "protocol",
        "answers",
        "model",
        "model_intervals",
        "new_items_intervals",
        "new_users_intervals",
        "model_unmasked",
        "model_intervals_unmasked",
        "baselines",
        "baselines_unmasked",
        "baseline_intervals",
        "baseline_intervals_unmasked",
        "baseline_differences",
        "baseline_differences_unmasked",
        "new_items",
        "new_users",
        "slices",
        "audits",
        "health",
        "baseline_choices",
        "index",
        "options",
    }
    assert measured["options"] == {"k": [5, 10], "baselines": True}
    assert set(measured["baselines"]) == {
        "random",
        "popularity",
        "popularity_last_week",
        "popularity_top_quantile",
        "item_graph",
        "item_knn",
        "ease",
        "als",
        "popularity_in_categories",
        "last_item_words",
        "true_preferences",
    }
    assert measured["index"]["recall@10"] > 0.95 and measured["index"]["queries_per_second"] > 0
    assert {
        "recall@5",
        "recall@10",
        "ndcg@10",
        "coverage@10",
        "novelty@5",
        "never_trained@10",
    } <= set(measured["model"])
    best = measured["baselines"]["true_preferences"]
    model = measured["model"]
    assert best["recall@10"] > measured["baselines"]["random"]["recall@10"]
    assert (
        f"{model['recall@5']:.4f}" in printed
        and "of what ranking by the true preferences reaches" in printed
    )


def test_evaluate_asks_for_sanity_and_shuffles_the_top_that_is_named(trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    slow = "--without_baselines=item_graph,item_knn,ease,als,last_item_words"
    flags = ["--k=5", "--queries=50", "--baselines", slow, "--quantile_threshold=.98"]
    flags += ["--sanity", "--sanity_title=title", "--sanity_category=category"]
    printed = output_of("evaluate", f"--workdir={workdir}", *flags)
    measured = json.loads((workdir / "evaluation" / "metrics.json").read_text())
    top = measured["baseline_choices"]["popularity_top_quantile"]
    assert "the top 0.02 of the items" in str(top)
    titles = measured["sanity"]["titles"]
    assert titles["column"] == "title" and titles["pairs"] and 0 <= titles["auc"] <= 1
    # The towers of this run read no history, so that nobody can be made up.
    (cannot,) = measured["sanity"]["cannot"]
    assert "reads no history" in cannot and cannot in printed


def test_query_prints_a_table_for_a_user_and_for_an_item(exported):
    bundle = load_bundle(exported / "bundle")
    items = bundle.items
    item, title = (items[name][0].as_py() for name in ("item_id", "title"))
    printed = output_of("query", f"--workdir={exported}", f"--item={item}", "--k=3")
    assert title[:38] in printed and "score" in printed
    user = bundle.users["user_id"][0].as_py()
    printed = launched("query", f"--workdir={exported}", f"--user={user}", "--k=4")
    lines = printed.splitlines()
    ranks = [line.split()[0] for line in lines[-4:]]
    assert ranks == ["1", "2", "3", "4"]


def test_query_shows_when_and_how_a_user_had_the_latest_items(exported, tmp_path):
    """As the log has them, also after a change of the items that moves their rows."""
    retriever = load_retriever(exported / "bundle")
    log = load_dataset(from_dict(CONFIG).data).interactions.to_pylist()
    user = retriever.bundle.users["user_id"][3].as_py()
    latest = {}
    for row in sorted(log, key=lambda row: row["timestamp"]):
        if row["user_id"] == user:
            latest[row["item_id"]] = (row["timestamp"], row["event"])
    items = [item.item_id for item in retriever.latest_items(user, 3)]
    events = retriever.latest_events(user, 3)
    assert [(event["timestamp"], event["event"]) for event in events] == [
        latest[item] for item in items
    ]
    printed = output_of("query", f"--workdir={exported}", f"--user={user}")
    time = datetime.datetime.fromtimestamp(latest[items[0]][0], datetime.UTC)
    minute = f"{time:%Y-%m-%d %H:%M}"
    (line,) = [line for line in printed.splitlines() if line.strip().startswith(f"{items[0]} ")][:1]
    assert minute in line and latest[items[0]][1] in line
    changed = load_retriever(shutil.copytree(exported / "bundle", tmp_path / "bundle"))
    changed.delete(items[:1])
    changed.compact()
    again = load_retriever(tmp_path / "bundle")
    assert [item.item_id for item in again.latest_items(user, 2)] == items[1:]
    assert again.latest_events(user, 2) == events[1:]


def test_query_takes_conditions_a_bundle_alone_and_a_row_of_features(exported, tmp_path):
    bundle = shutil.copytree(exported / "bundle", tmp_path / "bundle")
    prices = {row["item_id"]: row["price"] for row in load_bundle(bundle).items.to_pylist()}
    limit = sorted(prices.values())[len(prices) // 2]
    flags = [f"--bundle={bundle}", "--k=5", f"--where=price <= {limit}"]
    for whom in ("--user=1", '--rows={"user_id": "somebody new"}'):
        printed = output_of("query", *flags, whom)
        shown = [line.split()[1] for line in printed.splitlines()[-5:]]
        assert len(set(shown)) == 5 and all(prices[item] <= limit for item in shown)
    error = error_of("query", *flags, "--user=1", "--where=title=nothing")
    assert "no item has 'nothing' in column 'title'. The nearest that there are: " in error
    error = error_of("query", *flags, '--rows={"user": 1}')
    assert "has no field 'user'; did you mean 'user_id'?" in error


def test_query_re_ranks(exported):
    flags = (f"--workdir={exported}", "--user=1", "--k=4")

    def ranked(*more):
        lines = output_of("query", *flags, *more).splitlines()[-4:]
        return [line.split()[1] for line in lines]

    diverse = ranked("--rerank=mmr:diversity=1,multiple=20")
    assert diverse[0] == ranked()[0] and diverse != ranked()
    error = error_of("query", *flags, "--rerank=diversity")
    assert "rerank.kind='diversity' is not known; did you mean 'mmr'?" in error
    error = error_of("query", *flags, "--rerank=caps:column=prize")
    assert "column='prize' is no display column of the items; did you mean 'price'?" in error


def test_query_writes_lists_of_many_users(exported, tmp_path):
    (tmp_path / "users.txt").write_text("1\nnobody\n\n2\n")
    printed = output_of(
        "query",
        f"--workdir={exported}",
        f"--users={tmp_path / 'users.txt'}",
        f"--out={tmp_path / 'o.parquet'}",
        "--k=3",
    )
    table = pq.read_table(tmp_path / "o.parquet")
    assert (
        table["user_id"].to_pylist() == ["1"] * 3 + ["nobody"] * 3 + ["2"] * 3
        and "1 of them not known" in printed
    )


def test_a_retriever_of_a_run_or_of_a_checkpoint(exported, tmp_path):
    """Its bundle where it has one; otherwise one is made in memory, and the folder stays as it
    is."""
    run = load_run(exported)
    expected = embed_rows(run.model, run.weights, "item", run.prepared.features["item"])
    bare = shutil.copytree(exported, tmp_path / "run", ignore=shutil.ignore_patterns("bundle*"))
    before = sorted(bare.rglob("*"))
    for place in (bare, bare / "checkpoints" / "4", exported / "checkpoints" / "4"):
        found = load_retriever(place)
        np.testing.assert_array_equal(found.bundle.vectors, expected)
        assert found.bundle.manifest == {} and len(found.recommend("nobody", k=3)) == 3
    assert sorted(bare.rglob("*")) == before
    assert load_retriever(exported).bundle.folder == exported / "bundle"


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "command, harm, message",
    [
        (
            "query",
            lambda run: flip(current_version(run / "bundle") / "item_vectors.npy"),
            "item_vectors.npy is corrupt",
        ),
        (
            "query",
            lambda run: (current_version(run / "bundle") / "manifest.json").write_text("{"),
            "manifest.json is corrupt",
        ),
        (
            "evaluate",
            lambda run: flip(run / "encoder" / "vocabulary_0_bytes.npy"),
            "vocabulary_0_bytes.npy is corrupt",
        ),
        ("export", lambda run: shutil.rmtree(run / "encoder"), "encoder holds no encoder"),
        ("export", lambda run: shutil.rmtree(run / "checkpoints"), "has no checkpoint yet"),
    ],
)
def test_what_was_damaged_is_named(exported, tmp_path, command, harm, message):
    shutil.copytree(exported, tmp_path / "run")
    harm(tmp_path / "run")
    user = ["--user=1"] if command == "query" else []
    assert message in error_of(command, f"--workdir={tmp_path / 'run'}", *user)


MY_LOG = "--config=experiments/configs/my_log.py"
LOG = "user_id,item_id,timestamp\n" + "".join(
    f"{n % 7},{n % 5},{1_600_000_000 + n}\n" for n in range(100)
)


@pytest.mark.parametrize(
    "log, flags, message",
    [
        (
            LOG.replace("user_id", "user"),
            [],
            "log.csv has no column 'user_id' (did you mean 'user'?)",
        ),
        (
            LOG.replace("1600000041", "soon"),
            [],
            "log.csv, line 43, column 'timestamp': 'soon'",
        ),
        (
            LOG,
            ["--config.training.step=3"],
            "--config.training.step: config.training has no option 'step'; did you mean 'steps'?",
        ),
        (
            LOG,
            ["--config.data.interactions.columns.weight=w"],
            "A mapping is set whole: --config.data.interactions.columns={...}",
        ),
        (
            LOG,
            ["--config.objective.loss=sofmax"],
            "config.objective.loss='sofmax' is not known; did you mean 'softmax'? Known:",
        ),
        (
            "no log is read before this is refused",
            ["--config.training.metric=hr@10"],
            "config.training.metric='hr@10' is not known; did you mean 'hit_rate@10'?",
        ),
        (
            LOG,
            ["--config.features.item={'item_id': {'type': 'string'}, 'price': {'type': 'float'}}"],
            "features.item.price reads column 'price'; the items table has no",
        ),
        (
            LOG,
            ["--config.training.batch_size=1000", "--config.objective.negatives.queue=1000"],
            "config.training.batch_size=1000 is larger than the data",
        ),
        (
            LOG,
            ["--config=experiments/configs/nowhere.py"],
            "'experiments/configs/nowhere.py' is no file with get_config()",
        ),
    ],
)
def test_a_training_that_cannot_start_says_why_in_a_line(tmp_path, log, flags, message):
    (tmp_path / "log.csv").write_text(log)
    path = f"--config.data.interactions.path={tmp_path / 'log.csv'}"
    assert message in error_of("train", MY_LOG, f"--workdir={tmp_path / 'run'}", path, *flags)


def test_a_dry_run_checks_and_says_what_would_be_trained(tmp_path):
    (tmp_path / "log.csv").write_text(LOG)
    workdir = tmp_path / "run"
    flags = [MY_LOG, f"--workdir={workdir}", "--dry-run", "--config.training.batch_size=8"]
    path = f"--config.data.interactions.path={tmp_path / 'log.csv'}"
    printed = output_of("train", *flags, path)
    assert f"Would train in {workdir}: a new run" in printed and "Data: 100 rows of" in printed
    assert "85 train, 5 validation, 10 test rows" in printed
    assert "\n  --config.training.batch_size=8\n" in printed
    assert "config.retrieval.k=" not in printed  # as it is by default
    assert not workdir.exists()
    assert "log.csv" in error_of("train", *flags, f"{path}.gone")
    assert "of which this is the first" in output_of("repeat", *flags, path)
    assert not workdir.exists()


def test_a_dry_run_of_a_run_that_has_begun_says_where_it_goes_on(trained, tmp_path):
    (tmp_path / "mine.py").write_text(
        f"from twotower.config import defaults\n\n\ndef get_config():\n    config = defaults()\n"
        f"    config.update({CONFIG!r})\n    return config\n"
    )
    flags = [f"--config={tmp_path / 'mine.py'}", f"--workdir={trained}", "--dry_run"]
    assert "goes on from step 4" in output_of("train", *flags)
    error = error_of("train", *flags, "--config.training.steps=9")
    assert "holds a run with another configuration" in error


def test_an_interrupted_command_says_how_to_go_on(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        launch.call(interrupted, ["train"])
    assert ended.value.code == 130 and "the same command" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback_and_a_refusal_of_the_machine_does_not(capsys):
    def defect():
        raise ValueError("of somebody else's")

    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "runs/a")

    with pytest.raises(ValueError):
        launch.call(defect, ["train"])
    with pytest.raises(SystemExit) as ended:
        launch.call(full, ["train"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "Error: runs/a: No space left on device.\n"


def test_a_scheduler_learns_from_the_status_whether_to_try_again(capsys):
    def mistake():
        raise ConfigError("config.x=1 must be 2.")

    def divergence():
        raise TrainingError("the loss is no number")

    statuses = {}
    for main in (mistake, divergence):
        with pytest.raises(SystemExit) as ended:
            launch.call(main, ["train"])
        statuses[main] = ended.value.code
    assert statuses == {mistake: 78, divergence: 1}
    with pytest.raises(SystemExit) as ended:
        launch.call(mistake, ["train", "stray"])
    assert ended.value.code == 78
    assert "Traceback" not in capsys.readouterr().err


def test_a_run_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("1\n")
    (tmp_path / "log.csv").write_text(LOG)
    error = error_of(
        "train",
        MY_LOG,
        f"--workdir={tmp_path / 'file' / 'under'}",
        f"--config.data.interactions.path={tmp_path / 'log.csv'}",
        "--config.training.batch_size=8",
    )
    assert f"{tmp_path / 'file'} is a file. Name a folder" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "log.csv"]


def test_lists_that_cannot_be_written_are_named(exported, tmp_path):
    (tmp_path / "file").write_text("1\n")
    users = f"--users={tmp_path / 'file'}"
    out = f"--out={tmp_path / 'file' / 'under'}"
    assert f"Error: {tmp_path / 'file'}" in error_of("query", f"--workdir={exported}", users, out)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--item=nothing"], "'nothing' is not among"),
        ([], "Give one of --user, --item, --rows and --users; none is given"),
        (["--users=nowhere.csv"], "nowhere.csv is not a file"),
        (["--users=README.md", "--out=tests"], "--out=tests is a folder"),
    ],
)
def test_mistakes_are_one_line(exported, flags, message):
    assert message in error_of("query", f"--workdir={exported}", *flags)


@pytest.mark.parametrize("k", ["ten", "0", "-1", "10,,5"])
def test_what_is_no_list_length(exported, k):
    error = error_of("evaluate", f"--workdir={exported}", f"--k={k}")
    assert f"--k={k}" in error and "is not a list length" in error


@pytest.mark.parametrize("weights, message", [("x", "could not convert"), ("inf", "finite")])
def test_what_is_no_weight_of_popularity(exported, weights, message):
    flag = f"--popularity_weights={weights}"
    error = error_of("evaluate", f"--workdir={exported}", flag)
    assert flag in error and message in error


@pytest.mark.parametrize("command", ["export", "evaluate", "query"])
def test_a_folder_that_is_no_run(command, tmp_path):
    user = ["--user=1"] if command == "query" else []
    error = error_of(command, f"--workdir={tmp_path}", *user)
    assert "is no run" in error and "python -m experiments.train" in error
