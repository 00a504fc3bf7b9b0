"""Flags that name addresses: a command sees folders of this machine, and what it writes is sent."""

from pathlib import Path

import pytest
from absl import flags

from twotower.commands.pods.remote_folders import local_copies
from twotower.core.errors import ConfigError
from twotower.core.files import current_version
from twotower.core.remote.copies import source_of


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.setenv("TWOTOWER_CACHE", str(tmp_path / "cache"))
    bundle = tmp_path / "bucket" / "bundle"
    bundle.mkdir(parents=True)
    (bundle / "manifest.json").write_text("{}")
    return f"file://{tmp_path}/bucket"


def parsed(**values):
    own = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "", flag_values=own)
    flags.DEFINE_multi_string("bundle", None, "", flag_values=own)
    flags.DEFINE_string("out", None, "", flag_values=own)
    if "follow" in values:
        flags.DEFINE_bool("follow", True, "", flag_values=own)
    words = [f"--{name}={each}" for name, found in values.items() for each in found]
    own(["command", *words])
    return own


def test_addresses_become_copies_and_what_is_written_in_them_is_sent(bucket, tmp_path):
    given = {"workdir": [f"{bucket}/run"], "bundle": [f"new={bucket}/bundle", "old=here"]}
    own = parsed(out=["file"], **given)
    with local_copies(own):
        copy = Path(own["workdir"].value)
        copy.mkdir(parents=True)
        (copy / "config.json").write_text("{}")
        name, _, folder = own["bundle"].value[0].partition("=")
        assert name == "new" and (Path(folder) / "manifest.json").read_text() == "{}"
        assert own["bundle"].value[1] == "old=here" and own["out"].value == "file"
        assert not (tmp_path / "bucket" / "run").exists()
    assert (tmp_path / "bucket" / "run" / "config.json").read_text() == "{}"


def test_a_server_gets_a_copy_of_a_bundle_that_it_can_follow(bucket):
    own = parsed(bundle=[f"new={bucket}/bundle"], follow=["true"])
    with local_copies(own):
        name, _, folder = own["bundle"].value[0].partition("=")
        assert name == "new" and source_of(Path(folder)) == f"{bucket}/bundle"
        assert (current_version(folder) / "manifest.json").read_text() == "{}"


def test_paths_stay_as_they_are_and_unknown_addresses_are_refused():
    own = parsed(workdir=["runs/mine"])
    with local_copies(own):
        assert own["workdir"].value == "runs/mine"
    with pytest.raises(ConfigError, match="--workdir=az://x/y: addresses begin with gs://"):
        with local_copies(parsed(workdir=["az://x/y"])):
            pass
