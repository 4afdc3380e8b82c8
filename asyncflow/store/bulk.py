"""Many small frames at once.

A frame that was put for one sample costs as much to parse as one of a thousand rows. But the metadata of all frames
that one version of Arrow writes for one schema are the same bytes, but for a few numbers: how many rows there are, and
where each buffer begins and ends. So one of them is parsed by Arrow (`layout_of`), the others are compared with it as
rows of a matrix, and each column is put together from all of them by one call. What differs in any other byte, or has
numbers that do not fit together, is left to the ordinary way (`SegmentReader.batch`), which also has the words for it.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from asyncflow.store.frames import BATCH, FORMAT, HEADER_BYTES, HEADERS, MAGIC, field_of, header_of

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Span = tuple[Ints, Ints]
"""Where values begin and end, in bytes."""
PREFIX = 8
"""Bytes of an encapsulated message before its metadata."""


@dataclass(frozen=True, slots=True)
class Column:
    """Where one column is in a record batch: the numbers of its first node and buffer, and the size of its parts."""

    type: pa.DataType
    node: int
    buffer: int
    offset_bytes: int
    """Of one offset; 0: the values have a fixed size and no offsets."""
    value_bytes: int
    """Of one value, or of one item of a list."""
    nested: bool
    """Whether the values are those of a child."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What the metadata of record batches have in common. Positions are in words of 8 bytes in the message."""

    words: NDArray[np.uint64]
    """(W,) the prefix and the metadata of one batch."""
    fixed: NDArray[np.uint64]
    """(W,) bits that all have in common."""
    body_length: int
    rows: int
    nodes: NDArray[np.intp]
    """(nodes, 2) length and number of empty values."""
    buffers: NDArray[np.intp]
    """(buffers, 2) offset in the body and length."""
    top: list[int]
    """The node of each column."""
    columns: dict[str, Column]
    """Those that can be read in this way."""


