"""Multi-scale deformable attention in plain PyTorch.

mmcv's module of the same name needs mmcv's compiled extension on a GPU. This one needs nothing but
PyTorch, keeps mmcv's parameter names and argument meanings, and computes the same values.
"""
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from .forms import join_query_projections
from .shape_cache import cached_by_shape


class LevelGrid(NamedTuple):
    """Where the levels' cells stand in the rows of (N, L, M), as numbers that broadcast to samples.

    Attributes:
        size: (levels, 1, 2), width and height.
        last: (levels, 1, 2), column and row of the last cell, int32.
        step: (levels, 1, 2), rows from a cell to the ones right of it and below it.
        start: (N, 1, M, levels, 1), row of each image's, head's and level's first cell, int32.
    """

    size: Tensor
    last: Tensor
    step: Tensor
    start: Tensor


@cached_by_shape
def level_grid(batch: int, heads: int, spatial_shapes: tuple[tuple[int, int], ...],
               device: torch.device | None = None) -> LevelGrid:
    """See :class:`LevelGrid`.

    Args:
        batch: N.
        heads: M.
        spatial_shapes: (H, W) of each level.
        device: Where the result lies.
    """
    sizes = torch.tensor([(width, height) for height, width in spatial_shapes], dtype=torch.int32,
                         device=device)[:, None]
    areas = [height * width for height, width in spatial_shapes]
    starts = torch.tensor([sum(areas[:level]) for level in range(len(areas))], dtype=torch.int32,
                          device=device)
    image = torch.arange(batch, dtype=torch.int32, device=device)[:, None, None, None, None]
    head = torch.arange(heads, dtype=torch.int32, device=device)[:, None, None]
    start = ((image * sum(areas) + starts[:, None]) * heads + head)[:, :, :, None]
    step = torch.cat([torch.full_like(sizes[..., :1], heads), sizes[..., :1] * heads], -1)
    return LevelGrid(sizes.float(), sizes - 1, step, start)


def sample_multi_scale(value: Tensor, spatial_shapes: Sequence[tuple[int, int]],
                       locations: Tensor, weights: Tensor) -> Tensor:
    """Sum the values that each query samples at its points, over all levels.

    Each level is read bilinearly with zeros outside and as by grid_sample's
    ``align_corners=False``, in float32 whatever the input's type: a float16 coordinate would be off
    by up to a quarter of a cell on a map 640 cells wide.

    NOTE: Not one grid_sample a level, but one weighted sum of rows for all: a bilinear sample is
    four cells with weights, so a query's head sums 4 * levels * points rows of the values as they
    lie, which is what ``embedding_bag`` does.

    Args:
        value: (N, L, M, D) values of M heads, levels one after the other, L = sum of H * W.
        spatial_shapes: (H, W) of each level.
        locations: (N, Q, M, levels, points, 2), (x, y) as fractions of the image, 0 to 1.
        weights: (N, Q, M, levels, points), attention weights.

    Returns:
        (N, Q, M * D), in the type of `value`.
    """
    batch, _, heads, dims = value.shape
    queries = locations.shape[1]
    grid = level_grid(batch, heads, tuple(map(tuple, spatial_shapes)), device=value.device)

    # In cells from the first one's centre. One cell outside all is zero: no need to go further, and
    # integers hold what is left.
    place = (locations.float() * grid.size - 0.5).clamp(min=-1.).minimum(grid.size)
    low = place.detach().floor()
    share = place - low  # of the cell to the right (below)
    low = low.int()

    # Number and weight of the cells on either side, (N, Q, M, 2 sides, levels, points, 2 axes).
    cells = torch.stack([low, low + 1], 3)
    inside = (cells >= 0) & (cells <= grid.last)
    shares = torch.stack([1 - share, share], 3) * inside
    column, line = (cells.clamp(min=0).minimum(grid.last) * grid.step).unbind(-1)
    horizontal, vertical = shares.unbind(-1)
    # Each line with each column, (N, Q, M, 2, 2, levels, points).
    rows = (line + grid.start)[:, :, :, :, None] + column[:, :, :, None]
    vertical = vertical * weights.float()[:, :, :, None]
    shares = vertical[:, :, :, :, None] * horizontal[:, :, :, None]

    # A bag is a query's head: (N * Q * M, 4 * levels * points).
    bags = batch * queries * heads
    mixed = F.embedding_bag(
        rows.view(bags, -1), value.float().reshape(-1, dims), mode='sum',
        per_sample_weights=shares.view(bags, -1))
    return mixed.view(batch, queries, heads * dims).to(value.dtype)


