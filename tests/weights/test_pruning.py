"""Smaller models of trained ones: what is left computes what it did, and can be trained."""
import math
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from torch import nn
from torch.testing import assert_close

import spartan_mm
from spartan_mm.backbones import SpaRTAN
from spartan_mm.cli import main
from spartan_mm.errors import CheckpointError, UsageError
from spartan_mm.files import UnwritableError
from spartan_mm.weights.forms import switch_to_deploy
from spartan_mm.weights.pruning import Pruning, prune_checkpoint
from spartan_mm.weights.saving import deploy_checkpoint

DATA = Path(__file__).parents[1] / 'data'
ARCH = dict(stem_channels=8, depths=(2, 1), channels=(16, 24), expand_ratios=(4, 2),
            conv_types=('full', 'depthwise'))


def make_model(**settings):
    """A model that is a backbone, all its weights random, and its config."""
    torch.manual_seed(0)
    settings = dict(arch=ARCH, out_indices=(0, 1)) | settings
    model = nn.ModuleDict(dict(backbone=SpaRTAN(**settings)))
    return randomize(model), Config(dict(model=dict(backbone=dict(type='SpaRTAN', **settings))))


def randomize(model):
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith('running_mean'):
            nn.init.normal_(buffer)
        elif name.endswith('running_var'):
            nn.init.uniform_(buffer, 0.5, 2)
    return model.double().eval()


def cut_off(number, *columns):
    """Let columns of weights, equally many, be 0 at random places: what leads there is idle."""
    chosen = torch.randperm(columns[0].shape[1])[:number]
    for weight in columns:
        weight.data[:, chosen] = 0


