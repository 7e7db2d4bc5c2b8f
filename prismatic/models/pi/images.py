"""Images for pi0 and pi0.5: resized with their shape kept, in the middle of a black square.

Not obvious: openpi resizes twice over. Its data pipeline, its server and its client use Pillow, which antialiases; the
model's own resize, for images that still have another size, does not, and is the only one of LeRobot's. transformers'
`PI0ImageProcessor` does neither: bicubic, picture at the top, grey below.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def fitted_size(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """Height and width that an image has inside the square of `size`, and the rows and columns before it."""
    ratio = max(width / size, height / size)
    new_height, new_width = int(height / ratio), int(width / ratio)
    return new_height, new_width, (size - new_height) // 2, (size - new_width) // 2


def letterbox(images: Tensor, size: int) -> Tensor:
    """Resize [..., 3, H, W] to [..., 3, size, size]: bilinear without antialiasing, as LeRobot and openpi's model do.

    float32 images are in [-1, 1] and padded with -1; uint8 images are rounded, and padded with 0.
    """
    if images.shape[-2:] == (size, size):
        return images
    height, width, top, left = fitted_size(images.shape[-2], images.shape[-1], size)
    flat = images.reshape(-1, *images.shape[-3:])
    resized = F.interpolate(flat.float(), size=(height, width), mode="bilinear", align_corners=False)
    whole = images.dtype == torch.uint8
    resized = resized.round().clamp(0, 255).to(torch.uint8) if whole else resized.clamp(-1, 1)
    padding = (left, size - width - left, top, size - height - top)
    return F.pad(resized, padding, value=0 if whole else -1).reshape(*images.shape[:-2], size, size)


def pil_letterbox(image: np.ndarray, size: int) -> np.ndarray:
    """Resize a uint8 image [H, W, 3] to [size, size, 3] by Pillow's bilinear, as openpi's pipeline and client do."""
    if image.shape[:2] == (size, size):
        return image
    height, width, top, left = fitted_size(image.shape[0], image.shape[1], size)
    square = np.zeros((size, size, image.shape[2]), dtype=np.uint8)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    square[top : top + height, left : left + width] = np.asarray(resized)
    return square


def to_pixel_values(images: Tensor) -> Tensor:
    """uint8 images of any shape as float32 in [-1, 1]."""
    return images.float() / 255 * 2 - 1
