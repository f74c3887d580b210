"""
Memory files from strangers: whatever a folder holds, a cache is loaded that can be used, or there is a clear error. No
crash, no more memory than twice the file's size, nothing written. `python tests/test_cache_fuzz.py 10000` runs more.
"""

import argparse
import copy
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from tiny import EVERY_OPTION, MODES, random_ids, tiny_model

from modeling_infini import InfiniCache
from modeling_infini.cache import digest_of


HOSTILE = [
    *(None, True, False, -1, 0, 1, 3, 2**31, 2**60, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, 1.5, -0.0, 1e308),
    *(
        "",
        "..",
        "../x",
        "/etc/passwd",
        "infini_cache",
        "a\0b",
        "é" * 300,
        "float32",
        "int64",
        "\ud800",
        "x" * 5000,
    ),
    *([], {}, [[]], [None], [-1], [1.0], [True], [1, 2], [2**63], [9] * 1000, {"a": {}}, {"__class__": "x"}),
]
BOMBS = [
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"[[" * 400 + b"]]" * 400,
    b"9" * 5000,
    b"NaN",
    b"-Infinity",
    b'"' + b"A" * 2_000_000 + b'"',
    b"\xff\xfe{\x00}\x00",
    b"\xef\xbb\xbf{}",
    b"",
    b"null",
]
DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "U64",
    "BOOL",
    "F8_E4M3",
    "F8_E8M0",
    "F4",
    "C64",
    "?",
]
NUMBERS = [0, 1, -1, 2, 5, 6, 8, 12, 13, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63)]


