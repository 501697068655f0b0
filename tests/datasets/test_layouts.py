"""Folders of data: which format they are in, and a sentence where that is not clear."""
import json
import re

import pytest
from PIL import Image

from spartan_mm.datasets.data_errors import DataError
from spartan_mm.datasets.label_files import list_pictures
from spartan_mm.datasets.layouts import find_data, is_data
from spartan_mm.datasets.part import choose_part

LABEL = '0 0.5 0.5 0.2 0.4\n'


def xml(name='cat', database=''):
    return (f'<annotation>{database}<object><name>{name}</name><bndbox><xmin>3</xmin><ymin>5</ymin>'
            '<xmax>20</xmax><ymax>30</ymax></bndbox></object></annotation>')


def coco(names=('a.png', 'b.png'), classes=('cat', 'dog')):
    return json.dumps(dict(
        images=[dict(id=i, file_name=name, width=64, height=48) for i, name in enumerate(names, 1)],
        annotations=[dict(id=i, image_id=i, category_id=0, bbox=[1, 2, 30, 20], area=600, iscrowd=0)
                     for i in range(1, len(names) + 1)],
        categories=[dict(id=label, name=name) for label, name in enumerate(classes)]))


@pytest.fixture
def folder(tmp_path):
    """Makes a folder of files of these contents; pictures have none."""
    root = tmp_path / 'mine'

    def make(**files):
        root.mkdir(exist_ok=True)
        for name, content in files.pop('files', files).items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                Image.new('RGB', (64, 48)).save(path)
            else:
                path.write_text(content)
        return root
    return make


YAML = 'train: {}\nval: {}\nnames: [cat, dog]\n'
TWO = dict.fromkeys(('train/a.png', 'train/b.png', 'valid/c.png'))
LAYOUTS = {
    'COCO': ({'annotations/instances_train2017.json': coco(['a.png']),
              'annotations/instances_val2017.json': coco(['b.png'], ('dog', 'cat')),
              'annotations/captions_val2017.json': '{"images": 1}',
              'train2017/a.png': None, 'val2017/b.png': None},
             'CheckedCocoDataset', dict(img='train2017/'), dict(img='val2017/')),
    'COCO, a folder of pictures': (
        {'train.json': coco(['a.png']), 'valid.json': coco(['b.png']), 'images/a.png': None,
         'images/b.png': None}, 'CheckedCocoDataset', dict(img='images/'), dict(img='images/')),
    'COCO, names with folders': (
        {'labels.json': coco(['x/a.png', 'x/b.png']), 'pictures/x/a.png': None,
         'pictures/x/b.png': None}, 'CheckedCocoDataset', dict(img='pictures/'),
        dict(img='pictures/')),
    'Roboflow': ({'train/_annotations.coco.json': coco(['a.png', 'b.png']),
                  'valid/_annotations.coco.json': coco(['c.png']),
                  'test/_annotations.coco.json': coco(['c.png']), 'test/c.png': None, **TWO},
                 'CheckedCocoDataset', dict(img='train/'), dict(img='valid/')),
    'YOLO of Roboflow': (
        {'data.yaml': 'train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 2\n'
                      "names: ['cat', 'dog']\nroboflow:\n  license: none\n",
         'train/images/a.png': None, 'train/labels/a.txt': LABEL, 'valid/images/b.png': None,
         'valid/labels/b.txt': LABEL, 'README.roboflow.txt': 'words'}, 'CheckedYOLODataset',
        dict(img='train/images', labels='train/labels'),
        dict(img='valid/images', labels='valid/labels')),
    'YOLO, a list': (
        {'any.yaml': 'path: .\ntrain: train.txt\nval: images/val\nnames: {0: cat, 1: dog}\n',
         'train.txt': './images/train/a.png\n', 'images/train/a.png': None,
         'labels/train/a.txt': LABEL, 'images/val/b.png': None, 'labels/val/b.txt': LABEL},
        'CheckedYOLODataset', dict(img='', labels=''), dict(img='images/val', labels='labels/val')),
    'YOLO of Windows': (
        {'data.yaml': 'path: C:\\me\ntrain: images\\t\nval: .\\images\\v\ntest: [x, y]\n'
                      'names: {"1": dog, "0": cat}\n', 'images/t/a.png': None,
         'labels/t/a.txt': LABEL, 'images/v/b.png': None, 'labels/v/b.txt': LABEL},
        'CheckedYOLODataset', dict(img='images/t', labels='labels/t'),
        dict(img='images/v', labels='labels/v')),
    'YOLO, no yaml, from Label Studio': (
        {'classes.txt': '\ufeffcat\ndog\n', 'notes.json': '{"categories": [], "info": {}}',
         'images/a.png': None, 'images/b.png': None, 'labels/a.txt': '\ufeff' + LABEL},
        'CheckedYOLODataset', dict(img='images', labels='labels'),
        dict(img='images', labels='labels')),
    'YOLO, no yaml': (
        {'classes.txt': 'cat\ndog\n', 'images/a.png': None, 'images/b.png': None,
         'labels/a.txt': LABEL}, 'CheckedYOLODataset', dict(img='images', labels='labels'),
        dict(img='images', labels='labels')),
    'VOC': ({'VOC2007/Annotations/a.xml': xml(), 'VOC2007/Annotations/b.xml': xml('dog'),
             'VOC2007/JPEGImages/a.png': None, 'VOC2007/JPEGImages/b.png': None,
             'VOC2007/ImageSets/Main/train.txt': 'a\n', 'VOC2007/ImageSets/Main/val.txt': 'b\n',
             'VOC2007/ImageSets/Main/cat_train.txt': 'a 1\n'}, 'CheckedVOCDataset',
            dict(img='VOC2007/JPEGImages', xml='VOC2007/Annotations'),
            dict(img='VOC2007/JPEGImages', xml='VOC2007/Annotations')),
    'VOC of Kaggle': (
        {'annotations/a.xml': xml(), 'annotations/b.xml': xml('dog'), 'images/a.png': None,
         'images/b.png': None}, 'CheckedVOCDataset', dict(img='images', xml='annotations'),
        dict(img='images', xml='annotations')),
    'VOC of Roboflow': (
        {**TWO, 'train/a.xml': xml(), 'train/b.xml': xml('dog'), 'valid/c.xml': xml()},
        'CheckedVOCDataset', dict(img='train', xml='train'), dict(img='valid', xml='valid')),
    'VOC beside pictures': (
        {'a.png': None, 'a.xml': xml('dog'), 'b.png': None, 'b.xml': xml()}, 'CheckedVOCDataset',
        dict(img='.', xml='.'), dict(img='.', xml='.')),
}


