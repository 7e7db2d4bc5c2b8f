"""Image processor and processor of Prismatic models and OpenVLA, in upstream's file format.

The numbers are those of torchvision's PIL path (resize with antialiasing on bytes, then normalization), which is what
upstream runs. It works in the data loader, so an image is resized once when both vision models want the same pixels,
and scaling to [0, 1] and normalization are one fused multiply-add.

Upstream pads a letterboxed image once, with the mean color of the last vision model, also for the other one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from prismatic.extern.hf.configuration_prismatic import RESIZE_STRATEGIES
from prismatic.util.errors import unknown_name
from prismatic.util.files import atomic_write

_RESAMPLE = {resampling.name.lower(): resampling for resampling in Image.Resampling}

# A PIL image, HWC uint8 pixels as an array or a tensor.
ImageLike = Image.Image | np.ndarray | torch.Tensor


class _View(NamedTuple):
    """Image size and normalization of one vision model; equal views share one resize."""

    height: int
    width: int
    resample: Image.Resampling


class PrismaticImageProcessor(BaseImageProcessor):
    """RGB image -> normalized pixels for each vision model, stacked on the channels.

    input_sizes: (3, H, W) of each vision model; interpolations, means, stds: one entry for each.
    image_resize_strategy: "resize-naive" squeezes the image to H x W; "letterbox" first pads it to a square with the
    mean color; "resize-crop" scales its shorter side and crops the center.

    Raises UsageError for an unknown strategy or interpolation and ValueError for lists of different lengths.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - typed by the base class

    def __init__(
        self,
        use_fused_vision_backbone: bool = False,
        image_resize_strategy: str = "letterbox",
        input_sizes: Sequence[Sequence[int]] | None = None,
        interpolations: Sequence[str] | None = None,
        means: Sequence[Sequence[float]] | None = None,
        stds: Sequence[Sequence[float]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{key: value for key, value in kwargs.items() if key == "auto_map"})
        self.use_fused_vision_backbone = use_fused_vision_backbone
        self.image_resize_strategy = image_resize_strategy
        self.input_sizes = [tuple(size) for size in input_sizes or [(3, 224, 224)]]
        self.interpolations = list(interpolations or ["bicubic"])
        self.means = [tuple(mean) for mean in means or [(0.5, 0.5, 0.5)]]
        self.stds = [tuple(std) for std in stds or [(0.5, 0.5, 0.5)]]
        self._check()
        sizes = zip(self.input_sizes, self.interpolations, strict=True)
        self._views = [_View(height, width, _RESAMPLE[name]) for (_, height, width), name in sizes]
        self._scale, self._shift = self._affine()

    def _check(self) -> None:
        if self.image_resize_strategy not in RESIZE_STRATEGIES:
            raise unknown_name("image_resize_strategy", self.image_resize_strategy, RESIZE_STRATEGIES)
        for interpolation in self.interpolations:
            if interpolation not in _RESAMPLE:
                raise unknown_name("interpolations", interpolation, _RESAMPLE)
        expected = 1 + bool(self.use_fused_vision_backbone)
        for name in ("input_sizes", "interpolations", "means", "stds"):
            if len(getattr(self, name)) != expected:
                entries = len(getattr(self, name))
                raise ValueError(f"{name}: found {entries} entries; accepted: {expected}, one per vision model")

    @property
    def _letterbox_fill(self) -> tuple[int, ...]:
        return tuple(int(255 * value) for value in self.means[-1])

    def _affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(pixel / 255 - mean) / std as pixel * scale + shift, each (models, 3, 1, 1)."""
        means, stds = (torch.tensor(values, dtype=torch.float64) for values in (self.means, self.stds))
        scale, shift = 1.0 / (255.0 * stds), -means / stds
        return scale.float()[:, :, None, None], shift.float()[:, :, None, None]

    def apply_transform(self, img: ImageLike) -> torch.Tensor:
        """One RGB image (PIL, or HWC uint8 array or tensor) -> float32 (3 * models, H, W)."""
        resized: dict[_View, torch.Tensor] = {}
        for view in self._views:
            if view not in resized:
                resized[view] = self._resized(img, view)
        pixels = torch.empty(len(self._views), *resized[self._views[0]].shape, dtype=torch.float32)
        for index, view in enumerate(self._views):
            torch.mul(resized[view], self._scale[index], out=pixels[index]).add_(self._shift[index])
        return pixels.flatten(0, 1)

    # Read by whoever has arrays and may not give them to a transform of Pillow's images.
    apply_transform.takes_arrays = True  # type: ignore[attr-defined]

    def _resized(self, img: ImageLike, view: _View) -> torch.Tensor:
        """(3, view.height, view.width) float32 pixels, 0 to 255."""
        # A square of the right size is changed by no strategy.
        shape = (view.height, view.height, 3) if view.height == view.width else None
        if isinstance(img, np.ndarray) and img.dtype == np.uint8 and img.shape == shape:
            if not img.flags.writeable or min(img.strides) < 0:  # torch takes neither
                img = img.copy()
            return torch.from_numpy(img).permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
        image = _to_pil(img)
        if self.image_resize_strategy == "letterbox":
            image = _pad_to_square(image, self._letterbox_fill)
        return _to_chw(self._resize(image, view))

    def _resize(self, image: Image.Image, view: _View) -> Image.Image:
        """To view.height x view.width."""
        if self.image_resize_strategy == "resize-crop":
            return _resize_and_crop(image, view)
        return image.resize((view.width, view.height), view.resample)

    def preprocess(
        self, images: ImageLike | Sequence[ImageLike], return_tensors: str | None = None, **_: object
    ) -> BatchFeature:
        """One image or several (a list, or an array B x H x W x 3) -> `pixel_values` (B, 3 * models, H, W)."""
        if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
            images = list(images)
        if not isinstance(images, (list, tuple)):
            images = [images]  # type: ignore[list-item]
        pixel_values = torch.stack([self.apply_transform(image) for image in images])
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=return_tensors)

    def to_dict(self) -> dict[str, object]:
        """The content of upstream's preprocessor_config.json, with the torchvision parameters it repeats."""
        output = {
            "image_processor_type": type(self).__name__,
            "processor_class": "PrismaticProcessor",
            "use_fused_vision_backbone": self.use_fused_vision_backbone,
            "image_resize_strategy": self.image_resize_strategy,
            "input_sizes": [list(size) for size in self.input_sizes],
            "interpolations": self.interpolations,
            "means": [list(mean) for mean in self.means],
            "stds": [list(std) for std in self.stds],
            **self._torchvision_parameters(),
        }
        if hasattr(self, "auto_map"):
            output["auto_map"] = self.auto_map
        return output

    def _torchvision_parameters(self) -> dict[str, object]:
        naive = self.image_resize_strategy == "resize-naive"
        # Numbers of PIL's resampling filters, which are also upstream's.
        resize = [
            {
                "antialias": True,
                "interpolation": int(view.resample),
                "max_size": None,
                "size": [view.height, view.width] if naive else view.width,
            }
            for view in self._views
        ]
        letterbox = self.image_resize_strategy == "letterbox"
        return {
            "tvf_resize_params": resize,
            "tvf_crop_params": [{"output_size": [view.height, view.width]} for view in self._views],
            "tvf_normalize_params": [
                {"inplace": False, "mean": torch.tensor(mean).tolist(), "std": torch.tensor(std).tolist()}
                for mean, std in zip(self.means, self.stds, strict=True)
            ],
            "tvf_do_letterbox": letterbox,
            "tvf_letterbox_fill": list(self._letterbox_fill) if letterbox else None,
        }


def _to_pil(image: ImageLike) -> Image.Image:
    if isinstance(image, Image.Image):
        return image if image.mode == "RGB" else image.convert("RGB")
    pixels = image.numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"image: found {pixels.dtype} of shape {pixels.shape}; accepted: uint8, height x width x 3")
    return Image.fromarray(pixels)


