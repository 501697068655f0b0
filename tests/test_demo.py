"""What the demos have in common: processes that end, and what is read from their output."""

import os
import re
import sys

import pytest

from spartan_mm.demo import (
    Console,
    Goal,
    TrainingProgress,
    judge,
    parse_progress,
    run_process,
)


def test_a_process_is_ended_with_the_demo(tmp_path):
    def interrupt(line):
        pids.append(int(line))
        raise KeyboardInterrupt

    pids = []
    command = [sys.executable, '-c', 'import os, time; print(os.getpid()); time.sleep(100)']
    with pytest.raises(KeyboardInterrupt):
        run_process(command, tmp_path / 'log', interrupt, Console())
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


PREFIX = '11/20 10:42:01 - mmengine - INFO - '


@pytest.mark.parametrize('line, expected', [
    ('Epoch(train)  [2][ 10/300]  base_lr: 1.0000e-05 lr: 1.0000e-05  eta: 1:02:03  time: 0.8291  '
     'memory: 3  loss: 25.6350  d0.loss_cls: 0.1',
     dict(mode='train', epoch=2, done=10, total=300, eta='1:02:03', loss='25.6350')),
    ('Epoch(train) [12][300/300]  lr: 1.0000e-05  eta: 2 days, 1:02:03  time: 0.8  loss: 2.6350',
     dict(mode='train', epoch=12, done=300, total=300, eta='2 days, 1:02:03', loss='2.6350')),
    ('Iter(train) [  10/4000]  lr: 1.0000e-05  eta: 0:02:03  time: 0.8291  loss: nan',
     dict(mode='train', epoch=None, done=10, total=4000, eta='0:02:03', loss='nan')),
    ('Epoch(val)  [1][13/13]    coco/bbox_mAP: 0.2570  coco/bbox_mAP_50: 0.3340  time: 0.63',
     dict(mode='val', epoch=1, done=13, total=13, eta=None, loss=None)),
    ('Epoch(test) [10/13]    eta: 0:00:02  time: 0.6747  data_time: 0.0337  ',
     dict(mode='test', epoch=None, done=10, total=13, eta='0:00:02', loss=None)),
])
def test_progress_in_a_line_of_mmengine(line, expected):
    progress = parse_progress(PREFIX + line + '\n')
    values = progress.pop('values')
    assert dict(progress, loss=values.get('loss')) == expected
    if expected['mode'] == 'val':
        assert values['coco/bbox_mAP'] == '0.2570' and values['coco/bbox_mAP_50'] == '0.3340'


@pytest.mark.parametrize('line', ['', 'Exp name: x', 'backbone.stem.weight - torch.Size([3, 3])'])
def test_other_lines(line):
    assert parse_progress(PREFIX + line) is None


def test_a_terminal_shows_progress_in_place(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
    config = tmp_path / 'config.py'
    config.write_text("custom_imports = dict(imports=['not.there'])\n"
                      'train_cfg = dict(max_epochs=4)')
    show = TrainingProgress(Console(), config, {'coco/bbox_mAP': 'AP', 'coco/bbox_mAP_50': 'AP50'})
    for line in ('Epoch(train)  [2][ 10/300]  lr: 1e-05  eta: 0:10:03  time: 0.82  loss: 9.5',
                 'a line of no interest',
                 'Epoch(val)  [2][10/13]    eta: 0:00:02  time: 0.67',
                 'Epoch(val)  [2][13/13]    coco/bbox_mAP: 0.25  coco/bbox_mAP_50: 0.33'):
        show(PREFIX + line)
    shown = [line.strip() for line in re.split('[\r\n]+', capsys.readouterr().out)]
    assert [line for line in shown if line] == [
        'epoch 2 of 4, iteration 10 of 300, loss 9.5, 0:10:03 of training left',
        'epoch 2 of 4, validation, batch 10 of 13',
        'epoch 2 of 4, loss 9.5: AP 0.25, AP50 0.33']


GOALS = (Goal('AP', 'coco/bbox_mAP', 0.30), Goal('top-1', 'accuracy/top1', 97, '.2f', ' %'))


@pytest.mark.parametrize('values, missing', [
    ((0.3, 97.), None),
    ((0.2996, 97.), 'AP 0.300, to be at least 0.300'),
    ((0.4, 96.994), 'top-1 96.99 %, to be at least 97.00 %'),
    ((float('nan'), 0.), 'AP nan, to be at least 0.300; top-1 0.00 %, to be at least 97.00 %'),
])
def test_goals(values, missing):
    assert judge(GOALS, values) == missing
