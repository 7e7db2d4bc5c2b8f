"""Weight files read and written one tensor at a time, so that memory holds a tensor and never a model.

Reads safetensors and (memory-mapped, `weights_only`) torch.save files; writes safetensors, in shards when large, with
the names and the index that `from_pretrained` of transformers looks for.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from prismatic.util.errors import UsageError, one_line
from prismatic.util.files import DAMAGED, atomic_path, atomic_write

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor in a file, as its header tells."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFiles:
    """The tensors of several weight files by name; nothing but headers is read before :meth:`read`.

    Raises UsageError: a file is damaged, holds something other than tensors, or two files hold the same name.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.specs: dict[str, TensorSpec] = {}
        self._files: dict[str, Path] = {}
        self._mapped: dict[Path, Mapping[str, Any]] = {}
        for file in files:
            for spec in self._headers(file):
                if spec.name in self.specs:
                    raise UsageError(f"{file}: {spec.name} is also in {self._files[spec.name].name}; accepted: once")
                self.specs[spec.name], self._files[spec.name] = spec, file

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU. Safetensors files are opened anew each time, so that their pages can be dropped."""
        file = self._files[name]
        if file in self._mapped:
            return self._mapped[file][name]
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)

    def _headers(self, file: Path) -> list[TensorSpec]:
        if file.suffix != ".safetensors":
            return self._map(file)
        try:
            with safe_open(file, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
                return [
                    TensorSpec(name, tuple(part.get_shape()), _DTYPES[part.get_dtype()])
                    for name, part in slices.items()
                ]
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{file}: not a readable safetensors file ({one_line(error)})") from error
        except KeyError as error:
            raise UsageError(f"{file}: data type {error} found; accepted: {', '.join(_DTYPES)}") from error

    def _map(self, file: Path) -> list[TensorSpec]:
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except DAMAGED as error:
            raise UsageError(f"{file}: not a readable file of tensors ({one_line(error, 120)})") from error
        if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise UsageError(f"{file}: holds other things than tensors; accepted: a state dict")
        self._mapped[file] = tensors
        return [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def parse_size(text: str, flag: str) -> int:
    """Bytes of "5GB", "200 MB" or "1GiB". Raises UsageError: something else, or zero."""
    bare = text.strip().upper()  # A small b would mean bits.
    try:
        size = int(bare) if bare.isdigit() else convert_file_size_to_int(bare)
    except ValueError:
        size = 0
    if size < 1:
        raise UsageError(f"{flag}: {text!r} found; accepted: a size such as 5GB or 200MB")
    return size


def write_model(
    folder: Path, specs: Iterable[TensorSpec], read: Callable[[str], torch.Tensor], max_shard_bytes: int
) -> list[Path]:
    """Write `model.safetensors`, or shards of at most `max_shard_bytes` with an index; returns the files.

    `read` gives each tensor in turn; its result must have the shape and type that `specs` announce.
    A tensor larger than `max_shard_bytes` gets a shard of its own.
    """
    by_name = {spec.name: spec for spec in specs}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda spec: spec.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    shards = {name: [by_name[tensor] for tensor in tensors] for name, tensors in split.filename_to_tensors.items()}
    files = [_write_file(folder / name, shard, read) for name, shard in shards.items()]
    if not split.is_sharded:
        return files
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    atomic_write(folder / WEIGHTS_INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    return [*files, folder / WEIGHTS_INDEX]


def _write_file(path: Path, specs: Sequence[TensorSpec], read: Callable[[str], torch.Tensor]) -> Path:
    """One safetensors file: length of the header, header (JSON), data. Wide types first keeps every tensor aligned."""
    ordered = sorted(specs, key=lambda spec: (-spec.dtype.itemsize, spec.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in ordered:
        start, end = end, end + spec.num_bytes
        header[spec.name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for spec in ordered:
            tensor = read(spec.name)
            if tensor.shape != spec.shape or tensor.dtype != spec.dtype:
                raise ValueError(f"{spec.name}: announced {spec.shape} {spec.dtype}, got {tensor.shape} {tensor.dtype}")
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return path
