"""A sequence split over 2 and 3 gloo processes gives the logits, the loss and the gradients of one process."""

import os
import re
from typing import NamedTuple

import pytest
import torch
from tiny import (
    EVERY_OPTION,
    EVERY_OPTION_BUT_SLOTS,
    MODES,
    compute_norm_and_rope_in_float64,
    random_ids,
    relative_error,
    tiny_config,
    tiny_model,
)
from torch import distributed
from torch.nn import functional as F
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_infini import InfiniForQuestionAnswering, InfiniForSequenceClassification, InfiniForTokenClassification
from modeling_infini.training import ContextParallel


SEGMENT_LENGTH = 5


class Case(NamedTuple):
    """
    A model's fields and how the sequence is split: by `shard`, or into pieces of the `lengths` of 2 and 3 ranks.
    """

    name: str
    fields: dict
    length: int = 33
    lengths: dict[int, list[int]] = {}
    has_checkpointing: bool = False
    autocast: bool = False
    targets: slice = slice(None)


def cases() -> list[Case]:
    """Both rules, all local modes, and for each of these something else that may go wrong."""
    found = []
    for delta in (False, True):
        for mode in MODES:
            rule = {"use_mem_delta_rule": delta, **mode}
            every_option = {**EVERY_OPTION_BUT_SLOTS, "num_sink_tokens": 0, **rule}
            name = "-".join(str(value) for value in rule.values())
            found += [
                Case(f"{name}-every-option", every_option),
                Case(f"{name}-one-kv-head-whole-segments", {**rule, "num_key_value_heads": 1}, 35),
                Case(f"{name}-all-kv-heads-one-segment-each", {**rule, "num_key_value_heads": 4}, 15),
                Case(f"{name}-unequal", rule, 33, {2: [25, 8], 3: [5, 25, 3]}),
                Case(f"{name}-last-token-alone", rule, 16, {2: [15, 1], 3: [5, 10, 1]}),
                Case(f"{name}-checkpointing", every_option, has_checkpointing=True),
                Case(f"{name}-targets-on-last-rank", rule, targets=slice(29, 33)),
                Case(f"{name}-targets-on-first-rank", rule, targets=slice(0, 5)),
            ]
    found.append(Case("autocast", {"use_mem_delta_rule": True, **MODES[2]}, autocast=True))
    return found


def next_of(labels: torch.Tensor) -> torch.Tensor:
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def exact_loss(logits, labels, vocab_size, num_items_in_batch, shift_labels=None, **kwargs):
    """The stock loss, which computes in float32, in float64."""
    shift_labels = next_of(labels) if shift_labels is None else shift_labels
    return F.cross_entropy(logits.flatten(0, 1), shift_labels.flatten(), reduction="sum") / num_items_in_batch


def gradients(model) -> dict[str, torch.Tensor | None]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def errors_of(case: Case, context_parallel: ContextParallel) -> dict[str, float]:
    """The relative errors of a case on this rank, by what they are errors of."""
    model = tiny_model(torch.float32 if case.autocast else torch.float64, **case.fields)
    if not case.autocast:
        model.loss_function = exact_loss
    if case.has_checkpointing:
        model.train()
        model.gradient_checkpointing_enable()
    ids = random_ids(2, case.length)
    labels = torch.full_like(ids, -100)
    labels[:, case.targets] = ids[:, case.targets]

    inputs = context_parallel.shard(model.config, input_ids=ids, labels=labels)
    rank, size = context_parallel.rank, context_parallel.size
    if case.lengths:
        inputs["input_ids"] = ids.split(case.lengths[size], 1)[rank]
        inputs["shift_labels"] = next_of(labels).split(case.lengths[size], 1)[rank].contiguous()
    with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
        expected = model(ids, labels=labels, num_items_in_batch=inputs["num_items_in_batch"], use_cache=False)
        expected.loss.backward()
        expected_gradients = gradients(model)
        outputs = model(**inputs, past_key_values=context_parallel)
        outputs.loss.backward()
    context_parallel.reduce_gradients(model)

    loss = outputs.loss.detach()
    distributed.all_reduce(loss)
    lengths = context_parallel.gather(torch.tensor(outputs.logits.shape[1])).tolist()
    compared = {"logits": (outputs.logits, expected.logits.split(lengths, 1)[rank]), "loss": (loss, expected.loss)}
    compared |= {name: (gradient, expected_gradients[name]) for name, gradient in gradients(model).items()}
    # Where only first segments have targets, the gates' gradients are 0, and nothing is relative to that.
    return {
        name: relative_error(mine, other) if other.any() else mine.abs().max().item()
        for name, (mine, other) in compared.items()
    }


