"""
On a GPU, a model agrees with its copy in float64 on the CPU: in each dtype, with each attention backend, however it is
run. `python -m benchmarks.gpu_check` runs it there; elsewhere all runs on the CPU but what a GPU alone has.
"""

import copy
from contextlib import contextmanager

import pytest
import torch
from test_generate import PAD, generate, left_padded
from tiny import MODES, random_ids, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from transformers import CompileConfig
from transformers.generation.streamers import BaseStreamer
from transformers.utils import is_flash_attn_2_available

from modeling_infini import InfiniCache, InfiniForCausalLM
from modeling_infini.memory import (
    MemoryState,
    delta_correction,
    feature_map,
    linear_write,
    memory_dtype,
    read_memory,
    scan,
)


N = 16
SIZE = {
    "hidden_size": 64,
    "head_dim": 32,
    "intermediate_size": 96,
    "segment_length": N,
    "max_position_embeddings": 256,
}
SINKS = MODES[2]
OPTIONS = {
    "linear": {},
    "delta": {"use_mem_delta_rule": True},
    "sliding": {"local_attention": "sliding"},
    "sinks": SINKS | {"use_mem_delta_rule": True},
    "memory norm": {"memory_norm_init_scale": 1.5},
    "write gate": {"memory_write_gate": True, "learned_delta_update": True, "use_mem_delta_rule": True},
    "exp": {"memory_feature_map": "exp"},
    "token gates": {"token_gates": True},
    "slots": {"local_attention": "sliding", "num_memory_slots": 5},
}
# But `memory_layers` of one layer, so that more is compared.
OPTIONS["all"] = {
    **SINKS,
    **OPTIONS["write gate"],
    **OPTIONS["exp"],
    **OPTIONS["slots"],
    "memory_norm_init_scale": 1.5,
    "token_gates": True,
    "qk_norm": True,
    "qkv_bias": True,
}
TF32 = "float32 with TF32"
# How far the logits of a model may be from those of its copy in float64, as a share of their norm; and M and z of its
# layers. The stock norm and RoPE are in float32 whatever the model is in. TF32 has the mantissa of float16.
TOLERANCES = {"float64": 1e-5, "float32": 1e-4, TF32: 1e-2, "float16": 1e-2, "bfloat16": 6e-2}
# The same for the products of the memory alone, which are float32 in a model of 16 bits.
MEMORY_TOLERANCES = {"float64": 1e-12, "float32": 1e-5, TF32: 2e-3}
# Of gradients, as a share of the norm of all of them together.
GRADIENT_TOLERANCES = {"float64": 1e-5, "float32": 1e-4, TF32: 3e-2, "float16": 3e-2, "bfloat16": 0.15}

every_precision = pytest.mark.parametrize("precision", TOLERANCES)
every_option = pytest.mark.parametrize("fields", OPTIONS.values(), ids=OPTIONS)
some_options = pytest.mark.parametrize("fields", [OPTIONS["delta"], OPTIONS["all"]], ids=["delta", "all"])


def is_cpu(device: str) -> bool:
    return torch.device(device).type == "cpu"


@pytest.fixture
def needs_gpu(device):
    if is_cpu(device):
        pytest.skip("a GPU alone has it")


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet():
    torch._dynamo.reset()


@contextmanager
def precise_as(precision: str, device: str):
    if precision == TF32 and is_cpu(device):
        pytest.skip("a GPU alone has TF32")
    torch.set_float32_matmul_precision("high" if precision == TF32 else "highest")
    yield
    torch.set_float32_matmul_precision("highest")


def dtype_of(precision: str) -> torch.dtype:
    return getattr(torch, precision.removesuffix(" with TF32"))


def model_and_reference(device: str, precision: str = "float32", **fields):
    """A model on the device, and its copy in float64 on the CPU."""
    model = tiny_model(torch.float64, **{**SIZE, **fields})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Products of one row with another are then around 1.
            parameter.mul_(0.25 if parameter.dim() > 1 else 1)
            if "slot_score" in name and precision not in ("float64", "float32"):
                # Rounding makes another choice; of equal scores, the latest tokens stay.
                parameter.zero_()
    model = model.to(device, dtype_of(precision))
    return model, copy.deepcopy(model).cpu().double()


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = "") -> None:
    error = ((found.cpu().double() - expected).norm() / expected.norm()).item()
    assert error <= tolerance, f"{what} is {error:.1e} away, and {tolerance:.1e} is allowed"


