"""RT-DETR of transformers, an independent implementation, gives the same outputs.

Runs where transformers is installed: `make test-parity`.
"""
import json

import pytest
import torch
from mmengine.registry import init_default_scope
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import spartan_mm.detection  # noqa: F401 - registers what the settings name
from spartan_mm.weights.converters.convert import convert, read_source
from spartan_mm.weights.converters.huggingface import convert_huggingface, export_huggingface
from spartan_mm.weights.safe_load import read_foreign

transformers = pytest.importorskip(
    'transformers', reason='transformers is not installed; run make test-parity')

BACKBONES = dict(
    r18=dict(layer_type='basic', depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512]),
    r34=dict(layer_type='basic', depths=[3, 4, 6, 3], hidden_sizes=[64, 128, 256, 512]),
    r50={},
    r101=dict(depths=[3, 4, 23, 3]))
SETTINGS = dict(
    r18=dict(encoder_in_channels=[128, 256, 512], hidden_expansion=0.5, decoder_layers=3),
    r34=dict(encoder_in_channels=[128, 256, 512], hidden_expansion=0.5, decoder_layers=4),
    r50={},
    r101=dict(encoder_hidden_dim=384, decoder_in_channels=[384] * 3, encoder_ffn_dim=2048))


@pytest.fixture(autouse=True)
def mmdet_scope():
    init_default_scope('mmdet')


def convert_file(src, dst, to='mm'):
    convert(read_source(src), dst, to)


