"""TFRecord files and the tf.train.Example messages in them, as byte positions.

TFDS can deserialize an episode with NumPy, but only as a whole: a random frame would cost reading 5 MB (an episode of
LIBERO) and 0.6 ms of parsing, against two reads of 20 kB at known places, 0.005 ms. It does not tell where a JPEG lies
in its file. So TFDS reads the schema and the shard list, and this module finds the bytes; a test compares the two on
every value.

Layout of a record: length (u64), masked CRC-32C of those 8 bytes (u32), payload, masked CRC-32C of the payload (u32).
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np

from prismatic.util.errors import UsageError, one_line

_HEADER, _FOOTER = 12, 4


class Record(NamedTuple):
    """One payload and where it starts in its file."""

    offset: int
    payload: bytes


class Span(NamedTuple):
    """Part of a buffer: the bytes [start, end)."""

    start: int
    end: int


class MalformedExample(ValueError):
    """The payload is no tf.train.Example; the message says where the parse stopped."""


def masked_crc(data: bytes) -> int:
    """The CRC-32C of `data` as TFRecord files store it."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def read_records(path: Path) -> Iterator[Record]:
    """All records of a TFRecord file in order, one in memory at a time.

    Raises UsageError: a truncated record or a checksum that does not match; names the file and the record.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        number, position = 0, 0
        while position < size:
            header = file.read(_HEADER)
            if len(header) < _HEADER:
                raise UsageError(f"{path}: record {number}: the file ends inside the record's header (truncated file?)")
            (length,), (header_crc,) = struct.unpack("<Q", header[:8]), struct.unpack("<I", header[8:])
            if masked_crc(header[:8]) != header_crc:
                raise UsageError(
                    f"{path}: record {number}: wrong checksum of the length at byte {position} (corrupted)"
                )
            if position + _HEADER + length + _FOOTER > size:
                raise UsageError(
                    f"{path}: record {number}: needs {length + _FOOTER} bytes, "
                    f"the file has {size - position - _HEADER} more (truncated file?)"
                )
            payload = file.read(length)
            (payload_crc,) = struct.unpack("<I", file.read(_FOOTER))
            if masked_crc(payload) != payload_crc:
                raise UsageError(f"{path}: record {number}: wrong checksum of its {length} bytes (corrupted)")
            yield Record(position + _HEADER, payload)
            position += _HEADER + length + _FOOTER
            number += 1


def read_array_records(path: Path) -> Iterator[bytes]:
    """All payloads of an ArrayRecord file in order.

    Raises UsageError: the file is damaged, or its reader is not installed.
    """
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError as error:
        raise UsageError(f"{path}: array_record files need: pip install array_record ({error})") from error
    try:
        reader = ArrayRecordReader(str(path))
        for number in range(reader.num_records()):
            yield reader.read([number])[0]
    except (RuntimeError, ValueError, IndexError) as error:
        raise UsageError(f"{path}: no readable array_record file ({one_line(error, 160)})") from error


def _varint(buffer: bytes, at: int) -> tuple[int, int]:
    """(value, next position) of the varint at `at`."""
    value = shift = 0
    while True:
        if at >= len(buffer) or shift > 63:
            raise MalformedExample(f"bad varint at byte {at}")
        byte = buffer[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(buffer: bytes, span: Span) -> Iterator[tuple[int, int, Span]]:
    """(field number, wire type, content) of every field of the message in `span`."""
    at = span.start
    while at < span.end:
        key, at = _varint(buffer, at)
        wire = key & 7
        start = at
        if wire == 2:
            length, start = _varint(buffer, at)
            at = start + length
        elif wire == 0:
            _, at = _varint(buffer, at)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise MalformedExample(f"unknown wire type {wire} at byte {start}")
        if at > span.end:
            raise MalformedExample(f"a field at byte {start} reaches past its message")
        yield key >> 3, wire, Span(start, at)


class Example:
    """A parsed tf.train.Example: feature names, and their values or the places of their byte strings."""

    def __init__(self, payload: bytes) -> None:
        """Raises MalformedExample when `payload` is none."""
        self.payload = payload
        self._features: dict[str, Span] = {}
        for number, wire, features in _fields(payload, Span(0, len(payload))):
            if number != 1 or wire != 2:
                continue
            for _, _, entry in _fields(payload, features):
                parts = {field: content for field, _, content in _fields(payload, entry)}
                if 1 in parts and 2 in parts:
                    name = payload[parts[1].start : parts[1].end].decode("utf-8", errors="replace")
                    self._features[name] = parts[2]

    def __contains__(self, name: str) -> bool:
        return name in self._features

    def names(self) -> list[str]:
        """All feature names, sorted."""
        return sorted(self._features)

    def _list(self, name: str, kind: int) -> Span | None:
        """Content of the feature's list of that kind (1 bytes, 2 float, 3 int64); None for an empty feature."""
        for number, _, content in _fields(self.payload, self._features[name]):
            if number != kind:
                raise MalformedExample(
                    f"feature {name} holds list kind {number} (1 bytes, 2 float, 3 int64), not {kind}"
                )
            return content
        return None

    def byte_spans(self, name: str) -> list[Span]:
        """Find the feature's byte strings in the payload."""
        content = self._list(name, 1)
        return [] if content is None else [span for _, _, span in _fields(self.payload, content)]

    def byte_strings(self, name: str) -> list[bytes]:
        """The feature's byte strings."""
        return [self.payload[span.start : span.end] for span in self.byte_spans(name)]

    def integer_spans(self, name: str, steps: int) -> list[Span]:
        """Find the integers of each of `steps` equal parts of the feature's packed list in the payload."""
        content = self._list(name, 3)
        parts = [] if content is None else list(_fields(self.payload, content))
        if len(parts) != 1 or parts[0][1] != 2:
            raise MalformedExample(f"feature {name} is no packed list of integers")
        start, end = parts[0][2]
        ends = np.flatnonzero(np.frombuffer(self.payload, np.uint8, end - start, start) < 0x80) + start + 1
        if not steps or len(ends) % steps or not len(ends):
            raise MalformedExample(f"{name} holds {len(ends)} values for {steps} steps")
        bounds = [start, *ends[len(ends) // steps - 1 :: len(ends) // steps].tolist()]
        return [Span(first, last) for first, last in itertools.pairwise(bounds)]

    def floats(self, name: str) -> np.ndarray:
        """The feature's float values, flat float32 (packed or not)."""
        content = self._list(name, 2)
        if content is None:
            return np.zeros(0, np.float32)
        parts = []
        for _, wire, span in _fields(self.payload, content):
            if (span.end - span.start) % 4 or wire not in (2, 5):
                raise MalformedExample(f"feature {name} is no list of floats")
            parts.append(np.frombuffer(self.payload, "<f4", count=(span.end - span.start) // 4, offset=span.start))
        return np.concatenate(parts).astype(np.float32) if parts else np.zeros(0, np.float32)

    def integers(self, name: str) -> np.ndarray:
        """The feature's integer (or boolean) values, flat int64 (packed or not)."""
        content = self._list(name, 3)
        parts = []
        for _, wire, span in () if content is None else _fields(self.payload, content):
            if wire not in (0, 2):
                raise MalformedExample(f"feature {name} is no list of integers")
            parts.append(self.payload[span.start : span.end])
        return varints(b"".join(parts))


def varints(data: bytes) -> np.ndarray:
    """All varints of a packed list, as int64."""
    octets = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(octets < 0x80)
    if not len(octets):
        return np.zeros(0, np.int64)
    if not len(ends) or ends[-1] != len(octets) - 1:
        raise MalformedExample("a list of integers ends inside a number")
    starts = np.concatenate([[0], ends[:-1] + 1])
    places = np.arange(len(octets)) - np.repeat(starts, ends - starts + 1)
    if places.max() > 9:
        raise MalformedExample("an integer of more than 10 bytes")
    parts = (octets & 0x7F).astype(np.uint64) << (7 * places).astype(np.uint64)
    return np.add.reduceat(parts, starts).astype(np.int64)