def layout_of(message: memoryview, schema: pa.Schema) -> Layout | None:
    """The layout of a message that Arrow has read already. None when others cannot be read like it."""
    try:
        size = PREFIX + struct.unpack_from("<i", message, 4)[0]
        metadata = message[PREFIX:size]
        batch = header_of(metadata)
        body = field_of(metadata, struct.unpack_from("<I", metadata)[0], 3)
        rows, nodes, buffers = (field_of(metadata, batch, number) for number in (0, 1, 2))
        if body is None or rows is None or nodes is None or buffers is None or field_of(metadata, batch, 3) is not None:
            return None
        node_places, buffer_places = (_structs(metadata, field) for field in (nodes, buffers))
    except struct.error:
        return None
    top, columns, counts = _columns(schema)
    numbers = np.concatenate([[body, rows], node_places.ravel(), buffer_places.ravel()]) + PREFIX
    if counts != (len(node_places), len(buffer_places)) or size % 8 or (numbers % 8).any() or (numbers >= size).any():
        return None
    words = np.frombuffer(message[:size], np.uint64)
    fixed = np.full(len(words), ~np.uint64(0))
    fixed[numbers // 8] = 0
    return Layout(
        words=words.copy(),
        fixed=fixed,
        body_length=int(numbers[0]) // 8,
        rows=int(numbers[1]) // 8,
        nodes=(node_places + PREFIX) // 8,
        buffers=(buffer_places + PREFIX) // 8,
        top=top,
        columns=columns,
    )


def _structs(metadata: memoryview, field: int) -> NDArray[np.intp]:
    """(count, 2) positions of the two numbers in each struct of a flatbuffer's vector."""
    vector = field + struct.unpack_from("<I", metadata, field)[0]
    count = struct.unpack_from("<I", metadata, vector)[0]
    if vector + 4 + 16 * count > len(metadata):
        raise struct.error
    places: NDArray[np.intp] = np.arange(2 * count, dtype=np.intp).reshape(count, 2) * 8 + vector + 4
    return places


def _columns(schema: pa.Schema) -> tuple[list[int], dict[str, Column], tuple[int, int]]:
    """The node of each column, those that can be read, and how many nodes and buffers there are."""
    top, columns = [], {}
    node = buffer = 0
    for field in schema:
        nodes, buffers, sizes = _shape(field.type)
        if sizes is not None:
            columns[field.name] = Column(field.type, node, buffer, *sizes, nested=nodes == 2)
        top.append(node)
        node, buffer = node + nodes, buffer + buffers
    return top, columns, (node, buffer)


def _shape(kind: pa.DataType) -> tuple[int, int, tuple[int, int] | None]:
    """Nodes and buffers of a type, and the bytes of an offset and of a value; None when it is not read in this way."""
    types = pa.types
    if types.is_string(kind) or types.is_binary(kind):
        return 1, 3, (4, 1)
    if types.is_large_string(kind) or types.is_large_binary(kind):
        return 1, 3, (8, 1)
    if types.is_list(kind) or types.is_large_list(kind):
        nodes, buffers, sizes = _shape(kind.value_type)
        flat = sizes is not None and sizes[0] == 0
        offset_bytes = 4 if types.is_list(kind) else 8
        return 1 + nodes, 2 + buffers, (offset_bytes, sizes[1]) if flat and sizes else None
    if types.is_fixed_size_list(kind):
        nodes, buffers, _ = _shape(kind.value_type)
        return 1 + nodes, 1 + buffers, None
    return 1, 2, (0, kind.bit_width // 8) if kind.bit_width in (8, 16, 32, 64) else None


@dataclass(frozen=True, slots=True)
class Numbers:
    """What the metadata say at each place."""

    counts: Ints
    """(places, nodes) values."""
    begins: Ints
    """(places, buffers) where buffers begin in the segment."""
    lengths: Ints
    """(places, buffers) bytes."""


class Mapped:
    """The bytes of a segment, for reading many places at once."""

    def __init__(self, data: mmap.mmap) -> None:
        self._view = memoryview(data)
        self._buffer = pa.py_buffer(data)
        self._blocks = np.frombuffer(data, "V64", count=len(data) // HEADER_BYTES)
        self._whole = {size: np.frombuffer(data, f"<i{size}", count=len(data) // size) for size in (1, 2, 4, 8)}
        self._checked = np.zeros(len(self._blocks), np.bool_)
        """Where frames begin whose message has its checksum."""

    def headers(self, segment: int, offsets: Ints) -> tuple[NDArray[np.void], Mask]:
        """Headers at these places, and which of them are right, with a message that has its checksum.

        A header's own checksum is not looked at: each of its fields is compared with something else, but the schema's
        id, for which there would have to be another schema.
        """
        size = len(self._blocks) * HEADER_BYTES
        there = (offsets % HEADER_BYTES == 0) & (offsets < size)
        headers = self._blocks.take(np.where(there, offsets // HEADER_BYTES, 0)).view(HEADERS)
        right = there & (headers["magic"] == MAGIC) & (headers["format"] == FORMAT) & (headers["kind"] == BATCH)
        right &= (headers["segment"] == segment) & (headers["offset"] == offsets) & (headers["zeros"] == 0)
        right &= headers["length"] <= np.maximum(size - HEADER_BYTES - offsets, 0).astype(np.uint64)
        unchecked = np.flatnonzero(right & ~self._checked[np.where(there, offsets // HEADER_BYTES, 0)])
        if len(unchecked):
            begins = offsets[unchecked] + HEADER_BYTES
            ends = begins + headers["length"][unchecked].astype(np.int64)
            view, digest = self._view, xxhash.xxh3_64_intdigest
            spans = zip(begins.tolist(), ends.tolist(), strict=True)
            digests = np.array([digest(view[begin:end]) for begin, end in spans], np.uint64)
            right[unchecked] = digests == headers["checksum"][unchecked]
            self._checked[offsets[unchecked[right[unchecked]]] // HEADER_BYTES] = True
        return headers, right

    def layout(self, header: np.void, schema: pa.Schema) -> Layout | None:
        """The layout of a frame that Arrow has read already."""
        begin = int(header["offset"]) + HEADER_BYTES
        return layout_of(self._view[begin : begin + int(header["length"])], schema)

    def spans(
        self, layout: Layout, names: list[str], headers: NDArray[np.void], frame: Ints, row: Ints
    ) -> tuple[list[Span], Mask]:
        """Where the values of columns begin and end at the places (index of the frame, row), in bytes, and which of the
        frames have the layout, and numbers that fit together. Spans of other frames are (0, 0)."""
        offsets = headers["offset"].astype(np.int64)
        size = len(layout.words) * 8
        blocks = -(-size // HEADER_BYTES)
        # Behind the end it is the last block once more: then the length does not fit.
        places = (offsets // HEADER_BYTES + 1)[:, None] + np.arange(blocks)
        words = self._blocks.take(places, mode="clip").view(np.uint64).reshape(len(offsets), -1)
        words = words[:, : len(layout.words)]
        right = (((words ^ layout.words) & layout.fixed) == 0).all(axis=1)
        values = words.view(np.int64)
        body, rows = values[:, layout.body_length], values[:, layout.rows]
        right &= (body >= 0) & (body <= headers["length"].astype(np.int64) - size) & (rows == headers["rows"])
        nodes, buffers = values[:, layout.nodes], values[:, layout.buffers]  # (F, nodes, 2), (F, buffers, 2)
        right &= (nodes[:, :, 1] == 0).all(axis=1) & (nodes[:, layout.top, 0] == rows[:, None]).all(axis=1)
        begins, lengths = buffers[:, :, 0], buffers[:, :, 1]
        right &= ((begins >= 0) & (lengths >= 0) & (lengths <= body[:, None] - begins)).all(axis=1)
        right &= (begins % 8 == 0).all(axis=1)
        fits = right[frame] & (row >= 0) & (row < rows[frame])
        begins = begins + (offsets + HEADER_BYTES + size)[:, None]
        spans = []
        numbers = Numbers(nodes[frame, :, 0], begins[frame], lengths[frame])
        for name in names:
            span, good = self._span(layout.columns[name], numbers, row, fits)
            fits &= good
            spans.append(span)
        right[frame[~fits]] = False
        return spans, right

    def _span(self, column: Column, numbers: Numbers, row: Ints, fits: Mask) -> tuple[Span, Mask]:
        """Of one column; and where it is as it should be. Numbers are only used where they fit."""
        at, size, begins, lengths = column.buffer, column.value_bytes, numbers.begins, numbers.lengths
        good = fits & (lengths[:, at] == 0)  # no mask of empty values
        if not column.offset_bytes:
            good &= lengths[:, at + 1] // size > row
            begin = np.where(good, begins[:, at + 1] + row * size, 0)
            good &= begin % size == 0
            return (begin, begin + size), good
        good &= lengths[:, at + 1] // column.offset_bytes > row + 1
        place = np.where(good, begins[:, at + 1] + row * column.offset_bytes, 0)
        good &= place % column.offset_bytes == 0
        place = np.where(good, place // column.offset_bytes, 0)
        whole = self._whole[column.offset_bytes]
        first, last = whole[place].astype(np.int64), whole[place + 1].astype(np.int64)
        values = at + 2
        if column.nested:
            count = numbers.counts[:, column.node + 1]
            good &= (lengths[:, values] == 0) & (last <= count) & (count <= lengths[:, values + 1] // size)
            values += 1
        good &= (first >= 0) & (first <= last) & (last <= lengths[:, values] // size)
        begin = begins[:, values]
        return (np.where(good, begin + first * size, 0), np.where(good, begin + last * size, 0)), good

    def cut(self, column: Column, span: Span, places: Ints | None) -> pa.Array:
        """The bytes of the values at some of the spans, or at all: one array of integers, or of large binary.

        Raises ValueError when the spans overlap, as Arrow does not write them.
        """
        begins, ends = span
        if not column.offset_bytes:
            begins = begins if places is None else begins[places]
            return pa.array(self._whole[column.value_bytes][begins // column.value_bytes])
        if (ends[:-1] > begins[1:]).any():
            raise ValueError("values overlap")
        # To Arrow the map is one array: the wanted values, and between them what is not wanted.
        bounds = np.column_stack(span).ravel()
        whole = pa.Array.from_buffers(pa.large_binary(), len(bounds) - 1, [None, pa.py_buffer(bounds), self._buffer])
        return whole.take(pa.array(np.arange(0, len(bounds), 2) if places is None else places * 2))


def typed(column: Column, values: pa.Array) -> pa.Array:
    """Values of a column from their bytes, as `cut` returns them. Raises ArrowInvalid when they are too many."""
    if not column.offset_bytes:
        return values.view(column.type)
    _, raw, data = values.buffers()
    offsets = np.frombuffer(raw, np.int64, len(values) + 1) // column.value_bytes
    if offsets[-1] >= 1 << (8 * column.offset_bytes - 1):
        raise pa.ArrowInvalid(f"{offsets[-1]} values are too many for one column")
    buffers = [None, pa.py_buffer(offsets.astype(f"<i{column.offset_bytes}"))]
    if not column.nested:
        return pa.Array.from_buffers(column.type, len(values), [*buffers, data])
    child = pa.Array.from_buffers(column.type.value_type, int(offsets[-1]), [None, data])
    return pa.Array.from_buffers(column.type, len(values), buffers, children=[child])
