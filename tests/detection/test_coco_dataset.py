"""COCO-format data: mmdet's meaning where the file is right, a clear error where it is not."""

import json
import math

import cv2
import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS, TRANSFORMS

from spartan_mm.datasets.data_errors import DataError
from spartan_mm.detection import CheckedCocoDataset, LoadCheckedImage


@pytest.fixture
def build(tmp_path):
    def build(content, dataset_type='CheckedCocoDataset', **kwargs):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / 'set.json').write_text(text)
        return DATASETS.build(
            dict(type=dataset_type, data_root=str(tmp_path), ann_file='set.json',
                 data_prefix=dict(img='images/'), **kwargs)
        )

    return build


@pytest.fixture
def messages(monkeypatch):
    """What the dataset logs."""
    logged = []
    monkeypatch.setattr(CheckedCocoDataset, '_log', lambda _, message: logged.append(message))
    return logged


def test_classes_come_from_the_file(build, content):
    dataset = build(content)
    assert dataset.metainfo['classes'] == ('dog', 'cat', 'bird')
    assert dataset.cat2label == {5: 0, 30: 1, 8: 2}
    assert len(dataset) == 3
    first = dataset.get_data_info(0)
    assert first['img_id'] == 7 and first['img_path'].endswith('images/cat.jpg')
    assert [item['bbox_label'] for item in first['instances']] == [1, 2]
    assert first['instances'][0]['bbox'] == [1, 2, 31, 22]
    assert [item['ignore_flag'] for item in dataset.get_data_info(1)['instances']] == [1]
    assert dataset.get_data_info(2)['instances'] == []


@pytest.mark.parametrize('classes', [('dog', 'cat', 'bird'), ('cat', 'bird'), ('bird',)])
@pytest.mark.parametrize('filter_cfg', [None, dict(filter_empty_gt=True, min_size=32)])
def test_equal_to_mmdet(build, content, classes, filter_cfg):
    kwargs = dict(metainfo=dict(classes=classes), filter_cfg=filter_cfg, serialize_data=False)
    ours, theirs = build(content, **kwargs), build(content, 'CocoDataset', **kwargs)
    assert ours.data_list == theirs.data_list
    assert (ours.cat_ids, ours.cat2label) == (theirs.cat_ids, theirs.cat2label)


def test_coco_itself(build, content):
    """With COCO's categories: mmdet's classes, labels and colours, without naming them."""
    names = CocoDataset.METAINFO['classes']
    ids = np.random.default_rng(0).permutation(90)[: len(names)]
    content['categories'] = [dict(id=int(i) + 1, name=n) for i, n in zip(ids, names, strict=True)]
    for annotation in content['annotations']:
        annotation['category_id'] = content['categories'][annotation['id']]['id']
    ours, theirs = build(content), build(content, 'CocoDataset')
    assert ours.metainfo == theirs.metainfo
    assert ours.cat2label == theirs.cat2label


def test_protruding_box_is_clipped(build, content, messages):
    content['annotations'][0]['bbox'] = [-0.5, 10, 65, 20.25]
    content['annotations'][2]['bbox'] = [50, 40, 40, 40]
    instances = build(content).get_data_info(0)['instances']
    assert instances[0]['bbox'] == [0, 10, 64, 30.25]
    assert instances[1]['bbox'] == [50, 40, 64, 48]
    assert len(messages) == 1 and '1 of 3 boxes reach' in messages[0] and '13' in messages[0]


INVALID_BOXES = [([1, 2, 0, 20], 'no width or no height'),
                 ([1, 2, 10, -3], 'no width or no height'),
                 ([70, 2, 10, 10], 'wholly outside the image, which is 64x48'),
                 ([-20, 2, 20, 10], 'wholly outside'), ([math.nan, 2, 10, 10], 'not finite'),
                 ([0, 2, math.inf, 10], 'not finite')]


@pytest.mark.parametrize('bbox, fault', INVALID_BOXES)
def test_invalid_box(build, content, messages, bbox, fault):
    content['annotations'][0]['bbox'] = bbox
    with pytest.raises(ValueError) as error:
        build(content)
    for part in ('set.json', 'annotation 11', 'image 7 (cat.jpg)', fault, "invalid_boxes='drop'"):
        assert part in str(error.value)

    dataset = build(content, invalid_boxes='drop')
    assert [item['bbox_label'] for item in dataset.get_data_info(0)['instances']] == [2]
    assert messages == ['dropped 1 of 3 annotations with invalid boxes (ids 11).']


def test_many_culprits_are_counted(build, content):
    content['annotations'] = [
        dict(id=i, image_id=7, category_id=5, bbox=[0, 0, 0, 0], area=0) for i in range(1, 10)
    ]
    with pytest.raises(ValueError, match='annotation 5 .*; and 4 more'):
        build(content)


