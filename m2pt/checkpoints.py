"""Reads checkpoints safely, merges them without building a model, and writes them whole or not at all."""

import argparse
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .checks import checked_path, one_of
from .linear import is_left_out, merged_weight
from .tensor_checks import check_state_dict

WRAPPERS = ("module", "state_dict", "model", "base_model", "model_state_dict")
AVERAGES = ("state_dict_ema", "model_ema", "ema")
"""Where timm, DeiT and M2PT keep the moving average of the weights, beside them."""
NO_AVERAGE = f"there is no moving average of the weights in it under any of {AVERAGES}"
SAVED = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Hugging Face's `save_pretrained` writes one of these to a folder."""
TORCH_WRAPPING = re.compile(r"(?:(?:module|_orig_mod)\.)*")
"""The prefixes that torch's wrappers of whole models give every name."""

Weights = Literal["ema", "raw"]
"""What to read from a file with weights and their moving average: the average or the weights."""
TAKEN: dict[Weights, str] = {
    "ema": "the moving average was taken, not the raw weights",
    "raw": "the raw weights were taken, not their moving average",
}

NUMPY_SCALAR: Any = np.float64().__reduce__()[0]

HARMLESS: list[Any] = [
    argparse.Namespace,
    NUMPY_SCALAR,
    (NUMPY_SCALAR, "numpy.core.multiarray.scalar"),  # as NumPy 1 names it
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"},
]
"""Classes that training scripts save beside the model: M2PT's and MAE's for arguments, Point-MAE's for accuracies."""


def load_state_dict(path: str | os.PathLike, weights: Weights | None = None) -> dict[str, Tensor]:
    """Load the state dict of a `.safetensors` file, a torch file, or a folder that Hugging Face's `save_pretrained`
    wrote, which may have several files.

    Tensors are put on the CPU. A torch file, whose state dict may be under one of `WRAPPERS`, is read by `load_torch`.

    Args:
        path: a file, the index of several, or a folder with one of `SAVED`.
        weights: "ema" for the moving average under one of `AVERAGES`, "raw" for the weights beside it. Default: the
            average if there is one, as in timm.

    Raises:
        TypeError: `path` is not a path.
        FileNotFoundError: no such file, none of `SAVED` in the folder, or one of several files is missing.
        ValueError: the file is damaged, has another format, or holds anything but named dense tensors with data; the
            index does not fit its files; or there are no such `weights`, or only in some of several files.
    """
    return read_weights(path, weights)[0]


def read_weights(path: str | os.PathLike, weights: Weights | None = None) -> tuple[dict[str, Tensor], Weights | None]:
    """`load_state_dict`, and which weights these are if the file holds both."""
    path = checked_path("path", path)
    check_weights(weights)
    if path.is_dir():
        path = _saved_in(path)
    read = _read_shards if path.name.endswith(".index.json") else _read_file
    return read(path, weights)


def check_weights(weights: Weights | None) -> None:
    """Raise a ValueError for anything but None or one of `Weights`."""
    if weights is not None:
        one_of("weights", weights, ("ema", "raw"))


def _saved_in(folder: Path) -> Path:
    if found := next((folder / name for name in SAVED if (folder / name).is_file()), None):
        return found
    raise FileNotFoundError(f"{folder}: a folder without any of {', '.join(SAVED)}")


