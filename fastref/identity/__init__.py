"""Who is at the other end of a connection: the token of a job, the mutual proof of it, and TLS around both."""

from fastref.identity.certificates import self_made_certificates
from fastref.identity.handshake import Handshake
from fastref.identity.proof import DEFAULT_TIMEOUT_S, prove
from fastref.identity.pump import relay
from fastref.identity.tls import TlsConnection, client_context, secure, server_context
from fastref.identity.token import (
    TOKEN_FILE_VARIABLE,
    TOKEN_VARIABLE,
    Token,
    find_token,
    forget_loopback_token,
    loopback_token,
    mint,
    refuse_without_token,
)

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "TOKEN_FILE_VARIABLE",
    "TOKEN_VARIABLE",
    "Handshake",
    "TlsConnection",
    "Token",
    "client_context",
    "find_token",
    "forget_loopback_token",
    "loopback_token",
    "mint",
    "prove",
    "refuse_without_token",
    "relay",
    "secure",
    "self_made_certificates",
    "server_context",
]
