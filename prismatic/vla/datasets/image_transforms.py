"""Changes to a camera image before the model's own processor: one object for training and for rollouts.

Not obvious:
- Training images come from JPEG files, so a rollout's render goes through a JPEG round trip first (quality 95, 4:2:0).
- JPEG is decoded by the fast integer DCT, as TensorFlow does; the accurate one of Pillow differs by up to 18 levels.
- A policy trained with the random crop (area 0.9) sees the center crop of the same area in rollouts.
- Rendered images must already be rotated by 180 degrees, as the RLDS datasets hold them; nothing here rotates.
- Upstream turns a float image into uint8 by floor(x * 255.5) (tf.image.convert_image_dtype), not by rounding.
- The crop's samples are corner-aligned, the Lanczos resize is half-pixel centered.
"""

from __future__ import annotations

import functools
import io
import math
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import simplejpeg
import torch
from PIL import Image

from prismatic.vla.datasets.resampling import lanczos_axis, lanczos_crop_axis, resample
from prismatic.vla.datasets.rlds_writer import encode_jpeg

CROP_AREA = 0.9


class CropBox(NamedTuple):
    """A crop in fractions of an image's height and width; (0, 0, 1, 1) is the whole image."""

    top: float
    left: float
    height: float
    width: float


# Top, left, bottom, right in pixels; the last two are outside.
PixelBox: TypeAlias = tuple[int, int, int, int]
FULL_IMAGE = CropBox(0.0, 0.0, 1.0, 1.0)


def crop_of_view(crop: CropBox, content: PixelBox, size: tuple[int, int]) -> CropBox:
    """The part of a whole view that a view of the cropped camera image shows; what the camera fills stays in place.

    Args:
        crop: of the camera image.
        content: the part of the view that the camera fills; the rest are bars.
        size: height and width of the view.
    """
    starts = []
    for axis in (0, 1):
        first, last = content[axis] / size[axis], content[axis + 2] / size[axis]
        starts.append(first * (1 - crop[axis + 2]) + (last - first) * crop[axis])
    return CropBox(starts[0], starts[1], crop.height, crop.width)


class AugmentDraw(NamedTuple):
    """One draw of the augmentation: crop, brightness offset, contrast and saturation factors, hue offset (turns)."""

    crop: CropBox
    brightness: float
    contrast: float
    saturation: float
    hue: float


@dataclass(frozen=True)
class AugmentRanges:
    """Ranges of the training augmentation; the defaults are upstream's (applied in the order of the fields)."""

    crop_area: float = CROP_AREA
    brightness: float = 0.2
    contrast: tuple[float, float] = (0.8, 1.2)
    saturation: tuple[float, float] = (0.8, 1.2)
    hue: float = 0.05

    def draw(self, rng: np.random.Generator) -> AugmentDraw:
        """Draw one augmentation; every parameter is uniform on its range."""
        side = math.sqrt(self.crop_area)
        top, left, brightness, contrast, saturation, hue = rng.random(6).tolist()
        return AugmentDraw(
            crop=CropBox(top * (1 - side), left * (1 - side), side, side),
            brightness=(2 * brightness - 1) * self.brightness,
            contrast=self.contrast[0] + contrast * (self.contrast[1] - self.contrast[0]),
            saturation=self.saturation[0] + saturation * (self.saturation[1] - self.saturation[0]),
            hue=(2 * hue - 1) * self.hue,
        )


def center_crop_box(area: float = CROP_AREA) -> CropBox:
    """The square-root-of-`area` sided box in the middle of the image."""
    side = math.sqrt(area)
    return CropBox((1 - side) / 2, (1 - side) / 2, side, side)


def decode_image(encoded: bytes) -> np.ndarray:
    """Decode JPEG bytes (or PNG, BMP, GIF) to uint8 (H, W, 3) with the pixels of `tf.io.decode_image`.

    Raises ValueError: the bytes are no complete image.
    """
    return _decode_jpeg(encoded) if encoded[:2] == b"\xff\xd8" else decode_with_pillow(encoded)


