"""A bundle as a model of MLflow answers as its retriever does."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.extras import extra
from twotower.core.errors import ConfigError
from twotower.integrations.mlflow_model import save_model
from twotower.retrieval.match import MatchModel

pyfunc = extra("mlflow.pyfunc", "mlflow")


@pytest.fixture(scope="module")
def folder(workdir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "shop"
    save_model(workdir / "bundle", folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return pyfunc.load_model(str(folder))


def requests_of(retriever):
    """50 users, one of them twice, one unknown, and rows with features of theirs."""
    users = retriever.bundle.users.slice(0, 40).to_pylist()
    rows = [{"user_id": user["user_id"]} for user in users]
    rows += [rows[3], {"user_id": "nobody"}]
    rows += [{"user_id": user["user_id"], "city": "Cairo"} for user in users[:4]]
    rows += [{"city": user["city"]} for user in users[4:7]]
    return rows + [{"user_id": "nobody", "city": "Cairo"}]


def frame_of(rows):
    """Strings or nothing: pandas makes NaN of what a row leaves out."""
    return pd.DataFrame(rows)


@pytest.mark.parametrize("k, exclude_seen", [(10, True), (3, False)])
def test_lists_are_those_of_the_retriever(model, retriever, k, exclude_seen):
    rows = requests_of(retriever)
    assert len(rows) == 50
    answers = model.predict(frame_of(rows), params={"k": k, "exclude_seen": exclude_seen})
    for row, answer in zip(rows, answers.to_dict("records"), strict=True):
        if row.keys() == {"user_id"}:
            wanted = retriever.recommend(row["user_id"], k=k, exclude_seen=exclude_seen)
        else:
            wanted = retriever.recommend(rows=[row], k=k, exclude_seen=exclude_seen)
        assert answer["items"] == [item.item_id for item in wanted]
        np.testing.assert_allclose(answer["scores"], [item.score for item in wanted], rtol=1e-5)


def test_pairs_have_the_score_that_lists_give_them(model, retriever):
    rows = requests_of(retriever)
    lists = model.predict(frame_of(rows), params={"k": 2, "exclude_seen": False})
    for place in range(2):
        pairs = [
            {**row, "item_id": items[place]}
            for row, items in zip(rows, lists["items"], strict=True)
        ]
        scores = model.predict(frame_of(pairs))["score"]
        wanted = [scores_of_row[place] for scores_of_row in lists["scores"]]
        np.testing.assert_allclose(scores, wanted, rtol=1e-5)


def test_items_in_some_rows_alone_are_refused(model):
    rows = [{"user_id": "1", "item_id": "1"}, {"user_id": "1"}]
    with pytest.raises(ConfigError, match="1 of 2 rows have an item_id"):
        model.predict(frame_of(rows))


def test_the_signature_names_what_a_request_may_have(model, folder):
    signature = model.metadata.signature
    assert signature.inputs.input_names() == ["user_id", "city", "event", "timestamp", "item_id"]
    assert not signature.inputs.required_input_names()
    assert signature.outputs.input_names() == ["items", "scores"]
    assert {param.name: param.default for param in signature.params} == {
        "k": 10,
        "exclude_seen": True,
    }
    with pytest.raises(ConfigError, match="no column that is known; it may have: user_id, city"):
        model.predict(pd.DataFrame({"user_name": ["1"]}))
    # Nothing in the folder executes anything when it is read.
    names = {path.name for path in folder.rglob("*")}
    assert not [name for name in names if re.search(r"\.(pkl|pickle|py)$", name)]
    requirements = (folder / "requirements.txt").read_text()
    assert re.search(r"^twotower\[mlflow\]==\d", requirements, re.MULTILINE)
    assert re.search(r"^jax==\d", requirements, re.MULTILINE)


def test_a_match_model_answers_pairs(retriever, tmp_path):
    match = MatchModel.from_bundle(retriever.bundle)
    match.save(tmp_path / "match")
    save_model(tmp_path / "match", tmp_path / "model")
    model = pyfunc.load_model(str(tmp_path / "model"))
    users = retriever.bundle.users["user_id"][:20].to_pylist()
    items = retriever.bundle.items["item_id"][:20].to_pylist()
    pairs = pd.DataFrame({"user_id": [*users, "nobody"], "item_id": [*items, items[0]]})
    scores = model.predict(pairs)["score"]
    np.testing.assert_array_equal(scores[:-1], match(users, items))
    assert np.isnan(scores.iloc[-1])
    with pytest.raises(ConfigError, match="exists already"):
        save_model(tmp_path / "match", tmp_path / "model")


@pytest.mark.slow
def test_the_scoring_server_of_mlflow_serves_it(folder, retriever, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager=local"]
    command += ["-m", str(folder), "--host=127.0.0.1", f"--port={port}", "--workers=1"]
    # It looks for uvicorn on the path, and imports the package from where the tests run.
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.getcwd(),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        user = retriever.bundle.users["user_id"][0].as_py()
        body = {"dataframe_records": [{"user_id": user}, {"city": "Cairo"}], "params": {"k": 4}}
        answers = post_until_up(f"http://127.0.0.1:{port}/invocations", body, server)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
    wanted = retriever.recommend(user, k=4)
    first, second = answers["predictions"]
    assert first["items"] == [item.item_id for item in wanted]
    assert len(second["scores"]) == 4


def post_until_up(address, body, server):
    """The answer to a request that is repeated until the server listens."""
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    end = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except OSError:
            assert server.poll() is None and time.monotonic() < end
            time.sleep(0.3)