@torch.no_grad()
def randomise(model):
    """Weights and statistics under which no term of the model vanishes."""
    for module in model.modules():
        if hasattr(module, 'running_var'):  # BatchNorms, frozen ones as well
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.2)
        elif isinstance(module, nn.LayerNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.2)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.normal_(0, module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                module.bias.add_(torch.randn_like(module.bias), alpha=0.2)
    for head in (model.model.enc_score_head, *model.model.decoder.class_embed):
        head.weight.mul_(8)


def make_config(name, version='RTDetr', **changes):
    """A config of transformers, with three classes."""
    backbone = transformers.RTDetrResNetConfig(
        out_features=['stage2', 'stage3', 'stage4'], **BACKBONES[name])
    return getattr(transformers, f'{version}Config')(**dict(
        backbone_config=backbone, num_queries=30, id2label={0: 'cat', 1: 'dog', 2: 'remote'},
        label2id={'cat': 0, 'dog': 1, 'remote': 2}, **SETTINGS[name]) | changes)


def make(name, version='RTDetr', **changes):
    """A model of transformers with random weights."""
    config = make_config(name, version, **changes)
    torch.manual_seed(0)
    model = getattr(transformers, f'{version}ForObjectDetection')(config).eval()
    randomise(model)
    return model


def make_ours(path, **neck):
    """A model of ours with the settings and weights in a file."""
    from mmdet.registry import MODELS
    checkpoint = read_foreign(path)
    settings = checkpoint['meta']['arch']
    model = MODELS.build(dict(
        settings, type='RTDETR', neck=dict(settings['neck'], type='HybridEncoder', **neck),
        bbox_head=dict(settings['bbox_head'], type='RTDETRHead'))).eval()
    model.load_state_dict(checkpoint['state_dict'], strict=True)
    return model


def draw_images(model, height, width):
    """Images of which rounding does not decide which tokens become queries, with the outputs."""
    for _ in range(50):
        images = nn.functional.interpolate(torch.rand(2, 3, 6, 6), size=(height, width),
                                           mode='bicubic') + 0.2 * torch.rand(2, 3, height, width)
        outputs = model(images)
        scores = outputs.enc_outputs_class.amax(-1).sort(descending=True).values
        if scores[:, :model.config.num_queries + 1].diff().max() < -2e-4:
            return images, outputs
    raise AssertionError('the scores of queries are too close to each other')


@torch.no_grad()
def assert_same_outputs(theirs, ours, height, width):
    images, expected = draw_images(theirs, height, width)
    (logits, ), (boxes, ) = ours(images, mode='tensor')
    assert expected.logits.std() > 0.5 and expected.pred_boxes.std() > 0.05
    for name, found, wanted in (('logits', logits, expected.logits),
                                ('boxes', boxes, expected.pred_boxes)):
        print(f'{height} x {width}: {name} {tuple(wanted.shape)} from {wanted.min():.2f} to '
              f'{wanted.max():.2f}, differ by at most {(found - wanted).abs().max():.2e}')
        assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize('name, changes', [
    ('r18', {}), ('r50', {}),
    ('r18', dict(freeze_backbone_batch_norms=False, decoder_n_points=2, num_queries=12)),
    ('r18', dict(decoder_attention_heads=4, encoder_attention_heads=16, encoder_hidden_dim=128,
                 decoder_in_channels=[128] * 3, encoder_ffn_dim=96, hidden_expansion=1.0))])
def test_there_and_back(tmp_path, name, changes):
    theirs = make(name, **changes)
    theirs.save_pretrained(tmp_path / 'theirs')
    convert_file(tmp_path / 'theirs', tmp_path / 'ours.pth')
    assert read_foreign(tmp_path / 'ours.pth')['meta']['dataset_meta'] == dict(
        classes=('cat', 'dog', 'remote'))
    assert_same_outputs(theirs, make_ours(tmp_path / 'ours.pth'), 160, 160)

    convert_file(tmp_path / 'ours.pth', tmp_path / 'back', 'huggingface')
    assert_close(load_file(tmp_path / 'back' / 'model.safetensors'),
                 load_file(tmp_path / 'theirs' / 'model.safetensors'), rtol=0, atol=0)
    saved, written = (json.loads((tmp_path / folder / 'config.json').read_text())
                      for folder in ('theirs', 'back'))
    assert written.pop('backbone_config').items() <= saved.pop('backbone_config').items()
    assert written.items() <= saved.items()

    back, report = transformers.RTDetrForObjectDetection.from_pretrained(
        tmp_path / 'back', output_loading_info=True)
    assert not any(report.values()), report
    assert back.config.id2label == {0: 'cat', 1: 'dog', 2: 'remote'}
    images = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        found, wanted = back.eval()(images), theirs(images)
    assert_close((found.logits, found.pred_boxes), (wanted.logits, wanted.pred_boxes),
                 rtol=0, atol=0)


@pytest.mark.parametrize('name', BACKBONES)
def test_names_and_settings_of_every_depth(name):
    config = make_config(name)
    with torch.device('meta'):
        model = transformers.RTDetrForObjectDetection(config)
    # A number of its own for every tensor, without its memory.
    weights = {key: torch.tensor(index).expand(tensor.shape)
               for index, (key, tensor) in enumerate(model.state_dict().items())
               if not key.startswith(('class_embed.', 'bbox_embed.'))}
    converted, settings, _ = convert_huggingface(weights, config.to_dict())
    assert f"r{settings['backbone']['depth']}" == name
    exported, written = export_huggingface(converted, settings, ['cat', 'dog', 'remote'])
    assert exported.keys() == weights.keys()
    assert_close(exported, weights, rtol=0, atol=0)
    for key in ('encoder_hidden_dim', 'decoder_in_channels', 'decoder_layers', 'hidden_expansion'):
        assert written[key] == getattr(config, key)


def test_images_that_are_not_square(tmp_path):
    """With the numbering of positions that transformers shares with the official code."""
    theirs = make('r18')
    theirs.save_pretrained(tmp_path / 'theirs')
    convert_file(tmp_path / 'theirs', tmp_path / 'ours.pth')
    ours = make_ours(tmp_path / 'ours.pth', legacy_position=True)
    assert_same_outputs(theirs, ours, 128, 192)


def test_version_2(tmp_path):
    theirs = make('r18', 'RTDetrV2')
    theirs.save_pretrained(tmp_path / 'theirs', max_shard_size='20MB')
    assert (tmp_path / 'theirs' / 'model.safetensors.index.json').is_file()
    convert_file(tmp_path / 'theirs', tmp_path / 'ours.safetensors')
    assert_same_outputs(theirs, make_ours(tmp_path / 'ours.safetensors'), 160, 160)


def test_image_processor(tmp_path):
    """It prepares images as RT-DETR's test pipeline does."""
    import numpy as np
    from mmdet.registry import TRANSFORMS
    make('r18').save_pretrained(tmp_path / 'theirs')
    convert_file(tmp_path / 'theirs', tmp_path / 'ours.pth')
    convert_file(tmp_path / 'ours.pth', tmp_path / 'back', 'huggingface')
    processor = transformers.RTDetrImageProcessor.from_pretrained(tmp_path / 'back')
    image = np.random.default_rng(0).integers(0, 256, (120, 200, 3), np.uint8)
    found = processor(image, return_tensors='pt')['pixel_values'][0]

    resize = TRANSFORMS.build(dict(type='mmdet.Resize', scale=(640, 640), keep_ratio=False,
                                   backend='pillow', interpolation='bilinear'))
    wanted = torch.from_numpy(resize(dict(img=image))['img'].copy()).permute(2, 0, 1) / 255
    assert_close(found, wanted, rtol=0, atol=1e-6)
