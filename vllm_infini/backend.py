"""What a step of the engine reads: the tokens of its requests, as calls of the model."""

import copy
from typing import NamedTuple

import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor, split_decodes_and_prefills
from vllm.v1.kv_cache_interface import MambaSpec

from modeling_infini import InfiniConfig
from modeling_infini.local_attention import RotaryAngles, angle_table, angles_of_call, local_attention_mask
from modeling_infini.streams import AlignedLayout, DecodeLayout

from .settings import BACKEND
from .states import PagedDecodeLayout


class Call(NamedTuple):
    """
    Tokens of a step that are read at once: one of each request that generates, or a piece of a prompt.

    Attributes:
        tokens: which tokens of the step they are.
        shape: `(B, T)`.
        requests: the pages of the B requests.
        layout, angles, mask: as a layer of the model takes them.
    """

    tokens: slice
    shape: tuple[int, int]
    requests: slice | torch.Tensor
    layout: DecodeLayout | AlignedLayout
    angles: RotaryAngles
    mask: torch.Tensor | None


class Step(NamedTuple):
    """
    Attributes:
        calls: of all tokens of the step.
        new_requests: pages of the requests that have read nothing; others have left their states there.
    """

    calls: list[Call]
    new_requests: torch.Tensor


def serving_config(config: InfiniConfig, tensor_parallel_size: int = 1) -> InfiniConfig:
    """A copy for what one process computes: with its own heads."""
    own = copy.deepcopy(config)
    own.num_attention_heads //= tensor_parallel_size
    own.num_key_value_heads //= tensor_parallel_size
    own._attn_implementation = "sdpa"
    return own


class InfiniBackend(AttentionBackend):
    @staticmethod
    def get_name() -> str:
        return BACKEND

    @staticmethod
    def get_builder_cls() -> type["StepBuilder"]:
        return StepBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


class StepBuilder(AttentionMetadataBuilder[Step]):
    # vLLM puts requests with one token in front of the others.
    reorder_batch_threshold = 1
    kv_cache_spec: MambaSpec

    def __init__(
        self, kv_cache_spec: MambaSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.config = serving_config(vllm_config.model_config.hf_config)
        self.states = torch.empty(0, dtype=vllm_config.model_config.dtype, device=device)
        self.angles = angle_table(LlamaRotaryEmbedding(self.config).to(device), self.config, self.states)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        batch = common_attn_metadata
        mode = self.vllm_config.cache_config.mamba_cache_mode
        table = mamba_get_block_table_tensor(batch.block_table_tensor, batch.seq_lens, self.kv_cache_spec, mode)
        pages = table[:, 0].long()
        starts = batch.query_start_loc_cpu
        tokens_read = batch.seq_lens_cpu_upper_bound - starts.diff()
        num_decodes, *_ = split_decodes_and_prefills(batch, self.reorder_batch_threshold)

        calls = []
        if num_decodes:
            requests = pages[:num_decodes]
            step = PagedDecodeLayout(batch.seq_lens[:num_decodes].long() - 1, self.config, requests)
            calls.append(self._call(slice(0, num_decodes), (num_decodes, 1), requests, step))
        for request, page in enumerate(pages[num_decodes:].tolist(), num_decodes):
            start, end = starts[request : request + 2].tolist()
            shape = (1, end - start)
            piece = AlignedLayout(shape, int(tokens_read[request]), self.config, self.device)
            calls.append(self._call(slice(start, end), shape, slice(page, page + 1), piece))
        return Step(calls, pages[tokens_read == 0])

    def _call(
        self,
        tokens: slice,
        shape: tuple[int, int],
        requests: slice | torch.Tensor,
        layout: DecodeLayout | AlignedLayout,
    ) -> Call:
        mask = local_attention_mask(self.config, layout, self.states)
        return Call(tokens, shape, requests, layout, angles_of_call(self.angles, layout), mask)
