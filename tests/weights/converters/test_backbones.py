"""Other authors' backbones: their numbers after conversion, and no key unaccounted for."""
import json
import re
import runpy
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

from spartan_mm import zoo
from spartan_mm.cli import main
from spartan_mm.errors import CheckpointError
from spartan_mm.weights.converters.backbones import convert_backbone, export_backbone
from spartan_mm.weights.loading import load_for_inference

GOLDEN = Path(__file__).parents[2] / 'data' / 'golden'
STAND_IN = runpy.run_path(str(GOLDEN / 'fill.py'))
MODEL = {  # config of each golden case
    'moganet': 'moganet_xt', 'unireplknet': 'unireplknet_a', 'casvit': 'casvit_xs',
    'lsnet': 'lsnet_t', 'affnet': 'affnet_et'}
# The same names, shapes, types and bits.
assert_identical = partial(torch.testing.assert_close, rtol=0, atol=0)


def meta_of(name):
    return json.loads((GOLDEN / f'nb_{MODEL[name]}.json').read_text())['meta']


@pytest.fixture(scope='module')
def original(golden):
    """Gives the authors' state dict of a network, in a dict that may change."""
    @cache
    def read(name):
        factors, weights = meta_of(name)['scaled'], golden(f'nb_{MODEL[name]}')
        for key in weights:
            for end, factor in factors.items():
                if key.endswith(end):
                    weights[key] = weights[key] * factor
        return weights

    return lambda name: dict(read(name))


def build(name, settings):
    """The classifier of the config, with the backbone that was found."""
    config = zoo.get_config(MODEL[name])
    config.model.backbone.update(settings)
    config.model.data_preprocessor = None
    config.model.train_cfg = None
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(config.model).eval()


@torch.no_grad()
def check_outputs(name, model):
    """Within 2e-5 of each array's largest value."""
    meta, expected = meta_of(name), np.load(GOLDEN / f'nb_{MODEL[name]}.npz')
    images = torch.from_numpy(STAND_IN['image'](meta['input_shape'], meta['input_seed']))
    model.backbone.out_indices = (0, 1, 2, 3)
    maps = model.backbone(images)
    vectors = model.neck(maps[-1:])
    found = dict(logits=model.head(vectors))
    if name == 'casvit':
        found['head_logits'] = model.head.branches[0](vectors[-1])
    first = 2 if name == 'affnet' else 1  # whose first layer is in the stem here
    for number, x in enumerate(maps, first):
        found |= {f'stage{number}_mean': x.mean((2, 3)), f'stage{number}_first': x[:, :2]}
    left = {key for key in expected if key not in found}
    assert left == ({'stage1_mean', 'stage1_first', 'stage6_mean', 'stage6_first'}
                    if name == 'affnet' else set())
    for key, value in found.items():
        reference = torch.from_numpy(expected[key])
        torch.testing.assert_close(value, reference, rtol=0,
                                   atol=2e-5 * reference.abs().max().item(), msg=key)


@pytest.mark.parametrize('name', MODEL)
def test_golden_outputs_there_and_back(name, original):
    converted, settings, deploy = convert_backbone(name, original(name))
    assert not deploy
    model = build(name, settings)
    model.load_state_dict(converted, strict=True)
    check_outputs(name, model)

    exported, same = export_backbone(name, converted)
    kept = {key: exported.pop(key) for key in meta_of(name)['integer_buffers_kept']}
    assert same == settings
    assert_identical(exported, original(name))
    # Position 0 of a 2 x 2 map is 0, a column, a row and both away from the four.
    assert all(value[0].tolist() == [0, 1, 2, 3] for value in kept.values())
    assert_identical(convert_backbone(name, exported | kept)[0], converted)


def test_merged_form_there_and_back(original, tmp_path):
    """UniRepLKNet's authors merge it, too."""
    converted, settings, _ = convert_backbone('unireplknet', original('unireplknet'))
    model = build('unireplknet', settings)
    model.load_state_dict(converted)
    model.backbone.switch_to_deploy()
    torch.save(dict(state_dict=model.state_dict(), meta=dict(deploy=True)), tmp_path / 'ours.pth')
    assert main(['convert', str(tmp_path / 'ours.pth'), str(tmp_path / 'theirs.pth'),
                 '--to', 'unireplknet']) == 0
    merged = torch.load(tmp_path / 'theirs.pth', weights_only=True)['model']
    assert {'stages.0.0.dwconv.bias', 'stages.1.0.dwconv.lk_origin.bias',
            'stages.1.0.pwconv2.0.bias'} <= merged.keys()
    assert not [key for key in merged if key.endswith(('.beta', 'running_mean', 's.0.0.gamma'))]

    assert main(['convert', 'backbone', 'unireplknet', str(tmp_path / 'theirs.pth'),
                 str(tmp_path / 'back.pth')]) == 0
    model = build('unireplknet', settings)
    load_for_inference(model, tmp_path / 'back.pth')
    check_outputs('unireplknet', model)


def test_command(original, tmp_path, capsys):
    """A file of a training, with its moving average; what it is its names tell as well."""
    weights = original('moganet')
    torch.save(dict(state_dict=weights, epoch=300), tmp_path / 'theirs.pth')
    for words in (['backbone', 'moganet'], []):
        flags = [] if words else ['--to', 'mm']
        assert main(['convert', *words, str(tmp_path / 'theirs.pth'), str(tmp_path / 'ours.pth'),
                     *flags]) == 0
        assert "{'type': 'MogaNet', 'arch': 'xt'}" in capsys.readouterr().out
    assert_identical(torch.load(tmp_path / 'ours.pth', weights_only=True)['state_dict'],
                     convert_backbone('moganet', weights)[0])


@pytest.mark.parametrize('words, message', [
    (['backbone', 'resnet', 'a', 'b'], "there is no backbone 'resnet', choose from: moganet, "),
    (['backbone', 'moganet', 'a'], 'SRC and DST are needed, 1 path given'),
    (['backbone', 'moganet', 'a', 'b', '--to', 'mm'], 'leave --from and --to away'),
    (['a', 'b'], 'the following arguments are required: --to')])
def test_wrong_words(words, message, capsys):
    with pytest.raises(SystemExit):
        main(['convert', *words])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('change, message', [
    (lambda weights: weights.pop('blocks2.1.mlp.fc2.bias'), 'missing keys: blocks2.1.mlp.fc2.bias'),
    (lambda weights: weights.update(extra=torch.zeros(1)), 'keys left over: extra'),
    (lambda weights: weights.update({'head.weight': torch.zeros(1000, 5)}),
     r'shapes differ: head.fc.weight: \(1000, 5\) instead of \(1000, 192\)')])
def test_what_does_not_fit_is_refused(change, message, original):
    weights = original('moganet')
    change(weights)
    with pytest.raises(CheckpointError) as caught:
        convert_backbone('moganet', weights)
    assert re.search(message, ' '.join(caught.value.args))


def test_distilled_weights_have_two_heads(original):
    weights = original('lsnet')
    weights |= {key.replace('head.', 'head_dist.'): value + 1 for key, value in weights.items()
                if key.startswith('head.')}
    converted, _, _ = convert_backbone('lsnet', weights)
    assert_identical(converted['head.branches.1.fc.bias'], weights['head.l.bias'] + 1)
    assert_identical({key: value for key, value in export_backbone('lsnet', converted)[0].items()
                      if not key.endswith('idxs')}, weights)
