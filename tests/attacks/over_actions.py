"""Attacks with actions: tables made and dropped, flushes, and long lists."""

from __future__ import annotations

import json

from tests.attacks.attacker import Attacker, action_message, attack
from tests.attacks.payloads import numbers_stream, write_message
from tests.transport.peer import S_INITIAL_WINDOW_SIZE, grpc_message

FIELDS = {"fields": [{"name": "n", "type": "int64"}]}


@attack("T22, T24")
def create_tables(attacker: Attacker) -> None:
    """Tables, as many as 2,000: a catalog row, a folder and memory for each."""

    def one(_: int) -> None:
        on = attacker.wire()
        for _ in attacker.rounds(500):
            attacker.action(on, "CreateTable", {"name": attacker.name(), "schema_json": FIELDS})

    attacker.together(4, one)


@attack("T22")
def create_at_once(attacker: Attacker) -> None:
    """900 CreateTable at once, of the same name and of many."""
    on = attacker.wire()
    for number in attacker.rounds():
        names = ["same_name" if n % 2 else attacker.name() for n in range(900)]
        streams = [
            on.call(
                "DoAction", action_message("CreateTable", json.dumps({"name": name, "schema_json": FIELDS}).encode())
            )
            for name in names
        ]
        for stream_id in streams:
            attacker.note(on.outcome(stream_id))
        attacker.outcomes["rounds"] = number + 1
        if on.closed:
            on = attacker.wire()


@attack("T22, R41")
def drop_storm(attacker: Attacker) -> None:
    """Tables that are made, written to and dropped at once, with purge."""
    schema, batch = numbers_stream(1)

    def one(_: int) -> None:
        on = attacker.wire()
        for _ in attacker.rounds():
            table = attacker.create(on, [("n", "int64!")])
            stream_id = on.open("DoExchange")
            on.put(stream_id, write_message(schema, path=(table,)) + write_message(batch) * 10, end=True)
            attacker.action(on, "DropTable", {"name": table, "purge": True})
            on.outcome(stream_id)

    attacker.together(4, one)


@attack("T22, R41")
def flushes(attacker: Attacker) -> None:
    """1,000 Flush actions at a time, while a table is written to."""
    on = attacker.wire()
    table = attacker.create(on, [("n", "int64!")])
    schema, batch = numbers_stream(1)
    for _ in attacker.rounds():
        stream_id = on.open("DoExchange")
        on.put(stream_id, write_message(schema, path=(table,)) + write_message(batch), end=True)
        body = action_message("Flush", b'{"name": "' + table.encode() + b'"}')
        streams = [on.call("DoAction", body) for _ in range(990)]
        for waiting in streams:
            attacker.note(on.outcome(waiting))
        on.outcome(stream_id)
        if on.closed:
            on = attacker.wire()


@attack("T24")
def long_names(attacker: Attacker) -> None:
    """DescribeTable, DropTable and Flush of names of 100 KB, and actions of such types."""
    on = attacker.wire()
    name = "n" * 100_000
    for number in attacker.rounds():
        kind = ("DescribeTable", "DropTable", "Flush", "k" * 100_000)[number % 4]
        attacker.action(on, kind, {"name": name})
        if on.closed:
            on = attacker.wire()


@attack("T22", prepares=True)
def list_many_tables(attacker: Attacker) -> None:
    """ListTables and ListFlights while there are many tables, 20 at a time."""
    on = attacker.wire()
    for _ in attacker.rounds(100):
        attacker.create(on, [("n", "int64"), *((f"column_{n}", "utf8") for n in range(50))])
    attacker.begin()
    for number in attacker.rounds():
        streams = [
            on.call("ListFlights", grpc_message(b""))
            if n % 2
            else on.call("DoAction", action_message("ListTables", b""))
            for n in range(20)
        ]
        for stream_id in streams:
            attacker.note(on.outcome(stream_id))
        attacker.outcomes["rounds"] = number + 1
        if on.closed:
            on = attacker.wire()


@attack("T26", prepares=True)
def unread_lists(attacker: Attacker) -> None:
    """900 ListFlights whose answers nobody reads: a copy of all schemas for each."""
    on = attacker.wire()
    for _ in attacker.rounds(40):
        attacker.create(on, [("n", "int64"), *((f"column_{n}", "utf8") for n in range(100))])
    attacker.begin()
    silent = attacker.wire(values={S_INITIAL_WINDOW_SIZE: 0}, widen=False)
    for _ in attacker.rounds(900):
        silent.call("ListFlights", grpc_message(b""))
    attacker.hold()
    for ended in list(silent.statuses.values()):
        attacker.note(ended)


@attack("T22, R41")
def abandoned_actions(attacker: Attacker) -> None:
    """CreateTable whose client leaves at once: the action runs on, as R41 says, as many as are sent."""
    for _ in attacker.rounds():
        on = attacker.wire()
        for _ in range(100):
            body = json.dumps({"name": attacker.name(), "schema_json": FIELDS}).encode()
            on.call("DoAction", action_message("CreateTable", body))
        attacker.pause(0.05)
        on.close()
        attacker.outcomes["abandoned"] += 100


@attack("T22")
def describe_storm(attacker: Attacker) -> None:
    """DescribeTable of one table, 500 at a time."""
    on = attacker.wire()
    table = attacker.create(on, [("n", "int64!")])
    body = action_message("DescribeTable", b'{"name": "' + table.encode() + b'"}')
    for _ in attacker.rounds():
        streams = [on.call("DoAction", body) for _ in range(500)]
        for stream_id in streams:
            attacker.note(on.outcome(stream_id))
        if on.closed:
            on = attacker.wire()
