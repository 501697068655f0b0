"""Contrastive denoising: noised ground truth as extra queries in training.

Source: `DINO <https://arxiv.org/abs/2203.03605>`_, section 3.3, with RT-DETR's layout and noise.
"""
from typing import NamedTuple

import torch
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_xyxy_to_cxcywh
from mmengine.model import BaseModule
from torch import Tensor, nn

from .rtdetr_decoder import inverse_sigmoid
from .targets import Targets


class DenoisingQueries(NamedTuple):
    """What the denoising part of a batch needs in decoder and loss, D = 2 * groups * slots queries.

    Attributes:
        content: (N, D, C), embedded noised labels.
        reference: (N, D, 4), noised boxes as logits of (cx, cy, w, h).
        attn_mask: (D + Q, D + Q), True where attention is blocked.
        num_groups: Groups of [positives, negatives].
        num_slots: Positives (and negatives) in a group, the largest ground truth count in the
            batch.
    """

    content: Tensor
    reference: Tensor
    attn_mask: Tensor
    num_groups: int
    num_slots: int


class DenoisingGenerator(BaseModule):
    """Makes the denoising queries of a batch.

    NOTE: mmdet's CdnQueryGenerator differs where attention can see it: its padding queries sit in
    the middle of the image (here: a tiny box in the corner), and its boxes' logits are cut at 1e-3
    (here: 1e-5).

    NOTE: A batch without any object gets one dummy query of either polarity, so that every rank of
    a distributed training has the same graph; the class loss sees them as background. The first
    official version left the denoising out, which hangs or fails in distributed training.

    Args:
        num_classes: Categories.
        embed_dims: Channels of the queries.
        num_queries: Denoising queries of each polarity to aim at; 0 switches denoising off.
        label_noise: Twice the share of labels that are drawn anew.
        box_noise: Size of the box noise; 1 moves a side of a positive by up to half the box' side.
        skip_empty_batch: Make no denoising queries for a batch without objects, as the first
            official version. Distributed training then needs `find_unused_parameters=True`.
    """

    def __init__(self, num_classes: int, embed_dims: int = 256, num_queries: int = 100,
                 label_noise: float = 0.5, box_noise: float = 1., skip_empty_batch: bool = False):
        super().__init__()
        self.num_classes = num_classes
        self.num_queries = num_queries
        self.label_noise = label_noise
        self.box_noise = box_noise
        self.skip_empty_batch = skip_empty_batch
        # The last row stands for padding and stays zero.
        self.label_embedding = nn.Embedding(num_classes + 1, embed_dims, padding_idx=num_classes)
        # Without denoising nothing would give it a gradient, which distributed training waits for.
        self.label_embedding.requires_grad_(num_queries > 0)

    def forward(self, targets: Targets, num_matching: int) -> DenoisingQueries | None:
        """Draw the batch's denoising queries, which Q = `num_matching` others follow.

        Returns:
            The queries, or None where denoising is off or an empty batch has none.
        """
        batch, largest = len(targets.counts), max(targets.counts)
        if not self.num_queries or (self.skip_empty_batch and not largest):
            return None
        # (N, M): ground truth side by side, padded to the longest.
        slots = max(largest, 1)
        device = self.label_embedding.weight.device
        labels = torch.full((batch, slots), self.num_classes, dtype=torch.int32, device=device)
        labels[targets.image, targets.slot] = targets.labels.int()
        boxes = torch.zeros(batch, slots, 4, device=device)
        boxes[targets.image, targets.slot] = targets.boxes
        real = labels != self.num_classes
        if not largest:
            boxes[..., :2].fill_(0.5)
            boxes[..., 2:].fill_(0.1)

        # An empty batch's single group is enough to keep the graph whole.
        groups = max(1, self.num_queries // slots) if largest else 1
        # (N, groups * [M positives, M negatives])
        labels, real = labels.repeat(1, 2 * groups), real.repeat(1, 2 * groups)
        boxes = boxes.repeat(1, 2 * groups, 1)
        negative = torch.arange(2 * groups * slots, device=device) // slots % 2 == 1

        if self.label_noise > 0:
            redrawn = torch.rand(labels.shape, device=device) < self.label_noise * 0.5
            drawn = torch.randint(0, self.num_classes, labels.shape, dtype=labels.dtype,
                                  device=device)
            labels = torch.where(redrawn & real, drawn, labels)
        if self.box_noise > 0:
            # A side moves by less than half the box' side for positives, by more for negatives.
            half_sides = boxes[..., 2:].repeat(1, 1, 2) * (0.5 * self.box_noise)
            sign = torch.randint(0, 2, boxes.shape, device=device).to(boxes) * 2 - 1
            amount = torch.rand(boxes.shape, device=device) + negative[:, None]
            corners = bbox_cxcywh_to_xyxy(boxes) + sign * amount * half_sides
            boxes = bbox_xyxy_to_cxcywh(corners.clamp(0, 1))

        return DenoisingQueries(
            content=self.label_embedding(labels), reference=inverse_sigmoid(boxes),
            attn_mask=self.attention_mask(groups, 2 * slots, num_matching, device),
            num_groups=groups, num_slots=slots)

    @staticmethod
    def attention_mask(num_groups: int, group_size: int, num_matching: int,
                       device: torch.device | str | None = None) -> Tensor:
        """Hide the ground truth from the matching queries, and the groups from each other.

        Returns:
            (D + Q, D + Q), True where the row's query must not see the column's.
        """
        # Group number of each query; the matching ones are nobody's group but may be seen by all.
        group = torch.arange(num_groups * group_size + num_matching, device=device) // group_size
        group = group.clamp(max=num_groups)
        return (group[:, None] != group) & (group < num_groups)
