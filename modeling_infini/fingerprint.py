"""
Which weights a model has, in a few bytes: what a memory is worth nothing without.

A fingerprint is a hash of some elements of every parameter, at fixed places of the whole tensor, so that it costs
milliseconds and does not depend on devices or sharding. Training changes nearly all elements of what it trains; of an
embedding it may change single rows, so that each row is in it.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import uuid4
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate


# A tensor of no more elements is read as a whole; of others, so many groups of so many elements side by side. A prime,
# lest all groups stand in the same columns.
WHOLE = 2**14
GROUPS = 257
GROUP = 8

# By these names, what compiles or checkpoints a part of a model holds it.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Weights:
    """
    What a memory was made by.

    Attributes:
        fingerprint: of the weights; `None`: of several, or of some that have none.
        model: a name for the model, of all in this process, that has used it last; `None` if none has.
    """

    fingerprint: str | None
    model: str | None

    def refusal(self, current: "Weights", holder: str) -> str:
        """What to tell who would use with the `current` weights what these have made; `holder` names it."""
        verb = "may belong"
        if self.fingerprint is None:
            made = (
                "It is not known which weights made it: the model was in training mode (call model.eval() before it "
                "reads) or compiled, or its weights have no fingerprint"
            )
        elif current.fingerprint is None:
            made = f"The weights {self.fingerprint[:16]} made it, and those of this model have no fingerprint"
        else:
            verb = "belongs"
            made = f"The weights {self.fingerprint[:16]} made it, and this model has {current.fingerprint[:16]}"
        return (
            f"{holder} {verb} to other weights. {made}. To weights that did not make it (another checkpoint, "
            "trained since, other adapters, another dtype) a memory means something else: use the model that made it, "
            "or read the text again. To use it all the same, load it with InfiniCache.from_pretrained(..., "
            "allow_other_weights=True), or set cache.allow_other_weights = True."
        )


class _Known(NamedTuple):
    """The fingerprint of a model while `parts` of it, and `values` in them, are as they were."""

    parts: "_Parts"
    stamps: list
    values: list[torch.Tensor]
    fingerprint: str | None


_names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def name_of(model: nn.Module) -> str:
    """A name for `model`, of all that there are in this process."""
    return _names.setdefault(model, uuid4().hex)


@torch.compiler.disable
@torch.no_grad()
def weights_fingerprint(model: nn.Module, is_step: bool = False) -> str | None:
    """
    A hash of what `model` computes with, made anew only where something has changed since the last time. What was
    written through `.data`, which counts no versions, shows if it is in the first elements of a parameter.

    Args:
        is_step: whether microseconds matter. Then, elements are not looked at.

    Returns:
        The fingerprint; `None` where the weights have none: on the meta device, or in a class of tensors that does not
        say what its elements are.
    """
    known = _known.get(model)
    if known is not None and known.parts.stamps() == known.stamps:
        values = known.values if is_step else known.parts.values()
        if len(values) == len(known.values) and all(map(torch.equal, values, known.values)):
            return known.fingerprint
    parts = _Parts(model)
    # The fingerprint last: what is written meanwhile is noticed the next time.
    _known[model] = known = _Known(parts, parts.stamps(), parts.values(), _fingerprint(model))
    return known.fingerprint


def new_fingerprint(model: nn.Module) -> str | None:
    """As [`weights_fingerprint`], made anew."""
    _known.pop(model, None)
    return weights_fingerprint(model)


class _Parts:
    """What a change of the weights shows in, without a look at all of them."""

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        # What is offloaded comes and goes as other tensors, and is not trained.
        self.parameters = [m._parameters for m in modules if m._parameters and _offloaded(m) is None]
        # Pruning keeps its masks in buffers, and moves the weights to another name.
        self.buffers = [m._buffers for m in modules if m._buffers.keys() - m._non_persistent_buffers_set]
        self.children = [m._modules for m in modules if m._modules]
        self.tuners = [m for m in modules if _is_tuner(m)]

    def stamps(self) -> list:
        stamps: list = []
        for buffers in self.buffers:
            stamps += ((name, id(buffer), _version(buffer)) for name, buffer in buffers.items() if buffer is not None)
        for parameters in self.parameters:
            stamps += parameters
            for parameter in parameters.values():
                if type(parameter) is nn.Parameter:
                    stamps += (id(parameter), parameter.data_ptr(), _version(parameter))
                elif parameter is not None:
                    stamps += (id(parameter), _version(parameter))
        for children in self.children:
            stamps += map(id, children.values())
        stamps += map(_tuner_state, self.tuners)
        return stamps

    def values(self) -> list[torch.Tensor]:
        """The first elements of each parameter; of none where some are sharded."""
        found: dict[Any, list[torch.Tensor]] = {}
        for parameters in self.parameters:
            for parameter in parameters.values():
                if isinstance(parameter, DTensor):
                    return []
                if type(parameter) is nn.Parameter and parameter.device.type != "meta" and parameter.numel() > 0:
                    first = parameter.as_strided((min(parameter.numel(), GROUP),), (1,))
                    of_kind = found.setdefault((parameter.device, parameter.dtype), [])
                    of_kind.append(first.view(INTEGERS[parameter.itemsize]))
        return [torch.cat(first) for first in found.values()]


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _fingerprint(model: nn.Module) -> str | None:
    # Tensors that are read from a disk are not kept.
    samples: list[tuple[str, torch.Tensor]] = []
    shards: list[tuple[DTensor, torch.Tensor]] = []
    try:
        for name, tensor, every_row in _weights(model, ""):
            for suffix, part in _plain_tensors(tensor):
                bits = _samples(part, every_row)
                samples.append((f"{name}{suffix} {_bits_dtype(part)} {tuple(part.shape)}", bits))
                if isinstance(part, DTensor):
                    shards.append((part, bits))
        whole = _gathered(shards)
        digest = hashlib.sha256()
        for label, bits in samples:
            digest.update(label.encode())
            digest.update(whole.get(id(bits), bits).cpu().numpy().data)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return None
    return digest.hexdigest()


def _weights(module: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """What `module` computes with: name, tensor, and whether each row counts. Adapters are numbered, not named."""
    if _is_tuner(module):
        active = [] if module.disable_adapters or getattr(module, "merged", False) else list(module.active_adapters)
        if hasattr(module, "modules_to_save"):
            saved = module.modules_to_save
            yield from _weights(
                next((saved[name] for name in active if name in saved), module.original_module), prefix
            )
            return
        if hasattr(module, "token_adapter"):
            yield from _weights(module.token_adapter, prefix)
            return
        yield from _weights(module.base_layer, prefix)
        for index, adapter in enumerate(active):
            for layers in module.adapter_layer_names:
                part = getattr(module, layers)
                if adapter not in part:
                    continue
                name = f"{prefix}{layers}.{index}."
                if isinstance(part[adapter], nn.Module):
                    yield from _weights(part[adapter], name)
                else:
                    yield name, part[adapter], False
            scaling = getattr(module, "scaling", {}).get(adapter, 1.0)
            yield f"{prefix}scaling.{index}", torch.tensor(float(scaling), dtype=torch.float64), False
        return
    if type(module).__module__.startswith("torch.ao.nn.quantized"):
        raise TypeError("Packed weights are no tensors.")
    offloaded = _offloaded(module)
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None or name in module._non_persistent_buffers_set:
            continue
        if offloaded is not None and tensor.device.type == "meta":
            tensor = offloaded[name]
        yield prefix + name, tensor, isinstance(module, nn.Embedding)
    for name, child in module._modules.items():
        if child is not None:
            yield from _weights(child, prefix if name in WRAPPED else f"{prefix}{name}.")


def _is_tuner(module: nn.Module) -> bool:
    """Whether `module` is one of PEFT's, which stand around those that they change."""
    return hasattr(module, "adapter_layer_names")


