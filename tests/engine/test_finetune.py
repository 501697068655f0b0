"""A training starts from a checkpoint with other classes: by name, and with a table."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from torch.testing import assert_close

from spartan_mm.cli import main
from spartan_mm.engine.finetune import (
    Change,
    FineTuneHook,
    Rows,
    describe,
    find_rows,
    fit_classes,
    match_classes,
)
from spartan_mm.errors import CheckpointError
from spartan_mm.weights.publish import publish
from spartan_mm.weights.safe_load import read_checkpoint

DATA = Path(__file__).resolve().parents[1] / 'data'
NEW = ('disc', 'square', 'star')


def make(task, num_classes):
    """A user's config and a model of it, whose weights tell every row."""
    config = Config.fromfile(DATA / f'user_{task}.py')
    head = 'head' if task == 'classifier' else 'bbox_head'
    config.merge_from_dict({f'model.{head}.num_classes': num_classes})
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(config.model)
    for value in model.state_dict().values():
        value.copy_(torch.rand(value.shape))
    return config, model


def load(task, old_classes, new_classes, old_count=None, new_count=None, **state):
    """Load a checkpoint of some classes into a model of others, as the runner does it.

    Returns:
        The weights of the checkpoint, those of the model before, and those after.
    """
    _, source = make(task, old_count or len(old_classes))
    config, target = make(task, new_count or len(new_classes))
    meta = dict(dataset_meta=dict(classes=old_classes)) if old_classes else {}
    before = {name: value.clone() for name, value in target.state_dict().items()}
    metainfo = dict(classes=new_classes) if new_classes else {}
    runner = SimpleNamespace(
        model=target, cfg=config, _resume=False, _load_from='old.pth', work_dir='.',
        train_dataloader=SimpleNamespace(dataset=SimpleNamespace(metainfo=metainfo)), **state)
    checkpoint = dict(meta=meta, state_dict=dict(source.state_dict()))
    init_default_scope(config.default_scope)
    FineTuneHook().after_load_checkpoint(runner, checkpoint)
    # What mmengine and the moving average load next is the same.
    assert_close(checkpoint['state_dict'], dict(target.state_dict()), rtol=0, atol=0)
    return source.state_dict(), before, target.state_dict()


DETECTOR_ROWS = (*(f'bbox_head.cls_branches.{i}.{kind}' for i in range(3)
                   for kind in ('weight', 'bias')), 'dn_query_generator.label_embedding.weight')
CLASSIFIER_ROWS = ('head.fc.weight', 'head.fc.bias')
TASKS = pytest.mark.parametrize('task, rows', [('detector', DETECTOR_ROWS),
                                               ('classifier', CLASSIFIER_ROWS)])


@TASKS
@pytest.mark.parametrize('old, new, pairs', [
    (('square', 'disc'), NEW, [(0, 1), (1, 0)]),
    (NEW, ('star', 'square'), [(2, 0), (1, 1)]),
    (('square', 'disc', 'star'), NEW, [(0, 1), (1, 0), (2, 2)]),
    (('square', 'disc'), ('a', 'b'), []),
], ids=['more', 'fewer', 'permuted', 'none in common'])
def test_rows_follow_the_names(task, rows, old, new, pairs):
    theirs, before, after = load(task, old, new)
    for name, value in after.items():
        if name not in rows:
            assert_close(value, theirs[name], rtol=0, atol=0)
            continue
        kept = dict((index, number) for number, index in pairs)
        for index in range(len(new)):
            expected = theirs[name][kept[index]] if index in kept else before[name][index]
            assert_close(value[index], expected, rtol=0, atol=0)
        # The row of the padding.
        assert_close(value[len(new):], theirs[name][len(old):], rtol=0, atol=0)


@TASKS
@pytest.mark.parametrize('old, new, counts', [
    (None, NEW, (3, 3)), (NEW, None, (3, 3)), (None, NEW, (5, 3)),
    (('wrong', 'count'), NEW, (5, 3)),
])
def test_without_names_the_number_decides(task, rows, old, new, counts):
    theirs, before, after = load(task, old, new, *counts)
    for name in rows:
        expected = theirs[name] if counts[0] == counts[1] else before[name]
        assert_close(after[name][:3], expected[:3], rtol=0, atol=0)


def test_coco_to_mine_and_back():
    names = tuple(f'class {i}' for i in range(80))
    theirs, _, after = load('detector', names, ('mine', 'class 7'))
    name = 'bbox_head.cls_branches.2.weight'
    assert_close(after[name][1], theirs[name][7], rtol=0, atol=0)
    theirs, before, after = load('detector', ('mine', 'class 7'), names)
    assert_close(after[name][7], theirs[name][1], rtol=0, atol=0)
    assert_close(after[name][8:], before[name][8:], rtol=0, atol=0)


@pytest.mark.parametrize('change, message', [
    (lambda state: state.pop('memory_trans_fc.weight'), '1 key is missing'),
    (lambda state: state.update(other=torch.ones(1)), 'unknown to the model'),
    (lambda state: state.update({'bbox_head.cls_branches.0.weight': torch.ones(2, 64)}),
     'another shape'),
    (lambda state: state.update({'memory_trans_fc.bias': torch.ones(64)}), 'another shape'),
])
def test_another_architecture_stops(change, message):
    _, source = make('detector', 2)
    config, target = make('detector', 3)
    state = dict(source.state_dict())
    change(state)
    runner = SimpleNamespace(
        model=target, cfg=config, _resume=False, _load_from='old.pth', work_dir='.',
        train_dataloader=SimpleNamespace(dataset=SimpleNamespace(metainfo={})))
    init_default_scope('mmdet')
    with pytest.raises(CheckpointError, match=f'{message}.*init_cfg=dict'):
        FineTuneHook().after_load_checkpoint(runner, dict(state_dict=state))


