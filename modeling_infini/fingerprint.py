"""
Which weights a model has, in a few bytes: what a memory is worth nothing without.

A fingerprint is a hash of some elements of every parameter: it costs milliseconds, and devices and shards do not
change it. Training changes nearly all elements of what it trains, but single rows of embeddings: each row is in it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.tensor import DTensor


# A tensor of no more elements is read as a whole; of others, so many groups of so many elements side by side. Their
# number is a prime: others could put all groups into the same columns.
WHOLE = 2**14
GROUPS = 257
GROUP = 8

# By these names, what compiles or checkpoints a part of a model holds it.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
# What PEFT's modules have, which stand around those that they change.
PEFTS_OWN = "adapter_layer_names"
# Modules whose weights are no tensors, or have scales beside them that move as they are used.
OPAQUE = ("torch.ao.nn.quantized", "bitsandbytes")


@dataclass
class WeightsId:
    """
    Which weights made a memory.

    Attributes:
        fingerprint: of the weights; `None`: of several, or of some that have none.
        model: a name for the model, of all in this process, that has used it last; `None` if none has.
    """

    fingerprint: str | None
    model: str | None

    @classmethod
    @torch.compiler.disable
    @torch.no_grad()
    def of(cls, model: nn.Module, is_step: bool = False, anew: bool = False) -> "WeightsId":
        """
        The id of `model`'s weights, made where they have changed since the last time. What was written through
        `.data`, which counts no versions, shows if it is in the first elements of a parameter.

        Args:
            is_step: whether microseconds matter. Then, elements are not looked at.
            anew: whether it is made in any case.
        """
        known = _known.get(model)
        if known is None or anew or not known.holds(is_step):
            _known[model] = known = _Known(model)
        return cls(known.fingerprint, name_of(model))

    def refusal(self, current: "WeightsId", holder: str) -> str:
        """What to tell who would use with the `current` weights what these have made; `holder` names it."""
        verb, made = "may belong", f"The weights {str(self.fingerprint)[:16]} made it, and"
        if self.fingerprint is None:
            made = (
                "It is not known which weights made it: the model was in training mode (call model.eval() before it "
                "reads) or compiled, or its weights have no fingerprint"
            )
        elif current.fingerprint is None:
            made += " those of this model have no fingerprint"
        else:
            verb, made = "belongs", f"{made} this model has {current.fingerprint[:16]}"
        return (
            f"{holder} {verb} to other weights. {made}. To weights that did not make it (another checkpoint, "
            "trained since, other adapters, another dtype) a memory means something else: use the model that made it, "
            "or read the text again. To use it all the same, load it with InfiniCache.from_pretrained(..., "
            "allow_other_weights=True), or set cache.allow_other_weights = True."
        )


_names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_known: WeakKeyDictionary[nn.Module, "_Known"] = WeakKeyDictionary()


def name_of(model: nn.Module) -> str:
    """A name for `model`, of all that there are in this process."""
    return _names.setdefault(model, uuid4().hex)


class _Known:
    """The fingerprint of a model, and what a change of its weights shows in without a look at all of them."""

    def __init__(self, model: nn.Module):
        # What is offloaded comes and goes as other tensors, and is not trained.
        modules = [m for m in model.modules() if _offloaded(m) is None]
        self.members = [of for m in modules for of in (m._modules, m._parameters, m._buffers) if of]
        self.tuners = [m for m in modules if hasattr(m, PEFTS_OWN)]
        self.stamps, self.elements = self._stamps(), self._elements()
        # Last: what is written meanwhile is noticed the next time.
        self.fingerprint = _fingerprint(model)

    def holds(self, is_step: bool) -> bool:
        return self._stamps() == self.stamps and (is_step or all(map(torch.equal, self._elements(), self.elements)))

    def _stamps(self) -> list:
        stamps: list = []
        for members in self.members:
            stamps += members
            for member in members.values():
                stamps.append(id(member))
                if isinstance(member, torch.Tensor):
                    stamps += (member.data_ptr(), 0 if member.is_inference() else member._version)
        for tuner in self.tuners:
            stamps += (tuner.disable_adapters, [*tuner.active_adapters], [*getattr(tuner, "merged_adapters", ())])
            stamps += getattr(tuner, "scaling", {}).items()
        return stamps

    def _elements(self) -> list[torch.Tensor]:
        """The bytes of the first elements of each parameter; of none where some are sharded."""
        found: dict[torch.device, list[torch.Tensor]] = {}
        for member in (member for members in self.members for member in members.values()):
            if isinstance(member, DTensor):
                return []
            if type(member) is nn.Parameter and not member.is_meta:
                first = member.as_strided((min(member.numel(), GROUP),), (1,))
                found.setdefault(member.device, []).append(first.view(torch.uint8))
        return [torch.cat(first) for first in found.values()]


def _fingerprint(model: nn.Module) -> str | None:
    """`None` where weights are on the meta device, or in a class that does not say what its elements are."""
    digest = hashlib.sha256()
    try:
        for name, weight, every_row in _weights(model, ""):
            _look_at(weight, name, every_row, digest)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return None
    return digest.hexdigest()


def fingerprint_of_frozen(model: nn.Module) -> str:
    """Of the parameters that are not trained, by their names."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            _look_at(parameter.detach(), name, False, digest)
    return digest.hexdigest()


