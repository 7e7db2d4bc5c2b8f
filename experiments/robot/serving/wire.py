"""NumPy arrays as JSON (the `json_numpy` package's form) and as msgpack, without pickle on either side.

    json             {"__numpy__": base64 of the bytes, "dtype": "<f4", "shape": [2, 3]}
    msgpack, openpi  {b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [2, 3]}; scalars b"__npgeneric__"
    msgpack, vla-eval   the same with text keys, and {"__image__": True, "format": "png", "data": bytes} for pictures

Decoding is for data from strangers: only numbers and single texts, sizes that match, one line about what is wrong.
Needs NumPy and, for msgpack alone, the msgpack package (for vla-eval's pictures Pillow): a robot's computer can use it.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

MAX_PICTURE_SIDE = 4096  # pixels
_KINDS = "biuf"  # bool, integers, floats: no objects, records or dates
_TEXT = "US"  # without dimensions, as numpy.array("open the drawer") is


T = TypeVar("T")
NumPyT = TypeVar("NumPyT", bound=np.ndarray | np.generic)


class WireError(ValueError):
    """A message that cannot be decoded."""


@dataclass(frozen=True)
class Unreadable:
    """Stand-in for an array or picture that could not be decoded, in a message that was read leniently."""

    reason: str


def to_json(value: object) -> str:
    """JSON text of a value that may hold arrays and NumPy scalars."""
    return json.dumps(value, default=_array_to_json, separators=(",", ":"), allow_nan=False)


def from_json(text: str | bytes, *, lenient: bool = False) -> object:
    """The value in a JSON text, arrays restored (read-only).

    `lenient` puts :class:`Unreadable` in the place of an array that is none: only who reads that field minds.

    Raises:
        WireError: not JSON, or an array that is no array.
    """
    try:
        return json.loads(text, object_hook=_leniently(_array_from_json) if lenient else _array_from_json)
    except WireError:
        raise
    except RecursionError:
        raise WireError("not readable as JSON: nested too deeply") from None
    except ValueError as error:
        raise WireError(f"not readable as JSON: {error}") from None


def to_msgpack(value: object, *, text_keys: bool = False) -> bytes:
    """msgpack bytes of a value that may hold arrays and NumPy scalars; their fields are named by bytes, or text."""
    import msgpack

    def encode(part: object) -> dict[str, object] | dict[bytes, object]:
        fields = _array_to_msgpack(part)
        return {key.decode(): field for key, field in fields.items()} if text_keys else fields

    return msgpack.packb(value, default=encode)


def to_vla_eval(value: object) -> bytes:
    """msgpack bytes as vla-eval's clients read them."""
    return to_msgpack(value, text_keys=True)


def from_msgpack(data: bytes, *, lenient: bool = False) -> object:
    """The value in msgpack bytes, with arrays and pictures (read-only); lenient, or WireError, as :func:`from_json`."""
    import msgpack

    try:
        hook = _leniently(_array_from_msgpack) if lenient else _array_from_msgpack
        return msgpack.unpackb(data, object_hook=hook, strict_map_key=False, unicode_errors="surrogateescape")
    except WireError:
        raise
    except (msgpack.UnpackException, ValueError, TypeError, RecursionError) as error:
        raise WireError(f"not readable as msgpack: {error or type(error).__name__}") from None


def _leniently(hook: Callable[[dict[T, object]], object]) -> Callable[[dict[T, object]], object]:
    def decode(value: dict[T, object]) -> object:
        try:
            return hook(value)
        except WireError as error:
            return Unreadable(str(error))

    return decode


def _array_to_json(value: object) -> object:
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"{type(value).__name__} cannot be sent; accepted: JSON values, arrays and NumPy scalars")
    array = _checked(value)
    return {"__numpy__": base64.b64encode(array.tobytes()).decode(), "dtype": array.dtype.str, "shape": array.shape}


