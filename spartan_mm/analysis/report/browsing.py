"""Samples of a dataset: as they are, after the pipeline, and as they enter the model."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, FUNCTIONS, MODELS, DefaultScope
from mmengine.runner import set_random_seed
from PIL import Image

from ...drawing import add_caption, arrange, class_name, open_image, resize
from ...errors import UsageError
from ...weights.initialize import without_pretrained
from ..mistakes.pictures import draw_truth
from ..mistakes.predictions import Truth, read_truth

#: How far a sample has come: as it is on the disk; after the dataset's pipeline; after the model's
#: data preprocessor too, which mixes images or gives the whole batch another size in training.
STAGES = ('original', 'pipeline', 'model')


@dataclass
class View:
    """A sample as it is at a stage.

    Args:
        image: The picture.
        name: What to call it: its file.
        truth: The objects in it; None for a classifier.
        shares: Of a classifier's picture, class indices with their shares of the label, the largest
            first.
    """

    image: Image.Image
    name: str
    truth: Truth | None = None
    shares: Sequence[tuple[int, float]] = ()


def browse(config: Config, stages: Sequence[str] = STAGES, number: int = 16, seed: int = 0,
           split: str = 'train') -> tuple[tuple[str, ...], dict[str, list[View]]]:
    """Draw samples at random and follow them.

    At the stage 'model' they make batches of the config's size, as far as there are enough, and
    colours are mapped back from what the model gets. Images are taken to be in the order of mmcv's
    loaders, BGR, before they enter the data preprocessor.

    Args:
        config: Of a detector or a classifier.
        stages: Which of ``STAGES``.
        number: How many samples; of a smaller dataset, all.
        seed: Of the choice and the augmentation.
        split: 'train', 'val' or 'test'; only 'train' is augmented by the data preprocessor.

    Returns:
        Names by class index; the samples, in the same order at each stage, by stage.

    Raises:
        UsageError: There is no such stage, the config has no dataset for ``split``, or it is empty,
            or the pipeline does not pack what a model takes.
        DataError: The dataset is not what it should be.
        FileNotFoundError: Something of the dataset is missing.
    """
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise UsageError(f'there is no stage {unknown[0]!r}; choose of {", ".join(STAGES)}')
    loader = config.get(f'{split}_dataloader')
    if not loader:
        raise UsageError(f'the config has no {split}_dataloader')
    with DefaultScope.overwrite_default_scope(config.get('default_scope') or 'mmengine'):
        dataset = DATASETS.build(loader['dataset'])
        if not len(dataset):
            raise UsageError(f'the dataset of {split}_dataloader is empty')
        chosen = np.random.default_rng(seed).permutation(len(dataset))[:number].tolist()
        views: dict[str, list[View]] = {}
        if 'original' in stages:
            views['original'] = [_view_original(dataset.get_data_info(index)) for index in chosen]
        if {'pipeline', 'model'} & set(stages):
            set_random_seed(seed)
            packed = [_take(dataset, index) for index in chosen]
            if 'pipeline' in stages:
                views['pipeline'] = [_view(item['inputs'], item['data_samples'], bgr=True)
                                     for item in packed]
            if 'model' in stages:
                views['model'] = _view_batches(config, loader, packed, split == 'train')
    classes = tuple(getattr(dataset, 'metainfo', {}).get('classes') or ())
    return classes, {stage: views[stage] for stage in stages}


def draw_views(views: Sequence[View], classes: Sequence[str], columns: int = 4, side: int = 320
               ) -> Image.Image:
    """Draw samples with their boxes or labels on a sheet.

    Args:
        views: The samples.
        classes: Names by class index.
        columns: Pictures side by side.
        side: The longer side of each picture, in pixels; each has its true size in its caption.

    Returns:
        The sheet; its ``save`` writes it.
    """
    panels = []
    for view in views:
        lines = [f'{view.name}, {view.image.width} × {view.image.height}']
        if view.truth is None:
            picture = resize(view.image, side, coarse=True)
            lines.insert(0, _describe(view.shares, classes))
        else:
            picture = draw_truth(view.image, view.truth, classes, side)
        panels.append(add_caption(picture, *lines, width=side))
    return arrange(panels, columns)


def _view_original(info: Mapping[str, Any]) -> View:
    """View what a dataset says of a sample, without its pipeline."""
    if 'img_path' in info:
        image, name = open_image(info['img_path']), Path(info['img_path']).name
    else:
        image, name = Image.fromarray(info['img']), 'no file'
    if 'instances' in info:
        return View(image, name, read_truth(info))
    return View(image, name, shares=_share(info.get('gt_label')))


def _take(dataset: Any, index: int) -> dict[str, Any]:
    try:
        item = dataset[index]
    except OSError as error:
        raise UsageError(str(error)) from error
    if not isinstance(item, Mapping) or not {'inputs', 'data_samples'} <= set(item):
        raise UsageError("the dataset's pipeline must end in PackDetInputs or PackInputs, which "
                         'pack inputs and data_samples')
    return dict(item)


def _view_batches(config: Config, loader: Mapping[str, Any], packed: list[dict[str, Any]],
                  training: bool) -> list[View]:
    """View samples after the data preprocessor, batch by batch."""
    settings = without_pretrained(config.model)
    if config.get('data_preprocessor'):
        settings.setdefault('data_preprocessor', config.data_preprocessor)
    # The whole model, because models add to what the config says of the preprocessor.
    preprocessor = MODELS.build(settings).data_preprocessor
    # mmpretrain's name, and that of mmengine's, which mmdet's builds on.
    swapped = getattr(preprocessor, 'to_rgb', getattr(preprocessor, '_channel_conversion', False))
    collate = FUNCTIONS.get((loader.get('collate_fn') or dict(type='pseudo_collate'))['type'])
    number = -(-len(packed) // loader['batch_size'])
    views = []
    # Samples that batches share are changed in place.
    for places in np.array_split(np.arange(len(packed)), number):
        batch = collate([copy.deepcopy(packed[place]) for place in places])
        batch = preprocessor(batch, training)
        images = batch['inputs']
        if getattr(preprocessor, '_enable_normalize', False):
            images = images * preprocessor.std + preprocessor.mean
        views += [_view(image, sample, bgr=not swapped)
                  for image, sample in zip(images, batch['data_samples'], strict=True)]
    return views


def _view(image: torch.Tensor, sample: Any, bgr: bool) -> View:
    """View an image (C, H, W), from 0 to 255, with its sample of mmdet or mmpretrain."""
    pixels = image.detach().float().round().clamp(0, 255).byte()
    pixels = pixels.expand(3, -1, -1).permute(1, 2, 0).numpy()
    picture = Image.fromarray(np.ascontiguousarray(pixels[..., ::-1] if bgr else pixels))
    name = Path(sample.get('img_path') or 'no file').name
    if 'gt_instances' not in sample:
        return View(picture, name, shares=_share(sample.get('gt_label'), sample.get('gt_score')))
    (boxes, labels), (crowds, crowd_labels) = map(
        _take_boxes, (sample.gt_instances, sample.get('ignored_instances', {})))
    return View(picture, name, Truth(
        np.concatenate([boxes, crowds]), np.concatenate([labels, crowd_labels]),
        np.arange(len(boxes) + len(crowds)) >= len(boxes)))


def _take_boxes(instances: Any) -> tuple[np.ndarray, np.ndarray]:
    """Take boxes (N, 4) and labels (N,) out of mmengine's ``InstanceData``."""
    boxes = instances.get('bboxes', torch.zeros(0, 4))
    # mmdet's box structures hold a tensor.
    boxes = torch.as_tensor(getattr(boxes, 'tensor', boxes))
    labels = torch.as_tensor(instances.get('labels', torch.zeros(0)))
    return boxes.numpy().reshape(-1, 4).astype(float), labels.numpy().astype(int)


def _share(labels: Any, scores: Any = None) -> list[tuple[int, float]]:
    """List classes with their shares of a label, the largest first."""
    if scores is not None:
        values, order = torch.as_tensor(scores).sort(descending=True, stable=True)
        return [(int(label), float(value)) for label, value in zip(order, values, strict=True)
                if value > 0]
    return [] if labels is None else [(int(label), 1.) for label in np.ravel(labels)]


def _describe(shares: Sequence[tuple[int, float]], classes: Sequence[str]) -> str:
    # Of several names of a class, the first.
    names = [class_name(classes, label).split(',')[0] for label, _ in shares]
    if len(names) == 1:
        return names[0]
    return ' + '.join(f'{name} ({100 * share:.0f} %)'
                      for name, (_, share) in zip(names, shares, strict=True)) or 'no label'
