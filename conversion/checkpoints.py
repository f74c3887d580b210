"""Checkpoints of any size: their weights are read one by one and written shard by shard."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from functools import cached_property
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

import torch
from huggingface_hub import HfApi, snapshot_download, split_state_dict_into_shards_factory
from huggingface_hub.errors import HFValidationError, HTTPError, StrictDataclassError
from huggingface_hub.hf_api import RepoFile
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    logging,
)

from modeling_infini import InfiniConfig
from modeling_infini.modeling_infini import FORMER_NAMES, require_place

from .architectures import DEQUANTIZE
from .gguf_files import GGUFFile, is_gguf
from .wrong_sources import require_no_adapter, what_file_it_is, what_it_holds


# Weights of all frameworks, and what training leaves. Those that a conversion reads are found by other means.
WEIGHT_FILES = [
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.npz", "*.pdparams"),
    *("*.onnx", "*.onnx_data*", "*.gguf", "*.ggml", "*.tflite", "*.mlmodel", "*.nemo", "*.distcp", "*.engine"),
]

# A single file, or the index of several: in this order, which is that of transformers.
SAFE_LAYOUT = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
BIN_LAYOUT = (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)

# The field of config.json by which transformers finds weights, or their index, of another name.
WEIGHTS_FIELD = "transformers_weights"

MEMORY_WEIGHT = r"\.self_attn\.(head_gates|memory|slot_score)\."

# Of a memory's weights, where a checkpoint has several files.
MEMORY_SHARD = "model-memory{}.safetensors"

# What stands in the place of a large file that git alone has fetched, and the most bytes that it has.
LFS_POINTER = b"version https://git-lfs"
LARGEST_POINTER = 1024

# What the name of a folder that is not complete ends with.
UNFINISHED = ".unfinished"

# In bytes. Tokenizers of large vocabularies have 35 MB.
LARGEST_SIDE_FILE = 100 * 2**20

# Room on a disk, in bytes, that is little beside the weights: tokenizer, card and code are written too.
CLOSE = 2 * LARGEST_SIDE_FILE

Weights = dict[str, Callable[[], torch.Tensor]]

logger = logging.get_logger(__name__)

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Elements of a weight that are compared at a time.
COMPARED = 1 << 18


class Checkpoint:
    """
    A causal language model's files, whose weights are read one at a time.

    Attributes:
        folder: where configuration, tokenizer and README stand.
        name, revision: id and commit on the Hub; `None` for a folder or file.
        gguf: the `.gguf` file; `None` for a folder.
        sizes: bytes of each file in the folder and its sub-folders, by its name there; also of those on the Hub that
            were not downloaded. None of a GGUF file's neighbours.
    """

    def __init__(
        self, source: str | os.PathLike, revision: str | None = None, allow_bin: bool = False, **download: Any
    ):
        """
        Args:
            source: a folder with a checkpoint, a `.gguf` file, or the id of a model on the Hub.
            revision: of a model on the Hub.
            allow_bin: read PyTorch `.bin` files if there are no safetensors: they are pickles, loaded with
                `weights_only=True`.
            download: from the Hub: `cache_dir`, `force_download`, `local_files_only` and `token` of huggingface_hub.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            ValueError: if it is another thing, such as an adapter.
        """
        self.name = None if Path(source).exists() else str(source)
        if self.name is None and revision is not None:
            raise ValueError(f'revision="{revision}" is for a model on the Hub, but {source} is on this machine.')
        self.folder, gguf_file = _locate(source, revision, download)
        # A snapshot's folder is named by its commit.
        self.revision = None if self.name is None else self.folder.name
        self._allow_bin, self._download = allow_bin, download
        self.sizes: dict[str, int] = {}
        self.gguf: GGUFFile | None = None
        if gguf_file is not None:
            _require_no_pointers(self.folder, [gguf_file.name])
            self.gguf = GGUFFile(gguf_file)
        else:
            listed = {} if self.name is None else _hub_sizes(self.name, self.revision, download)
            self.sizes = {**listed, **_sizes(self.folder)}
            require_no_adapter(self.sizes, str(source))
            if not (self.folder / "config.json").is_file():
                raise FileNotFoundError(
                    f"{source} holds no checkpoint: there is no config.json.{what_it_holds(self.sizes)}"
                )
            # It may say which the files of weights are.
            _require_no_pointers(self.folder, [CONFIG_NAME])
            small = [name for name, size in self.sizes.items() if size < LARGEST_POINTER]
            used = [name for name in small if name in self.weight_files or not is_weight_file(name)]
            _require_no_pointers(self.folder, used)

    @cached_property
    def config(self) -> Any:
        """The configuration, in the source's own class."""
        file = self.folder / "config.json" if self.gguf is None else self.gguf.path
        try:
            return AutoConfig.from_pretrained(self.folder) if self.gguf is None else self.gguf.config
        except (TypeError, AttributeError, KeyError, ArithmeticError, StrictDataclassError) as error:
            raise ValueError(f"{file} holds no configuration of a model: {error.__cause__ or error}") from error

    @property
    def config_fields(self) -> dict[str, Any]:
        """The fields of `config`, also where transformers does not know the architecture."""
        if self.gguf is not None:
            return self.config.to_dict()
        return read_json(self.folder / "config.json")

    @property
    def infini_config(self) -> InfiniConfig:
        """
        The configuration of an Infini-attention checkpoint.

        Raises:
            ValueError: if it is of another type.
        """
        if (model_type := self.config_fields.get("model_type")) != InfiniConfig.model_type:
            raise ValueError(
                f'{self.name or self.folder} is no Infini-attention checkpoint, but of type "{model_type!s:.100}". '
                "`infini convert` makes one of it, if it can."
            )
        return self.config

    @cached_property
    def _weights(self) -> tuple[dict[str, torch.Tensor], Callable[[str], torch.Tensor]]:
        if self.gguf is not None:
            return self.gguf.shapes, self.gguf.read
        safe = [self.folder / name for name in self.safetensors]
        files = safe or [self.folder / name for name in self._files_of(BIN_LAYOUT)]
        if not files:
            raise FileNotFoundError(
                f"{self.name or self.folder} holds neither {' nor '.join(SAFE_LAYOUT)}.{what_it_holds(self.sizes)}"
            )
        if not (safe or self._allow_bin):
            raise ValueError(
                f"{self.name or self.folder} holds PyTorch .bin weights only, which are pickle files. A conversion "
                "reads them with allow_bin=True (--allow-bin), with weights_only=True. Those of an Infini-attention "
                "model must be saved as safetensors first: load the state dict, then model.save_pretrained."
            )
        if self.name is not None:
            # Some repositories hold their weights twice, in several layouts.
            names = [file.relative_to(self.folder).as_posix() for file in files]
            only = [escape(name) for name in names]
            snapshot_download(self.name, revision=self.revision, allow_patterns=only, **self._download)
        if missing := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(f"The index in {self.folder} names {missing[0]}, which is not there. Download it.")
        return _open_files(files, _read_safetensors if safe else _read_bin)

    @property
    def safetensors(self) -> list[str]:
        """Names of the safetensors files that hold the weights; none if others do."""
        return self._files_of(SAFE_LAYOUT)

    def _files_of(self, layout: tuple[str, str]) -> list[str]:
        """The files that hold the weights in a layout; none if the checkpoint has not that layout."""
        single, index = layout
        if layout == SAFE_LAYOUT and (named := read_json(self.folder / CONFIG_NAME).get(WEIGHTS_FIELD)) is not None:
            single = index = str(named)
        if single in self.sizes and not single.endswith(".json"):
            return [single]
        return indexed_files(self.folder / index) if index in self.sizes else []

    @property
    def shapes(self) -> dict[str, torch.Tensor]:
        """A tensor on the meta device for each weight."""
        return self._weights[0]

    @cached_property
    def weight_files(self) -> set[str]:
        """Names of the files that hold the weights, and of their index; none of a GGUF file's neighbours."""
        if self.gguf is not None:
            return set()
        return {*(self.safetensors or self._files_of(BIN_LAYOUT)), SAFE_LAYOUT[1], BIN_LAYOUT[1]}

    def read(self, name: str) -> torch.Tensor:
        """A weight; its file stays open only as long as the tensor lives."""
        return self._weights[1](name)


