"""Attacks with JSON: types as text, nesting, numbers, and sizes."""

from __future__ import annotations

import json

from tests.attacks.attacker import Attacker, attack
from tests.attacks.payloads import numbers_stream, write_message

MB = 1_000_000


def _create_of(attacker: Attacker, bodies: list[bytes]) -> None:
    """Send CreateTable bodies, one after the other, from two connections."""

    def one(number: int) -> None:
        on = attacker.wire()
        for at in attacker.rounds():
            attacker.action(on, "CreateTable", bodies[(at + number) % len(bodies)])
            if on.closed:
                on = attacker.wire()

    attacker.begin()
    attacker.together(2, one)


def _table_of(type_: str) -> bytes:
    # Two columns whose names differ by their case alone: refused once all is read, so that nothing is made.
    fields = [{"name": "a", "type": type_}, {"name": "A", "type": "int8"}]
    return json.dumps({"name": "never", "schema_json": {"fields": fields}}).encode()


@attack("T24", prepares=True)
def type_text(attacker: Attacker) -> None:
    """A type of 60,000 fields as one text: a parser that copies the rest at each field."""
    _create_of(attacker, [_table_of("struct<" + ",".join(f"a{n}:int64" for n in range(60_000)) + ">")])


@attack("T24", prepares=True)
def type_text_odd(attacker: Attacker) -> None:
    """Types of spaces, quotes, backslashes and parentheses."""
    _create_of(
        attacker,
        [
            _table_of("struct<a:" + " " * 900_000 + "int64>"),
            _table_of('struct<"' + "\\" * 300_000),
            _table_of('dictionary<values="' + '"' * 300_000),
            _table_of("decimal" + "(" * 900_000),
            _table_of("list<" * 100_000 + "int8" + ">" * 100_000),
            _table_of("map<" + "utf8," * 100_000),
        ],
    )


@attack("T24", prepares=True)
def many_columns(attacker: Attacker) -> None:
    """CreateTable with 100,000 columns, and with 9,000 of 100 fields each."""
    flat = [{"name": f"c{n}", "type": "int8"} for n in range(100_000)]
    inner = "struct<" + ",".join(f"a{n}:int8" for n in range(100)) + ">"
    nested = [{"name": f"c{n}", "type": inner} for n in range(9_000)]
    bodies = [json.dumps({"name": "never", "schema_json": {"fields": fields}}).encode() for fields in (flat, nested)]
    _create_of(attacker, [body for body in bodies if len(body) < 15 * MB])


@attack("T24", prepares=True)
def deep_json(attacker: Attacker) -> None:
    """Arrays and objects nested 500,000 deep."""
    depth = 200_000
    bodies = [
        b'{"name": ' + b"[" * depth + b"]" * depth + b"}",
        b'{"a":' * depth + b"1" + b"}" * depth,
        b'{"name": "x", "schema_json": ' + json.dumps("[" * depth).encode() + b"}",
    ]
    _create_of(attacker, bodies)


@attack("T24", prepares=True)
def big_numbers(attacker: Attacker) -> None:
    """Integers of 300,000 digits, exponents without end."""
    digits = b"9" * 300_000
    bodies = [
        b'{"name": "x", "ignored": ' + digits + b"}",
        b'{"name": "x", "ignored": 1e' + digits + b"}",
        b'{"name": "x", "ignored": 0.' + digits + b"}",
        b'{"name": "x", "schema_json": {"fields": [{"name": "a", "type": "decimal128(' + digits + b', 2)"}]}}',
    ]
    _create_of(attacker, bodies)


@attack("T24", prepares=True)
def duplicate_keys(attacker: Attacker) -> None:
    """Objects with 100,000 members, of one name and of many."""
    same = b"{" + b",".join(b'"name": "x"' for _ in range(80_000)) + b"}"
    other = json.dumps({f"k{n}": n for n in range(60_000)}).encode()
    properties = json.dumps(
        {
            "name": "never",
            "schema_json": {"fields": [{"name": "a", "type": "int8"}]},
            "properties": {f"user.k{n}": "v" for n in range(30_000)},
        }
    ).encode()
    _create_of(attacker, [same, other, properties])


@attack("T24", prepares=True)
def large_strings(attacker: Attacker) -> None:
    """Strings of 15 MB where a name belongs, plain and escaped: texts of errors, lines of the log."""
    bodies = [
        b'{"name": "' + b"x" * 15 * MB + b'"}',
        b'{"name": "' + b"\\u0001" * (2 * MB) + b'"}',
        b"\xff" * (10 * MB),
    ]
    _create_of(attacker, bodies)


@attack("T24, T22", prepares=True)
def heavy_write_requests(attacker: Attacker) -> None:
    """WriteRequests of 60 KB with each batch of a row: JSON of 1,000 members that are ignored, or nested."""
    on = attacker.wire()
    table = attacker.create(on, [("n", "int64!")])
    schema, batch = numbers_stream(1)
    wide = json.dumps({f"k{n}": n for n in range(4_000)}).encode()
    deep = b'{"x":' + b"[" * 25_000 + b"]" * 25_000 + b"}"
    number = b'{"x":' + b"9" * 50_000 + b"}"
    body = b"".join(write_message(batch, metadata=metadata) for metadata in (wide, deep, number) * 3)
    attacker.begin()
    stream_id = on.open("DoExchange")
    on.put(stream_id, write_message(schema, path=(table,)))
    for _ in attacker.rounds():
        if not on.put(stream_id, body):
            break
    attacker.note(on.outcome(stream_id) if stream_id in on.statuses else (None, "taken"))
