"""Triton's compiler on the calls that fused tails make of their kernels, for GPUs that need not be there."""

import re
import subprocess
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from timm_eca.fused import gpu
from timm_eca.fused.formula import Moments, Norm, TailWeights


class Call(NamedTuple):
    kernel: Any
    arguments: dict[str, Any]


def report(capability: int, dtype: torch.dtype) -> None:
    """Compile every kernel, and print for each the bytes of its stack and whether it moves 16 bytes at a time."""
    for layout in (torch.contiguous_format, torch.channels_last):
        z = torch.empty(2, 64, 8, 8, dtype=dtype).contiguous(memory_format=layout)
        for of_batch in (True, False):
            for call in calls_of(z, weights_of(64, of_batch)):
                kernel = compiled(call, capability)
                wide = all(f"{way}.global.v4" in kernel.asm["ptx"] for way in ("ld", "st"))
                print(call.kernel.__name__, stack_of(kernel), wide)


def weights_of(channels: int, of_batch: bool) -> TailWeights:
    one = torch.ones(channels)
    moments = None if of_batch else Moments(one, one)
    norm = None if of_batch else Norm(one, one, one, one, 1e-5)
    return TailWeights(torch.ones(1, 1, 3), torch.sigmoid, one, one, moments, None, None, 1e-5, norm)


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


def stack_of(kernel: Any) -> int:
    """Bytes that a compiled kernel keeps in memory because its registers do not suffice."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (size,) = re.findall(r"STACK:(\d+)", told)
    return int(size)
