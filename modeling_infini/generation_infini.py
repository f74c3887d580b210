"""What `generate()` needs to know of a model whose cache is a memory."""

import copy
from types import SimpleNamespace

import torch
from torch import nn
from transformers.generation import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList
from transformers.utils import logging

from .cache import CACHE_NAME, InfiniCache, one_past, require_infini_cache
from .configuration_infini import InfiniConfig
from .fingerprint import WeightsId
from .streams import columns_tokens_last, last_tokens, require_ids


logger = logging.get_logger(__name__)


class InfiniGenerationMixin(GenerationMixin):
    """
    `generate()` with an [`InfiniCache`]: made when none is given, continued when one is.

    On a cache that has read something, inputs longer than what was read are taken for the whole history and the new
    tokens; others are new tokens, and continue the memory.
    """

    config: InfiniConfig
    model: nn.Module

    # Whether this process has ended, and runs the model for the weights that other processes gather from it.
    _runs_for_others = False

    def _has_unfinished_sequences(self, this_peer_finished, synced_gpus, device):
        self._runs_for_others = bool(synced_gpus and this_peer_finished)
        return super()._has_unfinished_sequences(this_peer_finished, synced_gpus, device)

    def _get_stopping_criteria(self, *args, **kwargs):
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for index, criterion in enumerate(criteria):
            if type(criterion) is MaxLengthCriteria:
                # With the positions, it warns of texts beyond them, which are what this model is for.
                criteria[index] = MaxLengthCriteria(criterion.max_length)
        return criteria

    def _sample(self, input_ids, logits_processor, stopping_criteria, *args, **kwargs):
        if (ended_rows := kwargs.get("ended_rows")) is not None:
            stopping_criteria = ended_rows.watched(stopping_criteria)
        return super()._sample(input_ids, logits_processor, stopping_criteria, *args, **kwargs)

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        for ids in (inputs, model_kwargs.get("input_ids")):
            if ids is not None:
                require_ids(ids)
        return super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        self._runs_for_others = False
        cache_implementation = generation_config.cache_implementation
        if cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f'cache_implementation="{cache_implementation}" is not for this model: its InfiniCache has a constant '
                "size already. Leave cache_implementation out."
            )
        if generation_config.cache_config is not None:
            raise ValueError("cache_config describes quantized caches, which are not for this model: leave it out.")
        if CACHE_NAME != "cache" and model_kwargs.get("cache") is not None:
            raise ValueError("generate() of this version of transformers takes a cache as past_key_values=.")
        if (cache := model_kwargs.get(CACHE_NAME)) is not None:
            require_infini_cache(cache)
            if generation_config.use_cache is False:
                raise ValueError(
                    "use_cache=False reads the whole text again for every token, so that the cache given would read "
                    f"it again and again. Leave out either of use_cache=False and {CACHE_NAME}."
                )
            cache._is_user_defined = True
        elif generation_config.use_cache is False:
            logger.warning_once(
                "use_cache=False reads the whole text again for every token, and forgets it: a long text takes long. "
                "Leave it out, and remove it from config and generation_config if training has left it there."
            )
        else:
            model_kwargs[CACHE_NAME] = cache = InfiniCache(self.config)
            if generation_config.is_assistant:
                cache.activate_past_recording()
        is_assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        if cache is not None and not is_assisted:
            # Assisted decoding has one row, and hands all arguments on to an assistant that may be another model.
            model_kwargs["ended_rows"] = EndedRows(generation_config._eos_token_tensor)
        if cache is not None and cache.weights is None:
            # Nothing changes them while it generates, be it in training mode or compiled.
            cache.weights = WeightsId.of(self.model)
        # PEFT's soft prompts keep the last id alone of a call on a cache that has read something.
        if self._has_soft_prompt() and (is_assisted or (cache is not None and cache.get_seq_length() > 0)):
            raise ValueError(
                "PEFT's prompt learning reads one token per call once its prompt is read: neither a cache that has "
                "read something nor assisted decoding goes with it. Give the whole text in one call of generate()."
            )

    def _has_soft_prompt(self) -> bool:
        """Whether PEFT's prompt learning generates: PEFT's `prepare_inputs_for_generation` is then in our place."""
        owner = getattr(self.prepare_inputs_for_generation, "__self__", self)
        return getattr(getattr(owner, "active_peft_config", None), "is_prompt_learning", False)

    def _get_logits_processor(self, generation_config, *args, **kwargs):
        # Guidance goes on from the last column of the negative prompt, or of the prompt if there is none.
        if generation_config.guidance_scale not in (None, 1):
            ids, mask = kwargs.get("negative_prompt_ids"), kwargs.get("negative_prompt_attention_mask")
            prompt, prompt_mask = kwargs["encoder_input_ids"], kwargs["model_kwargs"].get("attention_mask")
            if ids is not None and mask is not None:
                columns = columns_tokens_last(mask, ids.shape[1])
                kwargs["negative_prompt_ids"] = ids.gather(1, columns)
                kwargs["negative_prompt_attention_mask"] = mask.gather(1, columns)
            elif ids is None and prompt_mask is not None and prompt.dim() == 2:
                ids = prompt.repeat_interleave(prompt_mask.shape[0] // prompt.shape[0], 0)
                columns = columns_tokens_last(prompt_mask, ids.shape[1])
                kwargs["negative_prompt_ids"] = ids.gather(1, columns[:, -1:])
        return super()._get_logits_processor(generation_config, *args, **kwargs)

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config):
        # transformers compiles the steps of its static caches alone, and none on a CPU. Steps have one shape here as
        # well, and are compiled where a compile_config is given. A cache that records, as an assistant's does, also
        # reads tokens again after others are taken back: data decide the layout of such a call.
        cache = model_kwargs.get(CACHE_NAME)
        has_steps_alone = isinstance(cache, InfiniCache) and cache.recording is None
        if generation_config.compile_config is not None and has_steps_alone and not generation_config.is_assistant:
            generation_config = copy.copy(generation_config)
            generation_config.compile_config = copy.copy(generation_config.compile_config)
            generation_config.compile_config._compile_all_devices = True
            model_kwargs = {CACHE_NAME: SimpleNamespace(is_compileable=True)}
        return super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    def _prepare_attention_mask_for_generation(self, inputs_tensor, generation_config, model_kwargs):
        if generation_config.is_assistant:
            # The ids hold what the target has generated, among it pad_token_id: no padding.
            return inputs_tensor.new_ones(inputs_tensor.shape[:2])
        return super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        # Inputs no longer than the cache are new: generate() takes them so where the mask covers the history as well.
        cache = model_kwargs.get(CACHE_NAME)
        mask = model_kwargs.get("attention_mask")
        past_length = cache.get_seq_length() if isinstance(cache, InfiniCache) else 0
        if mask is not None and mask.shape[1] == inputs_tensor.shape[1] <= past_length:
            if (mask > 1).any():
                raise ValueError(
                    "attention_mask numbers packed documents (its values are above 1), but it does not cover what the "
                    "cache has read. Pass the mask of the whole history."
                )
            history = mask.new_ones(mask.shape[0], past_length)
            model_kwargs["attention_mask"] = mask = torch.cat([history, mask], 1)
        if mask is None:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        # Padding has the id of the token before it, so that what is generated after it goes on from there.
        return ((mask != 0).cumsum(-1) - 1).clamp(min=0)

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        # transformers would keep the logits of the last chunk alone, and a row may end before it.
        chunk_length = generation_config.prefill_chunk_size
        if chunk_length is not None and model_kwargs.get(CACHE_NAME) is not None:
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
            model_kwargs = {**model_kwargs, "chunk_length": chunk_length}
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        cache=None,
        ended_rows=None,
        **kwargs,
    ):
        cache, has_mask = one_past(past_key_values, cache), attention_mask is not None
        # Inputs no longer than the cache are all new; there is no history in them to be sliced off.
        if next_sequence_length is not None and next_sequence_length <= 0:
            next_sequence_length = None
        if isinstance(cache, InfiniCache):
            if self._runs_for_others:
                # What has been generated is all that the cache is to read.
                cache = cache.detached()
            if ended_rows is not None and is_first_iteration:
                ended_rows.prompt_length = input_ids.shape[1]
            elif ended_rows is not None and attention_mask is None and next_sequence_length == 1:
                attention_mask = ended_rows.mask(input_ids)
        if is_first_iteration and inputs_embeds is None:
            self._warn_of_bos(input_ids, attention_mask, cache)
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        if has_mask:
            states = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
            if states.shape[1] and not last_tokens(attention_mask, states.shape[1]).any(1).all():
                raise ValueError(
                    "A row of the prompt is all padding: there is no token to go on from. Leave it out of the batch, "
                    "or let it start with a BOS token."
                )
            inputs["tokens_last"] = True
        if self._has_soft_prompt():
            # PEFT looks for a cache by this name, at any version of transformers.
            inputs["past_key_values"] = inputs.pop(CACHE_NAME, None)
        return inputs

    def _warn_of_bos(self, input_ids, attention_mask, cache) -> None:
        """
        A stream's first token stays visible as a sink: a base that was trained with BOS there is lost without, and
        has seen none in the midst of a text.
        """
        bos = (self.config.converted_from or {}).get("starts_with")
        past_length = cache.get_seq_length() if isinstance(cache, InfiniCache) else 0
        length = input_ids.shape[1]
        if bos is None or length == 0 or 0 < past_length < length:
            return
        first = input_ids[:, 0]
        if attention_mask is not None and attention_mask.dim() == 2 and attention_mask.shape[1] >= length:
            first = input_ids.gather(1, last_tokens(attention_mask, length).int().argmax(1, keepdim=True))[:, 0]
        if past_length > 0:
            if bool((first == bos).any()):
                logger.warning_once(
                    f"The new ids start with the BOS token {bos}, but they go on with what the cache has read. Leave "
                    "it out (by add_special_tokens=False, or where a chat template has put it), unless another "
                    "document starts there."
                )
        elif not bool((first == bos).all()):
            logger.warning_once(
                f"The prompt does not start with the BOS token {bos}, which the base's tokenizer puts before every "
                "text. Let the tokenizer add it (add_special_tokens=True), unless a chat template has."
            )

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, is_encoder_decoder=False, num_new_tokens=1):
        # The cache counts positions and has read the padding's mask: no need for a mask and ids that grow.
        if isinstance(outputs.get(CACHE_NAME), InfiniCache):
            if self._runs_for_others:
                outputs[CACHE_NAME] = model_kwargs[CACHE_NAME]
            for name in ("attention_mask", "position_ids"):
                model_kwargs.pop(name, None)
        mask = model_kwargs.get("attention_mask")
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        if mask is not None:
            # What is generated belongs to the last document, where the mask numbers these.
            model_kwargs["attention_mask"][:, mask.shape[1] :] = mask.amax(1, keepdim=True)
        return model_kwargs

    def init_continuous_batching(self, *args, **kwargs):
        raise NotImplementedError(
            "Continuous batching pages the keys of full attention, and this model has none: a memory of constant size "
            "stands for them. Use generate() with a batch."
        )