def _to_chw(image: Image.Image) -> torch.Tensor:
    """(3, H, W) float32 pixels, 0 to 255."""
    # Pillow takes the colors apart faster than a transposed copy would.
    planes = np.frombuffer(b"".join(image.tobytes("raw", color) for color in "RGB"), np.uint8)
    return torch.from_numpy(planes.astype(np.float32)).view(3, image.height, image.width)


def _pad_to_square(image: Image.Image, fill: tuple[int, ...]) -> Image.Image:
    """Equal borders on both sides, as torchvision's pad makes them (an odd pixel is left out)."""
    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    padded = Image.new("RGB", (width + 2 * left, height + 2 * top), fill)
    padded.paste(image, (left, top))
    return padded


def _resize_and_crop(image: Image.Image, view: _View) -> Image.Image:
    """Shorter side to view.width, then the middle view.height x view.width, rounding as torchvision does."""
    width, height = image.size
    if width <= height:
        size = (view.width, int(view.width * height / width))
    else:
        size = (int(view.width * width / height), view.width)
    left, top = round((size[0] - view.width) / 2), round((size[1] - view.height) / 2)
    resized = image.resize(size, view.resample)
    return resized.crop((left, top, left + view.width, top + view.height))


class PrismaticProcessor(ProcessorMixin):
    """Tokenizer and image processor together; loads from a checkpoint folder without remote code."""

    def __init__(
        self, image_processor: PrismaticImageProcessor | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        if image_processor is None or tokenizer is None:
            raise ValueError("PrismaticProcessor: found None; accepted: an image processor and a tokenizer")
        super().__init__(image_processor, tokenizer)

    def check_argument_for_proper_class(self, argument_name: str, argument: object) -> type:
        """Accept any tokenizer; transformers' own check wants registered classes."""
        return type(argument)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> PrismaticProcessor:
        """Tokenizer files and preprocessor_config.json of a checkpoint folder (or of a model id in the local cache)."""
        kwargs.pop("trust_remote_code", None)
        image_processor = PrismaticImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return cls(image_processor, _load_tokenizer(pretrained_model_name_or_path, **kwargs))

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: object) -> list[str]:  # type: ignore[override]
        """Write upstream's files: preprocessor_config.json and those of the tokenizer."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        files = list(self.tokenizer.save_pretrained(str(folder)))
        _name_portable_tokenizer_class(folder / "tokenizer_config.json")
        return files + self.image_processor.save_pretrained(str(folder))

    def __call__(
        self,
        text: str | Sequence[str],
        images: ImageLike | Sequence[ImageLike],
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = "pt",
        **_: object,
    ) -> BatchFeature:
        """Prompt(s) and image(s) -> input_ids, attention_mask (B, S) and pixel_values (B, 3 * models, H, W).

        Raises ValueError when there are not as many prompts as images; several prompts of different lengths need
        `padding=True`.
        """
        pixel_values = self.image_processor.preprocess(images, return_tensors=return_tensors)["pixel_values"]
        prompts = [text] if isinstance(text, str) else list(text)
        encoded = self.tokenizer(
            prompts, padding=padding, truncation=truncation, max_length=max_length, return_tensors=return_tensors
        )
        if len(prompts) != len(pixel_values):
            raise ValueError(
                f"processor: found {len(prompts)} prompts and {len(pixel_values)} images; accepted: as many"
            )
        data = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        return BatchFeature(data={**data, "pixel_values": pixel_values})


def _name_portable_tokenizer_class(path: Path) -> None:
    """Put a class that old transformers know, too, in place of transformers 5's own, which reads the same file."""
    config = json.loads(path.read_text())
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        for key in ("backend", "is_local", "local_files_only"):
            config.pop(key, None)
        atomic_write(path, json.dumps(config, indent=2) + "\n")


def _load_tokenizer(path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedTokenizerBase:
    """tokenizer.json as it stands; AutoTokenizer only where a folder has none (it may rebuild the tokenizer)."""
    folder = Path(path)
    if folder.is_dir() and not (folder / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **kwargs)
    return PreTrainedTokenizerFast.from_pretrained(path, **kwargs)
