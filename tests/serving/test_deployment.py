"""What a server is deployed with, as far as no engine is needed: images, manifests, alerts and the
dashboard name what there is."""

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.serving.asking import ask, make_app

ROOT = Path(__file__).parents[2] / "experiments" / "launch" / "serving"
FILES = sorted(path for path in ROOT.rglob("*") if path.is_file())
YAML = [path for path in FILES if path.suffix == ".yaml"]
METRIC = re.compile(r"twotower_[a-z_]+")
LABELS = re.compile(r"\{([^{}]*)\}|by \(([^()]*)\)")
# Labels that Prometheus adds, and the edge of a bucket.
ADDED = {"job", "instance", "le"}
TAG = re.compile(r"[^:]+(:\d+/[^:]+)?:[\w.-]*\d[\w.-]*")


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def documents(name="kubernetes.yaml"):
    return {made["kind"]: made for made in yaml.safe_load_all(read(name))}


@pytest.fixture(scope="module")
def app(retriever, tmp_path_factory):
    return make_app(retriever, tmp_path_factory.mktemp("events"))


def expressions():
    """What alerts and the dashboard ask Prometheus for."""
    groups = yaml.safe_load(read("alerts.yaml"))["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    panels = json.loads(read("grafana/dashboard.json"))["panels"]
    targets = [target["expr"] for panel in panels for target in panel["targets"]]
    return [rule["expr"] for rule in rules] + targets


def test_every_metric_and_label_that_is_named_exists(app):
    text = ask(app, "GET", "/metrics").text
    known = set()
    for name, kind in re.findall(r"# TYPE (\w+) (\w+)", text):
        parts = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        known |= {name + part for part in parts}
    named = {name for text in expressions() for name in METRIC.findall(text)}
    assert len(named) > 8 and not named - known
    collectors = app.metrics._registry._collector_to_names
    labels = ADDED | {label for collector in collectors for label in collector._labelnames}
    for expression in expressions():
        for inside, by in LABELS.findall(expression):
            used = re.findall(r"(\w+)\s*(?:=|!=|=~|!~)", inside) + re.findall(r"\w+", by)
            assert set(used) <= labels, expression


def test_alerts_say_what_is_wrong_and_where_to_look():
    (group,) = yaml.safe_load(read("alerts.yaml"))["groups"]
    for rule in group["rules"]:
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert set(rule["annotations"]) == {"summary", "action"}
        assert rule["labels"]["severity"] in ("page", "ticket")
    assert len({rule["alert"] for rule in group["rules"]}) == len(group["rules"])


def test_panels_lie_beside_each_other_and_each_says_what_it_shows():
    panels = json.loads(read("grafana/dashboard.json"))["panels"]
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        rows = range(place["y"], place["y"] + place["h"])
        cells = {(x, y) for y in rows for x in range(place["x"], place["x"] + place["w"])}
        assert not cells & taken and max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["description"].endswith(".") and panel["title"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_images_have_tags_that_do_not_move():
    images = re.findall(r"^FROM (\S+)", read("Dockerfile"), re.MULTILINE)
    own = set(re.findall(r"AS (\S+)", read("Dockerfile")))
    for path in YAML:
        images += re.findall(r"^\s*image: (\S+)", path.read_text(), re.MULTILINE)
    assert len(images) > 6
    for image in set(images) - own:
        assert TAG.fullmatch(image) and "latest" not in image, image


def test_nothing_runs_as_root():
    stages = read("Dockerfile").split("\nFROM ")
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", stages[2], re.MULTILINE)
    # The last one begins with that one.
    assert stages[3].startswith("server AS") and "USER root" not in stages[3]
    for name, service in yaml.safe_load(read("compose.yaml"))["services"].items():
        assert re.search(r"[1-9]\d*:\d+", service["user"]), name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
    pod = documents()["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    for container in pod["containers"] + pod["initContainers"]:
        secure = container["securityContext"]
        assert secure["readOnlyRootFilesystem"] and not secure["allowPrivilegeEscalation"]
        assert secure["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]


def test_probes_ask_paths_that_there_are_and_names_fit_together(app):
    made = documents()
    pod = made["Deployment"]["spec"]["template"]
    (server,) = pod["spec"]["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        request = server[probe]["httpGet"]
        assert request["port"] in [port["name"] for port in server["ports"]]
        assert ask(app, "GET", request["path"]).status_code == 200
    healthy = re.search(r"127\.0\.0\.1:8000(/\w+)", read("Dockerfile"))[1]
    assert ask(app, "GET", healthy).status_code == 200
    scrape = yaml.safe_load(read("prometheus.yaml"))["scrape_configs"][0]
    monitor = documents("service_monitor.yaml")["ServiceMonitor"]["spec"]
    for path in (scrape["metrics_path"], monitor["endpoints"][0]["path"]):
        assert ask(app, "GET", path).status_code == 200
    labels = pod["metadata"]["labels"]
    for selector in (
        made["Deployment"]["spec"]["selector"]["matchLabels"],
        made["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        made["Service"]["spec"]["selector"],
        monitor["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    target = made["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target["name"] == made["Deployment"]["metadata"]["name"]
    mounts = {mount["name"] for mount in server["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["spec"]["volumes"]}


def test_files_that_are_mounted_are_there_and_flags_exist():
    from twotower.commands import serve

    services = yaml.safe_load(read("compose.yaml"))["services"]
    for service in services.values():
        for volume in service["volumes"]:
            if volume.startswith("./"):
                assert (ROOT / volume.partition(":")[0]).is_file(), volume
    texts = [read(name) for name in ("Dockerfile", "compose.yaml", "kubernetes.yaml")]
    commands = [
        re.findall(r"ENTRYPOINT .*|CMD \[\"--.*|args: .*|command: \[--.*", text) for text in texts
    ]
    flags = re.findall(r"--(\w+)", str(commands))
    assert flags and set(flags) <= set(serve.FLAGS)
    token = documents()["Deployment"]["spec"]["template"]["spec"]["containers"][0]["env"]
    assert [name["name"] for name in token] == ["TWOTOWER_READ_TOKEN", "TWOTOWER_ADMIN_TOKEN"]
    for path in YAML:
        assert list(yaml.safe_load_all(path.read_text())), path


def test_a_run_is_exported_before_it_is_served_where_it_never_was(tmp_path, monkeypatch):
    from twotower import api
    from twotower.commands import serve

    exported = []

    def export(run):
        exported.append(run)
        (run / "bundle").mkdir()

    monkeypatch.setattr("twotower.plugins.load_config", lambda folder: None)
    monkeypatch.setattr(api, "load_run", lambda folder: folder)
    monkeypatch.setattr(api, "export", export)
    assert serve.bundle_of(tmp_path) == serve.bundle_of(tmp_path) == tmp_path / "bundle"
    assert exported == [tmp_path]
