"""A source folder is a closed set: each file is kept, translated, refused, or left out by a warning that names it."""

import json
import os
import shutil
import sys

import pytest
from hub_server import USER, local_hub
from test_publishing import run
from tiny import random_ids
from tokenizers_of_bases import save_base
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from versions import SAVES_FIELDS_WITHOUT_USE

from infini_transformers.conversion import convert_from_infini, convert_to_infini
from modeling_infini import InfiniForCausalLM


N = 9

KEPT = {
    "LICENSE": b"free",
    "NOTICE.txt": b"of whom",
    "USE_POLICY.md": b"how",
    "tekken.json": b"{}",
    "qwen.tiktoken": b"IQ== 0",
    "spiece.model": b"pieces",
    "sentencepiece.bpe.model": b"more pieces",
    "tokenizer.model.v3": b"others",
    "special_tokens_map.json": b"{}",
    "preprocessor_config.json": b"{}",
    "processor_config.json": b"{}",
    "chat_template.json": b'{"chat_template": "a"}',
    "additional_chat_templates/tool_use.jinja": "é {{ messages }}".encode(),
    "assets/figure.png": b"\x89PNG",
    "parts/of/a/tokenizer/code.py": b"X = 1",
    ".gitattributes": b"*.bin filter=lfs",
    "name with [brackets].txt": b"odd",
}

LEFT_OUT = {
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"twice",
    "tf_model.h5": b"tensors",
    "training_args.bin": b"pickle",
    "original/params.json": b"{}",
    "original/consolidated.00.pth": b"pickle",
    "onnx/model.onnx": b"graph",
    "custom_generate/generate.py": b"def generate(): pass",
}


def files_of(folder):
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def add_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture
def base(tmp_path):
    base = save_base(tmp_path / "base", tokenizer_class="PreTrainedTokenizerFast")
    add_files(base, {"README.md": b"---\nlicense: mit\nlanguage: en\n---\nThe source's own card.\n", **KEPT})
    return base


@pytest.fixture
def warnings(caplog):
    """What the conversions warn of."""
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("infini_transformers")]


def both_ways(base, **options):
    convert_to_infini(base, base.parent / "ours", segment_length=N, **options)
    convert_from_infini(base.parent / "ours", base.parent / "again")


def test_every_file_comes_back(tmp_path, base):
    both_ways(base)
    assert files_of(tmp_path / "again") == files_of(base)
    for name in files_of(base) - {"config.json", "generation_config.json"}:
        assert (tmp_path / "again" / name).read_bytes() == (base / name).read_bytes(), name
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "again" / name).read_text()) == json.loads((base / name).read_text())
    for name, content in KEPT.items():
        assert (tmp_path / "ours" / name).read_bytes() == content


def test_what_is_left_out_is_named(tmp_path, base, warnings):
    add_files(base, {**LEFT_OUT, ".git/objects/ab": b"", ".cache/huggingface/x": b"", "parts/__pycache__/x.pyc": b""})
    (base / ".env").write_text("HF_TOKEN=secret")
    (base / "README.source.md").write_text("Of an earlier source.")
    (base / "gone.txt").symlink_to(base / "nowhere")
    both_ways(base)
    assert files_of(tmp_path / "ours") >= KEPT.keys()
    assert not files_of(tmp_path / "ours") & LEFT_OUT.keys()
    (line,) = [line for line in warnings() if line.startswith("Not copied")]
    for name in (
        *("pytorch_model.bin", "consolidated.safetensors", "tf_model.h5", "training_args.bin", "original/", "onnx/"),
        *("custom_generate/", ".git/", ".cache/", "parts/__pycache__/", ".env", "gone.txt", "README.source.md"),
    ):
        assert f"{name} (" in line
    assert " model.safetensors (" not in line


def test_large_files_are_left_out(tmp_path, base, monkeypatch, warnings):
    monkeypatch.setattr("infini_transformers.conversion.small_files.LARGEST_SIDE_FILE", 2**20)
    add_files(base, {"corpus.txt": bytes(2**20 + 1)})
    both_ways(base)
    assert "corpus.txt" not in files_of(tmp_path / "ours")
    assert any("corpus.txt (more than 1 MiB)" in line for line in warnings())


def test_links_are_followed_but_not_in_circles(tmp_path, base):
    templates = tmp_path / "templates"
    shutil.move(base / "additional_chat_templates", templates)
    (base / "additional_chat_templates").symlink_to(templates)
    shutil.move(base / "LICENSE", tmp_path / "blob")
    (base / "LICENSE").symlink_to(tmp_path / "blob")
    (base / "circle").symlink_to(base)
    both_ways(base)
    for name in ("ours", "again"):
        assert KEPT.keys() <= files_of(tmp_path / name)
        assert not any(os.path.islink(tmp_path / name / file) for file in os.listdir(tmp_path / name))


