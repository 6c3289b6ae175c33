"""Both listeners over TLS with certificates of a self-made authority."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from yarl import URL

from aggregator.admin_client import AdminClient
from aggregator.app import ServerConfig, serving
from aggregator.tls import server_tls
from edge_client.http_transport import HttpTransport
from edge_client.identity import Identity
from fedtt.errors import ConfigError, Unreachable
from fedtt.messages import Enroll, Wait
from fedtt.seams import SystemClock
from tests.support.served import CHECK_IN, Peer


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _write(directory: Path, name: str, key: ec.EllipticCurvePrivateKey, cert: x509.Certificate) -> None:
    (directory / f"{name}.pem").write_bytes(cert.public_bytes(Encoding.PEM))
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (directory / f"{name}-key.pem").write_bytes(pem)


def authority(directory: Path, name: str, host: str = "127.0.0.1") -> None:
    """NAME.pem is an authority; server-NAME.pem with its key is a server's certificate by it."""
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def build(subject: str, public: ec.EllipticCurvePublicKey, *, ca: bool) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(_name(subject))
            .issuer_name(_name(name))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - day)
            .not_valid_after(now + day)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        )

    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    root = build(name, ca_key.public_key(), ca=True).add_extension(usage, critical=True)
    _write(directory, name, ca_key, root.sign(ca_key, hashes.SHA256()))
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))])
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    leaf = build(host, key.public_key(), ca=False).add_extension(alternative, critical=False)
    leaf = leaf.add_extension(issuer, critical=False)
    _write(directory, f"server-{name}", key, leaf.sign(ca_key, hashes.SHA256()))


async def test_devices_and_people_speak_tls_with_the_authority_they_trust_and_no_other(
    tmp_path: Path,
) -> None:
    for name in ("ours", "another"):
        authority(tmp_path, name)
    config = ServerConfig(
        data=tmp_path / "data",
        port=0,
        admin_port=0,
        tls_cert=tmp_path / "server-ours.pem",
        tls_key=tmp_path / "server-ours-key.pem",
    )
    async with serving(config) as listening:
        assert listening.url.startswith("https://127.0.0.1:")
        ours, another = tmp_path / "ours.pem", tmp_path / "another.pem"
        async with AdminClient(listening.admin_url, listening.admin_token, ca=ours) as admin:
            assert await admin.rows("/tasks") == []
        async with Peer(listening.url, 1) as peer:
            identity = peer.identity
            with pytest.raises(Unreachable, match=r"(?i)certificate verify failed"):
                await peer.enroll(listening.enrolment_token)
        assert await _checked_in(listening.url, identity, str(ours), listening.enrolment_token)
        with pytest.raises(Unreachable, match=r"(?i)certificate verify failed"):
            await _checked_in(listening.url, identity, str(another), listening.enrolment_token)
        with pytest.raises(Unreachable):
            async with AdminClient(listening.admin_url, listening.admin_token, ca=another) as admin:
                await admin.rows("/tasks")
        plain = "http" + listening.url.removeprefix("https")
        with pytest.raises(Unreachable):
            await _checked_in(plain, identity, "", listening.enrolment_token)


async def test_a_connection_that_never_shakes_hands_is_closed(tmp_path: Path) -> None:
    authority(tmp_path, "ours")
    config = ServerConfig(
        data=tmp_path / "data",
        port=0,
        admin_port=0,
        tls_cert=tmp_path / "server-ours.pem",
        tls_key=tmp_path / "server-ours-key.pem",
        idle_s=0.2,
    )
    async with serving(config) as listening:
        for address in (listening.url, listening.admin_url):
            url = URL(address)
            reader, writer = await asyncio.open_connection(url.host, url.port)
            async with asyncio.timeout(5):
                assert await reader.read() == b""
            writer.close()


async def _checked_in(url: str, identity: Identity, ca: str, token: str) -> bool:
    transport = HttpTransport(url, identity, SystemClock(), ca=ca)
    try:
        await transport.enroll(Enroll(public_key=identity.public_key, token=token, client="x"))
        return isinstance(await transport.check_in(CHECK_IN), Wait)
    finally:
        await transport.close()


def test_files_that_are_no_certificate_are_refused_in_one_line(tmp_path: Path) -> None:
    authority(tmp_path, "ours")
    cert, key = tmp_path / "server-ours.pem", tmp_path / "server-ours-key.pem"
    (tmp_path / "junk").write_text("junk")
    with pytest.raises(ConfigError, match="--tls-key = None is not allowed: both a certificate and its key"):
        server_tls(cert, None)
    with pytest.raises(ConfigError, match="files that exist"):
        server_tls(cert, tmp_path / "none")
    for pair in ((cert, tmp_path / "junk"), (tmp_path / "junk", key), (cert, tmp_path / "ours-key.pem")):
        with pytest.raises(ConfigError, match="a certificate chain in PEM and its key, without a password"):
            server_tls(*pair)
    with pytest.raises(ConfigError, match=r"--ca = .* a file of certificates in PEM"):
        AdminClient("https://x", "t", ca=tmp_path / "junk")
    with pytest.raises(ConfigError, match=r"--ca = .* a file of certificates in PEM"):
        HttpTransport("https://x", Peer("http://x", 1).identity, SystemClock(), ca=str(tmp_path / "none"))
