"""R31: however a server ends, in a process that goes on, its listening sockets are closed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio

from arka import server
from arka.errors import ConfigurationError
from arka.server import Address, serve
from arka.settings import load_settings
from arka.testing.serverprocess import variable_of

pytestmark = pytest.mark.process


def settings_in(folder, **more: str):
    wished = {
        "server.data_dir": str(folder / "data"),
        "server.host": "localhost",
        "server.port": "0",
        "server.http_port": "0",
        "server.drain_s": "2",
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    return load_settings(environment={variable_of(key): value for key, value in wished.items()}).settings


@pytest.fixture
def opened(monkeypatch) -> Iterator[list[trio.SocketListener]]:
    """All listeners that servers open."""
    found: list[trio.SocketListener] = []
    before = server.open_listeners

    async def remember(*args, **options) -> list[trio.SocketListener]:
        made = await before(*args, **options)
        # Also on a machine whose name has one address: a server may have several listeners.
        made += await trio.open_tcp_listeners(0, host="127.0.0.1")
        found.extend(made)
        return made

    monkeypatch.setattr(server, "open_listeners", remember)
    yield found
    for listener in found:
        listener.socket.close()


@pytest.mark.parametrize("way", ["stopped", "cancelled", "failed"])
async def test_listeners_are_closed(way: str, tmp_path, opened, monkeypatch) -> None:
    """A stop, a cancellation and a start that fails behind the listeners all close each of them."""
    stop = trio.Event()
    if way == "failed":

        def refuse(*_: object, **__: object) -> None:
            raise ConfigurationError("no store here")

        monkeypatch.setattr(server, "local_tiers", refuse)
        with pytest.raises(ConfigurationError):
            await serve(settings_in(tmp_path), stop=stop)
    else:
        async with trio.open_nursery() as nursery:

            async def run(*, task_status: trio.TaskStatus[Address]) -> None:
                await serve(settings_in(tmp_path), stop=stop, task_status=task_status)

            await nursery.start(run)
            if way == "stopped":
                stop.set()
            else:
                nursery.cancel_scope.cancel()
    assert len(opened) >= 2
    assert [listener.socket.fileno() for listener in opened] == [-1] * len(opened)
