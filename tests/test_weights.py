"""P10: a memory belongs to its weights, in memory and as a file; others are refused unless the user insists."""

import copy
import gc
import json

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_several_processes import SCRIPTS, torchrun
from tiny import EVERY_OPTION_BUT_SLOTS, MODES, random_ids, tiny_config, tiny_model
from torch import nn
from versions import SHARES_OUT_UNEVENLY

from modeling_infini import InfiniCache, InfiniForCausalLM, InfiniForSequenceClassification
from modeling_infini.fingerprint import WHOLE, WeightsId
from modeling_infini.training import backpropagate


OTHER_WEIGHTS = "(may belong|belongs) to other weights"
IDS = random_ids(1, 12)


@torch.no_grad()
def read(model, length=12, cache=None):
    cache = model.new_cache() if cache is None else cache
    model(random_ids(1, length), past_key_values=cache)
    return cache


def refused(model, cache, message=OTHER_WEIGHTS):
    before = {name: state.clone() for name, state in cache.state_dict().items()}
    for length in (1, 7):
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            model(random_ids(1, length), past_key_values=cache)
    assert all(torch.equal(state, before[name]) for name, state in cache.state_dict().items())
    return True


def train_a_step(model, parameters=None, ids=IDS, **options):
    """One step of stock AdamW on `parameters`."""
    optimizer = torch.optim.AdamW(list(model.parameters() if parameters is None else parameters), **options)
    model(ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    model.zero_grad()


def lora(model, **fields):
    torch.manual_seed(0)
    config = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **fields}
    return get_peft_model(model, LoraConfig(**config)).eval()


