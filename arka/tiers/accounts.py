"""Who waits for the ledger, and whose turn is next (T25).

Owns: the tree of accounts (ledger, peer, connection, stream), what each account holds, and a fair order of those that
wait. Does not own how many bytes there are nor when one may go (``arka.tiers.admission``).

At each level the accounts take turns by bytes: the next is the one whose start tag is least, and each grant moves its
tag on by the bytes granted (start-time fair queueing). An account that comes back starts at the current virtual time,
so time spent idle earns nothing. No tag can be overtaken without end, so nobody starves.

An account that would hold more than its share is put beyond the others: it is served only when no account within its
share waits. That check is made when its turn comes, and again when it has given something back. Each step costs
O(log n) in the number of waiting accounts, also a request that is withdrawn.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import Final, Protocol

#: A share that nobody exceeds, in bytes.
NO_SHARE: Final = 2**62
#: Stale heap entries that are left before a heap is cleaned, beside as many as there are live ones.
_STALE_ENTRIES: Final = 32
#: Says that an account is beyond its share because all that wait below it are.
_BELOW: Final = -1


class Waiting(Protocol):
    """A request in a stream's queue."""

    amount: int

    @property
    def withdrawn(self) -> bool:
        """Whether it no longer waits; its queue may still have it."""
        ...


class Account:
    """One payer: a stream, a connection, a peer, or the ledger itself. Used from trio's thread only.

    Attributes:
        leaf: whether it is a stream's, which has a queue of its own.
        charged: bytes of granted messages below it; windows and what is kept do not count against shares.
        share_bytes: most that it may hold while others wait.
        waiting: live requests below it.
        parent: the account above; None for the ledger's.
        windows: of a peer: bytes of initial windows.
        kept: of a peer: bytes that are kept for as long as its streams last.
        ahead: of a peer: bytes of window that were granted before a message asked for them.
        unread: of a peer: bytes of answers that it has not read.
        members: of a peer: its open connections.
        small: of a stream: whether it holds bytes of the part for small messages.
        offered: of a stream: whether it stands in the queue for that part.
    """

    __slots__ = (
        "ahead",
        "beyond",
        "blocked",
        "charged",
        "finish",
        "kept",
        "leaf",
        "live",
        "members",
        "name",
        "offered",
        "over",
        "parent",
        "queue",
        "share_bytes",
        "small",
        "start",
        "ticket",
        "unread",
        "virtual",
        "waiting",
        "windows",
        "within",
    )

    def __init__(
        self, parent: Account | None, share_bytes: float = NO_SHARE, *, name: str = "", leaf: bool = False
    ) -> None:
        self.parent = parent
        self.leaf = leaf
        self.share_bytes = share_bytes
        self.name = name
        self.charged = self.waiting = 0
        self.windows = self.kept = self.ahead = self.unread = self.members = 0
        self.small = self.offered = False
        self.queue: deque[Waiting] = deque()
        # Tags of fair queueing: its own among its siblings, and the virtual time of those below it.
        self.start = self.finish = self.virtual = 0
        # Invariant: the entry with this number is its only live one in its parent's heaps; 0: none is.
        self.ticket = 0
        # Whether that entry is in the heap of those beyond their share, and the bytes for which it was put there.
        self.over = False
        self.blocked = 0
        # Invariant: below it, `live` accounts have a ticket.
        self.live = 0
        self.within: list[tuple[int, int, Account]] = []
        self.beyond: list[tuple[int, int, Account]] = []

    @property
    def peer(self) -> Account:
        """The peer's account, of any account below the ledger's."""
        node = self
        while (above := node.parent) is not None and above.parent is not None:
            node = above
        return node

    def exceeds(self, amount: int) -> bool:
        """Whether ``amount`` bytes more are over its share; one message alone never is."""
        return self.charged > 0 and self.charged + amount > self.share_bytes


