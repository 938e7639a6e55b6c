"""What Arka relies on inside h2: the outbound windows, which it lowers for its own DATA and raises itself (T5, T6)."""

from __future__ import annotations

import h2.config
import h2.connection
import pytest

from arka._core.wire import Splitter
from arka.flight import frames
from arka.flight.connection import MAX_FRAME_BYTES, _make_h2
from arka.flight.streams import Shared, Streams
from arka.options import MIB, Limits
from arka.tiers.admission import Ledger
from tests.transport.peer import window_update


def connected() -> h2.connection.H2Connection:
    """Our side of a connection on which the client has opened streams 1 and 3."""
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    client.initiate_connection()
    fields = [(":method", "POST"), (":path", "/x"), (":scheme", "http"), (":authority", "a")]
    client.send_headers(1, fields)
    client.send_headers(3, fields)
    server = _make_h2()
    server.receive_data(client.data_to_send())
    return server


def windows(connection: h2.connection.H2Connection) -> list[int]:
    """What may be sent on the connection as a whole and on each stream, as far as h2 says."""
    return [
        connection.outbound_flow_control_window,
        *(connection.streams[i].outbound_flow_control_window for i in (1, 3)),
        *(connection.local_flow_control_window(i) for i in (1, 3)),
    ]


def streams_of(connection: h2.connection.H2Connection) -> Streams:
    limits = Limits()
    made = Streams(
        Shared({}, Ledger(64 * MIB), limits),
        connection,
        Splitter(MAX_FRAME_BYTES),
        "peer",
        count=lambda _: None,
        wake=lambda: None,
        set_busy=lambda _: None,
    )
    made._open = dict.fromkeys((1, 3))  # type: ignore[assignment]
    return made


@pytest.mark.parametrize("stream_id", [0, 1, 3])
@pytest.mark.parametrize("increment", [1, 70_000, frames.MAX_WINDOW - 65_535])
def test_windows_grow_as_h2_lets_them_grow(stream_id: int, increment: int) -> None:
    """An update that we take by ourselves leaves h2 as if it had taken it."""
    ours, theirs = connected(), connected()
    theirs.receive_data(window_update(stream_id, increment))
    assert streams_of(ours).enlarge(stream_id, increment)
    assert windows(ours) == windows(theirs)
    assert ours.data_to_send() == theirs.data_to_send()


@pytest.mark.parametrize(("stream_id", "increment"), [(0, frames.MAX_WINDOW), (1, frames.MAX_WINDOW), (5, 1), (2, 1)])
def test_the_rest_is_left_to_h2(stream_id: int, increment: int) -> None:
    """Windows that would be too large, and streams that are not open, are not touched."""
    connection = connected()
    before = windows(connection)
    assert not streams_of(connection).enlarge(stream_id, increment)
    assert windows(connection) == before
