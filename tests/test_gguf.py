"""GGUF files: what their keys and tensors say is in the converted model, or they are refused by name."""

import json

import gguf
import numpy as np
import pytest
import torch
from base_models import SIZES, base_model
from huggingface_hub import ModelCard
from tiny import random_ids
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from versions import KNOWS_GGUF_TOKENIZERS

from infini_transformers.conversion import convert_from_infini, convert_to_infini, save_memory
from infini_transformers.evaluation.loading import load_model, segment_length_of
from modeling_infini import InfiniForCausalLM


N = 9
HEAD_DIM = 8


def write_gguf(path, model, add=lambda writer: None, skip=(), architecture=None, qtype=None):
    """The file of a tiny base model as llama.cpp's converter writes it; `add` writes more, `skip` leaves keys out."""
    config = model.config
    architecture = architecture or {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    keys = {
        "context_length": (writer.add_uint32, config.max_position_embeddings),
        "embedding_length": (writer.add_uint32, config.hidden_size),
        "block_count": (writer.add_uint32, config.num_hidden_layers),
        "feed_forward_length": (writer.add_uint32, config.intermediate_size),
        "attention.head_count": (writer.add_uint32, config.num_attention_heads),
        "attention.head_count_kv": (writer.add_uint32, config.num_key_value_heads),
        "attention.key_length": (writer.add_uint32, config.head_dim),
        "attention.value_length": (writer.add_uint32, config.head_dim),
        "attention.layer_norm_rms_epsilon": (writer.add_float32, config.rms_norm_eps),
        "rope.freq_base": (writer.add_float32, config.rope_parameters["rope_theta"]),
    }
    for name, (write, value) in keys.items():
        if name not in skip:
            write(f"{architecture}.{name}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads and architecture == "llama":
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), weight.float().numpy())
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def base(model_type="llama", **fields):
    return base_model(model_type, **{"head_dim": HEAD_DIM, "rope_parameters": {"rope_theta": 10_000.0}, **fields})


def logits_agree(folder, model, **tolerance):
    ours = InfiniForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(ours(random_ids(2, N)).logits, model(random_ids(2, N)).logits, **tolerance)
    return ours


def with_rope(model, **parameters):
    """The same weights under other angles."""
    config = type(model.config)(
        **{**model.config.to_dict(), "rope_parameters": {"rope_theta": 10_000.0, **parameters}}
    )
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 10}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen2", {"head_dim": 12, "tie_word_embeddings": False}),
        ("qwen3", {}),
        ("qwen3", {"attention_bias": True, "num_key_value_heads": 1}),
    ],
)
def test_every_weight_is_read(tmp_path, variant, fields):
    model = base(variant, **fields)
    convert_to_infini(write_gguf(tmp_path / "m.gguf", model), tmp_path / "ours", segment_length=N)
    ours = logits_agree(tmp_path / "ours", model, rtol=0, atol=0)
    assert (ours.config.bos_token_id, ours.config.eos_token_id) == (None, None)


