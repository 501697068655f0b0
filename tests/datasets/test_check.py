"""Everything that is wrong with a config's datasets is found at once."""

import copy
import json

import cv2
import numpy as np
import pytest
from mmengine.config import Config

import spartan_mm.classification
import spartan_mm.detection  # noqa: F401 - registers the datasets
from spartan_mm.analysis.report.dataset_pictures import (
    draw_box_sizes,
    draw_class_counts,
    draw_suspects,
)
from spartan_mm.datasets.check import Content, Report, check_config, check_dataset
from spartan_mm.datasets.data_errors import MissingDataError, UndecodableError

CONTENT = dict(
    images=[dict(id=number, file_name=f'{number}.png', width=64, height=48) for number in range(6)],
    annotations=[dict(id=number + 1, image_id=number, category_id=number % 2 + 1,
                      bbox=[number, 2, 20, 30], area=600, iscrowd=0) for number in range(5)],
    categories=[dict(id=1, name='disc'), dict(id=2, name='square')])


@pytest.fixture
def folder(tmp_path):
    for number in range(6):
        cv2.imwrite(str(tmp_path / f'{number}.png'), np.full((48, 64, 3), 40 * number, np.uint8))
    return tmp_path


@pytest.fixture
def check(folder):
    def check(change=None, decode=False, workers=1, dataset_type='CheckedCocoDataset', model=None,
              splits=('train', ), evaluator=None, **options):
        content = copy.deepcopy(CONTENT)
        if change is not None:
            change(content)
        (folder / 'set.json').write_text(json.dumps(content))
        dataset = dict(type=dataset_type, data_root=str(folder), ann_file='set.json',
                       data_prefix=dict(img=''), pipeline=[dict(type='LoadImageFromFile')],
                       **options)
        cfg = Config(dict(default_scope='mmdet', train_dataloader=dict(dataset=dataset),
                          val_dataloader=dict(dataset=dict(dataset, test_mode=True)),
                          model=model or {}, val_evaluator=evaluator or {}))
        return check_config(cfg, splits, decode, workers)
    return check


def found(report, level):
    return {finding.kind: finding.message for finding in report.findings if finding.level == level}


def test_sound_data(check):
    report, = check(decode=True, model=dict(bbox_head=dict(type='Head', num_classes=2)))
    assert not found(report, 'error') and not found(report, 'warning')
    assert found(report, 'note') == {
        'images without objects': '1 of 6 images have no object',
        'class balance': 'from 2 objects (square) to 3 (disc), 1.5 to 1'}
    record = json.loads(json.dumps(report.as_record()))
    assert record['objects_of_class'] == {'disc': 3, 'square': 2}
    assert (record['images'], record['objects'], record['images_without_objects']) == (6, 5, 1)


def test_all_faults_of_a_file_in_one_reading(check):
    def change(content):
        images, annotations = content['images'], content['annotations']
        images[5]['id'] = 4
        annotations[0]['image_id'] = 77
        annotations[1]['category_id'] = 9
        annotations[2]['bbox'] = [3, 3, -5, 8]
        annotations.append(dict(annotations[3], id=4))
        annotations.append(dict(annotations[3], id=20, bbox=[float('nan')] * 4))
        annotations.append(dict(annotations[3], id=21, bbox=['a', 1, 2, 3]))

    report, = check(change)
    errors = found(report, 'error')
    assert set(errors) == {'image id repeated', 'annotation of an unknown image',
                           'annotation of an unknown category', 'annotation id repeated',
                           'invalid box', 'box of no numbers'}
    assert 'annotation 3 of image 2 (2.png)' in errors['invalid box']
    assert 'corners swapped' in errors['invalid box'] and 'not finite' in errors['invalid box']
    assert all('set.json: ' in message for message in errors.values())
    assert len(report.content.labels) == 2


def as_text(content):
    for image in content['images']:
        image['width'] = str(image['width'])


def without_id(content):
    del content['images'][1]['id']


def with_text_id(content):
    content['images'][1]['id'] = '1'
    content['annotations'][1]['image_id'] = '1'


def without_category_name(content):
    del content['categories'][1]['name']


