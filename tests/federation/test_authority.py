"""Certificates and keys, as openssl, ssh-keygen and Python's TLS see them."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from pathlib import Path
from threading import Thread

import pytest

from twist_fl.federation.authority import Authority, node_key


def written(folder: Path, hosts: list[str]) -> None:
    authority = Authority("lab CA")
    certificate, key = authority.server(hosts)
    for name, data in {"ca.crt": authority.certificate, "server.crt": certificate, "server.key": key}.items():
        (folder / name).write_bytes(data)


def handshake(folder: Path, name: str) -> None:
    """With a server that has server.crt, by a client that trusts ca.crt and wants `name`."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=folder / "ca.crt")
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    server.load_cert_chain(folder / "server.crt", folder / "server.key")
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except ssl.SSLError:  # the client has refused
            theirs.close()

    serving = Thread(target=serve)
    serving.start()
    try:
        client.wrap_socket(ours, server_hostname=name).close()
    finally:
        ours.close()
        serving.join()


@pytest.mark.parametrize("name", ["lab.example.org", "10.0.0.5", "fd00::5"])
def test_a_server_is_known_under_each_of_its_hosts(name: str, tmp_path: Path) -> None:
    written(tmp_path, ["lab.example.org", "10.0.0.5", "fd00::5"])
    handshake(tmp_path, name)


def test_a_server_is_refused_under_another_name_and_by_another_authority(tmp_path: Path) -> None:
    written(tmp_path, ["lab.example.org"])
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(tmp_path, "elsewhere.example.org")
    (tmp_path / "ca.crt").write_bytes(Authority("lab CA").certificate)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path, "lab.example.org")


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_openssl_takes_the_chain(tmp_path: Path) -> None:
    written(tmp_path, ["lab.example.org"])
    words = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", "ca.crt", "server.crt"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="needs ssh-keygen")
def test_a_nodes_public_key_is_that_of_its_private_key(tmp_path: Path) -> None:
    private, public = node_key("node0")
    (tmp_path / "key").write_bytes(private)
    (tmp_path / "key").chmod(0o600)
    done = subprocess.run(["ssh-keygen", "-y", "-f", tmp_path / "key"], capture_output=True, check=True)
    assert done.stdout.split()[:2] == public.split()[:2]
    assert public.split()[0] == b"ecdsa-sha2-nistp384"


def test_no_two_keys_are_alike() -> None:
    assert len({node_key("a") for _ in range(4)}) == 4
