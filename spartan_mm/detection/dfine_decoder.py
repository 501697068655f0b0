"""D-FINE's decoder: boxes refined as distributions of their edges, layer after layer.

Source: `D-FINE <https://arxiv.org/abs/2410.13842>`_, section 4.1 ("FDR").
"""
from collections.abc import Sequence
from typing import NamedTuple

import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

from .distributions import refined_boxes
from .hybrid_encoder import ConvNorm
from .rtdetr_decoder import RTDETRDecoder, RTDETRDecoderLayer, as_bias, inverse_sigmoid


class Gate(nn.Module):
    """A residual connection that weighs both its parts by themselves, and a norm."""

    def __init__(self, embed_dims: int):
        super().__init__()
        self.gate = nn.Linear(2 * embed_dims, 2 * embed_dims)
        self.norm = nn.LayerNorm(embed_dims)
        # Both parts start with half their weight.
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, query: Tensor, mixed: Tensor) -> Tensor:
        """Two of (N, Q, C) to one."""
        kept, added = self.gate(torch.cat([query, mixed], -1)).sigmoid().chunk(2, -1)
        return self.norm(kept * query + added * mixed)


class GatedDecoderLayer(RTDETRDecoderLayer):
    """The layer with a gate for the residual connection of its cross-attention.

    Args are those of :class:`RTDETRDecoderLayer`.
    """

    def __init__(self, embed_dims: int = 256, *args, **kwargs):
        super().__init__(embed_dims, *args, **kwargs)
        self.gateway = Gate(embed_dims)
        del self.norm2

    def look(self, query: Tensor, *where: Tensor | Sequence[tuple[int, int]]) -> Tensor:
        """Cross-attention and gate, see :class:`MultiScaleDeformableAttention`."""
        return self.gateway(query, self.cross_attn(query, *where, residual=False))


class DFINEDecoded(NamedTuple):
    """What the decoder gives its head.

    Attributes:
        hidden_states: (N, Q, C), queries of each layer that ran.
        boxes: (N, Q, 4) (cx, cy, w, h; float32) of each of them.
        corners: (N, Q, 4 * (R + 1)) of each of them, logits of the distances of the left, top,
            right and bottom edges from those of `base_boxes`, float32.
        base_boxes: (N, Q, 4), the boxes that all layers refine.
    """

    hidden_states: list[Tensor]
    boxes: list[Tensor]
    corners: list[Tensor]
    base_boxes: Tensor


@MODELS.register_module()
class DFINEDecoder(RTDETRDecoder):
    """Decoder whose layers refine the distributions of the edges of one box; has a DFINEHead.

    The first layer predicts the box, as RT-DETR does. Each layer then adds to the logits of the
    layers before it, and what they say are distances from that box' edges.

    NOTE: Without `gate` and with `project_values` everything but the box branches is that of
    RTDETRDecoder, so that the weights of an RT-DETR fit.

    Args:
        in_channels: See :class:`RTDETRDecoder`.
        embed_dims: See there.
        num_layers: See there.
        eval_idx: See there.
        num_heads: See there.
        num_points: See there.
        ffn_dims: See there.
        dropout: See there.
        init_cfg: See there.
        act: See there.
        gate: Whether gates take the place of the residual connections of the cross-attention.
        project_values: Whether the maps are projected, and again the values that the layers read
            and what they make of them. Without, only maps of other widths are, once.
    """

    def __init__(self, in_channels: Sequence[int] = (256, 256, 256), embed_dims: int = 256,
                 *args, gate: bool = True, project_values: bool = False, **kwargs):
        self.gate = gate
        self.project_values = project_values
        super().__init__(in_channels, embed_dims, *args, **kwargs)
        if not project_values:
            self.input_projs = nn.ModuleList(
                nn.Identity() if channels == embed_dims else ConvNorm(channels, embed_dims)
                for channels in in_channels)

    def make_layer(self, *args: int | float | str | Sequence[int]) -> nn.Module:
        """A layer of these settings."""
        layer_type = GatedDecoderLayer if self.gate else RTDETRDecoderLayer
        return layer_type(*args, project_values=self.project_values)

    def forward(self, query: Tensor, memory: Tensor, reference: Tensor,
                spatial_shapes: Sequence[tuple[int, int]], reg_branches: nn.ModuleList,
                base_branch: nn.Module, reg_scale: float,
                attn_mask: Tensor | None = None) -> DFINEDecoded:
        """Run the layers, each starting from the box that the one before it found.

        Args:
            query: (N, Q, C), content of the queries.
            memory: (N, L, C).
            reference: (N, Q, 4), initial boxes as logits of (cx, cy, w, h).
            spatial_shapes: (H, W) of the memory's maps.
            reg_branches: Of each layer, C -> 4 * (R + 1).
            base_branch: C -> 4, makes the box that all layers refine.
            reg_scale: See :func:`~spartan_mm.detection.distributions.edge_distances`.
            attn_mask: (Q, Q), True where a row's query must not see a column's.

        Returns:
            What each layer found; in eval mode the layers up to `eval_idx`. The logits of a layer
            carry its gradient to the branches of the layers before it; boxes that layers start from
            carry none.
        """
        num_layers = self.num_layers if self.training else self.eval_idx + 1
        attn_mask = as_bias(attn_mask, query.dtype)
        states, boxes, corners, base = [], [], [], None
        box = reference.float().sigmoid()
        for layer, reg_branch in zip(self.layers[:num_layers], reg_branches, strict=False):
            reference = box.detach()
            query_pos = self.query_pos_head(reference.to(query.dtype)).clamp(-10, 10)
            query = layer(query, query_pos, memory, reference, spatial_shapes, attn_mask)
            if base is None:
                base = (base_branch(query).float() + inverse_sigmoid(reference)).sigmoid()
                logits = reg_branch(query).float()
            else:
                logits = reg_branch(query + states[-1].detach()).float() + corners[-1]
            box = refined_boxes(base.detach(), logits, reg_scale)
            states.append(query)
            boxes.append(box)
            corners.append(logits)
        return DFINEDecoded(states, boxes, corners, base)
