"""MuJoCo and dm_control, which come with the extra `sim`, and the system library that draws without a screen."""

from __future__ import annotations

import ctypes
import io
import os
import sys
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from bkind3d.errors import InputError

_LIBRARIES = {"egl": ("libEGL.so.1", "libOpenGL.so.0"), "osmesa": ("libOSMesa.so.8",)}
_MEND = (
    "MuJoCo finds no library to draw without a screen; on Debian: apt-get install libegl1 libgl1 libgl1-mesa-dri, or "
    "apt-get install libosmesa6"
)


def load_mujoco() -> ModuleType:
    """The module `mujoco`, set to draw off the screen: as MUJOCO_GL says, else with EGL, else with OSMesa.

    Raises:
        InputError: the extra is not installed, or Linux has neither library.
    """
    if "MUJOCO_GL" not in os.environ and sys.platform == "linux":
        os.environ["MUJOCO_GL"] = _offscreen()
    try:
        import dm_control  # noqa: F401
        import mujoco
    except ModuleNotFoundError as error:
        raise InputError(
            f"the virtual rig needs {error.name}, which is not installed: pip install 'bkind3d[sim]'"
        ) from None
    return mujoco


def open_context(height: int, width: int) -> Any:
    """A `mujoco.GLContext` for pictures of that size, made current; to be freed after use.

    Raises:
        InputError: there is nothing to draw with.
    """
    try:
        context = load_mujoco().GLContext(width, height)
        context.make_current()
        return context
    except (AttributeError, ImportError, RuntimeError, OSError) as error:  # each backend fails in its own way
        backend = os.environ.get("MUJOCO_GL", "the default")
        raise InputError(f"MUJOCO_GL: {backend} cannot draw here ({_first_line(error)}). {_MEND}") from error


def picture_asset(picture: np.ndarray) -> Any:
    """A picture (H, W, 3) uint8 as a file of dm_control's models."""
    from dm_control import mjcf

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return mjcf.Asset(buffer.getvalue(), ".png")


def _offscreen() -> str:
    for backend, libraries in _LIBRARIES.items():
        if all(_loads(library) for library in libraries):
            return backend
    raise InputError(_MEND)


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