class TestFingerprint:
    def test_is_that_of_the_saved_model(self, tmp_path):
        for dtype, fields in ((torch.float32, {"tie_word_embeddings": True}), (torch.bfloat16, MODES[2])):
            model = tiny_model(dtype, memory_norm_init_scale=1.5, memory_write_gate=True, **fields)
            expected = model.weights_fingerprint()
            assert len(expected) == 64
            model.save_pretrained(tmp_path / "m", max_shard_size="10KB")
            for options in ({}, {"device_map": "cpu"}):
                again = InfiniForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype, **options)
                assert again.weights_fingerprint() == expected
            assert copy.deepcopy(model).weights_fingerprint() == expected
            assert copy.deepcopy(model).train().weights_fingerprint() == expected

    def test_is_that_of_the_base_model_whatever_its_head(self, tmp_path):
        model = tiny_model()
        model.save_pretrained(tmp_path)
        other = InfiniForSequenceClassification.from_pretrained(tmp_path)
        assert model.weights_fingerprint() == model.model.weights_fingerprint() == other.weights_fingerprint()

    def test_is_the_same_where_weights_are_offloaded(self, tmp_path):
        model = tiny_model()
        expected, cache = model.weights_fingerprint(), read(model)
        on_cpu = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
        on_disk = disk_offload(copy.deepcopy(model), str(tmp_path), execution_device=torch.device("cpu"))
        for offloaded in (on_cpu, on_disk):
            assert next(offloaded.parameters()).device.type == "meta"
            assert offloaded.weights_fingerprint() == expected
            read(offloaded, 3, copy.deepcopy(cache))
            refused(offloaded, read(tiny_model(seed=1)))

    def test_is_the_same_in_inference_mode_and_with_other_strides(self):
        model = tiny_model()
        expected = model.weights_fingerprint()
        with torch.inference_mode():
            made_there = tiny_model()
            assert made_there.weights_fingerprint() == expected
        assert made_there.weights_fingerprint() == expected
        strided = copy.deepcopy(model)
        weight = strided.model.layers[0].mlp.up_proj.weight
        strided.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight.detach().t().contiguous().t())
        assert strided.weights_fingerprint() == expected

    def test_is_another_after_any_training(self):
        model = tiny_model(**EVERY_OPTION_BUT_SLOTS)
        expected = model.weights_fingerprint()
        for name, _ in model.model.named_parameters():
            trained = copy.deepcopy(model)
            train_a_step(trained, [trained.model.get_parameter(name)], lr=1e-5)
            assert trained.weights_fingerprint() != expected, name

    def test_is_made_anew_for_who_asks(self):
        model = InfiniForCausalLM(tiny_config(vocab_size=3000)).eval()
        before = model.weights_fingerprint()
        model.model.embed_tokens.weight.data[1234] += 0.1
        assert model.weights_fingerprint() != before

    def test_shows_training_of_single_rows_of_large_embeddings_and_of_large_layers(self):
        fields = {"vocab_size": 3000, "hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 1}
        model = InfiniForCausalLM(tiny_config(**fields)).eval()
        assert model.model.embed_tokens.weight.numel() > WHOLE < model.model.layers[0].mlp.up_proj.weight.numel()
        expected = model.weights_fingerprint()
        for row in (0, 1, 1234, 2998, 2999):
            trained = copy.deepcopy(model)
            ids = torch.full((1, 4), row)
            train_a_step(trained, [trained.model.embed_tokens.weight], ids, lr=1e-4, weight_decay=0.0)
            changed = (trained.model.embed_tokens.weight != model.model.embed_tokens.weight).any(1).nonzero()
            assert changed.flatten().tolist() == [row]
            assert trained.weights_fingerprint() != expected, row
        for dtype, lr in ((torch.float32, 1e-6), (torch.bfloat16, 1e-5)):
            converted = copy.deepcopy(model).to(dtype)
            expected = converted.weights_fingerprint()
            train_a_step(converted, [converted.model.layers[0].mlp.down_proj.weight], lr=lr)
            assert converted.weights_fingerprint() != expected

    def test_is_of_the_adapters_at_work(self):
        model = tiny_model()
        expected = model.weights_fingerprint()
        adapted = lora(copy.deepcopy(model), modules_to_save=["head_gates"])
        unmerged = adapted.weights_fingerprint()
        assert unmerged != expected
        with adapted.disable_adapter():
            assert adapted.weights_fingerprint() == expected
        assert adapted.weights_fingerprint() == unmerged
        assert lora(copy.deepcopy(model), modules_to_save=["head_gates"]).weights_fingerprint() == unmerged
        adapted.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        assert adapted.weights_fingerprint() == unmerged
        adapted.set_adapter("second")
        assert adapted.weights_fingerprint() not in (expected, unmerged)
        adapted.set_adapter("default")
        adapted.model.model.layers[0].self_attn.q_proj.set_scale("default", 2.0)
        assert adapted.weights_fingerprint() not in (expected, unmerged)
        merged = lora(copy.deepcopy(model))
        merged.merge_adapter()
        assert merged.weights_fingerprint() == merged.merge_and_unload().weights_fingerprint() != expected

    def test_of_trained_tokens_of_an_adapter(self):
        model = tiny_model()
        expected = model.weights_fingerprint()
        adapted = lora(copy.deepcopy(model), trainable_token_indices={"embed_tokens": [1, 3]})
        before = adapted.weights_fingerprint()
        assert before not in (None, expected)
        train_a_step(adapted, [p for n, p in adapted.named_parameters() if "trainable_tokens_delta" in n], lr=1e-3)
        assert adapted.weights_fingerprint() != before

    def test_is_none_where_there_are_no_weights(self):
        with torch.device("meta"):
            model = InfiniForCausalLM(tiny_config()).eval()
        assert model.weights_fingerprint() is None

    def test_does_not_keep_a_model_or_its_weights(self):
        layer = nn.Linear(200, 200)
        WeightsId.of(layer)
        assert layer.weight.untyped_storage().resizable()
        assert layer.bias.untyped_storage().resizable()
        storage = layer.weight.untyped_storage()._weak_ref()
        layer.to(torch.bfloat16)
        gc.collect()
        assert torch.UntypedStorage._expired(storage)


@pytest.mark.parametrize("wrap", ["compile", "checkpoint"])
def test_what_wraps_layers_does_not_change_it(wrap):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, expected = tiny_model(), tiny_model().weights_fingerprint()
    wrapped = {"compile": lambda layer: torch.compile(layer, backend="eager"), "checkpoint": checkpoint_wrapper}[wrap]
    model.model.layers[0] = wrapped(model.model.layers[0])
    assert model.weights_fingerprint() == expected


class TestCache:
    def test_of_other_weights_is_refused(self):
        model, cache = tiny_model(), read(tiny_model())
        read(copy.deepcopy(model), 5, cache)
        other = tiny_model(seed=1)
        assert refused(other, cache)
        # Also where autograd is on, and where the other model is in training.
        for mode in (other.eval(), other.train()):
            with pytest.raises(ValueError, match=OTHER_WEIGHTS):
                mode(IDS, past_key_values=cache)
        with pytest.raises(ValueError, match=OTHER_WEIGHTS):
            other.generate(IDS[:, :2], past_key_values=cache, max_new_tokens=2)
        read(model, 5, cache)

    @pytest.mark.parametrize("fork", ["deepcopy", "detached", "rows", "crop", "file"])
    def test_carries_its_weights_over_forks(self, fork, tmp_path):
        model = tiny_model()
        cache = read(model)
        if fork == "deepcopy":
            cache = copy.deepcopy(cache)
        elif fork == "detached":
            cache = cache.detached()
        elif fork == "rows":
            cache.batch_repeat_interleave(2)
            cache.reorder_cache(torch.tensor([1, 0]))
            cache.batch_select_indices(torch.tensor([1]))
        elif fork == "crop":
            cache.activate_past_recording()
            read(model, 3, cache)
            cache.crop(-3)
        else:
            cache.save_pretrained(tmp_path)
            cache = InfiniCache.from_pretrained(tmp_path, model.config)
        assert refused(tiny_model(seed=1), cache)
        read(model, 3, cache)
        cache.reset()
        read(tiny_model(seed=1), 3, cache)

    @pytest.mark.parametrize("write", ["step", "data", "data=", "load", "module", "adapter", "merge", "half"])
    def test_of_a_model_that_has_changed_is_refused(self, write):
        model = tiny_model()
        if write == "merge":
            model = lora(model)
        cache = read(model)
        if write != "data":  # is not looked for between steps of one token
            read(model, 1, cache)
        weight = model.get_base_model().model.layers[1].mlp.up_proj.weight if write == "merge" else None
        weight = model.model.layers[1].mlp.up_proj.weight if weight is None else weight
        if write == "step":
            train_a_step(model, lr=1e-5)
        elif write == "data":
            weight.data.add_(0.01)
        elif write == "data=":
            weight.data = weight.data + 0.01
        elif write == "load":
            model.load_state_dict(tiny_model(seed=1).state_dict())
        elif write == "module":
            model.model.layers[1].mlp.up_proj = nn.Linear(24, 32, bias=False)
        elif write == "adapter":
            model = lora(model)
        elif write == "merge":
            model.merge_adapter()
        elif write == "half":
            model.to(torch.bfloat16).to(torch.float32)
        assert refused(model, cache)

    def test_of_a_model_that_was_moved_or_restored_is_accepted(self):
        model = tiny_model()
        cache, weights = read(model), copy.deepcopy(model.state_dict())
        model.load_state_dict(tiny_model(seed=1).state_dict())
        assert refused(model, cache)
        model.load_state_dict(weights)
        read(model, 3, cache)
        model.to("cpu").requires_grad_(False)
        read(model, 1, cache)

    def test_goes_on_with_others_where_the_user_insists(self, tmp_path):
        model, other = tiny_model(), tiny_model(seed=1)
        cache = read(model)
        cache.allow_other_weights = True
        twin = copy.deepcopy(cache).detached()
        for each in (cache, twin):
            read(other, 5, each)
        cache.save_pretrained(tmp_path)
        # From then on it is a memory of these weights: who insists once need not insist each day.
        read(other, 5, InfiniCache.from_pretrained(tmp_path, other))
        cache.allow_other_weights = False
        read(other, 5, cache)
        assert refused(model, cache)

    def test_follows_the_weights_in_training(self, tmp_path):
        model = tiny_model().train()
        inputs, cache = {"input_ids": IDS, "labels": IDS}, None
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            _, cache = backpropagate(model, inputs, chunk_segments=1, past_key_values=cache)
            optimizer.step()
        # And to see what it has learned meanwhile.
        read(model.eval(), 3, cache)
        assert refused(copy.deepcopy(model), cache, "not known which weights")
        cache.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"not known which weights.*allow_other_weights=True"):
            InfiniCache.from_pretrained(tmp_path, model)
        assert refused(model, InfiniCache.from_pretrained(tmp_path, model.config), "not known which weights")
        read(model, 3, InfiniCache.from_pretrained(tmp_path, model, allow_other_weights=True))

    def test_in_evaluation_does_not_follow_the_weights_where_autograd_is_on(self):
        model, cache = tiny_model(), InfiniCache(tiny_model().config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model(IDS, past_key_values=cache)
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
        with pytest.raises(ValueError, match=OTHER_WEIGHTS):
            model(IDS, past_key_values=cache)

    def test_of_a_configuration_that_was_changed_since_is_refused(self):
        for field, value in (("memory_eps", 1e-3), ("use_mem_delta_rule", True), ("segment_length", 4)):
            model = tiny_model()
            cache = read(model)
            setattr(model.config, field, value)
            with torch.no_grad(), pytest.raises(ValueError, match=f"it was made with {field}="):
                model(IDS[:, :1], past_key_values=cache)

    @pytest.mark.parametrize("mode", ["training", "compiled"])
    def test_of_generate_belongs_to_its_weights_in_any_mode(self, tmp_path, mode):
        model = tiny_model()
        if mode == "training":
            model.train()
        else:
            model.compile(backend="eager")
        cache = model.generate(IDS, max_new_tokens=3, return_dict_in_generate=True).past_key_values
        cache.save_pretrained(tmp_path)
        read(tiny_model(), 3, InfiniCache.from_pretrained(tmp_path, tiny_model()))

    def test_of_packed_weights_is_of_unknown_ones(self):
        model = torch.ao.quantization.quantize_dynamic(tiny_model(), {torch.nn.Linear}, dtype=torch.qint8)
        assert model.weights_fingerprint() is None
        read(model, 3, read(model))

    def test_of_weights_pruned_since_is_refused(self):
        from torch.nn.utils import prune

        model = tiny_model()
        cache = read(model)
        prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.5)
        assert refused(model, cache)
        cache = read(model)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight_mask.zero_()
        assert refused(model, cache)

    def test_a_dtype_is_named_before_the_weights(self, tmp_path):
        read(tiny_model()).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r'holds torch.float32 keys.*dtype="float32"'):
            InfiniCache.from_pretrained(tmp_path, tiny_model(torch.bfloat16))

    @pytest.mark.parametrize("is_known", [True, False])
    def test_a_file_of_unknown_weights_is_announced_when_it_is_saved(self, tmp_path, is_known, caplog):
        from modeling_infini.cache import logger

        logger.warning_once.cache_clear()
        with caplog.at_level("WARNING", logger=logger.name):
            logger.addHandler(caplog.handler)
            read(tiny_model().train(not is_known)).save_pretrained(tmp_path)
            logger.removeHandler(caplog.handler)
        assert ("model.eval() before" in caplog.text) != is_known

    def test_made_with_autograd_on_has_known_weights(self, tmp_path):
        model = tiny_model()
        cache = model(IDS, use_cache=True).past_key_values
        model(IDS, past_key_values=cache)
        cache.save_pretrained(tmp_path)
        InfiniCache.from_pretrained(tmp_path, model)

    def test_of_another_dtype_is_refused_by_it(self):
        cache = read(tiny_model())
        assert refused(tiny_model(torch.float64), cache, "float32 keys, but the model computes in torch.float64")
        model = tiny_model()
        with torch.autocast("cpu", torch.bfloat16):
            cache = read(model)
            assert cache.layers[0].keys.dtype == torch.bfloat16
            read(model, 3, cache)
            refused(tiny_model(seed=1), cache)