def _locate(source: str | os.PathLike, revision: str | None, download: dict[str, Any]) -> tuple[Path, Path | None]:
    """The folder of a source, and its GGUF file if it is one."""
    path = Path(source)
    if path.is_dir():
        files = [file for file in path.iterdir() if is_gguf(file) and file.is_file()]
        alone = len(files) == 1 and not (path / "config.json").is_file()
        return path, files[0] if alone else None
    if is_gguf(path):
        if not path.is_file():
            raise FileNotFoundError(f"There is no GGUF file {path}.")
        return path.parent, path
    if path.is_file():
        raise FileNotFoundError(what_file_it_is(path))
    require_place(source)
    return _download(str(source), revision, download), None


def _download(name: str, revision: str | None, download: dict[str, Any]) -> Path:
    """What is no file of weights: whether those are needed is not known yet."""
    sizes = _hub_sizes(name, revision, download)
    unread = [*WEIGHT_FILES, *(escape(file) for file, size in sizes.items() if size > LARGEST_SIDE_FILE)]
    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=unread, **download))
    except (OSError, HTTPError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{name} is no folder with a checkpoint, no .gguf file and no id of the Hub that can be read. ({error})"
        ) from error


def _require_no_pointers(folder: Path, names: list[str]) -> None:
    for name in names:
        file = folder / name
        if file.is_file() and not is_hidden(file.name):
            with file.open("rb") as start:
                if start.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise ValueError(
                        f"{file} is not the file itself but a pointer of Git LFS. Fetch the files: `git lfs pull`."
                    )


