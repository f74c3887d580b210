"""Perplexity by position: what is measured is what a plain forward gives, and the ablation changes the gates alone."""

import json
import math
from unittest import mock

import pytest
import torch
from base_models import VARIANTS, base_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import MODES, VOCABULARY, random_ids, tiny_model
from torch.nn.functional import cross_entropy
from words import random_text, save_word_tokenizer

from infini_transformers.conversion import convert_to_infini
from infini_transformers.conversion.shared_base import base_of
from infini_transformers.evaluation.by_position import (
    by_bucket,
    doubling_buckets,
    main,
    markdown,
    name_and_source,
    read_documents,
    report,
)
from infini_transformers.evaluation.loading import load_model, load_tokenizer
from infini_transformers.evaluation.losses import (
    foreign_losses,
    longer_window,
    memory_off,
    token_losses,
    window_losses,
    window_of_state,
)
from modeling_infini import InfiniCache
from modeling_infini.cache_layer import LayerPast, Window


N = 5


def uncut_losses(model, ids):
    """Losses from one forward without a cache."""
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, :-1]
    return cross_entropy(logits, ids[0, 1:], reduction="none")


class TestTokenLosses:
    @settings(max_examples=20)
    @given(length=st.integers(2, 24), chunk_length=st.integers(1, 25), mode=st.sampled_from(MODES))
    def test_are_those_of_one_forward(self, length, chunk_length, mode):
        model, ids = tiny_model(torch.float64, **mode), random_ids(1, length)
        found = token_losses(model, ids, chunk_length)
        assert found.shape == (length - 1,)
        # The stock norm and RoPE compute in float32.
        torch.testing.assert_close(found, uncut_losses(model, ids), rtol=1e-5, atol=1e-5)

    def test_are_exact_where_all_is_in_float64(self, float64_norm_and_rope):
        model, ids = tiny_model(torch.float64, **MODES[2]), random_ids(1, 23)
        torch.testing.assert_close(token_losses(model, ids, 4), uncut_losses(model, ids), rtol=1e-11, atol=1e-11)

    def test_are_float32_of_a_half_model_and_counted(self):
        counts = []
        found = token_losses(tiny_model(torch.bfloat16), random_ids(1, 12), 4, counts.append)
        assert found.dtype == torch.float32
        assert counts == [4, 4, 3]


def losses_with_memory_of(model, ids, other):
    """Losses of one forward of `ids`, whose layers see memories and slots as they do in one forward of `other`."""
    update, seen = LayerPast.update, []
    slots = model.config.num_memory_slots

    def keep(past, states, layout):
        seen.append(update(past, states, layout))
        return seen[-1]

    def replace(past, states, layout):
        window, memory = update(past, states, layout)
        others, memory_of_other = seen.pop(0)
        segments = len(window.keys)
        if memory is not None:
            memory = type(memory)(*(states[:segments] for states in memory_of_other))
        if window.slot_places is not None:
            keys, values = (
                torch.cat([theirs[:segments, :slots], own[:, slots:]], 1)
                for theirs, own in zip(others[:2], window[:2])
            )
            window = Window(keys, values, others.slot_places[:segments])
        return window, memory

    with mock.patch.object(LayerPast, "update", keep):
        uncut_losses(model, other)
    with mock.patch.object(LayerPast, "update", replace):
        return uncut_losses(model, ids)


FOREIGN_MODES = [
    *MODES,
    {"memory_layers": [1], "memory_feature_map": "exp", "token_gates": True},
    {"local_attention": "sliding", "num_sink_tokens": 2, "num_memory_slots": 3},
    {"local_attention": "sliding", "num_memory_slots": 7, "memory_layers": [0]},
]


