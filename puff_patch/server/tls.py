"""TLS: the files are read here, before the front does, which would end the process over the first bad one."""

from __future__ import annotations

import base64
import importlib
import os
import re
import ssl
from dataclasses import dataclass
from typing import BinaryIO

from puff_patch.server.options import ServerError, ServerOptions

# DER of what a certificate says of its public key. The front's library (rustls with ring) has no others.
_RSA = bytes.fromhex("06092a864886f70d0101010500")
_KEYS = {
    "P-256": bytes.fromhex("06082a8648ce3d030107"),
    "P-384": bytes.fromhex("06052b81040022"),
    "Ed25519": bytes.fromhex("06032b6570"),
}
_VERSION_3 = bytes.fromhex("a003020102")
# A public key of RSA, from 1024 bits on: its modulus, with its length in two bytes and a zero before it.
_RSA_KEY = re.compile(re.escape(_RSA) + rb"\x03\x82..\x00\x30\x82..\x02\x82(..)\x00", re.DOTALL)
_RSA_BITS = range(2048, 4097)


@dataclass(frozen=True)
class TLS:
    """Files that the front can take, checked.

    Args:
        certfile: the path of the certificate and what is between it and its root.
        keyfile: the path of its key, not encrypted.
        min_version: ``"1.2"`` or ``"1.3"``.
        ca_certs: the path of the roots that clients' certificates are checked against, None to ask for none.
        client_auth_required: turn away clients without a certificate.
        held: keeps ``keyfile`` there.
    """

    certfile: str
    keyfile: str
    min_version: str
    ca_certs: str | None
    client_auth_required: bool
    held: BinaryIO | None = None


def check_tls(options: ServerOptions) -> TLS | None:
    """Read the files of the options ``ssl_...`` and make sure that they fit.

    Returns:
        None if the options ask for no TLS.

    Raises:
        ServerError: a file is missing, is something else or does not fit; the message says which and what to do.
    """
    if options.ssl_certfile is None:
        return None
    certfile, keyfile = options.ssl_certfile, options.ssl_keyfile or options.ssl_certfile
    _check_certificate(certfile, _read(certfile, "certificate"))
    key = _read(keyfile, "key")
    held = None
    if "-----BEGIN ENCRYPTED PRIVATE KEY" in key or "Proc-Type: 4,ENCRYPTED" in key:
        held = _decrypted(keyfile, key, options.ssl_keyfile_password)
    elif re.search(r"-----BEGIN (RSA |EC )?PRIVATE KEY-----", key) is None:
        raise ServerError(
            f"Cannot serve TLS: {keyfile} holds no private key in PEM form. Name its file with ssl_keyfile."
        )
    path = keyfile if held is None else f"/proc/self/fd/{held.fileno()}"
    _check_pair(certfile, path, keyfile)
    if options.ssl_ca_certs is not None:
        _check_ca(options.ssl_ca_certs)
    return TLS(
        certfile, path, options.ssl_min_version, options.ssl_ca_certs, options.ssl_client_auth == "required", held
    )


def _read(path: str, what: str) -> str:
    try:
        with open(path, encoding="latin-1") as file:
            return file.read()
    except OSError as exc:
        raise ServerError(
            f"Cannot serve TLS: the {what} file {path} cannot be read: {exc.strerror}. "
            "Give the path of a file that this user may read."
        ) from exc


def _check_certificate(path: str, text: str) -> None:
    der = _der(text, "CERTIFICATE")
    if der is None:
        raise ServerError(
            f"Cannot serve TLS: {path} holds no certificate in PEM form (-----BEGIN CERTIFICATE-----). "
            f"To convert one: openssl x509 -inform der -in {path} -out certificate.pem"
        )
    if _VERSION_3 not in der[:16]:
        raise ServerError(
            f"Cannot serve TLS: the certificate {path} is not of version 3. Have it made with extensions, such as "
            "openssl req -x509 ... -addext subjectAltName=DNS:localhost"
        )
    rsa = _RSA_KEY.search(der)
    if any(key in der for key in _KEYS.values()):
        return
    if rsa is None or (int.from_bytes(rsa[1], "big") - 1) * 8 not in _RSA_BITS:
        raise ServerError(
            f"Cannot serve TLS: the key of the certificate {path} is of a kind that the front does not have. "
            f"Have one issued for a key of {', '.join(_KEYS)} or RSA with {_RSA_BITS[0]} to {_RSA_BITS[-1]} bits."
        )


def _decrypted(path: str, text: str, password: str | None) -> BinaryIO:
    """Return a file in memory with a key in the clear: the front's own way of opening one does not work."""
    if password is None:
        raise ServerError(f"Cannot serve TLS: the key {path} is encrypted. Give its ssl_keyfile_password.")
    try:
        serialization = importlib.import_module("cryptography.hazmat.primitives.serialization")
    except ImportError:
        raise ServerError(
            f"Cannot serve TLS: the key {path} is encrypted, and opening it needs a package: "
            "pip install 'puff-patch[tls]'"
        ) from None
    try:
        key = serialization.load_pem_private_key(text.encode("latin-1"), password.encode())
    except (ValueError, TypeError) as exc:
        raise ServerError(
            f"Cannot serve TLS: the key {path} cannot be opened with the ssl_keyfile_password given ({exc})."
        ) from exc
    clear: bytes = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    held = os.fdopen(os.memfd_create("puff_patch key"), "w+b", buffering=0)
    held.write(clear)
    return held


def _check_pair(certfile: str, path: str, keyfile: str) -> None:
    try:
        # Never without a password, or OpenSSL could ask for one on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, path, "")
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            what = f"the key {keyfile} is not the one of the certificate {certfile}"
        else:
            what = f"{certfile} and {keyfile} cannot be used ({exc.reason or exc})"
        raise ServerError(f"Cannot serve TLS: {what}. Give a certificate and its own key.") from exc


def _check_ca(path: str) -> None:
    text = _read(path, "CA")
    try:
        if _der(text, "CERTIFICATE") is None:
            raise ssl.SSLError
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
    except ssl.SSLError as exc:
        raise ServerError(
            f"Cannot serve TLS: {path} holds no CA certificates in PEM form. Give such a file as ssl_ca_certs."
        ) from exc


def _der(text: str, label: str) -> bytes | None:
    """Return the first block with the label, decoded; None if there is none."""
    found = re.search(f"-----BEGIN {label}-----(.+?)-----END {label}-----", text, re.DOTALL)
    if found is None:
        return None
    try:
        return base64.b64decode(found[1])
    except ValueError:
        return None
