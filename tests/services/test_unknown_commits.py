"""A commit whose answer is lost: exactly once, whatever the catalog had done and whatever others did since (R16)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest

from arka.testing.backends import Backend, Components
from arka.testing.proxy import Cut, CuttingProxy, http_answer
from arka.testing.serverprocess import ServerProcess
from tests.process.clients import check_order, connect, create, numbers, write_all
from tests.services import lake
from tests.services.conftest import QUICK

pytestmark = pytest.mark.process

#: How long a worker may wait for a catalog that says nothing; a busy machine needs seconds to start one.
DEADLINE_S = 6
CATALOGS = ("s3-rest", "s3-postgres")
#: What only a commit says to its catalog, in one packet with the rest of that request's head.
COMMIT_REQUEST = {"s3-rest": b"POST /v1/lake/namespaces/%s/tables/%s ", "s3-postgres": b"COMMIT"}
#: What says whether it happened.
LOAD_REQUEST = {"s3-rest": b"GET /v1/lake/namespaces/%s/tables/%s", "s3-postgres": b"SELECT"}
#: What a catalog that is being stopped says: HTTP's 503, and PostgreSQL's "terminating connection" (57P01).
REFUSAL = {
    "s3-rest": http_answer("503 Service Unavailable"),
    "s3-postgres": b"E\x00\x00\x00\x2fSFATAL\x00C57P01\x00Mterminating connection now\x00\x00",
}
FAULTS = {
    "cut-before": (Cut.BEFORE, 1),
    "cut-before-thrice": (Cut.BEFORE, 3),
    "cut-after": (Cut.AFTER, 1),
    "refused-twice": (Cut.ANSWER, 2),
    "silence-after": (Cut.SILENCE, 1),
}


class Site:
    """A server whose catalog is behind a proxy, and the catalog as others reach it."""

    def __init__(self, backend: Backend, proxy: CuttingProxy, server: ServerProcess) -> None:
        self.backend = backend
        self.proxy = proxy
        self.server = server

    def request(self, kinds: Mapping[str, bytes], table: str) -> bytes:
        """What to look for in a request about a table."""
        request = kinds[self.backend.name]
        return request % tuple(part.encode() for part in table.split(".")) if b"%s" in request else request


@pytest.fixture(scope="module", params=CATALOGS)
def site(
    request: pytest.FixtureRequest, components: Components, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    backend = components.backend(request.param)
    rest = backend.name == "s3-rest"
    port = components.seaweedfs.iceberg_port if rest else components.postgresql.port
    with CuttingProxy(port) as proxy:
        settings = {**QUICK, **backend.behind(port, proxy.port).settings, "iceberg.job_deadline_s": DEADLINE_S}
        with ServerProcess(tmp_path_factory.mktemp("unknown") / "data", settings) as server:
            yield Site(backend, proxy, server)
        assert proxy.failures == []


def _write_through(site: Site, table: str, prepare: Callable[[], Any]) -> None:
    """Commit one write, set the fault, and commit another through it."""
    with connect(site.server.location) as client:
        create(client, table)
        write_all(client, table, [numbers([1])])
        rule = prepare()
        check_order(write_all(client, table, [numbers([2])]), "iceberg_committed", 1)
        assert rule.done.is_set(), "the fault never struck"
        check_order(write_all(client, table, [numbers([3])]), "iceberg_committed", 1)


@pytest.mark.parametrize("fault", FAULTS)
def test_lost_answer(site: Site, fault: str) -> None:
    """A commit that was cut, refused or left without an answer is in the table once, and acked (R15, R16)."""
    table = f"{site.backend.namespace}.{fault.replace('-', '_')}"
    cut, times = FAULTS[fault]
    answer = REFUSAL[site.backend.name]
    _write_through(
        site,
        table,
        lambda: site.proxy.break_next(site.request(COMMIT_REQUEST, table), cut, times=times, answer=answer),
    )
    assert lake.numbers_in(site.backend, table) == [1, 2, 3]


def test_answer_lost_and_catalog_away(site: Site) -> None:
    """The answer is lost and the catalog does not say what happened for a while: the same job asks again (R16)."""
    table = f"{site.backend.namespace}.away"

    def go_away() -> None:
        site.proxy.break_next(site.request(LOAD_REQUEST, table), Cut.BEFORE, times=3)

    rule_of = partial(site.proxy.break_next, then=go_away)
    _write_through(site, table, lambda: rule_of(site.request(COMMIT_REQUEST, table), Cut.AFTER))
    assert lake.numbers_in(site.backend, table) == [1, 2, 3]


@pytest.mark.parametrize("cut", [Cut.BEFORE, Cut.AFTER], ids=lambda cut: cut.value)
def test_lost_answer_and_our_snapshot_expired(site: Site, cut: Cut) -> None:
    """Another writer appends and expires every snapshot of ours before we look: still exactly once (R16).

    The mark in the table's properties says what happened; no snapshot of ours is left that could.
    """
    table = f"{site.backend.namespace}.expired_{cut.value}"

    def others() -> None:
        lake.append(site.backend, table, numbers([100]), expire=True)

    _write_through(site, table, lambda: site.proxy.break_next(site.request(COMMIT_REQUEST, table), cut, then=others))
    assert lake.numbers_in(site.backend, table) == [1, 2, 3, 100]
