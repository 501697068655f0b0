"""YOLO's and Pascal VOC's labels: what they mean where they are right, a sentence where not."""
import codecs
import shutil

import numpy as np
import pytest
from mmdet.registry import DATASETS, METRICS
from mmengine.config import Config
from PIL import Image

from spartan_mm.datasets.check import check_config
from spartan_mm.datasets.data_errors import DataError
from spartan_mm.datasets.label_files import read_yolo

CLASSES = ('cat', 'dog')
ONE = '0 0.5 0.5 0.2 0.4\n'
BOX = ('<annotation><size><width>64</width><height>48</height></size><object><name>dog</name>'
       '<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part><bndbox><xmin>3</xmin>'
       '<ymin>5</ymin><xmax>20</xmax><ymax>30</ymax></bndbox></object></annotation>')


@pytest.fixture
def write(tmp_path):
    """Writes labels, a text for each picture of 64x48; None for a picture without a file."""
    def write(suffix='.txt', **labels):
        for name, content in labels.items():
            for folder in ('images', 'labels'):
                (tmp_path / folder).mkdir(exist_ok=True)
            Image.new('RGB', (64, 48)).save(tmp_path / 'images' / f'{name}.png')
            if content is not None:
                content = content if isinstance(content, bytes) else content.encode()
                (tmp_path / 'labels' / f'{name}{suffix}').write_bytes(content)
        return tmp_path
    return write


def build(root, kind='YOLO', **options):
    prefix = dict(img='images') if kind == 'YOLO' else dict(img='images', xml='labels')
    return DATASETS.build(dict(
        dict(type=f'Checked{kind}Dataset', data_root=str(root), data_prefix=prefix,
             metainfo=dict(classes=CLASSES)) | options))


def boxes_of(dataset, index=0):
    return [(item['bbox_label'], item['ignore_flag'], *np.round(item['bbox'], 9))
            for item in dataset.get_data_info(index)['instances']]


@pytest.mark.parametrize('content, expected', [
    (ONE, [(0, 0, 25.6, 14.4, 38.4, 33.6)]),
    ('1 .5 .5 1 1\r\n\r\n  \r\n0 0.25 0.5 0.5 1.0\r\n',
     [(1, 0, 0, 0, 64, 48), (0, 0, 0, 0, 32, 48)]),
    (codecs.BOM_UTF8 + b'0.0 0.5 0.5 0.25 0.25', [(0, 0, 24, 18, 40, 30)]),
    (ONE.encode('utf-16'), [(0, 0, 25.6, 14.4, 38.4, 33.6)]),
    # A polygon; the box around it.
    ('1 0.25 0.25 0.75 0.5 0.5 0.75', [(1, 0, 16, 12, 48, 36)]),
    # What rounding puts a little beyond the picture.
    ('1 0.5 0.5 1.0005 1', [(1, 0, 0, 0, 64, 48)]),
    ('', []), (None, [])], ids=str)
def test_yolo(write, content, expected):
    assert boxes_of(build(write(a=content, b=ONE))) == expected


@pytest.mark.parametrize('side', [7, 61, 640, 1333, 4000])
def test_six_decimals_hold_hundredths_of_pixels(tmp_path, side):
    """A box of COCO's comes back as it was."""
    Image.new('1', (side, 31)).save(tmp_path / 'a.png')
    rng = np.random.default_rng(side)
    left = rng.integers(0, 100 * side - 1, 200)
    width = (rng.random(200) * (100 * side - left)).astype(int) + 1
    (tmp_path / 'a.txt').write_text(''.join(
        f'0 {(x + w / 2) / 100 / side:.6f} 0.5 {w / 100 / side:.6f} 1\n'
        for x, w in zip(left, width, strict=True)))
    content, findings = read_yolo(str(tmp_path), str(tmp_path), CLASSES)
    assert not findings
    assert [item['bbox'][::2] for item in content['annotations']] == [
        [x / 100, w / 100] for x, w in zip(left.tolist(), width.tolist(), strict=True)]


