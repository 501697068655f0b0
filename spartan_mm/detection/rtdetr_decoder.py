"""RT-DETR's transformer decoder: query positions, layers and iterative box refinement.

Source: `DETRs Beat YOLOs on Real-time Object Detection <https://arxiv.org/abs/2304.08069>`_, and
`DINO <https://arxiv.org/abs/2203.03605>`_, section 3.5, for "look forward twice".
"""
import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor, nn

from .deformable_attention import MultiScaleDeformableAttention
from .forms import trim_decoder
from .hybrid_encoder import ConvNorm, SelfAttention, to_tokens


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """The logit of `x` in float32, with `x` clipped to 0 .. 1 and both sides to at least `eps`.

    NOTE: mmdet's decoder uses an eps of 1e-3, which keeps boxes 0.64 pixels away from the border of
    a 640 pixel image; in float16, 1 / 1e-5 would overflow.
    """
    x = x.float().clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


def as_bias(attn_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as attention adds it: -inf where it is True, 0 elsewhere."""
    if attn_mask is None:
        return None
    return torch.zeros_like(attn_mask, dtype=dtype).masked_fill_(attn_mask, -math.inf)


ACTIVATIONS = dict(relu=nn.ReLU, silu=nn.SiLU)


class RTDETRDecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention and feed-forward network, each with a post-norm.

    Args are those of :class:`RTDETRDecoder`, `num_levels`, the number of maps in the memory, and
    `project_values`, whether its tokens are projected.
    """

    def __init__(self, embed_dims: int = 256, num_heads: int = 8, num_levels: int = 3,
                 num_points: int | Sequence[int] = 4, ffn_dims: int = 1024, dropout: float = 0.,
                 act: str = 'relu', project_values: bool = True):
        super().__init__()
        self.self_attn = SelfAttention(embed_dims, num_heads, dropout, batch_first=True)
        self.norm1 = nn.LayerNorm(embed_dims)
        self.cross_attn = MultiScaleDeformableAttention(
            embed_dims, num_heads, num_levels, num_points, dropout, project_values)
        self.norm2 = nn.LayerNorm(embed_dims)
        self.linear1 = nn.Linear(embed_dims, ffn_dims)
        self.linear2 = nn.Linear(ffn_dims, embed_dims)
        self.norm3 = nn.LayerNorm(embed_dims)
        self.act = ACTIVATIONS[act]()
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, query_pos: Tensor, memory: Tensor, reference: Tensor,
                spatial_shapes: Sequence[tuple[int, int]],
                attn_mask: Tensor | None = None) -> Tensor:
        """Refine the queries (N, Q, C).

        Args:
            query: (N, Q, C).
            query_pos: (N, Q, C), added where attention compares.
            memory: (N, L, C).
            reference: (N, Q, 4), boxes (cx, cy, w, h) as fractions of the image.
            spatial_shapes: (H, W) of the memory's maps.
            attn_mask: (Q, Q), -inf where a row's query must not see a column's, 0 elsewhere.
        """
        mixed = self.self_attn(query + query_pos, query, attn_mask)
        query = self.norm1(query + self.dropout(mixed))
        query = self.look(query, query_pos, memory, reference, spatial_shapes)
        mixed = self.linear2(self.dropout(self.act(self.linear1(query))))
        query = query + self.dropout(mixed)
        # Long trainings have overflowed float16 here, and what is exported may run in it; no normal
        # value reaches the bound.
        if not self.training or mixed.dtype == torch.float16:
            query = query.clamp(-65504, 65504)
        return self.norm3(query)

    def look(self, query: Tensor, *where: Tensor | Sequence[tuple[int, int]]) -> Tensor:
        """Cross-attention, its residual and norm, see :class:`MultiScaleDeformableAttention`."""
        return self.norm2(self.cross_attn(query, *where))


class Decoded(NamedTuple):
    """What a decoder gives its head, of each layer that ran.

    Attributes:
        hidden_states: (N, Q, C), queries.
        boxes: (N, Q, 4) (cx, cy, w, h; float32, 0 to 1).
    """

    hidden_states: list[Tensor]
    boxes: list[Tensor]


