"""An exported file in the place of a config's model: ``spartan-mm test CONFIG FILE.onnx``.

The config's own data loader, test pipeline and evaluator do the rest.
"""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import nn

from ..datasets.classes import classes_of
from ..engine.class_order import Match, find_order
from ..errors import CheckpointError, UsageError
from ..runtime import Runtime
from ..text import count
from .pictures import to_rgb

TASKS = {'mmdet': 'detection', 'mmpretrain': 'classification'}


def use_exported(cfg: Config, path: str) -> None:
    """Put an exported file in the place of a config's model, changed in place.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'exported file {path} does not exist')
    cfg.model = dict(type='ExportedModel', path=path, task=TASKS.get(cfg.get('default_scope')))
    cfg.load_from, cfg.resume, cfg.compile = None, False, False


@MODELS.register_module()
class ExportedModel(nn.Module):
    """A file that was exported, for a runner's test loop.

    Args:
        path: The file, .onnx, .xml or .tflite; OpenVINO computes in the file's own precision.
        task: What the config is for, 'detection' or 'classification'.

    Raises:
        RuntimeFileError: The file cannot be run.
        UsageError: It is for the other task, or without post-processing.
    """

    def __init__(self, path: str, task: str) -> None:
        super().__init__()
        self.path = path
        self.runtime = Runtime(path)
        metadata = self.runtime.metadata
        if metadata['task'] != task:
            raise UsageError(f'{path} is for {metadata["task"]}, and the config for {task}: name '
                             'the config that it was exported of')
        if metadata['raw']:
            raise UsageError(f'{path} was exported with --raw, without what makes predictions of '
                             'its outputs: export it once more without')
        #: The file's own class for each class of the data; None for the same.
        self.order: list[int] | None = None

    def __deepcopy__(self, memo: dict) -> 'ExportedModel':
        # A moving average, which hooks make a copy for, has no weights to average.
        return self

    def test_step(self, data: dict[str, Any]) -> list[Any]:
        """Predict a batch of a test pipeline.

        Args:
            data: `inputs`, BGR bytes (3, H, W) each, and `data_samples`.

        Returns:
            The samples, with predictions.

        Raises:
            UsageError: Images are of a size that the file does not take, or no bytes.
        """
        images, samples = [*map(to_rgb, data['inputs'])], data['data_samples']
        described = self.runtime.metadata['input']
        for image in images:
            if 'size' not in described['dynamic'] and image.shape[1:] != tuple(described['size']):
                raise UsageError(
                    f'{self.path} takes images of {_sides(described["size"])} pixels, and the test '
                    f'pipeline of the config makes {_sides(image.shape[1:])}: name the config that '
                    f'it was exported of, or export it with --size {_sides(image.shape[1:])} or '
                    '--dynamic size')
        sizes = [sample.ori_shape[1::-1] for sample in samples]
        together = 'batch' in described['dynamic'] and len({each.shape for each in images}) == 1
        step = len(images) if together else 1
        for start in range(0, len(images), step):
            part = slice(start, start + step)
            found = self.runtime.run(np.stack(images[part]), np.array(sizes[part], np.int64))
            for place, sample in enumerate(samples[part]):
                self._fill(sample, {name: torch.from_numpy(np.asarray(values[place]))
                                    for name, values in found.items()})
        return samples

    def _fill(self, sample: Any, found: dict[str, torch.Tensor]) -> None:
        """Write predictions into a sample, in the order of the data's classes."""
        if 'boxes' not in found:
            scores = found['scores']
            if self.order is not None:
                scores = scores[self.order] / scores[self.order].sum()
            sample.set_pred_score(scores).set_pred_label(scores.argmax(0, keepdim=True))
            return
        # As mmdet's data preprocessors do it, before samples are drawn.
        from mmdet.models.utils.misc import samplelist_boxtype2tensor
        samplelist_boxtype2tensor([sample])
        labels = found['labels'].long()
        known = torch.ones_like(labels, dtype=torch.bool)
        if self.order is not None:
            match = labels[:, None] == torch.tensor(self.order)
            known, labels = match.any(1), match.int().argmax(1)
        sample.pred_instances = InstanceData(
            bboxes=found['boxes'][known], labels=labels[known], scores=found['scores'][known])


class ExportedClassesHook(Hook):
    """Stops a test on other classes than the file's, or puts these in their order.

    Args:
        match: What to do instead of stopping, see :data:`Match`.
    """

    def __init__(self, match: Match = None) -> None:
        self.match = match

    def before_test(self, runner: Runner) -> None:
        """Compare the classes.

        Raises:
            CheckpointError: They differ, or cannot be matched.
        """
        model = runner.model
        theirs = model.runtime.metadata['classes']
        ours = classes_of(runner.test_dataloader.dataset, 'test_dataloader')
        model.order = find_order(theirs, ours, model.path, 'the test data', self.match)
        if model.order is None and None not in (theirs, ours) and len(theirs) != len(ours):
            raise CheckpointError(f'{model.path} has {count(len(theirs), "class")}, the test data '
                                  f'has {len(ours)}: they cannot be matched by number')


def _sides(shape: Sequence[int]) -> str:
    return 'x'.join(map(str, shape))