def test_weights_are_those_that_transformers_reads(tmp_path):
    file = write_gguf(
        tmp_path / "m.gguf",
        base(),
        lambda writer: (writer.add_vocab_size(SIZES["vocab_size"]), writer.add_rope_dimension_count(HEAD_DIM)),
        skip=("attention.key_length", "attention.value_length"),
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    convert_to_infini(file, tmp_path / "ours", segment_length=N)
    logits_agree(tmp_path / "ours", theirs, rtol=0, atol=0)


def add_scaling(kind, factor=None, original=None, **more):
    def add(writer):
        if kind:
            writer.add_rope_scaling_type(kind)
        if factor:
            writer.add_rope_scaling_factor(factor)
        if original:
            writer.add_rope_scaling_orig_ctx_len(original)
        for name, value in more.items():
            getattr(writer, f"add_rope_scaling_{name}")(value)

    return add


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 4.0}
MSCALE = 0.1 * np.log(4.0) + 1.0
KINDS = gguf.RopeScalingType


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("add", "expected"),
    [
        (add_scaling(KINDS.YARN, 4.0, 16), YARN),
        (add_scaling(KINDS.YARN, 4.0), YARN | {"original_max_position_embeddings": 64}),
        (
            add_scaling(KINDS.YARN, 4.0, 16, yarn_beta_fast=4.0, yarn_beta_slow=0.25),
            YARN | {"beta_fast": 4.0, "beta_slow": 0.25},
        ),
        (add_scaling(KINDS.YARN, 4.0, 16, yarn_attn_factor=1.5), YARN | {"attention_factor": 1.5}),
        (add_scaling(KINDS.YARN, 4.0, 16, attn_factors=1.5), YARN | {"attention_factor": 1.5 * MSCALE}),
        (add_scaling(KINDS.YARN, 4.0, 16, yarn_ext_factor=1.0, attn_factors=1.0, finetuned=True), YARN),
        (add_scaling(KINDS.LINEAR, 4.0), LINEAR),
        (add_scaling(None, 4.0), LINEAR),
        (lambda writer: writer.add_float32(f"{writer.arch}.rope.scale_linear", 4.0), LINEAR),
        (add_scaling(KINDS.NONE, 4.0), {}),
        (add_scaling(KINDS.LINEAR, 1.0), {}),
        (add_scaling(KINDS.YARN, 1.0, 64), {}),
    ],
)
def test_scaled_angles_are_kept(tmp_path, model_type, add, expected):
    model = base(model_type)
    convert_to_infini(write_gguf(tmp_path / "m.gguf", model, add), tmp_path / "ours", segment_length=N)
    ours = logits_agree(tmp_path / "ours", with_rope(model, **expected))
    assert ours.config.rope_parameters["rope_type"] == expected.get("rope_type", "default")


