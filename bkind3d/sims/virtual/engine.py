"""MuJoCo and dm_control, which come with the extra `sim`, and the system library that draws without a screen."""

from __future__ import annotations

import ctypes
import importlib
import io
import os
import sys
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from bkind3d.errors import InputError

_LIBRARIES = {"egl": ("libEGL.so.1", "libGL.so.1"), "osmesa": ("libOSMesa.so.8",)}
_FAILURES = (AttributeError, ImportError, OSError, RuntimeError)  # each library fails in its own way
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
        import dm_control.mjcf  # noqa: F401
        import mujoco
    except ModuleNotFoundError as error:
        raise InputError(
            f"the virtual rig needs {error.name}, which is not installed: pip install 'bkind3d[sim]'"
        ) from None
    except _FAILURES as error:
        raise _cannot_draw(error) from error
    return mujoco


def open_drawing(model: Any, height: int, width: int) -> tuple[Any, Any]:
    """A `mujoco.GLContext` of that size, made current, and the `mujoco.MjrContext` of a model: to be freed after use.

    Raises:
        InputError: there is nothing to draw with.
    """
    mujoco = load_mujoco()
    backend = os.environ.get("MUJOCO_GL")
    model.vis.global_.offheight, model.vis.global_.offwidth = height, width
    try:
        # MuJoCo chooses when it is first imported, which may have been before MUJOCO_GL was set.
        module = importlib.import_module(f"mujoco.{backend}") if backend in _LIBRARIES else mujoco
        context = module.GLContext(width, height)
        context.make_current()
        drawing = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
    except (*_FAILURES, mujoco.FatalError) as error:
        raise _cannot_draw(error) from error
    mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, drawing)
    return context, drawing


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


def _cannot_draw(error: Exception) -> InputError:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return InputError(f"MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}: cannot draw here ({reason}). {_MEND}")
