import pytest
import torch
from safetensors.torch import load_file, save_file
from test_short_inputs import llama_and_ours
from tiny import random_ids
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from infini_transformers.conversion import convert_to_infini
from infini_transformers.evaluation.resources import smollm2_file
from modeling_infini import InfiniForCausalLM


@pytest.fixture
def llama_folder(tmp_path):
    llama, _ = llama_and_ours(tie_word_embeddings=False)
    llama.generation_config = GenerationConfig(max_new_tokens=7, pad_token_id=3, max_length=64)
    llama.save_pretrained(tmp_path / "llama")
    vocabulary = {f"<{token}>": token for token in range(31)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64)
    tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_converted_folder_answers_as_the_source(tmp_path, llama_folder, dtype):
    output = convert_to_infini(llama_folder, tmp_path / "ours", segment_length=9, dtype=dtype, head_gate_init_value=1)
    llama = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=dtype)
    ours = AutoModelForCausalLM.from_pretrained(output)
    assert isinstance(ours, InfiniForCausalLM)
    assert ours.dtype == llama.dtype
    config = ours.config
    assert (config.segment_length, config.local_attention, config.num_sink_tokens) == (9, "sliding", 4)
    torch.testing.assert_close(ours.model.layers[0].self_attn.head_gates.weight.data, torch.full((4,), 0.1))
    with torch.no_grad():
        assert torch.equal(ours(random_ids(2, 9)).logits, llama(random_ids(2, 9)).logits)
    assert (ours.generation_config.max_new_tokens, ours.generation_config.pad_token_id) == (7, 3)
    # A limit on prompt and answer together would refuse a book.
    assert ours.generation_config.max_length is None
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(llama_folder).get_vocab()
    assert tokenizer.model_max_length > 10**20


def test_tied_embeddings_stay_tied(tmp_path):
    llama, _ = llama_and_ours(tie_word_embeddings=True)
    llama.save_pretrained(tmp_path / "llama")
    convert_to_infini(tmp_path / "llama", tmp_path / "ours", segment_length=9)
    ours = InfiniForCausalLM.from_pretrained(tmp_path / "ours")
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(ours(random_ids(2, 9)).logits, llama(random_ids(2, 9)).logits)


def test_bad_input_is_refused_and_nothing_is_left(tmp_path, llama_folder):
    with pytest.raises(ValueError, match=r"2 \* segment_length \+ num_sink_tokens = 66 must not exceed the 64"):
        convert_to_infini(llama_folder, tmp_path / "ours", segment_length=31)
    with pytest.raises(ValueError, match="segment_length = 65 must not exceed the 64"):
        convert_to_infini(llama_folder, tmp_path / "ours", segment_length=65, local_attention="segment")
    config = llama_folder / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"gpt2"'))
    with pytest.raises(ValueError, match='Cannot convert a model of type "gpt2"'):
        convert_to_infini(llama_folder, tmp_path / "ours", segment_length=9)
    with pytest.raises(ValueError, match='dtype="floaty" is no dtype'):
        convert_to_infini(llama_folder, tmp_path / "ours", segment_length=9, dtype="floaty")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        convert_to_infini(tmp_path / "empty", tmp_path / "ours", segment_length=9)
    with pytest.raises(FileNotFoundError, match="no GGUF file"):
        convert_to_infini(tmp_path / "missing.gguf", tmp_path / "ours", segment_length=9)
    with pytest.raises(FileExistsError, match="exists already"):
        convert_to_infini(llama_folder, llama_folder, segment_length=9)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty", "llama"]


def test_an_incomplete_checkpoint_is_refused(tmp_path, llama_folder):
    weights = load_file(llama_folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, llama_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"incomplete: 1 weights are missing.*layers.1.mlp.up_proj.weight"):
        convert_to_infini(llama_folder, tmp_path / "ours", segment_length=9)
    assert [file.name for file in tmp_path.iterdir()] == ["llama"]


def test_an_interrupted_conversion_leaves_nothing(tmp_path, llama_folder, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("infini_transformers.conversion.to_infini.copy_files", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_to_infini(llama_folder, tmp_path / "ours", segment_length=9)
    assert [file.name for file in tmp_path.iterdir()] == ["llama"]


@pytest.mark.slow
def test_smollm2_answers_as_before_the_conversion(tmp_path):
    file = smollm2_file()
    convert_to_infini(file, tmp_path / "ours", segment_length=256)
    base = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    ids = tokenizer("In the beginning God created the heaven and the earth. " * 40, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(ours(ids[:, :256]).logits, base(ids[:, :256]).logits)
        assert torch.equal(ours(ids[:, :256], use_cache=False).logits, base(ids[:, :256]).logits)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert torch.equal(
        ours.generate(ids[:, :100], max_new_tokens=20, do_sample=False),
        base.generate(ids[:, :100], max_new_tokens=20, do_sample=False),
    )
