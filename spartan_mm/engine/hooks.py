"""Hooks of training and evaluation that need neither mmdet nor mmpretrain."""

from typing import Any

import torch
from mmengine import dist
from mmengine.config import Config
from mmengine.hooks import Hook, LoggerHook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..backbones.pyramid import probe
from ..datasets.classes import (
    classes_of,
    describe_class_count,
    describe_other_classes,
    find_heads,
    find_parts,
    name_dataset,
)
from ..datasets.data_errors import DataError
from ..errors import UsageError
from ..text import first_line
from ..weights.forms import switch_to_deploy
from ..weights.loading import REMEDY, find_meta, find_state_dict, load_all_weights
from ..weights.stored_config import find_test_dataset


@HOOKS.register_module()
class BackboneCheckHook(Hook):
    """Run the backbone on a black image before the run, of each size that the config has.

    Checked are models with a backbone and a neck that has ``in_channels``. The first process looks,
    and all stop together.
    """

    def before_train(self, runner: Runner) -> None:
        """Check the sizes of the test pipeline and of what resizes batches.

        Raises:
            UsageError: The backbone fails, or does not give what the neck takes.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        message, error = [None], None
        if dist.is_main_process():
            try:
                message = [_find_backbone_fault(model, runner.cfg)]
            except Exception as other:  # such as no memory; nobody waits for this process then
                message, error = [first_line(other)], other
        dist.broadcast_object_list(message)
        if message[0]:
            raise error or UsageError(message[0])

    before_test = before_train


def _find_backbone_fault(model: nn.Module, cfg: Config) -> str | None:
    neck = getattr(model, 'neck', None)
    if not isinstance(getattr(neck, 'in_channels', None), list | tuple):
        return None
    steps = find_test_dataset(cfg).get('pipeline') or ()
    scales = [step['scale'] for step in steps if isinstance(step.get('scale'), int | list | tuple)]
    # Width and height.
    sizes = [(scale, scale) if isinstance(scale, int) else (*scale[::-1],) for scale in scales]
    preprocessor = model.data_preprocessor
    for augment in getattr(preprocessor, 'batch_augments', None) or ():
        sizes.append(min(getattr(augment, 'sizes', None) or [sizes[-1] if sizes else (640, 640)]))
    divisor = getattr(preprocessor, 'pad_size_divisor', 1)
    channels = len(getattr(preprocessor, 'mean', 'RGB'))
    for sides in dict.fromkeys(sizes):
        try:
            probe(model.backbone, neck, (channels, *(-(-side // divisor) * divisor
                                                     for side in sides)))
        except UsageError as error:
            return str(error)
    return None


@HOOKS.register_module()
class ClassCountCheckHook(Hook):
    """Check before the run that the heads of the model have the classes of the datasets.

    Checked are the training, validation and test dataset, those that the run uses, against each
    module whose name ends in 'head' and that has ``num_classes`` (a region proposal head, which
    knows one class, apart); and the validation dataset against the training dataset, since equal
    numbers of different classes give no error but an AP near zero.

    NOTE: mmdet's ``NumClassCheckHook`` checks validation only after the first epoch of training,
    takes every module with ``num_classes`` for a head, and does not say what to change.
    """

    def before_train(self, runner: Runner) -> None:
        """Check the training dataset, already the validation dataset, and a teacher.

        Raises:
            DataError: The numbers of classes, or the classes of the two datasets, differ.
            UsageError: The teacher does not fit, or has other classes.
        """
        train = self._check(runner, 'train')
        val = None if runner.val_loop is None else self._check(runner, 'val')
        if None not in (train, val) and train != val:
            raise DataError(describe_other_classes(
                train, f'the dataset of {_name(runner.train_dataloader, "train")}',
                val, f'that of {_name(runner.val_dataloader, "val")}'))
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if distillation := getattr(model, 'distillation', None):
            distillation.prepare(model, train)

    def before_val(self, runner: Runner) -> None:
        """Check the validation dataset."""
        self._check(runner, 'val')

    def before_test(self, runner: Runner) -> None:
        """Check the test dataset."""
        self._check(runner, 'test')

    def _check(self, runner: Runner, split: str) -> tuple[str, ...] | None:
        """Compare the ``num_classes`` of each head with the classes of a dataset; return these."""
        loader = f'{split}_dataloader'
        dataset = getattr(runner, loader).dataset
        classes = classes_of(dataset, loader)
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        for head in find_heads(model) if classes is not None else ():
            if head.num_classes != len(classes):
                preprocessor = getattr(model, 'data_preprocessor', None)
                raise DataError(describe_class_count(
                    head, classes, loader, name_dataset(find_parts(dataset)[0]),
                    isinstance(getattr(preprocessor, 'num_classes', None), int)))
        return classes


@HOOKS.register_module()
class StrictCheckpointHook(Hook):
    """Stops a run whose checkpoint does not fit the model, where mmengine only warns."""

    #: What to do if it does not fit.
    remedy = REMEDY

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare the weights with the model's before the runner loads what fits.

        The model takes its deploy form first if the weights are of that form.

        The checkpoint's own are replaced by what was compared: a name that still has its prefix
        would fit nothing where other hooks load it, and leave random weights.

        Raises:
            CheckpointError: The checkpoint belongs to another architecture.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        name = runner._load_from or f'in {runner.work_dir}'
        checkpoint['state_dict'] = self.find_weights(runner, model, checkpoint, name)
        load_all_weights(model, checkpoint, name, self.remedy)

    def find_weights(self, runner: Runner, model: nn.Module, checkpoint: dict[str, Any],
                     name: str) -> dict[str, Tensor]:
        """Find the weights to load into a model, out of its wrapper."""
        if find_meta(checkpoint).get('deploy'):
            switch_to_deploy(model)
        return find_state_dict(checkpoint, name)


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Lay the model's weights out with the channels last before the run.

    Convolutions then keep their maps that way, too, which is faster on GPUs with tensor cores and
    on recent CPUs, in mixed precision above all.
    """

    def before_run(self, runner: Runner) -> None:
        """Change the layout, before a checkpoint is loaded and the optimizer takes a step."""
        runner.model.to(memory_format=torch.channels_last)


@HOOKS.register_module()
class OneWriterLoggerHook(LoggerHook):
    """Writes the metrics of a test from the first process alone.

    NOTE: with mmengine's hook every process writes the same file, and one that comes later may
    leave the end of a longer text behind its own.
    """

    @dist.master_only
    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Write the metrics to the log, and as JSON to ``runner.log_dir``."""
        super().after_test_epoch(runner, metrics)


def _name(loader: DataLoader, split: str) -> str:
    return f'{split}_dataloader, {name_dataset(find_parts(loader.dataset)[0])},'