@pytest.mark.parametrize('name', LAYOUTS)
def test_layouts(folder, name):
    files, kind, train, val = LAYOUTS[name]
    data = find_data(folder(files=files))
    assert data.classes == ('cat', 'dog') and data.task == 'detection'
    assert {settings['type'] for settings in data.splits.values()} == {kind}
    assert [data.splits[split]['data_prefix'] for split in ('train', 'val')] == [train, val]
    # What is for both is shared out.
    shared = {split: data.splits[split].get('part') for split in ('train', 'val')}
    whole = train != val or 'valid' in str(files) or 'ImageSets' in str(files)
    assert shared == (dict(train=None, val=None) if whole else {
        split: dict(name=split, share=0.2, seed=0) for split in shared})


def test_classes_in_another_order_are_matched_by_name(folder):
    data = find_data(folder(files=LAYOUTS['COCO'][0]))
    assert all(settings['classes_by_name'] for settings in data.splits.values())


def test_pixels_of_pascal_count_from_1(folder):
    source = '<source><database>The VOC2007 Database</database></source>'
    data = find_data(folder(files={
        'Annotations/a.xml': xml(database=source), 'Annotations/b.xml': xml(database=source),
        'JPEGImages/a.png': None, 'JPEGImages/b.png': None}))
    assert data.splits['train']['first_pixel'] == 1


@pytest.mark.parametrize('names, lists', [
    (['ImageSets/train.txt', 'ImageSets/val.txt'], ['ImageSets/train.txt', 'ImageSets/val.txt']),
    (['train.txt', 'trainval.txt', 'val.txt'], ['train.txt', 'val.txt']),
    (['ImageSets/Main/test.txt', 'ImageSets/Main/trainval.txt'],
     ['ImageSets/Main/trainval.txt'] * 2)])