def bytes_of(context_parallel: ContextParallel, length: int, **fields) -> int:
    model, ids = tiny_model(**fields), random_ids(1, length)
    before = context_parallel.bytes_sent
    inputs = context_parallel.shard(model.config, input_ids=ids, labels=ids)
    model(**inputs, past_key_values=context_parallel).loss.backward()
    return context_parallel.bytes_sent - before


def expected_bytes(rank: int, size: int, delta: bool, sliding: bool, sinks: int = 0) -> int:
    """What docs/context_parallel.md says, for a batch of one row in float32."""
    layers, kv_heads, dim, length = 2, 2, 6, SEGMENT_LENGTH
    forward = backward = dim * (2 * dim + 1 if delta else dim + 1)
    backward = dim * (dim + 1)
    if sliding:
        forward += 2 * length * dim * (rank < size - 1)
        backward += 2 * length * dim * (rank > 0)
        forward += 2 * sinks * dim * (rank == 0)
        backward += 2 * sinks * dim
    return 4 * 8 + layers * kv_heads * (forward + backward) * 4


def refusals(context_parallel: ContextParallel) -> list[tuple[str, str]]:
    """Patterns, and the messages that should match them."""
    model, found = tiny_model(), []
    rank, size = context_parallel.rank, context_parallel.size
    call = {"past_key_values": context_parallel}
    mask = torch.ones(1, 20, dtype=torch.long)

    def refuse(pattern, function, *args, **kwargs):
        try:
            function(*args, **kwargs)
            found.append((pattern, "no error"))
        except (TypeError, ValueError) as error:
            found.append((pattern, str(error)))

    ids, positions = random_ids(1, 20), torch.arange(20).unsqueeze(0)
    shard = {"config": model.config, "input_ids": ids}
    refuse(f"5 tokens are 1 segments .* {size} ranks", context_parallel.shard, model.config, ids[:, :5])
    refuse("without padding", context_parallel.shard, **shard, attention_mask=mask.index_fill(1, mask[0, :1], 0))
    refuse("one document per row", context_parallel.shard, **shard, position_ids=positions % 10)
    refuse("exactly one of", context_parallel.shard, model.config)

    refuse("two names of the same", model, ids, cache=model.new_cache(), **call)
    refuse("output_attentions", model, ids, output_attentions=True, **call)
    refuse("shift_labels instead of labels", model, ids, labels=ids, **call)
    refuse("needs num_items_in_batch", model, ids, shift_labels=ids, **call)
    refuse("must be an InfiniCache, got ContextParallel", model.generate, ids, **call)
    refuse("context_parallel is what a call goes on from", model, ids, context_parallel=context_parallel)
    for head in (InfiniForSequenceClassification, InfiniForTokenClassification, InfiniForQuestionAnswering):
        classifier = head(tiny_config(pad_token_id=0))
        refuse("ContextParallel is for InfiniForCausalLM and InfiniModel", classifier, ids, **call)
        refuse("ContextParallel is for InfiniForCausalLM and InfiniModel", classifier, ids, cache=context_parallel)
        refuse("is for InfiniForCausalLM and InfiniModel", classifier, ids, None, None, context_parallel)

    # What is wrong on one rank only is refused by all.
    is_first = rank == 0
    refuse("without padding", model, ids, attention_mask=mask.index_fill(1, mask[0, :1], 1 - is_first), **call)
    refuse("one document per row", model, ids, position_ids=positions % (10 if is_first else 20), **call)
    refuse("the same rows", model, random_ids(1 + is_first, 20), **call)
    refuse("but the ranks hold .*18.* tokens", model, ids[:, : 18 if is_first else 20], **call)
    return found


