"""TLS and credentials with a real server: what is trusted, what is shown, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ipaddress
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID

from edge_runtime.bus import nkey
from edge_runtime.bus.access import Access
from edge_runtime.bus.nats import connect
from edge_runtime.errors import TransportError

MB = 1 << 20
RunServer = Callable[..., str]


class Authority:
    """A certificate authority of a test, its files in `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, folder.name)])
        self.certificate = folder / "ca.pem"
        self.certificate.write_bytes(self._signed(self._name, self._key, ca=True))

    def issue(self, name: str, address: str = "127.0.0.1") -> tuple[Path, Path]:
        """A certificate for `address` and its key, as files."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        cert, secret = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        cert.write_bytes(self._signed(subject, key, address=address))
        secret.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        secret.chmod(0o600)
        return cert, secret

    def _signed(self, subject, key, *, ca=False, address="") -> bytes:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        )
        if ca:
            usage = dict.fromkeys(KEY_USAGES, False) | {"key_cert_sign": True}
            builder = builder.add_extension(x509.KeyUsage(**usage), critical=True)
        if address:
            names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)


KEY_USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


def tls(cert: Path, key: Path, ca: Path | None = None) -> str:
    asks = f', ca_file: "{ca}", verify: true' if ca else ""
    return f'tls {{ cert_file: "{cert}", key_file: "{key}"{asks} }}\n'


async def say(url: str, access: Access | None) -> int:
    """Connect and store a message."""
    bus = await connect(url, name="test", access=access)
    try:
        await bus.ensure_stream("S", ["s.>"], max_bytes=MB, discard_new=True)
        return await bus.publish("s.a", b"x")
    finally:
        await bus.close()


def refusal(url: str, access: Access | None) -> TransportError:
    with pytest.raises(TransportError) as caught:
        asyncio.run(asyncio.wait_for(say(url, access), 20))
    assert caught.value.code == "unreachable"
    return caught.value


@pytest.mark.parametrize("scheme", ["nats", "tls"])
def test_a_broker_whose_authority_is_known_is_trusted(run_server, authority, scheme):
    url = run_server(tls(*authority.issue("server"))).replace("nats", scheme, 1)
    assert asyncio.run(say(url, Access(tls_ca=authority.certificate))) == 1


def test_a_broker_of_another_authority_is_refused(run_server, authority, tmp_path):
    url = run_server(tls(*authority.issue("server")))
    for access in (Access(tls_ca=Authority(tmp_path / "other").certificate), None):
        said = refusal(url, access)
        assert "is not trusted" in said.message
        assert "tls_ca" in said.hint


def test_a_broker_under_another_address_is_refused(run_server, authority):
    url = run_server(tls(*authority.issue("server", "127.0.0.9")))
    assert "127.0.0.1" in refusal(url, Access(tls_ca=authority.certificate)).message


def test_a_broker_that_asks_for_a_certificate_gets_it(run_server, authority):
    url = run_server(tls(*authority.issue("server"), authority.certificate))
    cert, key = authority.issue("device")
    access = Access(tls_ca=authority.certificate, tls_cert=cert, tls_key=key)
    assert asyncio.run(say(url, access)) == 1


def test_a_broker_that_asks_for_a_certificate_refuses_who_has_none(run_server, authority, tmp_path):
    url = run_server(tls(*authority.issue("server"), authority.certificate))
    cert, key = Authority(tmp_path / "other").issue("device")
    for access in (
        Access(tls_ca=authority.certificate),
        Access(tls_ca=authority.certificate, tls_cert=cert, tls_key=key),
    ):
        said = refusal(url, access)
        assert "tls_cert" in said.hint, said


def test_where_tls_is_asked_for_nothing_is_signed_in_the_clear(run_server, authority, tmp_path):
    """A server, or who sits before it, that says it needs no TLS gets no signature either."""
    key = nkey.create(tmp_path / "device.nk").public
    url = run_server(f"authorization {{ users: [ {{ nkey: {key} }} ] }}\n")
    assert asyncio.run(say(url, Access(key=tmp_path / "device.nk"))) == 1
    access = Access(key=tmp_path / "device.nk", tls_ca=authority.certificate)
    assert "speaks no TLS" in refusal(url, access).message
    everybody = run_server("").replace("nats", "tls", 1)
    assert "speaks no TLS" in refusal(everybody, None).message


def test_a_key_over_tls_is_admitted(run_server, authority, tmp_path):
    key = nkey.create(tmp_path / "device.nk").public
    allowed = f"authorization {{ users: [ {{ nkey: {key} }} ] }}\n"
    url = run_server(tls(*authority.issue("server")) + allowed)
    access = Access(key=tmp_path / "device.nk", tls_ca=authority.certificate)
    assert asyncio.run(say(url, access)) == 1
    assert "does not admit" in refusal(url, Access(tls_ca=authority.certificate)).message


def test_a_server_in_the_middle_that_hides_tls_hears_nothing(authority, tmp_path):
    nkey.create(tmp_path / "device.nk")
    said = bytearray()

    async def scenario() -> None:
        gone = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b'INFO {"server_id":"x","nonce":"abc","auth_required":true}\r\n')
            said.extend(await reader.read())
            writer.transport.abort()
            gone.set()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        access = Access(key=tmp_path / "device.nk", tls_ca=authority.certificate)
        bus = await connect(url, name="test", access=access)
        assert not bus.connected
        await asyncio.wait_for(gone.wait(), 10)
        await bus.close()
        server.close()
        await server.wait_closed()

    asyncio.run(scenario())
    assert bytes(said) == b""


class Issuer:
    """An operator or account of NATS, or a user: a key, and the claims that it signs."""

    def __init__(self, prefix: int) -> None:
        self._private = Ed25519PrivateKey.generate()
        raw = self._private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.public = nkey._text(bytes([prefix]) + raw)
        self.raw = self._private.private_bytes_raw()

    def claim(self, subject: Issuer, kind: str, **more: object) -> str:
        body = {
            "iss": self.public,
            "sub": subject.public,
            "name": kind,
            "iat": 1_700_000_000,
            "nats": {"type": kind, "version": 2, **more},
        }
        body["jti"] = hashlib.sha256(json.dumps(body).encode()).hexdigest()[:52]
        head = {"typ": "JWT", "alg": "ed25519-nkey"}
        signed = ".".join(_unpadded(json.dumps(part).encode()) for part in (head, body))
        return f"{signed}.{_unpadded(self._private.sign(signed.encode()))}"


def _unpadded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


LIMITS = {
    **dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1),
    "wildcards": True,
}
STORES = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1)


def test_a_credentials_file_opens_a_broker_that_knows_its_operator(run_server, tmp_path):
    operator, account, user = Issuer(14 << 3), Issuer(0), Issuer(20 << 3)
    system = Issuer(0)
    accounts = {
        account.public: operator.claim(account, "account", limits=LIMITS | STORES),
        system.public: operator.claim(system, "account", limits=LIMITS),
    }
    url = run_server(
        f"operator: {operator.claim(operator, 'operator')}\nsystem_account: {system.public}\n"
        f"resolver: MEMORY\nresolver_preload: {json.dumps(accounts)}\n"
    )
    seed = nkey._text(nkey._SEED_OF_USER + user.raw)
    jwt = account.claim(user, "user", subs=-1, data=-1, payload=-1)
    path = tmp_path / "device.creds"
    path.write_text(
        f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
        "************************* IMPORTANT *************************\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    )
    path.chmod(0o600)
    assert asyncio.run(say(url, Access(credentials=path))) == 1
    stranger = nkey.create(tmp_path / "stranger.nk")
    assert stranger.public
    assert "does not admit" in refusal(url, Access(key=tmp_path / "stranger.nk")).message
