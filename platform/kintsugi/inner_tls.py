"""A certificate that the parts of the local S3 server share, so that they talk gRPC to each other and to nobody else.

Without it any program on the machine may list and delete what is stored, past S3 and its credentials.
"""

import ipaddress
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

PARTS = ("MASTER", "VOLUME", "FILER", "S3", "CLIENT")
LIFE = timedelta(days=3650)
"""A stack that starts again gets another."""


def grpc_environment(folder: Path) -> dict[str, str]:
    """SeaweedFS's variables for TLS with client certificates, whose one certificate and key are written to `folder`."""
    path = str(_write(folder / "inner.pem"))
    files = {f"WEED_GRPC_{part}_{kind}": path for part in PARTS for kind in ("CERT", "KEY")}
    return {"WEED_GRPC_CA": path} | files


def _write(path: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(_certificate(key).public_bytes(serialization.Encoding.PEM) + private)
    return path


def _certificate(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """Signed by itself, hence its own authority."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kintsugi")])
    hosts = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.IPv4Address("127.0.0.1")), x509.DNSName("localhost")])
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(hosts, critical=False)
        .sign(key, hashes.SHA256())
    )