def edit(*path, value):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        if value is None:
            del content[path[-1]]
        else:
            content[path[-1]] = value

    return change


BAD_FILES = [
    (edit('images', value=[]), 'is empty: no images'),
    (edit('annotations', value=[]), 'no annotation in it.*nothing to train on'),
    (edit('annotations', value=None), 'has no annotations'),
    (edit('categories', value=[]), 'is empty: no categories'),
    (edit('annotations', 1, 'category_id', value=6), r'12 of .*dog.jpg.* 6; .* 5, 30, 8'),
    (edit('annotations', 1, 'image_id', value=4), 'annotation 12 belongs to image 4'),
    (edit('annotations', 1, 'id', value=11), 'annotation 11 has an id'),
    (edit('annotations', 1, 'bbox', value=[1, 2, 3]), r'annotation 12 has bbox=\[1, 2, 3\]'),
    (edit('annotations', 1, 'bbox', value=[1, 2, 3, '4']), "annotation 12 has bbox=.*'4'"),
    (edit('annotations', 1, 'area', value='big'), "annotation 12 has .*area='big'"),
    (edit('annotations', 1, 'area', value=None), 'annotation 12 has no area'),
    (edit('annotations', 1, 'area', value=0), 'annotation 12 of image 3 .* no area'),
    (edit('images', 1, 'id', value=7), r'image 7 \(dog.jpg\) has an id'),
    (edit('images', 1, 'width', value=None), r'image 3 \(dog.jpg\) has no width'),
    (edit('images', 1, 'width', value=0), r'image 3 \(dog.jpg\) has width=0'),
    (edit('categories', 1, 'id', value=5), r'category 5 \(cat\) has an id'),
    (edit('categories', 1, 'name', value='dog'), r'category 30 \(dog\) has a name'),
]  # fmt: skip


@pytest.mark.parametrize('change, message', BAD_FILES)
def test_bad_file(build, content, change, message):
    change(content)
    with pytest.raises(DataError, match=f'set.json: .*{message}') as error:
        build(content)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'text, message',
    [('', 'not a JSON file'), ('{"images": [', 'not a JSON file'), ('[]', 'holds a list'),
     ('{}', 'has no images, categories, annotations')],
)
def test_not_an_annotation_file(build, text, message):
    with pytest.raises(ValueError, match=f'set.json: .*{message}'):
        build(text)


def test_missing_annotation_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.json.*data_root'):
        CheckedCocoDataset(data_root=str(tmp_path), ann_file='nowhere.json')


@pytest.mark.parametrize(
    'classes, message',
    [(('dog', 'cow'), 'no category cow.*dog, cat, bird'),
     (('cat', 'dog'), r"write classes=\('dog', 'cat'\)"), ('dog', r"classes=\('dog',\)")],
)
def test_bad_classes(build, content, classes, message):
    with pytest.raises(ValueError, match=message):
        build(content, metainfo=dict(classes=classes))


def test_set_without_objects(build, content, messages):
    only_cats = dict(content, annotations=content['annotations'][:1])
    content['annotations'] = []
    assert len(build(content, allow_no_objects=True)) == 3
    del content['annotations']
    assert len(build(content, test_mode=True)) == 3
    assert 'no AP' in messages[0]
    with pytest.raises(ValueError, match='none of the 1 annotations is of the classes dog, bird'):
        build(only_cats, metainfo=dict(classes=('dog', 'bird')))


def test_evaluation_needs_more_of_the_file(build, content, messages):
    content['annotations'][0]['id'] = 0
    build(content, test_mode=True)
    assert 'id 0' in messages[0]
    del content['annotations'][1]['iscrowd']
    build(content)
    with pytest.raises(ValueError, match='annotation 12 has no iscrowd'):
        build(content, test_mode=True)


def test_nothing_left_after_filtering(build, content):
    with pytest.raises(ValueError, match='no image is left.*1000'):
        build(content, filter_cfg=dict(min_size=1000))


def test_bad_option(build, content):
    with pytest.raises(ValueError, match="'error' or 'drop'"):
        build(content, invalid_boxes='ignore')


