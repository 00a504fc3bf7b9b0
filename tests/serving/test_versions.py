"""Several versions: which of them answers whom, and that none is lost on the way to the next."""

import asyncio
import shutil

import pytest

from tests.serving.asking import ask, make_app, post, refused, send
from tests.serving.conftest import thin
from twotower.commands.serve import read_bundles
from twotower.core.errors import ConfigError
from twotower.core.remote.copies import keep_bundle
from twotower.retrieval.retriever import Retriever
from twotower.serving import server
from twotower.serving.answers import Answers
from twotower.serving.errors import RequestError
from twotower.serving.limits import Limits
from twotower.serving.versions import routing
from twotower.serving.versions.routing import Location, Routing, State
from twotower.serving.versions.versions import Versions, load, location_of

TOKENS = {"admin": "a token for everything"}
HEADERS = {"x-api-key": TOKENS["admin"]}
STATE = State(0, {v: Location(f"bundle-{v}", v, v) for v in "abc"}, Routing("a"))


def test_a_user_stays_with_a_version_and_shares_are_kept():
    state = routing.split(STATE, {"a": 3, "b": 1}, {"7": "bundle-c"}, "")
    chosen = [state.routing.choose(user, None) for user in range(10_000)]
    assert chosen == [state.routing.choose(str(user), "other") for user in range(10_000)]
    assert chosen[7] == "c" and abs(chosen.count("b") - 2_500) < 150
    # A share that grows takes users of its neighbour, and gives none away.
    grown = routing.split(state, {"a": 1, "b": 1}, {}, "").routing
    now = [grown.choose(user, None) for user in range(10_000)]
    assert {(old, new) for old, new in zip(chosen, now) if old != "c"} == {
        ("a", "a"),
        ("a", "b"),
        ("b", "b"),
    }
    salted = routing.split(state, {"a": 1, "b": 1}, {}, "salt").routing
    other = [salted.choose(user, None) for user in range(10_000)]
    assert abs(sum(map(str.__eq__, now, other)) - 5_000) < 200


def test_somebody_without_an_id_is_drawn_by_the_session_or_by_each_request():
    shared = routing.split(STATE, {"a": 1, "b": 1}, {}, "").routing
    assert len({shared.choose(None, "session") for _ in range(50)}) == 1
    assert {shared.choose(None, None) for _ in range(50)} == {"a", "b"}


def test_a_roll_back_goes_to_what_was_before_and_back_again():
    swapped = routing.swap(STATE, "b")
    back = routing.roll_back(swapped)
    assert back.routing == STATE.routing and routing.roll_back(back).routing == swapped.routing
    # A second swap to the same version is none.
    assert routing.roll_back(routing.swap(swapped, "bundle-b")).routing == STATE.routing
    with pytest.raises(RequestError, match="nothing to go back to"):
        routing.roll_back(STATE)


def test_a_new_export_stands_where_the_old_one_stood():
    state = routing.split(STATE, {"a": 1, "b": 1}, {"7": "a"}, "")
    after = routing.supersede(state, "a", "d", Location("bundle-a", "a", "d"))
    assert after.routing == Routing("d", {"d": 0.5, "b": 0.5}, {"7": "d"})
    assert after.find("bundle-a") == "d" and set(after.locations) == set("abcd")
    # The one before the one before is needed by nobody.
    last = routing.supersede(after, "d", "e", Location("bundle-a", "a", "e"))
    assert set(last.locations) == set("bcde")
    assert last.number > after.number > state.number


@pytest.mark.parametrize(
    "step, field",
    [
        (lambda: routing.swap(STATE, "bundle-x"), "version"),
        (lambda: routing.split(STATE, {"a": 1, "bundle-a": 1}, {}, ""), "weights.bundle-a"),
        (lambda: routing.split(STATE, {"a": 0}, {}, ""), "weights.a"),
        (lambda: routing.split(STATE, {}, {"7": "x"}, ""), "overrides.7"),
        (lambda: routing.remove(STATE, "a"), "version"),
    ],
)
def test_steps_that_cannot_be_meant_name_their_field(step, field):
    with pytest.raises(RequestError) as refusal:
        step()
    assert refusal.value.field == field and refusal.value.cure


def test_bundles_have_names(tmp_path):
    folders = read_bundles([f"{tmp_path}/a", f"new={tmp_path}/b"])
    assert folders == {"a": tmp_path / "a", "new": tmp_path / "b"}
    with pytest.raises(ConfigError, match="--bundle=NAME="):
        read_bundles(["x/a", "y/a"])


@pytest.fixture
def app(copied, thinned, tmp_path):
    """A server of a bundle, beside a folder with another one."""
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "thin").symlink_to(thinned)
    (tmp_path / "bundles" / "broken").mkdir()
    bundles = str(tmp_path / "bundles")
    return make_app(Retriever.load(copied), tmp_path, tokens=TOKENS, bundles=bundles)


