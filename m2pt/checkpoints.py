"""Checkpoints on disk: read safely, merged without building a model, written whole or not at all."""

import argparse
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .checks import check_state_dict, checked_path
from .linear import merged_weight

WRAPPERS = ("module", "state_dict", "model", "base_model", "model_state_dict")

NUMPY_SCALAR: Any = np.float64().__reduce__()[0]

HARMLESS: list[Any] = [
    argparse.Namespace,
    NUMPY_SCALAR,
    (NUMPY_SCALAR, "numpy.core.multiarray.scalar"),  # as NumPy 1 names it
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"},
]
"""What training scripts save beside the model: the arguments of M2PT's and MAE's, the accuracies of Point-MAE's."""


def load_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` file, or in a torch file, bare or under one of `WRAPPERS`.

    Tensors are put on the CPU. A torch file is read as by `load_torch`.

    Raises:
        TypeError: `path` is no path.
        FileNotFoundError: no such file.
        ValueError: the file is damaged, of another format, or holds something else than named dense tensors with data.
    """
    path = checked_path("path", path)
    if path.suffix != ".safetensors":
        return state_dict_in(load_torch(path), path)
    with _reading(path):
        return load_file(path)


def load_torch(path: Path) -> Any:
    """What is in a torch file, with its tensors on the CPU.

    It is read with `weights_only=True`: nothing in it is executed. An `argparse.Namespace` and NumPy's numbers, which
    training scripts save beside the model, are let through. Checksums, where the format has them, are compared, which
    torch leaves out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or of another format, or holds something else; the message names its class.
    """
    with torch.serialization.safe_globals(HARMLESS), _reading(path):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(damaged)
        return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251


def state_dict_in(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what `load_torch` found in `path`, bare or under one of `WRAPPERS`, also one in another.

    Raises:
        ValueError: there is none, or one of its tensors lacks some of its elements.
    """
    for _ in WRAPPERS:
        if isinstance(content, dict) and (wrapper := next((w for w in WRAPPERS if w in content), None)):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise ValueError(f"{path}: expected a state dict, bare or under one of {WRAPPERS}")
    for name, tensor in content.items():
        if not _is_whole(tensor):
            raise ValueError(f"{path}: {name}: expected a dense tensor and all of its elements")
    return content


def _is_whole(tensor: Tensor) -> bool:
    """Whether every element is there: a few bytes can claim terabytes, by a step of zero from one to the next."""
    is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    is_plain = is_plain and not (tensor.is_meta or tensor.is_nested or tensor.is_quantized)
    return is_plain and tensor.nbytes <= tensor.untyped_storage().nbytes()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    path.open("rb").close()  # a file that may not be read is not damaged
    try:
        yield
    except Exception as error:  # torch's reader has no error of its own: damage surfaces as KeyError, OSError, ...
        reason = _foreign_classes(path, error) or f" ({type(error).__name__})"
        raise ValueError(f"{path}: not a readable checkpoint of tensors{reason}") from error


def _foreign_classes(path: Path, error: Exception) -> str:
    """What torch refused to make, and what to do about it; of a file in its older format torch says the first only."""
    if (found := re.search(r"but got <class '([\w.]+)'>", str(error))) and "unpickl" in type(error).__name__.lower():
        return f": it also holds a {found[1]}, which torch does not read safely: save the state dict alone"
    refused = re.findall(r"GLOBAL ([a-zA-Z_](?:[\w.]*\w)?) was not an allowed global", str(error))
    if not refused:
        return ""
    if zipfile.is_zipfile(path):
        refused = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    names = ", ".join(refused)
    return (
        f": it also holds {names}, which might execute code: save the state dict alone, or, if you know that to be"
        f" harmless, allow it before: torch.serialization.add_safe_globals([{names}])"
    )


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Another name to write to, in a temporary folder beside `path`; on leaving the block the file becomes `path`.

    So `path` is never half-written: if anything fails, it is as it was. A process that is killed leaves its temporary
    folder, `*.partial`.

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
                os.fsync(file.fileno())  # some file systems tell only now that they are full
            temporary.chmod(mode)  # safetensors 0.8 makes it readable by its owner only, whatever the umask
            temporary.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = error.__context__ if isinstance(error.__context__, OSError) else error  # torch's own is in C++ terms
        raise OSError(f"{path}: cannot be written: {reason}") from error


def save_state_dict(state_dict: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Write a `.safetensors` file, whole or not at all.

    Tensors that share memory, such as tied weights, are written once each.

    Raises:
        TypeError: `state_dict` holds something else than named tensors, or `path` is no path.
        ValueError: another ending than `.safetensors`, or a tensor that such a file cannot hold: sparse, nested,
            without data, or of a dtype that safetensors does not know.
        OSError: the folder is missing or cannot be written, or the disk is full.
    """
    path = checked_path("path", path)
    check_state_dict(state_dict)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a name ending in .safetensors")
    tensors = _without_sharing(state_dict)
    try:
        with written_whole(path) as temporary:
            save_file(tensors, temporary)
    except KeyError as error:
        raise ValueError(f"state_dict: safetensors has no dtype {error}") from error


def _without_sharing(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, a copy of those whose memory an earlier one uses: safetensors refuses both otherwise."""
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
        TypeError: `state_dict` holds something else than named tensors.
        ValueError: no fused layer, one that is not complete, or a merged weight that is not finite.
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
            merged[f"{layer}weight"] = merged_weight(weight, aux_weight, scale, aux_weight_scale)
        except KeyError as error:
            raise ValueError(f"state_dict: {error.args[0]} is missing") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{layer.removesuffix('.')}: {error}") from None
    return merged
