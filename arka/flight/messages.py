"""The Flight messages that are not on the hot path, built from Arrow's published field numbers.

The descriptors are made at import, so that no generated code and no compiler is needed. FlightData is never
parsed with these (``arka._core.wire`` does that without a copy); only its outgoing form is written here.

Source: Apache Arrow's Flight protocol definition (package ``arrow.flight.protocol``).
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from arka.errors import InvalidRequest, cut

PACKAGE: Final = "arrow.flight.protocol"
SERVICE: Final = f"/{PACKAGE}.FlightService/"

_F = descriptor_pb2.FieldDescriptorProto
_KINDS: Final = {
    "bytes": _F.TYPE_BYTES,
    "string": _F.TYPE_STRING,
    "int64": _F.TYPE_INT64,
    "uint64": _F.TYPE_UINT64,
    "bool": _F.TYPE_BOOL,
    "int32": _F.TYPE_INT32,
}

# message -> (field, number, type, repeated); a type that is not a scalar names another message.
_MESSAGES: Final[dict[str, tuple[tuple[str, int, str, bool], ...]]] = {
    "HandshakeRequest": (("protocol_version", 1, "uint64", False), ("payload", 2, "bytes", False)),
    "HandshakeResponse": (("protocol_version", 1, "uint64", False), ("payload", 2, "bytes", False)),
    "Empty": (),
    "ActionType": (("type", 1, "string", False), ("description", 2, "string", False)),
    "Criteria": (("expression", 1, "bytes", False),),
    "Action": (("type", 1, "string", False), ("body", 2, "bytes", False)),
    "Result": (("body", 1, "bytes", False),),
    "SchemaResult": (("schema", 1, "bytes", False),),
    "FlightDescriptor": (
        ("type", 1, "int32", False),
        ("cmd", 2, "bytes", False),
        ("path", 3, "string", True),
    ),
    "Ticket": (("ticket", 1, "bytes", False),),
    "Location": (("uri", 1, "string", False),),
    "FlightEndpoint": (("ticket", 1, "Ticket", False), ("location", 2, "Location", True)),
    "FlightInfo": (
        ("schema", 1, "bytes", False),
        ("flight_descriptor", 2, "FlightDescriptor", False),
        ("endpoint", 3, "FlightEndpoint", True),
        ("total_records", 4, "int64", False),
        ("total_bytes", 5, "int64", False),
        ("ordered", 6, "bool", False),
        ("app_metadata", 7, "bytes", False),
    ),
}

#: FlightDescriptor.type: the descriptor is a path.
DESCRIPTOR_PATH: Final = 1
#: FlightDescriptor.type: the descriptor is an opaque command.
DESCRIPTOR_CMD: Final = 2


def _build() -> dict[str, type[Message]]:
    # A pool of its own: a program that also loads Arrow's own descriptors must not collide with ours.
    pool = descriptor_pool.DescriptorPool()
    file = descriptor_pb2.FileDescriptorProto(name="arka/flight.proto", package=PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind, repeated in fields:
            label = _F.LABEL_REPEATED if repeated else _F.LABEL_OPTIONAL
            if kind in _KINDS:
                message.field.add(name=field, number=number, type=_KINDS[kind], label=label)
            else:
                message.field.add(
                    name=field,
                    number=number,
                    type=_F.TYPE_MESSAGE,
                    label=label,
                    type_name=f".{PACKAGE}.{kind}",
                )
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in _MESSAGES
    }


_CLASSES: Final = _build()


def build(name: str, **fields: Any) -> bytes:
    """Serialise one message.

    Args:
        name: the message's name without its package.
        fields: its fields; nested messages as those of ``make``.
    """
    return bytes(_CLASSES[name](**fields).SerializeToString())


def make(name: str, **fields: Any) -> Any:
    """Make one message, to be nested in another."""
    return _CLASSES[name](**fields)


def parse(name: str, data: bytes) -> Any:
    """Parse one message.

    Raises:
        InvalidRequest: the bytes are not such a message.
    """
    message = _CLASSES[name]()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise InvalidRequest(f"Malformed {name}: {cut(str(error))}") from error
    return message


def varint(value: int) -> bytes:
    """Encode an unsigned integer as protobuf does."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def flight_data_head(header: bytes, body_bytes: int, app_metadata: bytes = b"") -> bytes:
    """Encode a FlightData up to its body, which the caller sends behind it without a copy.

    Args:
        header: the IPC message's flatbuffer (field 2).
        body_bytes: length of the body (field 1000); no field is written when it is 0.
        app_metadata: field 3; left out when empty.
    """
    out = b"\x12" + varint(len(header)) + header
    if app_metadata:
        out += b"\x1a" + varint(len(app_metadata)) + app_metadata
    if body_bytes:
        out += b"\xc2\x3e" + varint(body_bytes)
    return out


__all__ = [
    "DESCRIPTOR_CMD",
    "DESCRIPTOR_PATH",
    "PACKAGE",
    "SERVICE",
    "build",
    "flight_data_head",
    "make",
    "parse",
    "varint",
]