def admin(app, call, body=None, status=200, method="POST"):
    response = ask(app, method, f"/v1/admin/{call}", body, headers=HEADERS)
    assert response.status_code == status, response.text
    return response.json()


@pytest.mark.slow
def test_versions_are_loaded_swapped_split_shadowed_and_dropped(app):
    old = app.answers.version
    for name, status in [("thim", 404), ("broken", 409), ("../bundles/thin", 404)]:
        problem = admin(app, "load", {"bundle": name}, status)
        assert problem["field"] == "bundle" and str(app.answers.retriever.bundle) not in problem
    admin(app, "load", {"bundle": "thin"})
    # Again: it is there already.
    (_, new) = admin(app, "load", {"bundle": "thin"})["versions"]
    assert new["name"] == "thin" and new["role"] == "" and new["share"] == 0
    user = app.answers.retriever.bundle.users["user_id"][0].as_py()

    def version_of(**body):
        return post(app, "retrieve", **{"user_id": user, **body})["model_version"]

    assert version_of() == old and version_of(model_version="thin") == new["model_version"]
    assert refused(app, "retrieve", 404, model_version="thinn")["field"] == "model_version"
    admin(app, "swap", {"version": "thin"})
    assert version_of() == new["model_version"] == post(app, "popular")["model_version"]
    admin(app, "rollback")
    assert version_of() == old
    weights = {"weights": {old: 1, "thin": 0}, "overrides": {user: "thin"}}
    told = admin(app, "split", weights, method="PUT")
    assert told["overrides"] == 1 and version_of() == new["model_version"]
    assert version_of(user_id="somebody") == old == version_of(user_id=None, session_id="s")
    admin(app, "swap", {"version": old})
    admin(app, "shadow", {"version": "thin"}, method="PUT")
    assert version_of(k=5) == old
    text = ask(app, "GET", "/metrics", headers=HEADERS).text
    assert f'twotower_shadow_overlap_count{{version="{new["model_version"]}"}} 1.0' in text
    admin(app, "unload", {"version": "thin"}, 409)
    admin(app, "shadow", {"version": None}, method="PUT")
    # It is still the one to go back to.
    admin(app, "unload", {"version": "thin"}, 409)


def test_a_version_has_the_events_and_changes_from_before_it_came(app):
    user = app.answers.retriever.bundle.users["user_id"][0].as_py()
    event = {"event_id": "e", "user_id": user, "item_id": "i-new"}
    ask(app, "POST", "/v1/events", {"events": [event]}, headers=HEADERS)

    async def load_and_change():
        loading = asyncio.create_task(
            send(app, "POST", "/v1/admin/load", {"bundle": "thin"}, headers=HEADERS)
        )
        # While it is loaded.
        while not app.writer._missed:
            await asyncio.sleep(0.001)
        put = {"columns": {"title": "A lamp"}}
        changed = await send(app, "PUT", "/v1/items/i-new", put, headers=HEADERS)
        assert changed.status_code == 200 and (await loading).status_code == 200

    asyncio.run(load_and_change())
    found = post(app, "popular", k=400, model_version="thin")["items"]
    assert "i-new" in {item["item_id"] for item in found}
    shown = post(app, "retrieve", user_id=user, k=400, model_version="thin")["items"]
    assert "i-new" not in {item["item_id"] for item in shown}


@pytest.mark.slow
def test_a_new_export_is_taken_up_and_the_one_before_gone_back_to(copied, tmp_path):
    app = make_app(Retriever.load(copied), tmp_path, tokens=TOKENS, follow=True)
    old = app.answers
    items = old.retriever.items()["item_id"].to_pylist()

    async def replace_and_change():
        await asyncio.get_running_loop().run_in_executor(None, thin, copied)
        # It cannot be written to the old version any more, and waits for the new one.
        put = send(app, "PUT", "/v1/items/i-new", {"columns": {}}, headers=HEADERS)
        changing = asyncio.create_task(put)
        await asyncio.sleep(0.1)
        assert not changing.done()
        await app.admin.follow()
        return await changing

    changed = asyncio.run(replace_and_change()).json()
    new = app.answers
    assert new is not old and changed["model_version"] == new.version
    assert not new.retriever.has_item(items[0]) and new.retriever.has_item("i-new")
    admin(app, "rollback")
    assert app.answers is old and old.retriever.has_item("i-new")
    # A change is durable in the newer one, whichever answers.
    assert ask(app, "DELETE", "/v1/items/i-new", headers=HEADERS).json()["changed"] == 1
    assert not old.retriever.has_item("i-new")
    assert not Retriever.load(copied).has_item("i-new")
    # Another process of the server that holds the old one too hears of its changes.
    assert ask(app, "PUT", "/v1/items/i-late", {"columns": {}}, headers=HEADERS).status_code == 200
    twin = load(app.versions.state.locations[old.version], Answers).retriever
    assert app.writer._aside is not None
    twin.detach(app.writer._aside / f"{old.version}.changes")
    twin.follow()
    assert twin.has_item("i-late") and old.retriever.has_item("i-late")
    # The new one is not taken up a second time.
    asyncio.run(app.admin.follow())
    assert app.answers is old


