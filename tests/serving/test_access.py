"""Names that a server answers to."""

import pytest

from twotower.core.errors import ConfigError
from twotower.serving.access import Access, Hosts
from twotower.serving.limits import Limits


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:8000", "[::1]", "127.0.0.2:1"]
)
def test_a_server_on_loopback_answers_to_its_own_names(host):
    assert Hosts.at("127.0.0.2", []).allow(host.encode())


@pytest.mark.parametrize(
    "host", ["site.example", "localhost.site.example:8000", "", "127.0.0.1.nip.io", "[::2]:80", "*"]
)
def test_others_are_refused_unless_they_are_named(host):
    assert not Hosts.at("127.0.0.1", ["shop.example"]).allow(host.encode())
    assert Hosts.at("127.0.0.1", ["*"]).allow(host.encode())
    assert Hosts.at("::1", ["shop.example"]).allow(b"shop.example:443")


def test_beyond_loopback_names_are_asked_for_only_where_some_are_given():
    assert Hosts.at("0.0.0.0", []) is None and Hosts.at("::", []) is None
    named = Hosts.at("0.0.0.0", ["shop.example"])
    assert named.allow(b"shop.example") and not named.allow(b"10.0.0.7:8000")
    for name in ("fe80::1", "[fe80::1]"):
        assert Hosts.at("0.0.0.0", [name]).allow(b"[FE80::1]:8000")


@pytest.mark.parametrize("name", ["https://shop.example", "shop.example:80", "", "a/b"])
def test_what_is_no_name_of_a_host_is_refused_with_the_cure(name):
    with pytest.raises(ConfigError, match="--allowed_hosts: .* without https:// and without a"):
        Limits(hosts=(name,))
    assert Limits(hosts=("fe80::1", "shop.example", "*")).hosts


@pytest.mark.parametrize(
    "token", ["a token for reading\n", "\ta token for reading", "a token\nin two lines"]
)
def test_a_token_that_no_header_carries_is_refused_and_not_shown(token):
    with pytest.raises(ConfigError, match="token of 'read' has a line break") as refusal:
        Access({"read": token})
    assert "reading" not in str(refusal.value)
