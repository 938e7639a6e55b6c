"""The channel port over real sockets, TLS and memory streams (T3)."""

from __future__ import annotations

import socket
import ssl

import pytest
import trio
import trio.testing

from arka.flight.channels import SocketChannel, StreamChannel, channel_of, peer_of
from arka.flight.grpc import Route
from arka.flight.http2 import ConnectionFactory
from arka.options import MIB, Limits
from arka.tiers.admission import Ledger
from tests.transport.peer import ECHO, Peer, data, echo, grpc_message


def socket_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    left, right = trio.socket.socketpair()
    return trio.SocketStream(left), trio.SocketStream(right)


async def tcp_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        client = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        return client, await listener.accept()


def tls_contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Contexts for a client and a server that need no certificate: encrypted, and open to anybody."""
    contexts = []
    for protocol in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER):
        context = ssl.SSLContext(protocol)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("AECDH-AES256-SHA:@SECLEVEL=0")
        context.set_alpn_protocols(["h2"])
        contexts.append(context)
    return contexts[0], contexts[1]


def tls_pair(make_pair=trio.testing.memory_stream_pair) -> tuple[trio.SSLStream, trio.SSLStream]:
    left, right = make_pair()
    client, server = tls_contexts()
    return (
        trio.SSLStream(left, client, https_compatible=True),
        trio.SSLStream(right, server, server_side=True, https_compatible=True),
    )


PAIRS = {
    "socket": socket_pair,
    "memory": trio.testing.memory_stream_pair,
    "lockstep": trio.testing.lockstep_stream_pair,
    "tls": tls_pair,
    "tls over lockstep": lambda: tls_pair(trio.testing.lockstep_stream_pair),
}


def buffers(*sizes: int) -> list[memoryview]:
    return [memoryview(bytearray(size)) for size in sizes]


@pytest.mark.parametrize("kind", PAIRS)
async def test_receives_into_several_buffers(kind):
    """Bytes fill the buffers in order, whatever the stream, and the end is 0."""
    client, server = PAIRS[kind]()
    channel = channel_of(server)
    received = b""

    async def write() -> None:
        await client.send_all(bytes(range(200)))
        if hasattr(client, "send_eof"):
            await client.send_eof()
        else:
            await client.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        while True:
            parts = buffers(3, 50)
            size = await channel.receive_into(parts)
            if not size:
                break
            received += b"".join(parts)[:size]
    assert received == bytes(range(200))
    await trio.aclose_forcefully(client)
    await trio.aclose_forcefully(server)


@pytest.mark.parametrize("kind", PAIRS)
async def test_serves_a_connection(kind):
    """A whole RPC goes over each kind of stream, with a message larger than any window."""
    client, server = PAIRS[kind]()
    factory = ConnectionFactory({ECHO: Route(echo)}, Ledger(64 * MIB), Limits(memory_bytes=64 * MIB))
    peer = Peer(client)
    message = grpc_message(bytes(range(256)) * 1000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(factory.serve, server)
        nursery.start_soon(peer.listen)
        await peer.shake_hands({4: 2**20})
        await peer.send(b"\0\0\4\10\0\0\0\0\0\0\x10\0\0", peer.request(1))
        await peer.send(data(1, message[:60_000]))
        await peer.wait(lambda: peer.granted.get(1, 0) > len(message))
        await peer.send(data(1, message[60_000:], end=True))
        response = await peer.response(1)
        assert response.messages == [bytes(range(256)) * 1000]
        nursery.cancel_scope.cancel()
    await trio.aclose_forcefully(client)
    await trio.aclose_forcefully(server)


async def test_choice():
    """Sockets receive in place; everything else by copying."""
    left, right = socket_pair()
    async with left, right:
        assert isinstance(channel_of(left), SocketChannel)
        assert isinstance(channel_of(trio.testing.memory_stream_pair()[0]), StreamChannel)


async def test_cancelled_receive_takes_nothing():
    """T2: a receive that is cancelled leaves the bytes for the next one."""
    left, right = socket_pair()
    async with left, right:
        channel = SocketChannel(right)
        for _ in range(3):
            with trio.move_on_after(0.001):
                await channel.receive_into(buffers(10))
            await left.send_all(b"abc")
            parts = buffers(10)
            assert await channel.receive_into(parts) == 3
            assert bytes(parts[0][:3]) == b"abc"
        await left.send_all(b"abc")
        with trio.CancelScope() as scope:
            scope.cancel()
            await channel.receive_into(buffers(10))
        assert await channel.receive_into(buffers(10)) == 3


async def test_send_waits_for_a_slow_reader():
    """A send of more than the kernel holds waits, and all of it arrives in order."""
    left, right = socket_pair()
    payload = bytes(range(251)) * 40_000
    got = bytearray()
    async with left, right, trio.open_nursery() as nursery:
        nursery.start_soon(SocketChannel(right).send_all, [payload[:7], b"", memoryview(payload)[7:]])
        while len(got) < len(payload):
            await trio.testing.wait_all_tasks_blocked()
            got += await left.receive_some(100_000)
    assert got == payload


async def test_send_now_takes_what_goes():
    """What the kernel takes at once is sent, the rest is given back for ``send_all``, and the order is kept."""
    left, right = socket_pair()
    payload = bytes(range(251)) * 40_000
    got = bytearray()
    async with left, right, trio.open_nursery() as nursery:
        channel = SocketChannel(right)
        assert not channel.send_now([b"", b"first"])
        rest = channel.send_now([payload[:7], b"", memoryview(payload)[7:]])
        assert 0 < sum(map(len, rest)) < len(payload)
        assert list(channel.send_now(rest)) == rest
        nursery.start_soon(channel.send_all, rest)
        while len(got) < len(payload) + 5:
            await trio.testing.wait_all_tasks_blocked()
            got += await left.receive_some(100_000)
    assert got == b"first" + payload


async def test_send_now_leaves_errors_to_send_all():
    """On a broken socket, and on a stream that may have to wait, nothing was sent."""
    left, right = socket_pair()
    channel = SocketChannel(right)
    await left.aclose()
    await right.aclose()
    assert list(channel.send_now([b"a", b"b"])) == [b"ab"]
    with pytest.raises(trio.ClosedResourceError):
        await channel.send_all([b"ab"])
    assert StreamChannel(trio.testing.memory_stream_pair()[0]).send_now([b"a"]) == [b"a"]


async def test_expects_more():
    """A receive that filled its buffers expects more, one that did not took all there was."""
    left, right = socket_pair()
    async with left, right:
        channel = SocketChannel(right)
        await left.send_all(b"12345")
        await channel.receive_into(buffers(3))
        assert channel.expects_more
        await channel.receive_into(buffers(3))
        assert not channel.expects_more


async def test_busy_socket_lets_others_run():
    """A socket that is always ready does not keep other tasks from running."""
    left, right = socket_pair()
    ran = 0

    async def other() -> None:
        nonlocal ran
        while True:
            await trio.lowlevel.checkpoint()
            ran += 1

    async with left, right, trio.open_nursery() as nursery:
        nursery.start_soon(other)
        sender, receiver = SocketChannel(left), SocketChannel(right)
        await left.send_all(bytes(1000))
        for _ in range(40):
            await sender.send_all([b"x"])
            await receiver.receive_into(buffers(1, 1)[:2])
        nursery.cancel_scope.cancel()
    assert ran >= 10


async def test_reset_by_peer():
    """A connection that the peer resets is broken for receiving and sending."""
    client, server = await tcp_pair()
    channel = SocketChannel(server)
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    await client.aclose()
    with pytest.raises(trio.BrokenResourceError):
        await channel.receive_into(buffers(10))
    with pytest.raises(trio.BrokenResourceError):
        await channel.send_all([b"x"])
    await server.aclose()


async def test_closed_by_us():
    """A stream that this process closed is told from one that the peer broke."""
    left, right = socket_pair()
    channel = SocketChannel(right)
    await right.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await channel.receive_into(buffers(1))
    with pytest.raises(trio.ClosedResourceError):
        await channel.send_all([b"x"])
    await left.aclose()


async def test_names():
    """A peer is named by its address, through TLS as well."""
    client, server = await tcp_pair()
    port = client.socket.getsockname()[1]
    assert peer_of(server) == f"127.0.0.1:{port}"
    wrapped = trio.SSLStream(server, tls_contexts()[1], server_side=True)
    assert peer_of(wrapped) == f"127.0.0.1:{port}"
    await client.aclose()
    await server.aclose()
    assert peer_of(server) == "gone"
    left, right = socket_pair()
    async with left, right:
        assert peer_of(left) == "unix"
    assert peer_of(trio.testing.memory_stream_pair()[0]) == "StapledStream"
