"""Tensor parallelism for fused layers: styles for a plan of `torch.distributed.tensor.parallel.parallelize_module`.

torch's own styles know only `weight` and `bias`: they would leave quantised or row-wise auxiliary weights whole in
every process, and divide a scale that has one entry, which AdamW refuses. These treat other linear layers as torch's.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DeviceMesh, Placement, Replicate, Shard, distribute_tensor, parallel

import m2pt_kernels.sharding  # noqa: F401  tells DTensor about the operators
from m2pt_kernels.quantization import GROUP_SIZE

from .linear import FusedCrossModalLinear


def _distribute(
    layer: FusedCrossModalLinear, mesh: DeviceMesh, placements: dict[str, Placement], src_data_rank: int | None
) -> None:
    """Turn every parameter and buffer into a DTensor, replicated unless `placements` says otherwise."""

    def distributed(name: str, tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor, mesh, [placements.get(name, Replicate())], src_data_rank=src_data_rank)

    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(distributed(name, parameter), parameter.requires_grad))
    for name, buffer in list(layer.named_buffers()):
        setattr(layer, name, distributed(name, buffer))


class ColwiseParallel(parallel.ColwiseParallel):
    """torch's style of this name, arguments included, for fused layers too: every process has some output features."""

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if not isinstance(module, FusedCrossModalLinear):
            return super()._partition_linear_fn(name, module, device_mesh)
        placements: dict[str, Placement] = dict.fromkeys(("weight", "aux_weight", "aux_weight_scale"), Shard(-2))
        _distribute(module, device_mesh, placements | {"bias": Shard(0)}, self.src_data_rank)


class RowwiseParallel(parallel.RowwiseParallel):
    """torch's style of this name, arguments included, for fused layers too: every process has some input features.

    Raises:
        ValueError: the processes cannot share out the groups of an int4 auxiliary weight evenly.
    """

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if not isinstance(module, FusedCrossModalLinear):
            return super()._partition_linear_fn(name, module, device_mesh)
        placements: dict[str, Placement] = dict.fromkeys(("weight", "aux_weight"), Shard(-1))
        if module.aux_weight.dtype == torch.uint8:
            groups, processes = module.in_features // GROUP_SIZE, device_mesh.size()
            if groups % processes:
                raise ValueError(f"aux_weight: expected int4 groups for {processes} processes to share, got {groups}")
            placements["aux_weight_scale"] = Shard(-1)
        _distribute(module, device_mesh, placements, self.src_data_rank)