def test_an_output_inside_the_source_is_not_part_of_it(tmp_path, base):
    convert_to_infini(base, base / "first", segment_length=N)
    convert_to_infini(base, base / "second", segment_length=N)
    assert files_of(base / "second") == files_of(base / "first")


def test_a_file_with_the_name_of_one_of_ours_is_refused(tmp_path, base):
    (base / "memory.py").write_text("X = 1")
    with pytest.raises(ValueError, match=r"The source's memory\.py has the name of a code file"):
        convert_to_infini(base, tmp_path / "ours", segment_length=N)
    assert not (tmp_path / "ours").exists()


def test_named_chat_templates_work_both_ways(tmp_path, base):
    shutil.rmtree(base / "additional_chat_templates")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": "A {{ messages[0].content }}", "tool_use": "B {{ messages[0].content }}"}
    tokenizer.save_pretrained(base)
    both_ways(base)
    for name in ("ours", "again"):
        found = AutoTokenizer.from_pretrained(tmp_path / name)
        assert found.chat_template == tokenizer.chat_template
        for template, text in ((None, "A hi"), ("tool_use", "B hi")):
            chat = [{"role": "user", "content": "hi"}]
            assert found.apply_chat_template(chat, chat_template=template, tokenize=False) == text


IMPORT = "import sys; from infini_transformers.conversion import *; "
CONVERT = IMPORT + "convert_to_infini(sys.argv[1], sys.argv[2], segment_length=9)"
BACK = IMPORT + "convert_from_infini(sys.argv[1], sys.argv[2])"


def test_the_hub_gives_what_a_folder_gives(tmp_path, base, monkeypatch):
    add_files(base, {**LEFT_OUT, "corpus.txt": bytes(2**20 + 1)})
    with local_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.add(f"{USER}/base", base)
        small = "from infini_transformers.conversion import checkpoints, small_files; "
        small += "checkpoints.LARGEST_SIDE_FILE = small_files.LARGEST_SIDE_FILE = 2**20; "
        convert = [sys.executable, "-c", small + CONVERT, f"{USER}/base", str(tmp_path / "ours")]
        run(tmp_path / "reader", convert)
        fetched = files_of(next((tmp_path / "reader").glob("cache/hub/models--*/snapshots/*")))
        hub.add(f"{USER}/ours", tmp_path / "ours")
        run(tmp_path / "reader", [sys.executable, "-c", BACK, f"{USER}/ours", str(tmp_path / "again")])
    assert not fetched & (LEFT_OUT.keys() - {"original/params.json", "custom_generate/generate.py"} | {"corpus.txt"})
    (base / "corpus.txt").unlink()
    assert files_of(tmp_path / "again") == files_of(base) - LEFT_OUT.keys()
    for name in KEPT.keys() | {"README.md", "tokenizer.json", "tokenizer_config.json"}:
        assert (tmp_path / "again" / name).read_bytes() == (base / name).read_bytes()


def test_the_cache_of_the_hub_is_enough(tmp_path, base, monkeypatch):
    add_files(base, LEFT_OUT)
    convert = [sys.executable, "-c", CONVERT, f"{USER}/base"]
    with local_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.add(f"{USER}/base", base)
        run(tmp_path / "reader", [*convert, str(tmp_path / "ours")])
    run(tmp_path / "reader", [*convert, str(tmp_path / "again")], HF_HUB_OFFLINE="1")
    assert files_of(tmp_path / "again") >= KEPT.keys()