class TestFile:
    def test_of_other_weights_is_refused(self, tmp_path):
        model, other = tiny_model(), tiny_model(seed=1)
        read(model).save_pretrained(tmp_path)
        fingerprints = rf"{model.weights_fingerprint()[:16]}.*{other.weights_fingerprint()[:16]}.*allow_other_weights"
        for given in (other, other.model, nn.ModuleList([other])):
            with pytest.raises(ValueError, match=fingerprints):
                InfiniCache.from_pretrained(tmp_path, given)
        assert refused(other, InfiniCache.from_pretrained(tmp_path, other.config))
        read(other, 3, InfiniCache.from_pretrained(tmp_path, other, allow_other_weights=True))
        read(other, 3, InfiniCache.from_pretrained(tmp_path, other.config, allow_other_weights=True))
        with pytest.raises(TypeError, match="Linear is no Infini-attention model"):
            InfiniCache.from_pretrained(tmp_path, nn.Linear(2, 2))

    def test_goes_with_the_adapters_that_made_it(self, tmp_path):
        adapters = lora(tiny_model())
        read(adapters.base_model.model).save_pretrained(tmp_path / "adapters")
        for given in (adapters, adapters.base_model, adapters.base_model.model):
            read(adapters.base_model.model, 3, InfiniCache.from_pretrained(tmp_path / "adapters", given))
        with adapters.disable_adapter():
            with pytest.raises(ValueError, match=OTHER_WEIGHTS):
                InfiniCache.from_pretrained(tmp_path / "adapters", adapters)
            InfiniCache.from_pretrained(tmp_path / "adapters", adapters, allow_other_weights=True)
            read(adapters.base_model.model).save_pretrained(tmp_path / "base")
            InfiniCache.from_pretrained(tmp_path / "base", adapters)
        with pytest.raises(ValueError, match=OTHER_WEIGHTS):
            InfiniCache.from_pretrained(tmp_path / "base", adapters)
        prompts = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
        InfiniCache.from_pretrained(tmp_path / "base", prompts, allow_other_weights=True)

    def test_is_on_the_device_of_the_model(self, tmp_path):
        model = tiny_model()
        read(model).save_pretrained(tmp_path)
        assert InfiniCache.from_pretrained(tmp_path, model).layers[0].keys.device == model.device
        on_meta = InfiniCache.from_pretrained(tmp_path, model, device="meta")
        assert {state.device.type for state in on_meta.state_dict().values()} == {"meta"}

    def test_of_fine_tuned_weights_is_refused(self, tmp_path):
        model = tiny_model()
        read(model).save_pretrained(tmp_path / "memory")
        train_a_step(model, [model.model.layers[1].self_attn.head_gates.weight], lr=1e-4)
        model.save_pretrained(tmp_path / "model")
        again = InfiniForCausalLM.from_pretrained(tmp_path / "model")
        with pytest.raises(ValueError, match=OTHER_WEIGHTS):
            InfiniCache.from_pretrained(tmp_path / "memory", again)


