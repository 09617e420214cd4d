"""Reads chosen frames of a video file, upright."""

import math
import struct
from bisect import bisect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from ..checks import require

THREADS = 1
"""Threads of a decoder and of a frame's conversion. FFmpeg keeps further ones for the next frame, which a forked data
worker would wait for in vain."""

LASTING = ("palette", "new_extradata", "param_change")
"""Side data of a packet with which later ones are decoded, too."""


def read_frames(path: Path, choose: Callable[[int], Sequence[int]], size: int | None = None) -> list[Tensor]:
    """Frames of the file's first video stream, uint8 (3, height, width), turned and mirrored as a player shows them.

    Only what they need is decoded, and no other frame is kept. If frames differ in size, they are scaled to that of the
    earliest one.

    Args:
        choose: the numbers of the frames, in any order, given how many there are.
        size: what the shorter side is scaled to. Without it the frames are as large as they are stored.

    Raises:
        ValueError: the file is missing, damaged, or has no video stream or no frame.
    """
    numbers, keys = _packets(path)
    chosen = choose(len(numbers))
    wanted = sorted(set(chosen))
    pictures: list[Tensor] = []
    if keys:
        with suppress(ValueError), _opened(path) as video:
            pictures = _pictures(_from_keyframes(*video, numbers, keys, wanted), size)
    if not pictures:  # if that fails as well, its error tells why
        with _opened(path) as video:
            pictures = _pictures(_from_start(*video, wanted), size)
    return [pictures[wanted.index(number)] for number in chosen]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream, apart from cover pictures. PyAV's errors for damaged files, including
    IndexError, become ValueErrors."""
    av = require("av", "video")
    try:
        with av.open(str(path)) as container:
            cover = av.stream.Disposition.attached_pic
            streams = [stream for stream in container.streams.video if not stream.disposition & cover]
            if not streams:
                raise ValueError(f"{path}: has no video stream")
            if streams[0].codec_context is None:
                raise ValueError(f"{path}: cannot be read as video: FFmpeg has no decoder for it")
            streams[0].codec_context.thread_count = THREADS
            yield container, streams[0]
    except (av.FFmpegError, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as video: {error}") from error


def _packets(path: Path) -> tuple[dict[int, int], list[tuple[int, int]]]:
    """The numbers of the frames by time; and, for every frame that can be decoded without those before it, its number
    and the place of its packet in the stream, ascending.

    Only the first frame is decoded: none is shown before it, whatever the packets say. If packets do not tell frames
    apart, all frames are decoded and counted, and the second list is empty.
    """
    first, lasting = None, False
    times, decoding_times, keys = [], [], []
    with _opened(path) as (container, stream):
        for place, packet in enumerate(container.demux(stream)):
            first = first or next(iter(packet.decode()), None)
            lasting = lasting or any(map(packet.has_sidedata, LASTING))
            if packet.dts is not None:
                decoding_times.append(packet.dts)
            if packet.size and not packet.is_discard:
                times.append(packet.pts)
                if packet.is_keyframe:
                    keys.append((packet.pts, place))
    if first is None:
        raise ValueError(f"{path}: has no video frame")
    ordered = decoding_times == sorted(decoding_times) and len(set(times)) == len(times)
    if lasting or not ordered or None in times or first.pts not in times:
        with _opened(path) as (container, stream):
            return {number: number for number, _ in enumerate(container.decode(stream))}, []
    numbers = {time: number for number, time in enumerate(sorted(time for time in times if time >= first.pts))}
    return numbers, [(0, 0), *sorted((numbers[time], place) for time, place in keys if time in numbers)]


def _from_keyframes(
    container: Any, stream: Any, numbers: dict[int, int], keys: list[tuple[int, int]], wanted: list[int]
) -> Iterator[Any]:
    """The wanted frames, each decoded from the last keyframe before it. There is no seeking, which some containers do
    badly: packets on the way are read, at little cost, but not decoded.

    Raises:
        ValueError: the frames are not those that the packets announce.
    """
    ahead, expected = deque(wanted), 0
    for place, packet in enumerate(container.demux(stream)):
        key, start = keys[bisect(keys, (ahead[0] + 1,)) - 1]
        if place < start:
            continue
        if place == start:
            stream.codec_context.flush_buffers()
            expected = key
        for frame in packet.decode():
            number = numbers.get(frame.pts, -1)
            if number > expected or (number == key and not frame.key_frame):
                raise ValueError(f"frame {number} came where {expected} should")
            if number == expected:
                expected += 1
                if number == ahead[0]:
                    yield frame
                    ahead.popleft()
                    if not ahead:
                        return
    raise ValueError(f"frame {expected} did not come")


def _from_start(container: Any, stream: Any, wanted: list[int]) -> Iterator[Any]:
    """The wanted frames, with all before them decoded. If there are fewer, the last one is repeated."""
    number, frame = -1, None
    for number, frame in enumerate(container.decode(stream)):
        if number in wanted:
            yield frame
        if number == wanted[-1]:
            return
    if frame is None:
        raise ValueError("none of its frames can be decoded")
    yield from [frame] * sum(later > number for later in wanted)


def _pictures(frames: Iterator[Any], size: int | None) -> list[Tensor]:
    """The frames converted one by one, and scaled as `read_frames` says."""
    pictures: list[Tensor] = []
    scale = None if size is None else [size]
    for frame in frames:
        picture = torch.from_numpy(_upright(frame)).movedim(2, 0)
        pictures.append(functional.resize(picture, scale or list(picture.shape[1:]), antialias=True))
        scale = list(pictures[0].shape[1:])
    return pictures


def _upright(frame: Any) -> np.ndarray:
    """The frame's colours (height, width, 3), mirrored as its display matrix says, and turned by the nearest multiple
    of 90 degrees."""
    pixels = frame.to_ndarray(format="rgb24", threads=THREADS)
    a, b, c, d = _display_matrix(frame)
    across, down = a, d
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels = pixels.swapaxes(0, 1)
        across, down = c, b
    return np.ascontiguousarray(pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])


def _display_matrix(frame: Any) -> tuple[float, float, float, float]:
    """a, b, c and d: what is stored at x to the right and y down is shown, up to a shift, at a x + c y, b x + d y."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV 18 does not know all kinds of side data, such as a JPEG's Exif. Then the angle is left.
        angle = math.radians(frame.rotation)
        return math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d = struct.unpack_from("5i", matrix)
    return a, b, c, d
