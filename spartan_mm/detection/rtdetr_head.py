"""RT-DETR's detection head: class and box branches, matching, losses and post-processing."""
import logging
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from mmdet.models.task_modules import BBoxL1Cost, IoUCost
from mmdet.registry import MODELS, TASK_UTILS
from mmdet.structures import SampleList
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmdet.utils import InstanceList, reduce_mean
from mmengine.logging import print_log
from mmengine.model import BaseModule, bias_init_with_prob
from mmengine.structures import InstanceData
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from .denoising import DenoisingQueries
from .forms import trim_head
from .losses import paired_overlaps
from .rtdetr_decoder import ACTIVATIONS
from .targets import Targets, input_shape, to_device

Matches = tuple[Tensor, Tensor, Tensor]
"""Image, query and ground truth index (S, P) of the P matched pairs in each of S sets of
predictions; the last counts over the batch."""


class Pairs(NamedTuple):
    """P matched pairs in each of S sets of predictions.

    Attributes:
        index: Set, image and query of each, (S, P) or broadcast to it.
        labels: (S, P), classes of the ground truth.
        boxes: (S, P, 4), predictions (cx, cy, w, h; 0 to 1).
        targets: (S, P, 4), ground truth likewise.
        corners: (S, P, 4), predictions (x1, y1, x2, y2) in pixels.
        target_corners: (S, P, 4), ground truth likewise.
        overlaps: (S, P), IoU, without a gradient.
    """

    index: tuple[Tensor, Tensor, Tensor]
    labels: Tensor
    boxes: Tensor
    targets: Tensor
    corners: Tensor
    target_corners: Tensor
    overlaps: Tensor


