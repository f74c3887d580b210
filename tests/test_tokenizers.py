"""A conversion's tokenizer is the source's: by ids, texts, templates and settings, under every class."""

import json

import pytest
from base_models import base_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_of_bases import BACKENDS, TEXTS, save_base
from transformers import AutoTokenizer

from infini_transformers.conversion import convert_from_infini, convert_to_infini
from infini_transformers.conversion.checkpoints import Checkpoint
from infini_transformers.conversion.small_files import load_tokenizer


N = 9

CLASSES = [
    None,
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "PreTrainedTokenizerFast",
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
    "GPT2Tokenizer",
    "TokenizersBackend",
    "MistralCommonBackend",
    "OwnTokenizer",
]

HARD_TEXTS = ["", " ", " hi", "  hi  ", "hi\n\n hi", "\n", "\t12345", "a\u0301 é ｆ", "▁hi Ġhi", "Don't DON'T"]
HARD_TEXTS += ["家😀\u200d", "<s> hi</s> <unk>", "hi<|im_start|> the", "<|endoftext|>"]


def both_ways(base):
    """The tokenizers of a folder, of its conversion, and of what comes back."""
    convert_to_infini(base, base.parent / "ours", segment_length=N)
    convert_from_infini(base.parent / "ours", base.parent / "again")
    return [AutoTokenizer.from_pretrained(base.parent / name) for name in (base.name, "ours", "again")]


def answers(tokenizer, texts):
    read = [(tokenizer(text).data, tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    ids = [encoding["input_ids"] for encoding, _ in read] + [list(range(0, len(tokenizer), 7))]
    spoken = [tokenizer.decode(line, skip_special_tokens=skip) for line in ids for skip in (True, False)]
    padded = tokenizer(texts, padding=True).input_ids if tokenizer.pad_token else None
    template = tokenizer.chat_template and tokenizer.apply_chat_template([{"role": "user", "content": " hi"}])
    return read, spoken, padded, template, tokenizer.special_tokens_map, tokenizer.truncation_side


@settings(max_examples=30)
@given(
    variant=st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    kind=st.sampled_from(list(BACKENDS)),
    tokenizer_class=st.sampled_from(CLASSES),
    flags=st.fixed_dictionaries(
        {},
        optional={
            **{name: st.booleans() for name in ("add_bos_token", "add_eos_token", "legacy", "add_prefix_space")},
            **{name: st.booleans() for name in ("clean_up_tokenization_spaces", "split_special_tokens")},
            "padding_side": st.sampled_from(["left", "right"]),
            "truncation_side": st.sampled_from(["left", "right"]),
            "pad_token": st.just("</s>"),
            "model_max_length": st.just(5),
            "chat_template": st.just("{% for m in messages %}<s>{{ m.content }}{% endfor %}"),
            "extra_special_tokens": st.just(["<|im_start|>"]),
            "added_tokens_decoder": st.just(
                {"400": {"content": "hi", "lstrip": True, "normalized": False, "rstrip": False, "special": False}}
            ),
        },
    ),
    text=st.text(alphabet=st.sampled_from("hi é\n▁Ġ<s>/\u030112家"), max_size=9),
)
def test_is_the_sources_under_every_class(tmp_path_factory, variant, kind, tokenizer_class, flags, text):
    named = {} if tokenizer_class is None else {"tokenizer_class": tokenizer_class}
    base = save_base(tmp_path_factory.mktemp("checkpoints") / "base", variant, kind, **named, **flags)
    try:
        AutoTokenizer.from_pretrained(base)
    except Exception:
        return  # such as a class that cannot read this kind
    source, ours, again = both_ways(base)
    expected = answers(source, [*HARD_TEXTS, text])
    assert answers(ours, [*HARD_TEXTS, text]) == expected
    assert answers(again, [*HARD_TEXTS, text]) == expected
    assert type(ours) is type(again) is type(source)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (base.parent / "again" / file).read_bytes() == (base / file).read_bytes()


def test_of_a_mistral_is_not_that_which_a_llama_has(tmp_path):
    base = save_base(tmp_path / "base", "mistral", tokenizer_class="LlamaTokenizer")
    for tokenizer in both_ways(base):
        assert tokenizer.tokenize(" hi") == ["▁▁hi"]
    # One that is loaded where the type is not known either.
    assert (
        json.loads((tmp_path / "ours" / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
    )


def test_class_may_stand_in_the_models_configuration(tmp_path):
    base = save_base(tmp_path / "base", "qwen3", "metaspace")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizer"}))
    source, ours, _ = both_ways(base)
    assert type(ours) is type(source)
    assert answers(ours, HARD_TEXTS) == answers(source, HARD_TEXTS)


def test_class_may_follow_from_the_models_name_on_the_hub(tmp_path):
    base = save_base(tmp_path / "base", "llama", "replacing_spaces", tokenizer_class="LlamaTokenizer")
    checkpoint = Checkpoint(base)
    assert load_tokenizer(checkpoint).tokenize(" hi") == ["▁hi"]
    checkpoint.name = "deepseek-ai/deepseek-coder-1.3b"
    assert load_tokenizer(checkpoint).tokenize(" hi") == ["▁▁hi"]


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "LlamaTokenizerFast", None])
def test_of_a_sentencepiece_model_alone_is_kept(tmp_path, variant, tokenizer_class):
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    base = save_base(tmp_path / "base", variant, **({"tokenizer_class": tokenizer_class} if tokenizer_class else {}))
    (base / "tokenizer.json").unlink()
    sentences = iter(TEXTS * 20)
    options = {"model_type": "bpe", "vocab_size": 300, "byte_fallback": True, "minloglevel": 2}
    trainer.train(sentence_iterator=sentences, model_prefix=str(base / "tokenizer"), **options)
    (base / "tokenizer.vocab").unlink()
    source, ours, again = both_ways(base)
    assert answers(ours, HARD_TEXTS) == answers(again, HARD_TEXTS) == answers(source, HARD_TEXTS)
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()


def test_becomes_that_of_another_architecture_where_it_can(tmp_path):
    base = save_base(tmp_path / "base", "mistral", "replacing_spaces", tokenizer_class="LlamaTokenizer")
    convert_to_infini(base, tmp_path / "ours", segment_length=N)
    convert_from_infini(tmp_path / "ours", tmp_path / "again", model_type="llama")
    again, source = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("again", "base"))
    assert answers(again, HARD_TEXTS) == answers(source, HARD_TEXTS)


def test_that_would_read_otherwise_is_refused(tmp_path):
    # transformers mends the pattern of Mistral's tokenizers where such a flag is set beside an old configuration.
    base = save_base(tmp_path / "base", "mistral", "byte_level", fix_mistral_regex=True)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "transformers_version": "4.57.0"}))
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"unused{index}": len(vocabulary) + index for index in range(100_001)}
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"tokenizer .* gives other ids .*save_pretrained"):
        convert_to_infini(base, tmp_path / "ours", segment_length=N)
    assert [folder.name for folder in tmp_path.iterdir()] == ["base"]
    AutoTokenizer.from_pretrained(base).save_pretrained(base)
    source, ours, _ = both_ways(base)
    assert answers(ours, HARD_TEXTS) == answers(source, HARD_TEXTS)