def _read_file(path: Path, weights: Weights | None) -> tuple[dict[str, Tensor], Weights | None]:
    if path.suffix != ".safetensors":
        return state_dict_in(load_torch(path), path, weights)
    state_dict, _ = read_safetensors(path)
    if weights == "ema":
        raise ValueError(f"{path}: {NO_AVERAGE}")
    return state_dict, None


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a `.safetensors` file, on the CPU, and its metadata.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged or of another format.
    """
    with _reading(path), safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.offset_keys()}, file.metadata() or {}


def _read_shards(index: Path, weights: Weights | None) -> tuple[dict[str, Tensor], Weights | None]:
    """The state dict in the files beside an index, each of which has the entries that the index lists for it."""
    with _reading(index):
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise TypeError("expected names of files")
    if not weight_map:
        raise ValueError(f"{index}: its weight_map is empty")
    state_dict: dict[str, Tensor] = {}
    kinds: set[Weights | None] = set()
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        if name != shard.name:
            raise ValueError(f"{index}: expected the names of files beside it, got {name!r}")
        if not os.path.isfile(shard):  # unlike Path's, false for names that no file can have
            raise FileNotFoundError(f"{index}: there is no {name!r} beside it")
        tensors, taken = _read_file(shard, weights)
        kinds.add(taken)
        if missing := [entry for entry, place in weight_map.items() if place == name and entry not in tensors]:
            raise ValueError(f"{index}: {missing[0]} is not in {name!r}")
        state_dict |= {entry: value for entry, value in tensors.items() if weight_map.get(entry, name) == name}
    if len(kinds) > 1:
        raise ValueError(f"{index}: expected a moving average beside the weights in all of its files or in none")
    return state_dict, kinds.pop()


def load_torch(path: Path) -> Any:
    """The content of a torch file, with its tensors on the CPU.

    It is read with `weights_only=True`: nothing in it is executed. `argparse.Namespace` and NumPy's numbers, which
    training scripts save beside the model, are allowed. Checksums are verified if the format has them, which torch does
    not do.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or of another format, or holds anything else; the message names its class.
    """
    with torch.serialization.safe_globals(HARMLESS), _reading(path):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(damaged)
        return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251


def state_dict_in(content: Any, path: Path, weights: Weights | None = None) -> tuple[dict[str, Tensor], Weights | None]:
    """The state dict in what `load_torch` read from `path`, and which weights these are if there are both.

    It may be bare or under one of `WRAPPERS` or `AVERAGES`, also nested.

    Raises:
        ValueError: there is no state dict, there are no such `weights`, or a tensor lacks some of its elements.
    """
    taken: Weights | None = None
    has_average = False
    for _ in WRAPPERS:
        if not isinstance(content, dict):
            break
        raw = next((key for key in WRAPPERS if key in content), None)
        average = next((key for key in AVERAGES if _leads_to_tensors(content.get(key))), None)
        if average and not has_average:
            has_average = True
            if raw is None and weights == "raw":
                raise ValueError(f"{path}: there are no raw weights in it beside their moving average, {average}")
            kind: Weights = weights or "ema"
            taken = None if raw is None else kind
            content = content[average if kind == "ema" else raw]
        elif raw:
            content = content[raw]
    if weights == "ema" and not has_average:
        raise ValueError(f"{path}: {NO_AVERAGE}")
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise ValueError(f"{path}: expected a state dict, bare or under one of {WRAPPERS + AVERAGES}")
    for name, tensor in content.items():
        if not _is_whole(tensor):
            raise ValueError(f"{path}: {name}: expected a dense tensor with all of its elements")
    return content, taken


def _leads_to_tensors(content: Any) -> bool:
    """Whether there are tensors in it, or in what it holds under one of `WRAPPERS`."""
    for _ in WRAPPERS:
        if not isinstance(content, dict):
            return False
        if any(isinstance(value, Tensor) for value in content.values()):
            return True
        content = next((content[key] for key in WRAPPERS if key in content), None)
    return False


def without_wrapping(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a model that torch had wrapped, without the `TORCH_WRAPPING` of every name."""
    prefixes = {re.findall(TORCH_WRAPPING, name)[0] for name in state_dict}
    shared = min(prefixes, key=len, default="")
    if not all(prefix.startswith(shared) for prefix in prefixes):
        shared = ""
    return {name.removeprefix(shared): tensor for name, tensor in state_dict.items()}


def _is_whole(tensor: Tensor) -> bool:
    """Whether every element is stored: with strides of zero, a few bytes can claim to be terabytes."""
    is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    is_plain = is_plain and not (tensor.is_meta or tensor.is_nested or tensor.is_quantized)
    return is_plain and tensor.nbytes <= tensor.untyped_storage().nbytes()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    path.open("rb").close()  # a lack of permission is not damage
    try:
        yield
    except Exception as error:  # torch's reader has no error of its own: damage surfaces as KeyError, OSError, ...
        reason = _foreign_classes(path, error) or f" ({type(error).__name__})"
        raise ValueError(f"{path}: not a readable checkpoint of tensors{reason}") from error


