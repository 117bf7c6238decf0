"""Which names a server answers to."""

from __future__ import annotations

import pytest

from cpm_bee.errors import InputError
from cpm_bee.serve.host_check import hosts_of, name_of
from cpm_bee.serve.options import ServeOptions


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("Example.COM", "example.com"),
        ("example.com:8000", "example.com"),
        ("localhost.:80", "localhost"),
        ("[::1]", "::1"),
        ("[::1]:8000", "::1"),
        ("127.0.0.1:1", "127.0.0.1"),
        ("", ""),
        ("localhost@evil.example", "localhost@evil.example"),
    ],
)
def test_the_name_in_a_header(given: str, name: str) -> None:
    assert name_of(given) == name


@pytest.mark.parametrize(
    ("host", "flag", "allowed", "refused"),
    [
        ("127.0.0.1", None, ["localhost", "127.0.0.1", "::1"], ["evil.example", "", "0.0.0.0"]),
        ("127.0.0.5", None, ["127.0.0.5", "localhost"], ["127.0.0.6"]),
        ("::1", "a.example, B.example", ["a.example", "b.example", "::1"], ["c.example"]),
        ("0.0.0.0", "a.example,[2001:db8::1]", ["a.example", "2001:db8::1"], ["b.example"]),
    ],
)
def test_names_that_are_allowed(
    host: str, flag: str | None, allowed: list[str], refused: list[str]
) -> None:
    names = hosts_of(host, ServeOptions(host=host, allowed_hosts=flag).host_names)
    assert names is not None
    assert all(name in names for name in allowed)
    assert not any(name in names for name in refused)


@pytest.mark.parametrize(("host", "flag"), [("0.0.0.0", None), ("127.0.0.1", "*"), ("::", "a,*")])
def test_all_names_are_allowed(host: str, flag: str | None) -> None:
    assert hosts_of(host, ServeOptions(host=host, allowed_hosts=flag).host_names) is None


@pytest.mark.parametrize("flag", ["http://a.example", "a.example:80", "", " , ", "a b"])
def test_what_is_no_name_is_refused(flag: str) -> None:
    with pytest.raises(InputError, match=r"--allowed-hosts .*: give names without http://"):
        ServeOptions(allowed_hosts=flag)