class Turns:
    """The waiting requests of all streams, in the order in which they are served."""

    def __init__(self, root: Account) -> None:
        self._root = root
        self._tickets = 0

    def push(self, stream: Account, request: Waiting) -> None:
        """Let a request wait behind those of its stream."""
        stream.queue.append(request)
        node: Account | None = stream
        while node is not None:
            node.waiting += 1
            node = node.parent
        self._activate(stream)

    def head(self, stream: Account) -> Waiting | None:
        """The first request of a stream that still waits."""
        queue = stream.queue
        while queue and queue[0].withdrawn:
            queue.popleft()
        return queue[0] if queue else None

    def next(self) -> Account | None:
        """The stream whose first request is to be served next; None if none waits.

        First those within their shares; only when there are none, those beyond.
        """
        root = self._root
        while True:
            node = root
            while not node.leaf:
                child = _first(node.within)
                if child is None:
                    break
                node = child
            else:
                if (full := self._full(node)) is None:
                    return node
                self._block(*full)
                continue
            if node is root:
                return self._next_beyond()
            self._block(node, _BELOW)

    def take(self, stream: Account, *, served: bool) -> Waiting:
        """Remove the first request of a stream from its queue.

        Args:
            stream: has one that waits.
            served: whether its bytes count as the stream's turn: charged, and its tags moved on.
        """
        request = self.head(stream)
        assert request is not None, "the stream does not wait"
        stream.queue.popleft()
        self._leave(stream, request.amount if served else 0, served=served)
        return request

    def withdraw(self, stream: Account) -> None:
        """Count a request that waited as withdrawn, wherever it stands."""
        self._leave(stream, 0, served=False)

    def charge(self, stream: Account, amount: int) -> None:
        """Count bytes that a stream was granted."""
        node = stream
        while (parent := node.parent) is not None:
            node.charged += amount
            node = parent

    def discharge(self, stream: Account, amount: int) -> None:
        """Count bytes that a stream has given back."""
        node = stream
        while (parent := node.parent) is not None:
            node.charged -= amount
            if node.over and node.blocked != _BELOW and not node.exceeds(node.blocked):
                self._unblock(node)
            node = parent

    # -- the heaps --------------------------------------------------------------------------------

    def _activate(self, node: Account) -> None:
        """See to it that an account with something to serve has its place, and those above it."""
        while (parent := node.parent) is not None and not node.ticket:
            node.start = max(parent.virtual, node.finish)
            parent.live += 1
            self._place(node, over=False)
            if parent.over and parent.blocked == _BELOW:
                self._unblock(parent)
                return
            node = parent

    def _place(self, node: Account, *, over: bool) -> None:
        """Give an account a new entry among its siblings; an older one is stale from now on."""
        parent = node.parent
        assert parent is not None
        self._tickets += 1
        node.ticket, node.over = self._tickets, over
        heap = parent.beyond if over else parent.within
        heapq.heappush(heap, (node.start, node.ticket, node))
        if len(heap) > 2 * parent.live + _STALE_ENTRIES:
            heap[:] = [entry for entry in heap if entry[2].ticket == entry[1]]
            heapq.heapify(heap)

    def _block(self, node: Account, amount: int) -> None:
        node.blocked = amount
        self._place(node, over=True)

    def _unblock(self, node: Account) -> None:
        """Look again at an account that was beyond its share, and at those above that were so for its sake."""
        self._place(node, over=False)
        parent = node.parent
        while parent is not None and parent.over and parent.blocked == _BELOW:
            self._place(parent, over=False)
            parent = parent.parent

    def _full(self, stream: Account) -> tuple[Account, int] | None:
        """Which account on the way up cannot take a stream's first request within its share, and its bytes."""
        request = self.head(stream)
        assert request is not None, "a stream with a place waits"
        node = stream
        while (parent := node.parent) is not None:
            if node.exceeds(request.amount):
                return node, request.amount
            node = parent
        return None

    def _next_beyond(self) -> Account | None:
        node = self._root
        while True:
            if node.leaf:
                return node
            child = _first(node.within) or _first(node.beyond)
            if child is None:
                return None
            node = child

    def _leave(self, stream: Account, amount: int, *, served: bool) -> None:
        """Count one request less below each account on the way up, and find those their places."""
        node: Account | None = stream
        while node is not None:
            node.waiting -= 1
            parent = node.parent
            if parent is not None:
                if served:
                    node.charged += amount
                    parent.virtual = max(parent.virtual, node.start)
                    # Empty messages take turns as well.
                    node.finish = node.start + max(amount, 1)
                    node.start = node.finish
                if not node.waiting:
                    node.ticket, node.over = 0, False
                    parent.live -= 1
                elif served or node.over:
                    # Its first request is another one: what was said of the last does not hold for it.
                    self._place(node, over=False)
            node = parent


def _first(heap: list[tuple[int, int, Account]]) -> Account | None:
    """The live account at the front of a heap."""
    while heap:
        _, ticket, node = heap[0]
        if node.ticket == ticket:
            return node
        heapq.heappop(heap)
    return None


__all__ = ["NO_SHARE", "Account", "Turns", "Waiting"]
