"""Check what pip cannot install: Python's venv module and the OpenGL libraries that LIBERO renders with.

Runs before the environment exists, so it imports the standard library alone:

    python3 experiments/robot/libero/system_libraries.py [--install]

With `--install`, as root on a system with apt, what is missing is installed; otherwise the exact line to run is printed
and the exit code is 1. A shared library counts as present when it loads, EGL when a display can be opened on one of
its devices: a machine with the library but without a driver fails in the simulator, far from the cause.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys

EGL_PLATFORM_DEVICE_EXT = 0x313F
MAX_DEVICES = 16

RENDERER_PACKAGES = ("libegl1", "libegl-mesa0", "libgl1-mesa-dri")
OPENCV_LIBRARIES = {"libGL.so.1": "libgl1", "libglib-2.0.so.0": "libglib2.0-0", "libgthread-2.0.so.0": "libglib2.0-0"}


def loads(library: str) -> bool:
    """Tell whether the dynamic linker finds and loads `library`."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def egl_opens() -> bool:
    """Tell whether libEGL lists a device (a GPU or Mesa's software renderer) on which a display can be initialized."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError:
        return False
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    egl.eglGetProcAddress.argtypes = [ctypes.c_char_p]
    query_address = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    display_address = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not query_address or not display_address:
        return False
    pointer = ctypes.c_void_p
    query_type = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.POINTER(pointer), ctypes.POINTER(ctypes.c_int))
    display_type = ctypes.CFUNCTYPE(pointer, ctypes.c_uint, pointer, pointer)
    devices, count = (pointer * MAX_DEVICES)(), ctypes.c_int(0)
    if not query_type(query_address)(MAX_DEVICES, devices, ctypes.byref(count)):
        return False
    egl.eglInitialize.argtypes = [pointer, pointer, pointer]
    egl.eglTerminate.argtypes = [pointer]
    for device in devices[: count.value]:
        display = display_type(display_address)(EGL_PLATFORM_DEVICE_EXT, device, None)
        if display and egl.eglInitialize(display, None, None):
            egl.eglTerminate(display)
            return True
    return False


def renderer_present() -> bool:
    """Tell whether MuJoCo can render without a screen, by EGL or by OSMesa."""
    return egl_opens() or any(loads(name) for name in ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"))


def missing_packages() -> list[str]:
    """Debian and Ubuntu packages that provide what is missing here, in the order to install them."""
    missing = []
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        missing.append(f"python{sys.version_info.major}.{sys.version_info.minor}-venv")
    missing += [package for library, package in OPENCV_LIBRARIES.items() if not loads(library)]
    if not renderer_present():
        missing += RENDERER_PACKAGES
    return list(dict.fromkeys(missing))


def install(packages: list[str]) -> bool:
    """Install `packages` with apt; False when apt fails."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", *packages]):
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
        if done.returncode != 0:
            return False
    return True


def main() -> int:
    """Exit code 0 when nothing is missing (any more)."""
    parser = argparse.ArgumentParser(description="Check the system libraries that the LIBERO simulator needs.")
    parser.add_argument("--install", action="store_true", help="install what is missing, when root and apt is there")
    arguments = parser.parse_args()
    missing = missing_packages()
    if not missing:
        return 0
    line = f"apt-get update && apt-get install -y {' '.join(missing)}"
    if not arguments.install or os.geteuid() != 0 or shutil.which("apt-get") is None:
        print(f"system libraries are missing; run as root: {line}", file=sys.stderr)
        return 1
    print(f"Installing system libraries: {' '.join(missing)}")
    if not install(missing):
        print(f"apt could not install the system libraries; run as root and read its output: {line}", file=sys.stderr)
        return 1
    # A library installed just now may be cached as missing by this process: ask a fresh one.
    left = subprocess.run([sys.executable, __file__], check=False)
    return left.returncode


if __name__ == "__main__":
    raise SystemExit(main())