class MultiScaleDeformableAttention(BaseModule):
    """Attention of each query to a few points around its reference, on several maps.

    Source: `Deformable DETR <https://arxiv.org/abs/2010.04159>`_, section 4.1, equation 3.

    NOTE: The interface is that of mmcv's module (names, layouts, the residual added inside); there
    is no `im2col_step`, which only steers mmcv's CUDA kernel.

    Args:
        embed_dims: Channels of queries and values; a multiple of `num_heads`.
        num_heads: Attention heads.
        num_levels: Feature maps.
        num_points: Sampling points per head and level.
        dropout: Drop probability of the output, before the residual.
        batch_first: Tokens come as (N, L, C) instead of (L, N, C).
        init_cfg: See mmengine's BaseModule.

    Raises:
        ValueError: `embed_dims` is no multiple of `num_heads`.
    """

    deploy = False
    switch_to_deploy = join_query_projections

    def __init__(self, embed_dims: int = 256, num_heads: int = 8, num_levels: int = 4,
                 num_points: int = 4, dropout: float = 0.1, batch_first: bool = False,
                 init_cfg: dict | None = None):
        super().__init__(init_cfg)
        if embed_dims % num_heads:
            raise ValueError(f'MultiScaleDeformableAttention: embed_dims={embed_dims} is no '
                             f'multiple of num_heads={num_heads}')
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.batch_first = batch_first
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dims, samples * 2)
        self.attention_weights = nn.Linear(embed_dims, samples)
        self.value_proj = nn.Linear(embed_dims, embed_dims)
        self.output_proj = nn.Linear(embed_dims, embed_dims)
        self.dropout = nn.Dropout(dropout)
        self.init_weights()

    def init_weights(self) -> None:
        """Point p of each head starts p cells away from the reference, one direction a head."""
        for linear in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions /= directions.abs().amax(-1, keepdim=True)  # onto the unit square's border
        steps = torch.arange(1, self.num_points + 1)
        bias = directions[:, None, None] * steps[:, None]  # (M, 1, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.expand(-1, self.num_levels, -1, -1).flatten())
        self._is_init = True

    def forward(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None,
                identity: Tensor | None = None, query_pos: Tensor | None = None,
                key_padding_mask: Tensor | None = None, reference_points: Tensor | None = None,
                spatial_shapes: Sequence[tuple[int, int]] | Tensor | None = None,
                level_start_index: Tensor | None = None, **kwargs) -> Tensor:
        """Attend and add the residual.

        Args:
            query: (N, Q, C), or (Q, N, C) unless `batch_first`.
            key: Not used; stands here for mmcv's signature.
            value: (N, L, C), or (L, N, C) unless `batch_first`; `query` if None.
            identity: The residual, shaped as `query`; `query` if None.
            query_pos: Added to `query` before the projections, not to the residual.
            key_padding_mask: (N, L), True where `value` is padding and counts as zero.
            reference_points: (N, Q, levels, 2), points (x, y), or (N, Q, levels, 4), boxes
                (cx, cy, w, h), as fractions of the image; an axis `levels` of size 1 serves all.
            spatial_shapes: (H, W) of each level; a list is cheaper than a tensor on a GPU.
            level_start_index: Not used; follows from `spatial_shapes`.

        Returns:
            As `query`.

        Raises:
            ValueError: The values' length is not what `spatial_shapes` says, their number is not
                `num_levels`, or `reference_points` are neither points nor boxes.
        """
        value = query if value is None else value
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        if isinstance(spatial_shapes, Tensor):
            spatial_shapes = spatial_shapes.tolist()
        spatial_shapes = tuple(map(tuple, spatial_shapes))
        batch, queries, _ = query.shape
        length = value.shape[1]
        if len(spatial_shapes) != self.num_levels:
            raise ValueError(f'MultiScaleDeformableAttention has num_levels={self.num_levels}, but '
                             f'{len(spatial_shapes)} spatial_shapes were given')
        if sum(height * width for height, width in spatial_shapes) != length:
            raise ValueError(f'spatial_shapes {list(spatial_shapes)} do not add up to '
                             f'the {length} tokens of value')

        value = self.value_proj(value)
        if key_padding_mask is not None:
            value = value.masked_fill(key_padding_mask[..., None], 0.)
        value = value.view(batch, length, self.num_heads, -1)

        if self.deploy:
            offsets, weights = self.sampling(query).float().split(self.sampling_split, -1)
        else:
            offsets, weights = self.sampling_offsets(query).float(), self.attention_weights(query)
        samples = (batch, queries, self.num_heads, self.num_levels, self.num_points)
        weights = weights.unflatten(-1, (self.num_heads, -1)).float().softmax(-1).view(samples)
        offsets = offsets.reshape(*samples, 2)
        # (N, Q, 1, levels, 1, 2 or 4)
        reference = reference_points.float()[:, :, None, :, None]
        if reference.shape[-1] == 2:
            cells = level_grid(batch, self.num_heads, spatial_shapes, device=value.device).size
            locations = reference + offsets / cells
        elif reference.shape[-1] == 4:
            locations = (reference[..., :2]
                         + offsets * (0.5 / self.num_points) * reference[..., 2:])
        else:
            raise ValueError('reference_points must end in 2 (x, y) or 4 (cx, cy, w, h), '
                             f'not {reference.shape[-1]}')

        output = self.output_proj(sample_multi_scale(value, spatial_shapes, locations, weights))
        if not self.batch_first:
            output = output.transpose(0, 1)
        return self.dropout(output) + identity
