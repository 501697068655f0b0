"""RT-DETR's hybrid encoder: attention within the coarsest map, convolutions across the maps.

Source: `DETRs Beat YOLOs on Real-time Object Detection <https://arxiv.org/abs/2304.08069>`_,
section 4.2. Everything here starts from PyTorch's default initialization, as the official code
does: mmcv's ConvModule draws kernels about 2.5 to 5 times as large.
"""
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor, nn

from .forms import fuse_branches, fuse_encoder, fuse_paths
from .shape_cache import cached_by_shape


class ConvNorm(nn.Module):
    """Convolution without bias, padded by half its odd kernel, BatchNorm, and SiLU if `act`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1,
                 act: bool = False, groups: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride,
                              padding=kernel_size // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.act = nn.SiLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        return self.act(self.norm(self.conv(x)))


def to_tokens(x: Tensor) -> Tensor:
    """Lay a map out as a sequence, row by row.

    NOTE: Of a single image PyTorch (2.13) computes wrong gradients on a CPU for a batch norm whose
    output is turned into tokens: it mistakes the layout of the gradient that comes back. Here the
    norm gets that in its own layout.

    Args:
        x: (N, C, H, W).

    Returns:
        (N, H * W, C).
    """
    if (not torch.compiler.is_compiling() and x.requires_grad and len(x) == 1
            and x.device.type == 'cpu'):
        x.register_hook(Tensor.contiguous)
    return x.flatten(2).transpose(1, 2)


class RepVGGBlock(nn.Module):
    """A 3x3 and a 1x1 convolution in parallel, one 3x3 convolution once fused.

    NOTE: Unlike `RepVGG <https://arxiv.org/abs/2101.03697>`_'s block there is no identity branch.
    """

    deploy = False
    switch_to_deploy = fuse_branches

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.dense = ConvNorm(in_channels, out_channels, 3)
        self.pointwise = ConvNorm(in_channels, out_channels, 1)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H, W)."""
        if self.deploy:
            return self.act(self.fused(x))
        return self.act(self.dense(x) + self.pointwise(x))


class CSPRepLayer(nn.Module):
    """Two 1x1 paths from the same two maps, RepVGG blocks on one of the paths, summed.

    NOTE: The paths are added; mmdet's own CSPLayer concatenates them.

    Args:
        channels: Channels of either map and of the output.
        hidden_channels: Channels within; a last 1x1 convolution follows where they differ.
        num_blocks: RepVGG blocks.
        block_channels: Channels before and between these; None for `hidden_channels`, which the
            last one gives.
    """

    deploy = False
    switch_to_deploy = fuse_paths

    def __init__(self, channels: int, hidden_channels: int, num_blocks: int = 3,
                 block_channels: int | None = None):
        super().__init__()
        widths = [block_channels or hidden_channels] * num_blocks + [hidden_channels]
        self.paths = widths[0], hidden_channels
        self.conv1 = ConvNorm(2 * channels, widths[0], act=True)
        self.conv2 = ConvNorm(2 * channels, hidden_channels, act=True)
        self.blocks = nn.Sequential(*(
            RepVGGBlock(*widths[i:i + 2]) for i in range(num_blocks)))
        self.conv3 = (nn.Identity() if hidden_channels == channels
                      else ConvNorm(hidden_channels, channels, act=True))

    def forward(self, other: Tensor, own: Tensor) -> Tensor:
        """Fuse two maps.

        Args:
            other: (N, C, h, w), resized to the size of `own` where it differs.
            own: (N, C, H, W); in deploy form what comes before the projection that was folded in.

        Returns:
            (N, C, H, W).
        """
        if self.deploy:
            # A 1x1 convolution and taking the nearest cell commute: less to convolve, nothing to
            # concatenate.
            paths = self.own(own) + resized(self.other(other), own)
            left, right = F.silu(paths).split(self.paths, 1)
        else:
            both = torch.cat([resized(other, own), own], 1)
            left, right = self.conv1(both), self.conv2(both)
        return self.conv3(self.blocks(left) + right)


def resized(x: Tensor, other: Tensor) -> Tensor:
    """A map (N, C, h, w) in the size (H, W) of another, each cell a copy of the nearest one.

    Up by 2, and down by a cell where a backbone rounds odd sides down and the neck rounds them up.
    """
    size = other.shape[-2:]
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode='nearest')


