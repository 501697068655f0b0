"""RT-DETR's detection head: class and box branches, matching, losses and post-processing."""
import logging

import numpy as np
import torch
from mmdet.registry import MODELS, TASK_UTILS
from mmdet.structures import SampleList
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_overlaps
from mmdet.utils import InstanceList, reduce_mean
from mmengine.logging import print_log
from mmengine.model import BaseModule, bias_init_with_prob
from mmengine.structures import InstanceData
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from .denoising import DenoisingQueries, boxes_tensor, input_shape, normalized_targets

LayerMatches = tuple[Tensor, Tensor, Tensor]
"""Image, query and ground truth index (P,) of each matched pair; the last counts over the batch."""


@MODELS.register_module()
class RTDETRHead(BaseModule):
    """Branches of every decoder layer and of the encoder, with their losses.

    The last of the `num_pred_layer` branches rates the encoder's tokens (query selection), the ones
    before it belong to the decoder's layers.

    NOTE: The costs of the matching and the box losses are mmdet's own parts. DINOHead's loss is not
    reused: it divides denoising terms by the ranks' mean of objects times groups (officially: the
    ranks' mean of objects, times the own groups), takes IoU targets from normalised boxes with an
    eps that biases small ones, and its box branch runs in float16 under autocast.

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
    """

    def __init__(self, num_classes: int, embed_dims: int = 256, num_pred_layer: int = 7,
                 loss_cls: dict | None = None, loss_bbox: dict | None = None,
                 loss_iou: dict | None = None, train_cfg: dict | None = None,
                 test_cfg: dict | None = None, init_cfg: dict | None = None):
        super().__init__(init_cfg)
        self.num_classes = num_classes
        self.embed_dims = embed_dims
        self.test_cfg = test_cfg or {}
        self.loss_cls = MODELS.build(loss_cls or dict(type='IoUAwareVarifocalLoss'))
        self.loss_bbox = MODELS.build(loss_bbox or dict(type='L1Loss', loss_weight=5.0))
        self.loss_iou = MODELS.build(loss_iou or dict(type='GIoULoss', loss_weight=2.0))
        if train_cfg:
            self.assigner = TASK_UTILS.build(train_cfg['assigner'])

        self.cls_branches = nn.ModuleList(
            nn.Linear(embed_dims, num_classes) for _ in range(num_pred_layer))
        self.reg_branches = nn.ModuleList(
            nn.Sequential(nn.Linear(embed_dims, embed_dims), nn.ReLU(inplace=True),
                          nn.Linear(embed_dims, embed_dims), nn.ReLU(inplace=True),
                          nn.Linear(embed_dims, 4))
            for _ in range(num_pred_layer))

    def init_weights(self) -> None:
        """Start at a probability of 0.01 for every class, and at the reference for every box."""
        for branch in self.cls_branches:
            nn.init.constant_(branch.bias, bias_init_with_prob(0.01))
        for branch in self.reg_branches:
            nn.init.zeros_(branch[-1].weight)
            nn.init.zeros_(branch[-1].bias)
        super().init_weights()

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
             enc_boxes: Tensor, denoising: DenoisingQueries | None,
             batch_data_samples: SampleList) -> dict[str, Tensor]:
        """All terms of a batch, see :meth:`loss_by_feat`.

        Args:
            hidden_states: (N, D + Q, C) of each decoder layer, denoising queries first.
            boxes: (N, D + Q, 4) of each decoder layer.
            enc_logits: (N, Q, classes), of the selected tokens.
            enc_boxes: (N, Q, 4), of the selected tokens.
            denoising: The denoising part.
            batch_data_samples: The images' `gt_instances`.

        Returns:
            Named losses, see :meth:`loss_by_feat`.
        """
        return self.loss_by_feat(*self(hidden_states, boxes), enc_logits, enc_boxes, denoising,
                                 batch_data_samples)

    def loss_by_feat(self, logits: list[Tensor], boxes: list[Tensor], enc_logits: Tensor,
                     enc_boxes: Tensor, denoising: DenoisingQueries | None,
                     batch_data_samples: SampleList) -> dict[str, Tensor]:
        """Class, L1 and GIoU loss of every decoder layer, of the encoder and of the denoising part.

        Every set of predictions is matched on its own, and all count the same.

        Args:
            logits: (N, D + Q, classes) of each decoder layer.
            boxes: (N, D + Q, 4) of each decoder layer (cx, cy, w, h; 0 to 1).
            enc_logits: (N, Q, classes).
            enc_boxes: (N, Q, 4).
            denoising: The denoising part, None if D = 0.
            batch_data_samples: The images' `gt_instances`.

        Returns:
            `loss_cls`, `loss_bbox`, `loss_iou` of the last layer; with the prefix `d0.`, `d1.` ...
            of the layers before it; with `enc_` of the encoder; with `dn_` of the denoising part.
        """
        targets = normalized_targets(batch_data_samples)
        img_shapes = [input_shape(sample.metainfo) for sample in batch_data_samples]
        num_objects = sum(len(labels) for labels, _ in targets)
        # The mean over the ranks, at least 1: the same divisor everywhere.
        num_objects = reduce_mean(boxes[0].new_tensor(float(num_objects))).clamp(min=1)

        num_denoising = 0 if denoising is None else denoising.reference.shape[1]
        losses = {}

        def add(prefix: str, set_logits: Tensor, set_boxes: Tensor, matches: LayerMatches,
                divisor: Tensor) -> None:
            terms = self.loss_by_feat_single(set_logits, set_boxes.float(), matches, targets,
                                             img_shapes, divisor)
            for name, term in zip(('cls', 'bbox', 'iou'), terms, strict=True):
                losses[prefix.format(name)] = term

        last = len(logits) - 1
        sets = [('loss_{}' if layer == last else f'd{layer}.loss_{{}}',
                 logits[layer][:, num_denoising:], boxes[layer][:, num_denoising:])
                for layer in (last, *range(last))]
        sets.append(('enc_loss_{}', enc_logits, enc_boxes))
        matched = self.match([(set_logits, set_boxes) for _, set_logits, set_boxes in sets],
                             batch_data_samples)
        for (prefix, set_logits, set_boxes), matches in zip(sets, matched, strict=True):
            add(prefix, set_logits, set_boxes, matches, num_objects)

        if denoising is not None:
            matches = self.denoising_matches(targets, denoising)
            for layer in (last, *range(last)):
                # NOTE: each rank counts its own groups, on top of the ranks' mean of objects.
                add('dn_loss_{}' if layer == last else f'd{layer}.dn_loss_{{}}',
                    logits[layer][:, :num_denoising], boxes[layer][:, :num_denoising], matches,
                    num_objects * denoising.num_groups)
        return losses

    def loss_by_feat_single(self, logits: Tensor, boxes: Tensor, matches: LayerMatches,
                            targets: list[tuple[Tensor, Tensor]],
                            img_shapes: list[tuple[int, int]],
                            avg_factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three terms of one set of predictions.

        Args:
            logits: (N, Q, classes).
            boxes: (N, Q, 4) (cx, cy, w, h; 0 to 1).
            matches: The P matched pairs.
            targets: Labels and boxes of each image, see :func:`normalized_targets`.
            img_shapes: (height, width) in pixels of each image.
            avg_factor: Divisor of the sums.

        Returns:
            Class, L1 and GIoU loss, scalars; the latter two are 0 (with a gradient) if P = 0.
        """
        image, query, target = matches
        target_labels = torch.cat([labels for labels, _ in targets])
        target_boxes = torch.cat([target_boxes for _, target_boxes in targets])[target]
        matched_boxes = boxes[image, query]

        # In pixels, so that mmdet's eps of 1e-6 is far below any box' area.
        scale = boxes.new_tensor([(width, height) * 2 for height, width in img_shapes])[image]
        predicted_corners = bbox_cxcywh_to_xyxy(matched_boxes) * scale
        target_corners = bbox_cxcywh_to_xyxy(target_boxes) * scale

        labels = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
        labels[image, query] = target_labels[target]
        quality = torch.zeros(logits.shape[:2], device=logits.device)
        quality[image, query] = bbox_overlaps(predicted_corners.detach(), target_corners,
                                              is_aligned=True)

        loss_cls = self.loss_cls(logits, labels, quality, avg_factor=avg_factor)
        if not len(image):
            # Keeps the box branches in the graph: distributed training waits for every gradient.
            zero = boxes.sum() * 0
            return loss_cls, zero, zero
        loss_bbox = self.loss_bbox(matched_boxes, target_boxes, avg_factor=avg_factor)
        loss_iou = self.loss_iou(predicted_corners, target_corners, avg_factor=avg_factor)
        return loss_cls, loss_bbox, loss_iou

    @torch.no_grad()
    def match(self, sets: list[tuple[Tensor, Tensor]],
              batch_data_samples: SampleList) -> list[LayerMatches]:
        """Match queries and ground truth one to one, image by image, for each set of predictions.

        The costs are the assigner's. All of them travel to the CPU, where they are solved, at once:
        a matcher that is asked image by image makes the GPU wait for every single one.

        Args:
            sets: Logits (N, Q, classes) and boxes (N, Q, 4) (cx, cy, w, h; 0 to 1) of each set.
            batch_data_samples: The images' `gt_instances`.

        Returns:
            The matched pairs of each set.
        """
        logits = torch.stack([set_logits.float() for set_logits, _ in sets], 1)  # (N, S, Q, C)
        corners = bbox_cxcywh_to_xyxy(torch.stack([boxes.float() for _, boxes in sets], 1))
        num_sets, num_queries = logits.shape[1:3]

        costs = []
        for image, sample in enumerate(batch_data_samples):
            height, width = input_shape(sample.metainfo)
            predicted = InstanceData(
                scores=logits[image].flatten(0, 1),
                bboxes=corners[image].flatten(0, 1) * corners.new_tensor([width, height] * 2))
            truth = InstanceData(labels=sample.gt_instances.labels,
                                 bboxes=boxes_tensor(sample.gt_instances))
            cost = sum(match_cost(pred_instances=predicted, gt_instances=truth,
                                  img_meta=dict(img_shape=(height, width)))
                       for match_cost in self.assigner.match_costs)
            costs.append(cost.flatten())  # (S * Q * G)
        counts = [len(sample.gt_instances) for sample in batch_data_samples]
        joint = torch.cat(costs).cpu()
        if not joint.isfinite().all():
            # The loss shows it, too; the matcher only must not fail on it.
            print_log('RT-DETR: predictions contain NaN or infinite values, the training has '
                      'diverged: lower the learning rate, or check the data', 'current',
                      logging.WARNING)
            joint = joint.nan_to_num(0., 0., 0.)

        solved = [
            [linear_sum_assignment(cost) for cost in image_costs.view(num_sets, num_queries, count)]
            for image_costs, count in zip(
                joint.split([num_sets * num_queries * count for count in counts]), counts,
                strict=True)]
        return [collect_matches([image[number] for image in solved], counts, logits.device)
                for number in range(num_sets)]

    @staticmethod
    def denoising_matches(targets: list[tuple[Tensor, Tensor]],
                          denoising: DenoisingQueries) -> LayerMatches:
        """Pair each positive denoising query with the object that it was made from.

        Args:
            targets: Labels and boxes of each image.
            denoising: The denoising part.

        Returns:
            The pairs: object k of an image is positive k of every group.
        """
        group_starts = np.arange(denoising.num_groups) * 2 * denoising.num_slots
        counts = [len(labels) for labels, _ in targets]
        pairs = [((group_starts[:, None] + np.arange(count)).ravel(),
                  np.tile(np.arange(count), denoising.num_groups)) for count in counts]
        return collect_matches(pairs, counts, denoising.reference.device)

    def predict(self, hidden_states: list[Tensor], boxes: list[Tensor],
                batch_data_samples: SampleList, rescale: bool = True) -> InstanceList:
        """Detections of a batch, see :meth:`predict_by_feat`.

        Args:
            hidden_states: (N, Q, C) of each decoder layer that ran.
            boxes: (N, Q, 4) of each of them.
            batch_data_samples: The images' meta information.
            rescale: Whether boxes refer to the original images instead of the network's input.

        Returns:
            Detections of each image.
        """
        logits, boxes = self(hidden_states, boxes)
        return self.predict_by_feat(logits[-1], boxes[-1],
                                    [sample.metainfo for sample in batch_data_samples], rescale)

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
        scores = logits.sigmoid().flatten(1)  # (N, Q * classes)
        keep = min(self.test_cfg.get('max_per_img', 300), scores.shape[1])
        scores, index = scores.topk(keep)
        query, labels = index // self.num_classes, index % self.num_classes
        corners = bbox_cxcywh_to_xyxy(boxes.gather(1, query[..., None].expand(-1, -1, 4)))

        results = []
        for image, img_meta in enumerate(batch_img_metas):
            input_height, input_width = input_shape(img_meta)
            height, width = img_meta['img_shape'][:2]
            bboxes = corners[image] * corners.new_tensor([input_width, input_height] * 2)
            bboxes = bboxes.clamp(min=bboxes.new_zeros(4),
                                  max=bboxes.new_tensor([width, height] * 2))
            if rescale:
                bboxes = bboxes / bboxes.new_tensor(img_meta['scale_factor']).repeat(2)
            results.append(InstanceData(bboxes=bboxes, scores=scores[image], labels=labels[image]))
        return results


def collect_matches(pairs: list[tuple[np.ndarray, np.ndarray]], counts: list[int],
                    device: torch.device) -> LayerMatches:
    """Join the images' (query, ground truth) pairs, ground truth numbered over the batch."""
    starts = np.cumsum([0, *counts])
    joint = np.concatenate([
        np.stack([np.full_like(query, image), query, target + starts[image]])
        for image, (query, target) in enumerate(pairs)], 1)
    image, query, target = torch.from_numpy(joint).to(device)
    return image, query, target
