"""
What the requests' layers keep, in vLLM's pages: a request has one page in each layer, with all states of that layer.

The states are those of an `InfiniCacheLayer`, and so is what a call does to them.
"""

import torch

from modeling_infini import InfiniConfig
from modeling_infini.cache_layer import InfiniCacheLayer
from modeling_infini.streams import DecodeLayout


def states_of_page(config: InfiniConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """
    The states of a page by name, on the meta device: those that any layer has, since pages are of one size. The widest
    come first, so that each stands where its dtype can be read.
    """
    layer = InfiniCacheLayer(config, layer_idx=0)
    layer.has_memory, layer.has_slots = bool(config.layers_with_memory), bool(config.layers_with_slots)
    keys = torch.empty(1, config.num_key_value_heads, 1, config.head_dim, dtype=dtype, device="meta")
    layer.lazy_initialization(keys, keys)
    # Places of tokens: 8 bytes would not stand everywhere.
    states = {name: of[0].int() if of.dtype == torch.long else of[0] for name, of in layer.states().items()}
    return dict(sorted(states.items(), key=lambda item: -item[1].element_size()))


class PagedDecodeLayout(DecodeLayout):
    """One token of each of B requests, whose states stand in `pages` `(B,)`: rings are written where they are."""

    def __init__(self, tokens_read: torch.Tensor, config: InfiniConfig, pages: torch.Tensor):
        super().__init__(None, None, tokens_read, config)
        self._pages, self._rows = pages, pages.unsqueeze(1)

    def update(self, states, slots):
        return super().update(states, slots)[self._pages]

    def first_states(self, states):
        return states[self._pages]


class PagedLayer(InfiniCacheLayer):
    """
    The states of a layer, for the requests of a call.

    Args:
        pages: of all requests, by name, `(pages, ...)`.
        requests: the pages of the call's requests: a slice, or `(B,)` with a [`PagedDecodeLayout`].
    """

    def __init__(
        self, config: InfiniConfig, layer_idx: int, pages: dict[str, torch.Tensor], requests: slice | torch.Tensor
    ):
        super().__init__(config, layer_idx)
        self.pages, self.requests = pages, requests
        for name, page in pages.items():
            setattr(self, name, page[requests] if isinstance(requests, slice) else page)
        self.is_initialized = True

    def update(self, states, layout):
        before = self.states()
        found = super().update(states, layout)
        for name, state in self.states().items():
            # What is not new was written in place.
            if state is not before[name]:
                self.pages[name][self.requests] = state.to(self.pages[name].dtype)
        return found
