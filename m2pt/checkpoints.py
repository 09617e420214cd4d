"""Checkpoints on disk: read safely, merged without building a model, written whole or not at all."""

import argparse
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .linear import merged_weight

WRAPPERS = ("module", "state_dict", "model", "base_model", "model_state_dict")

NUMPY_SCALAR: Any = np.float64().__reduce__()[0]

HARMLESS: list[Any] = [
    argparse.Namespace,
    NUMPY_SCALAR,
    (NUMPY_SCALAR, "numpy.core.multiarray.scalar"),  # as NumPy 1 names it
    np.dtype,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
    np.dtypes.Int64DType,
]
"""What training scripts save beside the model: the arguments of M2PT's and MAE's, the accuracies of Point-MAE's."""


def load_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` file, or in a torch file, bare or under one of `WRAPPERS`.

    Torch files are read with `weights_only=True`: nothing in them is executed. An `argparse.Namespace` and NumPy's
    numbers, which training scripts save beside the model, are let through. Tensors are put on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, of another format, or holds something else than named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch's reader has no error of its own: damage surfaces as KeyError, IndexError, ...
        raise ValueError(f"{path}: not a readable checkpoint of tensors ({type(error).__name__})") from error
    while isinstance(content, dict) and (wrapper := next((w for w in WRAPPERS if w in content), None)):
        content = content[wrapper]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise ValueError(f"{path}: expected a state dict, bare or under one of {WRAPPERS}")
    return content


def save_state_dict(state_dict: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Write a `.safetensors` file: to a temporary file beside it, then renamed, so that `path` is never half-written.

    Tensors that share memory, such as tied weights, are written once each.

    Raises:
        ValueError: another ending than `.safetensors`.
        OSError: the folder is missing or cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a name ending in .safetensors")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode
    try:
        save_file(_without_sharing(state_dict), temporary)
        temporary.chmod(mode)  # safetensors 0.8 makes it readable by its owner only, whatever the umask
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
        ValueError: no fused layer, one that is not complete, or a merged weight that is not finite.
    """
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
