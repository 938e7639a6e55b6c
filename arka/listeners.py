"""Where the server listens: on loopback addresses alone, unless the operator says otherwise.

Owns: what a host's name means, which addresses may be listened on, the listeners. Does not own what they accept.

Until there are TLS and tokens, whoever connects may read, write and drop everything. An address that other machines
reach therefore takes ``server.insecure``. The name is resolved again for the listeners: what that check passed is what
is listened on.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Final

import structlog
import trio

from arka.errors import ConfigurationError

log = structlog.get_logger(__name__)

_NUMERIC: Final = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV


async def open_listeners(host: str, port: int, *, insecure: bool) -> list[trio.SocketListener]:
    """Listen on each address of a host.

    Args:
        host: a name or an address; empty for all addresses of the machine.
        port: 0 for a free one of each address.
        insecure: whether addresses that are not loopback may be listened on.

    Raises:
        ConfigurationError: the host has no address, or one that must not or cannot be listened on.

    Cancellation: nothing stays open.
    """
    addresses = await resolve(host, port)
    _check(host, addresses, insecure=insecure)
    listeners: list[trio.SocketListener] = []
    try:
        for address in addresses:
            listeners += await trio.open_tcp_listeners(port, host=address)
    except BaseException as error:
        for listener in listeners:
            listener.socket.close()
        if isinstance(error, OSError):
            raise ConfigurationError(f"Cannot listen on {host}:{port}: {error}") from error
        raise
    return listeners


async def check_host(host: str, port: int, *, insecure: bool) -> None:
    """Check a host before anything is made, and warn of one that other machines reach.

    Args:
        host: a name or an address; empty for all addresses of the machine.
        port: named in errors.
        insecure: whether addresses that are not loopback may be listened on.

    Raises:
        ConfigurationError: the host has no address, or one that must not be listened on.
    """
    addresses = await resolve(host, port)
    if _check(host, addresses, insecure=insecure):
        log.warning("server.insecure", host=host, hint="whoever connects can read, write and drop every table")


def _check(host: str, addresses: list[str], *, insecure: bool) -> bool:
    """Say whether other machines may reach one of a host's addresses.

    Raises:
        ConfigurationError: so it is, and must not be.
    """
    exposed = [address for address in addresses if not is_loopback(address)]
    if exposed and not insecure:
        raise ConfigurationError(_refusal(host, exposed[0]))
    return bool(exposed)


async def resolve(host: str, port: int) -> list[str]:
    """Return the addresses that a host stands for, each once.

    Raises:
        ConfigurationError: it has none.
    """
    try:
        found = await trio.socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"Cannot listen on {host}:{port}: {error}") from error
    # An address with a scope, such as fe80::1%2, is its interface's.
    return list(dict.fromkeys(socket.getnameinfo(entry[4], _NUMERIC)[0] for entry in found))


def is_loopback(address: str) -> bool:
    """Say whether only this machine reaches an address.

    Args:
        address: as numbers; an IPv4 address in an IPv6 one is what it contains.
    """
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        return parsed.ipv4_mapped.is_loopback
    return parsed.is_loopback


def _refusal(host: str, address: str) -> str:
    where = (
        "every address of this machine" if ipaddress.ip_address(address.partition("%")[0]).is_unspecified else address
    )
    meaning = "" if where == host else f", which means {where}"
    return (
        f"server.host = {host!r}{meaning}: other machines may reach it, and whoever connects can read, write and drop "
        "every table, since there is neither TLS nor authentication yet. Listen on 127.0.0.1, or set server.insecure "
        "(--insecure) where the network keeps everybody else out"
    )


__all__ = ["check_host", "is_loopback", "open_listeners", "resolve"]
