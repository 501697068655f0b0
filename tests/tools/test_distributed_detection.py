"""Two processes on CPU train the digits config: finite losses, equal weights."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from soak import Command
from torch.testing import assert_close

import spartan_mm.detection  # noqa: F401 - for the forks
from spartan_mm.datasets import make_digits

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow

# A user's config outside the repository, with a hook of their own.
CONFIG = """
_base_ = '{root}/configs/detection/rtdetr_spartan_xt_digits.py'
custom_imports = dict(imports=['spartan_mm.detection', 'rank_weights'])
custom_hooks = [dict(type='RankWeightsHook')]
train_cfg = dict(max_epochs=1, val_interval=9)
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(data_root='{data}', allow_no_objects=True))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root='{data}'))
val_evaluator = dict(ann_file='{data}/annotations/val.json')
default_hooks = dict(logger=dict(interval=1))
model = {model}
"""

VARIFOCAL, MATCHABILITY = (dict(bbox_head=dict(loss_cls=dict(_delete_=True, type=name)))
                           for name in ('IoUAwareVarifocalLoss', 'MatchabilityAwareLoss'))
DISTRIBUTIONS = dict(decoder=dict(type='DFINEDecoder', gate=False, project_values=True),
                     bbox_head=dict(type='DFINEHead'))

HOOK = """
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class RankWeightsHook(Hook):
    def after_train(self, runner):
        model = runner.model.module
        weights = dict(start=runner.start_weights, end=dict(model.named_parameters()))
        torch.save(weights, f'{runner.work_dir}/rank{get_rank()}.pth')

    def before_train(self, runner):
        runner.start_weights = {name: weight.detach().clone()
                                for name, weight in runner.model.module.named_parameters()}
"""


def two_ranks_see(which, path):
    """Leave 8 pictures, of which none, every second one (rank 1's) or all are without objects."""
    content = json.loads(path.read_text())
    with_objects = {entry['image_id'] for entry in content['annotations']}
    images = [image for image in content['images'] if image['id'] in with_objects][:8]
    emptied = {'no': [], 'second': images[1::2], 'all': images}[which]
    emptied_ids = {image['id'] for image in emptied}
    content['images'] = images
    content['annotations'] = [entry for entry in content['annotations']
                              if entry['image_id'] in {image['id'] for image in images}
                              and entry['image_id'] not in emptied_ids]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize('empty, as_users, model, num_terms', [
    ('no', False, VARIFOCAL, 21), ('all', False, MATCHABILITY, 21),
    # The launcher takes much longer.
    ('second', True, MATCHABILITY, 21), ('second', False, DISTRIBUTIONS, 37)])
def test_two_processes(tmp_path, empty, as_users, model, num_terms):
    data = make_digits(tmp_path / 'digits', 12, 2, progress=False).root
    two_ranks_see(empty, data / 'annotations' / 'train.json')
    (tmp_path / 'own.py').write_text(CONFIG.format(root=ROOT, data=data, model=model))
    (tmp_path / 'rank_weights.py').write_text(HOOK)
    work_dir = tmp_path / 'run'
    arguments = [str(tmp_path / 'own.py'), '--work-dir', str(work_dir)]
    if as_users:
        arguments.insert(1, '2')
        done = subprocess.run(
            ['bash', str(ROOT / 'tools' / 'dist_train.sh'), *arguments],
            env=os.environ | dict(PYTHON=sys.executable, OMP_NUM_THREADS='1',
                                  PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]),
                                  CUDA_VISIBLE_DEVICES=''),
            capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    else:
        command = Command(ROOT / 'tools' / 'train.py', arguments, tmp_path / 'output.log', 2,
                          lambda rank: sys.path.insert(0, str(tmp_path)))
        command.start()
        for outcome in command.wait():
            assert outcome.status == 0, outcome.output[-3000:]
        print(outcome.output)  # shown if what follows fails

    logs = [json.loads(line) for path in work_dir.glob('*/vis_data/scalars.json')
            for line in path.read_text().splitlines() if '"loss"' in line]
    assert len(logs) == 2  # 8 pictures, 2 ranks, 2 a batch
    for log in logs:
        assert sum('loss_' in name for name in log) == num_terms
        assert all(torch.tensor(float(value)).isfinite() for name, value in log.items()
                   if 'loss' in name)

    first, second = (torch.load(work_dir / f'rank{rank}.pth', weights_only=True)
                     for rank in range(2))
    assert_close(first['end'], second['end'], rtol=0, atol=0)
    moved = [name for name, weight in first['end'].items()
             if not torch.equal(weight, first['start'][name])]
    assert len(moved) > 0.9 * len(first['end'])
