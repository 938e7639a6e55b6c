"""Frame buffers: aligned, never shared by two frames, and reused within a limit."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from arka._core.buffers import FRAME_ALIGNMENT, FrameBuffer, kept, set_kept_bytes

MIB = 1 << 20


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    set_kept_bytes(0)
    set_kept_bytes(8 * MIB)
    yield
    set_kept_bytes(64 * MIB)


@pytest.mark.parametrize("seed", range(4))
def test_frames_are_never_in_each_others_place(seed: int) -> None:
    """Frames of all sizes come and go: each keeps its bytes, and no more is kept than was allowed."""
    pick = random.Random(seed)
    frames: list[tuple[FrameBuffer, bytes, int]] = []
    for number in range(3_000):
        if frames and pick.random() < 0.5:
            buffer, fill, size = frames.pop(pick.randrange(len(frames)))
            body = memoryview(buffer.body)
            assert len(body) == size
            assert bytes(body[:16]) == fill[: min(size, 16)]
            assert bytes(body[-16:]) == fill[: min(size, 16)]
            del buffer, body
        else:
            size = pick.choice(
                [0, 1, 63, 4096, 131_071 - 200, 131_072, pick.randrange(3 * MIB), 1 << pick.randrange(22)]
            )
            fill = bytes([number & 255]) * 16
            buffer = FrameBuffer(b"m" * pick.randrange(300), size)
            buffer.body[:] = fill[:1] * size
            frames.append((buffer, fill, size))
            if len(frames) > 12:
                frames.pop(0)
        assert 0 <= kept() <= 8 * MIB
    frames.clear()
    assert kept() > 0
    set_kept_bytes(0)
    assert kept() == 0


def test_freed_frames_are_reused() -> None:
    """A frame of about the size of a freed one takes its place: no page has to be faulted in."""
    before = FrameBuffer(b"", 320_000)
    del before
    held = kept()
    assert 320_000 <= held <= 320_000 * 9 // 8 + 1024
    again = FrameBuffer(b"", 319_000)
    assert kept() == 0
    other = FrameBuffer(b"", 600_000)
    del again
    assert kept() == held
    del other
    assert kept() > held


def test_the_oldest_go_first() -> None:
    """Where sizes change, frames of the old one make room."""
    frames = [FrameBuffer(b"", MIB - 1024) for _ in range(8)]
    frames.clear()
    assert kept() > 6 * MIB
    for _ in range(8):
        frames = [FrameBuffer(b"", 200_000) for _ in range(40)]
        frames.clear()
    taken = [FrameBuffer(b"", 200_000) for _ in range(30)]
    assert kept() < 3 * MIB
    del taken


def test_large_frames_are_given_back() -> None:
    """A frame larger than all that may be kept is not."""
    buffer = FrameBuffer(b"", 9 * MIB)
    del buffer
    assert kept() == 0


def test_bad_limit() -> None:
    """A limit is a number of bytes."""
    with pytest.raises(ValueError, match="negative"):
        set_kept_bytes(-1)


def test_bodies_are_aligned() -> None:
    """The body begins at a multiple of 64 from the frame's beginning."""
    for size in (0, 5, 200_000):
        for head in (b"", b"x" * 57):
            assert FrameBuffer(head, size).body_offset % FRAME_ALIGNMENT == 0
