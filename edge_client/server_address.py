"""The address of a server, as its owner writes it and a transport uses it."""

from __future__ import annotations

from typing import Any

from yarl import URL

from fedtt.errors import ConfigError

__all__ = ["server_url"]


def server_url(server: str) -> URL:
    """The base address; raises ConfigError where it is not one, or its host none that can be looked up."""
    allowed = "an address like https://example.org or http://127.0.0.1:8080"
    try:
        url = URL(server)
        host = (url.raw_host or "").encode("idna").decode()  # as the look-up will: no part empty or too long
    except ValueError:
        raise ConfigError("server", server, allowed) from None
    parts: tuple[Any, ...] = (url.query_string, url.fragment, url.user)
    readable = host and " " not in host and host.isprintable()
    if url.scheme not in {"http", "https"} or not readable or any(parts):
        raise ConfigError("server", server, allowed)
    return url
