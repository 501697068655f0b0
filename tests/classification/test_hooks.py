"""Two processes on CPU: batch norm statistics differ during an epoch and are averaged after it."""

import os
import subprocess
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.testing import assert_close

ROOT = Path(__file__).parents[2]

# A user's config outside the repository: a small model, small images, two classes.
CONFIG = """
_base_ = '{root}/configs/classification/spartan_xt_ema.py'
custom_imports = dict(imports=['spartan_mm.classification', 'record'])
model = dict(
    data_preprocessor=dict(num_classes=2),
    backbone=dict(_delete_=True, type='SpaRTAN', arch=dict(
        stem_channels=8, depths=(1, 1), channels=(8, 16), expand_ratios=(2, 2),
        conv_types=('full', 'depthwise')), out_indices=(1, )),
    head=dict(num_classes=2, in_channels=16))
train_pipeline = _base_.train_pipeline
train_pipeline[1].transforms[0].size = 32
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, pin_memory=False,
    dataset=dict(data_root='{data}', metainfo=dict(classes=('dark', 'bright')),
                 pipeline=train_pipeline))
val_dataloader = val_cfg = val_evaluator = None
train_cfg = dict(max_epochs=1)
default_hooks = dict(checkpoint=dict(save_best=None))
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='RecordHook', when='before', priority='HIGH'),
    dict(type='RecordHook', when='after', priority='LOW')]
"""

RECORD = """
import torch
from mmengine.dist import get_rank
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class RecordHook(Hook):
    def __init__(self, when):
        self.when = when

    def after_train_epoch(self, runner):
        average, = [hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook)]
        torch.save(dict(model=runner.model.module.state_dict(), average=average.state_dict()),
                   f'{runner.work_dir}/{self.when}{get_rank()}.pth')
"""


def test_two_processes_average_their_statistics(tmp_path):
    generator = np.random.default_rng(0)
    for label, name in enumerate(('dark', 'bright')):
        folder = tmp_path / 'data' / 'train' / name
        folder.mkdir(parents=True)
        for i in range(4):
            picture = generator.integers(128 * label, 128 * label + 128, (40, 48, 3), np.uint8)
            cv2.imwrite(str(folder / f'{i}.png'), picture)
    (tmp_path / 'own.py').write_text(CONFIG.format(root=ROOT, data=tmp_path / 'data'))
    (tmp_path / 'record.py').write_text(RECORD)
    work_dir = tmp_path / 'run'
    done = subprocess.run(
        ['bash', str(ROOT / 'tools' / 'dist_train.sh'), str(tmp_path / 'own.py'), '2',
         '--work-dir', str(work_dir)],
        env=os.environ | dict(PYTHONPATH=str(tmp_path), OMP_NUM_THREADS='1',
                             CUDA_VISIBLE_DEVICES=''),
        capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    before, after = ([torch.load(work_dir / f'{when}{rank}.pth') for rank in range(2)]
                     for when in ('before', 'after'))
    for which in ('model', 'average'):
        statistics = [name for name in before[0][which] if 'running_' in name]
        assert len(statistics) == 2 * (2 + 1 + 2 * 3)  # stem, embedding, three in each block
        for name in statistics:
            own = [states[which][name] for states in before]
            assert not torch.equal(*own), name
            for states in after:
                assert_close(states[which][name], (own[0] + own[1]) / 2, msg=name)
        # The rest is the same on both ranks anyway, and stays what it was.
        for name in before[0][which].keys() - set(statistics):
            for states in (before[1], *after):
                assert_close(states[which][name], before[0][which][name], rtol=0, atol=0)