def _foreign_classes(path: Path, error: Exception) -> str:
    """Which classes torch refused, and what to do about it; in its older format torch names only the first."""
    if (found := re.search(r"but got <class '([\w.]+)'>", str(error))) and "unpickl" in type(error).__name__.lower():
        return f": it also holds a {found[1]}, which torch does not read safely: save the state dict alone"
    refused = re.findall(r"GLOBAL ([a-zA-Z_](?:[\w.]*\w)?) was not an allowed global", str(error))
    if not refused:
        return ""
    if zipfile.is_zipfile(path):
        refused = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    names = ", ".join(refused)
    return (
        f": it also holds {names}, which might execute code: save the state dict alone, or, if you know it to be"
        f" harmless, allow it first: torch.serialization.add_safe_globals([{names}])"
    )


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a file to write to, in a temporary folder beside `path`; at the end of the block it becomes `path`.

    So `path` is never half-written: if anything fails, it stays as it was. A process that is killed leaves its
    temporary folder, `*.partial`, behind.

    Raises:
        OSError: the folder is missing or cannot be written, or the disk is full.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    try:
        with TemporaryDirectory(prefix=f"{path.name}.", suffix=".partial", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # some file systems report a full disk only now
            temporary.chmod(mode)  # safetensors 0.8 makes it readable by its owner only, whatever the umask
            temporary.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # torch's writer then fails in turn
            raise error.__context__ from None
        reason = error.__context__ if isinstance(error.__context__, OSError) else error  # torch's own is in C++ terms
        raise OSError(f"{path}: cannot be written: {reason}") from error


def checked_target(path: str | os.PathLike) -> Path:
    """A path that `save_state_dict` may write to.

    Raises:
        TypeError: it is not a path.
        ValueError: another ending than `.safetensors`.
        IsADirectoryError: there is a folder of that name.
    """
    path = checked_path("path", path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a name ending in .safetensors")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: it is a folder")
    return path


def save_state_dict(
    state_dict: dict[str, Tensor], path: str | os.PathLike, metadata: dict[str, str] | None = None
) -> None:
    """Write a `.safetensors` file, whole or not at all.

    Tensors that share memory, such as tied weights, are each written in full. `metadata` is written beside them.

    Raises:
        TypeError: `state_dict` holds anything but named tensors, or `path` is not a path.
        ValueError: another ending than `.safetensors`, or a tensor that such a file cannot hold: sparse, nested,
            without data, or of a dtype that safetensors does not know.
        OSError: there is a folder of that name, the folder is missing or cannot be written, or the disk is full.
    """
    path = checked_target(path)
    check_state_dict(state_dict)
    tensors = _without_sharing(state_dict)
    try:
        with written_whole(path) as temporary:
            save_file(tensors, temporary, metadata)
    except KeyError as error:
        raise ValueError(f"state_dict: safetensors has no dtype {error}") from error


def _without_sharing(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, copied if an earlier one uses the same memory: safetensors requires both."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in state_dict.items():
        contiguous = tensor.detach().contiguous()
        storage = contiguous.untyped_storage().data_ptr()
        tensors[name] = contiguous.clone() if storage in storages else contiguous
        storages.add(storage)
    return tensors


def merge_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the merged model: `W + s * W_aux` for each fused layer, everything else as it was.

    Raises:
        TypeError: `state_dict` holds anything but named tensors.
        ValueError: no fused layer, an incomplete one, or a merged weight that is not finite.
    """
    check_state_dict(state_dict)
    merged = dict(state_dict)
    owned = ("aux_weight", "aux_weight_scale", "cross_modal_scale")
    layers = {name.removesuffix(last): None for name in state_dict if (last := name.rpartition(".")[2]) in owned}
    if not layers:
        raise ValueError("state_dict: there is no cross_modal_scale in it, so there is nothing to merge")
    for layer in layers:
        try:
            weight, aux_weight = merged[f"{layer}weight"], merged.pop(f"{layer}aux_weight")
            scale = merged.pop(f"{layer}cross_modal_scale")
            aux_weight_scale = merged.pop(f"{layer}aux_weight_scale", None)
            if is_left_out(aux_weight):
                raise ValueError("the auxiliary weights were left out of this checkpoint: merge a model that has them")
            merged[f"{layer}weight"] = merged_weight(weight, aux_weight, scale, aux_weight_scale)
        except KeyError as error:
            raise ValueError(f"state_dict: {error.args[0]} is missing") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{layer.removesuffix('.')}: {error}") from None
    return merged
