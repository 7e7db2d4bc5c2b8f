"""Which GPU each process of a distributed evaluation draws on."""

from __future__ import annotations

import os

import pytest

from experiments.robot.libero.simulator.rendering import _draw_on_own_gpu, choose_renderer

SOFTWARE, GPU = b"EGL_MESA_device_software", b"EGL_NV_device_cuda EGL_EXT_device_drm"


@pytest.mark.parametrize(
    ("devices", "broken", "rank", "expected"),
    [
        ([GPU, GPU, GPU, SOFTWARE], (), 0, "0"),
        ([GPU, GPU, GPU, SOFTWARE], (), 2, "2"),
        ([GPU, GPU, SOFTWARE], (), 3, "1"),
        ([SOFTWARE, GPU, GPU], (), 0, "1"),
        ([GPU, GPU], ("1",), 1, "0"),
        ([GPU, GPU], ("0", "1"), 1, None),
        ([GPU, SOFTWARE], (), 1, None),
        ([SOFTWARE], (), 1, None),
    ],
)
def test_every_rank_draws_on_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, devices: list[bytes], broken: tuple[str, ...], rank: int, expected: str | None
) -> None:
    """A device is what EGL says of it here; `broken` ones are listed, but do not start."""
    if choose_renderer() != "egl":
        pytest.skip("MUJOCO_GL names another renderer than EGL")
    from mujoco import egl
    from OpenGL.EGL.EXT import device_query

    def start() -> object:
        return egl.EGL.EGL_NO_DISPLAY if os.environ["MUJOCO_EGL_DEVICE_ID"] in broken else object()

    monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID", raising=False)
    monkeypatch.setattr(egl.EGL, "eglQueryDevicesEXT", lambda: devices)
    monkeypatch.setattr(device_query, "eglQueryDeviceStringEXT", lambda device, name: device)
    monkeypatch.setattr(egl, "create_initialized_egl_device_display", start)
    _draw_on_own_gpu(rank)
    chosen = os.environ.get("MUJOCO_EGL_DEVICE_ID")
    monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID", raising=False)
    assert chosen == expected


def test_a_gpu_that_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "5")
    _draw_on_own_gpu(0)
    assert os.environ["MUJOCO_EGL_DEVICE_ID"] == "5"
