"""A module starts from a part of a checkpoint, says so, and takes nothing that does not fit."""
import json
import logging
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.model import BaseModule
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.testing import assert_close

from spartan_mm import SpaRTAN
from spartan_mm.errors import CheckpointError
from spartan_mm.weights import CheckedPretrained, ConvertedPretrained
from spartan_mm.weights.converters.spartan import convert_spartan

GOLDEN = Path(__file__).parents[1] / 'data' / 'golden'
ARCH = dict(stem_channels=8, depths=(1, 1, 1, 1), channels=(8, 16, 24, 32),
            expand_ratios=(2, 2, 2, 2), conv_types=('full', ) * 4)


class Classifier(nn.Module):

    def __init__(self, arch=ARCH):
        super().__init__()
        self.backbone = SpaRTAN(arch)
        self.head = nn.ModuleDict(dict(fc=nn.Linear(32, 10)))


class Part(BaseModule):
    """Initialises its own weights, as many of mmdet's and mmpretrain's modules do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def init_weights(self):
        nn.init.zeros_(self.linear.weight)


class Whole(BaseModule):

    def __init__(self, init_cfg=None):
        super().__init__(init_cfg)
        self.part = Part()


@pytest.fixture
def log(caplog):
    """What the log says while weights are initialised, at most a line for each message."""
    logger = MMLogger.get_instance('pretrained', logger_name='pretrained')
    logger.addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records]
    logger.removeHandler(caplog.handler)


@pytest.fixture
def checkpoint(tmp_path):
    """A classifier, as mmengine saves it."""
    classifier = Classifier()
    path = str(tmp_path / 'classifier.pth')
    torch.save(dict(meta={}, state_dict=classifier.state_dict(), optimizer={}), path)
    return classifier, path


def build(checkpoint, prefix='backbone.', arch=ARCH, **arguments):
    init_cfg = dict(type='CheckedPretrained', checkpoint=checkpoint, prefix=prefix)
    # As a detector does it.
    with DefaultScope.overwrite_default_scope('mmdet'):
        backbone = MODELS.build(dict(type='SpaRTAN', arch=arch, init_cfg=init_cfg, **arguments))
        backbone.init_weights()
    return backbone


@pytest.mark.parametrize('prefix', ['backbone.', 'backbone'])
def test_backbone_of_a_classifier(checkpoint, log, prefix):
    classifier, path = checkpoint
    backbone = build(path, prefix, out_indices=(1, 2, 3), frozen_stages=1)
    assert_close(backbone.state_dict(), classifier.backbone.state_dict())
    count = len(classifier.backbone.state_dict())
    assert (f'SpaRTAN: loaded {count} of {count} tensors from {path} (backbone.*); skipped: '
            'head.fc.weight, head.fc.bias') in log()


def test_bare_weights_of_a_backbone(log, tmp_path):
    source = SpaRTAN(ARCH)
    torch.save(source.state_dict(), tmp_path / 'backbone.pth')
    backbone = build(str(tmp_path / 'backbone.pth'), prefix='')
    assert_close(backbone.state_dict(), source.state_dict())
    assert any(message.endswith('backbone.pth; skipped: nothing') for message in log())


def test_many_skipped_weights_are_counted(log, tmp_path):
    weights = {f'backbone.{key}': value for key, value in SpaRTAN(ARCH).state_dict().items()}
    weights |= {f'neck.{i}': torch.zeros(1) for i in range(300)}
    torch.save(dict(state_dict=weights), tmp_path / 'detector.pth')
    build(str(tmp_path / 'detector.pth'))
    assert any(message.endswith('skipped: neck.0, neck.1, neck.2, neck.3, neck.4, ... '
                                '(300 in all)') for message in log())


def test_without_a_checkpoint_the_weights_are_random_and_the_log_says_so(log, caplog):
    torch.manual_seed(1)
    expected = SpaRTAN(ARCH)
    torch.manual_seed(1)
    backbone = build(None)
    assert_close(backbone.state_dict(), expected.state_dict())
    [record] = [record for record in caplog.records if 'random weights' in record.getMessage()]
    assert record.levelno == logging.WARNING
    assert 'SpaRTAN starts from random weights' in record.getMessage()


def test_parts_do_not_initialise_themselves_again(tmp_path):
    source = Whole()
    torch.save(source.state_dict(), tmp_path / 'whole.pth')
    whole = Whole(dict(type='CheckedPretrained', checkpoint=str(tmp_path / 'whole.pth')))
    whole.init_weights()
    assert_close(whole.state_dict(), source.state_dict())
    assert whole.part.linear.weight.abs().sum() > 0


@pytest.mark.parametrize('change, message', [
    (dict(depths=(1, 1, 2, 1)), r"classifier.pth does not fit the config's SpaRTAN: .*stage 3 has "
                                r'1 blocks instead of 2.* Give SpaRTAN the options'),
    (dict(stem_channels=16), r'does not fit .* of another shape \(stem\.0\.conv\.weight: '
                             r'\(8, 3, 3, 3\) instead of \(16, 3, 3, 3\)'),
])
def test_another_architecture(checkpoint, change, message):
    with pytest.raises(CheckpointError, match=message):
        build(checkpoint[1], arch=ARCH | change)


def test_other_options(checkpoint):
    with pytest.raises(CheckpointError, match='does not fit .* unknown to the model .*gamma'):
        build(checkpoint[1], spatial_mixer='conv')


@pytest.mark.parametrize('content, prefix, message', [
    (None, '', r"does not fit .* no tensor .* give init_cfg the prefix 'backbone\.'"),
    (dict(model={}), 'backbone.', r'spartan-mm convert'),
    (None, 'encoder.', r"has no weights that begin with 'encoder\.' for SpaRTAN; its weights begin "
                       'with: backbone, head'),
])
def test_nothing_fits(checkpoint, content, prefix, message):
    if content is not None:
        torch.save(content, checkpoint[1])
    with pytest.raises(CheckpointError, match=message):
        build(checkpoint[1], prefix)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'none\.pth, which init_cfg names, does not exist'):
        build(str(tmp_path / 'none.pth'))
    (tmp_path / 'broken.pth').write_text('nothing')
    with pytest.raises(CheckpointError, match=r'broken\.pth cannot be read'):
        build(str(tmp_path / 'broken.pth'))


def test_the_prefix_ends_in_a_dot():
    assert CheckedPretrained('a.pth', 'backbone').prefix == 'backbone.'
    assert CheckedPretrained('a.pth').prefix == ''


# ---- ConvertedPretrained -------------------------------------------------------------------------


@pytest.fixture
def released(tmp_path):
    """A file as the authors write it, their config object included, and the converted backbone."""
    manifest = json.loads((GOLDEN / 'spartan_small.json').read_text())
    fill = runpy.run_path(str(GOLDEN / 'fill.py'))['fill_state_dict']
    weights = {name: torch.from_numpy(value) for name, value in fill(manifest['shapes']).items()}
    module = types.ModuleType('their_config')
    module.Settings = type('Settings', (), dict(__module__='their_config'))
    sys.modules['their_config'] = module
    torch.save(dict(model=weights, config=module.Settings()), tmp_path / 'released.pth')
    del sys.modules['their_config']
    converted, arch = convert_spartan(weights)
    return tmp_path / 'released.pth', arch, {
        name.removeprefix('backbone.'): value for name, value in converted.items()
        if name.startswith('backbone.')}


def test_released_classifier_loads_without_the_packages_it_was_written_with(released):
    path, arch, expected = released
    backbone = SpaRTAN(arch, init_cfg=dict(
        type='ConvertedPretrained', converter='spartan', checkpoint=str(path)))
    backbone.init_weights()
    assert_close(dict(backbone.state_dict()), expected, rtol=0, atol=0)


def test_other_architecture_names_the_file(released):
    path, *_ = released
    with pytest.raises(CheckpointError, match=r'released\.pth does not fit SpaRTAN'):
        ConvertedPretrained(str(path), 'spartan')(SpaRTAN('xt'))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'none\.pth, which init_cfg names, does not exist; '
                                                'point to yours'):
        ConvertedPretrained(str(tmp_path / 'none.pth'), 'spartan')(SpaRTAN('xt'))


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / 'text.pth').write_text('no weights')
    with pytest.raises(CheckpointError, match=r'text\.pth cannot be read as a checkpoint'):
        ConvertedPretrained(str(tmp_path / 'text.pth'), 'spartan')(SpaRTAN('xt'))


def test_unknown_converter():
    with pytest.raises(ValueError, match="converter='timm' is unknown; choose one of"):
        ConvertedPretrained('a.pth', 'timm')
