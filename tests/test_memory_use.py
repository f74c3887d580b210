"""What the memory does: against sums by hand over a whole document, and against the model with another memory."""

import json
import math
from itertools import product

import pytest
import torch
from base_models import base_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import MODES, config_fields, random_ids, relative_error, tiny_model
from torch.nn.functional import logsigmoid
from transformers import Trainer, TrainingArguments
from words import random_text, save_word_tokenizer

from infini_transformers.evaluation.losses import memory_off
from infini_transformers.evaluation.memory_use import MemoryUse, MemoryUseCallback, main, markdown, memory_use


N = 5
RULES = [
    {"use_mem_delta_rule": False},
    {"use_mem_delta_rule": True},
    {"use_mem_delta_rule": True, "learned_delta_update": True, "qk_norm": True},
    {"memory_norm_init_scale": 1.5, "memory_write_gate": True},
    {"memory_feature_map": "exp", "token_gates": True, "memory_layers": [1]},
    {
        "memory_feature_map": "exp",
        "token_gates": True,
        "use_mem_delta_rule": True,
        "memory_norm_init_scale": 1.5,
        "memory_write_gate": True,
    },
]


def states_by_hand(model, ids):
    """
    Of each layer with memory, in one forward of a whole document: features of queries `(heads, T, key_dim)`, features
    of keys and values of the memory, repeated for the heads of their group, write strengths `(heads, T)`, the share of
    local attention `(heads, T, 1)` and its mix with the memory `(heads, T, d)`.
    """
    config, seen = model.config, {}
    sigma = torch.exp if config.memory_feature_map == "exp" else (lambda states: torch.nn.functional.elu(states) + 1)

    def by_head(states, groups=1, dim=config.head_dim):
        return states.reshape(len(ids[0]), -1, dim).transpose(0, 1).repeat_interleave(groups, 0)

    def keep(name, of_output=True):
        def hook(module, inputs, output):
            seen.setdefault(name, []).append(output if of_output else inputs[0])

        return hook

    names = {"queries": "q_proj", "keys": "k_proj", "values": "v_proj"}
    if config.qk_norm:
        names |= {"queries": "q_norm", "keys": "k_norm"}
    if config.memory_norm_init_scale is not None:
        names |= {"keys": "memory.key_norm"}
    if config.memory_feature_map == "exp":
        names |= {"keys": "memory.key_map"}
    layers = [model.model.layers[index].self_attn for index in config.layers_with_memory]
    for layer in layers:
        for name, module in names.items():
            layer.get_submodule(module).register_forward_hook(keep(name))
        if config.memory_write_gate:
            layer.memory.write_gate.register_forward_hook(keep("gates"))
        if config.token_gates:
            layer.memory.token_gate.register_forward_hook(keep("token_gates"))
        layer.o_proj.register_forward_hook(keep("mix", of_output=False))
        if config.learned_delta_update:
            layer.memory.write_strength.register_forward_hook(keep("strength"))
    with torch.no_grad():
        model(ids, use_cache=False)
    groups = config.num_attention_heads // config.num_key_value_heads
    for index, layer in enumerate(layers):
        strengths = torch.ones(config.num_attention_heads, len(ids[0]))
        if config.learned_delta_update:
            strengths = seen["strength"][index][0].sigmoid().T.repeat_interleave(groups, 0)
        queries, mix = by_head(seen["queries"][index]).transpose(0, 1), by_head(seen["mix"][index])
        if config.memory_norm_init_scale is not None:
            queries = layer.memory.query_norm(queries)
        if config.memory_feature_map == "exp":
            queries = layer.memory.query_map(queries)
        queries = queries.detach().transpose(0, 1)
        keys = by_head(seen["keys"][index], groups, config.memory_key_dim)
        if config.memory_write_gate:
            keys = keys + logsigmoid(seen["gates"][index][0]).T.repeat_interleave(groups, 0).unsqueeze(-1)
        logits = config.head_gate_scale * layer.head_gates.weight.detach().expand(len(ids[0]), -1)
        if config.token_gates:
            logits = logits + seen["token_gates"][index][0]
        share = logits.sigmoid().T.unsqueeze(-1)
        yield sigma(queries), sigma(keys), by_head(seen["values"][index], groups), strengths, share, mix


