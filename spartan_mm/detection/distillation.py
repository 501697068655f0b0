"""What a frozen teacher adds to the training of an RT-DETR, and to nothing else.

A teacher is no part of the model's tree: it is in no checkpoint, no average of weights and no
optimizer, and copies of the model share it.
"""
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmdet.registry import HOOKS, MODELS
from mmdet.structures import SampleList
from mmdet.utils import reduce_mean
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import Tensor, nn

from ..datasets.classes import describe_other_classes
from ..errors import CheckpointError, UsageError
from ..model_index import find_config
from ..requirements import require
from ..text import first_line, join
from ..weights.initialize import without_training
from ..weights.loading import find_classes, load_for_inference
from ..weights.safe_load import local_file
from ..weights.stored_config import config_from
from .distributions import distillation_loss, moved_distributions
from .rtdetr import RTDETR
from .targets import to_device


class Teacher:
    """A frozen module that is loaded when it is first asked for.

    Building a model with one neither reads a file nor draws a random number.

    Args:
        load: Makes the module.
    """

    def __init__(self, load: Callable[[], nn.Module]):
        self._load = load
        self._module = None

    def __deepcopy__(self, memo: dict) -> 'Teacher':
        return self

    def on(self, device: torch.device) -> nn.Module:
        """The module, on this device."""
        if self._module is None:
            with torch.random.fork_rng(devices=[]):
                self._module = self._load().eval().requires_grad_(False)
        return self._module.to(device)


def _check_file(checkpoint: str) -> None:
    if not local_file(checkpoint).expanduser().is_file():
        raise FileNotFoundError(f"the teacher's checkpoint {checkpoint} does not exist; point to "
                                'yours with --cfg-options '
                                'model.distillation.teacher.checkpoint=FILE')