def rope_freqs(head_dim, theta, **llama3):
    """What llama.cpp's converter writes for a scaling as in Llama 3.1."""
    length, factor = llama3["original_max_position_embeddings"], llama3["factor"]
    low, high = llama3["low_freq_factor"], llama3["high_freq_factor"]
    waves = 2 * np.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    fade = np.clip((length / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - fade) / factor + fade)).astype(np.float32)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("head_dim", "theta", "llama3"),
    [
        (128, 500_000.0, LLAMA3),
        (64, 500_000.0, LLAMA3 | {"factor": 32.0}),
        (
            64,
            500_000.0,
            LLAMA3 | {"low_freq_factor": 2.0, "high_freq_factor": 8.0, "original_max_position_embeddings": 16384},
        ),
        (
            64,
            10_000.0,
            LLAMA3 | {"low_freq_factor": 1.7, "high_freq_factor": 3.3, "original_max_position_embeddings": 300},
        ),
        (8, 500.0, LLAMA3 | {"original_max_position_embeddings": 16}),
        (16, 500.0, LLAMA3 | {"original_max_position_embeddings": 16}),
        (16, 500.0, LLAMA3 | {"original_max_position_embeddings": 10_000}),
        (4, 500.0, LLAMA3 | {"original_max_position_embeddings": 32}),
    ],
)
def test_llama_3s_factors_become_its_scaling(tmp_path, head_dim, theta, llama3):
    model = base(head_dim=head_dim, rope_parameters={"rope_theta": theta})
    factors = rope_freqs(head_dim, theta, **llama3)
    file = write_gguf(tmp_path / "m.gguf", model, lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    convert_to_infini(file, tmp_path / "ours", segment_length=N)
    ours = logits_agree(tmp_path / "ours", with_rope(model, rope_type="llama3", **llama3 | {"rope_theta": theta}))
    if head_dim > 16 and llama3["low_freq_factor"] == 1.0:
        assert ours.config.rope_parameters == {"rope_type": "llama3", "rope_theta": theta, **llama3}


def test_factors_that_leave_the_edges_open(tmp_path):
    model = base()
    factors = np.array([1, 1, 4, 8], np.float32)
    file = write_gguf(tmp_path / "m.gguf", model, lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    convert_to_infini(file, tmp_path / "ours", segment_length=N)
    config = InfiniForCausalLM.from_pretrained(tmp_path / "ours").config
    found = ROPE_INIT_FUNCTIONS["llama3"](config)[0]
    torch.testing.assert_close(found, 10_000 ** -(torch.arange(0, 8, 2) / 8) / torch.tensor(factors))


@pytest.mark.parametrize(
    "factors",
    [[1, 4, 1, 8], [8, 4, 1, 1], [1, 1, 4], [1, 1.2, 1.3, 8], [1, 2, 0, 4], [1, 1, 4, np.inf], [1, np.nan, 2, 4]],
)
def test_other_factors_are_refused(tmp_path, factors):
    factors = np.array(factors, np.float32)
    file = write_gguf(tmp_path / "m.gguf", base(), lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    with pytest.raises(ValueError, match=r"rope_freqs.weight"):
        convert_to_infini(file, tmp_path / "ours", segment_length=N)


def test_factors_beside_another_scaling_are_refused(tmp_path):
    def add(writer):
        add_scaling(KINDS.YARN, 4.0, 16)(writer)
        writer.add_tensor("rope_freqs.weight", np.array([1, 1, 4, 8], np.float32))

    with pytest.raises(ValueError, match=r'rope_freqs.weight.*"yarn"'):
        convert_to_infini(write_gguf(tmp_path / "m.gguf", base(), add), tmp_path / "ours", segment_length=N)


def test_a_sliding_window_is_that_of_a_mistral(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", base("mistral"), lambda writer: writer.add_sliding_window(11))
    convert_to_infini(file, tmp_path / "ours", head_gate_init_value=1000)
    ours = InfiniForCausalLM.from_pretrained(tmp_path / "ours")
    model = base("mistral", sliding_window=11)
    assert ours.config.converted_from["model_type"] == "mistral"
    with torch.no_grad():
        torch.testing.assert_close(
            ours(random_ids(1, 40)).logits, model(random_ids(1, 40)).logits, atol=1e-4, rtol=1e-4
        )


def key(name, value):
    def add(writer):
        write = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        write.get(type(value), writer.add_array)(name.format(arch=writer.arch), value)

    return add


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope.scaling.type", "longrope"),
        ("rope.scaling.attn_factor", 1.5),
        ("rope.scaling.alpha", 2.0),
        ("rope.scaling.yarn_log_multiplier", 0.1),
        ("rope.scaling.yarn_beta_fast", 16.0),
        ("rope.dimension_count", 4),
        ("rope.dimension_sections", [2, 1, 1, 0]),
        ("rope.freq_base_swa", 1e4),
        ("attention.value_length", 6),
        ("attention.scale", 0.5),
        ("attention.causal", False),
        ("attention.max_alibi_bias", 8.0),
        ("attention.clamp_kqv", 1.0),
        ("attention.temperature_length", 9),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("logit_scale", 0.25),
        ("residual_scale", 0.5),
        ("embedding_scale", 12.0),
        ("expert_count", 8),
        ("expert_used_count", 2),
        ("pooling_type", 3),
        ("nextn_predict_layers", 1),
        ("attention.head_count_kv", [2, 1]),
        ("feed_forward_length", [32, 16]),
        ("nobody.knows", 3),
    ],
)
def test_keys_that_change_the_computation_are_refused_by_name(tmp_path, model_type, name, value):
    skip = (name,)
    file = write_gguf(tmp_path / "m.gguf", base(model_type), key(f"{{arch}}.{name}", value), skip)
    with pytest.raises(ValueError, match=f"{model_type}.{name}"):
        convert_to_infini(file, tmp_path / "ours", segment_length=N)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope.scaling.type", "none"),
        ("rope.scaling.factor", 1.0),
        ("rope.scaling.finetuned", False),
        ("rope.dimension_count", HEAD_DIM),
        ("attention.scale", HEAD_DIM**-0.5),
        ("attention.causal", True),
        ("attention.sliding_window", 0),
        ("attention.sliding_window", 64),
        ("attn_logit_softcapping", 0.0),
        ("logit_scale", 1.0),
        ("expert_count", 0),
        ("pooling_type", 0),
        ("use_parallel_residual", False),
        ("tensor_data_layout", "Meta AI original pth"),
        ("attention.head_count_kv", [2, 2]),
        ("vocab_size", SIZES["vocab_size"]),
    ],
)
def test_keys_that_ask_for_nothing_pass(tmp_path, name, value):
    model = base()
    convert_to_infini(
        write_gguf(tmp_path / "m.gguf", model, key(f"{{arch}}.{name}", value), (name,)),
        tmp_path / "ours",
        segment_length=N,
    )
    logits_agree(tmp_path / "ours", model)