def _hub_sizes(name: str, revision: str | None, download: dict[str, Any]) -> dict[str, int]:
    """Bytes of each file of a model on the Hub; none where it cannot be asked: its files may be in the cache."""
    if download.get("local_files_only"):
        return {}
    try:
        entries = list(HfApi(token=download.get("token")).list_repo_tree(name, recursive=True, revision=revision))
    except (OSError, HTTPError, HFValidationError):
        return {}
    return {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file in a folder and its sub-folders, links followed. Hidden folders are listed, not entered."""
    sizes: dict[str, int] = {}
    seen = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        here = Path(path)
        if here.resolve() in seen:
            folders.clear()
            continue
        seen.add(here.resolve())
        names = [*files, *(f"{name}/*" for name in folders if is_hidden(name))]
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in names:
            file = here / name
            sizes[file.relative_to(folder).as_posix()] = file.stat().st_size if file.is_file() else 0
    return sizes


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no part of a checkpoint: it may hold a secret, or a tool's state."""
    return (name.startswith(".") and name != ".gitattributes") or name == "__pycache__"


def is_weight_file(name: str) -> bool:
    """Whether a file holds weights by its name, or says where they are."""
    return name.endswith(".index.json") or any(fnmatch(PurePosixPath(name).name, kind) for kind in WEIGHT_FILES)


def read_json(file: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: if the file does not hold a JSON object; the message names it.
    """
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} holds no valid JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} holds no JSON object.")
    return fields


def write_json(file: Path, fields: dict[str, Any]) -> None:
    """As transformers writes its configurations."""
    file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def indexed_files(index: Path) -> list[str]:
    """
    Names of the files that an index names, sorted.

    Raises:
        ValueError: if it is no index, or a file lies outside its folder.
    """
    file_of = read_json(index).get("weight_map")
    if not isinstance(file_of, dict) or not file_of or not all(isinstance(name, str) for name in file_of.values()):
        raise ValueError(f"{index} holds no weight_map with the file of each weight. Download it again.")
    names = sorted(set(file_of.values()))
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{index} names {name}, which is not in its folder.")
    return names


def _open_files(files: list[Path], read_file: Callable) -> tuple[dict[str, torch.Tensor], Callable]:
    shapes, places = {}, {}
    for file in files:
        for saved_name, shape in read_file(file, None).items():
            name, _ = FORMER_NAMES.rename_source_key(saved_name)
            shapes[name], places[name] = shape, (file, saved_name)
    return shapes, lambda name: read_file(*places[name])


def _read_safetensors(file: Path, name: str | None):
    try:
        # Tensors are views of the mapped file: nothing is read before it is used.
        with safe_open(file, "pt") as weights:
            if name is not None:
                return weights.get_tensor(name)
            return {name: _shape(weights.get_tensor(name)) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is incomplete or damaged ({error}). Download it again.") from error


def _read_bin(file: Path, name: str | None):
    weights = read_pickle(file, mmap=True)
    return {name: _shape(weight) for name, weight in weights.items()} if name is None else weights[name]


def read_pickle(file: Path, mmap: bool = False) -> Mapping[str, torch.Tensor]:
    """
    A state dict that `torch.save` wrote, read without running code.

    Raises:
        ValueError: if the file holds something else; the message says what.
    """
    try:
        weights = torch.load(file, map_location="cpu", mmap=mmap, weights_only=True)
    except OSError:
        raise
    # What is no pickle raises whatever its bytes make of it.
    except Exception as error:
        raise ValueError(
            f"{file} cannot be read with weights_only=True: it is damaged, older than torch 1.6, or holds more than "
            "tensors. Save its weights as safetensors where you trust it."
        ) from error
    require_state_dict(weights, str(file))
    return weights


def require_state_dict(weights: Any, name: str) -> None:
    """Raises ValueError if what is called `name` is no mapping of names to tensors."""
    if not isinstance(weights, Mapping):
        raise ValueError(f"{name} holds no state dict, but a {type(weights).__name__}. Save `model.state_dict()`.")
    for key, weight in weights.items():
        if not (isinstance(key, str) and isinstance(weight, torch.Tensor)):
            raise ValueError(
                f"{name} holds no state dict alone: {key!r} is a {type(weight).__name__}. Save `model.state_dict()`."
            )


def _shape(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="meta")


def is_memory_weight(name: str) -> bool:
    """Whether a parameter is what a memory adds to its base: head gates, slot scores, and all in a layer's memory."""
    return re.search(MEMORY_WEIGHT, name) is not None


def write_weights(folder: Path, shapes: dict[str, torch.Tensor], weights: Weights, max_shard_size: int | str) -> None:
    """
    Writes safetensors files, and their index last, holding one of them in memory. Where there are several, those of a
    memory are in one of their own: another memory can take its place without a look at the others.

    Args:
        shapes: a tensor on the meta device for each weight, with the dtype to be written.
        weights: a function for each weight that reads it.

    Raises:
        ValueError: if a weight does not fit into its dtype, see [`cast`].
    """
    files = _shards(shapes, max_shard_size)
    if len(files) > 1 and (of_memory := [name for name in shapes if is_memory_weight(name)]):
        files = _shards({name: shapes[name] for name in shapes if name not in of_memory}, max_shard_size)
        if SAFE_WEIGHTS_NAME in files:
            # By that name, it would be read instead of the index beside it.
            files = {SAFE_WEIGHTS_NAME.replace(".", "-00001-of-00001."): files[SAFE_WEIGHTS_NAME]}
        files[MEMORY_SHARD.format("")] = of_memory
    total = sum(shape.nbytes for shape in shapes.values())
    with logging.tqdm(total=total, desc="Writing weights", unit="B", unit_scale=True) as progress:
        for file, names in files.items():
            shard = {name: cast(name, weights[name](), shapes[name].dtype).contiguous() for name in names}
            save_file(shard, folder / file, metadata={"format": "pt"})
            progress.update(sum(tensor.nbytes for tensor in shard.values()))
            # Else it would live until the next one is complete.
            del shard
    if len(files) > 1:
        write_index(folder / SAFE_WEIGHTS_INDEX_NAME, {name: file for file in files for name in files[file]}, total)


def _shards(shapes: dict[str, torch.Tensor], max_shard_size: int | str) -> dict[str, list[str]]:
    """The names of the weights in each file."""
    return split_state_dict_into_shards_factory(
        shapes,
        get_storage_size=lambda shape: shape.nbytes,
        filename_pattern=SAFE_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=max_shard_size,
    ).filename_to_tensors


def write_index(file: Path, file_of: dict[str, str], total_size: int) -> None:
    """Writes which file holds each weight."""
    index = {"metadata": {"total_size": total_size}, "weight_map": file_of}
    file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def require_float(name: str, shape: torch.Tensor) -> None:
    """Raises ValueError if a weight is stored as integers or in 8 bits."""
    if shape.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{name} is stored as {shape.dtype}: the checkpoint has {DEQUANTIZE}.")


def cast(name: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    A weight in another dtype. One that holds NaN or infinity already is kept as it is, with a warning.

    Raises:
        ValueError: if it would lose more than rounding does: a value becomes infinite, or the weight as a whole more
            than 1 % of its norm.
    """
    converted = weight.to(dtype)
    exact = torch.promote_types(weight.dtype, dtype) == dtype
    norm = loss = 0.0
    finite = True
    for before, after in zip(weight.flatten().split(COMPARED), converted.flatten().split(COMPARED)):
        known = before.isfinite()
        finite = finite and bool(known.all())
        if not exact:
            values, kept = (part.double().where(known, 0.0) for part in (before, after))
            norm, loss = norm + values.square().sum().item(), loss + (kept - values).square().sum().item()
    if not finite:
        logger.warning("%s of the source holds values that are not finite (NaN or infinity); they are kept.", name)
    if loss > 1e-4 * norm:
        largest = weight[weight.isfinite()].abs().max().item()
        small = largest < torch.finfo(dtype).max
        wider = '"bfloat16" or "float32"' if dtype == torch.float16 else '"float64", or "auto"'
        raise ValueError(
            f"{name} does not fit into {dtype}: its values, up to {largest:.6g}, "
            + ("are too small and would become zero or coarse" if small else "would become infinite")
            + f". Choose dtype={wider}."
        )
    return converted


@contextmanager
def named_full_disk(folder: str | os.PathLike) -> Iterator[None]:
    """Says of which folder the disk is full, also where safetensors says it in an error of its own."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) != errno.ENOSPC and f"os error {errno.ENOSPC}" not in str(error):
            raise
        raise OSError(
            errno.ENOSPC,
            f"The disk is full, and {folder} is as it was before. Free some space, or choose a folder on another disk",
        ) from error


@contextmanager
def new_folder(output: str | os.PathLike) -> Iterator[Path]:
    """
    A hidden folder that becomes `output` when the block has ended without an error, and else is removed. It stands
    beside `output`, or inside if that exists and is empty: a mount point cannot be replaced.

    Raises:
        FileExistsError: if `output` holds something.
    """
    output = Path(output).resolve()
    require_free(output)
    exists = output.is_dir()
    parent = output if exists else output.parent
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    # Not by the process's number: two machines that share a disk may have the same.
    unfinished = parent / f".{output.name}.{uuid4().hex}{UNFINISHED}"
    try:
        with named_full_disk(output):
            unfinished.mkdir(parents=True)
            yield unfinished
        # Another one may have been faster.
        require_free(output, but=UNFINISHED)
        if exists:
            # The configuration last: without it nothing loads.
            for file in sorted(unfinished.iterdir(), key=lambda file: file.name == "config.json"):
                file.replace(output / file.name)
        else:
            unfinished.replace(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        with suppress(OSError):
            # Of no use without the output.
            for folder in made:
                folder.rmdir()


def require_free(output: str | os.PathLike, but: str | None = None) -> None:
    """Raises FileExistsError if `output` holds something, other than names that end with `but`."""
    path = Path(output)
    if not path.is_dir():
        found = [path.name] if path.exists() else []
    else:
        found = sorted(file.name for file in path.iterdir() if but is None or not file.name.endswith(but))
    if found and all(name.endswith(UNFINISHED) for name in found):
        raise FileExistsError(
            f"{path / found[0]} is left of a conversion that was killed, or of one that still runs. Remove it if none "
            "does."
        )
    if found:
        raise FileExistsError(f"{path} exists already. Choose another output folder, or remove this one first.")


def require_room(output: str | os.PathLike, shapes: dict[str, torch.Tensor]) -> None:
    """
    Looks if the disk can hold weights of these shapes and dtypes in `output`, and warns if they leave it nearly full.

    Raises:
        OSError: if it cannot.
    """
    output = Path(output).resolve()
    disk = next(folder for folder in (output, *output.parents) if folder.is_dir())
    needed, free = sum(shape.nbytes for shape in shapes.values()), shutil.disk_usage(disk).free
    numbers = f"The weights take {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free where {output} will be"
    if needed > free:
        raise OSError(
            f"{numbers}. Make room, choose an output folder on another disk, or a smaller dtype (such as bfloat16 for "
            "float32)."
        )
    if free - needed < CLOSE:
        logger.warning("%s: the disk will be nearly full.", numbers)


def shard_size(size: int | str) -> int | str:
    """
    What `max_shard_size` asks for, as huggingface_hub takes it.

    Raises:
        ValueError: if it is no size.
    """
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)? *[KMGT]B)", str(size).strip(), re.IGNORECASE)
    if match is None or not float(re.sub("[^0-9.]", "", match[0])) > 0:
        raise ValueError(f'max_shard_size="{size}" is no size: take bytes, or a number with KB, MB, GB or TB ("5GB").')
    return int(match[1]) if match[1] else match[2]


def saved_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The dtype that `dtype` names; `None` for `"auto"`: each weight keeps its own."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and found not in WEIGHT_DTYPES:
        raise ValueError(f'dtype="{dtype}" is no dtype of weights; take "auto", "float32", "bfloat16" or "float16".')
    return None if dtype == "auto" else found