class TestGeneration:
    def fields(self, folder):
        return json.loads((folder / "generation_config.json").read_text())

    def check(self, base, fields, left_out):
        """`left_out` is dropped on the way there, and all of `fields` is there again on the way back."""
        both_ways(base)
        kept = {name: value for name, value in fields.items() if name not in left_out}
        assert self.fields(base.parent / "ours") == kept
        assert self.fields(base.parent / "again") == fields
        model = InfiniForCausalLM.from_pretrained(base.parent / "ours")
        model.generate(random_ids(1, 23), max_new_tokens=12)
        model.save_pretrained(base.parent / "saved")

    @pytest.mark.parametrize(
        "fields",
        [
            *({"cache_implementation": name} for name in ("static", "offloaded", "offloaded_static", "quantized")),
            *({"cache_implementation": name} for name in ("hybrid", "sliding_window", "paged")),
            {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4}},
            {"cache_implementation": "static", "max_cache_len": 4096},
            {"use_cache": False},
            {"max_length": 4096},
            {"prompt_lookup_num_tokens": 30},
            {"num_assistant_tokens": 30},
            {"assistant_early_exit": 1},
            {"continuous_batching_config": {"num_blocks": 7}},
        ],
        ids=str,
    )
    def test_fields_that_a_memory_cannot_follow_return(self, base, fields, warnings):
        (base / "generation_config.json").write_text(json.dumps({**fields, "pad_token_id": 0}))
        self.check(base, {**fields, "pad_token_id": 0}, fields)
        (line,) = [line for line in warnings() if "generation_config.json" in line]
        assert all(f"{name}={value!r}" in line for name, value in fields.items())

    @pytest.mark.parametrize(
        "fields",
        [
            {"cache_implementation": "dynamic", "use_cache": True},
            {"prompt_lookup_num_tokens": 3, "num_assistant_tokens": 3},
            {"prefill_chunk_size": 4},
            {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.5},
            pytest.param({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, marks=SAVES_FIELDS_WITHOUT_USE),
            {"do_sample": True, "top_k": 3, "watermarking_config": {"greenlist_ratio": 0.5}},
            {"guidance_scale": 1.5, "repetition_penalty": 1.1, "suppress_tokens": [3]},
            {"of_someone_else": 3, "disable_compile": True},
        ],
        ids=str,
    )
    def test_other_fields_are_kept(self, base, fields, warnings):
        (base / "generation_config.json").write_text(json.dumps(fields))
        self.check(base, fields, ())
        assert not [line for line in warnings() if "generation_config.json" in line]

    def test_file_comes_back_as_transformers_wrote_it(self, tmp_path, base):
        config = GenerationConfig(max_length=40, cache_implementation="static", bos_token_id=1, temperature=0.6)
        config.do_sample = True
        config.save_pretrained(base)
        both_ways(base)
        assert (tmp_path / "again" / "generation_config.json").read_bytes() == (
            base / "generation_config.json"
        ).read_bytes()

    def test_files_of_which_nothing_changes_are_copied(self, tmp_path, base):
        odd = '{"top_k":  3, "do_sample": true,\n "\\u00e9": 1}'
        (base / "generation_config.json").write_text(odd)
        (base / "tokenizer_config.json").write_text('{"tokenizer_class":  "TokenizersBackend", "\\u00e9": 1}')
        both_ways(base)
        for name in ("generation_config.json", "tokenizer_config.json"):
            for folder in ("ours", "again"):
                assert (tmp_path / folder / name).read_bytes() == (base / name).read_bytes()

    def test_fields_of_an_old_configuration_are_the_sources(self, tmp_path, base, warnings):
        (base / "generation_config.json").unlink()
        config = json.loads((base / "config.json").read_text())
        old = {"temperature": 0.6, "do_sample": True, "top_k": 7, "max_length": 99, "cache_implementation": "static"}
        (base / "config.json").write_text(json.dumps({**config, **old}))
        source = AutoModelForCausalLM.from_pretrained(base).generation_config
        both_ways(base)
        ours = InfiniForCausalLM.from_pretrained(tmp_path / "ours")
        assert (ours.generation_config.temperature, ours.generation_config.top_k) == (0.6, 7)
        assert (ours.generation_config.max_length, ours.generation_config.cache_implementation) == (None, None)
        ours.generate(random_ids(1, 23), max_new_tokens=2)
        # A model made of the configuration alone would have it from there.
        assert InfiniForCausalLM(ours.config).generation_config.cache_implementation is None
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").generation_config
        assert again.to_diff_dict() == source.to_diff_dict()

    def test_what_training_sets_is_not_overwritten(self, tmp_path, base):
        (base / "generation_config.json").write_text(json.dumps({"max_length": 40, "do_sample": True, "top_k": 3}))
        convert_to_infini(base, tmp_path / "ours", segment_length=N)
        model = InfiniForCausalLM.from_pretrained(tmp_path / "ours")
        model.generation_config.max_length, model.generation_config.top_k = 77, 5
        model.save_pretrained(tmp_path / "trained")
        convert_from_infini(tmp_path / "trained", tmp_path / "again")
        fields = self.fields(tmp_path / "again")
        assert (fields["max_length"], fields["top_k"]) == (77, 5)


def test_settings_survive_a_save_of_the_converted_model(tmp_path):
    base = save_base(tmp_path / "base", "mistral", tokenizer_class="LlamaTokenizer", model_max_length=50)
    (base / "generation_config.json").write_text(json.dumps({"cache_implementation": "static"}))
    convert_to_infini(base, tmp_path / "ours", segment_length=N)
    InfiniForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "saved")
    convert_from_infini(tmp_path / "saved", tmp_path / "again")
    again, source = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("again", "base"))
    assert (again.model_max_length, again(" hi").input_ids) == (50, source(" hi").input_ids)
    settings = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "LlamaTokenizer"
    assert TestGeneration().fields(tmp_path / "again")["cache_implementation"] == "static"
