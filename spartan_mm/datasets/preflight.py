"""A look at the data before a training begins, at what costs seconds."""

import logging
from collections.abc import Iterator
from typing import Any

from mmengine import dist
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..text import printable
from .check import Content, check_content, read_built
from .data_errors import DataError, Finding


@HOOKS.register_module()
class PreflightHook(Hook):
    """Stops a training whose images are missing, and sums up what it is about to learn.

    What annotation files say was checked when the datasets were loaded, and the classes of the
    heads are by ``ClassCountCheckHook``. Here the folders of the images are listed, without opening
    an image, and strange boxes and classes are counted; ``spartan-mm check-data`` says more, in
    the same words. The first process looks, and all stop together.
    """

    def before_train(self, runner: Runner) -> None:
        """Check the datasets of training and validation.

        Raises:
            DataError: Images are missing or empty.
        """
        message = [self._check(runner) if dist.is_main_process() else None]
        dist.broadcast_object_list(message)
        if message[0]:
            raise DataError(message[0])

    def _check(self, runner: Runner) -> str | None:
        """Log what is found; return the first error."""
        loaders = dict(train=runner.train_dataloader)
        if runner.val_loop is not None:
            loaders['val'] = runner.val_dataloader
        for split, loader in loaders.items():
            for dataset in _find_built(loader.dataset):
                content = read_built(dataset)
                if not content.infos:
                    continue
                findings = check_content(content, split != 'train')
                source = getattr(dataset, 'ann_file', '') or getattr(dataset, 'img_prefix', '')
                self._log(split, source, content, findings)
                for finding in findings:
                    if finding.level == 'error':
                        return f'{split}_dataloader: {source}: {finding.message}'
        return None

    @staticmethod
    def _log(split: str, source: str, content: Content, findings: list[Finding]) -> None:
        print_log(f'{split} data, {printable(source)}: {len(content.infos)} images, '
                  f'{content.count_objects().sum()} labels of {len(content.classes)} classes',
                  'current')
        for finding in findings:
            if finding.level != 'error':
                level = logging.WARNING if finding.level == 'warning' else logging.INFO
                print_log(f'{split} data, {finding.kind}: {finding.message}', 'current', level)


def _find_built(dataset: Any) -> Iterator[Any]:
    """Find the datasets inside wrappers, those that describe their images."""
    parts = getattr(dataset, 'datasets', None) or (
        [dataset.dataset] if hasattr(dataset, 'dataset') else [])
    if not parts and hasattr(dataset, 'get_data_info'):
        yield dataset
    for part in parts:
        yield from _find_built(part)