def statistics(preprocessor: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (3, 1, 1) by which mmengine's preprocessor normalizes images."""
    return (getattr(preprocessor, 'mean', torch.zeros(3, 1, 1)),
            getattr(preprocessor, 'std', torch.ones(3, 1, 1)))


def as_seen_by(images: Tensor, preprocessor: nn.Module, mean: Tensor, std: Tensor) -> Tensor:
    """Normalize images anew.

    Args:
        images: (N, 3, H, W), as `preprocessor` gives them.
        preprocessor: The one that made them.
        mean: (3, 1, 1), of the channels' values from 0 to 255.
        std: (3, 1, 1), of the same.
    """
    given_mean, given_std, mean, std = (
        x.to(images.device, non_blocking=True) for x in (*statistics(preprocessor), mean, std))
    # Equal ones leave every bit as it is.
    return images * (given_std / std) + (given_mean - mean) / std


def with_group(selected: Mapping[str, Tensor], query: Tensor, reference: Tensor
               ) -> dict[str, Tensor]:
    """Put T queries before those of a decoder, as a group that sees itself alone, unseen by others.

    Args:
        selected: `query` (N, Q, C) and `reference` (N, Q, 4) of the decoder, and `attn_mask` (Q, Q)
            if there is one.
        query: (N, T, C).
        reference: (N, T, 4), logits of boxes (cx, cy, w, h).
    """
    mask = torch.ones((query.shape[1] + selected['query'].shape[1], ) * 2, dtype=torch.bool,
                      device=query.device)
    own, others = (slice(query.shape[1]), ) * 2, (slice(query.shape[1], None), ) * 2
    mask[own] = False
    mask[others] = selected.get('attn_mask', False)
    return dict(query=torch.cat([query.to(selected['query'].dtype), selected['query']], 1),
                reference=torch.cat([reference, selected['reference']], 1), attn_mask=mask)


@MODELS.register_module()
class FeatureDistillation(nn.Module):
    """Draws the map behind AIFI towards the tokens of a vision transformer of timm.

    Source: `RT-DETRv4 <https://github.com/RT-DETRs/RT-DETRv4>`_. A linear layer, which only the
    training has, gives the map the teacher's channels. The loss is the mean over the cells of 1 -
    the cosine of map and tokens. The teacher sees the picture so small that its patches are the
    map's cells: half as large for patches of 16 pixels, where bilinear resizing is the mean of 2x2
    pixels.

    Args:
        student: The detector, which hands itself in; its images are RGB.
        teacher: `model_name`, timm's; `checkpoint`, a local file with its weights, without which
            timm downloads them; and what else `timm.create_model` takes.
        channels: The teacher's width, such as 768 of a ViT-B.
        loss_weight: Factor of the loss; RT-DETRv4 has 5 for S and M, 15 for L, 20 for X. See also
            :class:`DistillationWeightHook`.

    Raises:
        ValueError: The student's neck has no AIFI.
    """

    def __init__(self, student: RTDETR, teacher: Mapping[str, Any], channels: int,
                 loss_weight: float = 5.):
        super().__init__()
        if not hasattr(student.neck, 'aifi'):
            raise ValueError(f'FeatureDistillation: the neck {type(student.neck).__name__} has no '
                             'AIFI, whose map is taught; use HybridEncoder or ELANEncoder')
        self.settings = dict(teacher)
        self.loss_weight = loss_weight
        self.project = nn.Linear(student.neck.embed_dims, channels)
        self.teacher = Teacher(self._load)

    def _load(self) -> nn.Module:
        """Build the teacher with its weights."""
        timm = require('timm', '1.0.4', 'timm')
        # With its classifier, since timm loads whatever fits where the number of classes differs.
        settings = dict(dynamic_img_size=True) | self.settings
        checkpoint = settings.pop('checkpoint', None)
        name = settings.get('model_name')
        if not timm.is_model(str(name)):
            raise UsageError(f'the teacher: timm {timm.__version__} has no model {name!r}; set '
                             'model.distillation.teacher.model_name to one of timm.list_models()')
        if checkpoint is not None:
            _check_file(checkpoint)
            settings['pretrained_cfg_overlay'] = dict(file=str(local_file(checkpoint).expanduser()))
        try:
            teacher = timm.create_model(**settings)
        except TypeError as error:
            raise UsageError(f'the teacher {name} is no vision transformer that takes all sizes, '
                             f'or takes no such argument: {first_line(error)}') from error
        if not hasattr(teacher, 'num_prefix_tokens') or not hasattr(teacher, 'patch_embed'):
            raise UsageError(f'the teacher {name} is no vision transformer but a '
                             f'{type(teacher).__name__}: FeatureDistillation needs tokens of '
                             'patches, such as those of vit_base_patch16_dinov3')
        try:
            return timm.create_model(**settings, pretrained=True)
        except Exception as error:  # whatever the Hub or torch says
            where = 'cannot be downloaded' if checkpoint is None else f'do not fit {checkpoint}'
            raise CheckpointError(
                f"the teacher: {name}'s weights {where}: {first_line(error)}. Point to a file "
                'with --cfg-options model.distillation.teacher.checkpoint=FILE') from error

    def prepare(self, student: RTDETR, classes: Sequence[str] | None = None) -> nn.Module:
        """Give the teacher, and check that it fits.

        Args:
            student: The detector.
            classes: Those of its training set, which this teacher doesn't know.

        Raises:
            FileNotFoundError: There is no checkpoint.
            CheckpointError: Its weights do not fit, or cannot be downloaded.
            UsageError: It is no vision transformer, or of another width.
        """
        teacher = self.teacher.on(student.memory_trans_fc.weight.device)
        if teacher.num_features != self.project.out_features:
            raise UsageError(f'the teacher {self.settings["model_name"]} has '
                             f'{teacher.num_features} channels, but model.distillation.channels is '
                             f'{self.project.out_features}: set it to {teacher.num_features}')
        return teacher

    @torch.no_grad()
    def teach(self, student: RTDETR, images: Tensor, cells: tuple[int, int]) -> Tensor:
        """The teacher's tokens (N, h * w, D) of images (N, 3, H, W) prepared for the student.

        Args:
            student: The detector.
            images: (N, 3, H, W).
            cells: (h, w) of the map.
        """
        teacher = self.prepare(student)
        mean, std = (255 * torch.tensor(teacher.pretrained_cfg[name]).view(3, 1, 1)
                     for name in ('mean', 'std'))
        sides = [number * side for number, side in zip(
            cells, teacher.patch_embed.patch_size, strict=True)]
        images = F.interpolate(as_seen_by(images, student.data_preprocessor, mean, std), sides,
                               mode='bilinear')
        return teacher.forward_features(images)[:, teacher.num_prefix_tokens:].float()

    def forward(self, student: RTDETR, images: Tensor, samples: SampleList) -> dict[str, Tensor]:
        """The student's losses, and `distill_loss`.

        Args:
            student: The detector, in training mode.
            images: (N, 3, H, W).
            samples: The images' ground truth.
        """
        feats, mixed = student.neck(student.backbone(images), with_mixed=True)
        losses = student.bbox_head.loss(
            **student.forward_transformer(feats, samples), batch_data_samples=samples)
        own = self.project(mixed.flatten(2).transpose(1, 2)).float()
        tokens = self.teach(student, images, mixed.shape[-2:])
        distance = 1 - F.cosine_similarity(own, tokens, dim=-1)
        return losses | dict(distill_loss=self.loss_weight * distance.mean())


@HOOKS.register_module()
class DistillationWeightHook(Hook):
    """Adapts the weight of :class:`FeatureDistillation` to AIFI's share of the gradient.

    After each epoch the mean share over its steps is compared with the wanted one, both of the sums
    of absolute values over all parameters. If it lies outside `share` +- `tolerance`, the weight is
    multiplied by the factor that would bring it to the nearer bound if all of AIFI's gradient grew
    with it, at most tenfold either way.

    NOTE: The official code reads the share on the first process alone, so that the others go on
    with other weights, and looks for names that only a distributed model has, so that on one GPU
    the share is always 0. Here it is the gradient that the optimizer sees, the mean of all
    processes.

    Args:
        share: The wanted share, 0 to 1; RT-DETRv4 has 0.11 for S, 0.035 for M, 0.02 for L and X.
        tolerance: RT-DETRv4 has 0.01, 0.0025, 0.001 and 0.0025.
        stop_epoch: The first epoch, from 0, with `final_weight`; None for none.
        final_weight: RT-DETRv4 has 20 for S and X, 15 for M and L.
    """

    def __init__(self, share: float, tolerance: float, stop_epoch: int | None = None,
                 final_weight: float = 20.):
        if not 0 < share - tolerance <= share + tolerance < 1:
            raise ValueError(f'DistillationWeightHook: share={share} and tolerance={tolerance} '
                             'must leave bounds within 0 and 1')
        self.share = share
        self.tolerance = tolerance
        self.stop_epoch = stop_epoch
        self.final_weight = final_weight
        self._weight: float | None = None
        self._total, self._steps = 0., 0

    def before_train(self, runner: Runner) -> None:
        """Listen to the optimizer's steps.

        Raises:
            UsageError: The model has no FeatureDistillation.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self._distillation = getattr(model, 'distillation', None)
        if not isinstance(self._distillation, FeatureDistillation):
            raise UsageError('DistillationWeightHook needs a model with '
                             "distillation=dict(type='FeatureDistillation', ...)")
        if self._weight is None:
            self._weight = self._distillation.loss_weight
        aifi, everything = [*model.neck.aifi.parameters()], [*model.parameters()]

        def measure(*_: Any) -> None:
            of_aifi, of_all = (sum(torch._foreach_norm(
                [x.grad for x in parameters if x.grad is not None], 1))
                for parameters in (aifi, everything))
            self._total = self._total + of_aifi / of_all
            self._steps += 1

        runner.optim_wrapper.optimizer.register_step_pre_hook(measure)

    def before_train_epoch(self, runner: Runner) -> None:
        """Set the weight."""
        if self.stop_epoch is not None and runner.epoch >= self.stop_epoch:
            self._weight = self.final_weight
        self._distillation.loss_weight = self._weight
        runner.message_hub.update_scalar('train/distill_weight', self._weight)

    def after_train_epoch(self, runner: Runner) -> None:
        """Adapt the weight, before a checkpoint is written."""
        if self._steps:
            share = float(reduce_mean(torch.as_tensor(self._total / self._steps)))
            self._weight *= self.factor(share)
        self._total, self._steps = 0., 0

    def factor(self, share: float) -> float:
        """What the weight is multiplied by if AIFI has this share of the gradient."""
        wanted = min(max(share, self.share - self.tolerance), self.share + self.tolerance)
        if share == wanted:
            return 1.
        odds = wanted * (1 - share) / max(share * (1 - wanted), 1e-12)
        return min(max(odds, 0.1), 10.)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Keep the weight, and what was measured of the epoch."""
        checkpoint['distillation_weight'] = dict(
            weight=self._weight, total=float(self._total), steps=self._steps)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Go on with it, in a training that is resumed."""
        state = checkpoint.get('distillation_weight')
        if runner._resume and state:
            self._weight, self._total, self._steps = state.values()


@MODELS.register_module()
class DetectorDistillation(nn.Module):
    """Lets a larger RT-DETR teach a smaller one by its own queries.

    Sources: the queries that both share are the points of `KD-DETR
    <https://arxiv.org/abs/2211.08071>`_, and `D3ETR <https://arxiv.org/abs/2211.09768>`_ runs the
    student with the teacher's; no matching is needed. Here they are one more group of the student's
    decoder. Each of its layers is trained towards the teacher's class probabilities, boxes and, if
    both have them, distributions of edges. A query counts as much as the teacher's highest
    probability; the sums are divided by those of all queries, the mean over the ranks.

    NOTE: Not measured by anybody on an RT-DETR. A teacher costs its forward pass, and a student a
    decoder with twice the queries.

    Args:
        student: The detector, which hands itself in.
        teacher: `checkpoint`, a local path or a URL, and `config`, a file or the name of a model;
            without, the config in the checkpoint. The classes must be the student's, and so must
            the decoder's `embed_dims`.
        loss_weight: Factor of all terms beside those of the head, whose own weights they have.
    """

    def __init__(self, student: RTDETR, teacher: Mapping[str, Any], loss_weight: float = 1.):
        super().__init__()
        unknown = set(teacher) - {'config', 'checkpoint'}
        if unknown or not teacher.get('checkpoint'):
            raise ValueError('DetectorDistillation: teacher takes a checkpoint and a config, but '
                             f'it has {join(sorted(teacher)) or "nothing"}')
        self.settings = dict(teacher)
        self.loss_weight = loss_weight
        self.teacher = Teacher(self._load)
        self._classes: Sequence[str] | None = None

    def _load(self) -> nn.Module:
        """Build the teacher in its deploy form."""
        checkpoint = self.settings['checkpoint']
        _check_file(checkpoint)
        config = self.settings.get('config')
        config = Config.fromfile(find_config(config)) if config else config_from(checkpoint)
        with DefaultScope.overwrite_default_scope(config.get('default_scope')):
            teacher = MODELS.build(without_training(config.model))
        if not isinstance(teacher, RTDETR):
            raise UsageError(f'the teacher {checkpoint} is a {type(teacher).__name__}; '
                             'DetectorDistillation needs an RTDETR')
        self._classes = find_classes(load_for_inference(teacher, checkpoint))
        teacher.switch_to_deploy()
        return teacher

    def prepare(self, student: RTDETR, classes: Sequence[str] | None = None) -> nn.Module:
        """Give the teacher, and check that it fits.

        Args:
            student: The detector.
            classes: Those of its training set, if known.

        Raises:
            FileNotFoundError: There is no checkpoint.
            CheckpointError: It is damaged, or does not fit its config.
            UsageError: Its model is none that can teach the student, or has other classes.
        """
        teacher = self.teacher.on(student.memory_trans_fc.weight.device)
        name = f'the teacher {self.settings["checkpoint"]}'
        for what, theirs, ours in (
                ('decoder.embed_dims', teacher.embed_dims, student.embed_dims),
                ('bbox_head.num_classes', teacher.bbox_head.num_classes,
                 student.bbox_head.num_classes)):
            if theirs != ours:
                raise UsageError(f'{name} has {what}={theirs}, but the model has {ours}: both must '
                                 'have the same; take another teacher, or change the model')
        if classes and self._classes and tuple(classes) != tuple(self._classes):
            raise UsageError(describe_other_classes(classes, 'the training set', self._classes,
                                                    name))
        return teacher

    @torch.no_grad()
    def teach(self, student: RTDETR, images: Tensor) -> tuple[dict, dict]:
        """What the teacher sees in images (N, 3, H, W) that were prepared for the student.

        Returns:
            Its decoder's `query` (N, T, C) and `reference` (N, T, 4); and what became of them:
            `logits` (N, T, classes) and `boxes` (N, T, 4) (cx, cy, w, h; 0 to 1), and if it has
            distributions their `corners` (N, T, 4 * (R + 1)), `base` (N, T, 4) and `reg_scale`.
        """
        teacher = self.prepare(student)
        preprocessor = teacher.data_preprocessor
        images = as_seen_by(images, student.data_preprocessor, *statistics(preprocessor))
        encoder_inputs, decoder_inputs = teacher.pre_transformer(teacher.extract_feat(images))
        selected, _ = teacher.pre_decoder(**teacher.forward_encoder(**encoder_inputs))
        decoded = teacher.forward_decoder(**decoder_inputs, **selected)
        [logits], [boxes] = teacher.bbox_head(**decoded)
        seen = dict(logits=logits, boxes=boxes.float())
        if 'corners' in decoded:
            seen |= dict(corners=decoded['corners'][-1], base=decoded['base_boxes'],
                         reg_scale=teacher.bbox_head.reg_scale)
        return selected, seen

    def forward(self, student: RTDETR, images: Tensor, samples: SampleList
                ) -> dict[str, Tensor]:
        """The student's losses, and those of the teacher's queries.

        Args:
            student: The detector, in training mode.
            images: (N, 3, H, W).
            samples: The images' ground truth.

        Returns:
            Those of the head, and with `distill_` in their names the others.
        """
        taught, seen = self.teach(student, images)
        encoder_inputs, decoder_inputs = student.pre_transformer(student.extract_feat(images))
        selected, head_inputs = student.pre_decoder(
            **student.forward_encoder(**encoder_inputs), batch_data_samples=samples)
        decoded = student.forward_decoder(**decoder_inputs, **with_group(selected, **taught))

        count = taught['query'].shape[1]
        group, own = ({
            name: [layer[:, part] for layer in value] if isinstance(value, list) else value[:, part]
            for name, value in decoded.items()} for part in (slice(count), slice(count, None)))
        losses = student.bbox_head.loss(**own, **head_inputs, batch_data_samples=samples)
        return losses | self.loss(student.bbox_head, group, **seen, size=images.shape[-2:])

    def loss(self, head: nn.Module, group: Mapping[str, Any], logits: Tensor, boxes: Tensor,
             size: tuple[int, int], corners: Tensor | None = None, base: Tensor | None = None,
             reg_scale: float | None = None) -> dict[str, Tensor]:
        """All terms of the teacher's queries.

        Args:
            head: The student's.
            group: What the student's decoder made of them.
            logits: What the teacher made of them, see :meth:`teach`.
            boxes: See there.
            size: (H, W) of the images.
            corners: See there.
            base: See there.
            reg_scale: See there.
        """
        own_logits, own_boxes = map(torch.stack, head(**group))
        own_boxes = own_boxes.float()  # (layers, N, T, 4)
        boxes = boxes.expand_as(own_boxes)
        scores = logits.sigmoid()
        weight = scores.amax(-1)
        # In pixels, as the head has it.
        scale = to_device(np.array(size[::-1] * 2, np.float32), boxes.device)
        pair = ((head.to_corners(each) * scale).flatten(0, 2) for each in (own_boxes, boxes))
        terms = dict(
            loss_cls=weight[..., None] * F.binary_cross_entropy_with_logits(
                own_logits, scores.expand_as(own_logits), reduction='none'),
            loss_bbox=weight[..., None] * head.loss_bbox(
                own_boxes, boxes, reduction_override='none'),
            loss_iou=weight * head.loss_iou(
                *pair, reduction_override='none').view(own_boxes.shape[:-1]))
        if corners is not None and 'corners' in group:
            taught = moved_distributions(corners, base, reg_scale, group['base_boxes'].detach(),
                                         head.reg_max, head.reg_scale, head.temperature)
            terms['loss_ddf'] = head.ddf_weight * weight * distillation_loss(
                torch.stack(group['corners']), taught, head.temperature).mean(-1)

        total = reduce_mean(weight.sum()).clamp(min=1) / self.loss_weight
        last = len(own_logits) - 1
        return head.sum_by_set(terms, total, {
            last: 'distill_', **{layer: f'd{layer}.distill_' for layer in range(last)}})