def test_a_new_export_in_a_bucket_is_taken_up(served, thinned, tmp_path, monkeypatch):
    monkeypatch.setenv("TWOTOWER_CACHE", str(tmp_path / "cache"))
    bucket = tmp_path / "bucket"
    shutil.copytree(served, bucket)
    folder = keep_bundle(f"file://{bucket}")
    app = server.make_app({"shop": folder}, limits=Limits(), follow=True)
    old = app.answers
    shutil.rmtree(bucket)
    shutil.copytree(thinned, bucket)

    async def follow():
        await app.admin.follow()
        assert app.admin._looking is not None
        await app.admin._looking
        await app.admin.follow()

    asyncio.run(follow())
    assert app.answers.version == Answers(Retriever.load(thinned)).version != old.version
    # What the server keeps does not lie in the copy, whose old versions are deleted.
    assert app.writer._log.path.parent == folder.parent
    assert [place.name for place in app.versions.state.locations.values()] == ["shop", "shop"]
    # A bucket that is away is looked into again later.
    shutil.rmtree(bucket)
    app.admin._next_look = 0.0
    asyncio.run(follow())


@pytest.mark.slow
def test_a_change_does_not_wait_for_a_new_version_that_cannot_be_used(
    copied, tmp_path, monkeypatch
):
    app = make_app(Retriever.load(copied), tmp_path, tokens=TOKENS, follow=True)
    thin(copied)
    monkeypatch.setattr(Answers, "warm", lambda self: ["user '1': item 'a' is missing"])

    async def change():
        put = send(app, "PUT", "/v1/items/i-new", {"columns": {}}, headers=HEADERS)
        waiting = asyncio.create_task(put)
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await app.admin.follow()
        # A minute is what one that is being loaded has.
        return await asyncio.wait_for(waiting, 20)

    refusal = asyncio.run(change())
    assert refusal.status_code == 503 and "Export it again" in refusal.json()["cure"]
    assert refusal.headers["retry-after"] == "5"
    # The next export is waited for again.
    monkeypatch.undo()
    thin(copied)
    asyncio.run(app.admin.follow())
    assert ask(app, "PUT", "/v1/items/i-new", {"columns": {}}, headers=HEADERS).status_code == 200


def test_a_version_that_was_added_is_told_of_when_a_state_has_it(retriever, thinned):
    versions = Versions(Answers(retriever))
    other = Answers(Retriever.load(thinned))
    versions.add(other)
    assert len(versions.list().versions) == 1
    place = location_of(other.retriever)
    versions.apply(routing.add(versions.state, other.version, place))
    assert len(versions.list().versions) == 2


def test_a_change_that_only_another_versions_disk_refuses_is_made(copied, thinned, tmp_path):
    app = make_app(Retriever.load(copied), tmp_path, tokens=TOKENS)
    other = Answers(Retriever.load(thinned))
    app.writer._changing.append(other)

    def refuse(rows):
        raise OSError(28, f"No space left on device: {thinned}")

    other.retriever.upsert = refuse
    response = ask(app, "PUT", "/v1/items/i-new", {"columns": {}}, headers=HEADERS)
    assert response.status_code == 200 and response.json()["refused"].keys() == {other.version}
    assert str(thinned) not in response.text and app.answers.retriever.has_item("i-new")


def test_a_state_that_cannot_be_taken_up_is_tried_once(retriever, tmp_path, monkeypatch):
    app = make_app(retriever, tmp_path)
    tries = []

    async def load(place):
        tries.append(place)
        raise MemoryError

    monkeypatch.setattr(app.admin, "_load", load)
    state = routing.add(app.versions.state, "x", Location("x", "x", "x"))
    with pytest.raises(MemoryError):
        asyncio.run(app.admin.reconcile(state))
    asyncio.run(app.admin.reconcile(state))
    assert len(tries) == 1


def test_a_version_whose_golden_answers_differ_is_not_used(app, monkeypatch):
    monkeypatch.setattr(Answers, "warm", lambda self: ["user '1': item 'a' is missing"])
    problem = admin(app, "load", {"bundle": "thin"}, 409)
    assert "item 'a' is missing" in problem["detail"]
    assert len(admin(app, "versions", method="GET")["versions"]) == 1
