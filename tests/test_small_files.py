"""What stands beside the weights of a checkpoint, in odd forms too; and folders to write to, in odd forms too."""

import json

import pytest
from base_models import base_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import random_ids
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from infini_transformers.conversion import convert_from_infini, convert_to_infini
from modeling_infini import InfiniForCausalLM


N = 9


@pytest.fixture
def base_folder(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def convert(base_folder, output="ours", **options):
    return convert_to_infini(base_folder, base_folder.parent / output, segment_length=N, **options)


def write(file, fields):
    file.write_text(json.dumps(fields))


class TestTokenizer:
    @pytest.fixture
    def tokenizer(self, base_folder):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1, "<unk>": 2}, "<unk>")),
            unk_token="<unk>",
            model_max_length=55,
            chat_template="{{ messages }}",
        )
        tokenizer.save_pretrained(base_folder)
        return tokenizer

    def test_has_no_limit_until_it_goes_back(self, tmp_path, base_folder, tokenizer):
        convert(base_folder)
        ours = AutoTokenizer.from_pretrained(tmp_path / "ours")
        assert ours.model_max_length > 1e20
        assert ours("a b c")["input_ids"] == tokenizer("a b c")["input_ids"]
        assert ours.chat_template == tokenizer.chat_template
        convert_from_infini(tmp_path / "ours", tmp_path / "again")
        assert AutoTokenizer.from_pretrained(tmp_path / "again").model_max_length == 55
        for file in ("tokenizer.json", "chat_template.jinja"):
            assert (tmp_path / "again" / file).read_bytes() == (base_folder / file).read_bytes()

    def test_keeps_a_limit_that_was_set_since(self, tmp_path, base_folder, tokenizer):
        convert(base_folder)
        ours = AutoTokenizer.from_pretrained(tmp_path / "ours")
        ours.model_max_length = 4096
        ours.save_pretrained(tmp_path / "ours")
        convert_from_infini(tmp_path / "ours", tmp_path / "again")
        assert AutoTokenizer.from_pretrained(tmp_path / "again").model_max_length == 4096

    def test_keeps_its_special_tokens_both_ways(self, tmp_path, base_folder, tokenizer):
        tokenizer.add_special_tokens({"bos_token": "a", "eos_token": "b", "pad_token": "<pad>"})
        tokenizer.save_pretrained(base_folder)
        convert_to_infini(base_folder, tmp_path / "ours", segment_length=8)
        convert_from_infini(tmp_path / "ours", tmp_path / "again")
        for name in ("ours", "again"):
            found = AutoTokenizer.from_pretrained(tmp_path / name)
            assert found.special_tokens_map == tokenizer.special_tokens_map

    def test_without_a_class_gets_that_of_the_source(self, tmp_path, base_folder, tokenizer):
        (base_folder / "tokenizer_config.json").unlink()
        convert(base_folder)
        ours, source = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("ours", "base"))
        assert type(ours) is type(source)
        assert ours("a b")["input_ids"] == source("a b")["input_ids"]

    def test_is_copied_where_it_cannot_be_loaded(self, tmp_path, base_folder):
        (base_folder / "tokenizer.model").write_bytes(b"sentencepiece, perhaps")
        (base_folder / "tokenizer.json").write_text("{}")
        convert(base_folder)
        assert (tmp_path / "ours" / "tokenizer.model").read_bytes() == b"sentencepiece, perhaps"


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.9, "top_p": 0.6, "max_length": 4096},
        {"do_sample": False, "temperature": 0.9, "max_length": 4096, "use_cache": False},
    ],
)
def test_generation_settings_are_kept_but_for_limits(tmp_path, base_folder, fields):
    write(base_folder / "generation_config.json", fields)
    convert(base_folder)
    kept = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert kept == {name: value for name, value in fields.items() if name not in ("max_length", "use_cache")}
    model = InfiniForCausalLM.from_pretrained(tmp_path / "ours")
    generated = model.generate(random_ids(1, 30), max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert generated.past_key_values.get_seq_length() == 31


def test_a_source_saved_without_a_cache_gets_one_until_it_goes_back(tmp_path, base_folder):
    config = AutoConfig.from_pretrained(base_folder)
    config.use_cache = False
    config.save_pretrained(base_folder)
    convert(base_folder)
    assert AutoConfig.from_pretrained(tmp_path / "ours").use_cache is True
    convert_from_infini(tmp_path / "ours", tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").use_cache is False


def test_fields_of_ours_in_a_source_mean_nothing(tmp_path, base_folder):
    fields = json.loads((base_folder / "config.json").read_text())
    write(base_folder / "config.json", {**fields, "segment_length": 3, "memory_eps": -1.0})
    convert(base_folder)
    assert AutoConfig.from_pretrained(tmp_path / "ours").segment_length == N


def test_licences_travel_there_and_back(tmp_path, base_folder):
    (base_folder / "LICENSE").write_text("free")
    (base_folder / "LICENSES").mkdir()
    convert(base_folder)
    convert_from_infini(tmp_path / "ours", tmp_path / "again")
    assert (tmp_path / "again" / "LICENSE").read_text() == "free"


@pytest.mark.parametrize(
    "content", [b"---\nlicense: [a\n---\n", b"---\n- a\n---\n", "---\nlicense: é\n---".encode("latin1")]
)
def test_an_unreadable_card_loses_only_the_licence(tmp_path, base_folder, content):
    (base_folder / "README.md").write_bytes(content)
    convert(base_folder)
    assert "license" not in AutoConfig.from_pretrained(tmp_path / "ours").converted_from


def test_a_damaged_configuration_is_named(base_folder):
    (base_folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json holds no valid JSON"):
        convert(base_folder)


@given(value=st.floats(-9, 9))
def test_untrained_gates_are_known_as_such(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("gates")
    base_model(num_hidden_layers=1).save_pretrained(folder / "base")
    convert(folder / "base", head_gate_init_value=value)
    convert_from_infini(folder / "ours", folder / "again")


def test_a_tied_head_in_the_file_is_dropped_on_the_way_back(tmp_path):
    base_model(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    convert(tmp_path / "base")
    file = tmp_path / "ours" / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, file, metadata={"format": "pt"})
    convert_from_infini(tmp_path / "ours", tmp_path / "again")
    assert (
        load_file(tmp_path / "again" / "model.safetensors").keys()
        == load_file(tmp_path / "base" / "model.safetensors").keys()
    )


class TestOutputFolder:
    def check(self, folder):
        assert not list(folder.parent.glob(".*")) + list(folder.glob(".*"))
        assert AutoModelForCausalLM.from_pretrained(folder)(random_ids(1, N)).logits.isfinite().all()

    def test_may_be_there_and_empty(self, tmp_path, base_folder):
        (tmp_path / "ours").mkdir()
        inode = (tmp_path / "ours").stat().st_ino
        convert(base_folder)
        # As for a mount point: what was there was filled, not replaced.
        assert (tmp_path / "ours").stat().st_ino == inode
        self.check(tmp_path / "ours")

    @pytest.mark.parametrize("exists", [True, False])
    def test_may_be_a_link(self, tmp_path, base_folder, exists):
        if exists:
            (tmp_path / "disk").mkdir()
        (tmp_path / "ours").symlink_to(tmp_path / "disk")
        convert(base_folder)
        assert (tmp_path / "ours").is_symlink()
        self.check(tmp_path / "disk")

    def test_may_lie_in_folders_that_are_not_there(self, tmp_path, base_folder):
        convert(base_folder, "new/folder")
        self.check(tmp_path / "new" / "folder")

    def test_is_left_empty_by_what_fails(self, tmp_path, base_folder, monkeypatch):
        (tmp_path / "ours").mkdir()
        monkeypatch.setattr("infini_transformers.conversion.checkpoints.save_file", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(base_folder)
        assert not list((tmp_path / "ours").iterdir())
