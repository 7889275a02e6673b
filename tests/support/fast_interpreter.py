"""Triton's interpreter without what costs half of its time and changes no result."""

import contextlib
import dataclasses
import types

import numpy as np
import pytest
import triton

CONVERT = triton.runtime.interpreter._convert_float


def halves(data, source, target, rounding):
    """bfloat16 is the upper half of float32, but for what the interpreter makes of subnormals."""
    names = source.name, target.name
    if rounding is not None or names not in (("bf16", "fp32"), ("fp32", "bf16")):
        return CONVERT(data, source, target, rounding)
    bits = np.ascontiguousarray(data).reshape(data.shape)
    bits = bits.view(np.uint32 if names[0] == "fp32" else np.uint16)
    exponent = 0x7F800000 if names[0] == "fp32" else 0x7F80
    if ((bits & exponent == 0) & (bits << 1 != 0)).any():
        return CONVERT(data, source, target, rounding)
    return (bits >> 16).astype(np.uint16) if names[0] == "fp32" else bits.astype(np.uint32) << 16


@contextlib.contextmanager
def faster():
    """Triton's interpreter without what costs half of its time and changes no result."""
    interpreter, core = triton.runtime.interpreter, triton.language.core
    block_parts, tensor_parts = core.block_type.__init__, core.tensor.__init__
    builder, replace = interpreter.InterpreterBuilder, interpreter._patch_lang
    product, np_dtype = builder.create_dot, interpreter._get_np_dtype
    replaced, np_dtypes, blocks, shapes = [], {}, {}, {}

    def once(function):
        """At every call of a kernel it looks for Triton's functions, replaces them and puts them
        back: here they stay, for this process does nothing else."""
        if not any(function.__globals__ is seen for seen in replaced):
            replace(function)
            replaced.append(function.__globals__)
        return types.SimpleNamespace(restore=lambda: None)

    def of_table(kind):
        """It makes its table of all dtypes at every call."""
        name = kind.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = np_dtype(kind)
        return np_dtypes[name]

    def block(self, element_ty, shape):
        """Types of one shape and of the same elements have the same parts."""
        key = (element_ty.name, *shape)
        if key in blocks:
            self.__dict__.update(blocks[key])
        else:
            block_parts(self, element_ty, shape)
            blocks[key] = dict(self.__dict__)

    def tensor(self, handle, kind):
        """Tensors of one type have the same shape."""
        if kind.name not in shapes:
            tensor_parts(self, handle, kind)
            shapes[kind.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.shape, self.numel = shapes[kind.name]

    def create_dot(self, a, b, c, *options):
        """NumPy multiplies integers one by one; float64 goes to BLAS, and is exact here."""
        if not (a.data.dtype == b.data.dtype == np.int8 and c.data.dtype == np.int32):
            return product(self, a, b, c, *options)
        exact = (a.data.astype(np.float64) @ b.data.astype(np.float64)).astype(np.int32)
        return interpreter.TensorHandle(exact + c.data, c.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        patch.setattr(interpreter, "_get_np_dtype", of_table)
        patch.setattr(interpreter, "_convert_float", halves)
        patch.setattr(builder, "create_dot", create_dot)
        patch.setattr(core.block_type, "__init__", block)
        patch.setattr(core.tensor, "__init__", tensor)
        overflow_is_watched(patch, False)
        yield


def overflow_is_watched(patch, watched):
    """Whether each sum and product of int32 is made in int64 too, and compared."""
    builder = triton.runtime.interpreter.interpreter_builder
    options = dataclasses.replace(builder.options, sanitize_overflow=watched)
    patch.setattr(builder, "options", options)
