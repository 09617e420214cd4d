"""Neighbourhoods in point clouds, in plain torch: deterministic and batched; choosing points has no gradient."""

import torch
from torch import Tensor


def select(items: Tensor, index: Tensor) -> Tensor:
    """Rows of a batch: items (B, N, ...), index (B, ...) to (B, ... of index, ... of items)."""
    batch = torch.arange(len(items), device=items.device).view(-1, *[1] * (index.ndim - 1))
    return items[batch, index]


@torch.no_grad()
def farthest_point_sampling(points: Tensor, count: int) -> Tensor:
    """Indices (B, count) of points (B, N, 3): the first point, then always the one farthest from those chosen.

    Of points that are equally far the first is chosen.
    """
    index = torch.zeros(len(points), dtype=torch.long, device=points.device)
    distances = points.new_full(points.shape[:2], torch.inf)
    chosen = []
    for _ in range(count):
        chosen.append(index)
        to_latest = (points - select(points, index).unsqueeze(1)).square().sum(2)
        distances = torch.minimum(distances, to_latest)
        index = distances.argmax(1)
    return torch.stack(chosen, dim=1)


def pairwise_distances(a: Tensor, b: Tensor) -> Tensor:
    """Distances (B, M, N) of a (B, M, 3) and b (B, N, 3), from differences: matrix products lose the small ones."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


@torch.no_grad()
def nearest_neighbors(queries: Tensor, points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Distances and indices (B, M, count) of the points (B, N, 3) nearest to each query (B, M, 3), nearest first."""
    distances, index = pairwise_distances(queries, points).topk(count, largest=False)
    return distances, index


def group(points: Tensor, num_groups: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Divide points (B, N, 3) into overlapping neighbourhoods.

    Returns:
        Centers (B, num_groups, 3) by farthest-point sampling, and each one's nearest points relative to it
        (B, num_groups, group_size, 3).

    Raises:
        ValueError: there are fewer points than groups or than points in a group.
    """
    if points.shape[1] < max(num_groups, group_size):
        raise ValueError(
            f"points: expected at least {max(num_groups, group_size)} for {num_groups} groups of {group_size},"
            f" got {points.shape[1]}"
        )
    centers = select(points, farthest_point_sampling(points, num_groups))
    _, index = nearest_neighbors(centers, points, group_size)
    return centers, select(points, index) - centers.unsqueeze(2)


def interpolate(queries: Tensor, centers: Tensor, features: Tensor) -> Tensor:
    """Features (B, G, C) of centers (B, G, 3) carried to queries (B, N, 3): (B, N, C) (PointNet++, NeurIPS 2017).

    Each query gets the mean of its three nearest centers' features, weighted by the inverse squared distance.
    """
    distances, index = nearest_neighbors(queries, centers, min(3, centers.shape[1]))
    weights = 1 / (distances.square() + 1e-8)
    weights = weights / weights.sum(2, keepdim=True)
    everywhere = weights.new_zeros(*queries.shape[:2], centers.shape[1]).scatter(2, index, weights)
    return everywhere.to(features.dtype) @ features


def chamfer_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared distance from each point of a (B, M, 3) to b (B, N, 3), plus the same from b to a: a scalar."""
    distances = pairwise_distances(a, b).square()
    return distances.amin(2).mean() + distances.amin(1).mean()
