"""The benchmarks run, and count right; how fast anything is, is not tested."""

import copy
import json
import os
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import beside, gpu, gpu_report, recall_ablations, scale
from benchmarks.__main__ import SHORT
from benchmarks.contenders import (
    infini,
    key_value_nbytes,
    llama,
    lucidrains,
    mistral,
    state_nbytes,
)
from benchmarks.machine import linear_shapes, matmul_flops, prefill_flops
from benchmarks.memory import prefill_peak_nbytes
from benchmarks.prefill import extrapolated_seconds
from benchmarks.suite import Suite
from benchmarks.timing import ratio


SIZE = {**SHORT, "num_key_value_heads": 1}
N = 16


def random_ids(tokens):
    return torch.randint(0, SIZE["vocab_size"], (1, tokens))


def test_ratio_is_of_medians_and_its_spread_of_rounds():
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == (4 / 3, 1.0, 3.0)


@pytest.mark.parametrize("is_long", [False, True])
@pytest.mark.parametrize("local_attention", ["segment", "sliding"])
def test_flops_of_a_prefill_are_those_counted(local_attention, is_long, monkeypatch):
    if is_long:
        monkeypatch.setattr("modeling_infini.modeling_infini.PIECE_TOKENS", 2 * N)
    contender = infini(SIZE, segment_length=N, local_attention=local_attention, attn_implementation="eager")
    tokens = 8 * N
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        contender.prefill(contender.build(), random_ids(tokens))
    head_dim, heads, layers = 16, SIZE["num_attention_heads"], SIZE["num_hidden_layers"]
    logits = 2 * SIZE["hidden_size"] * SIZE["vocab_size"]
    # What is computed and masked, and z's products, count as done, but not as what cannot be left out.
    dense = 2 * N if local_attention == "sliding" else N
    seen = N if local_attention == "sliding" else (N + 1) / 2
    reading = tokens * layers - (tokens - 1 if is_long else 0)
    masked = reading * 4 * heads * head_dim * (dense - seen)
    normaliser = reading * 2 * heads * head_dim
    expected = prefill_flops(SIZE, tokens, N, local_attention, tokens - 1 if is_long else 0)
    expected += masked + normaliser + logits
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_matrix_products_are_those_of_a_layer():
    model = llama(SIZE).build()
    layer = model.model.layers[0]
    shapes = [tuple(m.weight.shape[::-1]) for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    assert sorted(linear_shapes(SIZE)) == sorted(shapes)
    assert matmul_flops(SIZE, 8, repeats=1) > 0


@torch.no_grad()
def test_states_have_the_size_that_reading_gives():
    ids = random_ids(5 * N)
    for contender in (llama(SIZE), infini(SIZE, segment_length=N)):
        model = contender.build()
        assert state_nbytes(contender.prefill(model, ids)) == state_nbytes(contender.state_after(model, 5 * N))
    full = llama(SIZE)
    assert state_nbytes(full.prefill(full.build(), ids)) == key_value_nbytes(SIZE, 5 * N)


@torch.no_grad()
def test_each_contender_goes_on_from_its_state():
    ids = random_ids(3 * N + 1)
    all_heads = {**SIZE, "num_key_value_heads": 2}
    contenders = (llama(SIZE), mistral(SIZE, N), infini(SIZE, segment_length=N), lucidrains(all_heads, N))
    for contender in contenders:
        model = contender.build()
        state = contender.state_after(model, 3 * N)
        contender.generate(model, ids, state, 4)
        if state is not None:
            assert state.get_seq_length() == 3 * N + 4


def test_peak_memory_is_of_the_process_itself():
    suite = Suite(SIZE, {**SIZE, "num_key_value_heads": 2}, N, scale=64, repeats=1)
    ballast = torch.ones(2**29)
    assert 2**26 < prefill_peak_nbytes(suite, "Llama, full attention", 32) < ballast.nbytes


@pytest.mark.slow
def test_command_prints_its_table(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--short", "--output", str(tmp_path)]
    command += ["--sections", "prefill", "decode", "training"]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["figures"]) == 19
    # Extrapolated from texts of a few tokens, full attention may cost less than nothing.
    measured = [figure for figure in results["figures"] if "extrapolated" not in figure["note"]]
    assert all(figure["ratio"][0] > 0 for figure in measured)
    assert (tmp_path / "table.md").read_text().strip() in done.stdout
    assert {file.name for file in tmp_path.glob("*.png")} == {"prefill.png", "decode.png", "training-step.png"}


@pytest.mark.slow
def test_gpu_benchmark_runs_every_part_and_measures_nothing_twice(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--short", "--device", "cpu", "--sizes", "1.2b"]
    command += ["--output", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    (results,) = json.loads((tmp_path / "results.json").read_text()).values()
    cells = results["cells"]
    assert cells.keys() == {cell.key for cell in gpu.plan(list(gpu.PARTS), ["1.2b"])}
    assert {cell["part"].split()[0] for cell in cells.values()} == set(gpu.PARTS)
    assert not any(gpu.has_failed(cell) for cell in cells.values()), output
    for cell in cells.values():
        for outcome in cell.get("contenders", {}).values():
            assert all(seconds > 0 for seconds in outcome["seconds"])
        for profile in cell.get("profiles", {}).values():
            groups = {group for group, _, _ in profile["groups"]}
            assert {"linear layers", "attention", "RoPE", "norms", "residuals"} <= groups
    assert (tmp_path / "table.md").read_text().strip() in output
    gpu_report.draw_all(tmp_path)
    assert {file.name for file in tmp_path.glob("*.png")} >= {"prefill-1.2b.png", "decode-1.2b-batch-64.png"}

    bench = gpu.Bench(tmp_path, "cpu", is_short=True, segment_length=N)
    del bench.cells[key := "prefill, 1.2b, 2,048 tokens, batch 1"]
    gpu.measure(bench, gpu.plan(["prefill"], ["1.2b"]), retry=False, limit_seconds=60, start=time.monotonic())
    (again,) = json.loads((tmp_path / "results.json").read_text()).values()
    assert again["cells"].pop(key) != cells.pop(key)
    assert again["cells"] == cells


def test_a_gpu_cell_that_fails_is_recorded_and_the_next_goes_on(tmp_path, monkeypatch):
    def fails(bench, cell):
        if cell.tokens == 2048:
            raise ValueError("no such kernel")
        raise torch.OutOfMemoryError("of 80 GiB")

    monkeypatch.setitem(gpu.MEASURES, "prefill", fails)
    bench = gpu.Bench(tmp_path, "cpu", is_short=True, segment_length=N)
    cells = [gpu.Cell("prefill", "1.2b", tokens) for tokens in (2048, 8192)]
    gpu.measure(bench, cells, retry=False, limit_seconds=60, start=time.monotonic())
    (results,) = json.loads((tmp_path / "results.json").read_text()).values()
    failed, too_large = (results["cells"][cell.key] for cell in cells)
    assert failed["error"] == "ValueError: no such kernel"
    assert too_large["left_out"] == "does not fit"
    assert gpu.has_failed(failed)
    assert not gpu.has_failed(too_large)
    monkeypatch.setitem(gpu.MEASURES, "prefill", lambda bench, cell: {"contenders": {}})
    for retry, errors in ((False, 1), (True, 0)):
        gpu.measure(bench, cells, retry, limit_seconds=60, start=time.monotonic())
        assert sum("error" in cell for cell in bench.cells.values()) == errors
    assert "prefill" in gpu_report.render(tmp_path)


def test_long_texts_are_extrapolated_from_shorter_ones():
    full = {tokens: 3 * tokens + 5 * tokens**2 for tokens in (1, 2, 4, 8)}
    assert gpu.extrapolated({tokens: full[tokens] for tokens in (1, 2, 4)}, 8, is_quadratic=True) == full[8]
    assert gpu.extrapolated({2: 6.0}, 8, is_quadratic=True) == 96
    assert gpu.extrapolated({1: 3.0, 2: 6.0}, 8, is_quadratic=False) == 24


def test_figures_of_a_gpu_run_say_what_is_aimed_at():
    ours, theirs = gpu_report.LINEAR, gpu_report.LLAMA
    cell = {"size": "1.2b", "batch": 1, "tokens": 32_768}
    times = {ours: {"seconds": [1.0, 2.0], "share_of_matmul": 0.5}, theirs: {"seconds": [4.0, 6.0]}}
    step = {ours: {"seconds": [1.0]}, theirs: {"left_out": "does not fit"}}
    step[theirs + gpu.PREALLOCATED] = {"seconds": [3.0]}
    cells = [
        {**cell, "part": "prefill", "contenders": times},
        {**cell, "part": "decode", "batch": 64, "contenders": step, "ratio_by_bytes": 5.0},
        {**cell, "part": "profile of prefill", "profiles": {ours: {"memory_share": 0.1}, theirs: {"error": "none"}}},
    ]
    found = [(figure.ratio.value, figure.aim, figure.is_reached) for figure in gpu_report.figures(cells)]
    assert found == [(10 / 3, 2.0, True), (0.5, 0.55, False), (3.0, 4.0, False), (0.1, 0.12, True)]


@torch.no_grad()
@pytest.mark.parametrize("delta", [False, True])
def test_a_step_in_place_is_the_step(delta):
    model = infini(SIZE, segment_length=N, use_mem_delta_rule=delta).build()
    cache = model(random_ids(2 * N + 3), use_cache=True).past_key_values
    plain, token = copy.deepcopy(cache), torch.zeros(1, 1, dtype=torch.long)
    step = gpu.in_place(partial(model, token, past_key_values=cache), cache)
    step()
    model(token, past_key_values=plain)
    places = [state.data_ptr() for layer in cache.layers for state in layer.states().values()]
    for number in random_ids(2 * N)[0]:
        token.fill_(number)
        assert torch.equal(step().logits, model(token, past_key_values=plain).logits)
    assert places == [state.data_ptr() for layer in cache.layers for state in layer.states().values()]


@torch.no_grad()
def test_a_preallocated_cache_gives_the_steps_of_a_growing_one():
    model = llama(SIZE).build()
    ids, more = random_ids(2 * N), random_ids(4)
    growing = model(ids).past_key_values
    preallocated = gpu.preallocated_cache(model, 2 * N, 1)
    for layer, other in zip(preallocated.layers, growing.layers):
        layer.keys[:, :, : 2 * N], layer.values[:, :, : 2 * N] = other.keys, other.values
    for token in more.split(1, 1):
        expected = model(token, past_key_values=growing).logits
        torch.testing.assert_close(model(token, past_key_values=preallocated).logits, expected)
    preallocated.crop(-4)
    growing.crop(-4)
    assert preallocated.get_seq_length() == growing.get_seq_length() == 2 * N
    found = [model(more[:, :1], past_key_values=cache).logits for cache in (preallocated, growing)]
    torch.testing.assert_close(*found)


@pytest.mark.slow
def test_command_measures_cpu_kernels_of_a_model(tmp_path):
    infini(SIZE, segment_length=N).build().save_pretrained(tmp_path)
    command = [sys.executable, "-m", "benchmarks.cpu_kernels", "--model", str(tmp_path), "--repeats", "1"]
    command += ["--tokens", "64", "--trained-tokens", "32", "--new-tokens", "2"]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in done.stdout.splitlines()[2:]]
    steps = ["as it is", "CPU kernels"]
    assert rows == [
        *(["prefill", how] for how in steps),
        *(["generated", how] for how in (*steps, "CPU kernels, compiled")),
        *(["training step", how] for how in steps),
    ]


@pytest.mark.slow
def test_a_checkout_beside_itself_differs_in_nothing_but_time():
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "benchmarks.beside", str(root), "--short"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in done.stdout.splitlines()[2:]]
    counts, logits, times = rows[:6], rows[6:10], rows[10:]
    assert all(before == after and share == "1" for _, before, after, share in counts)
    assert all(after == "0.0e+00" for _, _, after, _ in logits)
    assert len(times) == 12
    assert all(after.endswith(" ms") for _, _, after, _ in times)


@pytest.mark.parametrize("local_attention", ["segment", "sliding"])
def test_state_of_a_cache_is_counted_whatever_its_layers_call_it(local_attention):
    contender = infini(SIZE, segment_length=N, local_attention=local_attention)
    with torch.no_grad():
        cache = contender.prefill(contender.build(), random_ids(2 * N))
    assert beside.state_nbytes(cache) == state_nbytes(cache)


def test_published_figures_of_a_gpu_are_those_of_the_run():
    folder = Path(__file__).parent.parent / "docs" / "performance" / "gpu"
    ((card, run),) = json.loads((folder / "results.json").read_text()).items()
    table = gpu_report.tables(card, list(run["cells"].values()))
    assert (folder / "table.md").read_text().strip() == table.strip()
    page = (folder.parents[1] / "performance.md").read_text(encoding="utf-8")
    assert table[table.index("| figure |") :].strip() in page
    tests = json.loads((folder / "check.json").read_text())["tests"].values()
    outcomes = Counter(test["outcome"] for test in tests)
    assert f"{outcomes['passed']} passed and {outcomes['failed']} failed" in page


def test_published_figures_are_those_of_the_run():
    root = Path(__file__).parent.parent
    table = (root / "docs" / "performance" / "table.md").read_text().strip()
    assert table in (root / "docs" / "performance.md").read_text(encoding="utf-8")
    rows = ["|".join(row.split("|")[:4]) + "|" for row in table.splitlines()]
    section = (root / "README.md").read_text(encoding="utf-8").split("## What it costs")[1]
    published = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert len(published) == 5
    assert set(published) <= set(rows[2:])


def test_the_page_on_scale_has_the_predicted_table():
    page = Path(__file__).parent.parent / "docs" / "scale.md"
    assert scale.table(scale.Device(), scale.Assumptions()) in page.read_text()


@pytest.mark.parametrize("local_attention", ["segment", "sliding"])
def test_predicted_state_is_that_of_a_cache(local_attention, monkeypatch):
    monkeypatch.setattr(scale, "SIZE", SIZE)
    monkeypatch.setattr(scale, "HEAD_DIM", 16)
    monkeypatch.setattr(scale, "SEGMENT_LENGTH", N)
    contender = infini(SIZE, torch.bfloat16, segment_length=N, local_attention=local_attention)
    with torch.no_grad():
        state = contender.prefill(contender.build(), random_ids(2 * N))
    assert scale.state_nbytes() == state_nbytes(state)


def test_extrapolation_is_quadratic():
    seconds = {tokens: 3 * tokens + 5 * tokens**2 for tokens in (1, 2, 4)}
    assert extrapolated_seconds(seconds[1], seconds[2]) == seconds[4]


def test_table_of_ablations_is_that_of_their_file():
    docs = Path(__file__).parent.parent / "docs"
    rows = [json.loads(line) for line in (docs / "recall" / "ablations.jsonl").read_text().splitlines()]
    assert {row["run"] for row in rows} == set(recall_ablations.RUNS)
    assert recall_ablations.markdown(rows) in (docs / "lab_notebook.md").read_text(encoding="utf-8")


def test_associations_are_asked_for_once_each_and_answered_by_their_pairs():
    generator = torch.Generator().manual_seed(0)
    batch = recall_ablations.recall_batch(4, 128, generator)
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist()):
        pairs = dict(
            divmod(token, recall_ablations.NUM_VALUES) for token in ids[:32] if token < recall_ablations.FIRST_KEY
        )
        answers = {
            ids[place - 1] - recall_ablations.FIRST_KEY: label - recall_ablations.FIRST_VALUE
            for place, label in enumerate(labels)
            if label != -100
        }
        assert len(pairs) == recall_ablations.NUM_PAIRS
        assert answers == pairs
