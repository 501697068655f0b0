"""Pipelines change with the epochs, wherever a training begins."""
from types import SimpleNamespace

import pytest
from mmdet.datasets import CocoDataset
from mmengine.dataset import ConcatDataset
from mmengine.logging import MMLogger
from torch.utils.data import DataLoader

from spartan_mm.detection import CheckedPipelineSwitchHook
from spartan_mm.engine.data_order import place_batches

STAGES = {0: [dict(type='LoadImageFromFile')], 2: [dict(type='FilterSmallBoxes')],
          3: [dict(type='LoadImageFromFile'), dict(type='PackDetInputs')]}


class Marked(CocoDataset):
    """Its items are the names of the pipeline's steps."""

    def __init__(self):
        super().__init__(ann_file='', lazy_init=True, pipeline=STAGES[0])

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return ' '.join(type(step).__name__ for step in self.pipeline.transforms)


@pytest.mark.parametrize('begin', range(5))
@pytest.mark.parametrize('joined', [False, True])
def test_stages_of_a_training_that_begins_anywhere(begin, joined):
    dataset = Marked()
    if joined:
        dataset = ConcatDataset([Marked(), Marked()], lazy_init=True)
        dataset.__class__ = type('Joined', (ConcatDataset, ), dict(
            __len__=lambda self: 4, __getitem__=lambda self, i: self.datasets[i % 2][i]))
    loader = DataLoader(dataset, num_workers=1, persistent_workers=True)
    place_batches(loader, 0)
    hooks = [CheckedPipelineSwitchHook(epoch, STAGES[epoch]) for epoch in (2, 3)]
    runner = SimpleNamespace(train_dataloader=loader,
                             logger=MMLogger.get_instance('test_hooks', log_level='ERROR'))
    for epoch in range(begin, 5):
        runner.epoch = epoch
        for hook in hooks:
            hook.before_train_epoch(runner)
        expected = ('LoadImageFromFile' if epoch < 2 else 'FilterSmallBoxes' if epoch == 2 else
                    'LoadCheckedImage PackDetInputs')
        assert {name for batch in loader for name in batch} == {expected}