def idle_waves(model, share):
    """Let a share of the waves behind the first C do nothing, in pairs or whole groups."""
    for mixer in (block.cmixer for stage in model.backbone.stages for block in stage.blocks):
        channels, group = mixer.proj_in.in_channels, mixer.refine.conv.weight.shape[1]
        unit = math.lcm(2, group)
        places = [weight.data.unflatten(1, (-1, unit))[:, -(-channels // unit):]
                  for weight in (mixer.proj_out.weight, mixer.se.squeeze.weight)]
        cut_off(int(share * places[0].shape[1] + 0.5), *places)


def idle_channels(model, share):
    """Let a share of the SMixers' inner channels do nothing, at each place of its own if it may."""
    for mixer in (block.smixer for stage in model.backbone.stages for block in stage.blocks):
        number = round(share * mixer.proj_in.out_channels)
        cut_off(number, *mixer.proj_out.weight.chunk(2, 1), mixer.high_se.squeeze.weight,
                mixer.low_se.squeeze.weight)
        if mixer.high_freq.conv.groups == 1:
            first, *others = (part.weight for part in mixer.low_freq.modules()
                              if isinstance(part, nn.Conv2d))
            cut_off(number, mixer.high_freq.conv.weight, first)
            for weight in others:
                cut_off(number, weight)


def build_smaller(pruning, config):
    settings = {key: value for key, value in config.model.backbone.items() if key != 'type'}
    smaller = nn.ModuleDict(dict(backbone=SpaRTAN(**settings))).double().eval()
    smaller.load_state_dict(pruning.state_dict)
    return smaller


@pytest.mark.parametrize('deploy', [False, True], ids=['training', 'deploy'])
@pytest.mark.parametrize('settings, waves', [
    ({}, (16 + 24, 24 + 12)), (dict(low_freq_kernel=5), (40, 36)),
    (dict(conv_types='full'), (40, 36)),
    (dict(conv_types='depthwise', low_freq_kernel='dcls'), (40, 36)),
    (dict(conv_types='depthwise'), (40, 36)),
    (dict(conv_types='depthwise', arch=dict(ARCH, expand_ratios=(3, 1))), (30, 24)),
    (dict(arch=dict(ARCH, hidden_channels=(56, 36), inner_channels=(6, 10))), (36, 30))],
    ids=str)
def test_without_what_does_nothing_a_model_computes_the_same(settings, waves, deploy):
    model, config = make_model(**settings)
    idle_waves(model, 0.5)
    idle_channels(model, 0.5)
    pruning = Pruning(model, config)
    pruning.narrow('waves', 0.5)
    pruning.narrow('inner', 0.5)
    inner = model.backbone.arch.get('inner_channels', (8, 12))
    assert config.model.backbone.arch.inner_channels == tuple(width // 2 for width in inner)
    assert config.model.backbone.arch.get('hidden_channels') == waves
    smaller, images = build_smaller(pruning, config), torch.randn(2, 3, 64, 48).double()
    if deploy:
        switch_to_deploy(smaller)
    assert_close(smaller.backbone(images), model.backbone(images), rtol=1e-10, atol=1e-10)


def test_only_waves_that_no_argmax_can_pick_are_left_out():
    model, config = make_model()
    before = model.state_dict()
    for stage in model.backbone.stages:  # as the least of all
        for block in stage.blocks:
            channels = block.cmixer.proj_in.in_channels
            block.cmixer.proj_out.weight.data[:, :channels] = 0
    pruning = Pruning(model, config)
    pruning.narrow('waves', 1)
    assert config.model.backbone.arch.hidden_channels == ARCH['channels']
    for name, tensor in pruning.state_dict.items():
        if '.cmixer.refine.' in name and tensor.dim():
            assert_close(tensor, before[name][:len(tensor)], rtol=0, atol=0)
    with torch.no_grad():
        build_smaller(pruning, config).backbone(torch.randn(1, 3, 32, 32).double())


def test_nothing_left_out_changes_nothing():
    model, config = make_model()
    pruning = Pruning(model, config)
    for kind in ('waves', 'inner'):
        pruning.narrow(kind, 0)
    pruning.drop_blocks(0)
    assert not pruning.changes and config.model.backbone.arch == ARCH
    assert [*pruning.state_dict] == [*model.state_dict()]
    assert all(torch.equal(tensor, model.state_dict()[name])
               for name, tensor in pruning.state_dict.items())


@pytest.mark.parametrize('wanted', [1, ['backbone.stages.0.blocks.0']], ids=str)
def test_a_block_that_adds_nothing(wanted):
    model, config = make_model()
    block = model.backbone.stages[0].blocks[0]
    for part in (block.layer_scale1, block.layer_scale2):
        part.data.zero_()
    pruning = Pruning(model, config)
    pruning.drop_blocks(wanted)
    assert pruning.changes == {'backbone.arch.depths': ((2, 1), (1, 1))}
    images = torch.randn(1, 3, 48, 32).double()
    assert_close(build_smaller(pruning, config).backbone(images), model.backbone(images))


@pytest.mark.parametrize('prune, message', [
    (lambda it: it.narrow('inner', 0.95), '--inner 0.95 leaves less than two of the 8 channels of '
                                          'backbone.stages.0.blocks.0.smixer'),
    (lambda it: it.narrow('ffn', 0.5), '--ffn: the model has no feed-forward network'),
    (lambda it: it.drop_blocks(2), '--blocks 2: SpaRTAN has 3 blocks here, of which 1 may go'),
    (lambda it: it.drop_blocks(['backbone.stages.0.blocks.2']), 'there is no block backbone'),
    (lambda it: it.drop_blocks(['backbone.stages.1.blocks.0']), 'stages.1 would lose all its'),
])
def test_what_cannot_be_left_out(prune, message):
    with pytest.raises(UsageError, match=message):
        prune(Pruning(*make_model()))


@pytest.mark.slow
def test_feed_forward_networks_and_fusion_blocks_of_a_detector():
    config = Config.fromfile(DATA / 'user_detector.py')
    config.model.neck.update(num_blocks=2, expansion=1.)
    model = randomize(spartan_mm.get_model(config))
    for layer in (model.neck.aifi, *model.decoder.layers):
        cut_off(16, layer.linear2.weight)
    for layer in (*model.neck.top_down_blocks, *model.neck.bottom_up_blocks):
        for block in layer.blocks:
            cut_off(8, block.dense.conv.weight, block.pointwise.conv.weight)
    pruning = Pruning(model, config)
    pruning.narrow('ffn', 0.5)
    pruning.narrow('csp', 0.25)
    assert pruning.changes == {'neck.ffn_dims': (32, 16), 'decoder.ffn_dims': (32, 16),
                               'neck.block_channels': (32, 24)}
    smaller, images = spartan_mm.get_model(config).double(), torch.rand(1, 3, 64, 64).double()
    smaller.load_state_dict(pruning.state_dict)
    with torch.no_grad():
        expected = model.infer(images)
        assert_close(smaller.infer(images), expected, rtol=1e-8, atol=1e-8)
        assert_close(switch_to_deploy(smaller).infer(images), expected, rtol=1e-8, atol=1e-8)


@pytest.fixture(scope='module')
def trained(user_project, tmp_path_factory):
    """Of each task a config and a checkpoint, as a training leaves them."""
    files = {}
    for task in ('classifier', 'detector'):
        config = Config.fromfile(user_project / f'user_{task}.py')
        files[task] = tmp_path_factory.mktemp(task) / 'trained.pth'
        torch.save(dict(state_dict=spartan_mm.get_model(config).state_dict(), meta=dict(
            cfg=config.pretty_text, epoch=3,
            dataset_meta=dict(classes=('disc', 'square') if task == 'classifier'
                              else ('square', 'disc')))), files[task])
    return files


@pytest.mark.slow
@pytest.mark.parametrize('task, flags', [
    ('classifier', []), ('detector', ['--ffn', '0.5', '--csp', '0.5'])])
def test_what_is_written_is_trained_tested_deployed_and_published(
        user_project, trained, tmp_path, monkeypatch, task, flags, capfd):
    monkeypatch.chdir(user_project)

    def run(*words):
        assert main([str(word) for word in words]) == 0

    run('prune', f'user_{task}.py', trained[task], '--waves', '0.5', '--inner', '0.5', *flags,
        '--out-dir', tmp_path)
    assert 'backbone.arch.hidden_channels: (16, 32, 48, 64) became (12, 24, 36, 48)' in (
        capfd.readouterr().out)
    config, checkpoint = (tmp_path / f'user_{task}_pruned{suffix}' for suffix in ('.py', '.pth'))
    run('train', config, '--work-dir', tmp_path / 'work_dir', '--cfg-options',
        'train_cfg.max_epochs=1')
    run('test', config, checkpoint, '--work-dir', tmp_path / 'test')
    run('deploy', config, tmp_path / 'work_dir' / 'epoch_1.pth', tmp_path / 'deployed.pth')
    run('publish', checkpoint, tmp_path / 'published')
    [published] = tmp_path.glob('published-*.safetensors')
    backbone = spartan_mm.get_model(spartan_mm.config_from(published), published).backbone
    assert backbone.arch['hidden_channels'] == (12, 24, 36, 48)


def test_files_that_cannot_be_pruned_or_written(user_project, trained, tmp_path):
    config = Config.fromfile(user_project / 'user_classifier.py')
    deploy_checkpoint(spartan_mm.get_model(config), trained['classifier'],
                      tmp_path / 'deployed.pth')
    with pytest.raises(CheckpointError, match='is of the deploy form, which cannot be pruned'):
        prune_checkpoint(config, tmp_path / 'deployed.pth', tmp_path / 'out', dict(waves=0.5))
    (tmp_path / 'out.pth').mkdir()
    with pytest.raises(UnwritableError, match='out.pth cannot be written: it is a folder'):
        prune_checkpoint(config, trained['classifier'], tmp_path / 'out', dict(waves=0.5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['deployed.pth', 'out.pth']


@pytest.mark.parametrize('flags, message', [
    ([], 'nothing to leave out is named'), (['--waves', '1.5'], '1.5 must be a number from 0 to 1'),
    (['--blocks', '1', '2'], '--blocks takes one number, or the names of blocks'),
    (['--blocks', 'x'], 'x must be a number, or a name such as backbone.stages.2.blocks.5')])
def test_flags_that_say_nothing(flags, message, capfd):
    try:
        status = main(['prune', str(DATA / 'user_classifier.py'), 'no.pth', *flags])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2 and message in capfd.readouterr().err
