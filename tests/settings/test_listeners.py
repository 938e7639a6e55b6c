"""Which hosts the server listens on (arka.listeners)."""

from __future__ import annotations

import socket

import pytest
import trio

from arka import listeners
from arka.errors import ConfigurationError

LOOPBACK = ("127.0.0.1", "127.255.255.254", "127.1", "2130706433", "0x7f.1", "::1", "localhost")
REACHABLE = ("0.0.0.0", "::", "0", "10.0.0.1", "169.254.1.1", "192.0.2.7", "fe80::1", "::ffff:10.0.0.1", "2001:db8::1")


@pytest.mark.parametrize("host", LOOPBACK)
def test_loopback_is_listened_on(host):
    """Every spelling of a loopback address is served without a word."""

    async def listen() -> None:
        for listener in await listeners.open_listeners(host, 0, insecure=False):
            assert listeners.is_loopback(listener.socket.getsockname()[0])
            await listener.aclose()

    trio.run(listen)


@pytest.mark.parametrize("host", REACHABLE)
def test_what_others_reach_is_refused(host):
    """The refusal names the setting, the host and what would allow it."""
    for check in (listeners.check_host, listeners.open_listeners):
        with pytest.raises(ConfigurationError, match=r"server\.host = .*server\.insecure \(--insecure\)") as caught:
            trio.run(lambda check=check: check(host, 0, insecure=False))
        assert repr(host) in str(caught.value)


@pytest.mark.parametrize("address", ["::ffff:127.0.0.1", "::1%lo", "127.8.8.8"])
def test_loopback_in_other_forms(address):
    """An IPv4 address in an IPv6 one counts as what it is."""
    assert listeners.is_loopback(address)


@pytest.mark.parametrize("found", [["127.0.0.1", "10.1.2.3"], ["10.1.2.3"], ["::1", "fe80::5"]])
def test_names_are_what_they_resolve_to(monkeypatch, found):
    """One address that others reach is enough, whatever the name looks like."""

    def resolve(name, port, *_, **__):
        assert name == "localhost"
        return [(socket.AF_INET6 if ":" in a else socket.AF_INET, 1, 6, "", (a, port)) for a in found]

    monkeypatch.setattr("trio.socket.getaddrinfo", _in_trio(resolve))
    with pytest.raises(ConfigurationError, match="which means"):
        trio.run(lambda: listeners.check_host("localhost", 0, insecure=False))


def test_what_was_checked_is_listened_on(monkeypatch):
    """The name is not resolved again between the check and the bind."""
    answers = iter([["127.0.0.1"], ["0.0.0.0"]])

    def resolve(name, port, *_, **__):
        return [(socket.AF_INET, 1, 6, "", (a, port)) for a in (next(answers) if name == "moving" else [name])]

    monkeypatch.setattr("trio.socket.getaddrinfo", _in_trio(resolve))

    async def listen() -> None:
        (listener,) = await listeners.open_listeners("moving", 0, insecure=False)
        assert listener.socket.getsockname()[0] == "127.0.0.1"
        await listener.aclose()

    trio.run(listen)


@pytest.mark.parametrize("host", ["no.such.host", "a..b"])
def test_names_without_an_address_are_errors(monkeypatch, host):
    """What does not resolve is a configuration error, not a traceback."""

    def resolve(name, *_, **__):
        name.encode("idna")
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("trio.socket.getaddrinfo", _in_trio(resolve))
    with pytest.raises(ConfigurationError, match="Cannot listen on"):
        trio.run(lambda: listeners.check_host(host, 0, insecure=False))


def _in_trio(function):
    async def run(*arguments, **more):
        await trio.lowlevel.checkpoint()
        return function(*arguments, **more)

    return run
