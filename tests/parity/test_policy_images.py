"""Images of rollouts and of augmented training against TensorFlow's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from prismatic.vla.datasets import image_transforms as images
from prismatic.vla.datasets.image_transforms import AugmentDraw, AugmentRanges, CropBox, PolicyImageTransform


@pytest.fixture(scope="module")
def rollout(golden_dir: Path) -> dict[str, np.ndarray]:
    return load_file(golden_dir / "eval_image_path.safetensors")


@pytest.fixture(scope="module")
def augmented(golden_dir: Path) -> dict[str, np.ndarray]:
    return load_file(golden_dir / "dlimp_augment.safetensors")


def _difference(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    assert found.dtype == np.uint8 and found.shape == expected.shape
    return np.abs(found.astype(int) - expected.astype(int))


DECODED = load_file(Path(__file__).parent / "tensorflow_images.safetensors")  # by tf.io.decode_image, 2.21.0


@pytest.mark.parametrize("kind", sorted({name.removesuffix(".file") for name in DECODED if name.endswith(".file")}))
def test_every_kind_of_file_decodes_to_tensorflows_pixels(kind: str) -> None:
    pixels = images.decode_image(DECODED[f"{kind}.file"].tobytes())
    np.testing.assert_array_equal(pixels, DECODED[f"{kind}.pixels"])


def test_lanczos_alone(rollout: dict[str, np.ndarray]) -> None:
    source = rollout["sq256.in"]
    assert _difference(images.resize_lanczos(source, 224), rollout["sq256.lanczos224_nojpeg"]).max() <= 1
    assert (
        _difference(images.resize_lanczos(rollout["sq256.jpeg_roundtrip"], 224), rollout["sq256.jpeg_lanczos224"]).max()
        <= 1
    )
    wide = rollout["wide180x240.jpeg_roundtrip"]
    assert _difference(images.resize_lanczos(wide, 224), rollout["wide180x240.jpeg_lanczos224"]).max() <= 1
    clipped = np.clip(rollout["lanczos64_of_sq256_nojpeg"], 0, 255).transpose(2, 0, 1)
    np.testing.assert_allclose(images.resize_and_crop(source, (64, 64)), clipped, atol=1e-3)


@pytest.mark.parametrize("name", ["sq256", "sq224"])
def test_center_crop_alone(rollout: dict[str, np.ndarray], name: str) -> None:
    planar = images.resize_and_crop(rollout[f"{name}.jpeg_lanczos224"], (224, 224), images.center_crop_box())
    found = np.minimum(planar * (255.5 / 255), 255).astype(np.uint8).transpose(1, 2, 0)
    assert _difference(found, rollout[f"{name}.center_crop_of_224"]).max() <= 1


@pytest.mark.parametrize("name", ["sq256", "wide180x240"])
def test_whole_rollout_path(rollout: dict[str, np.ndarray], name: str) -> None:
    source = rollout[f"{name}.in"]
    np.testing.assert_array_equal(images.jpeg_round_trip(source), rollout[f"{name}.jpeg_roundtrip"])
    without = _difference(
        images.prepare_policy_image(source, 224, center_crop=False), rollout[f"{name}.jpeg_lanczos224"]
    )
    cropped = _difference(
        images.prepare_policy_image(source, (224, 224), center_crop=True), rollout[f"{name}.prepare_images_center_crop"]
    )
    assert without.max() <= 1 and cropped.max() <= 1
    # Leaving out the JPEG round trip or taking the wrong crop is far outside.
    skipped = _difference(images.resize_lanczos(source, 224), rollout[f"{name}.jpeg_lanczos224"])
    assert skipped.mean() > 2.5


def test_resize_of_the_reference_pipeline(augmented: dict[str, np.ndarray]) -> None:
    assert _difference(images.resize_lanczos(augmented["in"], 40), augmented["resize_image_40"]).max() <= 1


def _train(image: np.ndarray, **changes: float | CropBox) -> np.ndarray:
    neutral = AugmentDraw(images.FULL_IMAGE, brightness=0.0, contrast=1.0, saturation=1.0, hue=0.0)
    return PolicyImageTransform((64, 64), AugmentRanges()).train(image, neutral._replace(**changes))


def _best(image: np.ndarray, expected: np.ndarray, name: str, values: np.ndarray) -> tuple[float, float]:
    """(mean difference, value) of the parameter value in `values` that comes closest to the reference's image."""
    found = [
        (float(_difference(_train(image, **{name: float(value)}), expected).mean()), float(value)) for value in values
    ]
    return min(found)


@pytest.mark.parametrize(
    ("operation", "low", "high"),
    [("brightness", -0.2, 0.2), ("contrast", 0.8, 1.2), ("saturation", 0.8, 1.2), ("hue", -0.05, 0.05)],
)
def test_each_color_operation(augmented: dict[str, np.ndarray], operation: str, low: float, high: float) -> None:
    # The reference's draws are unknown; one value within the range must explain its whole image.
    expected = augmented[f"only.random_{operation}"]
    coarse = _best(augmented["in"], expected, operation, np.linspace(low, high, 81))[1]
    step = (high - low) / 80
    difference, value = _best(augmented["in"], expected, operation, np.linspace(coarse - step, coarse + step, 41))
    assert low <= value <= high
    assert difference < 0.1


def test_random_crop(augmented: dict[str, np.ndarray]) -> None:
    side = 0.9**0.5
    expected = augmented["only.random_resized_crop"]
    offsets = np.linspace(0, 1 - side, 101)
    # The reference draws the offset once for both axes.
    differences = [
        _difference(_train(augmented["in"], crop=CropBox(o, o, side, side)), expected).mean() for o in offsets
    ]
    assert min(differences) < 1.0
    shifted = _train(augmented["in"], crop=CropBox(0.0, 1 - side, side, side))
    assert _difference(shifted, expected).mean() > 2.0


def test_whole_augmentation(augmented: dict[str, np.ndarray]) -> None:
    # Values found by minimizing the difference; they pin the order of the operations and the clipping between them.
    side = 0.9**0.5
    expected, image = augmented["aug_seed0"], augmented["in"]
    ranges = AugmentRanges()
    offset = np.linspace(0, 1 - side, 52)
    draw = AugmentDraw(CropBox(0.0, 0.0, side, side), 0.0, 1.0, 1.0, 0.0)
    transform = PolicyImageTransform((64, 64), ranges)

    def loss(candidate: AugmentDraw) -> float:
        return float((_difference(transform.train(image, candidate).copy(), expected) ** 2).mean())

    draw = min((draw._replace(crop=CropBox(o, o, side, side)) for o in offset), key=loss)
    spans = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.05}
    for sweep in range(12):  # coordinate descent with a shrinking step
        width = 0.7**sweep
        for name, span in spans.items():
            center = getattr(draw, name)
            values = center + span * width * np.linspace(-1, 1, 17)
            draw = min((draw._replace(**{name: float(value)}) for value in values), key=loss)
        around = np.clip(draw.crop.top + 0.02 * width * np.linspace(-1, 1, 17), 0, 1 - side)
        draw = min((draw._replace(crop=CropBox(float(o), float(o), side, side)) for o in around), key=loss)
    assert np.percentile(_difference(transform.train(image, draw), expected), 95) <= 2
    assert abs(draw.brightness) <= 0.2 and abs(draw.hue) <= 0.05
    assert 0.8 <= draw.contrast <= 1.2 and 0.8 <= draw.saturation <= 1.2