def with_address(content):
    content['images'][1]['file_name'] = 'https://example.com/1.png'


@pytest.mark.parametrize('change, kind, words', [
    (as_text, 'image without a size', "image 0 (0.png) has width='64', height=48, which must be "),
    (without_id, 'image incomplete', 'image number 1 (from 0) has no id'),
    (with_text_id, 'image id is no number', "image '1' (1.png) has an id that is not an integer"),
    (without_category_name, 'category incomplete', 'category 2 has no name'),
    (with_address, 'image without a name', 'which names no file: an address, whose image has to'),
])
def test_nothing_untrue_follows_a_fault(check, change, kind, words):
    """What belongs to an image or category that is refused is no fault; nothing is counted."""
    report, = check(change, model=dict(bbox_head=dict(type='Head', num_classes=2)))
    errors = found(report, 'error')
    assert set(errors) == {kind} and words in errors[kind]
    assert not found(report, 'warning') and not found(report, 'note')


def test_a_class_of_a_refused_category_is_not_missing(check):
    def change(content):
        without_category_name(content)
        content['annotations'][0]['category_id'] = 9

    report, = check(change, metainfo=dict(classes=('disc', 'square')))
    errors = found(report, 'error')
    assert set(errors) == {'category incomplete', 'annotation of an unknown category'}
    assert 'unknown category id 9; the categories of the file have ids 1, 2' in errors[
        'annotation of an unknown category']


def test_the_true_follows_a_fault(check):
    def change(content):
        as_text(content)
        content['annotations'][0]['image_id'] = 99

    report, = check(change)
    assert 'belongs to image 99' in found(report, 'error')['annotation of an unknown image']


def test_nothing_left(check):
    report, = check(filter_cfg=dict(min_size=50))
    assert 'no image is left after filter_cfg=' in found(report, 'error')['nothing left']
    report, = check(filter_cfg=dict(filter_empty_gt=True, min_size=48))
    assert not found(report, 'error')


def test_a_class_that_is_empty_and_first(check):
    def change(content):
        content['categories'].insert(0, dict(id=0, name='things', supercategory='none'))

    report, = check(change)
    assert found(report, 'note')['class balance'] == 'from 2 objects (square) to 3 (disc), 1.5 to 1'
    assert set(found(report, 'warning')) == {'placeholder category', 'classes without objects'}
    assert ("category 0 (things) has no object and supercategory 'none': Roboflow's exports begin"
            in found(report, 'warning')['placeholder category'])
    report, = check(lambda content: (change(content), content['annotations'].pop()))
    assert found(report, 'note')['class balance'] == 'from 2 objects (disc) to 2 (square), 1 to 1'
    assert "set classes=('disc', 'square')" in found(report, 'warning')['placeholder category']
    report, = check(lambda content: content['categories'][0].update(supercategory='none'))
    assert not found(report, 'warning')


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16'])
def test_byte_order_mark(check, folder, encoding):
    check()
    text = (folder / 'set.json').read_text()
    (folder / 'set.json').write_text(text, encoding=encoding)
    dataset = dict(type='mmdet.CheckedCocoDataset', ann_file=str(folder / 'set.json'))
    report = check_dataset(dict(dataset, data_prefix=dict(img=str(folder))), 'train')
    assert not found(report, 'error') and len(report.content.infos) == 6
    report = check_dataset(dict(dataset, type='mmdet.CocoDataset'), 'train')
    assert 'CocoDataset does not read' in found(report, 'error')['byte order mark']


@pytest.mark.parametrize('name, hint', [
    ('images\\1.png', 'written as on Windows'), ('C:/data/1.png', 'written as on Windows'),
    ('/home of nobody/data/1.png', 'begins at /home of nobody, which this machine does not have')])
def test_names_of_another_machine(check, name, hint):
    report, = check(lambda content: content['images'][1].update(file_name=name))
    assert hint in found(report, 'error')['missing images']