def _tuner_state(module: Any) -> tuple:
    merged = tuple(getattr(module, "merged_adapters", ()))
    scaling = tuple(getattr(module, "scaling", {}).items())
    return module.disable_adapters, tuple(module.active_adapters), merged, scaling


def _offloaded(module: nn.Module) -> Any:
    """The weights of `module` by name where accelerate keeps them on a CPU or a disk, between its calls."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    maps = (getattr(each, "weights_map", None) for each in hooks)
    return next((weights for weights in maps if weights is not None), None)


def _plain_tensors(tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """What a tensor is made of: itself, or the parts of a quantized one."""
    if type(tensor).__module__.startswith("bitsandbytes"):
        raise TypeError("Scales stand beside these tensors, and move as they are used.")
    if isinstance(tensor, DTensor) or not hasattr(tensor, "__tensor_flatten__"):
        yield "", tensor.detach()
        return
    for name in tensor.__tensor_flatten__()[0]:
        for suffix, part in _plain_tensors(getattr(tensor, name)):
            yield f".{name}{suffix}", part


def _places(shape: torch.Size, every_row: bool) -> tuple[int, int, int]:
    """Which elements of a flat tensor of `shape` are looked at: number of groups, distance and size of them."""
    length = shape.numel()
    if length <= WHOLE:
        return 1, length, length
    # From row to row, a group stands elsewhere.
    step = max(shape[-1] - GROUP if every_row else length // GROUPS, GROUP)
    return (length - GROUP) // step + 1, step, GROUP


def _samples(tensor: torch.Tensor, every_row: bool) -> torch.Tensor:
    """The bits of some elements; of a sharded tensor, with 0 for those of other processes, in int64."""
    groups, step, size = _places(tensor.shape, every_row)
    if not isinstance(tensor, DTensor):
        return _bits(tensor.contiguous().view(-1).as_strided((groups, size), (step, 1)))
    # Private, so that a version of torch without it lacks no more than this.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local = tensor.to_local()
    places = torch.arange(groups, device=local.device).unsqueeze(1) * step + torch.arange(size, device=local.device)
    sizes, starts = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    indices = [index - start for index, start in zip(torch.unravel_index(places.flatten(), tensor.shape), starts)]
    is_here = torch.stack([(index >= 0) & (index < length) for index, length in zip(indices, sizes)]).all(0)
    bits = torch.zeros(is_here.shape, dtype=torch.int64, device=local.device)
    bits[is_here] = _bits(local[tuple(index[is_here] for index in indices)]).long()
    return bits


def _bits(elements: torch.Tensor) -> torch.Tensor:
    # At least float32, since some loaders keep gates in it and others do not.
    is_short = elements.is_floating_point() and elements.itemsize < 4
    # A copy, since the storage of what NumPy has seen cannot be resized, as FSDP does with that of parameters.
    copied = elements.float() if is_short else elements.clone(memory_format=torch.contiguous_format)
    return copied.view(_bits_dtype(elements))


def _bits_dtype(tensor: torch.Tensor) -> torch.dtype:
    return INTEGERS[max(tensor.itemsize, 4) if tensor.is_floating_point() else tensor.itemsize]


def _gathered(shards: list[tuple[DTensor, torch.Tensor]]) -> dict[int, torch.Tensor]:
    """The samples of sharded tensors as those of whole ones, by the `id` of those that this process has."""
    kinds: dict[Any, list[tuple[DTensor, torch.Tensor]]] = {}
    for tensor, bits in shards:
        placements = tuple(Partial() if placement.is_shard() else Replicate() for placement in tensor.placements)
        kinds.setdefault((tensor.device_mesh, placements), []).append((tensor, bits))
    whole: dict[int, torch.Tensor] = {}
    for (mesh, placements), members in kinds.items():
        here = torch.cat([bits for _, bits in members])
        total = DTensor.from_local(here, mesh, placements, run_check=False).full_tensor()
        for (tensor, bits), found in zip(members, total.split([len(bits) for _, bits in members])):
            whole[id(bits)] = found.to(_bits_dtype(tensor))
    return whole
