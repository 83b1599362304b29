"""Triton's interpreter, as the tests need it: rounding as a GPU does, and without work that it does over and over.

What is computed is the same. Of a kernel's time in the interpreter more than half went into these.
"""

import functools
from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter

_convert_float = interpreter._convert_float
_get_np_dtype = interpreter._get_np_dtype
_block_type = tl.block_type.__init__
_tensor = tl.tensor.__init__
_dtypes: dict[str, Any] = {}
_shapes: dict[Any, dict[str, Any]] = {}
_sides: dict[Any, dict[str, Any]] = {}


def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    """The interpreter cuts float32 to bfloat16 off; a GPU rounds."""
    if (source.name, target.name) != ("fp32", "bf16"):
        return _convert_float(data, source, target, rounding)
    return torch.from_numpy(data.copy()).to(torch.bfloat16).view(torch.uint16).numpy()


def call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The interpreter looks through the whole language in each call, though the launch has replaced its functions."""
    languages = [value for value in self.fn.__globals__.values() if value is tl or value is tl.core]
    if any(tl.core.is_builtin(language.load) for language in languages):
        interpreter._patch_lang(self.fn)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def get_np_dtype(dtype: Any) -> Any:
    """The interpreter makes the table of all types each time."""
    element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    if element.name not in _dtypes:
        _dtypes[element.name] = _get_np_dtype(element)
    return _dtypes[element.name]


def init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    """A type of the same shape and elements has been checked and named before."""
    key = (element_ty.name, *(getattr(side, "value", side) for side in shape))
    if key not in _shapes:
        _block_type(self, element_ty, shape)
        _shapes[key] = {name: value for name, value in vars(self).items() if name != "element_ty"}
    vars(self).update(_shapes[key], element_ty=element_ty)


def init_tuple(self: Any, args: Any, type: Any = None) -> None:
    """The type of a tuple is that of its values: worked out where it is asked for."""
    self.values = list(args)
    if type is not None:
        self.type = type if isinstance(type, tl.core.tuple_type) else tl.core.tuple_type(type)


def init_tensor(self: Any, handle: Any, type: Any) -> None:
    """Sides and number of elements as constants of the language: once for each shape."""
    shape = type.shape if type.is_block() else ()
    if shape not in _sides:
        _tensor(self, handle, type)
        _sides[shape] = {"shape": self.shape, "numel": self.numel}
    vars(self).update(_sides[shape], handle=handle, type=type, dtype=type.scalar)


def install() -> None:
    """Put these in place of Triton's own."""
    interpreter._convert_float = convert_float
    interpreter.InterpretedFunction.__call__ = call_device_function
    interpreter._get_np_dtype = get_np_dtype
    tl.block_type.__init__ = init_block_type
    tl.tensor.__init__ = init_tensor
    tl.tuple.__init__ = init_tuple
    tl.tuple.type = functools.cached_property(lambda self: tl.core._type_for_tuple_values(self.values))
    tl.tuple.type.__set_name__(tl.tuple, "type")
