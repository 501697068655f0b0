"""What the runtime makes of images, beside what the pipelines make of them."""
import io
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import sklearn
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from PIL import Image

import spartan_mm
import spartan_mm.classification  # noqa: F401 - registers TorchvisionTransforms
from spartan_mm.errors import UsageError
from spartan_mm.export.preprocessing import describe_resize
from spartan_mm.runtime import preprocess, read_image

PHOTOS = Path(sklearn.__file__).parent / 'datasets' / 'images'
LOAD = dict(type='LoadImageFromFile')


def config_of(*steps, scope='mmdet', loader=LOAD):
    pack = dict(type='PackDetInputs' if scope == 'mmdet' else 'PackInputs')
    return Config(dict(default_scope=scope, test_dataloader=dict(dataset=dict(
        pipeline=[loader, *steps, *([] if scope == 'mmdet' else [pack])]))))


def torchvision(*transforms):
    return dict(type='TorchvisionTransforms', transforms=[*transforms])


RESIZES = {
    **{f'{backend} {method}': config_of(dict(
        type='Resize', scale=(96, 80), backend=backend, interpolation=method))
        for backend in ('cv2', 'pillow') for method in ('nearest', 'bilinear', 'bicubic')},
    'enlarging': config_of(dict(type='FixScaleResize', scale=(300, 280))),
    'enlarging bicubic': config_of(dict(type='Resize', scale=(300, 280), interpolation='bicubic')),
    'edge and crop': config_of(dict(type='ResizeEdge', scale=75), dict(
        type='CenterCrop', crop_size=(64, 50)), scope='mmpretrain'),
    'torchvision': config_of(torchvision(dict(type='Resize', size=75), dict(
        type='CenterCrop', size=64)), scope='mmpretrain'),
    'torchvision coarse': config_of(torchvision(dict(
        type='Resize', size=[60, 90], antialias=False)), scope='mmpretrain'),
    'torchvision bicubic': config_of(torchvision(dict(
        type='Resize', size=[60, 90], interpolation='bicubic')), scope='mmpretrain'),
    'as stored': config_of(dict(type='Resize', scale=(64, 64)), loader=dict(
        LOAD, color_type='color_ignore_orientation')),
    'floats': config_of(dict(type='Resize', scale=(64, 64)), loader=dict(LOAD, to_float32=True)),
}
MODELS = ['spartan_xt', 'spartan_t_224', 'spartan_xt_digits', 'rtdetr_spartan_t',
          'rtdetr_spartan_xt_digits']


@cache
def draw_files():
    """Contents of files, by name: photographs of many kinds and sides."""
    photo, flower = (Image.open(PHOTOS / f'{name}.jpg') for name in ('china', 'flower'))
    for image in (photo, flower):
        image.info.pop('icc_profile')  # of which libpng complains
    small, exif = photo.resize((130, 87)), Image.Exif()
    exif[0x0112] = 6
    deep = np.asarray(small).astype(np.uint16) * 257 - np.arange(3, dtype=np.uint16)
    contents = {f'{name}.jpg': (PHOTOS / f'{name}.jpg').read_bytes() for name in ('china', 'flower')
                } | {'16 bits.png': cv2.imencode('.png', deep)[1].tobytes(),
                     '16 bits, grey.png': cv2.imencode('.png', deep[..., 0])[1].tobytes(),
                     '16 bits.tiff': cv2.imencode('.tiff', deep[..., 0])[1].tobytes()}

    def save(name, image, **options):
        file = io.BytesIO()
        image.save(file, Path(name).suffix[1:].replace('jpg', 'jpeg'), **options)
        contents[name] = file.getvalue()
    for mode in ('L', 'P', '1', 'RGBA', 'LA'):
        save(f'{mode}.png', small.convert(mode))
    clear = small.convert('RGBA')
    clear.putalpha(Image.linear_gradient('L').resize(clear.size))
    save('alpha.png', clear)
    save('alpha.webp', clear, lossless=True, exact=True)
    save('CMYK.jpg', small.convert('CMYK'))
    save('turned.jpg', flower, exif=exif)
    for sides in ((1, 1), (333, 111), (37, 200), (700, 9), (160, 160)):
        save(f'{sides}.png', flower.resize(sides))
    return contents


def compare(cfg, path):
    """How far the runtime's image of a file is from that of the config's pipeline."""
    loader, *steps = cfg.test_dataloader.dataset.pipeline
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        results = Compose([loader, *(step for step in steps if 'Pack' not in step['type']
                                     and 'Annotations' not in step['type'])])(
            dict(img_path=str(path), img_id=0, ori_shape=None))
    expected = np.rint(results['img'][..., ::-1].transpose(2, 0, 1))
    rule = describe_resize(cfg)
    found = preprocess(read_image(path, rule['upright']), rule)
    assert found.shape == expected.shape and found.dtype == np.uint8
    return np.abs(found - expected.astype(float))