@pytest.mark.parametrize('content, message', [
    ('2 .5 .5 .1 .1', 'a.txt: line 1 has class 2, but there are 2 classes, from 0 to 1 (cat, dog)'),
    ('-1 .5 .5 .1 .1', 'line 1 has class -1, but'),
    ('0.5 .5 .5 .1 .1', 'line 1 has class 0.5, but'),
    ('nan .5 .5 .1 .1', 'line 1 has class nan, but'),
    (f'{ONE}\ncat .5 .5 .1 .1', "line 3 is 'cat .5 .5 .1 .1', which has something else than"),
    ('0 .5 .5 .1', 'line 1 has 4 numbers, but must have 5, `class x y width height`, or a class'),
    ('0 .5 .5 .1 .1 .9', 'line 1 has 6 numbers, as predictions have with their score'),
    ('0 .5 .5 .1 .1 .9 .1 .3', 'line 1 has 8 numbers, but must have 5'),
    ('0 12 14 10 30', 'all numbers behind the class must be shares of the picture, from 0 to 1: '
                      'are these pixels?'),
    ('0 .5 -.5 .1 .1', 'must be shares of the picture, from 0 to 1'),
    ('0 .5 inf .1 .1', 'must be shares'), ('0 .5 nan .1 .1', 'must be shares'),
    ('0 .5 .5 0 .1', 'annotation 1 (a.txt line 1) of image 1 (a.png) has bbox=[32.0, 21.6, 0.0, '
                     '4.8] (x, y, width, height), area=0.0: no width or no height'),
    (b'\xff\xfe\xfd', 'not a text in UTF-8')], ids=str)
def test_faulty_yolo(write, content, message):
    with pytest.raises(DataError) as raised:
        build(write(a=content, b=ONE))
    assert message in str(raised.value) and '\n' not in str(raised.value)


@pytest.mark.parametrize('first_pixel, left', [(0, 3), (1, 2)])
def test_voc(write, first_pixel, left):
    difficult = BOX.replace('<part>', '<difficult>1</difficult><part>')
    # Of tools that write no size, or zeros.
    bare = BOX.replace('64', '0').replace('48', '0').replace('>3<', '> 3.5\n<')
    dataset = build(write('.xml', a=BOX, b=difficult, c=bare, d='<annotation/>', e=None), 'VOC',
                    first_pixel=first_pixel)
    assert [boxes_of(dataset, index) for index in range(5)] == [
        [(1, 0, left, left + 2, 20, 30)], [(1, 1, left, left + 2, 20, 30)],
        [(1, 0, left + .5, left + 2, 20, 30)], [], []]


BOMB = '<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;&b;&b;">]>'
FILE = '<!DOCTYPE a [<!ENTITY b SYSTEM "other.txt">]>'


@pytest.mark.parametrize('content, message', [
    (BOX[:200], 'a.xml: no whole XML file: '), ('', 'a.xml: no whole XML file: '),
    (BOMB + BOX.replace('dog', '&c;'), 'has a document type (<!DOCTYPE>), which annotations have'),
    (FILE + BOX.replace('dog', '&b;'), 'has a document type (<!DOCTYPE>), which annotations have'),
    ('<a>' * 200 + '</a>' * 200, 'nested more than 100 deep'),
    ('<kml></kml>', 'a.xml: it holds <kml>, but VOC has <annotation>'),
    ('<?xml version="1.0" encoding="klingon"?>' + BOX, 'a.xml: no '),
    (BOX.replace('dog', 'Dog'), "object 1 is 'Dog', which is none of the 2 classes (cat, dog)"),
    (BOX.replace('<name>dog</name>', ''), 'object 1 has no <name>'),
    (BOX.replace('<xmax>20</xmax>', ''), "object 1 (dog) must have <bndbox> with numbers for xmin, "
                                         "ymin, xmax, ymax, but has '3, 5, , 30'"),
    (BOX.replace('>20<', '>inf<'), 'object 1 (dog) has a box that is not finite'),
    (BOX.replace('>20<', '>2<'), 'annotation 1 (a.xml object 1) of image 1 (a.png) has'),
    (BOX.replace('64', '48').replace('<height>48', '<height>64'),
     'its <size> is 48x64, but the picture has 64x48 pixels: one of the two was turned')], ids=str)
def test_faulty_voc(write, content, message):
    with pytest.raises(DataError) as raised:
        build(write('.xml', a=content, b=BOX), 'VOC')
    assert message in str(raised.value) and '\n' not in str(raised.value)