def _array_from_json(value: dict[str, object]) -> object:
    if "__numpy__" not in value:
        return value
    try:
        data = base64.b64decode(str(value["__numpy__"]), validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise WireError("an array's __numpy__ is not base64") from None
    return _decode(data, value.get("dtype"), value.get("shape"))


def _array_to_msgpack(value: object) -> dict[bytes, object]:
    if isinstance(value, np.ndarray):
        array = _checked(value)
        return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": _checked(value).item(), b"dtype": value.dtype.str}
    raise TypeError(f"{type(value).__name__} cannot be sent; accepted: msgpack values, arrays and NumPy scalars")


def _array_from_msgpack(value: dict[object, object]) -> object:
    if b"__ndarray__" in value:
        return _decode(value.get(b"data"), value.get(b"dtype"), value.get(b"shape"))
    if b"__npgeneric__" in value:
        number = value.get(b"data")
        if not isinstance(number, bool | int | float | str):
            raise WireError("a NumPy scalar's data is neither number nor text")
        try:
            return _dtype(value.get(b"dtype")).type(number)
        except (OverflowError, ValueError):
            raise WireError(f"a NumPy scalar does not fit its dtype {value.get(b'dtype')!r}") from None
    if "__ndarray__" in value:
        return _decode(value.get("data"), value.get("dtype"), value.get("shape"))
    if "__image__" in value:
        return _decode_picture(value)
    return value


def _decode_picture(value: Mapping[object, object]) -> np.ndarray | np.generic:
    """uint8 (H, W, 3) of a picture that vla-eval's client packed as raw bytes, PNG or JPEG."""
    if value.get("format") == "raw":
        return _decode(value.get("data"), value.get("dtype"), value.get("shape"))
    from PIL import Image, UnidentifiedImageError

    data = value.get("data")
    if not isinstance(data, bytes):
        raise WireError(f"a picture's data is {type(data).__name__}; accepted: bytes of a PNG or JPEG file")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as picture:
            # Nothing is unpacked yet: a small file can hold a huge picture.
            if max(picture.size) > MAX_PICTURE_SIDE:
                raise WireError(f"a picture of {picture.size} pixels; accepted: sides up to {MAX_PICTURE_SIDE}")
            return np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        if isinstance(error, WireError):
            raise
        raise WireError("a picture is neither a PNG nor a JPEG file") from None


def _checked(value: NumPyT) -> NumPyT:
    if value.dtype.kind not in _KINDS and (value.ndim or value.dtype.kind not in _TEXT):
        raise TypeError(f"arrays of {value.dtype} cannot be sent; accepted: bool, integers, floats, a single text")
    return value


def _dtype(name: object) -> np.dtype[np.generic]:
    try:
        dtype = np.dtype(name) if isinstance(name, str) else None
    except (TypeError, ValueError, SyntaxError):
        dtype = None
    if dtype is None or dtype.kind not in _KINDS + _TEXT or dtype.subdtype is not None:
        raise WireError(f"an array's dtype is {str(name)[:40]!r}; accepted: bool, integers, floats such as '<f4'")
    return dtype


def _decode(data: object, name: object, shape: object) -> np.ndarray | np.generic:
    """The array, or for the empty shape the NumPy scalar."""
    dtype = _dtype(name)
    sizes = list(shape) if isinstance(shape, list | tuple) else [-1]
    if dtype.kind in _TEXT and sizes:
        raise WireError(f"an array of texts ({dtype.str}, shape {sizes}); accepted: numbers, or a single text")
    if len(sizes) > 8 or not all(type(size) is int and size >= 0 for size in sizes):
        raise WireError(f"an array's shape is {str(shape)[:60]}; accepted: a list of sizes")
    if not isinstance(data, bytes) or len(data) != math.prod(sizes) * dtype.itemsize:
        received = len(data) if isinstance(data, bytes) else type(data).__name__
        raise WireError(f"an array of shape {sizes} and dtype {dtype.str} has {received} bytes of data")
    try:
        return np.frombuffer(data, dtype).reshape(sizes)[()]
    except ValueError as error:
        raise WireError(f"an array of dtype {dtype.str} is no text ({error})") from None