class TestPixels:

    @pytest.mark.parametrize('name', [*RESIZES, *MODELS])
    def test_equal_the_pipeline(self, name, tmp_path):
        """No value is off by more than a grey level, of CMYK by two, and few are off at all."""
        cfg = RESIZES.get(name) or spartan_mm.get_config(name)
        differences = []
        for file, content in draw_files().items():
            path = tmp_path / file
            path.write_bytes(content)
            difference = compare(cfg, path)
            assert difference.max() <= (2 if file == 'CMYK.jpg' else 1), file
            if file != 'CMYK.jpg':  # which decoders turn into RGB in different ways
                differences.append(difference.ravel())
        share = (np.concatenate(differences) > 0).mean()
        print(f'{name}: {100 * share:.2f} % of {sum(map(len, differences)):,} values differ')
        # Pillow is the same on both sides, and OpenCV's arithmetic of bytes is known.
        assert share < (0.2 if name in ('torchvision coarse', 'floats') else 0.01)


class TestRules:

    @pytest.mark.parametrize('steps, expected', [
        (dict(type='Resize', scale=(96, 80), backend='pillow'),
         dict(rule='stretch', size=[80, 96], crop=None, interpolation='bilinear', antialias=True,
              upright=True)),
        (dict(type='mmdet.FixShapeResize', width=96, height=80, interpolation='bicubic'),
         dict(rule='stretch', size=[80, 96], crop=None, interpolation='bicubic', antialias=False,
              upright=True))])
    def test_of_mmdet(self, steps, expected):
        assert describe_resize(config_of(steps)) == expected

    def test_other_size(self):
        assert describe_resize(spartan_mm.get_config('rtdetr_spartan_t'), [320, 480]
                               )['size'] == [320, 480]
        rule = describe_resize(config_of(dict(type='ResizeEdge', scale=256), dict(
            type='CenterCrop', crop_size=224), scope='mmpretrain'), [112, 112])
        assert (rule['size'], rule['crop']) == (128, [112, 112])

    @pytest.mark.parametrize('message, steps', [
        (r'Resize .*keeps the ratio', [dict(type='Resize', scale=(96, 80), keep_ratio=True)]),
        (r'Pad .*no step that is known', [dict(type='Resize', scale=96), dict(type='Pad')]),
        (r'Resize .*scale_factor', [dict(type='Resize', scale_factor=0.5)]),
        (r"Resize .*'area'", [dict(type='Resize', scale=96, interpolation='area')]),
        (r'ResizeEdge .*another side', [dict(type='ResizeEdge', scale=96, edge='long')]),
        (r'Resize .*follows another', [dict(type='Resize', scale=96)] * 2),
        (r'CenterCrop .*does not follow', [dict(type='CenterCrop', crop_size=96)]),
        (r'CenterCrop .*pads', [dict(type='Resize', scale=64),
                                dict(type='CenterCrop', crop_size=96)]),
        (r'Resize of Torchvision.*max_size', [torchvision(dict(type='Resize', size=9,
                                                           max_size=9))]),
        (r'Resize of Torchvision.*bicubic', [torchvision(dict(
            type='Resize', size=9, interpolation='bicubic', antialias=False))]),
        (r'Resize of Torchvision.*nearest', [torchvision(dict(
            type='Resize', size=9, interpolation='nearest'))]),
        (r'Grayscale of TorchvisionTransforms', [torchvision(dict(type='Grayscale'))]),
        (r'pipeline .*nothing in it resizes', []),
    ])
    def test_what_has_none(self, message, steps):
        with pytest.raises(UsageError, match=f'^(the )?{message}.*--raw'):
            describe_resize(config_of(*steps))

    @pytest.mark.parametrize('cfg', [
        Config(), config_of(dict(type='Resize', scale=9), loader=dict(LOAD, color_type='unchanged'))
    ])
    def test_no_coloured_images(self, cfg):
        with pytest.raises(UsageError, match='begin with LoadImageFromFile of coloured images'):
            describe_resize(cfg)

    def test_overshoot_of_floats(self):
        with pytest.raises(UsageError, match='bicubic interpolation of floats'):
            describe_resize(config_of(dict(type='Resize', scale=9, interpolation='bicubic'),
                                      loader=dict(LOAD, to_float32=True)))
