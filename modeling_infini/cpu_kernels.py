"""
Faster linear layers on a CPU, out of PyTorch's own parts.

For products in float32 PyTorch takes MKL, which has no AVX-512 kernels for processors that are not Intel's, and reads
the weights of a single row on one core. oneDNN, which is in PyTorch as well, has both.
"""

from typing import TypeVar

import torch
from torch import nn
from torch.autograd.function import once_differentiable


Model = TypeVar("Model", bound=nn.Module)


def use_cpu_kernels(model: Model) -> Model:
    """
    Makes the linear layers of `model` [`CPULinear`], in place. Parameters, their names and what is saved stay as they
    are; PEFT and quantization know the layers as linear ones.

    Raises:
        RuntimeError: this build of PyTorch has no oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        raise RuntimeError("This build of PyTorch has no oneDNN: leave use_cpu_kernels() out.")
    for module in model.modules():
        # Other classes may compute something else.
        if type(module) is nn.Linear:
            module.__class__ = CPULinear
    return model


class CPULinear(nn.Linear):
    """
    `nn.Linear`, in the same precision: in float32 on a CPU computed by oneDNN, forward and backward. Where it is
    compiled, the product of a single row is a sum instead, which the compiler makes a pass over the weights by all
    cores. Whatever else comes, `nn.Linear` computes.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        is_on_cpu = input.device.type == self.weight.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        if not is_on_cpu or type(self.weight) is not nn.Parameter or input.dtype != self.weight.dtype:
            return super().forward(input)
        if torch.compiler.is_compiling():
            is_row = input.numel() == self.in_features and not torch.is_grad_enabled()
            return row_product(input, self.weight, self.bias) if is_row else super().forward(input)
        if input.dtype != torch.float32 or input.numel() == 0:
            return super().forward(input)
        if torch.is_grad_enabled():
            return _OneDNNProduct.apply(input, self.weight, self.bias)
        return onednn_product(input, self.weight, self.bias)


def onednn_product(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """
    `(..., before)`, `(after, before)`, `(after,)` -> `(..., after)`, all float32, by the operator that `torch.compile`
    takes for packed weights; it takes others as well.
    """
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


def row_product(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`(..., before)` of one row, `(after, before)`, `(after,)` -> `(..., after)`, summed at least in float32."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    output = (weight.to(dtype) * input.reshape(1, -1).to(dtype)).sum(-1)
    if bias is not None:
        output = output + bias
    return output.to(input.dtype).view(*input.shape[:-1], -1)


class _OneDNNProduct(torch.autograd.Function):
    @staticmethod
    def forward(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return onednn_product(input, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        input, weight, _ = inputs
        of_input, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(input if of_weight else None, weight if of_input else None)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        input, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad
        by_row = gradient.reshape(-1, gradient.shape[-1])
        return (
            onednn_product(gradient, weight.t()) if of_input else None,
            onednn_product(by_row.t(), input.reshape(-1, input.shape[-1]).t()) if of_weight else None,
            by_row.sum(0) if of_bias else None,
        )