def test_lists_of_voc(folder, names, lists):
    data = find_data(folder(files={
        'Annotations/a.xml': xml(), 'JPEGImages/a.png': None, **dict.fromkeys(names, 'a\n')}))
    assert [data.splits[split]['ann_file'] for split in ('train', 'val')] == lists


def test_paths_have_no_dots(folder):
    root = folder(files={'sub/data.yaml': 'path: ..\n' + YAML.format('i', 'i'), 'i/a.png': None,
                         'i/b.png': None, 'i/a.txt': LABEL})
    for path in (root / 'sub' / 'data.yaml', root / 'i' / '..' / 'sub'):
        assert find_data(path).root == root


def test_hidden_folders_have_no_pictures(folder):
    root = folder(files={'a.png': None, '.ipynb_checkpoints/b.png': None, 'x/._c.png': None})
    assert list_pictures(root) == ['a.png']


@pytest.mark.parametrize('files, split', [
    ({'train/cat/a.png': None, 'train/dog/a.png': None, 'val/cat/b.png': None,
      'val/dog/b.png': None}, ['train', 'val']),
    ({'cat/a.png': None, 'dog/b.png': None}, ['', ''])])
def test_folders_of_classes(folder, files, split):
    data = find_data(folder(files=files), seed=5)
    assert data.task == 'classification' and data.classes == ('cat', 'dog')
    assert [data.splits[name]['split'] for name in ('train', 'val')] == split
    assert data.splits['val'].get('part', {}).get('seed') == (None if split[0] else 5)


