"""Perplexity by position: what is measured is what a plain forward gives, and the ablation changes the gates alone."""

import json
import math

import pytest
import torch
from base_models import base_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import MODES, random_ids, tiny_model
from torch.nn.functional import cross_entropy
from words import random_text, save_word_tokenizer

from evaluation.by_position import by_bucket, doubling_buckets, main, markdown, name_and_source, report
from evaluation.losses import memory_off, token_losses, window_losses
from modeling_infini import InfiniCache


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
        found = report({"on": [on], "off": [off]}, {"model": ("on", "off")}, 3)
        assert [row["on_minus_off"]["model"]["nll"] for row in found["buckets"]] == [0.0, -1.0]
        beyond = found["beyond_first_segment"]
        assert (beyond["start"], beyond["end"], beyond["tokens"]) == (3, 6, 3)
        assert beyond["conditions"]["on"]["nll"] == 2.0
        assert markdown(found).splitlines() == [
            "| position | tokens | on | off | model: on - off, nats |",
            "|---|---:|---:|---:|---:|",
            "| 1 to 2 | 2 | 2.72 (1.0000) | 2.72 (1.0000) | +0.0000 |",
            "| 3 to 5 | 3 | 7.39 (2.0000) | 20.09 (3.0000) | -1.0000 |",
            "| all from 3 | 3 | 7.39 (2.0000) | 20.09 (3.0000) | -1.0000 |",
        ]


class TestCommandLine:
    @pytest.fixture
    def folder(self, tmp_path):
        save_word_tokenizer(tmp_path / "infini")
        tiny_model().save_pretrained(tmp_path / "infini")
        base_model().save_pretrained(tmp_path / "base")
        (tmp_path / "book.txt").write_text(random_text(600))
        return tmp_path

    def test_end_to_end(self, folder, capsys):
        pytest.importorskip("matplotlib")
        other = f"other={folder / 'infini'}"
        options = ("--text", folder / "book.txt", "--tokens", 560, "--chunk-length", 100)
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
        ]
        found = json.loads(
            (folder / "docs" / "v1.0.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
        )
        assert [bucket["tokens"] for bucket in found["buckets"]] == [4, 5, 10, 20, 40, 80, 160, 240]
        assert found["buckets"][0]["on_minus_off"]["infini"]["nll"] == 0.0
        beyond = found["beyond_first_segment"]
        assert beyond["on_minus_off"]["infini"] == beyond["on_minus_off"]["other"]
        assert beyond["on_minus_off"]["infini"]["standard_error"] > 0
        assert set(beyond["conditions"]) == {
            "base: full attention, windows of 32",
            "infini: memory off",
            "infini: memory on",
            "other: memory off",
            "other: memory on",
        }
        assert found["settings"]["tokens_by_text"] == {"book": 560}
        assert found["models"]["infini"]["segment_length"] == N
        assert (folder / "docs" / "v1.0.png").read_bytes().startswith(b"\x89PNG")

    def test_errors(self, folder, capsys):
        infini, text = str(folder / "infini"), ("--text", str(folder / "book.txt"))
        with pytest.raises(SystemExit):
            main([infini, infini, *text])
        assert "must differ: give name=folder" in capsys.readouterr().err
        with pytest.raises(ValueError, match="holds a llama model, not one with Infini-attention"):
            main([str(folder / "base"), "--tokenizer", infini, *text])
        with pytest.raises(ValueError, match="names of their files, which must differ"):
            main([infini, *text, *text])

    def test_names(self, tmp_path):
        assert name_and_source("tuned/merged/") == ("merged", "tuned/merged/")
        assert name_and_source("mine=tuned/merged") == ("mine", "tuned/merged")
        assert name_and_source("models/smollm2.q4.gguf") == ("smollm2.q4", "models/smollm2.q4.gguf")
        (tmp_path / "lr=0.1").mkdir()
        assert name_and_source(str(tmp_path / "lr=0.1")) == ("lr=0.1", str(tmp_path / "lr=0.1"))