@cached_by_shape
def position_embedding(height: int, width: int, dims: int, temperature: float = 10000.,
                       legacy: bool = False, dtype: torch.dtype = torch.float32,
                       device: torch.device | None = None) -> Tensor:
    """Sines and cosines of a map's row and column numbers, for tokens in row-major order.

    Four blocks of `dims / 4`: sin(row), cos(row), sin(column), cos(column), each with frequencies
    temperature^(-4 k / dims).

    NOTE: The official code numbers the tokens column by column while the tokens themselves lie row
    by row. On square maps both agree; elsewhere neighbours get unrelated embeddings. Here
    the numbering always is the tokens' own.

    Args:
        height: Rows of the map.
        width: Columns of the map.
        dims: Channels of the embedding, a multiple of 4.
        temperature: Base of the frequencies.
        legacy: Number the tokens as the official code does, to run its checkpoints on maps that are
            not square with its very numbers.
        dtype: Type of the result; the sines are computed in float32.
        device: Where the result lies.

    Returns:
        (H * W, C).
    """
    exponents = torch.arange(dims // 4, dtype=torch.float32, device=device) / (-dims / 4)
    frequencies = temperature ** exponents

    def waves(length: int) -> Tensor:
        angles = torch.outer(torch.arange(length, device=device).float(), frequencies)
        return torch.cat([angles.sin(), angles.cos()], 1).to(dtype)  # (length, C / 2)

    outer, inner = (width, height) if legacy else (height, width)
    return torch.cat([waves(outer)[:, None].expand(-1, inner, -1),
                      waves(inner).expand(outer, -1, -1)], -1).flatten(0, 1)


class SelfAttention(nn.MultiheadAttention):
    """Multi-head attention among tokens that compare with their positions and mix without.

    NOTE: Parameters and values are those of PyTorch's module, whose forward pass makes three
    projections of the two that it takes here, and copies to and fro between layouts.
    """

    def forward(self, placed: Tensor, tokens: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Attend; (N, L, C) to the same shape.

        Args:
            placed: (N, L, C), tokens with positions: queries and keys.
            tokens: (N, L, C), the values.
            attn_mask: (L, L), added to the products of queries (rows) and keys.
        """
        sizes = 2 * self.embed_dim, self.embed_dim
        (weight, value_weight), (bias, value_bias) = (
            x.split(sizes) for x in (self.in_proj_weight, self.in_proj_bias))
        query, key = F.linear(placed, weight, bias).chunk(2, -1)
        value = F.linear(tokens, value_weight, value_bias)
        # (N, L, C) -> (N, M, L, D)
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                             for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask, self.dropout if self.training else 0.)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class AIFI(nn.Module):
    """Attention-based intra-scale feature interaction: one post-norm transformer layer on a map.

    Args are those of :class:`HybridEncoder`.
    """

    def __init__(self, embed_dims: int, num_heads: int, ffn_dims: int, dropout: float,
                 legacy_position: bool):
        super().__init__()
        self.legacy_position = legacy_position
        self.self_attn = SelfAttention(embed_dims, num_heads, dropout, batch_first=True)
        self.linear1 = nn.Linear(embed_dims, ffn_dims)
        self.linear2 = nn.Linear(ffn_dims, embed_dims)
        self.norm1 = nn.LayerNorm(embed_dims)
        self.norm2 = nn.LayerNorm(embed_dims)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        channels, height, width = x.shape[1:]
        tokens = to_tokens(x)
        position = position_embedding(height, width, channels, legacy=self.legacy_position,
                                      dtype=x.dtype, device=x.device)

        mixed = self.self_attn(tokens + position, tokens)
        tokens = self.norm1(tokens + self.dropout(mixed))
        mixed = self.linear2(self.dropout(F.gelu(self.linear1(tokens))))
        tokens = self.norm2(tokens + self.dropout(mixed))
        return tokens.transpose(1, 2).reshape(x.shape)


@MODELS.register_module()
class HybridEncoder(BaseModule):
    """RT-DETR's neck: AIFI on the coarsest map, then fusion down and up the pyramid (CCFM).

    Args:
        in_channels: Channels of the backbone's maps, finest first.
        embed_dims: Channels of the output maps.
        ffn_dims: Width of AIFI's feed-forward network.
        num_heads: Heads of AIFI.
        dropout: Drop probability in AIFI, in the attention and after either step.
        expansion: Width of the fusion blocks relative to `embed_dims`.
        num_blocks: RepVGG blocks in each fusion block.
        block_channels: Channels before and between these, as pruning leaves them; None for the
            fusion block's.
        legacy_position: Reproduce the official numbering of tokens on maps that are not square, see
            :func:`position_embedding`.
        init_cfg: See mmengine's BaseModule.

    Raises:
        ValueError: `embed_dims` is no multiple of 4 and of `num_heads`.

    Examples:
        >>> import torch
        >>> neck = HybridEncoder(in_channels=[64, 96, 192], embed_dims=64, ffn_dims=128)
        >>> maps = [torch.rand(1, c, s, s) for c, s in ((64, 16), (96, 8), (192, 4))]
        >>> [tuple(x.shape) for x in neck(maps)]
        [(1, 64, 16, 16), (1, 64, 8, 8), (1, 64, 4, 4)]
    """

    deploy = False
    needs_pyramid = True
    switch_to_deploy = fuse_encoder

    def __init__(self, in_channels: Sequence[int], embed_dims: int = 256, ffn_dims: int = 1024,
                 num_heads: int = 8, dropout: float = 0., expansion: float = 1.,
                 num_blocks: int = 3, legacy_position: bool = False,
                 init_cfg: dict | None = None, block_channels: int | None = None):
        super().__init__(init_cfg)
        if embed_dims % 4 or embed_dims % num_heads:
            raise ValueError(f'HybridEncoder: embed_dims={embed_dims} must be a multiple of 4 and '
                             f'of num_heads={num_heads}')
        self.in_channels = tuple(in_channels)
        self.embed_dims = embed_dims
        steps = range(len(in_channels) - 1)
        make_block = partial(self.make_block, expansion, num_blocks, block_channels)
        self.input_projs = nn.ModuleList(ConvNorm(c, embed_dims) for c in in_channels)
        self.aifi = AIFI(embed_dims, num_heads, ffn_dims, dropout, legacy_position)
        # Down from the coarsest map (index 0 = the coarsest step) ...
        self.lateral_convs = nn.ModuleList(self.make_lateral() for _ in steps)
        self.top_down_blocks = nn.ModuleList(make_block() for _ in steps)
        # ... and up again (index 0 = the finest step).
        self.downsample_convs = nn.ModuleList(self.make_downsample() for _ in steps)
        self.bottom_up_blocks = nn.ModuleList(make_block() for _ in steps)

    def make_block(self, expansion: float, num_blocks: int,
                   block_channels: int | None) -> nn.Module:
        """What fuses two maps."""
        return CSPRepLayer(self.embed_dims, int(self.embed_dims * expansion), num_blocks,
                           block_channels)

    def make_lateral(self) -> nn.Module:
        """What a map goes through before it is taken down."""
        return ConvNorm(self.embed_dims, self.embed_dims, act=True)

    def make_downsample(self) -> nn.Module:
        """What halves the sides of a map."""
        return ConvNorm(self.embed_dims, self.embed_dims, 3, stride=2, act=True)

    def forward(self, feats: Sequence[Tensor], with_mixed: bool = False
                ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, ...], Tensor]:
        """Fuse the maps.

        Args:
            feats: (N, C_i, H_i, W_i), finest first.
            with_mixed: Whether to return the coarsest map as AIFI gave it, too.

        Returns:
            As many maps (N, C, H_i, W_i).

        Raises:
            ValueError: The number of maps or their channels are not those of `in_channels`.
        """
        # What is no map is told by its shape.
        channels = tuple(feat.shape[1] if feat.ndim == 4 else tuple(feat.shape) for feat in feats)
        if channels != self.in_channels:
            raise ValueError(f'HybridEncoder was built for maps with in_channels={self.in_channels}'
                             f', but the backbone gives {channels}; set neck.in_channels (and the '
                             'backbone\'s out_indices) accordingly')
        maps = [project(feat) for project, feat in zip(self.input_projs, feats, strict=True)]
        maps[-1] = mixed = self.aifi(maps[-1])

        for step, level in enumerate(range(len(maps) - 1, 0, -1)):
            # The lateral output takes the map's place, also for the way up.
            maps[level] = self.lateral_convs[step](maps[level])
            # NOTE: The official code upsamples by a factor of 2, which fails where a side was odd.
            maps[level - 1] = self.top_down_blocks[step](maps[level], maps[level - 1])

        for level in range(len(maps) - 1):
            downsampled = self.downsample_convs[level](maps[level])
            maps[level + 1] = self.bottom_up_blocks[level](downsampled, maps[level + 1])
        return (tuple(maps), mixed) if with_mixed else tuple(maps)