def work(rank: int, size: int, folder: str) -> None:
    """What each process does; rank 0's report is what the test reads."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    context_parallel, report = ContextParallel(), {"errors": {}, "bytes": {}, "wrong_refusals": []}
    report["wrong_refusals"] = [pair for pair in refusals(context_parallel) if not re.search(*pair)]
    for delta in (False, True):
        for mode in MODES:
            fields = {"use_mem_delta_rule": delta, **mode}
            found = [bytes_of(context_parallel, length, **fields) for length in (20, 93)]
            is_sliding = mode["local_attention"] == "sliding"
            expected = expected_bytes(rank, size, delta, is_sliding, mode.get("num_sink_tokens", 0))
            report["bytes"][str(fields)] = [*found, expected]
    with pytest.MonkeyPatch.context() as monkeypatch:
        compute_norm_and_rope_in_float64(monkeypatch)
        for case in cases():
            report["errors"][case.name] = errors_of(case, context_parallel)
    torch.save(report, os.path.join(folder, f"report-{rank}"))
    distributed.destroy_process_group()


# Of three ranks, one is the first, one the last and one neither.
@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_ranks_together_are_one_process(size, tmp_path):
    torch.multiprocessing.spawn(work, (size, str(tmp_path)), size)
    for rank in range(size):
        report = torch.load(tmp_path / f"report-{rank}")
        assert not report["wrong_refusals"]
        for fields, (short, long, expected) in report["bytes"].items():
            assert short == long == expected, (rank, fields)
        for name, errors in report["errors"].items():
            tolerance = 0.1 if name == "autocast" else 1e-10
            assert all(error < tolerance for error in errors.values()), (rank, name, errors)


def test_without_a_process_group_it_says_what_to_do():
    with pytest.raises(ValueError, match="torchrun"):
        ContextParallel()


def test_targets_may_be_shifted_by_the_caller():
    model, ids = tiny_model(), random_ids(2, 12)
    assert torch.equal(model(ids, shift_labels=next_of(ids)).loss, model(ids, labels=ids).loss)


@pytest.fixture
def only_rank(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield ContextParallel()
    distributed.destroy_process_group()


def test_targets_that_do_not_fit_the_inputs_are_refused(only_rank):
    model, ids = tiny_model(), random_ids(1, 12)
    with pytest.raises(ValueError, match=r"labels are of shape \(1, 24\), but the inputs of \(1, 12\)"):
        only_rank.shard(model.config, input_ids=ids, labels=random_ids(1, 24))
    with pytest.raises(ValueError, match="labels and shift_labels contradict each other"):
        only_rank.shard(model.config, input_ids=ids, labels=ids, shift_labels=ids)
    nothing = only_rank.shard(model.config, input_ids=ids, labels=torch.full_like(ids, -100))
    assert model(**nothing, past_key_values=only_rank).loss == 0


def test_a_piece_is_read_at_once_without_gradients_too(only_rank, monkeypatch):
    model, ids, lengths = tiny_model(**EVERY_OPTION_BUT_SLOTS), random_ids(2, 13), []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    monkeypatch.setattr("modeling_infini.modeling_infini.PIECE_TOKENS", 5)
    with torch.no_grad():
        found = model(ids, past_key_values=only_rank, logits_to_keep=2)
        assert lengths == [13]
        torch.testing.assert_close(found.logits, model(ids).logits[:, -2:])


@pytest.mark.usefixtures("float64_norm_and_rope")
def test_a_group_of_one_rank_is_one_process(only_rank):
    for case in cases():
        if not case.lengths and not case.autocast:
            errors = errors_of(case, only_rank)
            assert all(error < 1e-10 for error in errors.values()), (case.name, errors)


def test_slots_of_the_memory_are_refused(only_rank):
    # What stays in them is chosen segment by segment, and a later rank would wait for the earlier ones.
    model, ids = tiny_model(**EVERY_OPTION), random_ids(2, 13)
    with pytest.raises(ValueError, match="num_memory_slots=3"):
        model(ids, past_key_values=only_rank)


def test_published_code_takes_its_piece_from_this_package(only_rank, tmp_path):
    model, ids = tiny_model(**EVERY_OPTION_BUT_SLOTS), random_ids(2, 13)
    model.save_pretrained(tmp_path / "published")
    own_class = get_class_from_dynamic_module("modeling_infini.InfiniForCausalLM", tmp_path / "published")
    assert not issubclass(own_class, type(model))
    remote = own_class.from_pretrained(tmp_path / "published")
    inputs = only_rank.shard(remote.config, input_ids=ids, labels=ids)
    outputs = remote(**inputs, past_key_values=only_rank)
    torch.testing.assert_close(outputs.logits, model(ids).logits)
    assert outputs.past_key_values is None
    # But a cache holds what its own code understands.
    with pytest.raises(TypeError, match="must be an InfiniCache, got InfiniCache"):
        remote(ids, past_key_values=model.new_cache())
