"""
Faster linear layers on a CPU, out of PyTorch's own parts.

For products in float32 PyTorch takes MKL, which has no AVX-512 kernels for processors that are not Intel's, and reads
the weights of a single row on one core. oneDNN, which is in PyTorch as well, has both.

`python -m benchmarks.cpu_kernels` measures what they give a model. They are for any model: this file needs torch and
transformers alone. The operator that they call is not public API of PyTorch.
"""

from typing import Any, TypeVar

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP


Model = TypeVar("Model", bound=nn.Module)
SILU = (SiLUActivation, nn.SiLU)


def use_cpu_kernels(model: Model) -> Model:
    """
    Makes the linear layers of `model` [`CPULinear`] and Llama's MLPs [`CPUMLP`], in place. Parameters, their names and
    what is saved stay as they are. PEFT knows the layers as linear ones; quantize before, not after.

    They have no second derivatives, no forward-mode ones, and no `vmap` with gradients.

    Args:
        model: any module; layers of other classes stay as they are.

    Raises:
        RuntimeError: this build of PyTorch has no oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        raise RuntimeError("This build of PyTorch has no oneDNN: leave use_cpu_kernels() out.")
    for module in model.modules():
        # Subclasses may compute something else.
        if type(module) is nn.Linear:
            module.__class__ = CPULinear
        elif type(module) is LlamaMLP and type(module.act_fn) in SILU:
            module.__class__ = CPUMLP
    return model


class CPULinear(nn.Linear):
    """
    `nn.Linear`, in the same precision: in float32 on a CPU computed by oneDNN, forward and backward. Where it is
    compiled, the product of a single row is a sum instead, which the compiler makes a pass over the weights by all
    cores. Whatever else comes, `nn.Linear` computes.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            is_row = input.numel() == self.in_features and not torch.is_grad_enabled()
            if is_row and self._is_plain(input):
                return row_product(input, self.weight, self.bias)
        elif self.is_for_onednn(input):
            product = _OneDNNProduct.apply if torch.is_grad_enabled() else onednn_product
            return product(input, self.weight, self.bias)
        return super().forward(input)

    def is_for_onednn(self, input: torch.Tensor) -> bool:
        is_product = input.shape[-1:] == (self.in_features,) and input.numel() > 0 and not torch.jit.is_tracing()
        is_float32 = input.dtype == torch.float32 and bool(torch.backends.mkldnn.enabled)
        return is_product and is_float32 and self._is_plain(input)

    def _is_plain(self, input: torch.Tensor) -> bool:
        is_on_cpu = input.device.type == self.weight.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        return is_on_cpu and type(self.weight) is nn.Parameter and input.dtype == self.weight.dtype


class CPUMLP(LlamaMLP):
    """Llama's MLP; in float32 on a CPU and without gradients, SiLU is part of a product, not a pass over memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate: Any = self.gate_proj
        is_usual = type(gate) is CPULinear and type(self.act_fn) in SILU and _is_bare(gate) and _is_bare(self.act_fn)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not is_usual or not gate.is_for_onednn(x):
            return super().forward(x)
        return self.down_proj(onednn_product(x, gate.weight, gate.bias, "swish").mul_(self.up_proj(x)))


def _is_bare(module: nn.Module) -> bool:
    """Whether nobody hooks into the module's forward pass, or has put another in its place."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def onednn_product(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "none"
) -> torch.Tensor:
    """
    `(..., before)`, `(after, before)`, `(after,)` -> `(..., after)`, all float32, by the operator that `torch.compile`
    takes for packed weights; it takes others as well.

    Args:
        activation: `"none"` or `"swish"`, as the operator names it.
    """
    # The operator takes no notice of a bias's strides.
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, activation, [], "")


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