def test_folders_that_are_not_whole(write, tmp_path):
    write(a=None, b=None)
    with pytest.raises(DataError, match=r'2 pictures in .*images, but no file of labels \(.txt'):
        build(tmp_path)
    assert len(build(tmp_path, allow_no_objects=True)) == 2
    (tmp_path / 'labels' / 'c.txt').write_text(ONE)
    with pytest.raises(DataError, match='none of 2 pictures in .* here are a.png, b.png and c$'):
        build(tmp_path)
    write(c=ONE)
    shutil.copy(tmp_path / 'images' / 'c.png', tmp_path / 'images' / 'c.jpg')
    with pytest.raises(DataError, match='1 picture with the file of labels of another one'):
        build(tmp_path)
    (tmp_path / 'images' / 'c.jpg').write_text('no picture')
    (tmp_path / 'list.txt').write_text('c.jpg\nb.png\n')
    with pytest.raises(DataError, match='1 picture unreadable .c.jpg: it is of no known'):
        build(tmp_path, ann_file='list.txt')
    (tmp_path / 'images' / 'c.jpg').unlink()
    (tmp_path / 'list.txt').write_text(f'a\n./b.png\n{tmp_path}/images/c.png\nd\n')
    with pytest.raises(DataError, match='1 picture of the list missing in .*images .d.: corr'):
        build(tmp_path, ann_file='list.txt')
    (tmp_path / 'list.txt').write_text(f'a\n./b.png\n\n{tmp_path}/images/c.png\n')
    assert len(build(tmp_path, ann_file='list.txt')) == 3
    with pytest.raises(DataError, match='number the classes, but nothing names them'):
        build(tmp_path, metainfo={})
    with pytest.raises(DataError, match="There is no folder '.*nowhere'"):
        build(tmp_path, data_prefix=dict(img='nowhere'))


def test_pictures_are_measured_as_they_are_decoded(write, tmp_path):
    """Turned by EXIF, the shares are of the turned picture."""
    write(a=ONE)
    picture = Image.new('RGB', (64, 48))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / 'images' / 'a.jpg', exif=exif)
    (tmp_path / 'images' / 'a.png').unlink()
    dataset = build(tmp_path, pipeline=[dict(type='LoadImageFromFile')])
    assert boxes_of(dataset) == [(0, 0, 19.2, 19.2, 28.8, 44.8)]
    assert dataset[0]['img'].shape == (64, 48, 3)


def test_checked_and_evaluated_without_conversion(write):
    """``check-data`` says what it says of COCO's files, and the metric needs no file."""
    root = write(a=ONE, b=ONE + '1 .2 .2 .3 .3\n', c=None)
    (root / 'labels' / 'd.txt').write_text(ONE)
    dataset = dict(type='CheckedYOLODataset', data_root=str(root), data_prefix=dict(img='images'),
                   metainfo=dict(classes=CLASSES), test_mode=True)
    cfg = Config(dict(default_scope='mmdet', val_dataloader=dict(dataset=dataset),
                      val_evaluator=dict(type='CheckedCocoMetric', dataset=dataset)))
    [report] = check_config(cfg, ['val'])
    assert report.as_record()['objects_of_class'] == dict(cat=2, dog=1)
    messages = {finding.kind: finding.message for finding in report.findings}
    assert '1 of 3 pictures have no file of labels and count as' in messages['no file of labels']
    assert '1 of 3 files of labels' in messages['labels without a picture'] and (
        'd.txt' in messages['labels without a picture'])
    assert not report.broken

    metric = METRICS.build(cfg.val_evaluator)
    built = build(root, test_mode=True)
    metric.dataset_meta = built.metainfo
    truths = [np.array(boxes_of(built, index)).reshape(-1, 6) for index in range(3)]
    predictions = [({}, dict(img_id=index + 1, bboxes=truth[:, 2:], labels=truth[:, 0].astype(int),
                             scores=np.ones(len(truth)))) for index, truth in enumerate(truths)]
    assert metric.compute_metrics(predictions)['bbox_mAP'] == 1
    with pytest.raises(DataError, match=r'images: 1 of 3 images have no predictions'):
        metric.compute_metrics(predictions[:2])
