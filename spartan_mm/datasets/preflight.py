"""A look at the data before a training begins, at what costs seconds."""

import logging

from mmengine import dist
from mmengine.dataset import InfiniteSampler
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from ..text import count, printable
from .check import Content, check_content, read_built
from .classes import find_parts, name_dataset
from .data_errors import DataError, Finding
from .settings import NO_IMAGES


@HOOKS.register_module()
class PreflightHook(Hook):
    """Stops a training whose images are missing, and sums up what it is about to learn.

    A test or validation without a batch is stopped, too.

    What annotation files say was checked when the datasets were loaded, and the classes of the
    heads are by ``ClassCountCheckHook``. Here the folders of the images are listed, without opening
    an image, and strange boxes and classes are counted; ``spartan-mm check-data`` says more, in
    the same words. The first process looks, and all stop together.
    """

    def before_train(self, runner: Runner) -> None:
        """Check the datasets of training and validation.

        Raises:
            DataError: Images are missing or empty, or there is no batch to validate on.
        """
        if runner.val_loop is not None:
            check_batches(runner.val_dataloader, 'val')
        unit = 'iter' if isinstance(runner.train_loop, IterBasedTrainLoop) else 'epoch'
        done, last = getattr(runner, unit), getattr(runner, f'max_{unit}s')
        if done >= last:
            print_log(f'nothing is left to do: {unit} {done} of {last} is done; to go on, set '
                      f'train_cfg.max_{unit}s higher', 'current', logging.WARNING)
        message = [self._check(runner) if dist.is_main_process() else None]
        dist.broadcast_object_list(message)
        if message[0]:
            raise DataError(message[0])

    def before_test(self, runner: Runner) -> None:
        """Check that there is something to test on.

        Raises:
            DataError: There is nothing.
        """
        check_batches(runner.test_dataloader, 'test')

    def _check(self, runner: Runner) -> str | None:
        """Log what is found; return the first error."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        queries = getattr(model, 'num_queries', None)
        loaders = dict(train=runner.train_dataloader)
        if runner.val_loop is not None:
            loaders['val'] = runner.val_dataloader
        for split, loader in loaders.items():
            for dataset in find_parts(loader.dataset):
                if not hasattr(dataset, 'get_data_info'):
                    continue
                content = read_built(dataset)
                if not content.infos:
                    continue
                findings = check_content(content, split != 'train', queries)
                name = name_dataset(dataset)
                self._log(split, name, content, findings)
                for finding in findings:
                    if finding.level == 'error':
                        return f'{split}_dataloader: {name}: {finding.message}'
        return None

    @staticmethod
    def _log(split: str, name: str, content: Content, findings: list[Finding]) -> None:
        print_log(f'{split} data, {printable(name)}: {len(content.infos)} images, '
                  f'{content.count_objects().sum()} labels of {len(content.classes)} classes',
                  'current')
        for finding in findings:
            if finding.level != 'error':
                level = logging.WARNING if finding.level == 'warning' else logging.INFO
                print_log(f'{split} data, {finding.kind}: {finding.message}', 'current', level)


def check_batches(loader: DataLoader, split: str) -> None:
    """Check that a data loader gives a batch.

    Args:
        loader: The data loader.
        split: What it is for: 'train', 'val' or 'test'.

    Raises:
        DataError: It gives none.
    """
    try:
        batches, images = len(loader), len(loader.dataset)
    except TypeError:
        return  # one of an iterable dataset, which knows no length
    if batches or images and isinstance(loader.sampler, InfiniteSampler):
        return  # one without an end fills a batch from few images, too
    name = f'{split}_dataloader'
    if not images:
        raise DataError(f'{name} {NO_IMAGES}')
    size, drop_last = (getattr(loader.batch_sampler, key, None) for key in (
        'batch_size', 'drop_last'))
    share = '' if dist.get_world_size() == 1 else f' in each of {dist.get_world_size()} processes'
    if drop_last:
        raise DataError(f'{name} gives no batch: it has {count(images, "image")}, too few for one '
                        f'of batch_size={size}{share}, and drop_last=True leaves out what is no '
                        f'whole batch; set {name}.batch_size lower, or {name}.drop_last=False')
    raise DataError(f'{name} gives no batch: its sampler, {type(loader.sampler).__name__}, takes '
                    f'none of {count(images, "image")}')