def test_own_code_travels_and_is_not_run(tmp_path):
    base = save_base(tmp_path / "base", auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]})
    code = "raise RuntimeError('this is not to be run')"
    (base / "tokenization_own.py").write_text(code)
    (base / "parts").mkdir()
    (base / "parts" / "tables.py").write_text("NAME = 'own'\n")
    convert_to_infini(base, tmp_path / "ours", segment_length=N)
    convert_from_infini(tmp_path / "ours", tmp_path / "again")
    for name in ("ours", "again"):
        assert (tmp_path / name / "tokenization_own.py").read_text() == code
        assert (tmp_path / name / "parts" / "tables.py").is_file()
        settings = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert settings["auto_map"] == {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}


@pytest.mark.parametrize("limit", ["model_max_length", "max_len"])
def test_has_no_limit_by_any_name_until_it_goes_back(tmp_path, limit):
    source, ours, again = both_ways(save_base(tmp_path / "base", **{limit: 7}))
    assert (source.model_max_length, again.model_max_length) == (7, 7)
    assert ours.model_max_length > 1e20


def test_settings_that_were_not_there_are_not_there_afterwards(tmp_path):
    base = save_base(tmp_path / "base")
    (base / "tokenizer_config.json").unlink()
    both_ways(base)
    assert not (tmp_path / "again" / "tokenizer_config.json").exists()


def test_of_vocabulary_files_alone_is_kept(tmp_path):
    base = save_base(tmp_path / "base", "qwen2", "byte_level")
    model = json.loads((base / "tokenizer.json").read_text())["model"]
    (base / "tokenizer.json").unlink()
    (base / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    (base / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    source, ours, again = both_ways(base)
    assert answers(ours, HARD_TEXTS) == answers(again, HARD_TEXTS) == answers(source, HARD_TEXTS)


def test_may_have_settings_alone(tmp_path):
    base_model("qwen3", num_hidden_layers=1).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    source, ours, again = both_ways(tmp_path / "base")
    assert type(ours) is type(again) is type(source)
    assert answers(ours, HARD_TEXTS) == answers(source, HARD_TEXTS)


def test_none_is_made_up(tmp_path):
    base_model("qwen2", num_hidden_layers=1).save_pretrained(tmp_path / "base")
    before = {file.name for file in (tmp_path / "base").iterdir()}
    convert_to_infini(tmp_path / "base", tmp_path / "ours", segment_length=N)
    assert not (tmp_path / "ours" / "tokenizer_config.json").exists()
    convert_from_infini(tmp_path / "ours", tmp_path / "again")
    assert {file.name for file in (tmp_path / "again").iterdir()} == before
