"""Triton's compiler on the calls that fused tails make of their kernels, for GPUs that need not be there."""

from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from timm_eca.fused import gpu
from timm_eca.fused.formula import TailWeights


class Call(NamedTuple):
    kernel: Any
    arguments: dict[str, Any]


def calls_of(z: Tensor, weights: TailWeights) -> list[Call]:
    """The calls of a forward and a backward pass; nothing is computed."""
    calls: list[Call] = []

    class Noted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            names = self.kernel.arg_names
            return lambda *args, **kwargs: calls.append(Call(self.kernel, {**dict(zip(names, args)), **kwargs}))

    kernels = gpu._kernels()
    noted = mock.Mock(**{name: Noted(getattr(kernels, name)) for name in kernels.__all__})
    with mock.patch.object(gpu, "_kernels", return_value=noted):
        out, pooled, moments = gpu.forward(z, z, weights, relu=True, inplace=False)
        given = weights._replace(moments=moments)
        gpu.backward(z, out, z, pooled, given, [True] * 5 + [weights.moments is None])
    return calls


def compiled(call: Call, capability: int) -> Any:
    """What the compiler makes of a call for GPUs of a compute capability, specialized as it is when it is launched."""
    signature, constants, attributes = {}, {}, {}
    constant = {parameter.name for parameter in call.kernel.params if parameter.is_constexpr}
    for index, name in enumerate(call.kernel.arg_names):
        value = call.arguments[name]
        if name in constant or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = mangle_type(value)
            if (value.data_ptr() if isinstance(value, torch.Tensor) else value) % 16 == 0:
                attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(call.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))
