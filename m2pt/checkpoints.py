"""Checkpoints on disk: read safely, merged without building a model, written whole or not at all."""

import os
import pickle
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .linear import merged_weight

WRAPPERS = ("module", "state_dict", "model")


def load_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` file, or in a torch file, bare or under `module`, `state_dict` or `model`.

    Torch files are read with `weights_only=True`: nothing in them is executed. Tensors are put on the CPU.

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
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0]})") from error
    while isinstance(content, dict) and (wrapper := next((w for w in WRAPPERS if w in content), None)):
        content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path}: expected a state dict, bare or under one of {WRAPPERS}")
    return content


def save_state_dict(state_dict: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Write a `.safetensors` file: to a temporary file beside it, then renamed, so that `path` is never half-written.

    Raises:
        ValueError: another ending than `.safetensors`.
        OSError: the folder cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a name ending in .safetensors")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    os.close(handle)
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in state_dict.items()}, temporary)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def merge_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the merged model: `W + s * W_aux` for each fused layer, everything else as it was.

    Raises:
        ValueError: no fused layer, one that is not complete, or a merged weight that is not finite.
    """
    merged = dict(state_dict)
    layers = [name.removesuffix("cross_modal_scale") for name in state_dict if name.endswith("cross_modal_scale")]
    if not layers:
        raise ValueError("state_dict: there is no cross_modal_scale in it, so there is nothing to merge")
    for layer in layers:
        try:
            weight, aux_weight = merged[f"{layer}weight"], merged.pop(f"{layer}aux_weight")
            merged[f"{layer}weight"] = merged_weight(weight, aux_weight, merged.pop(f"{layer}cross_modal_scale"))
        except KeyError as error:
            raise ValueError(f"state_dict: {error.args[0]} is missing") from None
        except ValueError as error:
            raise ValueError(f"{layer.removesuffix('.')}: {error}") from None
    return merged