def read(model, ids, cuts=(), cache=None, **inputs):
    """Logits of `ids`, read in calls that are cut at `cuts`, and the cache."""
    cache, parts = InfiniCache(model.config) if cache is None else cache, []
    with torch.no_grad():
        # Of a model whose embeddings are offloaded, which are "meta" between calls.
        device = "cpu" if model.device.type == "meta" else model.device
        for part in ids.to(device).tensor_split(tuple(cuts), 1):
            parts.append(model(part, past_key_values=cache, **inputs).logits)
    return torch.cat(parts, 1), cache


def loss_of(model, ids) -> torch.Tensor:
    ids = ids.to(next(model.parameters()).device)
    logits = model(ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).to(memory_dtype(logits.dtype)), ids[:, 1:].flatten())


def gradients(model, loss: torch.Tensor) -> torch.Tensor:
    """All of a loss, side by side."""
    found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([gradient.flatten().double().cpu() for gradient in found])


@every_precision
@every_option
def test_logits_and_memories_are_those_of_float64_on_the_cpu(device, fields, precision):
    ids, cuts = random_ids(3, 4 * N + 5), (*range(2 * N + 3, 4 * N + 1), 4 * N + 3)
    with precise_as(precision, device):
        model, reference = model_and_reference(device, precision, **fields)
        expected, cache = read(reference, ids)
        tolerance = TOLERANCES[precision]
        assert_near(model(ids.to(device), use_cache=False).logits, expected, tolerance, "a call without a cache")
        found, own_cache = read(model, ids, cuts)
        assert_near(found, expected, tolerance, "a prompt and the steps after it")
    for own_layer, layer in zip(own_cache.layers, cache.layers):
        assert own_layer.memory.dtype == memory_dtype(dtype_of(precision))
        assert_near(own_layer.memory, layer.memory, tolerance, "M")
        assert_near(own_layer.normaliser, layer.normaliser, tolerance, "z")


@pytest.mark.parametrize("delta", [False, True], ids=["linear", "delta"])
@pytest.mark.parametrize("precision", MEMORY_TOLERANCES)
def test_a_memory_of_many_segments_does_not_drift(device, precision, delta):
    generator = torch.Generator().manual_seed(0)
    keys, values, queries = torch.randn(3, 2, 512, 64, 32, dtype=torch.float64, generator=generator)

    def read_back(keys, values, queries):
        features = feature_map(keys)
        writes, normaliser_writes = linear_write(features, values)
        normaliser = scan(torch.zeros_like(normaliser_writes[:, 0]), normaliser_writes)
        corrections = delta_correction(features, normaliser[:, :-1], 1e-10) if delta else None
        memory = scan(torch.zeros_like(writes[:, 0]), writes, corrections)
        return memory, read_memory(feature_map(queries), MemoryState(memory[:, 1:], normaliser[:, 1:]), 1e-10)

    with precise_as(precision, device):
        found = read_back(*(states.to(device, dtype_of(precision)) for states in (keys, values, queries)))
        for name, mine, other in zip(("M", "what is read"), found, read_back(keys, values, queries)):
            assert_near(mine[:, -1], other[:, -1], MEMORY_TOLERANCES[precision], name)