class Folder:
    """A saved cache as its parts: metadata, safetensors header and the bytes of the tensors."""

    def __init__(self, folder: Path):
        self.folder = folder
        payload = (folder / "infini_cache.safetensors").read_bytes()
        end = 8 + int.from_bytes(payload[:8], "little")
        self.header, self.data = json.loads(payload[8:end]), bytearray(payload[end:])
        self.metadata = json.loads(self.header.pop("__metadata__")["infini_cache"])

    def write(self, rng: random.Random, edits: list[str]) -> None:
        """Writes the parts after such `edits`; unless one of them is of it, with the right digest."""
        metadata, header, data = copy.deepcopy(self.metadata), copy.deepcopy(self.header), bytearray(self.data)
        length, tail, digest, text, texts = None, b"", None, None, {}
        for edit in edits:
            places = [each for each in header.values() if isinstance(each, dict) and each.get("data_offsets")]
            if edit == "field":
                target = rng.choice([metadata, metadata.get("model"), metadata.get("model")])
                if isinstance(target, dict) and target:
                    target[rng.choice([*target, "columns", "new"])] = rng.choice(HOSTILE)
            elif edit == "no field":
                metadata.pop(rng.choice([*metadata, "x"]), None)
            elif edit == "json bytes":
                text = bytearray(json.dumps(metadata).encode() if text is None else text)
                for _ in range(rng.randint(1, 4)):
                    at = rng.randrange(len(text) + 1)
                    text[at : at + rng.randint(0, 9)] = rng.choice(
                        [b"", b"{", b"]", b'"', b"-", b"\0", b"1e9", *BOMBS]
                    )
            elif edit == "json bomb":
                text = json.dumps(metadata).encode()[:-1] + b',"x":' + rng.choice(BOMBS) + b"}"
                text = rng.choice([text, rng.choice(BOMBS)])
            elif edit == "twice":
                text = json.dumps(metadata).encode()[:-1] + b',"columns":3}'
            elif edit == "header" and places:
                place = rng.choice(places)
                name = rng.choice(["dtype", "shape", "data_offsets"])
                place[name] = {
                    "dtype": rng.choice(DTYPES),
                    "shape": [rng.choice(NUMBERS) for _ in range(rng.randint(0, 6))],
                    "data_offsets": [rng.choice([*NUMBERS, len(data)]) for _ in range(rng.choice([2, 2, 2, 3]))],
                }[name]
            elif edit == "swap":
                one, other = rng.sample(sorted(header), 2)
                header[one], header[other] = header[other], header[one]
            elif edit == "rename":
                header[rng.choice(["x", "", "layers.9.keys", "layers.0.__class__", "counters", "infini_cache"])] = (
                    header.pop(rng.choice(sorted(header)))
                )
            elif edit == "header length":
                length = rng.choice([0, 1, 7, 10**6, 2**31, 2**40, 2**63, 2**64 - 1])
            elif edit == "header bomb":
                texts = rng.choice([{"a": "b" * 100_000}, {str(i): "" for i in range(9999)}, {"a": []}, {"sha256": 1}])
            elif edit == "values" and data:
                at = rng.randrange(len(data))
                data[at : at + 8] = rng.choice(
                    [b"\xff" * 8, b"\x7f" * 8, b"\0" * 8, rng.randbytes(8), b"\x80\x7f" * 4]
                )
            elif edit == "counters":
                place = header.get(rng.choice(["columns", "tokens_read", "slot_columns"]))
                if isinstance(place, dict):
                    start, end = place["data_offsets"][:2]
                    if all(type(at) is int for at in (start, end)) and 0 <= start < end <= len(data):
                        at = start + 8 * rng.randrange(max(1, (end - start) // 8))
                        data[at : at + 8] = rng.choice(NUMBERS).to_bytes(8, "little", signed=True)
            elif edit == "cut":
                del data[rng.randrange(len(data) + 1) :]
            elif edit == "tail":
                tail = rng.randbytes(rng.choice([1, 8, 100_000]))
            elif edit == "digest":
                digest = rng.choice(["0" * 16, "", "..", "a" * 64])
        text = json.dumps(metadata) if text is None else bytes(text).decode(errors="replace")
        digest = (
            digest_of(text, {name: contents_of(place, data) for name, place in header.items()})
            if digest is None
            else digest
        )
        head = json.dumps({"__metadata__": {"infini_cache": text, "sha256": digest, **texts}, **header}).encode()
        payload = (len(head) if length is None else length).to_bytes(8, "little") + head + data + tail
        if rng.random() < 0.05:
            payload = payload[: rng.randrange(len(payload))]
        (self.folder / "infini_cache.safetensors").write_bytes(payload)


def contents_of(place: dict, data: bytearray) -> torch.Tensor:
    """What a reader takes for the bytes of a tensor, if it takes any."""
    try:
        start, end = place["data_offsets"]
        return torch.frombuffer(data[start:end], dtype=torch.uint8)
    except (TypeError, ValueError):
        return torch.empty(0)


EDITS = [
    *(
        "field",
        "field",
        "no field",
        "json bytes",
        "json bomb",
        "twice",
        "header",
        "header",
        "swap",
        "rename",
    ),
    *("header length", "header bomb", "values", "values", "counters", "counters", "counters", "cut", "tail", "digest"),
]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def fuzz(folder: Path, mutations: int, seed: int = 0) -> Counter:
    """What came of `mutations` of saved caches; fails where that is neither a cache that works nor a clear error."""
    rng, outcomes, saved = random.Random(seed), Counter(), []
    longest = 0
    for index, fields in enumerate([*MODES, EVERY_OPTION]):
        model = tiny_model(num_hidden_layers=1 + index % 2, **fields)
        model.set_attn_implementation("eager")
        cache, mask = model.new_cache(), torch.ones(2, 8)
        mask[1, :3] = 0
        with torch.no_grad():
            model(random_ids(2, 8), attention_mask=mask, past_key_values=cache)
            model(random_ids(2, 1), past_key_values=cache)
        (folder / str(index)).mkdir()
        cache.save_pretrained(folder / str(index))
        saved.append((model, Folder(folder / str(index))))
    for _ in range(mutations):
        model, parts = rng.choice(saved)
        edits = rng.choices(EDITS, k=rng.choice([1, 1, 1, 2, 3]))
        parts.write(rng, edits)
        before = contents(folder)
        try:
            cache = InfiniCache.from_pretrained(parts.folder, model)
        except (ValueError, FileNotFoundError) as error:
            outcomes[type(error).__name__] += 1
            longest = max(longest, len(str(error)))
        else:
            states = cache.state_dict()
            assert all(state.isfinite().all() for state in states.values()), edits
            with torch.no_grad():
                model(random_ids(len(cache.tokens_read), 7), past_key_values=cache)
                model(random_ids(len(cache.tokens_read), 1), past_key_values=cache)
                # As wide as the columns that were read.
                weights = cache.get_seq_length() < 1000 and not model.config.num_memory_slots
                model(random_ids(len(cache.tokens_read), 2), past_key_values=cache, output_attentions=weights)
            outcomes["loaded"] += 1
        assert contents(folder) == before, edits
    assert longest < 2000
    return outcomes


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutations_load_or_are_refused(tmp_path, count):
    outcomes = fuzz(tmp_path, count)
    assert outcomes["ValueError"] > count / 2
    # Values that are changed and possible cannot be told from those that were read.
    assert count / 100 < outcomes["loaded"] < count / 3


def test_links_pipes_and_devices_are_no_files(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        cache = model(random_ids(1, 8), use_cache=True).past_key_values
    cache.save_pretrained(tmp_path / "m")
    file, outside = tmp_path / "m" / "infini_cache.safetensors", tmp_path / "outside"
    file.replace(outside)
    # As the Hub's cache has its files.
    file.symlink_to(outside)
    InfiniCache.from_pretrained(tmp_path / "m", model)
    file.unlink()
    file.symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="is damaged"):
        InfiniCache.from_pretrained(tmp_path / "m", model)
    for target in ("/dev/zero", file, "/nowhere", tmp_path):
        file.unlink()
        file.symlink_to(target)
        with pytest.raises(FileNotFoundError, match="holds no saved cache"):
            InfiniCache.from_pretrained(tmp_path / "m", model)
    file.unlink()
    os.mkfifo(file)
    for folder in (tmp_path / "m", tmp_path / "nowhere", outside):
        with pytest.raises(FileNotFoundError, match="holds no saved cache"):
            InfiniCache.from_pretrained(folder, model)


MEASURE = """
import json, sys
from pathlib import Path
import torch
from tiny import tiny_config
from modeling_infini import InfiniCache
torch.set_num_threads(1)

def resident(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

config = tiny_config(segment_length=int(sys.argv[1]))
for folder in sys.argv[2:]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    before = resident("VmRSS")
    try:
        cache, outcome = InfiniCache.from_pretrained(folder, config), "loaded"
    except ValueError as error:
        cache, outcome = None, str(error)
    print(json.dumps([outcome, resident("VmHWM") - before]))
    del cache
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux gives it")
def test_no_file_takes_more_than_twice_its_size(tmp_path):
    megabytes, length = 1_000_000, 100_000
    model = tiny_model(segment_length=length)
    with torch.no_grad():
        cache = model(random_ids(1, 3), use_cache=True).past_key_values
    cache.save_pretrained(tmp_path / "whole")
    payload = (tmp_path / "whole" / "infini_cache.safetensors").read_bytes()
    assert len(payload) > 20 * megabytes

    def folder(name, payload):
        (tmp_path / name).mkdir()
        (tmp_path / name / "infini_cache.safetensors").write_bytes(payload)
        return name

    def with_header(header):
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text

    def with_text(text):
        return save({"x": torch.ones(1)}, {"infini_cache": text})

    def named(count):
        return {str(index): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for index in range(count)}

    version = '{"format_version": 4, "x": '
    expected = {
        "whole": "loaded",
        folder("larger than declared", payload + payload): "cannot be read",
        folder("deep", with_text("[" * 900_000)): "cannot be read",
        folder("wide", with_text("[" + "[]," * 300_000 + "[]]")): "does not describe",
        folder("long", with_text("x" * 40 * megabytes)): "longer than",
        folder("fields", with_text(version + "[" + "[]," * 300_000 + "[]]}")): "is not what was saved",
        folder("texts", with_header({"__metadata__": {str(index): "" for index in range(500_000)}})): "longer than",
        folder("tensors", with_header(named(200_000))): "longer than",
        folder("fewer", with_header(named(15_000))): "does not describe",
        folder(
            "shapes", with_header({"x": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}})
        ): "cannot be read",
    }
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", MEASURE, str(length), *(str(tmp_path / name) for name in expected)]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}"}
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root, env=environment)
    for (name, message), line in zip(expected.items(), result.stdout.splitlines(), strict=True):
        outcome, taken = json.loads(line)
        size = sum(file.stat().st_size for file in (tmp_path / name).iterdir())
        assert any(part in outcome for part in message.split("|")), (name, outcome)
        # Python's objects for a megabyte of metadata, which is the most that is read, take up to 40.
        assert taken < 2 * size + 40 * megabytes, (name, taken, size)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mutations", type=int)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(dict(fuzz(Path(temporary), arguments.mutations, arguments.seed)))
