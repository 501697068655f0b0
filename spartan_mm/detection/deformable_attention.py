"""Multi-scale deformable attention in plain PyTorch.

mmcv's module of the same name needs mmcv's compiled extension on a GPU. This one needs nothing but
PyTorch, keeps mmcv's parameter names, and computes the same values for references that are boxes.
"""
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forms import join_query_projections
from .shape_cache import cached_by_shape


@cached_by_shape
def level_grid(batch: int, heads: int, points: tuple[int, ...],
               spatial_shapes: tuple[tuple[int, int], ...], device: torch.device | None = None
               ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Where the cells of N images' levels stand in the rows of (N, L, M), for M heads.

    Returns:
        For each of the K = sum(points) samples of a head, what holds for its level, (K, 2):
        width and height; column and row of the last cell, int32; rows from a cell to the ones right
        of it and below it, int32. (K,): row of the level's first cell, int32. And (N, 1, M, 1), row
        of each image's and head's first cell, int32.
    """
    areas = [height * width for height, width in spatial_shapes]
    levels = [(width, height, heads, width * heads, sum(areas[:level]) * heads)
              for level, (height, width) in enumerate(spatial_shapes) for _ in range(points[level])]
    sizes, step, start = torch.tensor(levels, dtype=torch.int32, device=device).split((2, 2, 1), 1)
    image = torch.arange(batch, dtype=torch.int32, device=device)[:, None, None, None]
    head = torch.arange(heads, dtype=torch.int32, device=device)[:, None]
    return sizes.float(), sizes - 1, step, start[:, 0], image * (sum(areas) * heads) + head


def sample_multi_scale(value: Tensor, spatial_shapes: Sequence[tuple[int, int]],
                       locations: Tensor, weights: Tensor, form: str = 'bags',
                       points: Sequence[int] | None = None) -> Tensor:
    """Sum the values that each query samples at its points, over all levels.

    Each level is read bilinearly with zeros outside and as by grid_sample's
    ``align_corners=False``, in float32 whatever the input's type: a float16 coordinate would be off
    by up to a quarter of a cell on a map 640 cells wide.

    NOTE: Not one grid_sample a level, but one weighted sum of rows for all: a bilinear sample is
    four cells with weights, so a query's head of K samples sums 4 * K rows of the values as they
    lie, which is what ``embedding_bag`` does.

    Args:
        value: (N, L, M, D) values of M heads, levels one after the other, L = sum of H * W.
        spatial_shapes: (H, W) of each level.
        locations: (N, Q, M, K, 2), (x, y) as fractions of the image, 0 to 1; level by level.
        weights: (N, Q, M, K), attention weights.
        form: 'bags' for ``embedding_bag``, or 'gather' to take the rows and multiply, in operations
            that every runtime has.
        points: How many of the K samples lie on each level; None for equally many.

    Returns:
        (N, Q, M * D), in the type of `value`.
    """
    batch, queries, heads, samples = weights.shape
    dims = value.shape[-1]
    points = points or [samples // len(spatial_shapes)] * len(spatial_shapes)
    size, last, step, start, first = level_grid(
        batch, heads, tuple(points), tuple(spatial_shapes), device=value.device)

    # In cells from the first one's centre. One cell outside all is zero: no need to go further, and
    # integers hold what is left. A bag is a query's head: (N * Q * M, K, 2 axes).
    place = locations.float().flatten(0, 2) * size - 0.5
    place = place.clamp(min=-1.).minimum(size)
    low = place.detach().floor()
    share = place - low  # of the cell to the right (below)
    low = low.int()

    # Number and weight of the cells on either side, (N * Q * M, 2 sides, K, 2 axes).
    cells = torch.stack([low, low + 1], 1)
    inside = (cells >= 0) & (cells <= last)
    shares = torch.stack([1 - share, share], 1) * inside
    column, line = (cells.clamp(min=0).minimum(last) * step).unbind(-1)
    horizontal, vertical = shares.unbind(-1)
    # Each line with each column, (N * Q * M, 2, 2, K).
    line = (line + start).view(batch, queries, heads, -1) + first
    rows = line.view_as(column)[:, :, None] + column[:, None]
    vertical = vertical * weights.float().flatten(0, 2)[:, None]
    shares = vertical[:, :, None] * horizontal[:, None]

    rows, shares, value_rows = rows.flatten(1), shares.flatten(1), value.float().reshape(-1, dims)
    if form == 'gather':
        taken = value_rows.index_select(0, rows.flatten()).view(*rows.shape, dims)
        mixed = shares[:, None] @ taken  # (N * Q * M, 1, D)
    else:
        mixed = F.embedding_bag(rows, value_rows, mode='sum', per_sample_weights=shares)
    return mixed.view(batch, queries, heads * dims).to(value.dtype)


@cached_by_shape
def offset_scale(points: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """What makes a level's points cover half a box' side each way, (K, 1) for K = sum(points)."""
    return torch.tensor([[0.5 / count] for count in points for _ in range(count)], device=device)


class MultiScaleDeformableAttention(nn.Module):
    """Attention of each query to a few points around its reference, on several maps.

    Source: `Deformable DETR <https://arxiv.org/abs/2010.04159>`_, section 4.1, equation 3.

    Args:
        embed_dims: Channels of queries and memory; a multiple of `num_heads`.
        num_heads: Attention heads.
        num_levels: Feature maps.
        num_points: Sampling points per head and level, or one number for each level, as RT-DETRv2
            has it.
        dropout: Drop probability of the output, before the residual.
        project: Whether values and output are projected, which D-FINE does without.

    Raises:
        ValueError: `embed_dims` is no multiple of `num_heads`, or `num_points` has not a number for
            each level.
    """

    deploy = False
    switch_to_deploy = join_query_projections
    #: How values are sampled, see :func:`sample_multi_scale`; exports set it.
    form = 'bags'

    def __init__(self, embed_dims: int = 256, num_heads: int = 8, num_levels: int = 3,
                 num_points: int | Sequence[int] = 4, dropout: float = 0., project: bool = True):
        super().__init__()
        if embed_dims % num_heads:
            raise ValueError(f'MultiScaleDeformableAttention: embed_dims={embed_dims} is no '
                             f'multiple of num_heads={num_heads}')
        points = [num_points] * num_levels if isinstance(num_points, int) else num_points
        if len(points) != num_levels:
            raise ValueError(f'MultiScaleDeformableAttention: num_points={tuple(points)} must have '
                             f'a number for each of the {num_levels} maps')
        self.num_heads = num_heads
        self.points = tuple(points)
        samples = num_heads * sum(points)
        self.sampling_offsets = nn.Linear(embed_dims, samples * 2)
        self.attention_weights = nn.Linear(embed_dims, samples)
        self.value_proj, self.output_proj = (
            nn.Linear(embed_dims, embed_dims) if project else nn.Identity() for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        self._init_parameters()

    @torch.no_grad()
    def _init_parameters(self) -> None:
        """Point p of each head starts p cells away from the reference, one direction a head."""
        for linear in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in (self.value_proj, self.output_proj):
            if isinstance(linear, nn.Linear):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)

        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions /= directions.abs().amax(-1, keepdim=True)  # onto the unit square's border
        steps = torch.cat([torch.arange(1, count + 1) for count in self.points])
        bias = directions[:, None] * steps[:, None]  # (M, K, 2)
        self.sampling_offsets.bias.copy_(bias.flatten())

    def forward(self, query: Tensor, query_pos: Tensor, memory: Tensor, reference: Tensor,
                spatial_shapes: Sequence[tuple[int, int]], residual: bool = True) -> Tensor:
        """Attend and add the residual.

        Args:
            query: (N, Q, C).
            query_pos: (N, Q, C), added to `query` before the projections, not to the residual.
            memory: (N, L, C), one map after the other.
            reference: (N, Q, 4), boxes (cx, cy, w, h) as fractions of the image.
            spatial_shapes: (H, W) of each map.
            residual: Whether `query` is added.

        Returns:
            (N, Q, C).
        """
        placed = query + query_pos
        if self.deploy:
            offsets, weights = self.sampling(placed).split(self.sampling_split, -1)
        else:
            offsets, weights = self.sampling_offsets(placed), self.attention_weights(placed)
        # (N, Q, M, K) and (N, Q, M, K, 2), for K samples of a head.
        weights = weights.unflatten(-1, (self.num_heads, -1)).float().softmax(-1)
        offsets = offsets.float().view(*weights.shape, 2)
        reference = reference.float()[:, :, None, None]  # (N, Q, 1, 1, 4)
        # What all heads share is made first: ONNX Runtime is slow on last axes of two.
        reach = offset_scale(self.points, device=offsets.device) * reference[..., 2:]
        locations = reference[..., :2].expand_as(reach) + offsets * reach

        # As a matrix: of a sequence ONNX Runtime transposes the memory anew for each layer.
        value = self.value_proj(memory.flatten(0, 1)).unflatten(-1, (self.num_heads, -1))
        value = value.unflatten(0, memory.shape[:2])  # (N, L, M, D)
        mixed = sample_multi_scale(
            value, spatial_shapes, locations, weights, self.form, self.points)
        mixed = self.dropout(self.output_proj(mixed))
        return mixed + query if residual else mixed
