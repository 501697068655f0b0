"""The commands that convert files."""
import json
import re
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from safetensors.torch import load_file, save_file

from spartan_mm.backbones import SpaRTAN
from spartan_mm.cli import main
from spartan_mm.weights.converters.convert import read_source
from spartan_mm.weights.converters.names import strip_prefix
from spartan_mm.weights.converters.rtdetr import convert_rtdetr
from spartan_mm.weights.converters.spartan import convert_spartan
from spartan_mm.weights.stored_config import as_text

ROOT = Path(__file__).parents[3]
TOOLS = ROOT / 'tools' / 'model_converters'
# The same names, shapes, types and bits.
assert_identical = partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.fixture
def small(golden):
    return golden('spartan_small')


@pytest.fixture
def r18(golden):
    return golden('rtdetr_r18vd')


@pytest.fixture
def run_tool(monkeypatch, capsys):
    """Runs a command in this process and returns what it prints."""
    def run(name, *arguments):
        monkeypatch.setattr(sys, 'argv', [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TOOLS / f'{name}.py'), run_name='__main__')
        if end.value.code:
            raise end.value
        return capsys.readouterr().out
    return run


def convert(*words):
    return main(['convert', *map(str, words)])


# ---------------------------------------------------------------------------------------- SpaRTAN


def test_converted_checkpoint_is_good_for_pretrained(tmp_path, run_tool, small):
    torch.save(dict(model={f'module.{name}': value for name, value in small.items()}, epoch=300),
               tmp_path / 'official.pth')
    target = tmp_path / 'new' / 'converted.pth'
    output = run_tool('spartan_to_mm', tmp_path / 'official.pth', target)
    assert "'channels': (16, 24, 40, 64)" in output
    assert '314 tensors' in output

    checkpoint = torch.load(target, weights_only=True)
    expected, arch = convert_spartan(small)
    assert_identical(checkpoint['state_dict'], expected)
    assert checkpoint['meta']['arch'] == arch

    backbone = SpaRTAN(arch, init_cfg=dict(
        type='Pretrained', checkpoint=str(target), prefix='backbone.'))
    backbone.init_weights()
    assert_identical(dict(backbone.state_dict()), strip_prefix(expected, 'backbone.'))


@pytest.mark.parametrize('ours, back', [
    ('ours.pth', 'back.pth'), ('ours.safetensors', 'back.safetensors')])
def test_safetensors_and_back(tmp_path, run_tool, small, ours, back):
    save_file(small, tmp_path / 'official.safetensors')
    run_tool('spartan_to_mm', tmp_path / 'official.safetensors', tmp_path / ours)
    output = run_tool('mm_to_spartan', tmp_path / ours, tmp_path / back)
    assert f'{len(small)} tensors written to {tmp_path / back}' in output
    found = (load_file(tmp_path / back) if back.endswith('.safetensors')
             else torch.load(tmp_path / back, weights_only=True)['model'])
    assert_identical(found, small)


@pytest.mark.parametrize('change, message', [
    (lambda weights: weights.pop('layers.0.scale_1'), 'missing keys:\n  layers.0.scale_1'),
    (lambda weights: weights.update(extra=torch.zeros(1)), 'keys left over:\n  extra'),
    (lambda weights: weights.clear(), 'with weights .it has: none'),
])
def test_what_does_not_fit_is_refused(tmp_path, run_tool, small, change, message):
    change(small)
    torch.save(dict(model=small), tmp_path / 'official.pth')
    with pytest.raises(SystemExit, match=message) as caught:
        run_tool('spartan_to_mm', tmp_path / 'official.pth', tmp_path / 'converted.pth')
    assert re.match(r'error: .*official\.pth was not converted: ', str(caught.value))
    assert not (tmp_path / 'converted.pth').exists()


@pytest.mark.parametrize('tool', ['spartan_to_mm', 'rtdetr_to_mm'])
@pytest.mark.parametrize('name', ['backbone.stages.0.blocks.0.scale_1', 'head.fc.bias',
                                  'bbox_head.reg_branches.0.0.bias'])
def test_what_is_ours_already_is_not_converted(tmp_path, run_tool, tool, name):
    torch.save(dict(state_dict={name: torch.zeros(1)}), tmp_path / 'ours.pth')
    with pytest.raises(SystemExit, match='has the names of this package already; nothing is to be'):
        run_tool(tool, tmp_path / 'ours.pth', tmp_path / 'new.pth')


def test_target_that_cannot_be_written(tmp_path, run_tool, small):
    torch.save(small, tmp_path / 'official.pth')
    with pytest.raises(SystemExit, match=r'cannot be written'):
        run_tool('spartan_to_mm', tmp_path / 'official.pth', tmp_path / 'official.pth' / 'new.pth')


def test_a_file_that_is_not_there(tmp_path, run_tool):
    with pytest.raises(SystemExit, match=r'^error: .*absent\.pth does not exist$'):
        run_tool('rtdetr_to_mm', tmp_path / 'absent.pth', tmp_path / 'new.pth')


# ---------------------------------------------------------------------------------------- RT-DETR


def test_averaged_weights_there_and_back(tmp_path, capsys, r18):
    trained = {name: tensor + 1 for name, tensor in r18.items()}
    torch.save(dict(model=trained, ema=dict(module=r18, updates=3), last_epoch=71),
               tmp_path / 'official.pth')
    convert(tmp_path / 'official.pth', tmp_path / 'out' / 'ours.pth', '--to', 'mm')
    assert "'depth': 18" in capsys.readouterr().out
    source = read_source(tmp_path / 'out' / 'ours.pth')
    expected, settings = convert_rtdetr(r18)
    assert_identical(source.weights, expected)
    assert source.checkpoint['meta']['arch'] == settings

    convert(tmp_path / 'out' / 'ours.pth', tmp_path / 'back.pth', '--to', 'official')
    assert_identical(torch.load(tmp_path / 'back.pth', weights_only=True)['model'], r18)