class EndedRows:
    """
    Which rows have ended, in the generate() that runs.

    Attributes:
        eos_token_ids: what ends a beam; `None`: nothing does.
        prompt_length: where the generated tokens start.
        verdicts: of sampling, which rows had ended before their last token, and which have with it, `(batch)` each;
            `None`: no criteria are watched.
    """

    def __init__(self, eos_token_ids: torch.Tensor | None):
        self.eos_token_ids = eos_token_ids
        self.prompt_length = 0
        self.verdicts: tuple[torch.Tensor, torch.Tensor] | None = None

    def watched(self, criteria: StoppingCriteriaList) -> StoppingCriteriaList:
        """The criteria of sampling; watched if one of them knows EOS, since the rows that they end get filler then."""
        has_filler = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        return _WatchedCriteria(criteria, self) if has_filler else criteria

    def mask(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """0 for the filler that is fed to rows that have ended, `(batch, 1)`; `None` while all rows go on."""
        if input_ids.shape[0] == 1:
            return None
        if self.verdicts is not None:
            has_ended = self.verdicts[0].unsqueeze(1)
        elif self.eos_token_ids is not None:
            has_ended = torch.isin(input_ids[:, self.prompt_length : -1], self.eos_token_ids).any(1, keepdim=True)
        else:
            return None
        return ~has_ended if has_ended.any() else None


class _WatchedCriteria(StoppingCriteriaList):
    """Criteria that tell [`EndedRows`] what they say."""

    def __init__(self, criteria: StoppingCriteriaList, ended_rows: EndedRows):
        super().__init__(criteria)
        self.ended_rows = ended_rows

    def __call__(self, input_ids, scores, **kwargs):
        ends = super().__call__(input_ids, scores, **kwargs)
        verdicts = self.ended_rows.verdicts
        before = torch.zeros_like(ends) if verdicts is None else verdicts[1]
        self.ended_rows.verdicts = (before, before | ends)
        return ends
