"""What every ``ObjectStore`` must do: checks that the local, the remote and the simulated one all pass.

Owns: the checks. Each takes an empty store and raises AssertionError. What only a failing file system or network can
show is checked with each adapter alone (tests/objects).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from arka.storage.ports import ObjectExists, ObjectMeta, ObjectStore

Check = Callable[[ObjectStore], Awaitable[None]]


async def _expect(error: type[BaseException], call: Callable[[], Awaitable[object]]) -> None:
    try:
        await call()
    except error:
        return
    raise AssertionError(f"expected {error.__name__}")


async def _keys(store: ObjectStore, prefix: str, start_after: str | None = None) -> list[str]:
    return [meta.key for meta in await store.list_keys(prefix, start_after=start_after)]


async def check_put_get(store: ObjectStore) -> None:
    """What was put is read back, whatever the parts were; it is listed at once, with its size."""
    await store.put_new("n/parts", [b"ab", memoryview(b"cd"), b"", bytearray(b"ef")])
    assert await store.get("n/parts") == b"abcdef"
    await store.put_new("n/one", [b"\x00" * 100_000])
    assert await store.get("n/one") == bytes(100_000)
    for parts in ([], [b""]):
        await store.put_new(f"n/empty{len(parts)}", parts)
        assert await store.get(f"n/empty{len(parts)}") == b""
    assert await store.list_keys("n/") == [
        ObjectMeta("n/empty0", 0),
        ObjectMeta("n/empty1", 0),
        ObjectMeta("n/one", 100_000),
        ObjectMeta("n/parts", 6),
    ]
    assert store.url


async def check_create_only(store: ObjectStore) -> None:
    """A key that is taken stays as it is."""
    await store.put_new("n/epoch/1", [b"first"])
    await _expect(ObjectExists, lambda: store.put_new("n/epoch/1", [b"second, longer"]))
    await _expect(ObjectExists, lambda: store.put_new("n/epoch/1", [b"first"]))
    assert await store.get("n/epoch/1") == b"first"
    assert await store.list_keys("") == [ObjectMeta("n/epoch/1", 5)]


async def check_missing(store: ObjectStore) -> None:
    """Reading what is not there is a KeyError, in an empty store, beside another object and below one."""
    for _ in range(2):
        for key in ("n/absent", "absent", "n/a/b/c", "n"):
            await _expect(KeyError, lambda key=key: store.get(key))  # type: ignore[misc]
            await _expect(KeyError, lambda key=key: store.get_range(key, 0, 4))  # type: ignore[misc]
            await _expect(KeyError, lambda key=key: store.get_range(key, 0, 0))  # type: ignore[misc]
        if not await store.list_keys(""):
            await store.put_new("n/a", [b"x"])


async def check_get_range(store: ObjectStore) -> None:
    """A range is cut at the object's end, also where it begins there or beyond."""
    data = b"0123456789"
    await store.put_new("n/a", [data])
    await store.put_new("n/empty", [])
    for start in (0, 1, 9, 10, 11, 1000):
        for length in (0, 1, 9, 10, 11, 1000):
            found = await store.get_range("n/a", start, length)
            assert found == data[start : start + length], (start, length, found)
    assert await store.get_range("n/empty", 0, 192) == b""


async def check_list_order(store: ObjectStore) -> None:
    """Listings are in the keys' byte order, across folders, whatever the order of creation."""
    keys = ["n/wal/1/9", "n/wal/0/8", "n/wal/1/10", "n/wal-a", "n/wal0", "n/epoch/2", "m/wal/1/9", "n/Wal/x"]
    for key in keys:
        await store.put_new(key, [key.encode()])
    assert await store.list_keys("") == [ObjectMeta(key, len(key)) for key in sorted(keys)]
    assert await _keys(store, "n/wal/") == ["n/wal/0/8", "n/wal/1/10", "n/wal/1/9"]


