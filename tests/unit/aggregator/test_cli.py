"""What `fedtt serve` tells people to type on another machine."""

from __future__ import annotations

import socket

import pytest

from aggregator.app import url_of
from aggregator.serve_command import reachable


@pytest.mark.parametrize("everywhere", ["0.0.0.0", "::"])  # noqa: S104  # nothing listens here
def test_a_server_on_all_addresses_is_reached_by_its_machines_name(everywhere: str) -> None:
    assert reachable(url_of(everywhere, 8440)) == f"http://{socket.gethostname()}:8440"


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1", "fedtt.example.org"])
def test_a_server_on_one_address_is_reached_by_it(host: str) -> None:
    assert reachable(url_of(host, 8440)) == f"http://{host}:8440"


def test_an_address_of_version_6_stands_in_brackets() -> None:
    assert reachable(url_of("::1", 8440)) == "http://[::1]:8440"