class TestForeignLosses:
    @settings(max_examples=40)
    @given(
        length=st.integers(2, 24),
        more=st.integers(0, 7),
        chunk_length=st.integers(1, 9),
        mode=st.sampled_from(FOREIGN_MODES),
        delta=st.booleans(),
    )
    def test_memories_are_those_of_the_other_document(self, length, more, chunk_length, mode, delta):
        model = tiny_model(torch.float64, use_mem_delta_rule=delta, **mode)
        # Equal tokens have scores for slots that differ by rounding alone, which depends on the shape of the call.
        order = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(more))
        documents = {"a": order[None, :length], "b": order.flip(0)[None, : length + more]}
        own, foreign = foreign_losses(model, documents, {"a": "b"}, chunk_length)
        assert foreign.keys() == {"a"}
        for name, ids in documents.items():
            torch.testing.assert_close(own[name], uncut_losses(model, ids), rtol=1e-5, atol=1e-5)
        expected = losses_with_memory_of(model, *documents.values())
        torch.testing.assert_close(foreign["a"], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(foreign["a"][:N], own["a"][:N])
        assert length <= N + 1 or not torch.isclose(foreign["a"][N:], own["a"][N:]).all()

    def test_each_other_and_oneself(self):
        model = tiny_model(**MODES[2])
        documents = {"a": random_ids(1, 23), "b": random_ids(1, 30, seed=1), "c": random_ids(1, 16, seed=2)}
        own, foreign = foreign_losses(model, documents, {"a": "b", "b": "a", "c": "c"}, 3)
        assert torch.equal(foreign["c"], own["c"])
        for one, other in (("a", "b"), ("b", "a")):
            alone = {name: documents[name] for name in (one, other)}
            assert torch.equal(foreign_losses(model, alone, {one: other}, 3)[1][one], foreign[one])

    def test_the_last_memory_of_a_shorter_document_stays(self):
        model, ids = tiny_model(torch.float64), random_ids(1, 5 * N)
        shorter = random_ids(1, 2 * N + 3, seed=1)
        found = foreign_losses(model, {"a": ids, "b": shorter}, {"a": "b"}, N)[1]["a"]
        with_last = foreign_losses(model, {"a": ids, "b": shorter[:, : 2 * N + 1]}, {"a": "b"}, N)[1]["a"]
        assert torch.equal(found, with_last)
        # After three segments it would be another one.
        longer = foreign_losses(model, {"a": ids, "b": random_ids(1, 4 * N, seed=1)}, {"a": "b"}, N)[1]["a"]
        assert torch.equal(found[: 3 * N], longer[: 3 * N])
        assert not torch.isclose(found[3 * N :], longer[3 * N :]).all()

    def test_counts_all_that_is_read(self):
        counts = []
        documents = {"a": random_ids(1, 12), "b": random_ids(1, 7, seed=1)}
        foreign_losses(tiny_model(), documents, {"a": "b"}, 4, counts.append)
        assert sum(counts) == 11 + 11 + 6


class TestFullAttention:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_is_that_of_the_source(self, variant, tmp_path):
        source = base_model(variant)
        source.save_pretrained(tmp_path / "base")
        convert_to_infini(tmp_path / "base", tmp_path / "infini", segment_length=4, head_gate_init_value=0.0)
        ids = random_ids(1, 40)
        found = base_of(load_model(tmp_path / "infini"))
        assert type(found) is type(source)
        assert torch.equal(window_losses(found, ids, 32), window_losses(source, ids, 32))

    def test_takes_the_dtype_and_the_weights_as_they_are(self, tmp_path):
        model = tiny_model(torch.bfloat16)
        found = base_of(model)
        assert found.dtype == torch.bfloat16
        assert torch.equal(
            found.model.layers[1].self_attn.q_proj.weight, model.model.layers[1].self_attn.q_proj.weight
        )


class TestWindowLosses:
    @pytest.mark.parametrize("length", [2, 7, 8, 9, 12, 13, 30])
    @pytest.mark.parametrize("window", [2, 7, 8])
    def test_each_token_is_given_half_a_window(self, length, window):
        model, ids = base_model(), random_ids(1, length)
        found = window_losses(model, ids, window)
        expected = []
        for token in range(1, length):
            # The first window is scored whole, of each other the second half.
            steps = max(0, math.ceil((token + 1 - window) / (window // 2)))
            start = steps * (window // 2)
            assert start == 0 or window / 2 <= token - start < window
            expected.append(uncut_losses(model, ids[:, start : token + 1])[-1])
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("window", [1, 65])
    def test_refuses_windows_that_the_model_cannot_read(self, window):
        with pytest.raises(ValueError, match=f"window={window} must be at least 2 and at most .*=64"):
            window_losses(base_model(), random_ids(1, 9), window)


class TestMemoryOff:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("mode", MODES)
    def test_is_a_closed_gate_bit_for_bit_and_is_undone(self, mode, dtype):
        model, ids = tiny_model(dtype, **mode), random_ids(1, 3 * N + 2)
        on = token_losses(model, ids, 6)
        with memory_off(model):
            assert torch.equal(model.local_shares(), torch.ones(2, 4, dtype=model.local_shares().dtype))
            off = token_losses(model, ids, 6)
        assert torch.equal(token_losses(model, ids, 6), on)
        assert torch.equal(off[: N - 1], on[: N - 1])
        assert not torch.isclose(off[N:], on[N:]).all()

        for layer in model.model.layers:
            layer.self_attn.head_gates.weight.data.fill_(1e4)
        assert torch.equal(token_losses(model, ids, 6), off)

    OPTIONS = {"memory_layers": [1], "memory_feature_map": "exp", "token_gates": True, "num_memory_slots": 3}

    def test_is_local_attention_alone_with_every_option(self):
        mode, ids = MODES[2], random_ids(1, 4 * N + 2)
        model, plain = tiny_model(**mode, **self.OPTIONS), tiny_model(**mode, memory_layers=[])
        plain.load_state_dict(model.state_dict(), strict=False)
        on = token_losses(model, ids, 6)
        with memory_off(model):
            off = token_losses(model, ids, 6)
        assert torch.equal(off, token_losses(plain, ids, 6))
        assert torch.equal(token_losses(model, ids, 6), on)
        with memory_off(plain):
            assert torch.equal(token_losses(plain, ids, 6), off)

    def test_matrix_and_slots_apart(self):
        mode, ids = MODES[2], random_ids(1, 4 * N + 2)
        model = tiny_model(**mode, **self.OPTIONS)
        without_slots = tiny_model(**mode, **self.OPTIONS | {"num_memory_slots": 0})
        without_slots.load_state_dict(model.state_dict(), strict=False)
        with memory_off(model, matrix=False):
            assert torch.equal(token_losses(model, ids, 6), token_losses(without_slots, ids, 6))
        with memory_off(model, slots=False):
            found = token_losses(model, ids, 6)
        model.model.layers[1].self_attn.head_gates.weight.data.fill_(1e4)
        assert torch.equal(found, token_losses(model, ids, 6))
        with memory_off(model, matrix=False, slots=False):
            assert torch.equal(found, token_losses(model, ids, 6))

    def test_ignores_whatever_the_memory_holds(self):
        model, ids = tiny_model(), random_ids(1, 4 * N)

        def last_logits(scale):
            cache = InfiniCache(model.config)
            with torch.no_grad():
                model(ids[:, : 3 * N], past_key_values=cache)
                for layer in cache.layers:
                    layer.memory.mul_(scale)
                return model(ids[:, 3 * N :], past_key_values=cache).logits

        assert not torch.equal(last_logits(0.0), last_logits(1.0))
        with memory_off(model):
            assert torch.equal(last_logits(0.0), last_logits(1.0))

    def test_is_undone_after_an_error(self):
        model = tiny_model()
        before = model.local_shares()
        with pytest.raises(KeyError), memory_off(model):
            raise KeyError
        assert torch.equal(model.local_shares(), before)

    def test_reaches_gates_that_peft_has_wrapped(self):
        peft = pytest.importorskip("peft")
        model, ids = tiny_model(), random_ids(1, 3 * N)
        with memory_off(model):
            expected = token_losses(model, ids, N)
        config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["head_gates"])
        wrapped = peft.get_peft_model(model, config).eval()
        assert not torch.isclose(token_losses(wrapped, ids, N), expected).all()
        with memory_off(wrapped):
            torch.testing.assert_close(token_losses(wrapped, ids, N), expected)

    def test_refuses_a_model_without_memory(self):
        with pytest.raises(TypeError, match="LlamaForCausalLM has no memory"), memory_off(base_model()):
            pass


def filled_nbytes(model):
    """Bytes of a cache of the model after a text."""
    with torch.no_grad():
        cache = model(random_ids(1, 60), use_cache=True).past_key_values
    return sum(state.nbytes for layer in cache.layers for state in layer.states().values())


class TestLongerWindow:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("mode", FOREIGN_MODES)
    def test_is_local_attention_with_as_much_state(self, mode, dtype):
        model, ids = tiny_model(dtype, **mode), random_ids(1, 60)
        length = window_of_state(model.config, model.dtype)
        local = tiny_model(dtype, **mode | {"memory_layers": [], "num_memory_slots": 0, "segment_length": length})
        local.load_state_dict(model.state_dict(), strict=False)
        with longer_window(model) as found:
            assert found == length
            losses = token_losses(model, ids, 4)
        torch.testing.assert_close(losses, token_losses(local, ids, 4), rtol=0, atol=0)
        assert filled_nbytes(local) <= filled_nbytes(model)
        local.config.segment_length += 1
        assert filled_nbytes(local) > filled_nbytes(model)

    def test_refuses_what_the_base_has_no_positions_for(self):
        model = tiny_model(num_memory_slots=40, max_position_embeddings=64, **MODES[1])
        with pytest.raises(ValueError, match=r"no longer window of the same state.*max_position_embeddings=64"):
            longer_window(model).__enter__()

    def test_is_undone_after_an_error(self):
        model = tiny_model(num_memory_slots=3, **MODES[1])
        ids, segment_length = random_ids(1, 12), model.config.segment_length
        expected = token_losses(model, ids, 4)
        with pytest.raises(IndexError), longer_window(model):
            token_losses(model, random_ids(1, 12) + VOCABULARY, 4)
        assert model.config.segment_length == segment_length
        torch.testing.assert_close(token_losses(model, ids, 4), expected, rtol=0, atol=0)


class TestBuckets:
    def test_double(self):
        assert doubling_buckets(20, 5) == [(1, 5), (5, 10), (10, 20)]
        assert doubling_buckets(21, 5) == [(1, 5), (5, 10), (10, 20), (20, 21)]
        assert doubling_buckets(5, 5) == [(1, 5)]
        assert doubling_buckets(4, 1) == [(1, 2), (2, 4)]

    def test_means_by_hand(self):
        # Entry i is of token i + 1.
        losses = [torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([5.0, 6.0, 7.0])]
        found = by_bucket(losses, [(1, 3), (3, 6)])
        assert found == [(3.5, None, 4), (19 / 4, None, 4)]

    def test_standard_error_is_that_of_means_of_blocks(self):
        # Correlated within blocks: taken token by token, the error would be 16 times smaller.
        losses = torch.tensor([1.0, 3.0, 5.0, 3.0]).repeat_interleave(256)
        (found,) = by_bucket([losses], [(1, 1025)])
        assert found.mean == pytest.approx(3)
        assert found.standard_error == pytest.approx(math.sqrt((4 + 0 + 4 + 0) / 3 / 4))
        assert by_bucket([losses], [(1, 512)])[0].standard_error is None

    def test_differences_are_paired(self):
        on, off = torch.tensor([1.0, 1.0, 1.0, 2.0, 3.0]), torch.tensor([1.0, 1.0, 2.0, 4.0, 3.0])
        readings = {"on": {"text": on}, "off": {"text": off}}
        found = report(readings, {"model": {"on": "on", "off": "off"}}, 3)
        assert [row["minus_off"]["model"]["on"]["nll"] for row in found["buckets"]] == [0.0, -1.0]
        beyond = found["beyond_first_segment"]
        assert (beyond["start"], beyond["end"], beyond["tokens"]) == (3, 6, 3)
        assert beyond["conditions"]["on"]["nll"] == 2.0
        assert found["by_text"] == {}
        assert markdown(found).splitlines() == [
            "| position | tokens | on | off | model: on - off, nats |",
            "|---|---:|---:|---:|---:|",
            "| 1 to 2 | 2 | 2.72 (1.0000) | 2.72 (1.0000) | +0.0000 |",
            "| 3 to 5 | 3 | 7.39 (2.0000) | 20.09 (3.0000) | -1.0000 |",
            "| all from 3 | 3 | 7.39 (2.0000) | 20.09 (3.0000) | -1.0000 |",
        ]

    def test_what_is_won_of_what_can_be(self):
        off = torch.full((1536,), 3.0)
        # Above and below its mean by turns, in blocks of 256 tokens.
        noise = 0.1 * torch.tensor([1.0, -1.0]).repeat_interleave(256).repeat(3)
        roles = ("on", "off", "foreign", "bound")
        readings = {
            "on": {"a": off - 0.5, "b": off - 0.1},
            "off": {"a": off, "b": off},
            "foreign": {"a": off + 0.25, "b": off},
            # Of b, the bound wins nothing that is not noise.
            "bound": {"a": off - 1.0 + noise, "b": off - 0.01 + noise},
        }
        found = report(readings, {"model": {role: role for role in roles}}, 512)
        a, b = found["by_text"]["a"], found["by_text"]["b"]
        assert a["minus_off"]["model"]["foreign"]["nll"] == 0.25
        assert a["won"]["model"] == pytest.approx(0.5, rel=1e-3)
        assert b["won"]["model"] is None
        assert found["beyond_first_segment"]["won"]["model"] == pytest.approx(0.3 / 0.505, rel=1e-2)
        lines = markdown(found).splitlines()
        assert lines[0].endswith("| model: bound - off, nats | model: (on - off) / (bound - off) |")
        # A first segment of 511 tokens has a single block, and no error.
        assert lines[2].endswith("|  |")
        assert lines[-2].startswith("| a from 512 | 1,025 |")
        assert lines[-2].endswith("| 50% |")
        assert lines[-1].startswith("| b from 512 | 1,025 |")
        assert lines[-1].endswith("|  |")


class TestDocuments:
    @pytest.fixture
    def tokenizer(self, tmp_path):
        save_word_tokenizer(tmp_path)
        return load_tokenizer(tmp_path)

    def test_each_text_gets_the_memory_of_the_next(self, tokenizer):
        texts = {name: random_text(30, seed) for seed, name in enumerate("abc")}
        documents, memory_of = read_documents(tokenizer, texts, 20, None)
        assert memory_of == {"a": "b", "b": "c", "c": "a"}
        assert torch.equal(documents["b"], random_ids(30, seed=1)[None, :20])

    def test_a_named_one(self, tokenizer, tmp_path):
        (tmp_path / "other.txt").write_text(random_text(30, 3))
        texts = {name: random_text(30, seed) for seed, name in enumerate("ab")}
        documents, memory_of = read_documents(tokenizer, texts, 20, tmp_path / "other.txt")
        assert memory_of == {"a": "other", "b": "other"}
        assert torch.equal(documents["other"], random_ids(30, seed=3)[None, :20])
        with pytest.raises(ValueError, match="must be another text than other"):
            read_documents(tokenizer, {"other": texts["a"]}, 20, tmp_path / "other.txt")

    def test_what_follows_in_a_single_one(self, tokenizer):
        documents, memory_of = read_documents(tokenizer, {"a": random_text(45)}, 20, None)
        assert memory_of == {"a": "a from token 20 on"}
        assert torch.equal(documents["a from token 20 on"], random_ids(45)[None, 20:40])
        with pytest.raises(
            ValueError, match=r"has no 23 tokens beyond the first 23, .*name another text by --foreign"
        ):
            read_documents(tokenizer, {"a": random_text(45)}, 23, None)


class TestCommandLine:
    @pytest.fixture
    def folder(self, tmp_path):
        save_word_tokenizer(tmp_path / "infini")
        tiny_model().save_pretrained(tmp_path / "infini")
        base_model().save_pretrained(tmp_path / "base")
        (tmp_path / "book.txt").write_text(random_text(600))
        (tmp_path / "other.txt").write_text(random_text(600, 1))
        return tmp_path

    def test_end_to_end(self, folder, capsys):
        pytest.importorskip("matplotlib")
        other = f"other={folder / 'infini'}"
        options = ("--text", folder / "book.txt", "--tokens", 560, "--chunk-length", 100)
        options += ("--foreign", folder / "other.txt")
        options += ("--base", folder / "base", "--base-window", 32, "--output", folder / "docs" / "v1.0")
        main([str(argument) for argument in (folder / "infini", other, *options)])

        table = capsys.readouterr().out.splitlines()
        assert [line.split(" | ")[0] for line in table[2:]] == [
            "| 1 to 4",
            "| 5 to 9",
            "| 10 to 19",
            "| 20 to 39",
            "| 40 to 79",
            "| 80 to 159",
            "| 160 to 319",
            "| 320 to 559",
            "| all from 5",
            "",
            "Foreign memory: book with that of other.",
        ]
        found = json.loads(
            (folder / "docs" / "v1.0.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
        )
        assert [bucket["tokens"] for bucket in found["buckets"]] == [4, 5, 10, 20, 40, 80, 160, 240]
        first = found["buckets"][0]["minus_off"]["infini"]
        assert first["on"]["nll"] == first["foreign"]["nll"] == 0.0
        beyond = found["beyond_first_segment"]
        assert beyond["minus_off"]["infini"] == beyond["minus_off"]["other"]
        assert all(difference["standard_error"] > 0 for difference in beyond["minus_off"]["infini"].values())
        assert list(beyond["conditions"]) == [
            "infini: memory on",
            "infini: memory off",
            "infini: foreign memory",
            "base: full attention, windows of 32",
            "other: memory on",
            "other: memory off",
            "other: foreign memory",
        ]
        assert found["settings"]["tokens_by_text"] == {"book": 560, "other": 560}
        assert found["settings"]["foreign"] == {"book": "other"}
        assert found["models"]["infini"]["segment_length"] == N
        assert (folder / "docs" / "v1.0.png").read_bytes().startswith(b"\x89PNG")

    def test_a_conversion_brings_its_bound_and_a_text_its_other_memory(self, folder, capsys):
        converted = folder / "converted"
        convert_to_infini(folder / "base", converted, segment_length=4, head_gate_init_value=0.0)
        arguments = (converted, f"again={converted}", "--tokenizer", folder / "infini", "--text", folder / "book.txt")
        main([str(argument) for argument in (*arguments, "--tokens", 290)])
        found = capsys.readouterr()
        heads = found.out.splitlines()[0].split(" | ")
        assert [head for head in heads if "full attention" in head] == ["converted: full attention, windows of 64"]
        # The same weights have the same bound, which is read once.
        assert [head for head in heads if "bound - off, nats" in head] == [
            "converted: bound - off, nats",
            "again: bound - off, nats",
        ]
        assert found.out.splitlines()[-1] == "Foreign memory: book with that of book from token 290 on."
        cells = dict(zip(heads, found.out.splitlines()[-3].split(" | ")))
        expected = window_losses(base_model(), random_ids(600)[None, :290], 64)[3:].mean()
        assert cells["converted: full attention, windows of 64"].endswith(f"({expected:.4f})")

    def test_what_slots_and_matrix_do_apart(self, folder, capsys):
        tiny_model(**MODES[1], num_memory_slots=3).save_pretrained(folder / "slots")
        arguments = (folder / "slots", f"plain={folder / 'infini'}", "--tokenizer", folder / "infini", "--parts")
        texts = ("--text", folder / "book.txt", "--text", folder / "other.txt", "--tokens", 100)
        main([str(argument) for argument in (*arguments, *texts)])
        table = capsys.readouterr().out.splitlines()
        heads = table[0].split(" | ")
        assert [head for head in heads if head.endswith("off, nats |") or head.endswith("off, nats")] == [
            "slots: on - off, nats",
            "slots: foreign - off, nats",
            "slots: matrix off - off, nats",
            "slots: slots off - off, nats",
            "plain: on - off, nats",
            "plain: foreign - off, nats |",
        ]
        assert [line.split(" | ")[0] for line in table[-5:-2]] == ["| all from 5", "| book from 5", "| other from 5"]
        assert table[-1] == "Foreign memory: book with that of other; other with that of book."

    def test_what_the_state_would_win_as_a_longer_window(self, folder, capsys):
        model = tiny_model(**MODES[1], num_memory_slots=3)
        model.save_pretrained(folder / "slots")
        arguments = (folder / "slots", "--tokenizer", folder / "infini", "--longer-window")
        texts = ("--text", folder / "book.txt", "--foreign", folder / "other.txt", "--tokens", 100)
        main([str(argument) for argument in (*arguments, *texts)])
        table = capsys.readouterr().out.splitlines()
        heads = table[0].split(" | ")
        cells = dict(zip(heads, table[-3].split(" | ")))
        with longer_window(model):
            expected = token_losses(model, random_ids(600)[None, :100], 7)[4:].mean()
        head = f"slots: memory off, window of {window_of_state(model.config, model.dtype)}"
        assert cells[head].endswith(f"({expected:.4f})")
        assert heads[-1] == "slots: longer window - off, nats |"

    @pytest.mark.parametrize(
        ("options", "message"),
        [(("--base-window", "4000"), "window=4000 must be"), (("--longer-window",), "no longer window of the same")],
    )
    def test_windows_are_checked_before_any_reading(self, folder, monkeypatch, options, message):
        monkeypatch.setattr("infini_transformers.evaluation.by_position.foreign_losses", None)
        tiny_model(**MODES[1], num_memory_slots=3).save_pretrained(folder / "first")
        fields = {**MODES[1], "num_memory_slots": 3, "max_position_embeddings": 16}
        tiny_model(**fields).save_pretrained(folder / "second")
        texts = ("--text", folder / "book.txt", "--foreign", folder / "other.txt", "--tokens", 100)
        arguments = (folder / "first", folder / "second", "--base", folder / "base", *texts, *options)
        with pytest.raises(ValueError, match=message):
            main([str(argument) for argument in (*arguments, "--tokenizer", folder / "infini")])

    def test_errors(self, folder, capsys):
        infini, text = str(folder / "infini"), ("--text", str(folder / "book.txt"))
        foreign = ("--foreign", str(folder / "other.txt"))
        with pytest.raises(SystemExit):
            main([infini, infini, *text])
        assert "must differ: give name=folder" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            main([infini, *text])
        assert "book has no 16,384 tokens beyond the first 16,384" in capsys.readouterr().err
        with pytest.raises(ValueError, match="holds a llama model, not one with Infini-attention"):
            main([str(folder / "base"), "--tokenizer", infini, *text, *foreign])
        with pytest.raises(ValueError, match="names of their files, which must differ"):
            main([infini, *text, *text])
        (folder / "short.txt").write_text(random_text(5))
        with pytest.raises(ValueError, match="short has 5 tokens, not a segment of 5"):
            main([infini, *text, "--foreign", str(folder / "short.txt")])

    def test_names(self, tmp_path):
        assert name_and_source("tuned/merged/") == ("merged", "tuned/merged/")
        assert name_and_source("mine=tuned/merged") == ("mine", "tuned/merged")
        assert name_and_source("models/smollm2.q4.gguf") == ("smollm2.q4", "models/smollm2.q4.gguf")
        (tmp_path / "lr=0.1").mkdir()
        assert name_and_source(str(tmp_path / "lr=0.1")) == ("lr=0.1", str(tmp_path / "lr=0.1"))
