"""The classes of heads and datasets are compared before a run; one process writes metrics."""

from types import SimpleNamespace

import pytest
from mmengine.hooks import LoggerHook
from mmengine.registry import HOOKS
from torch import nn

from spartan_mm.engine.hooks import ClassCountCheckHook, OneWriterLoggerHook

CLASSES = ('cat', 'dog', 'bird')


class Part(nn.Module):
    def __init__(self, num_classes=None, **children):
        super().__init__()
        if num_classes is not None:
            self.num_classes = num_classes
        for name, child in children.items():
            self.add_module(name, child)


def make_dataset(classes=CLASSES, name='train.json'):
    return SimpleNamespace(metainfo=dict(classes=classes), ann_file=name)


def make_runner(model, train=None, val=None):
    loaders = [None if item is None else SimpleNamespace(dataset=item) for item in (train, val)]
    return SimpleNamespace(
        model=model, train_dataloader=loaders[0], val_dataloader=loaders[1],
        test_dataloader=loaders[1], val_loop=None if val is None else object())


def make_model(num_classes):
    return Part(bbox_head=Part(num_classes), rpn_head=Part(1), backbone=Part(1000))


def test_matching_classes_pass():
    hook = HOOKS.build(dict(type='ClassCountCheckHook'))
    dataset = make_dataset([*CLASSES], 'val.json')
    runner = make_runner(make_model(3), make_dataset(), dataset)
    hook.before_train(runner)
    hook.before_val(runner)
    hook.before_test(runner)
    hook.before_train(make_runner(make_model(3), make_dataset()))


@pytest.mark.parametrize('method', ['before_train', 'before_val', 'before_test'])
def test_message_names_everything(method):
    runner = make_runner(make_model(80), make_dataset(), make_dataset())
    with pytest.raises(ValueError) as error:
        getattr(ClassCountCheckHook(), method)(runner)
    loader = method.replace('before_', '') + '_dataloader'
    for part in ('model.bbox_head', 'num_classes=80', '3 classes (cat, dog, bird)', 'train.json',
                 loader, '--cfg-options model.bbox_head.num_classes=3'):
        assert part in str(error.value)


@pytest.mark.parametrize('model, classes, words', [
    (make_model(3), CLASSES[:2], 'val_dataloader.*val.json.*2 classes'),
    (make_model(3), ('cat', 'bird', 'dog'), "train.json.*val.json.*label 1 is 'dog' .* 'bird'"),
    (Part(), (*CLASSES, 'emu'), "label 3 is none in the one and 'emu' in the other"),
], ids=['fewer', 'another order', 'more, and no head'])
def test_validation_set_is_checked_before_training(model, classes, words):
    val = make_dataset(classes, 'val.json')
    with pytest.raises(ValueError, match=words):
        ClassCountCheckHook().before_train(make_runner(model, make_dataset(), val))


@pytest.mark.parametrize('wrapper', [
    SimpleNamespace(dataset=make_dataset()),
    SimpleNamespace(dataset=make_dataset(), metainfo=make_dataset().metainfo),
    SimpleNamespace(datasets=[make_dataset()] * 2, metainfo=make_dataset().metainfo)])
def test_wrapped_dataset(wrapper):
    ClassCountCheckHook().before_val(make_runner(make_model(3), val=wrapper))
    with pytest.raises(ValueError, match='train.json.*3 classes'):
        ClassCountCheckHook().before_val(make_runner(make_model(4), val=wrapper))


def test_a_dataset_of_folders():
    dataset = SimpleNamespace(metainfo=dict(classes=('a', 'b')), ann_file='', img_prefix='data/val')
    with pytest.raises(ValueError, match='val_dataloader, SimpleNamespace of data/val, has 2'):
        ClassCountCheckHook().before_val(make_runner(make_model(3), val=dataset))


def test_heads_in_a_list_and_behind_a_wrapper():
    model = Part(roi_head=Part(bbox_head=nn.ModuleList([Part(3), Part(7)])))
    wrapped = nn.DataParallel(model)
    with pytest.raises(ValueError, match=r'model.roi_head.bbox_head.1 .*num_classes=7'):
        ClassCountCheckHook().before_test(make_runner(wrapped, val=make_dataset()))


def test_dataset_without_classes_is_left_alone():
    dataset = SimpleNamespace(metainfo={}, ann_file='')
    ClassCountCheckHook().before_val(make_runner(make_model(3), val=dataset))


def test_classes_as_a_string():
    with pytest.raises(ValueError, match=r"classes=\('cat',\)"):
        ClassCountCheckHook().before_val(make_runner(make_model(3), val=make_dataset('cat')))


@pytest.mark.parametrize(('rank', 'count'), [(0, 1), (1, 0)])
def test_one_process_writes_the_metrics_of_a_test(monkeypatch, rank, count):
    monkeypatch.setattr('mmengine.dist.utils.get_rank', lambda group=None: rank)
    written = []
    monkeypatch.setattr(LoggerHook, 'after_test_epoch', lambda *arguments: written.append(1))
    OneWriterLoggerHook().after_test_epoch(None, dict(accuracy=1.))
    assert len(written) == count