def test_names_are_escaped(check):
    def change(content):
        content['images'][1]['file_name'] = '\x1b[2Jgone\n.png'
        content['categories'][1]['name'] = 'sq\x1b]0;uare'
        content['annotations'] = content['annotations'][:1]

    report, = check(change)
    messages = [finding.message for finding in report.findings]
    assert not [text for text in messages if '\x1b' in text or '\n' in text]
    assert [text for text in messages if r'\x1b[2Jgone\n.png' in text]
    assert r'sq\x1b]0;uare' in found(report, 'warning')['classes without objects']


def test_what_is_strange(check):
    def change(content):
        annotations = content['annotations']
        annotations.append(dict(annotations[3], id=7))
        annotations.append(dict(annotations[3], id=8, bbox=[1, 1, 0.5, 9]))
        annotations.append(dict(annotations[3], id=9, bbox=[50, 1, 40, 9]))
        annotations.append(dict(annotations[3], id=10, iscrowd=1))
        content['categories'].append(dict(id=3, name='star'))

    report, = check(change, model=dict(num_queries=3))
    warnings = found(report, 'warning')
    assert set(warnings) == {'object listed twice', 'box below a pixel', 'box beyond its image',
                             'classes without objects', 'more objects than queries'}
    assert '1 images' in warnings['more objects than queries'] and not found(report, 'error')
    assert report.suspects().keys() == {str(report.content.paths[3])}
    assert 'crowds' in found(report, 'note')


@pytest.mark.parametrize('workers', [1, 2])
def test_files(check, folder, workers):
    (folder / '0.png').unlink()
    (folder / '1.png').write_bytes(b'')
    (folder / '2.png').write_text('no image')
    cv2.imwrite(str(folder / '3.png'), np.zeros((64, 48, 3), np.uint8))
    report, = check(decode=True, workers=workers)
    errors = found(report, 'error')
    assert set(errors) == {'missing images', 'empty file', 'undecodable image',
                           'image of another size'}
    assert '1 of 6 images do not exist' in errors['missing images']
    assert '0.png' in errors['missing images'] and '`data_prefix`' in errors['missing images']
    assert '2.png' in errors['undecodable image']
    assert 'is 48x64 pixels, but annotated as 64x48' in errors['image of another size']
    undecoded, = check()
    assert set(found(undecoded, 'error')) == {'missing images', 'empty file'}


def test_heads_and_evaluator(check, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / 'other.json').write_text(json.dumps(CONTENT))
    model = dict(roi_head=dict(bbox_head=[dict(type='Head', num_classes=2),
                                          dict(type='Head', num_classes=80)]))
    report, = check(model=model, splits=['val'], evaluator=dict(ann_file='other.json'))
    for odd in ('text', dict(ann_file=['a.json']), [None]):
        assert 'other evaluator' not in found(check(evaluator=odd, splits=['val'])[0], 'warning')
    assert 'model.roi_head.bbox_head.1 (Head) has num_classes=80' in found(
        report, 'error')['classes of the head']
    assert 'val_evaluator reads other.json' in found(report, 'warning')['other evaluator']
    report, = check(splits=['val'], evaluator=dict(ann_file='none.json'))
    assert 'there is no annotation file none.json' in found(report, 'error')['missing file']


def test_splits_are_compared(check):
    train, val = check(splits=('train', 'val'))
    assert found(val, 'warning') == {
        'trained on': f"6 of 6 images are in the training dataset, too "
                      f"({__import__('reprlib').repr(train.content.paths[0])})"}


def test_mmdets_own_dataset(check):
    report, = check(lambda content: content['annotations'][0].update(bbox=[0, 0, 0, 0]),
                    dataset_type='CocoDataset', metainfo=dict(classes=('disc', 'square')))
    assert not found(report, 'error')
    assert 'dropped 1 of 5 annotations' in found(report, 'warning')['invalid box']
    report, = check(dataset_type='CocoDataset', metainfo=dict(classes=('square', 'disc')))
    assert 'not in the order' in found(report, 'error')['classes']


def test_no_file(check):
    report, = check(lambda content: content.clear())
    assert 'has no images' in found(report, 'error')['not an annotation file']