def memory_by_hand(keys, values, strengths, config, segments, left_out=()):
    """M and z `(heads, key_dim, d)` after the first `segments`, but for those `left_out`."""
    memory, normaliser = torch.zeros_like(keys[:, :1].mT * values[:, :1]), torch.zeros_like(keys[:, 0])
    for segment in range(segments):
        if segment in left_out:
            continue
        part = slice(segment * config.segment_length, (segment + 1) * config.segment_length)
        features, targets = keys[:, part], values[:, part]
        if config.use_mem_delta_rule and normaliser.any():
            targets = targets - features @ memory / (features @ normaliser[..., None])
        memory = memory + torch.einsum("htk,htv,ht->hkv", features, targets, strengths[:, part].to(keys.dtype))
        normaliser = normaliser + features.sum(1)
    return memory, normaliser


def read_by_hand(queries, memory, normaliser):
    denominator = queries @ normaliser[..., None]
    return torch.where(denominator > 0, queries @ memory / denominator.clamp(min=1e-30), 0)


def norms(states):
    """Of each head of `(heads, T, d)`."""
    return states.flatten(1).norm(dim=1)


@pytest.mark.usefixtures("float64_norm_and_rope")
class TestAgainstSumsByHand:
    @settings(max_examples=25)
    @given(
        fields=config_fields(),
        options=st.fixed_dictionaries(
            {
                "memory_feature_map": st.sampled_from(["elu", "exp"]),
                "token_gates": st.booleans(),
                "memory_layers": st.sampled_from([None, [1]]),
                "num_memory_slots": st.just(0),
                "slot_layers": st.none(),
            }
        ),
        segments=st.integers(1, 7),
        rest=st.integers(1, 6),
        max_spans=st.integers(1, 8),
    )
    def test_all_numbers(self, fields, options, segments, rest, max_spans):
        model = tiny_model(torch.float64, **fields | options)
        n = model.config.segment_length
        rest = min(rest, n)
        ids = random_ids(1, segments * n + rest)
        use = memory_use(model, ids, max_spans)
        assert use.spans[0][0] == 0
        assert use.spans[-1][1] == segments * n
        assert all(end == start for (_, end), (start, _) in zip(use.spans, use.spans[1:]))
        assert len(use.spans) == min(segments, max_spans)
        assert use.layers == model.config.layers_with_memory

        for index, (queries, keys, values, strengths, share, mix) in enumerate(states_by_hand(model, ids)):
            torch.testing.assert_close(use.local_share[index], share[:, segments * n :].mean((1, 2)))
            one_of_group = slice(None, None, 4 // model.config.num_key_value_heads)
            squares = torch.zeros(2, 4, dtype=torch.float64)
            for segment in range(segments + 1):
                part = slice(segment * n, (segment + 1) * n)
                read = read_by_hand(queries[:, part], *memory_by_hand(keys, values, strengths, model.config, segment))
                local = (mix[:, part] - (1 - share[:, part]) * read) / share[:, part]
                if segment > 0:
                    squares += torch.stack([read.square().sum((1, 2)), local.square().sum((1, 2))])
                if segment == segments:
                    torch.testing.assert_close(use.read_rms[-1, index], read.square().mean((1, 2)).sqrt())
                    torch.testing.assert_close(use.local_rms[-1, index], local.square().mean((1, 2)).sqrt())
            # Over the whole document, whatever the spans.
            tokens = [end - max(start, n) for start, end in use.spans] + [rest]
            for found, expected in zip((use.read_rms, use.local_rms), squares):
                weights = torch.tensor(tokens, dtype=torch.float64)[:, None] * model.config.head_dim
                torch.testing.assert_close((found[:, index].nan_to_num().square() * weights).sum(0), expected)

            last = queries[:, segments * n :]
            read = read_by_hand(last, *memory_by_hand(keys, values, strengths, model.config, segments))
            for span, (start, end) in enumerate(use.spans):
                memory, normaliser = memory_by_hand(keys, values, strengths, model.config, end // n)
                expected = memory.flatten(1).norm(dim=1)[one_of_group]
                torch.testing.assert_close(use.memory_norm[span, index], expected)
                torch.testing.assert_close(use.normaliser_norm[span, index], normaliser.norm(dim=1)[one_of_group])
                left_out = range(start // n, end // n)
                without = memory_by_hand(keys, values, strengths, model.config, segments, left_out)
                change = read_by_hand(last, *without) - read
                expected = norms(change) / norms(read)
                torch.testing.assert_close(use.read_change[span, index], expected, rtol=1e-8, atol=1e-10)
                expected = norms((1 - share[:, segments * n :]) * change) / norms(mix[:, segments * n :])
                torch.testing.assert_close(use.output_change[span, index], expected, rtol=1e-8, atol=1e-10)

    @pytest.mark.parametrize(
        ("rule", "mode"), [*product(RULES, MODES), ({"memory_layers": [1], "num_memory_slots": 3}, MODES[2])]
    )
    def test_the_model_itself_with_a_span_left_out(self, rule, mode):
        """The mix of a layer of the model moves as said when its memory is put to what it is without a span."""
        model, ids = tiny_model(torch.float64, **rule, **mode), random_ids(1, 4 * N + 3)
        use = memory_use(model, ids)
        for index, (_, keys, values, strengths, _, mix) in enumerate(states_by_hand(model, ids)):
            layer = use.layers[index]
            for span in range(4):
                cache, seen = model.new_cache(), []
                with torch.no_grad():
                    model(ids[:, : 4 * N], past_key_values=cache)
                    memory, normaliser = memory_by_hand(keys, values, strengths, model.config, 4, [span])
                    cache.layers[layer].memory = memory[None, ::2]
                    cache.layers[layer].normaliser = normaliser[None, ::2]
                    o_proj = model.model.layers[layer].self_attn.o_proj
                    handle = o_proj.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
                    model(ids[:, 4 * N :], past_key_values=cache)
                    handle.remove()
                found = seen[0].view(3, 4, 6).transpose(0, 1)
                change = norms(found - mix[:, 4 * N :]) / norms(mix[:, 4 * N :])
                assert relative_error(use.output_change[span, index], change) < 1e-8


class TestMemoryUse:
    def test_top_mass_by_hand(self):
        model, ids = tiny_model(segment_length=200), random_ids(1, 401)
        use = memory_use(model, ids)
        for index, (_, keys, *_) in enumerate(states_by_hand(model, ids)):
            mass = keys[::2, :400].sum(-1).view(2, 2, 200)
            top = mass.sort(-1, descending=True).values[..., :2].sum(-1)
            torch.testing.assert_close(use.top_mass[index], (top / mass.sum(-1)).mean(1))

    def test_leaves_the_model_as_it_was(self):
        model, ids = tiny_model(), random_ids(1, 17)
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        memory_use(model, ids)
        with pytest.raises(IndexError):
            memory_use(model, ids + 100)
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_runs_with_any_attention_and_dtype(self, attention, dtype):
        model = tiny_model(dtype)
        model.set_attn_implementation(attention)
        use, expected = memory_use(model, random_ids(1, 33)), memory_use(tiny_model(), random_ids(1, 33))
        tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
        for name in ("memory_norm", "read_rms", "local_rms", "output_change"):
            found, target = getattr(use, name).nan_to_num(), getattr(expected, name).nan_to_num()
            assert found.dtype == torch.float32
            assert relative_error(found, target) < tolerance

    def test_reaches_a_model_that_peft_has_wrapped(self):
        peft = pytest.importorskip("peft")
        ids, expected = random_ids(1, 33), memory_use(tiny_model(), random_ids(1, 33))
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "o_proj"], modules_to_save=["head_gates"])
        wrapped = peft.get_peft_model(tiny_model(), config).eval()
        torch.testing.assert_close(memory_use(wrapped, ids).output_change, expected.output_change)

    def test_an_output_without_memory_does_not_change(self):
        model, ids = tiny_model(), random_ids(1, 33)
        with memory_off(model):
            use = memory_use(model, ids)
        assert use.local_share.eq(1).all()
        assert use.output_change.eq(0).all()
        assert use.read_change.gt(0).all()

    def test_effective_spans(self):
        def effective(changes):
            none = torch.zeros(0)
            changes = torch.tensor(changes)[:, None, None]
            return MemoryUse([], [], none, none, none, none, none, none, changes, none).effective_spans.item()

        assert effective([0.5, 0.5, 0.5, 0.5]) == pytest.approx(4)
        assert effective([0.0, 0.3, 0.0, 0.0]) == pytest.approx(1)
        assert effective([0.1, 0.3]) == pytest.approx(0.16 / 0.1)

    def test_refuses_a_model_whose_layers_have_none(self):
        with pytest.raises(ValueError, match="No layer of the model has a memory"):
            memory_use(tiny_model(memory_layers=[]), random_ids(1, 33))

    def test_refuses_a_document_within_one_segment(self):
        with pytest.raises(ValueError, match="5 tokens has no memory to read: it must be longer"):
            memory_use(tiny_model(), random_ids(1, 5))


def test_callback_logs_at_each_evaluation(tmp_path):
    model, ids = tiny_model(), random_ids(1, 23)
    rows = [{"input_ids": row, "labels": row} for row in random_ids(2, 12).tolist()]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.add_callback(MemoryUseCallback(trainer, ids))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "memory/local_share_min" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    expected = memory_use(model.eval(), ids).summary()
    assert {name: logged[-1][f"memory/{name}"] for name in expected} == pytest.approx(expected)


def test_command_line(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    tiny_model().save_pretrained(tmp_path / "infini")
    save_word_tokenizer(tmp_path / "infini")
    (tmp_path / "book.txt").write_text(random_text(100))
    options = ("--text", tmp_path / "book.txt", "--tokens", 63, "--spans", 4, "--output", tmp_path / "docs" / "use")
    main([str(argument) for argument in (tmp_path / "infini", *options)])
    table = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in table if line.startswith("| ")] == [
        "| layer",
        "| 0",
        "| 1",
        "| tokens",
        "| 0 to 14",
        "| 15 to 29",
        "| 30 to 44",
        "| 45 to 59",
        "| last segment",
    ]
    found = json.loads(
        (tmp_path / "docs" / "use.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )
    assert found["settings"]["tokens"] == 63
    assert found["spans"] == [[0, 15], [15, 30], [30, 45], [45, 60]]
    assert len(found["read_change"]) == 4
    assert len(found["read_change"][0]) == 2
    assert found["summary"]["effective_spans_mean"] <= 4
    assert (tmp_path / "docs" / "use.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_without_a_memory_is_refused(tmp_path, capsys):
    base_model().save_pretrained(tmp_path / "base")
    save_word_tokenizer(tmp_path / "base")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "base")])
    assert "has no memory: it is no Infini-attention model" in capsys.readouterr().err


def test_a_span_of_the_first_segment_alone_reads_nothing():
    use = memory_use(tiny_model(), random_ids(1, 3 * N))
    assert use.read_rms[0].isnan().all()
    assert not math.isnan(use.read_rms[1:].sum())
    assert use.to_dict()["read_rms"][0][0] == [None] * 4
    assert markdown(use).splitlines()[-3].startswith("| 0 to 4 |")
