"""D-FINE's head: distributions of box edges, and what trains them ("GO-LSD").

Source: `D-FINE <https://arxiv.org/abs/2410.13842>`_, section 4.2 and appendix A.
"""
import numpy as np
import torch
from mmdet.registry import MODELS
from mmdet.structures import SampleList
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmdet.utils import reduce_mean
from torch import Tensor, nn

from .denoising import DenoisingQueries
from .distributions import distillation_loss, edge_labels, edge_statistics, localization_loss
from .rtdetr_decoder import ACTIVATIONS
from .rtdetr_head import Pairs, RTDETRHead
from .targets import Targets, to_device


def unite_matches(matches: np.ndarray, num_queries: int) -> np.ndarray:
    """One match for all sets of predictions: the pairs of all of them together.

    A query that several sets pair with different objects keeps the one it is paired with most
    often. So an object may keep several queries, but no query has two objects.

    NOTE: Of objects that are paired with a query equally often, the one with the lowest number is
    kept. The official code leaves that to an unstable sort.

    Args:
        matches: (3, S, P), image, query and ground truth of each set's pairs.
        num_queries: Queries of an image.

    Returns:
        (3, P'), the same of the pairs that are kept, by image and query.
    """
    image, query, target = matches.reshape(3, -1)
    # By query, within it by object.
    (keys, targets), times = np.unique(
        np.stack([image * num_queries + query, target]), axis=1, return_counts=True)
    order = np.lexsort([targets, -times, keys])
    keys, first = np.unique(keys[order], return_index=True)
    return np.stack([keys // num_queries, keys % num_queries, targets[order][first]])


@MODELS.register_module()
class DFINEHead(RTDETRHead):
    """Branches and losses for the distributions of :class:`DFINEDecoder`.

    Unlike RTDETRHead's its decoder's box branches give logits of distances, from which the decoder
    makes boxes. Each layer's class scores are raised or lowered by how sure its distributions are.
    Classes are trained with each set's own matches, boxes with the union of all sets'.

    NOTE: The official code turns every term that is not a number into 0, and trains on; here
    FiniteNumbersHook sees it and stops the training.

    Args:
        num_classes: See :class:`RTDETRHead`.
        embed_dims: See there.
        num_pred_layer: See there.
        reg_max: Number of the last bin of a distribution, even.
        reg_scale: See :func:`~spartan_mm.detection.distributions.edge_distances`.
        fgl_weight: Factor of `loss_fgl`, the cross-entropy of the distributions with the objects'
            edges, weighed by the boxes' IoU; 0.15 in the paper.
        ddf_weight: Factor of `loss_ddf`, by which the last layer's distributions teach those of the
            layers before it; 1.5 in the paper.
        temperature: Softens the distributions for `loss_ddf`.
        act: 'relu' or 'silu', between linear layers.
        kwargs: What else RTDETRHead takes.

    Raises:
        ValueError: `reg_max` is odd or less than 4.
    """

    final_branches = ('cls_branches', 'quality_branches')

    def __init__(self, num_classes: int, embed_dims: int = 256, num_pred_layer: int = 7,
                 reg_max: int = 32, reg_scale: float = 4., fgl_weight: float = 0.15,
                 ddf_weight: float = 1.5, temperature: float = 5., act: str = 'relu', **kwargs):
        if reg_max < 4 or reg_max % 2:
            raise ValueError(f'DFINEHead: reg_max={reg_max} must be even and at least 4; the '
                             'published models have 32')
        super().__init__(num_classes, embed_dims, num_pred_layer, act=act, **kwargs)
        self.reg_max = reg_max
        self.reg_scale = float(reg_scale)
        self.fgl_weight = fgl_weight
        self.ddf_weight = ddf_weight
        self.temperature = temperature
        for branch in self.reg_branches[:-1]:
            branch[-1] = nn.Linear(embed_dims, 4 * (reg_max + 1))
        self.base_branch = self.box_branch(embed_dims, act)
        self.quality_branches = nn.ModuleList(
            nn.Sequential(nn.Linear(20, 64), ACTIVATIONS[act](), nn.Linear(64, 1))
            for _ in range(num_pred_layer - 1))

    def init_weights(self) -> None:
        """Start as RTDETRHead, at even distributions and with scores of classes alone."""
        for branch in (self.base_branch, *self.quality_branches):
            nn.init.zeros_(branch[-1].weight)
            nn.init.zeros_(branch[-1].bias)
        super().init_weights()

    @staticmethod
    def to_corners(boxes: Tensor) -> Tensor:
        """(cx, cy, w, h) to (x1, y1, x2, y2); negative sides count as 0, as officially in losses.

        NOTE: The official code predicts such boxes with x1 > x2.
        """
        center, size = boxes.chunk(2, -1)
        return bbox_cxcywh_to_xyxy(torch.cat([center, size.clamp(min=0)], -1))

    def box_branches(self) -> dict:
        """What the decoder makes boxes with, as it takes it."""
        return dict(super().box_branches(), base_branch=self.base_branch, reg_scale=self.reg_scale)

    def forward(self, hidden_states: list[Tensor], boxes: list[Tensor], corners: list[Tensor],
                **kwargs) -> tuple[list[Tensor], list[Tensor]]:
        """Rate the queries.

        Args:
            hidden_states: See :class:`~spartan_mm.detection.dfine_decoder.DFINEDecoded`.
            boxes: See there.
            corners: See there.
            kwargs: What only the loss needs.

        Returns:
            As :meth:`RTDETRHead.forward`.
        """
        logits, boxes = super().forward(hidden_states, boxes)
        rated = range(len(corners))[-len(logits):]
        return [of_layer + self.quality_branches[layer](
            edge_statistics(corners[layer]).to(hidden_states[layer].dtype)).float()
            for of_layer, layer in zip(logits, rated, strict=True)], boxes

    def loss(self, hidden_states: list[Tensor], boxes: list[Tensor], corners: list[Tensor],
             base_boxes: Tensor, enc_logits: Tensor, enc_boxes: Tensor,
             denoising: DenoisingQueries | None, targets: Targets,
             batch_data_samples: SampleList) -> dict[str, Tensor]:
        """All terms of a batch: :meth:`forward`, then :meth:`loss_by_feat`."""
        logits, boxes = self(hidden_states, boxes, corners)
        base_logits = self.cls_branches[0](hidden_states[0]).float()
        return self.loss_by_feat([*logits, base_logits], [*boxes, base_boxes], enc_logits,
                                 enc_boxes, denoising, targets, corners, base_boxes.detach())

    def loss_by_feat(self, logits: list[Tensor], boxes: list[Tensor], enc_logits: Tensor,
                     enc_boxes: Tensor, denoising: DenoisingQueries | None, targets: Targets,
                     corners: list[Tensor], reference: Tensor) -> dict[str, Tensor]:
        """All terms of every decoder layer, of the base, of the encoder and of the denoising part.

        Args:
            logits: (N, D + Q, classes) of each decoder layer and of the base, denoising queries
                first.
            boxes: (N, D + Q, 4) of each decoder layer and of the base (cx, cy, w, h; 0 to 1).
            enc_logits: (N, Q, classes), of the selected tokens.
            enc_boxes: (N, Q, 4), of the selected tokens.
            denoising: The denoising part, None if D = 0.
            targets: The ground truth.
            corners: (N, D + Q, 4 * (R + 1)) of each decoder layer.
            reference: (N, D + Q, 4), the boxes that these refine, without a gradient.

        Returns:
            The names of :meth:`RTDETRHead.loss_by_feat`, with `pre_` those of the base. Each
            decoder layer also has `loss_fgl`, and all but the last have `loss_ddf`.
        """
        layers = len(corners)
        logits, boxes = torch.stack(logits), torch.stack(boxes).float()  # (layers + 1, N, D + Q, .)
        corners = torch.stack(corners)
        split = 0 if denoising is None else denoising.reference.shape[1]
        prefixes = {layers - 1: '', **{layer: f'd{layer}.' for layer in range(layers - 1)},
                    layers: 'pre_'}

        set_logits = torch.cat([logits[:, :, split:], enc_logits[None]])
        set_boxes = torch.cat([boxes[:, :, split:], enc_boxes[None]])
        own = self.match_on_host(set_logits, set_boxes, targets)
        union = unite_matches(own, set_boxes.shape[2])

        # The means over the ranks, at least 1: the same divisors everywhere.
        noised = targets if denoising is None else denoising.targets
        totals = np.array([sum(targets.counts), sum(noised.counts), union.shape[1]], np.float32)
        num_objects, num_noised, num_united = reduce_mean(
            to_device(totals, boxes.device)).clamp(min=1)

        own, union = (tuple(to_device(x, boxes.device)) for x in (own, union))
        # What a mean over the kept queries weighs against one over the others; on each rank its
        # own. Officially times the root of 32 over the batch size, which cancels.
        kept, all_queries = len(union[0]), set_boxes.shape[1] * set_boxes.shape[2]
        balance = kept ** 0.5, (all_queries - kept) ** 0.5

        of_sets = prefixes | {layers + 1: 'enc_'}
        pairs = self.pair(set_boxes, [part.expand(layers + 2, -1) for part in union], targets)
        losses = self.sum_by_set(
            self.class_terms(set_logits, self.pair(set_boxes, own, targets)), num_objects, of_sets)
        losses |= self.sum_by_set(self.box_terms(set_boxes, pairs), num_united, of_sets)
        losses |= self.distribution_losses(corners[:, :, split:], reference[:, split:],
                                           set_logits[layers - 1], pairs, num_united, balance, '')
        if denoising is not None:
            # NOTE: Each rank counts its own groups, on top of the ranks' mean of objects.
            divisor = num_noised * denoising.num_groups
            pairs = self.pair(boxes[:, :, :split],
                              self.denoising_matches(denoising, layers + 1), noised)
            losses |= self.sum_by_set(
                self.class_terms(logits[:, :, :split], pairs)
                | self.box_terms(boxes[:, :, :split], pairs), divisor,
                {layer: f'{prefix}dn_' for layer, prefix in prefixes.items()})
            losses |= self.distribution_losses(
                corners[:, :, :split], reference[:, :split], logits[layers - 1, :, :split], pairs,
                divisor, balance, 'dn_')
        return losses

    def distribution_losses(self, corners: Tensor, reference: Tensor, scores: Tensor, pairs: Pairs,
                            avg_factor: Tensor, balance: tuple[float, float],
                            suffix: str) -> dict[str, Tensor]:
        """What trains the distributions of all layers.

        Args:
            corners: (layers, N, Q, 4 * (R + 1)).
            reference: (N, Q, 4), boxes (cx, cy, w, h) that the layers refine.
            scores: (N, Q, classes), class logits of the last layer.
            pairs: Those of each layer, all alike but for the predictions; of further sets, too.
            avg_factor: Divisor of the sum of `loss_fgl`.
            balance: Weights of the mean over paired queries and of that over all others.
            suffix: What stands before the names of the terms, after the layer's.
        """
        sets, image, query = (part[:len(corners)] for part in pairs.index)
        overlaps = pairs.overlaps[:len(corners)]  # (layers, P)
        last = len(corners) - 1
        prefixes = {layer: f'd{layer}.{suffix}' for layer in range(last)}

        # References and objects, and so the labels, are those of all layers.
        labels = edge_labels(reference[image[0], query[0]], bbox_cxcywh_to_xyxy(pairs.targets[0]),
                             self.reg_max, self.reg_scale)
        terms = localization_loss(corners[sets, image, query], *labels) * overlaps[..., None]
        losses = self.sum_by_set(dict(loss_fgl=self.fgl_weight * terms), avg_factor,
                                 prefixes | {last: suffix})
        if not last:
            return losses

        sets, image, query = sets[:last], image[:last], query[:last]
        weight = scores.detach().sigmoid().amax(-1).repeat(last, 1, 1)  # (layers - 1, N, Q)
        weight[sets, image, query] = overlaps[:last]
        kept = torch.zeros_like(weight)
        kept[sets, image, query] = 1.
        terms = weight * distillation_loss(corners[:last], corners[last], self.temperature).mean(-1)
        for_kept, for_others = balance[0] / sum(balance), balance[1] / sum(balance)
        num_kept = overlaps.shape[1]
        share = torch.where(kept > 0, for_kept / max(num_kept, 1),
                            for_others / max(kept[0].numel() - num_kept, 1))
        return losses | self.sum_by_set(dict(loss_ddf=self.ddf_weight * share * terms), 1.,
                                        prefixes)