def test_unknown_tensors_have_no_fingerprint_and_do_not_crash(monkeypatch):
    model, contiguous = tiny_model(), torch.Tensor.contiguous

    def fail(tensor, *args):
        if tensor.shape == (24,):
            raise NotImplementedError
        return contiguous(tensor, *args)

    monkeypatch.setattr(torch.Tensor, "contiguous", fail)
    assert model.weights_fingerprint() is None
    cache = read(model)
    read(model, 3, cache)
    assert refused(tiny_model(), cache, "not known which weights")


def test_a_resaved_weight_file_gives_the_same_fingerprint(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(dict(reversed(load_file(file).items())), file, {"format": "pt"})
    assert InfiniForCausalLM.from_pretrained(tmp_path).weights_fingerprint() == model.weights_fingerprint()


def test_sharding_does_not_change_it(tmp_path):
    # Embeddings of which rows are sampled, layers of which parts are, and rows that do not divide by two.
    vocab_size = 1001 if SHARES_OUT_UNEVENLY else 1002
    fields = {"vocab_size": vocab_size, "intermediate_size": 1000, "num_hidden_layers": 2, **MODES[2]}
    model = tiny_model(memory_norm_init_scale=1.5, memory_write_gate=True, qk_norm=True, **fields)
    assert model.model.embed_tokens.weight.numel() > WHOLE < model.model.layers[0].mlp.up_proj.weight.numel()
    model.save_pretrained(tmp_path)
    torchrun(SCRIPTS / "fingerprints.py", tmp_path)
    found = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    for dtype in (torch.float32, torch.bfloat16):
        whole = InfiniForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert set(found[0][str(dtype)]) == {whole.weights_fingerprint()}
        with torch.no_grad():
            whole.model.layers[1].mlp.down_proj.weight.mul_(2)
        assert set(found[0][f"{dtype} changed"]) == {whole.weights_fingerprint()}