def side_masks(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    columns, lengths = torch.arange(ids.shape[1]), torch.tensor([[ids.shape[1]], [N + 3], [5]])
    return {
        "right": (columns < lengths).long(),
        "left": (columns >= ids.shape[1] - lengths).long(),
        "inner": ((columns < 3) | (columns >= ids.shape[1] - lengths)).long(),
    }


@some_options
@pytest.mark.parametrize("side", ["left", "right", "inner"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_padding_does_not_exist(device, fields, side, precision):
    model, reference = model_and_reference(device, precision, **fields)
    ids, more = random_ids(3, 3 * N + 2), random_ids(3, N + 2, seed=1)
    mask = side_masks(ids)[side]
    found, cache = read(model, ids, attention_mask=mask.to(device))
    found = torch.cat([found, read(model, more, range(1, N), cache)[0]], 1)
    for row, is_token in enumerate(mask.bool()):
        alone = torch.cat([ids[row, is_token], more[row]]).unsqueeze(0)
        is_token = torch.cat([is_token, torch.ones(N + 2, dtype=torch.bool)])
        expected, _ = read(reference, alone)
        assert_near(found[row, is_token.to(device)], expected[0], TOLERANCES[precision], f"row {row}")


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention", "flash_attention_2"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["linear", "sliding", "sinks", "slots"])
def test_attention_backends_agree(device, name, precision, implementation):
    if implementation == "flash_attention_2":
        if not is_flash_attn_2_available():
            pytest.skip("flash-attn is not installed")
        if name in ("sinks", "slots") or precision == "float32":
            pytest.skip("not for sinks, slots or float32")
    if implementation == "flex_attention" and is_cpu(device):
        pytest.skip("transformers compiles it, which takes a CPU half a minute")
    model, reference = model_and_reference(device, precision, **OPTIONS[name])
    model.set_attn_implementation(implementation)
    ids = random_ids(3, 3 * N + 2)
    mask = side_masks(ids)["left"]
    expected, _ = read(reference, ids, attention_mask=mask)
    found, _ = read(model, ids, attention_mask=mask.to(device))
    assert_near(found.cpu()[mask.bool()], expected[mask.bool()], TOLERANCES[precision], "with padding")
    expected, _ = read(reference, ids)
    found, _ = read(model, ids, range(2 * N + 3, 3 * N + 2))
    assert_near(found, expected, TOLERANCES[precision], "with a cache")


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("backend", "name"),
    [
        ("FLASH_ATTENTION", "linear"),  # takes no masks
        *(("EFFICIENT_ATTENTION", name) for name in ("linear", "sinks", "slots")),
        *(("CUDNN_ATTENTION", name) for name in ("linear", "sinks", "slots")),
        *(("MATH", name) for name in ("linear", "sinks", "slots")),
    ],
)
def test_each_kernel_of_sdpa_agrees(needs_gpu, device, backend, name, precision):
    model, reference = model_and_reference(device, precision, **OPTIONS[name])
    ids = random_ids(2, 4 * N)
    try:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            found, _ = read(model, ids)
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        pytest.skip(f"{backend} does not take these shapes, masks or groups")
    assert_near(found, read(reference, ids)[0], TOLERANCES[precision])


@every_precision
@some_options
def test_gradients_are_those_of_float64_on_the_cpu(device, fields, precision):
    ids = random_ids(2, 3 * N + 2)
    with precise_as(precision, device):
        model, reference = model_and_reference(device, precision, **fields)
        expected = gradients(reference, loss_of(reference, ids))
        assert_near(gradients(model, loss_of(model, ids)), expected, GRADIENT_TOLERANCES[precision], "the gradient")
        model.train().gradient_checkpointing_enable()
        found = gradients(model, loss_of(model, ids))
    assert_near(found, expected, GRADIENT_TOLERANCES[precision], "the gradient with checkpointing")


@some_options
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_autocast_keeps_the_memory_in_float32(device, fields, precision):
    model, reference = model_and_reference(device, **{**fields, "num_memory_slots": 0})
    ids = random_ids(2, 3 * N + 2)
    kind = torch.device(device).type
    with torch.autocast(kind, dtype=dtype_of(precision)):
        logits, cache = read(model, ids, (2 * N + 3, 2 * N + 4))
        loss = loss_of(model, ids)
    assert_near(logits, read(reference, ids)[0], TOLERANCES[precision], "logits")
    assert {state.dtype for layer in cache.layers for state in (layer.memory, layer.normaliser)} == {torch.float32}
    expected = gradients(reference, loss_of(reference, ids))
    assert_near(gradients(model, loss), expected, GRADIENT_TOLERANCES[precision], "the gradient")


@some_options
def test_a_scaled_step_in_float16_has_finite_gradients(device, fields):
    model, _ = model_and_reference(device, **fields)
    ids, kind = random_ids(2, 3 * N + 2).to(device), torch.device(device).type
    scaler, optimizer = torch.amp.GradScaler(kind, init_scale=2.0**12), torch.optim.SGD(model.parameters(), 0.1)
    before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    with torch.autocast(kind, dtype=torch.float16):
        loss = model(ids, labels=ids, use_cache=False).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**12
    after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert after.isfinite().all()
    assert not torch.equal(after, before)


OF_INDUCTOR = "on a CPU, inductor is for test_compile.py"


def compiled(function, device, **options):
    return torch.compile(function, **({"backend": "eager", "fullgraph": True} if is_cpu(device) else options))


@some_options
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_compiled_model_and_its_gradients_agree(device, fields, precision):
    if is_cpu(device) and precision != "float32":
        pytest.skip(OF_INDUCTOR)
    model, reference = model_and_reference(device, precision, **fields)
    ids = random_ids(2, 3 * N + 2)
    function = compiled(model, device, fullgraph=True)
    with torch.no_grad():
        found = function(ids.to(device), use_cache=False).logits
    assert_near(found, read(reference, ids)[0], TOLERANCES[precision], "logits")
    expected = gradients(reference, loss_of(reference, ids))
    assert_near(gradients(model, loss_of(function, ids)), expected, GRADIENT_TOLERANCES[precision], "the gradient")


def decode(device, fields, mode, precision="float32"):
    """Compiled steps over the ends of two segments, held against those of the reference."""
    model, reference = model_and_reference(device, precision, **fields)
    ids, more = random_ids(2, 2 * N + 3), random_ids(2, 2 * N + 1, seed=1)
    _, cache = read(model, ids)
    step, parts = compiled(model.forward, device, fullgraph=True, mode=mode), []
    with torch.no_grad():
        for token in more.to(device).split(1, 1):
            parts.append(step(token, past_key_values=cache).logits.clone())
    expected, expected_cache = read(reference, torch.cat([ids, more], 1))
    assert_near(torch.cat(parts, 1), expected[:, ids.shape[1] :], TOLERANCES[precision], "the steps' logits")
    for own_layer, layer in zip(cache.layers, expected_cache.layers):
        assert_near(own_layer.memory, layer.memory, TOLERANCES[precision], "M")
    assert cache.tokens_read.tolist() == expected_cache.tokens_read.tolist()


@some_options
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiled_steps_agree(device, fields, mode, precision):
    if is_cpu(device) and (mode, precision) != ("default", "float32"):
        pytest.skip(OF_INDUCTOR)
    decode(device, fields, mode, precision)


@some_options
def test_steps_are_recorded_as_cuda_graphs(needs_gpu, device, fields):
    torch._dynamo.utils.counters.clear()
    decode(device, fields, "reduce-overhead")
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


GENERATE = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "in chunks": {"prefill_chunk_size": N + 1},
    "repetition penalty": {"repetition_penalty": 1.3},
}


def generator(device, **fields):
    """Its tokens are those of float64, which no rounding changes."""
    model, reference = model_and_reference(device, "float64", vocab_size=PAD + 1, **fields)
    for each in (model, reference):
        each.generation_config.pad_token_id = PAD
        each.generation_config.suppress_tokens = [PAD]
    return model, reference


@some_options
@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("options", GENERATE.values(), ids=GENERATE)
def test_generate_gives_the_tokens_of_the_cpu(device, fields, is_padded, options):
    model, reference = generator(device, **fields)
    ids = random_ids(2, N + 3)
    options = {"max_new_tokens": N + 4} | options
    mask = left_padded(ids) if is_padded else {}
    found = []
    for each in (model, model if options.get("do_sample") else reference):
        torch.manual_seed(0)
        inputs = {name: states.to(each.device) for name, states in mask.items()}
        found.append(generate(each, ids.to(each.device), **options, **inputs).cpu())
    assert torch.equal(*found)


@some_options
def test_drafts_streams_and_turns_change_no_token(device, fields):
    model, reference = generator(device, **fields)
    ids, tokens = random_ids(1, 6).repeat(1, 4), []

    class Streamer(BaseStreamer):
        def put(self, value):
            tokens.extend(value.flatten().tolist())

        def end(self):
            pass

    expected = generate(reference, ids, max_new_tokens=2 * N)
    prompt = ids.to(device)
    assert torch.equal(generate(model, prompt, max_new_tokens=2 * N, prompt_lookup_num_tokens=3).cpu(), expected)
    generate(model, prompt, max_new_tokens=2 * N, streamer=Streamer())
    assert tokens == expected[0].tolist()
    first = generate(model, prompt, max_new_tokens=N, return_dict_in_generate=True)
    found = generate(model, first.sequences, max_new_tokens=N, past_key_values=first.past_key_values)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@some_options
def test_generate_with_compiled_steps_changes_no_token(needs_gpu, device, fields, mode):
    model, reference = generator(device, **fields)
    ids, options = random_ids(2, N + 3), {"max_new_tokens": N + 4}
    found = generate(model, ids.to(device), compile_config=CompileConfig(fullgraph=True, mode=mode), **options)
    assert torch.equal(found.cpu(), generate(reference, ids, **options))


@some_options
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_memory_moves_between_devices_as_a_file(tmp_path, device, fields, precision):
    model, _ = model_and_reference(device, precision, **fields)
    models = {device: model, "cpu": copy.deepcopy(model).cpu()}
    ids, more = random_ids(2, 2 * N + 3), random_ids(2, N + 2, seed=1)
    for index, (saver, loader) in enumerate([(device, "cpu"), ("cpu", device), (device, device)]):
        _, cache = read(models[saver], ids)
        cache.save_pretrained(tmp_path / str(index))
        loaded = InfiniCache.from_pretrained(tmp_path / str(index), models[loader])
        assert {state.device.type for state in loaded.state_dict().values()} == {torch.device(loader).type}
        for name, state in cache.state_dict().items():
            assert torch.equal(state.cpu(), loaded.state_dict()[name].cpu()), name
        expected, _ = read(models[saver], more, (3, 4), cache)
        found, _ = read(models[loader], more, (3, 4), loaded)
        assert_near(found, expected.cpu().double(), TOLERANCES[precision])


@some_options
def test_forks_rows_and_crops_are_those_of_their_streams(device, fields):
    model, reference = model_and_reference(device, **fields)
    ids, more = random_ids(2, 2 * N + 3), random_ids(2, N + 2, seed=1)
    _, cache = read(model, ids)
    twin = copy.deepcopy(cache)
    twin.activate_past_recording()
    read(model, more.flip(1), (1, 2), twin)
    twin.crop(-(N - 3))
    twin.reorder_cache(torch.tensor([1, 0]))
    for each, text in ((cache, ids), (twin, torch.cat([ids, more.flip(1)[:, :5]], 1).flip(0))):
        expected, _ = read(reference, torch.cat([text, more], 1))
        assert_near(read(model, more, (N,), each)[0], expected[:, text.shape[1] :], TOLERANCES["float32"])


ON_GPU = {
    "layers on both": ("model.embed_tokens", "model.rotary_emb", "model.layers.0"),
    "embeddings on the CPU": ("model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm"),
    "auto": "auto",
    "GPU": None,
}


def places(device: str, on_gpu):
    if on_gpu == "auto":
        return "auto"
    if on_gpu is None:
        return device
    modules = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
    gpu = "cpu" if is_cpu(device) else torch.cuda.current_device()
    return {module: gpu if module in on_gpu else "cpu" for module in modules}


@some_options
@pytest.mark.parametrize("on_gpu", ON_GPU.values(), ids=ON_GPU)
def test_a_model_may_be_spread_over_gpu_and_cpu(tmp_path, device, fields, on_gpu):
    _, reference = model_and_reference("cpu", **fields)
    reference.save_pretrained(tmp_path)
    model = InfiniForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, device_map=places(device, on_gpu))
    ids = random_ids(2, 3 * N + 2)
    expected, _ = read(reference, ids)
    found, cache = read(model, ids, range(2 * N + 3, 3 * N))
    assert_near(found, expected, TOLERANCES["float32"])
    cache.save_pretrained(tmp_path / "memory")
    loaded = InfiniCache.from_pretrained(tmp_path / "memory", model)
    assert loaded.tokens_read.tolist() == [3 * N + 2] * 2
    device = "cpu" if model.device.type == "meta" else model.device
    assert generate(model, ids.to(device)).shape == (2, 3 * N + 2 + 14)


def test_64k_tokens_take_the_memory_of_16k_and_stay_finite(needs_gpu, device):
    fields = {"hidden_size": 512, "num_hidden_layers": 4, "head_dim": 128, "segment_length": 1024, **SINKS}
    model, _ = model_and_reference(device, "bfloat16", **{**fields, "use_mem_delta_rule": True})
    peaks = []
    for length in (2**14, 2**16):
        ids = random_ids(1, length).to(device)
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            outputs = model(ids, logits_to_keep=1, use_cache=True)
        peaks.append(torch.cuda.max_memory_allocated())
        assert outputs.logits.isfinite().all()
        assert all(state.isfinite().all() for state in outputs.past_key_values.state_dict().values())
        del outputs
    # But for the ids themselves, of 8 bytes, and copies of them.
    assert peaks[1] - peaks[0] <= 4 * 8 * (2**16 - 2**14)