def test_a_resumed_training_has_the_same_classes():
    _, source = make('classifier', 2)
    config, target = make('classifier', 3)
    runner = SimpleNamespace(model=target, cfg=config, _resume=True, _load_from='old.pth')
    with pytest.raises(CheckpointError, match='2 keys are of another shape'):
        FineTuneHook().after_load_checkpoint(runner, dict(state_dict=dict(source.state_dict())))


def test_a_deployed_model_is_not_trained():
    runner = SimpleNamespace(model=torch.nn.Linear(1, 1), _resume=False, _load_from='old.pth')
    with pytest.raises(CheckpointError, match='old.pth is of the deploy form'):
        FineTuneHook().after_load_checkpoint(runner, dict(meta=dict(deploy=True), state_dict={}))


class TestRows:

    def test_equal_sizes_are_told_apart(self):
        """As many classes as channels: only what counts classes is one of the rows."""
        config, model = make('detector', 32)
        init_default_scope('mmdet')
        before = torch.get_rng_state()
        rows = find_rows(config.model, model.state_dict())
        assert set(rows) == set(DETECTOR_ROWS)
        assert rows['bbox_head.cls_branches.0.weight'] == (1, 0)
        assert rows['dn_query_generator.label_embedding.weight'] == (1, 1)
        assert_close(torch.get_rng_state(), before)

    @pytest.mark.parametrize('model_cfg', [
        dict(type='none', bbox_head=dict(type='none')),
        dict(type='none', bbox_head=[dict(num_classes=3), dict(num_classes=4)]),
        dict(type='none', backbone=dict(num_classes=3)),
    ])
    def test_no_number_of_classes(self, model_cfg):
        assert find_rows(model_cfg, {}) == {}

    def test_anchors_and_background(self):
        """Three anchors: all classes of the first, all of the second, ...; then one more row."""
        theirs = torch.arange(7.)  # classes a and b
        own = dict(x=torch.full((10,), -1.))
        fitted, [change] = fit_classes(dict(x=theirs), own, dict(x=Rows(3, 1)), 'ab', 'bca')
        assert fitted['x'].tolist() == [1, -1, 0, 3, -1, 2, 5, -1, 4, 6]
        assert change == Change('x', (7,), (10,), 2, 3, 2)


def test_repeated_names():
    assert match_classes(3, 3, ['crane', 'emu', 'crane'], ['crane', 'crane', 'owl']) == [
        (0, 0), (2, 1)]


class TestTable:

    def test_table(self):
        changes = [Change(f'head.branches.{i}.weight', (2, 32), (3, 32), 1, 3, 2) for i in range(4)]
        changes.append(Change('embedding.weight', (3, 32), (4, 32), 1, 3, 2))
        table = describe('a.pth', 50, changes, ['cat', 'dog'], ['cow', 'dog', 'emu'])
        assert table.split('\n') == [
            'a.pth: 45 tensors loaded as they are, 5 fitted to other classes (by name; in both: '
            'dog); rows of classes not kept start anew',
            '  depends on the classes       checkpoint  model    classes kept',
            '  head.branches.*.weight (4x)  (2, 32)     (3, 32)  1 of 3',
            '  embedding.weight             (3, 32)     (4, 32)  1 of 3',
        ]

    @pytest.mark.parametrize('theirs, ours, message', [
        (None, ['a'], 'by number, as the checkpoint does not name its classes'),
        (['a'], None, 'by number, as the training set does not name its classes'),
        (['a', 'b'], ['a', 'b'], 'by number, as the checkpoint names 2 classes but has 1'),
        (['a'], ['a'], 'by number, as the training set names 1 class but the model has 2'),
        (['a'], ['b', 'c'], 'in both: none'),
    ])
    def test_reason(self, theirs, ours, message):
        assert message in describe('a', 2, [Change('b', (1,), (2,), 0, 2, 1)], theirs, ours)

    def test_nothing_changed(self):
        assert describe('a', 2, [], ['a'], ['a']) == 'a: all 2 tensors loaded'
        assert describe('a', 2, [], None, ['a']).endswith('taken to be the same')


def test_training_from_a_published_file(user_project, tmp_path, monkeypatch, capfd):
    """The whole way, learning nothing: epoch 1 has the rows of the published file."""
    monkeypatch.chdir(user_project)
    config, model = make('detector', 3)
    published = publish(model, tmp_path / 'old', config, NEW).safetensors
    assert main([
        'train', 'user_detector.py', '--work-dir', str(tmp_path / 'run'), '--cfg-options',
        f'load_from={published}', 'train_cfg.max_epochs=1', 'optim_wrapper.optimizer.lr=0',
        # There is no such file, and no need of it.
        'model.backbone.init_cfg.type=CheckedPretrained',
        'model.backbone.init_cfg.checkpoint=none.pth',
        'val_cfg=None', 'val_dataloader=None', 'val_evaluator=None']) == 0
    output = ''.join(capfd.readouterr())
    assert '7 fitted to other classes (by name; in both: square, disc)' in output
    assert re.search(r'bbox_head\.cls_branches\.\*\.weight \(3x\) +\(3, 32\) +\(2, 32\) +2 of 2',
                     output)

    trained = read_checkpoint(tmp_path / 'run' / 'epoch_1.pth')
    assert 'optimizer' in trained and 'ema_state_dict' in trained
    theirs = model.state_dict()
    for name in DETECTOR_ROWS:
        assert_close(trained['state_dict'][name][:2], theirs[name][[1, 0]], rtol=0, atol=0)
    assert_close(trained['state_dict']['memory_trans_fc.weight'], theirs['memory_trans_fc.weight'])