@MODELS.register_module()
class RTDETRHead(BaseModule):
    """Branches of every decoder layer and of the encoder, with their losses.

    The last of the `num_pred_layer` branches rates the encoder's tokens (query selection), the ones
    before it belong to the decoder's layers.

    NOTE: The costs of the matching are mmdet's own parts. DINOHead's loss is not reused: it divides
    denoising terms by the ranks' mean of objects times groups (officially: the ranks' mean of
    objects, times the own groups), takes IoU targets from normalized boxes with an eps that biases
    small ones, and its box branch runs in float16 under autocast.

    Args:
        num_classes: Categories.
        embed_dims: Channels of the queries.
        num_pred_layer: Decoder layers + 1; the detector sets it.
        loss_cls: Classification loss, called as :class:`IoUAwareVarifocalLoss`.
        loss_bbox: Loss of boxes (cx, cy, w, h) as fractions of the image.
        loss_iou: Loss of boxes (x1, y1, x2, y2) in pixels.
        train_cfg: `assigner` has the costs of the matching; the detector sets it.
        test_cfg: `max_per_img` is the number of detections that an image keeps.
        init_cfg: See mmengine's BaseModule.
        act: 'relu' or 'silu', between linear layers.
    """

    deploy = False
    switch_to_deploy = trim_head
    #: Branches of which a prediction takes those of one layer alone.
    final_branches = ('cls_branches', )
    #: (cx, cy, w, h) to (x1, y1, x2, y2).
    to_corners = staticmethod(bbox_cxcywh_to_xyxy)

    def __init__(self, num_classes: int, embed_dims: int = 256, num_pred_layer: int = 7,
                 loss_cls: dict | None = None, loss_bbox: dict | None = None,
                 loss_iou: dict | None = None, train_cfg: dict | None = None,
                 test_cfg: dict | None = None, init_cfg: dict | None = None, act: str = 'relu'):
        super().__init__(init_cfg)
        self.num_classes = num_classes
        self.embed_dims = embed_dims
        self.test_cfg = test_cfg or {}
        self.loss_cls = MODELS.build(loss_cls or dict(type='IoUAwareVarifocalLoss'))
        self.loss_bbox = MODELS.build(loss_bbox or dict(type='L1Loss', loss_weight=5.0))
        self.loss_iou = MODELS.build(loss_iou or dict(type='PairedGIoULoss', loss_weight=2.0))
        if train_cfg:
            self.assigner = TASK_UTILS.build(train_cfg['assigner'])

        self.cls_branches = nn.ModuleList(
            nn.Linear(embed_dims, num_classes) for _ in range(num_pred_layer))
        self.reg_branches = nn.ModuleList(
            self.box_branch(embed_dims, act) for _ in range(num_pred_layer))

    @staticmethod
    def box_branch(embed_dims: int, act: str, outputs: int = 4) -> nn.Sequential:
        """Three layers from (..., C) to (..., outputs)."""
        act = ACTIVATIONS[act]
        return nn.Sequential(nn.Linear(embed_dims, embed_dims), act(),
                             nn.Linear(embed_dims, embed_dims), act(),
                             nn.Linear(embed_dims, outputs))

    def init_weights(self) -> None:
        """Start at a probability of 0.01 for every class, and at the reference for every box."""
        for branch in self.cls_branches:
            nn.init.constant_(branch.bias, bias_init_with_prob(0.01))
        for branch in self.reg_branches:
            nn.init.zeros_(branch[-1].weight)
            nn.init.zeros_(branch[-1].bias)
        super().init_weights()

    def box_branches(self) -> dict:
        """What the decoder makes boxes with, as it takes it."""
        return dict(reg_branches=self.reg_branches)

    def forward(self, hidden_states: list[Tensor], boxes: list[Tensor],
                **kwargs) -> tuple[list[Tensor], list[Tensor]]:
        """Rate the queries.

        Args:
            hidden_states: (N, Q, C), queries of each decoder layer that ran.
            boxes: (N, Q, 4), boxes of each of them (cx, cy, w, h; 0 to 1).
            kwargs: What only the loss needs.

        Returns:
            Class logits (N, Q, classes), float32, and boxes (N, Q, 4) of every layer in training,
            of the last one that ran otherwise.
        """
        layers = range(len(hidden_states))
        if not self.training:
            layers = layers[-1:]
        logits = [self.cls_branches[layer](hidden_states[layer]).float() for layer in layers]
        return logits, [boxes[layer] for layer in layers]

    def loss(self, hidden_states: list[Tensor], boxes: list[Tensor], enc_logits: Tensor,
             enc_boxes: Tensor, denoising: DenoisingQueries | None, targets: Targets,
             batch_data_samples: SampleList) -> dict[str, Tensor]:
        """All terms of a batch: :meth:`forward`, then :meth:`loss_by_feat`.

        NOTE: Nothing is read of `batch_data_samples`; `targets` has all of it.
        """
        return self.loss_by_feat(*self(hidden_states, boxes), enc_logits, enc_boxes, denoising,
                                 targets)

    def loss_by_feat(self, logits: list[Tensor], boxes: list[Tensor], enc_logits: Tensor,
                     enc_boxes: Tensor, denoising: DenoisingQueries | None,
                     targets: Targets) -> dict[str, Tensor]:
        """Class, L1 and GIoU loss of every decoder layer, of the encoder and of the denoising part.

        Every set of predictions is matched on its own, and all count the same.

        Args:
            logits: (N, D + Q, classes) of each decoder layer, denoising queries first.
            boxes: (N, D + Q, 4) of each decoder layer (cx, cy, w, h; 0 to 1).
            enc_logits: (N, Q, classes), of the selected tokens.
            enc_boxes: (N, Q, 4), of the selected tokens.
            denoising: The denoising part, None if D = 0.
            targets: The ground truth.

        Returns:
            `loss_cls`, `loss_bbox`, `loss_iou` of the last layer; with the prefix `d0.`, `d1.` ...
            of the layers before it; with `enc_` of the encoder; with `dn_` of the denoising part.
        """
        # The means over the ranks, at least 1: the same divisors everywhere.
        noised = targets if denoising is None else denoising.targets
        totals = np.array([sum(targets.counts), sum(noised.counts)], np.float32)
        num_objects, num_noised = reduce_mean(to_device(totals, boxes[0].device)).clamp(min=1)

        # (layers, N, D + Q, ...)
        logits, boxes = torch.stack(logits), torch.stack(boxes).float()
        num_denoising = 0 if denoising is None else denoising.reference.shape[1]
        set_logits = torch.cat([logits[:, :, num_denoising:], enc_logits[None]])
        set_boxes = torch.cat([boxes[:, :, num_denoising:], enc_boxes[None]])
        last = len(logits) - 1
        prefixes = {last: '', **{layer: f'd{layer}.' for layer in range(last)}}
        losses = self.loss_by_set(
            set_logits, set_boxes, self.match(set_logits, set_boxes, targets), targets,
            num_objects, prefixes | {last + 1: 'enc_'})
        if denoising is not None:
            losses |= self.loss_by_set(
                logits[:, :, :num_denoising], boxes[:, :, :num_denoising],
                self.denoising_matches(denoising, len(logits)), noised,
                # NOTE: Each rank counts its own groups, on top of the ranks' mean of objects.
                num_noised * denoising.num_groups,
                {layer: f'{prefix}dn_' for layer, prefix in prefixes.items()})
        return losses

    def loss_by_set(self, logits: Tensor, boxes: Tensor, matches: Matches, targets: Targets,
                    avg_factor: Tensor, prefixes: dict[int, str]) -> dict[str, Tensor]:
        """The three terms of S sets of predictions, all at once.

        Args:
            logits: (S, N, Q, classes).
            boxes: (S, N, Q, 4) (cx, cy, w, h; 0 to 1).
            matches: The P matched pairs of each set.
            targets: The ground truth.
            avg_factor: Divisor of the sums.
            prefixes: Of each set, what stands before the names of its terms.

        Returns:
            `loss_cls`, `loss_bbox` and `loss_iou` of each set; the latter two are 0 (with a
            gradient) if P = 0.
        """
        pairs = self.pair(boxes, matches, targets)
        return self.sum_by_set(
            self.class_terms(logits, pairs) | self.box_terms(boxes, pairs), avg_factor, prefixes)

    def pair(self, boxes: Tensor, matches: Matches, targets: Targets) -> Pairs:
        """Put predicted boxes (S, N, Q, 4) side by side with the ground truth."""
        image, query, target = matches
        index = torch.arange(len(boxes), device=boxes.device)[:, None], image, query
        matched_boxes, target_boxes = boxes[index], targets.boxes[target]
        # In pixels, so that the losses' eps of 1e-6 is far below any box' area.
        scale = targets.scale[target]
        corners = self.to_corners(matched_boxes) * scale
        target_corners = bbox_cxcywh_to_xyxy(target_boxes) * scale
        overlaps = paired_overlaps(corners.detach(), target_corners)[0]
        return Pairs(index, targets.labels[target], matched_boxes, target_boxes, corners,
                     target_corners, overlaps)

    def class_terms(self, logits: Tensor, pairs: Pairs) -> dict[str, Tensor]:
        """`loss_cls` of each query and class of logits (S, N, Q, classes)."""
        labels = torch.full(logits.shape[:3], self.num_classes, device=logits.device)
        labels[pairs.index] = pairs.labels
        quality = torch.zeros(logits.shape[:3], device=logits.device)
        quality[pairs.index] = pairs.overlaps
        return dict(loss_cls=self.loss_cls(logits, labels, quality))

    def box_terms(self, boxes: Tensor, pairs: Pairs) -> dict[str, Tensor]:
        """`loss_bbox` and `loss_iou` of each pair of boxes (S, N, Q, 4)."""
        if not pairs.overlaps.numel():
            # Keeps the box branches in the graph: distributed training waits for every gradient.
            return dict.fromkeys(('loss_bbox', 'loss_iou'), boxes * 0)
        return dict(
            loss_bbox=self.loss_bbox(pairs.boxes, pairs.targets, reduction_override='none'),
            loss_iou=self.loss_iou(pairs.corners.flatten(0, 1), pairs.target_corners.flatten(0, 1),
                                   reduction_override='none').view_as(pairs.overlaps))

    @staticmethod
    def sum_by_set(terms: Mapping[str, Tensor], avg_factor: Tensor | float,
                   prefixes: Mapping[int, str]) -> dict[str, Tensor]:
        """Sum terms of S sets each, divide, and name them after their sets."""
        sums = {name: (term.flatten(1).sum(1) / avg_factor).unbind()
                for name, term in terms.items()}
        return {f'{prefix}{name}': of_sets[index] for index, prefix in prefixes.items()
                for name, of_sets in sums.items()}

    def match(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Matches:
        """Match queries and ground truth one to one, see :meth:`match_on_host`."""
        return tuple(to_device(self.match_on_host(logits, boxes, targets), logits.device))

    @torch.no_grad()
    def match_on_host(self, logits: Tensor, boxes: Tensor, targets: Targets) -> np.ndarray:
        """Match queries and ground truth one to one, image by image, in each set of predictions.

        The costs are the assigner's. Those of all sets and images travel to the CPU, where they are
        solved, at once, and so do the matches back: a matcher that is asked image by image makes
        the GPU wait for every single one.

        Args:
            logits: (S, N, Q, classes).
            boxes: (S, N, Q, 4) (cx, cy, w, h; 0 to 1).
            targets: The ground truth.

        Returns:
            The matched pairs of each set, the three arrays of Matches in one (3, S, P).
        """
        costs = self.match_costs(logits.float(), boxes.float(), targets).cpu()
        if not costs.isfinite().all():
            # The loss shows it, too; the matcher only must not fail on it.
            print_log('RT-DETR: predictions contain NaN or infinite values, the training has '
                      'diverged: lower the learning rate, or check the data', 'current',
                      logging.WARNING)
            costs = costs.nan_to_num(0., 0., 0.)

        # Every set has the same number of pairs in an image: that of its objects or its queries.
        starts = np.cumsum([0, *targets.counts])
        matched = [
            [np.stack([np.full(len(query), image), query, objects + start])
             for image, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True))
             for objects, query in [linear_sum_assignment(set_costs[start:end])]]
            for set_costs in costs.numpy()]
        # S lists of N arrays (3, P_i) -> (3, S, P)
        return np.stack([np.concatenate(per_image, 1) for per_image in matched], 1)

    def match_costs(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
        """What the assigner's costs say of each object and the queries of its image.

        NOTE: mmdet's costs compare all queries with all objects of one image. Here one call serves
        the batch: a cost of boxes compares each object, as a batch of its own, with its image's
        queries; any other cost is asked for every class and must depend on nothing but the scores.

        Returns:
            (S, G, Q), of the arguments of :meth:`match`.
        """
        num_sets, _, num_queries, num_classes = logits.shape
        scores = InstanceData(scores=logits.flatten(0, 2))
        classes = InstanceData(labels=torch.arange(num_classes, device=logits.device))
        # One size stands for those of all images: the L1 cost divides by it, the IoU doesn't depend
        # on it. It is in pixels, so that mmdet's eps of 1e-6 is far below any box' area.
        side = 640.
        corners = self.to_corners(boxes).transpose(0, 1).flatten(1, 2) * side
        queries = InstanceData(bboxes=corners[targets.image])  # (G, S * Q, 4)
        objects = InstanceData(bboxes=bbox_cxcywh_to_xyxy(targets.boxes)[:, None] * side)

        total = 0
        for cost in self.assigner.match_costs:
            if isinstance(cost, BBoxL1Cost | IoUCost):
                found = cost(queries, objects, dict(img_shape=(side, side)))
                found = found.view(-1, num_sets, num_queries).transpose(0, 1)
            else:
                found = cost(scores, classes).view(logits.shape)
                found = found[:, targets.image, :, targets.labels].transpose(0, 1)
            total = total + found
        return total

    @staticmethod
    def denoising_matches(denoising: DenoisingQueries, num_sets: int) -> Matches:
        """Pair each positive denoising query with the object that it was made from.

        Object k of an image is positive k of every group, in all of the `num_sets` sets alike.
        """
        targets = denoising.targets
        device = targets.image.device
        starts = torch.arange(denoising.num_groups, device=device) * 2 * denoising.num_slots
        query = starts[:, None] + targets.slot  # (groups, G)
        objects = torch.arange(len(targets.labels), device=device)
        return tuple(part.expand_as(query).flatten().expand(num_sets, -1)
                     for part in (targets.image, query, objects))

    def best(self, logits: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The K best (query, class) pairs of each image, best first.

        Args:
            logits: (N, Q, classes).
            boxes: (N, Q, 4) (cx, cy, w, h; 0 to 1).

        Returns:
            Scores (N, K), labels (N, K), and corners (N, K, 4) (x1, y1, x2, y2; 0 to 1, and beyond
            where a box leaves the image).
        """
        scores = logits.sigmoid().flatten(1)  # (N, Q * classes)
        keep = min(self.test_cfg.get('max_per_img', 300), scores.shape[1])
        scores, index = scores.topk(keep)
        query, labels = index // self.num_classes, index % self.num_classes
        boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))
        return scores, labels, self.to_corners(boxes)

    def predict_by_feat(self, logits: Tensor, boxes: Tensor, batch_img_metas: list[dict],
                        rescale: bool = True) -> InstanceList:
        """The best (query, class) pairs of each image; no threshold, no suppression.

        NOTE: As everywhere in mmdet the boxes are clipped to the image, the official code leaves
        them.

        Args:
            logits: (N, Q, classes).
            boxes: (N, Q, 4) (cx, cy, w, h; 0 to 1).
            batch_img_metas: Meta information of each image.
            rescale: Whether boxes refer to the original images instead of the network's input.

        Returns:
            `scores`, `labels` and `bboxes` (x1, y1, x2, y2; pixels) of each image, best first. A
            query can stand there with several labels.
        """
        scores, labels, corners = self.best(logits, boxes)

        # (x, y) of the input's size, of the image's size and of the factor from the original's.
        factors = to_device(np.array(
            [[input_shape(meta)[::-1], meta['img_shape'][1::-1],
              meta['scale_factor'] if rescale else (1, 1)] for meta in batch_img_metas],
            np.float32), boxes.device)
        # (N, 3, 2) -> three of (N, 1, 4)
        input_size, image_size, factor = factors.repeat(1, 1, 2)[:, :, None].unbind(1)
        bboxes = (corners * input_size).clamp(min=0).minimum(image_size) / factor
        return [InstanceData(bboxes=image_boxes, scores=image_scores, labels=image_labels)
                for image_boxes, image_scores, image_labels in zip(
                    bboxes, scores, labels, strict=True)]