@MODELS.register_module()
class RTDETRDecoder(BaseModule):
    """Decoder with its own projection of the maps.

    The box heads belong to the detection head and are handed in, as mmdet does it: the decoder
    needs every layer's box to place the next layer's attention.

    Args:
        in_channels: Channels of the neck's maps.
        embed_dims: Channels of memory and queries.
        num_layers: Layers.
        eval_idx: Layer whose output is the prediction at test time, negative from the end; the
            layers after it are trained but not run.
        num_heads: Heads of both attentions.
        num_points: Sampling points per head and level, or one number for each level.
        ffn_dims: Width of the feed-forward network.
        dropout: Drop probability.
        act: 'relu' or 'silu', between linear layers.
        query_pos_layers: Linear layers between a box and its query's position: 2, the first of them
            twice as wide, or 3 as wide as the queries, as DEIM's RT-DETRs have it.
        init_cfg: See mmengine's BaseModule.

    Raises:
        ValueError: `eval_idx` names no layer, or `query_pos_layers` is another number.
    """

    deploy = False
    switch_to_deploy = trim_decoder

    def __init__(self, in_channels: Sequence[int] = (256, 256, 256), embed_dims: int = 256,
                 num_layers: int = 6, eval_idx: int = -1, num_heads: int = 8,
                 num_points: int | Sequence[int] = 4, ffn_dims: int = 1024, dropout: float = 0.,
                 init_cfg: dict | None = None, act: str = 'relu', query_pos_layers: int = 2):
        super().__init__(init_cfg)
        if query_pos_layers not in (2, 3):
            raise ValueError(f'RTDETRDecoder: query_pos_layers={query_pos_layers} must be 2 or 3')
        if not -num_layers <= eval_idx < num_layers:
            raise ValueError(f'RTDETRDecoder: eval_idx={eval_idx} names none of the {num_layers} '
                             f'layers; use {-num_layers} to {num_layers - 1}')
        self.embed_dims = embed_dims
        self.num_layers = num_layers
        self.eval_idx = eval_idx % num_layers
        self.input_projs = nn.ModuleList(ConvNorm(c, embed_dims) for c in in_channels)
        hidden = [2 * embed_dims] if query_pos_layers == 2 else [embed_dims] * 2
        self.query_pos_head = nn.Sequential(nn.Linear(4, hidden[0]))
        for inputs, outputs in pairwise([*hidden, embed_dims]):
            self.query_pos_head.extend([ACTIVATIONS[act](), nn.Linear(inputs, outputs)])
        layer = self.make_layer(embed_dims, num_heads, len(in_channels), num_points, ffn_dims,
                                dropout, act)
        # As in the official code all layers start from the same weights.
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(num_layers))

    def make_layer(self, *args: int | float | str | Sequence[int]) -> nn.Module:
        """A layer of these settings."""
        return RTDETRDecoderLayer(*args)

    def init_weights(self) -> None:
        """Xavier for the query positions; everything else keeps the weights of its constructor."""
        for linear in self.query_pos_head[::2]:
            nn.init.xavier_uniform_(linear.weight)
        super().init_weights()

    def embed(self, feats: Sequence[Tensor]) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
        """Project the neck's maps (N, C_i, H_i, W_i), and lay them out as tokens, row by row.

        Returns:
            The memory (N, L, C), finest map first, and the maps' (H, W).
        """
        maps = [project(feat) for project, feat in zip(self.input_projs, feats, strict=True)]
        spatial_shapes = tuple(tuple(x.shape[-2:]) for x in maps)
        return torch.cat([to_tokens(x) for x in maps], 1), spatial_shapes

    def forward(self, query: Tensor, memory: Tensor, reference: Tensor,
                spatial_shapes: Sequence[tuple[int, int]], reg_branches: nn.ModuleList,
                attn_mask: Tensor | None = None) -> Decoded:
        """Run the layers, each starting from the box that the one before it found.

        Args:
            query: (N, Q, C), content of the queries.
            memory: (N, L, C).
            reference: (N, Q, 4), initial boxes as logits of (cx, cy, w, h).
            spatial_shapes: (H, W) of the memory's maps.
            reg_branches: Box head of each layer, C -> 4.
            attn_mask: (Q, Q), True where a row's query must not see a column's.

        Returns:
            Queries and boxes of each layer; in eval mode of the layers up to `eval_idx`. In
            training each layer's boxes also carry the gradient to the layer before it ("look
            forward twice").
        """
        num_layers = self.num_layers if self.training else self.eval_idx + 1
        attn_mask = as_bias(attn_mask, query.dtype)
        states, boxes = [], []
        # References stay float32 under autocast: float16 would place boxes on a grid of 1 / 2048.
        box = reference.float().sigmoid()
        for layer, reg_branch in zip(self.layers[:num_layers], reg_branches, strict=False):
            reference = box.detach()
            query_pos = self.query_pos_head(reference.to(query.dtype))
            query = layer(query, query_pos, memory, reference, spatial_shapes, attn_mask)
            # A box carries the gradient to the layer before it, and to none before that one: what
            # the next layer starts from is made of a detached one.
            correction, start = reg_branch(query).float(), inverse_sigmoid(box)
            box = (correction + start.detach()).sigmoid()
            states.append(query)
            boxes.append((correction + start).sigmoid() if self.training else box)
        return Decoded(states, boxes)
