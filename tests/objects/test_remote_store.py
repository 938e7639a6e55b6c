"""What a remote store's failures mean to the tiers."""

import mmap

import obstore
import obstore.exceptions
import pytest
from obstore.store import MemoryStore

from arka.errors import ConfigurationError
from arka.options import ObjectStoreOptions
from arka.storage.objects import FileObjectStore, RemoteObjectStore, open_object_store
from arka.storage.ports import StoreUnavailable


@pytest.fixture
def store():
    return RemoteObjectStore(MemoryStore(), "s3://bucket/prefix", 4)


FAILURES = [
    obstore.exceptions.GenericError("503"),
    obstore.exceptions.PermissionDeniedError("403"),
    obstore.exceptions.UnauthenticatedError("401"),
    ConnectionRefusedError("refused"),
    TimeoutError("slow"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
async def test_failures_may_pass(failure, store, monkeypatch):
    """Whatever the network or the store's own rules refuse may be mended: every operation says StoreUnavailable."""

    def fail(*args, **options):
        raise failure

    for name in ("put", "get", "get_range", "head", "list", "delete"):
        monkeypatch.setattr(obstore, name, fail)
    requests = [
        lambda: store.put_new("n/a", [b"x"]),
        lambda: store.get("n/a"),
        lambda: store.get_range("n/a", 0, 5),
        lambda: store.get_range("n/a", 0, 0),
        lambda: store.list_keys("n/"),
        lambda: store.delete(["n/a"]),
    ]
    for request in requests:
        with pytest.raises(StoreUnavailable, match="s3://bucket/prefix"):
            await request()


@pytest.mark.parametrize("error", [FileNotFoundError, obstore.exceptions.NotFoundError])
async def test_missing_bucket_may_come(error, store, monkeypatch):
    """A put or listing that finds "nothing there" means a missing bucket, no missing object: an outage like others."""

    def fail(*args, **options):
        raise error("NoSuchBucket")

    monkeypatch.setattr(obstore, "put", fail)
    monkeypatch.setattr(obstore, "list", fail)
    with pytest.raises(StoreUnavailable, match="NoSuchBucket"):
        await store.put_new("n/a", [b"x"])
    with pytest.raises(StoreUnavailable, match="NoSuchBucket"):
        await store.list_keys("n/")


async def test_put_is_one_create_only_request(store, monkeypatch):
    """A multipart upload would replace what is there: puts of any size are one conditional request.

    Nothing is copied: the error of a failed attempt keeps alive what the attempt held, through a whole outage.
    """
    calls = []
    real = obstore.put

    def put(store, key, body, **options):
        parts = list(body)
        calls.append((key, parts, options))
        return real(store, key, iter(parts), **options)

    monkeypatch.setattr(obstore, "put", put)
    mapped = memoryview(mmap.mmap(-1, 20 << 20))
    await store.put_new("n/a", [mapped, b"x"])
    ((key, parts, options),) = calls
    assert (key, options) == ("n/a", {"mode": "create", "use_multipart": False})
    assert parts[0] is mapped
    assert await store.get("n/a") == bytes(20 << 20) + b"x"


async def test_urls(tmp_path):
    """``file`` goes to the adapter that fsyncs, escapes undone; others go to obstore; nonsense is refused."""
    local = open_object_store(ObjectStoreOptions(url=f"{tmp_path.as_uri()}/a%20b"))
    assert isinstance(local, FileObjectStore)
    await local.put_new("n/x", [b"x"])
    assert (tmp_path / "a b" / "n" / "x").read_bytes() == b"x"
    remote = open_object_store(ObjectStoreOptions(url="memory:///"))
    assert isinstance(remote, RemoteObjectStore)
    for url in ("nonsense://x", "", "s3://"):
        with pytest.raises(ConfigurationError, match=r"object_store\.url"):
            open_object_store(ObjectStoreOptions(url=url))
    with pytest.raises(ConfigurationError, match=r"object_store\.url"):
        open_object_store(ObjectStoreOptions(url="s3://bucket", config={"no_such_setting": "1"}))