@pytest.mark.parametrize(
    "name", ["attention.layer_norm_rms_epsilon", "context_length", "block_count", "attention.head_count"]
)
def test_a_missing_key_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=f"no llama.{name}: it is incomplete"):
        convert_to_infini(write_gguf(tmp_path / "m.gguf", base(), skip=(name,)), tmp_path / "ours", segment_length=N)


@pytest.mark.parametrize(
    "name",
    [
        "rope_factors_long.weight",
        "blk.0.attn_q_norm.weight",
        "blk.1.attn_sinks.weight",
        "blk.0.attn_q.scale",
        "blk.2.attn_norm.weight",
        "output.bias",
        "token_embd_norm.weight",
        "cls.weight",
        "blk.0.attn_v.bias",
        "blk.0.ffn_gate_inp.weight",
        "nobody.knows",
    ],
)
def test_a_tensor_without_a_place_is_refused_by_name(tmp_path, name):
    file = write_gguf(tmp_path / "m.gguf", base(), lambda writer: writer.add_tensor(name, np.ones(4, np.float32)))
    with pytest.raises(ValueError, match=f"1 weights.*{name}"):
        convert_to_infini(file, tmp_path / "ours", segment_length=N)


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (key("general.type", "adapter"), "an adapter.*Merge it"),
        (key("general.type", "mmproj"), "vision or audio part"),
        (key("general.type", "imatrix"), "importance matrix"),
        (key("split.count", 3), r"one of 3 files.*llama-gguf-split --merge"),
    ],
)
def test_files_without_a_whole_model_say_what_they_are(tmp_path, add, message):
    with pytest.raises(ValueError, match=message):
        convert_to_infini(write_gguf(tmp_path / "m.gguf", base(), add), tmp_path / "ours", segment_length=N)


@pytest.mark.parametrize(
    ("architecture", "message"), [("clip", "vision or audio part"), ("gemma2", '"gemma2". Supported are "llama"')]
)
def test_other_architectures_say_what_they_are(tmp_path, architecture, message):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    with pytest.raises(ValueError, match=message):
        convert_to_infini(tmp_path / "m.gguf", tmp_path / "ours", segment_length=N)


def test_a_vocabulary_alone_and_a_damaged_file_say_so(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "vocab.gguf", "llama")
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    with pytest.raises(ValueError, match="vocabulary without weights"):
        convert_to_infini(tmp_path / "vocab.gguf", tmp_path / "ours", segment_length=N)
    whole = write_gguf(tmp_path / "m.gguf", base()).read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut.gguf is incomplete or damaged"):
            convert_to_infini(tmp_path / "cut.gguf", tmp_path / "ours", segment_length=N)


ALPHABET = ["Ġ", "a", "b", "c", "1", "2", "ab", "12", "Ġa", "abc"]
BYTE_LEVEL = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": ["<bos>", "<eos>", *ALPHABET],
    "token_type": [3, 3] + [1] * len(ALPHABET),
    "merges": ["a b", "1 2", "Ġ a"],
    "bos_token_id": 0,
    "eos_token_id": 1,
}
PIECES = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab"]
SENTENCE_PIECE = {
    "model": "llama",
    "tokens": PIECES,
    "scores": [0.0, 0.0, 0.0, -4.0, -5.0, -6.0, -1.0, -2.0],
    "token_type": [2, 3, 3] + [1] * 5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "unknown_token_id": 0,
}


def keys(settings, **more):
    def add(writer):
        for name, value in {**settings, **more}.items():
            key(f"tokenizer.ggml.{name}" if "." not in name else name, value)(writer)

    return add


def converted_tokenizer(tmp_path, settings, **more):
    file = write_gguf(tmp_path / "m.gguf", base(), keys(settings, **more))
    convert_to_infini(file, tmp_path / "ours", segment_length=N)
    return AutoTokenizer.from_pretrained(tmp_path / "ours")


