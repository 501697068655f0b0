"""The comparison trains a detector both ways, and says what came of each."""

import argparse
import json
import runpy
import sys
from pathlib import Path

import pytest
from mmengine.config import DictAction

from spartan_mm import demo as steps
from spartan_mm.engine import launch

TOOL = Path(__file__).parents[2] / 'tools' / 'analysis_tools' / 'compare_pretraining.py'


@pytest.fixture
def compare(monkeypatch, tmp_path):
    """Run the command, with trainings that only leave a log; return their configs by work dir."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'classifier.pth').touch()
    configs = {}

    def run(self, name, arguments, show):
        assert name == 'train.py'
        parser = argparse.ArgumentParser()
        parser.add_argument('config')
        parser.add_argument('--seed', type=int)
        parser.add_argument('--work-dir', type=Path)
        parser.add_argument('--cfg-options', nargs='+', action=DictAction)
        args = parser.parse_args(arguments)
        config = launch.load_config(args.config, options=args.cfg_options)
        configs[args.work_dir.name] = config, args.seed
        records = [dict(lr=1e-3, loss=2., step=250, epoch=1)] + [
            {'coco/bbox_mAP': 0.1 * len(configs), 'coco/bbox_mAP_50': 0.5, 'step': 1}]
        log = args.work_dir / '20200101_120000' / 'vis_data' / 'scalars.json'
        log.parent.mkdir(parents=True)
        log.write_text(''.join(json.dumps(record) + '\n' for record in records))
        (args.work_dir / 'last_checkpoint').write_text('epoch_1.pth')

    monkeypatch.setattr(steps.Commands, 'run', run)

    def compare(*arguments):
        monkeypatch.setattr(sys, 'argv', [
            'compare.py', *arguments, '--work-dir', str(tmp_path / 'out'), '--data-root',
            str(tmp_path / 'digits'), '--num-train', '2', '--num-val', '1'])
        assert runpy.run_path(str(TOOL))['main']() == 0
        return configs

    return compare


@pytest.mark.slow
def test_both_ways(compare, tmp_path, capsys):
    configs = compare(str(tmp_path / 'classifier.pth'), '--seeds', '3', '4', '--epochs', '2',
                      '--cfg-options', 'train_dataloader.batch_size=2')
    assert list(configs) == ['scratch_seed3', 'pretrained_seed3', 'scratch_seed4',
                             'pretrained_seed4']
    assert [seed for _, seed in configs.values()] == [3, 3, 4, 4]

    (scratch, _), (pretrained, _) = configs['scratch_seed3'], configs['pretrained_seed3']
    assert scratch.model.backbone.get('init_cfg') is None
    assert pretrained.model.backbone.pop('init_cfg') == dict(
        type='CheckedPretrained', prefix='backbone.', checkpoint=str(tmp_path / 'classifier.pth'))
    # There is no other difference.
    for config in (scratch, pretrained):
        config.pop('work_dir')
    assert scratch.to_dict() == pretrained.to_dict()
    assert scratch.train_cfg.max_epochs == 2 and scratch.train_dataloader.batch_size == 2
    assert scratch.val_dataloader.dataset.data_root == str(tmp_path / 'digits')
    assert Path(scratch.val_evaluator.ann_file).is_file()

    output = capsys.readouterr().out
    assert '250 iterations each' in output
    assert '| from random weights | 3 | 1 | 0.100 | 0.500 |' in output
    assert "| from the classifier's backbone | 4 | 1 | 0.400 | 0.500 |" in output
    content = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert [entry['AP'] for entry in content['results']] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert (tmp_path / 'out' / 'curves.png').is_file()


def test_no_checkpoint(compare, capsys):
    with pytest.raises(SystemExit):
        compare('none.pth')
    assert 'none.pth does not exist' in capsys.readouterr().err