def save_trained(path, state_dict, **changes):
    """Write what a training of RT-DETR-R18 with 7 classes leaves."""
    config = Config.fromfile(ROOT / 'configs' / 'detection' / 'rtdetr_r18vd.py')
    config.merge_from_dict({'model.bbox_head.num_classes': 7, 'model.num_queries': 50} | changes)
    classes = tuple(f'thing {index}' for index in range(7))
    torch.save(dict(
        state_dict=state_dict, ema_state_dict=dict(steps=torch.tensor(3)),
        meta=dict(cfg=as_text(config.to_dict()), epoch=3, dataset_meta=dict(classes=classes)),
        optimizer=dict(state={}, param_groups=[])), path)


@pytest.mark.parametrize('source', ['trained', 'converted'])
def test_transformers_there_and_back(tmp_path, run_tool, r18, source):
    ours = tmp_path / 'ours.pth'
    if source == 'trained':
        save_trained(ours, convert_rtdetr(r18)[0])
    else:
        torch.save(r18, tmp_path / 'official.pth')
        run_tool('rtdetr_to_mm', tmp_path / 'official.pth', ours)
    output = run_tool('mm_to_rtdetr', ours, tmp_path / 'folder', '--to', 'huggingface')
    assert '640 x 640 pixels' in output

    config = json.loads((tmp_path / 'folder' / 'config.json').read_text())
    processor = json.loads((tmp_path / 'folder' / 'preprocessor_config.json').read_text())
    assert processor['size'] == dict(height=640, width=640)
    known = source == 'trained'
    assert config['num_queries'] == (50 if known else 300)
    assert config['id2label']['6'] == ('thing 6' if known else 'LABEL_6')

    run_tool('rtdetr_to_mm', tmp_path / 'folder', tmp_path / 'back.safetensors')
    source = read_source(tmp_path / 'back.safetensors')
    meta = source.checkpoint['meta']
    assert_identical(source.weights, convert_rtdetr(r18)[0])
    assert meta['arch']['num_queries'] == config['num_queries']
    assert ('dataset_meta' in meta) == known

    with pytest.raises(SystemExit, match='give the folder that it lies in'):
        run_tool('rtdetr_to_mm', tmp_path / 'folder' / 'model.safetensors', tmp_path / 'none.pth')


@pytest.mark.parametrize('changes, message', [
    ({'test_dataloader.dataset.pipeline.1.scale': (640, 320)}, 'tested on 640 x 320 pixels'),
    ({'test_dataloader.dataset.pipeline.1.keep_ratio': True}, 'keep_ratio'),
    ({'model.data_preprocessor.bgr_to_rgb': False}, 'bgr_to_rgb')])
def test_config_that_transformers_cannot_hold(tmp_path, run_tool, changes, message):
    save_trained(tmp_path / 'ours.pth', dict(weight=torch.zeros(1)), **changes)
    with pytest.raises(SystemExit, match=message):
        run_tool('mm_to_rtdetr', tmp_path / 'ours.pth', tmp_path / 'folder', '--to', 'huggingface')
    assert not (tmp_path / 'folder').exists()


def test_model_merged_for_inference(tmp_path, run_tool):
    torch.save(dict(state_dict=dict(weight=torch.zeros(1)), meta=dict(deploy=True)),
               tmp_path / 'ours.pth')
    with pytest.raises(SystemExit, match=r'ours\.pth was merged for inference'):
        run_tool('mm_to_rtdetr', tmp_path / 'ours.pth', tmp_path / 'new.pth', '--to', 'official')


# ------------------------------------------------------------------------------ spartan-mm convert


def test_what_a_file_is_is_told_by_its_names(tmp_path, small, capsys):
    torch.save(dict(model=small), tmp_path / 'spartan.pth')
    assert convert(tmp_path / 'spartan.pth', tmp_path / 'ours.safetensors', '--to', 'mm') == 0
    assert convert(tmp_path / 'ours.safetensors', tmp_path / 'back.pth', '--to', 'spartan') == 0
    assert_identical(torch.load(tmp_path / 'back.pth', weights_only=True)['model'], small)
    assert f'tensors written to {tmp_path / "back.pth"}' in capsys.readouterr().out


@pytest.mark.parametrize('names, flags, message', [
    (['something.weight'], ['--to', 'mm'], 'is no checkpoint of this package, .*something.weight'),
    (['encoder.a'], ['--to', 'huggingface'], 'convert it to mm first'),
    (['encoder.a'], ['--from', 'official', '--to', 'official'], 'convert it to mm first'),
    (['head.fc.bias'], ['--to', 'mm'], 'nothing is to be converted'),
    (['head.fc.bias'], ['--from', 'spartan', '--to', 'mm'], 'nothing is to be converted'),
    (['layers.0.a'], ['--from', 'mm', '--to', 'spartan'], 'does not fit|not a whole SpaRTAN'),
    (['model.backbone.model.a'], ['--to', 'mm'], 'give the folder that it lies in'),
])
def test_what_cannot_be_converted(tmp_path, names, flags, message):
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / 'a.pth')
    with pytest.raises(SystemExit, match=rf'error: .*a\.pth was not converted: .*({message})'):
        convert(tmp_path / 'a.pth', tmp_path / 'new', *flags)
    assert not (tmp_path / 'new').exists()
