"""A certificate authority of one's own, certificates for servers and for single runs, and keys for nodes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAYS, DAYS_OF_A_RUN = 5 * 365, 365
_CLOCKS_DIFFER = timedelta(days=1)


def subject(host: str) -> x509.GeneralName:
    """A host as a certificate names it: an IP address, else a DNS name."""
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


class Authority:
    """A new certificate authority. `certificate` and `key` are PEM."""

    def __init__(self, name: str) -> None:
        self._key = ec.generate_private_key(ec.SECP384R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._certificate = (
            _builder(self._name, self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(certificates=True), critical=True)
            .sign(self._key, SHA256())
        )
        self.certificate, self.key = self._certificate.public_bytes(Encoding.PEM), _private(self._key)

    def server(self, hosts: list[str]) -> tuple[bytes, bytes]:
        """A certificate for a server that is reached under `hosts`, names or IP addresses, and its key, both PEM."""
        key = ec.generate_private_key(ec.SECP384R1())
        issuer = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        certificate = (
            _builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])]), self._name, key)
            .add_extension(x509.SubjectAlternativeName(map(subject, hosts)), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False)
            .sign(self._key, SHA256())
        )
        return certificate.public_bytes(Encoding.PEM), _private(key)


def make_certificate(host: str) -> tuple[bytes, bytes]:
    """For one run: a self-signed certificate for `host`, a name or an address, and its key, both PEM; in no file.

    Whoever is told the certificate by a trusted message can tell the run's server from any other.
    """
    key, nobody = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    certificate = (
        _builder(nobody, nobody, key, DAYS_OF_A_RUN)
        .add_extension(x509.SubjectAlternativeName([subject(host)]), critical=True)
        .sign(key, SHA256())
    )
    return certificate.public_bytes(Encoding.PEM), _private(key)


def node_key(comment: str) -> tuple[bytes, bytes]:
    """A node's private and public key, as `ssh-keygen -t ecdsa -b 384` writes them."""
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return private, public + f" {comment}\n".encode()


def _builder(
    name: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int = DAYS
) -> x509.CertificateBuilder:
    """What all certificates have. Valid from a day ago: clocks differ."""
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(certificates: bool) -> x509.KeyUsage:
    """To sign certificates, or to sign the handshakes of a server."""
    return x509.KeyUsage(
        digital_signature=not certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificates,
        crl_sign=certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
