"""Exported files in the place of a checkpoint: ``spartan-mm test CONFIG FILE.onnx``."""
import json
import pickle
import tempfile
from pathlib import Path

import onnx
import pytest
from torch.testing import assert_close

from spartan_mm.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def in_project(user_project, monkeypatch):
    monkeypatch.chdir(user_project)


@pytest.fixture
def test(tmp_path, capfd):
    """Runs the command, which has to end with a status; gives predictions and what was printed."""
    def run(config, file, *flags, status=0):
        work = Path(tempfile.mkdtemp(dir=tmp_path))
        words = ['test', config, file, '--work-dir', work, '--out', work / 'out.pkl', *flags]
        try:
            found = main([str(word) for word in words])
        except SystemExit as stopped:
            found, message = 1, str(stopped.code)
            assert status == 1, message
            return message
        assert found == status
        printed = capfd.readouterr()
        if status:
            return printed.err.splitlines()[-1]
        metrics, = work.glob('*/*.json')
        figures = {name: value for name, value in json.loads(metrics.read_text()).items()
                   if 'time' not in name}
        return pickle.loads((work / 'out.pkl').read_bytes()), figures
    return run


@pytest.fixture
def altered(tmp_path):
    """Makes a copy of a file with other metadata."""
    def make(path, **changes):
        model = onnx.load(path)
        for entry in model.metadata_props:
            known = json.loads(entry.value)
            if entry.key in changes:
                entry.value = json.dumps(known | changes[entry.key] if isinstance(known, dict)
                                         else changes[entry.key])
        onnx.save(model, tmp_path / 'altered.onnx')
        return tmp_path / 'altered.onnx'
    return make


def test_a_detector_is_as_good_as_its_checkpoint(exported, test):
    given = exported('detector')
    (wanted, metrics), (found, others) = (test(given.config, file)
                                          for file in (given.checkpoint, given.path))
    assert others == pytest.approx(metrics, abs=1e-3)
    for one, other in zip(wanted, found, strict=True):
        one, other = one['pred_instances'], other['pred_instances']
        assert_close(other['scores'], one['scores'], rtol=1e-4, atol=1e-6)
        assert_close(other['bboxes'], one['bboxes'], rtol=0, atol=1e-2)
        assert (other['labels'] == one['labels']).all()


def test_a_classifier_is_as_good_as_its_checkpoint(exported, test):
    given = exported('classifier')
    (wanted, metrics), (found, others) = (test(given.config, file)
                                          for file in (given.checkpoint, given.path))
    assert others == metrics
    for one, other in zip(wanted, found, strict=True):
        assert_close(other['pred_score'], one['pred_score'], rtol=1e-4, atol=1e-6)
        assert other['pred_label'] == one['pred_label'] and other['gt_label'] == one['gt_label']


@pytest.mark.parametrize('task, classes', [
    ('detector', ['disc', 'square']), ('classifier', ['square', 'disc'])])
def test_classes_in_another_order(exported, test, altered, task, classes):
    given = exported(task)
    file = altered(given.path, classes=classes)
    assert f'the classes of {file} are not those of the test data' in test(
        given.config, file, status=1)
    swapped, same = (test(given.config, file, '--match-classes', how)[0]
                     for how in ('name', 'number'))
    for one, other in zip(swapped, same, strict=True):
        if task == 'classifier':
            assert_close(one['pred_score'].flip(0), other['pred_score'])
        else:
            assert (one['pred_instances']['labels'] == 1 - other['pred_instances']['labels']).all()
            assert_close(one['pred_instances']['scores'], other['pred_instances']['scores'])


def test_classes_that_the_data_do_not_have(exported, test, altered):
    given = exported('detector')
    file = altered(given.path, classes=['disc', 'cat'])
    assert "does not know 'square'" in test(given.config, file, '--match-classes', 'name', status=1)
    file = altered(given.path, classes=['disc', 'square', 'cat'])
    assert 'has 3 classes, the test data has 2' in test(
        given.config, file, '--match-classes', 'number', status=1)


def test_a_fixed_batch_of_one(exported, test, altered):
    given = exported('classifier')
    file = altered(given.path, input=dict(dynamic=[]))
    # Nor is there anything to compile.
    wanted, found = (test(given.config, path, '--cfg-options', 'compile=True')[0]
                     for path in (given.path, file))
    for one, other in zip(wanted, found, strict=True):
        assert_close(other['pred_score'], one['pred_score'], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('config, changes, flags, message, status', [
    ('detector', {}, ['--tta'], '--tta is for checkpoints: ', 2),
    ('detector', {}, ['--compile'], '--compile is for checkpoints: ', 2),
    ('classifier', {}, [], 'is for detection, and the config for classification: name', 2),
    ('detector', dict(raw=True), [], 'was exported with --raw', 2),
    ('detector', {}, ['--cfg-options', 'test_dataloader.dataset.pipeline.2.scale=(96,64)'],
     'takes images of 64x64 pixels, and the test pipeline of the config makes 64x96: name', 2)])
def test_what_does_not_fit(exported, test, altered, config, changes, flags, message, status):
    file = altered(exported('detector').path, **changes)
    assert message in test(exported(config).config, file, *flags, status=status)


def test_a_damaged_file(exported, test, tmp_path):
    file = tmp_path / 'damaged.onnx'
    file.write_bytes(b'no model')
    assert f'error: {file} cannot be loaded by onnxruntime' in test(
        exported('detector').config, file, status=1)