def _decode_jpeg(encoded: bytes) -> np.ndarray:
    try:
        _, _, colors, _ = simplejpeg.decode_jpeg_header(encoded, strict=False)
    except (ValueError, KeyError):  # no JPEG at all, or chroma sampled in a way that turbojpeg has no name for
        return decode_with_pillow(encoded)
    cmyk = colors in ("CMYK", "YCCK")
    read = functools.partial(simplejpeg.decode_jpeg, encoded, "CMYK" if cmyk else "RGB", fastdct=True)
    try:
        try:
            pixels = read()
        except ValueError as error:
            # TensorFlow refuses a file that ends early, and decodes what it can of one with stray bytes.
            if "Premature end" in str(error):
                raise
            pixels = read(strict=False)
    except ValueError as error:
        raise ValueError(f"{len(encoded)} bytes that are no complete JPEG image ({error})") from error
    return _cmyk_to_rgb(pixels, inverted=b"\xff\xee\x00\x0eAdobe" in encoded) if cmyk else pixels


def _cmyk_to_rgb(cmyk_HW4: np.ndarray, inverted: bool) -> np.ndarray:
    """RGB as TensorFlow makes it of inks, which files with Adobe's marker hold inverted."""
    light_HW4 = (cmyk_HW4 if inverted else 255 - cmyk_HW4).astype(np.uint16)
    return (light_HW4[..., :3] * light_HW4[..., 3:] // 255).astype(np.uint8)


def decode_with_pillow(encoded: bytes) -> np.ndarray:
    """Decode an image to uint8 (H, W, 3) as Pillow does: for data that were recorded and are read with it elsewhere.

    Raises ValueError: the bytes are no complete image.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG", "BMP", "GIF", "WEBP")) as image:
            image.load()
            if image.mode.startswith("I;16"):  # converted, these are clipped to the range of 8 bits
                return as_rgb((np.asarray(image) >> 8).astype(np.uint8))
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{len(encoded)} bytes that are no complete JPEG or PNG image") from error


def as_rgb(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W) or (H, W, 1, 3 or 4) as (H, W, 3): gray repeated, transparency left out."""
    planes = image[..., None] if image.ndim == 2 else image[..., :3]
    return np.repeat(planes, 3, axis=2) if planes.shape[2] == 1 else np.ascontiguousarray(planes)


def jpeg_round_trip(image_HW3: np.ndarray) -> np.ndarray:
    """Encode and decode as the training data was (quality 95, 4:2:0 chroma), uint8 (H, W, 3) in and out."""
    return decode_image(encode_jpeg(image_HW3))


def _resize_and_crop(image_HW3: np.ndarray, size: tuple[int, int], crop: CropBox) -> np.ndarray:
    """As :func:`resize_and_crop`, but where Lanczos overshoots, values leave the 0..255 scale."""
    (height, width), (in_height, in_width) = size, image_HW3.shape[:2]
    if crop == FULL_IMAGE:
        rows, columns = lanczos_axis(in_height, height), lanczos_axis(in_width, width)
    else:
        rows = lanczos_crop_axis(in_height, height, crop.top, crop.height)
        columns = lanczos_crop_axis(in_width, width, crop.left, crop.width)
    return resample(image_HW3, rows, columns)


def resize_and_crop(image_HW3: np.ndarray, size: tuple[int, int], crop: CropBox = FULL_IMAGE) -> np.ndarray:
    """Lanczos-3 resize to `size` (height, width), then crop and resize back bilinearly.

    Returns planar float32 (3, height, width) on the 0..255 scale, clipped to it.
    """
    planar = _resize_and_crop(image_HW3, size, crop)
    return np.clip(planar, 0.0, 255.0, out=planar)


def _interleave(planar_3HW: np.ndarray) -> np.ndarray:
    """Planar values, already on the scale whose floor is wanted, to uint8 (H, W, 3)."""
    image_HW3 = np.empty((*planar_3HW.shape[1:], 3), dtype=np.uint8)
    for channel, plane in enumerate(planar_3HW):  # less than half the time of a transposed copy
        np.copyto(image_HW3[..., channel], plane, casting="unsafe")
    return image_HW3


def resize_lanczos(image_HW3: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Antialiased Lanczos-3 resize of a uint8 image, rounded (as upstream resizes frames and observations)."""
    planar = resize_and_crop(image_HW3, _pair(size))
    planar += 0.5
    return _interleave(planar)


def adjust_saturation_hue(rgb_3HW: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    """Scale the HSV saturation and turn the hue of planar RGB in [0, 1], in place (TensorFlow's definitions).

    The value channel stays, so c * min(saturation, ...) is the new chroma and each channel is the value minus the
    chroma times a trapezoid of the hue. The result stays in [0, value].
    """
    red, green, blue = rgb_3HW
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    scale = 1.0 / np.maximum(chroma, 1e-9)
    sector = (red - green) * scale + 4.0  # blue is the largest channel
    np.copyto(sector, (blue - red) * scale + 2.0, where=green == value)
    np.copyto(sector, (green - blue) * scale, where=red == value)
    sector += 6.0 * hue
    sector -= 6.0 * np.floor(sector * (1.0 / 6.0))
    np.minimum(chroma * saturation, value, out=chroma)
    # Distance of the hue from cyan, green and blue, 1 to 2; red is left out near cyan, the others far from theirs.
    for channel, center, term, join in (
        (red, 3.0, value - 2 * chroma, np.add),
        (green, 2.0, value + chroma, np.subtract),
        (blue, 4.0, value + chroma, np.subtract),
    ):
        distance = np.abs(np.subtract(sector, center, out=scale), out=scale)
        distance.clip(1.0, 2.0, out=distance)
        join(term, np.multiply(distance, chroma, out=distance), out=channel)
    return rgb_3HW


def adjust_colors(rgb_3HW: np.ndarray, draw: AugmentDraw) -> np.ndarray:
    """Brightness, contrast (about each channel's mean), saturation, hue of planar RGB, in place, clipped to [0, 1].

    What is outside [0, 1] at first counts as clipped to it.
    """
    brightness, contrast, rgb = draw.brightness, draw.contrast, torch.from_numpy(rgb_3HW)
    # Clipping to [0, 1] before and after the shift, as one pass.
    rgb.add_(brightness).clamp_(max(brightness, 0.0), min(1.0 + brightness, 1.0))
    offset = rgb.mean(dim=(1, 2), keepdim=True).mul_(1.0 - contrast)
    torch.add(offset, rgb, alpha=contrast, out=rgb).clamp_(0.0, 1.0)
    return adjust_saturation_hue(rgb_3HW, draw.saturation, draw.hue)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


@dataclass(frozen=True)
class PolicyImageTransform:
    """Camera image -> image of the policy's size, for training and for rollouts."""

    size: tuple[int, int]  # (height, width) of the result
    # The training augmentation, or None for a policy trained without (then rollouts do not crop either)
    ranges: AugmentRanges | None = None

    def draw(self, rng: np.random.Generator, view: str = "") -> AugmentDraw | None:
        """An augmentation for one training image of a view; None without augmentation."""
        return None if self.ranges is None else self.ranges.draw(rng)

    def content(self, image_hw: tuple[int, ...]) -> PixelBox:
        """The part of the result that a camera image of this height and width fills."""
        return 0, 0, *self.size

    def train(self, image_HW3: np.ndarray, draw: AugmentDraw | None) -> np.ndarray:
        """A stored training frame (uint8) resized and augmented with `draw` (None: only resized), uint8.

        An augmented one lies in memory color by color.
        """
        if draw is None:
            return resize_lanczos(image_HW3, self.size)
        planar = _resize_and_crop(image_HW3, self.size, draw.crop)
        planar *= np.float32(1.0 / 255.0)
        adjust_colors(planar, draw)
        planar *= np.float32(255.5)
        return planar.astype(np.uint8).transpose(1, 2, 0)

    def rollout(self, image_HW3: np.ndarray) -> np.ndarray:
        """A rendered observation (uint8, already rotated like the data) as the policy was trained to see it, uint8."""
        resized = resize_lanczos(jpeg_round_trip(image_HW3), self.size)
        if self.ranges is None:
            return resized
        planar = resize_and_crop(resized, self.size, center_crop_box(self.ranges.crop_area))
        planar *= np.float32(255.5 / 255.0)
        return _interleave(np.minimum(planar, 255.0, out=planar))


def prepare_policy_image(image_HW3: np.ndarray, size: int | tuple[int, int], center_crop: bool) -> np.ndarray:
    """JPEG round trip, Lanczos resize to `size`, and the center crop of area 0.9 when `center_crop`.

    Args:
        image_HW3: uint8 (H, W, 3), rotated by 180 degrees like the training data.
        size: side, or (height, width), of the result.
        center_crop: True for a policy trained with image augmentation.

    Returns:
        uint8 (height, width, 3).

    Raises:
        ValueError: `image_HW3` is not a uint8 (H, W, 3) array.
    """
    if image_HW3.dtype != np.uint8 or image_HW3.ndim != 3 or image_HW3.shape[2] != 3:
        raise ValueError(f"policy image: expected uint8 (H, W, 3), found {image_HW3.dtype} {image_HW3.shape}")
    ranges = AugmentRanges() if center_crop else None
    return PolicyImageTransform(_pair(size), ranges).rollout(np.ascontiguousarray(image_HW3))