@pytest.mark.parametrize(
    ("settings", "more", "text", "tokens"),
    [
        (BYTE_LEVEL, {}, "abc 12", ["ab", "c", "Ġ", "12"]),
        (BYTE_LEVEL, {"add_bos_token": True}, "a", ["<bos>", "a"]),
        (BYTE_LEVEL, {"add_eos_token": True}, "a", ["a", "<eos>"]),
        (BYTE_LEVEL, {"pre": "smollm"}, "12", ["1", "2"]),
        pytest.param(BYTE_LEVEL, {"pre": "llama-bpe"}, "abc", ["<bos>", "abc"], marks=KNOWS_GGUF_TOKENIZERS),
        pytest.param(
            BYTE_LEVEL, {"pre": "llama-bpe", "add_bos_token": False}, "abc", ["abc"], marks=KNOWS_GGUF_TOKENIZERS
        ),
        (BYTE_LEVEL, {}, "a<eos>a", ["a", "<eos>", "a"]),
        pytest.param(
            BYTE_LEVEL,
            {"token_type": [3, 3] + [1] * 8 + [1, 4]},
            "aabc",
            ["a", "abc"],
            marks=KNOWS_GGUF_TOKENIZERS,
        ),
        (SENTENCE_PIECE, {}, "ab", ["<s>", "▁a", "b"]),
        (SENTENCE_PIECE, {"add_space_prefix": False}, "ab", ["<s>", "ab"]),
        (SENTENCE_PIECE, {"add_space_prefix": False, "add_bos_token": False}, " ab", ["▁a", "b"]),
        (SENTENCE_PIECE, {"add_bos_token": False, "add_eos_token": True}, "ab", ["▁a", "b", "</s>"]),
    ],
)
def test_tokenizers_do_as_their_keys_say(tmp_path, settings, more, text, tokens):
    tokenizer = converted_tokenizer(tmp_path, settings, **more)
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == tokens
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text.replace("<eos>", "")


@KNOWS_GGUF_TOKENIZERS
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("pre", ["qwen2", "default"])
def test_a_qwen_tokenizer_composes_characters_as_the_models_do(tmp_path, model_type, pre):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<bos>", "<eos>", *letters, "".join(letters[:2])]
    settings = {
        **BYTE_LEVEL,
        "pre": pre,
        "tokens": tokens,
        "token_type": [3, 3] + [1] * (len(tokens) - 2),
        "merges": [" ".join(letters[:2])],
    }
    source = write_gguf(
        tmp_path / "m.gguf",
        base(model_type, vocab_size=len(tokens)),
        lambda writer: [key(f"tokenizer.ggml.{name}", value)(writer) for name, value in settings.items()],
    )
    convert_to_infini(source, tmp_path / "ours", segment_length=N)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert tokenizer("e\u0301 a").input_ids == tokenizer("\u00e9 a").input_ids
    assert tokenizer.decode(tokenizer("e\u0301 a").input_ids) == "\u00e9 a"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"pre": "viking"}, 'tokenizer.ggml.pre = "viking"'),
        ({"model": "t5"}, 'tokenizer.ggml.model is "t5"'),
        ({"add_sep_token": True}, "tokenizer.ggml.add_sep_token"),
        pytest.param(
            {"tokens": ["<｜bos｜>", "<eos>", *ALPHABET]},
            "tokenizer.ggml.token_type says that '<｜bos｜>' is one token",
            marks=KNOWS_GGUF_TOKENIZERS,
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_rebuilt_is_left_out_with_its_reason(tmp_path, caplog, more, message):
    def add(writer):
        for name, value in {**BYTE_LEVEL, **more}.items():
            key(f"tokenizer.ggml.{name}", value)(writer)

    convert_to_infini(write_gguf(tmp_path / "m.gguf", base(), add), tmp_path / "ours", segment_length=N)
    assert message in caplog.text
    assert not list((tmp_path / "ours").glob("tokenizer*"))


def test_all_chat_templates_and_ends_of_turns_are_kept(tmp_path, caplog):
    tokenizer = converted_tokenizer(
        tmp_path,
        BYTE_LEVEL,
        **{
            "tokenizer.chat_template": "A",
            "tokenizer.chat_template.tool_use": "B",
            "tokenizer.chat_templates": ["tool_use"],
        },
        eot_token_id=3,
        eom_token_id=1,
    )
    assert tokenizer.chat_template == {"default": "A", "tool_use": "B"}
    assert InfiniForCausalLM.from_pretrained(tmp_path / "ours").generation_config.eos_token_id == [1, 3]
    assert "not used" not in caplog.text


def test_keys_without_a_use_are_named(tmp_path, caplog):
    def add(writer):
        key("tokenizer.huggingface.json", "{}")(writer)
        key("someone.note", 3)(writer)
        key("general.sampling.temp", 0.5)(writer)
        key("general.quantized_by", "someone")(writer)

    convert_to_infini(write_gguf(tmp_path / "m.gguf", base(), add), tmp_path / "ours", segment_length=N)
    assert "not used: tokenizer.huggingface.json, someone.note, general.sampling.temp." in caplog.text


def test_evaluation_reads_what_a_conversion_reads(tmp_path):
    model = base("mistral")
    file = write_gguf(tmp_path / "m.gguf", model, add_scaling(KINDS.YARN, 4.0, 16))
    with torch.no_grad():
        found = load_model(file, dtype=torch.float64)(random_ids(2, N)).logits
        expected = with_rope(model, **YARN).double()(random_ids(2, N)).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="holds a llama model, not one with Infini-attention"):
        segment_length_of(file)