class TestLoadCheckedImage:
    @pytest.fixture
    def dataset(self, build, content, tmp_path):
        (tmp_path / 'images').mkdir()
        return build(content, pipeline=[dict(type='mmdet.LoadCheckedImage')], max_refetch=3,
                     bad_images='stop')

    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / 'images' / 'cat.jpg'

    def test_loads(self, dataset, path):
        cv2.imwrite(str(path), np.full((48, 64, 3), (250, 20, 130), dtype=np.uint8))
        results = dataset[0]
        assert results['img'].dtype == np.uint8
        assert results['img_shape'] == results['ori_shape'] == results['img'].shape[:2] == (48, 64)
        assert np.abs(results['img'][0, 0].astype(int) - (250, 20, 130)).max() < 5
        assert TRANSFORMS.build(dict(type='LoadCheckedImage', to_float32=True))(
            dict(img_path=str(path))
        )['img'].dtype == np.float32  # fmt: skip

    def test_missing(self, dataset):
        """At once, not after trying others."""
        with pytest.raises(FileNotFoundError, match=r'images/cat.jpg.*image id 7 of .*set.json'):
            dataset[0]

    @pytest.mark.parametrize('content_of_file', [b'', b'<html>not found</html>', b'\xff\xd8\xff'])
    def test_not_decodable(self, dataset, path, content_of_file):
        path.write_bytes(content_of_file)
        with pytest.raises(DataError, match='cat.jpg.*image id 7 of .*set.json.*cannot be decoded'):
            dataset[0]

    def test_other_size_than_annotated(self, dataset, path):
        cv2.imwrite(str(path), np.zeros((64, 48, 3), dtype=np.uint8))
        with pytest.raises(ValueError, match='cat.jpg.*is 48x64 pixels.*as 64x48.*EXIF'):
            dataset[0]
        loaded = LoadCheckedImage(check_size=False)(dict(img_path=str(path), height=48, width=64))
        assert loaded['img_shape'] == (64, 48)

    def test_passing_over_images_is_refused(self):
        with pytest.raises(ValueError, match='ignore_empty'):
            LoadCheckedImage(ignore_empty=True)


class TestBadImages:
    """An image that cannot be decoded does not end a training, but many do."""

    @pytest.fixture
    def make(self, build, tmp_path):
        def make(total=200, bad=(3, ), **kwargs):
            (tmp_path / 'images').mkdir()
            picture = cv2.imencode('.png', np.zeros((8, 8, 3), np.uint8))[1].tobytes()
            for number in range(total):
                (tmp_path / 'images' / f'{number}.png').write_bytes(
                    b'' if number in bad else picture)
            images = [dict(id=number, file_name=f'{number}.png', width=8, height=8)
                      for number in range(total)]
            annotations = [dict(id=1, image_id=0, category_id=1, bbox=[0, 0, 4, 4], area=16,
                                iscrowd=0)]
            return build(dict(images=images, annotations=annotations,
                              categories=[dict(id=1, name='square')]),
                         pipeline=[dict(type='LoadImageFromFile')], **kwargs)
        return make

    def test_another_takes_its_place_always_the_same(self, make, monkeypatch):
        logged = []
        monkeypatch.setattr('spartan_mm.datasets.images.print_log',
                            lambda message, *_: logged.append(message))
        dataset = make(bad=(3, 4))
        found = [dataset[3]['img_id'] for _ in range(3)]
        assert len(set(found)) == 1 and found[0] not in (3, 4)
        assert dataset[4]['img_id'] != found[0]
        assert dataset[5]['img_id'] == 5
        assert dataset.bad_images.count == 2
        first, second = logged
        assert '3.png' in first and 'makes 1 of 200 images' in first
        assert '4.png' in second and 'makes 2 of 200 images' in second

    def test_global_random_numbers_are_not_touched(self, make):
        dataset = make()
        np.random.seed(0)
        expected = np.random.rand()
        np.random.seed(0)
        dataset[3]
        assert np.random.rand() == expected

    def test_too_many_stop(self, make):
        dataset = make(bad=(3, 4, 5))
        dataset[3], dataset[4]
        with pytest.raises(DataError, match=r'3 of 200 images cannot be decoded, and no more than '
                                            r'2 .*max_bad_images=0\.01.*5\.png.*file is empty'):
            dataset[5]

    def test_workers_count_together_and_errors_keep_to_one_line(self, make, monkeypatch):
        import gc

        from mmengine.dataset import pseudo_collate
        from torch.utils.data import DataLoader
        dataset = make(total=24, bad=(0, 2, 3), max_bad_images=0.1)
        # How long workers have for leaving.
        monkeypatch.setattr('torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL', 0.2)
        loader = DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=pseudo_collate)
        with pytest.raises(DataError, match='3 of 24 images cannot be decoded') as error:
            for _ in loader:
                pass
        assert '\n' not in str(error.value) and 'Traceback' not in str(error.value)
        del error
        gc.collect()

    def test_evaluation_never_replaces(self, make, build, content):
        with pytest.raises(DataError, match=r'3\.png.*cannot be decoded: the file is empty'):
            make(test_mode=True)[3]
        with pytest.raises(ValueError, match="bad_images='replace' is for training"):
            build(content, test_mode=True, bad_images='replace')
        with pytest.raises(ValueError, match="bad_images='skip' must be"):
            build(content, bad_images='skip')
        with pytest.raises(ValueError, match='max_bad_images=2 must be a share'):
            build(content, max_bad_images=2)