async def check_list_prefix(store: ObjectStore) -> None:
    """A prefix is a prefix of the text: it may end within a name; what does not begin with it is not listed."""
    keys = ["n/wal/01/5", "n/wal/02/6", "n/wal/02/7", "n/walnut", "nn/wal/01/5"]
    for key in keys:
        await store.put_new(key, [b"x"])
    for prefix in (
        "",
        "n",
        "n/",
        "nn/",
        "n/w",
        "n/wal",
        "n/wal/",
        "n/wal/0",
        "n/wal/02/",
        "n/wal/02/6",
        "x",
        "x/y/",
        "m/",
    ):
        assert await _keys(store, prefix) == [key for key in keys if key.startswith(prefix)], prefix


async def check_list_start_after(store: ObjectStore) -> None:
    """``start_after`` leaves out itself and all before it, whether there is such a key or not."""
    keys = [f"n/epoch/{number:010d}" for number in (1, 2, 3, 5, 10)]
    for key in [*keys, "n/other/1"]:
        await store.put_new(key, [b"x"])
    for after in [*keys, "n/epoch/0000000000", "n/epoch/0000000004", "n/epoch/9", "a", "z", "n/epoch/", "n/epoch"]:
        assert await _keys(store, "n/epoch/", after) == [key for key in keys if key > after], after


async def check_delete(store: ObjectStore) -> None:
    """Deleting removes what is there, and only that; what is not there is no error; the key is free again."""
    await store.delete([])
    await store.delete(["n/absent", "absent", "no/such/folder/x"])
    for key in ("n/a", "n/b", "n/c/d"):
        await store.put_new(key, [b"old"])
    await store.delete(["n/a", "n/absent", "n/c/d"])
    assert await _keys(store, "") == ["n/b"]
    await _expect(KeyError, lambda: store.get("n/a"))
    await store.delete(["n/a"])
    await store.put_new("n/a", [b"new"])
    await store.put_new("n/c/d", [b"new"])
    assert await store.get("n/a") == b"new"
    assert await _keys(store, "") == ["n/a", "n/b", "n/c/d"]


async def check_deep_keys(store: ObjectStore) -> None:
    """A key may have many parts; siblings at every depth live beside it."""
    folders = [f"level-{depth}" for depth in range(20)]
    keys = ["/".join([*folders[: depth + 1], "file"]) for depth in range(20)]
    for key in reversed(keys):
        await store.put_new(key, [key.encode()])
    assert await _keys(store, "") == sorted(keys)
    assert await store.get(keys[-1]) == keys[-1].encode()
    assert await _keys(store, "/".join(folders) + "/") == [keys[-1]]


async def check_race(store: ObjectStore) -> None:
    """Of those who create one key at the same time exactly one wins, and its bytes are the object (R10)."""
    for number in range(8):
        key = f"n/epoch/{number}"
        won: list[int] = []
        lost: list[int] = []

        async def race(racer: int, key: str = key, won: list[int] = won, lost: list[int] = lost) -> None:
            try:
                await store.put_new(key, [b"%d" % racer] * 1000)
            except ObjectExists:
                # A loser reads the winner's whole object at once.
                assert len(await store.get(key)) == 1000
                lost.append(racer)
            else:
                won.append(racer)

        async with trio.open_nursery() as nursery:
            for racer in range(6):
                nursery.start_soon(race, racer)
        assert len(won) == 1
        assert len(lost) == 5
        assert await store.get(key) == b"%d" % won[0] * 1000


async def check_cancelled_put(store: ObjectStore) -> None:
    """A cancelled put leaves the whole object or nothing, and the key can be put again or is found taken."""
    with trio.CancelScope() as scope:
        scope.cancel()
        await store.put_new("n/a", [b"x" * 5000])
    found = await _keys(store, "n/")
    assert found in ([], ["n/a"])
    if not found:
        await store.put_new("n/a", [b"x" * 5000])
    assert await store.get("n/a") == b"x" * 5000


#: All checks, by name.
CHECKS: dict[str, Check] = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_put_get,
        check_create_only,
        check_missing,
        check_get_range,
        check_list_order,
        check_list_prefix,
        check_list_start_after,
        check_delete,
        check_deep_keys,
        check_race,
        check_cancelled_put,
    )
}

__all__ = ["CHECKS", "Check"]
