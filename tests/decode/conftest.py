"""Streams for decoders: fed message by message, as a transport would."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest

from arka._core import ipc
from arka.flight.decode import BatchDecoder, DecodedBatch
from arka.options import Limits
from arka.testing.ipcstreams import StreamMessage, make_table, write_stream

Feed = Callable[..., DecodedBatch]


def feed(decoder: BatchDecoder, messages: list[StreamMessage]) -> list[DecodedBatch]:
    """Give a decoder a stream; return its batches."""
    decoded = []
    for message in messages:
        kind = ipc.message_type(message.header)
        if kind == ipc.SCHEMA:
            decoder.set_schema(message.header)
        elif kind == ipc.DICTIONARY_BATCH:
            decoder.add_dictionary(message)
        else:
            decoded.append(decoder.decode(message))
    return decoded


@pytest.fixture(name="feed")
def feed_fixture() -> Callable[[BatchDecoder, list[StreamMessage]], list[DecodedBatch]]:
    return feed


@pytest.fixture
def decode() -> Feed:
    """Decode one batch for a table of the given schema."""

    def run(
        schema: pa.Schema,
        batch: pa.RecordBatch,
        *,
        compression: str | None = None,
        limits: Limits | None = None,
        **table: Any,
    ) -> DecodedBatch:
        decoder = BatchDecoder(make_table(schema, **table), limits or Limits())
        return feed(decoder, write_stream(batch.schema, [batch], compression=compression))[-1]

    return run


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """The pure-Python flatbuffer reader."""
    path = Path(__file__).with_name("flatbuffer_oracle.py")
    spec = importlib.util.spec_from_file_location("flatbuffer_oracle", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