WRONG = {
    'empty': ({}, 'mine is empty, but must have COCO'),
    'no data': ({'notes.md': 'x'},
                "has notes.md, but no pictures; expected are COCO's .json files"),
    'pictures alone': (dict.fromkeys(('a.png', 'b.png')),
                       'has 2 pictures without labels; expected'),
    'pictures alone in a folder': ({'images/a.png': None, 'other/b.png': None},
                                   'has 2 pictures without labels; expected'),
    'one class': ({'cat/a.png': None}, 'has 1 picture without labels; expected'),
    'two formats': ({**LAYOUTS['Roboflow'][0], 'labels/a.txt': LABEL},
                    'has labels of 2 formats, COCO (test/_annotations.coco.json) and YOLO '
                    '(labels/a.txt), but must have one: name the .json file'),
    'labels alone, YOLO': ({'data.yaml': YAML.format('images/t', 'images/v'),
                            'labels/t/a.txt': LABEL},
                           'train is images/t, but there is no such folder or list in '),
    'labels alone, VOC': ({'Annotations/a.xml': xml()},
                          'has 1 file of labels in Annotations, but no pictures in Annotations ('),
    'labels alone, COCO': ({'train.json': coco()}, 'train.json names 2 pictures, such as '
                                                   "'a.png', but "),
    'no folder of pictures': ({'data.yaml': YAML.format('images', 'images'), 'labels/a.txt': LABEL,
                               'images/notes.md': ''}, 'but labels has 1 file of labels'),
    'names of numbers': ({'labels/a.txt': LABEL, 'images/a.png': None},
                         'but no data.yaml, nor a classes.txt, that names the classes'),
    'two lists, COCO': ({'train.json': coco(), 'val.json': coco(classes=('cat', 'emu')),
                         'a.png': None, 'b.png': None},
                        'has two lists of classes: train.json has cat, dog, and val.json has cat, '
                        'emu; val may have none that train has not'),
    'two lists, YOLO': ({'data.yaml': YAML.format('i', 'i') + 'nc: 3\n', 'i/a.png': None},
                        'has nc: 3, but 2 names (cat, dog): the two must agree'),
    'two lists, bare YOLO': ({'classes.txt': 'cat', 'labels/classes.txt': 'dog',
                              'labels/a.txt': LABEL, 'images/a.png': None},
                             'two lists of classes: classes.txt has cat, and labels/classes.txt '
                             'dog'),
    'two lists, VOC': ({'a.png': None, 'a.xml': xml('emu'), 'labels.txt': 'cat'},
                       'two lists of classes: labels.txt has cat, and the annotations have emu'),
    'two lists, folders': ({'train/cat/a.png': None, 'train/dog/a.png': None,
                            'val/cat/a.png': None},
                           'two lists of classes: train has folders for cat, dog, and val for cat'),
    'names that are none': ({'data.yaml': 'train: i\nval: i\nnames: [yes, no]', 'i/a.png': None},
                            'the class True is no text; YAML reads words such as no, on and'),
    'folders of one role, YOLO': (
        {'classes.txt': 'cat', 'images/train/a.png': None, 'images/train/x/b.png': None,
         'labels/train/a.txt': LABEL},
        'has pictures in images/train, images/train/x: name a data.yaml'),
    'folders of one role': (dict.fromkeys(f'{split}/{name}/a.png' for name in ('cat', 'dog')
                                          for split in ('train', 'val', 'valid')),
                            'has two folders for val, val and valid: put them together'),
    'names twice': ({'data.yaml': 'train: i\nval: i\nnames: [cat, cat]', 'i/a.png': None},
                    'names the class cat twice'),
    'numbers with a gap': ({'data.yaml': 'train: i\nval: i\nnames: {0: cat, 2: dog}'},
                           'names has the numbers 0, 2, but must have all from 0 to 1'),
    'poses': ({'data.yaml': YAML.format('i', 'i') + 'kpt_shape: [17, 3]\n', 'i/a.png': None},
              'has kpt_shape, so its labels are of poses'),
    'no YAML': ({'data.yaml': 'a: [1\nb: 2', 'i/a.png': None},
                'data.yaml: not a YAML file (line 2'),
    'no training': ({'valid/_annotations.coco.json': coco(['c.png']), 'valid/c.png': None,
                     'test/_annotations.coco.json': coco(['c.png']), 'test/c.png': None},
                    'in the format of COCO for test, val, but none to train on'),
    'unclear files': ({'x.json': coco(), 'y.json': coco(), 'a.png': None},
                      "has 2 files of COCO's format, and of x.json, y.json it is not clear what"),
    'broken file': ({'train.json': coco()[:-20], 'a.png': None}, 'train.json: not a JSON file'),
    'unsafe file': ({'a.png': None, 'a.xml': '<!DOCTYPE x [<!ENTITY b "b">]>' + xml('&b;')},
                    'a.xml: it has a document type (<!DOCTYPE>)'),
}


@pytest.mark.parametrize('name', WRONG)
def test_wrong_folders(folder, name):
    files, message = WRONG[name]
    root = folder(files=files)
    with pytest.raises(DataError, match=re.escape(message)) as raised:
        find_data(root)
    assert '\n' not in str(raised.value) and str(root) in str(raised.value)


def test_what_is_data(folder, tmp_path):
    root = folder(files={'a.json': coco(), 'data.yaml': YAML, 'config.json': '{"model": {}}',
                         'config.yaml': 'model: {}', 'config.py': 'model = 1'})
    assert is_data(root) and is_data(root / 'a.json') and is_data(root / 'data.yaml')
    assert not any(map(is_data, (root / 'config.json', root / 'config.yaml', root / 'config.py',
                                 root / 'none', 'rtdetr_spartan_t')))


def test_parts_depend_on_names_and_seed_alone():
    names = [f'x/{number}.jpg' for number in range(50)]
    part = dict(name='val', share=0.2, seed=1)
    chosen = {names[index] for index in choose_part(names, part)}
    assert len(chosen) == 10
    assert {names[::-1][index] for index in choose_part(names[::-1], part)} == chosen
    rest = choose_part(names, dict(part, name='train'))
    assert {names[index] for index in rest} == {*names} - chosen
    pngs = [name.replace('jpg', 'png') for name in names]
    assert choose_part(pngs, part) == choose_part(names, part)
    assert choose_part(names, dict(part, seed=2)) != choose_part(names, part)
    assert len(choose_part(names[:2], dict(part, share=0.9))) == 1
    with pytest.raises(DataError, match='but one picture, and at least two'):
        choose_part(names[:1], part)
