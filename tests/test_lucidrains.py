"""Models of infini-transformer-pytorch against the package itself."""

import pytest
import torch
from safetensors.torch import save_file

from infini_transformers.conversion import load_lucidrains
from modeling_infini import InfiniCache, InfiniForCausalLM


peer = pytest.importorskip("infini_transformer_pytorch")

SIZES = {"num_tokens": 31, "dim": 24, "depth": 2, "dim_head": 6, "heads": 4}


def their_model(**fields):
    torch.manual_seed(0)
    model = peer.InfiniTransformer(**SIZES, **fields).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "freqs" not in name:
                weight.add_(torch.randn_like(weight) * (1.0 if "head_gates" in name else 0.3))
        for attention, _ in model.layers:
            attention.fastweight_mem.head_gates.sub_(10)
    return model


def their_logits(model, ids, segment_length):
    logits, memories = [], None
    for segment in ids.split(segment_length, 1):
        result = model(segment, past_memories=memories, return_new_memories=True)
        logits.append(result.logits)
        memories = result.past_memories
    return torch.cat(logits, 1)


@pytest.mark.parametrize("learned_delta_update", [False, True])
@pytest.mark.parametrize("use_mem_delta_rule", [False, True])
def test_logits_over_several_segments_agree(use_mem_delta_rule, learned_delta_update):
    theirs = their_model(use_mem_delta_rule=use_mem_delta_rule, learned_delta_update=learned_delta_update)
    ours = load_lucidrains(theirs.state_dict(), segment_length=7, use_mem_delta_rule=use_mem_delta_rule).eval()
    ids = torch.randint(0, 31, (2, 40))
    with torch.no_grad():
        expected = their_logits(theirs, ids, 7)
        torch.testing.assert_close(ours(ids).logits, expected, atol=1e-4, rtol=1e-4)
        cache = InfiniCache(ours.config)
        steps = [ours(step, past_key_values=cache).logits for step in ids.split(1, 1)]
        torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-4, rtol=1e-4)
        # The memory matters here, or the test would say nothing about it.
        assert not torch.allclose(their_logits(theirs, ids[:, 7:], 7), expected[:, 7:], atol=1e-2)


def test_files_and_the_wrapper_load_and_the_model_saves(tmp_path):
    wrapper = peer.InfiniTransformerWrapper(their_model(), segment_length=7)
    torch.save(wrapper.state_dict(), tmp_path / "model.pt")
    save_file(wrapper.model.state_dict(), tmp_path / "model.safetensors")
    ids = torch.randint(0, 31, (1, 20))
    ours = load_lucidrains(tmp_path / "model.pt", segment_length=7).eval()
    ours.save_pretrained(tmp_path / "ours")
    again = InfiniForCausalLM.from_pretrained(tmp_path / "ours").eval()
    other = load_lucidrains(tmp_path / "model.safetensors", segment_length=7).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, ours(ids).logits)
        assert torch.equal(other(ids).logits, ours(ids).logits)


def test_what_is_not_theirs_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no state dict of an InfiniTransformer.*but step, model"):
        load_lucidrains({"step": torch.ones(1), "model": torch.ones(1)}, segment_length=7)
    weights = their_model().state_dict()
    with pytest.raises(ValueError, match=r"layers.0.2.conv does not fit"):
        load_lucidrains(weights | {"layers.0.2.conv": torch.ones(1)}, segment_length=7)
    with pytest.raises(ValueError, match=r"'layers.1.1.proj_in.bias' is missing"):
        load_lucidrains({k: w for k, w in weights.items() if k != "layers.1.1.proj_in.bias"}, segment_length=7)
    with pytest.raises(ValueError, match="theta 10000"):
        load_lucidrains(weights | {"layers.1.0.rotary_emb.freqs": torch.ones(3)}, segment_length=7)
    with pytest.raises(FileNotFoundError, match="no file"):
        load_lucidrains(tmp_path / "missing.pt", segment_length=7)


def test_the_widest_dtype_of_the_weights_is_kept():
    weights = their_model().state_dict()
    exact = load_lucidrains(weights, segment_length=7).state_dict()
    for name in ("token_emb.weight", "norm.gamma"):
        weights[name] = weights[name].to(torch.float16 if "emb" in name else torch.bfloat16)
    ours = load_lucidrains(weights, segment_length=7).state_dict()
    for name, weight in ours.items():
        changed = {"model.embed_tokens.weight": "token_emb.weight", "model.norm.weight": "norm.gamma"}.get(name)
        assert torch.equal(weight, exact[name] if changed is None else weights[changed].float())
    assert load_lucidrains({k: w.half() for k, w in weights.items()}, segment_length=7).dtype == torch.float16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds no state dict, but a list"),
        (torch.ones(2), "holds no state dict, but a Tensor"),
        ({"token_emb.weight": torch.ones(2, 2), "step": 3}, "'step' is a int"),
        (b"", "cannot be read with weights_only=True"),
        (b"in letters", "cannot be read with weights_only=True"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, content, message):
    file = tmp_path / "model.pt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(ValueError, match=rf"model\.pt.*{message}"):
        load_lucidrains(file, segment_length=7)


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("norm.gamma", torch.ones(10)),
        ("token_emb.weight", torch.ones(10)),
        ("layers.0.0.fastweight_mem.head_gates", torch.ones(0, 1, 1)),
        ("layers.0.0.to_out.weight", torch.ones(24)),
        ("layers.0.0.to_qkv.weight", torch.ones(7, 24)),
        ("layers.x.0.norm.gamma", torch.ones(24)),
        ("norm.gamma", torch.ones(24, dtype=torch.int8)),
    ],
)
def test_weights_of_other_shapes_are_refused(name, weight):
    with pytest.raises(ValueError, match=r"is not one of infini|stored as torch\.int8"):
        load_lucidrains(their_model().state_dict() | {name: weight}, segment_length=7)


def test_settings_without_a_meaning_are_named():
    with pytest.raises(ValueError, match=r"^segment_length=0 must be at least 1"):
        load_lucidrains(their_model().state_dict(), segment_length=0)