def _weights(module: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """What `module` computes with: name, tensor, and whether each row counts."""
    if type(module).__module__.startswith(OPAQUE):
        raise TypeError(f"Weights of {type(module).__name__} cannot be looked at.")
    if hasattr(module, PEFTS_OWN):
        yield from _adapted_weights(getattr(module, "token_adapter", module), prefix)
        return
    offloaded = _offloaded(module)
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name not in module._non_persistent_buffers_set:
            is_here = offloaded is None or not tensor.is_meta
            yield prefix + name, tensor if is_here else offloaded[name], isinstance(module, nn.Embedding)
    for name, child in module._modules.items():
        if child is not None:
            yield from _weights(child, prefix if name in WRAPPED else f"{prefix}{name}.")


def _adapted_weights(module: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """As [`_weights`], of one of PEFT's modules. Its adapters are numbered, not named."""
    active = [] if module.disable_adapters or getattr(module, "merged", False) else list(module.active_adapters)
    if (saved := getattr(module, "modules_to_save", None)) is not None:
        yield from _weights(next((saved[name] for name in active if name in saved), module.original_module), prefix)
        return
    yield from _weights(module.base_layer, prefix)
    for index, adapter in enumerate(active):
        scaling = float(getattr(module, "scaling", {}).get(adapter, 1.0))
        for layers in module.adapter_layer_names:
            if adapter in (parts := getattr(module, layers)):
                name, part = f"{prefix}{layers}.{index} x {scaling}.", parts[adapter]
                yield from _weights(part, name) if isinstance(part, nn.Module) else [(name, part, False)]


def hooks_of(module: nn.Module) -> Sequence[Any]:
    """What accelerate runs before and after a module, if anything."""
    hook = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", (hook,))


def _offloaded(module: nn.Module) -> Any:
    """The weights of `module` by name where accelerate keeps them on a CPU or a disk, between its calls."""
    maps = (getattr(hook, "weights_map", None) for hook in hooks_of(module))
    return next((weights for weights in maps if weights is not None), None)


def some_elements(tensor: torch.Tensor, every_row: bool) -> torch.Tensor:
    """Those of a tensor that a fingerprint has: all of a small one, of others some of each part, or of each row."""
    elements = tensor.contiguous().view(-1)
    if (length := len(elements)) > WHOLE:
        # From row to row, a group stands elsewhere.
        step = max(tensor.shape[-1] - GROUP if every_row else length // GROUPS, GROUP)
        elements = elements.unfold(0, GROUP, step)
    return elements


def _look_at(tensor: torch.Tensor, name: str, every_row: bool, digest: Any) -> None:
    """Puts the bytes of some elements into the digest."""
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    if hasattr(tensor, "__tensor_flatten__"):
        for part in tensor.__tensor_flatten__()[0]:
            _look_at(getattr(tensor, part), f"{name}.{part}", every_row, digest)
        return
    elements = some_elements(tensor, every_row)
    # At least float32, since some loaders keep gates in it and others do not.
    is_short = elements.is_floating_point() and elements.itemsize < 4
    # A copy, since the storage of what NumPy has seen cannot be resized, as FSDP does with that of parameters.
    copied = elements.to("cpu", torch.float32 if is_short else elements.dtype, copy=True)
    digest.update(f"{name} {tuple(tensor.shape)}".encode())
    digest.update(copied.reshape(-1).view(torch.uint8).numpy().data)
