"""TLS of the two listeners, from files."""

from __future__ import annotations

import ssl
from asyncio.sslproto import SSLProtocol
from pathlib import Path

from fedtt.errors import ConfigError

__all__ = ["HELD_BYTES", "server_tls", "trusting"]

HELD_BYTES = 1 << 14  #: a record of TLS: what a connection makes room for at its beginning


def server_tls(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """A context of TLS 1.2 or newer; None where neither file is given. Raises ConfigError for others.

    With it connections of this process hold less than the 256 KiB that asyncio gives each at its beginning,
    shaken hands or not: thousands of them would take gigabytes.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        missing = "--tls-cert" if certificate is None else "--tls-key"
        raise ConfigError(missing, None, "both a certificate and its key, or neither")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")
    except FileNotFoundError:
        missing_path = certificate if not certificate.exists() else key
        raise ConfigError("--tls-cert, --tls-key", str(missing_path), "files that exist") from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            "--tls-cert, --tls-key",
            f"{certificate}, {key}",
            f"a certificate chain in PEM and its key, without a password ({error})",
        ) from None
    SSLProtocol.max_size = HELD_BYTES
    return context


def trusting(ca: Path | None) -> ssl.SSLContext | bool:
    """What a client of the admin listener trusts: the machine's authorities, or those in a file alone."""
    if ca is None:
        return True
    try:
        return ssl.create_default_context(cafile=ca)
    except (OSError, ValueError) as error:
        raise ConfigError("--ca", str(ca), f"a file of certificates in PEM ({error})") from None