def test_ids_beyond_the_vocabulary_are_passed_over(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", base(), key("tokenizer.ggml.padding_token_id", 2**32 - 1))
    convert_to_infini(file, tmp_path / "ours", segment_length=N)
    assert InfiniForCausalLM.from_pretrained(tmp_path / "ours").config.pad_token_id is None


def test_the_way_back_gives_the_source_and_its_angles(tmp_path):
    model = base("qwen3", num_key_value_heads=1)
    file = write_gguf(tmp_path / "m.gguf", model, add_scaling(KINDS.YARN, 4.0, 16))
    convert_to_infini(file, tmp_path / "ours", segment_length=N)
    convert_from_infini(tmp_path / "ours", tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    with torch.no_grad():
        assert torch.equal(back(random_ids(2, 40)).logits, with_rope(model, **YARN)(random_ids(2, 40)).logits)


def test_what_stands_beside_the_file_is_not_its(tmp_path):
    licence = {"general.license": "apache-2.0", "general.license.name": "Apache"}
    write_gguf(tmp_path / "m.gguf", base(), keys(BYTE_LEVEL, **licence))
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "LICENSE").write_text("Of another model.")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 99, "max_new_tokens": 3}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 7, "padding_side": "left"}))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<mine>": 3}))
    convert_to_infini(tmp_path / "m.gguf", tmp_path / "ours", segment_length=N)
    alone = tmp_path / "alone"
    alone.mkdir()
    (tmp_path / "m.gguf").rename(alone / "m.gguf")
    convert_to_infini(alone / "m.gguf", tmp_path / "expected", segment_length=N)
    files = [sorted(file.name for file in (tmp_path / name).iterdir()) for name in ("ours", "expected")]
    assert files[0] == files[1]
    for name in files[0]:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes(), name
    origin = InfiniForCausalLM.from_pretrained(tmp_path / "ours").config.converted_from
    assert (origin["license"], origin["license_name"]) == ("apache-2.0", "Apache")


def test_tokens_that_the_file_has_not_are_not_added(tmp_path):
    tokenizer = converted_tokenizer(tmp_path, BYTE_LEVEL)
    assert sorted(tokenizer.get_vocab()) == sorted(BYTE_LEVEL["tokens"])
    assert max(tokenizer("a<|endoftext|>").input_ids) < len(BYTE_LEVEL["tokens"])


@pytest.mark.parametrize(
    ("metadata", "repository"),
    [
        ({"source.huggingface.repository": "me/llama"}, "me/llama"),
        ({"source.repo_url": "https://huggingface.co/me/llama-1.5"}, "me/llama-1.5"),
        ({"source.url": "https://example.org/me/llama"}, None),
        ({}, None),
    ],
)
def test_the_card_names_the_model_that_the_file_holds(tmp_path, metadata, repository):
    def add(writer):
        writer.add_name("Tiny Llama")
        writer.add_organization("Me")
        for name, value in metadata.items():
            writer.add_string(f"general.{name}", value)

    folder = convert_to_infini(write_gguf(tmp_path / "m.gguf", base(), add), tmp_path / "ours", segment_length=N)
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == repository
    assert "by a GGUF file of Tiny Llama of Me" in card.text
    # What the file does not say, a memory of the same weights may.
    save_memory(folder, tmp_path / "memory", base_model=repository or "me/other")
    ours = convert_to_infini(tmp_path / "m.gguf", tmp_path / "again", memory=tmp_path / "memory")
    assert ModelCard.load(ours / "README.md").data.base_model == (repository or "me/other")