def test_wrapped_and_unknown(folder):
    (folder / 'set.json').write_text(json.dumps(CONTENT))
    dataset = dict(type='CheckedCocoDataset', ann_file=str(folder / 'set.json'),
                   data_prefix=dict(img=str(folder)))
    wrapped = dict(type='RepeatDataset', times=2, dataset=dict(
        type='ConcatDataset', datasets=[dataset, dict(dataset, ann_file='none.json')]))
    cfg = Config(dict(default_scope='mmdet', train_dataloader=dict(dataset=wrapped)))
    first, second = check_config(cfg)
    assert not found(first, 'error')
    assert "no annotation file 'none.json'" in found(second, 'error')['missing file']
    cfg.train_dataloader.dataset = dict(type='NoDataset')
    report, = check_config(cfg)
    assert ("type is 'NoDataset', but there is no dataset of that name"
            in found(report, 'error')['setting'])


class TestFolders:

    @pytest.fixture
    def cfg(self, folder):
        for number, name in enumerate(['cat', 'cat', 'dog', 'dog', 'dog']):
            (folder / 'train' / name).mkdir(parents=True, exist_ok=True)
            (folder / f'{number}.png').rename(folder / 'train' / name / f'{number}.png')
        dataset = dict(type='CheckedImageFolder', data_root=str(folder), split='train',
                       pipeline=[dict(type='LoadImageFromFile')])
        return Config(dict(
            default_scope='mmpretrain', train_dataloader=dict(dataset=dataset),
            model=dict(head=dict(type='LinearClsHead', num_classes=2))))

    def test_sound(self, cfg):
        report, = check_config(cfg, decode=True, workers=1)
        assert report.as_record()['objects_of_class'] == {'cat': 2, 'dog': 3}
        assert not found(report, 'error') and not found(report, 'warning')

    def test_faults(self, cfg, folder):
        (folder / 'train' / 'dog' / '3.png').write_text('no picture')
        cfg.model.head.num_classes = 1000
        report, = check_config(cfg, decode=True, workers=1)
        errors = found(report, 'error')
        assert set(errors) == {'undecodable image', 'classes of the head'}
        assert "3.png' (class 1, dog) cannot be decoded" in errors['undecodable image']
        assert 'model.head.num_classes=2' in errors['classes of the head']
        (folder / 'train' / 'emu').mkdir()
        report, = check_config(cfg)
        assert 'emu' in found(report, 'error')['dataset']


class TestSheets:

    @pytest.fixture
    def content(self, check):
        return check()[0].content

    def test_classes_and_sizes(self, content):
        figure = draw_class_counts(dict(train=content, val=content))
        axes, = figure.axes
        assert [text.get_text() for text in axes.get_yticklabels()] == ['disc', 'square']
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [
            'train: 5 objects', 'val: 5 objects']
        figure = draw_box_sizes(dict(train=content))
        assert '100 % small' in figure.axes[0].get_title('left')
        figure.canvas.draw()

    def test_many_classes(self):
        many = Content(classes=tuple(f'class {number}' for number in range(1000)),
                       labels=np.arange(1000), crowds=np.zeros(1000, bool))
        figure = draw_class_counts(dict(train=many))
        assert len(figure.axes[0].get_yticks()) == 80
        assert '920 in the middle left out' in figure.axes[0].get_title('left')

    def test_suspects(self, content, folder):
        sheet = draw_suspects(content, {content.paths[1]: 'box below a pixel',
                                        str(folder / 'gone.png'): 'missing images'})
        assert sheet.width > 2 * 320 and (np.asarray(sheet) == 200).all(-1).sum() > 10_000

    def test_nothing_to_draw(self):
        for draw in (draw_class_counts, draw_box_sizes):
            assert draw({}) is None
        assert Report('train', 'x').suspects() == {}


def test_errors_of_workers_lose_the_traceback():
    text = ('Caught UndecodableError in DataLoader worker process 0.\nOriginal Traceback (most '
            'recent call last):\n  File "x.py", line 1, in f\nspartan_mm.datasets.data_errors.'
            "UndecodableError: The image 'a: b.png' cannot be decoded: empty.\n")
    assert str(UndecodableError(text)) == "The image 'a: b.png' cannot be decoded: empty."
    assert isinstance(MissingDataError('gone'), FileNotFoundError)
    assert str(MissingDataError('gone')) == 'gone'
