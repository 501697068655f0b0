"""Which configs are plain data."""

import json
import sys
from importlib import import_module

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS

from spartan_mm.weights.config_text import CodeError, check, read_text
from spartan_mm.zoo import config_path


def test_a_config_is_data():
    config = Config.fromfile(config_path('rtdetr_spartan_t'))
    assert read_text(config.pretty_text) == config.to_dict()


@pytest.mark.parametrize('text', [
    "a = dict(type='mmdet.RTDETR', b=[1, -2.5, None, True], c={'d': (1, 'e')})",
    "collate_fn = dict(type='mmengine.dataset.pseudo_collate')",
    "a = dict(type='mmdet.RTDETR', size=set())",
    "a = dict({'b c': 1, -1: dict()}, )",
    "a = dict(type='torchvision.transforms.Resize')",
    "a = [dict(type='mmdet.RTDETR'), dict(type='torch.nn.modules.linear.Linear')]",
    "a = dict(type='RTDETR', _scope_='mmdet')",
    "test_cfg = dict(nms=dict(type='nms', iou_threshold=0.5))",
    "adapt_cfg = dict(type='dilation', dilation=3)",
    "lateral = dict(type='interpolation_conv', kernel_size=3)",
    "custom_imports = dict(imports=['spartan_mm.classification'])\n"
    "a = dict(type='TorchvisionTransforms', transforms=[dict(type='RandomVerticalFlip')])",
    "a = dict(type='LoadImageFromFile', backend_args=None)",
    "a = dict(type='LoadImageFromFile', backend_args=dict(backend='local'))",
    "a = dict(type='TIMMFeatures', model_name='resnet10t')",
    "a = dict(loss_type='anything')",
    "a = dict(type='mmengine.hooks.checkpoint_hook.CheckpointHook')",
    "a = dict(type='spartan_mm.engine.nan_guard.FiniteNumbersHook')",
    "custom_imports = dict(imports=['spartan_mm.detection'], allow_failed_imports=False)",
    "custom_imports = dict(imports='mmdet.models')",
    "default_scope = 'mmpretrain'",
    "optimizer = dict(type='torch.optim.AdamW', eps=inf)",
])
def test_data(text):
    # As Python has it, apart from names that it lacks.
    names = dict(inf=float('inf'))
    exec(text, names)
    assert read_text(text).items() <= names.items()


@pytest.mark.parametrize('text', ['a = dict(function=<function f at 0x7f>)', 'a = b\0'])
def test_what_is_no_python_cannot_run(text):
    with pytest.raises((SyntaxError, ValueError)) as caught:
        read_text(text)
    assert not isinstance(caught.value, CodeError)


@pytest.mark.parametrize('text', [
    'import os',
    'from os import system',
    'exec("a = 1")',
    'x = exec',
    '__builtins__ = 1',
    'a = [__builtins__]',
    'a = "".__class__',
    'a = dict(b=[c for c in (1, 2)])',
    'a = lambda: 1',
    'a = f"{b}"',
    'a = b[0]',
    'a, b = 1, 2',
    'if 1:\n    a = 1',
    "_base_ = 'other.py'",
    'a = 1\nb = "{{$HOME:x}}"',
    'import os; a = {{ $HOME:1 }}',
    "a = dict(type='os.system', command='ls')",
    "a = {'type': 'subprocess.Popen'}",
    "a = dict(type='builtins.exec')",
    "a = dict(type='mmengine.utils.misc.subprocess.Popen')",
    "a = dict(type='torch.hub.load')",
    "a = dict(b=[dict(type='mmengine.fileio.load', file='x.pkl')])",
    "a = dict(type='mmengine.load', file='x.pkl')",
    "a = dict(type='mmengine.runner.Runner', work_dir='/')",
    "a = dict(type='mmengine.utils.misc.subprocess')",
    "a = dict(type='torch.PyTorchFileWriter', file_name='/any/path')",
    "a = dict(type='torch.nn.modules.module.warnings.warn')",
    "a = dict(type='torch.nn.functional.relu')",
    "a = dict(type='numpy.fromfile')",
    "a = dict(type='my.random.Net')",
    "a = dict(type='this')",
    "a = dict(type=['os.system'])",
    "a = dict(type=inf)",
    "kind = 'os.system'\nmodel = dict(type=kind, command='ls')",
    "model = dict([('type', 'os.system'), ('command', 'ls')])",
    "key = 'type'\nmodel = {key: 'os.system', 'command': 'ls'}",
    "a = [('type', 'os.system')]\nmodel = dict(a, command='ls')",
    "model = {'ty' 'pe': 'os.system'}",
    "model = {**dict(type='RTDETR')}",
    "model = dict(**dict(type='RTDETR'))",
    "model = dict({'type': 'os.system'})",
    "inf = 'os.system'",
    'dict = 1',
    'a = set([1])',
    'a = b = 1',
    "a = 'b' + 'c'",
    # Factories, which hand all that they are given on.
    *(f"a = [dict(type={name!r})]" for name in (
        'HuggingFaceClassifier', 'mmpretrain.HuggingFaceClassifier', 'TimmClassifier',
        'TIMMBackbone', 'AutoModelForCausalLM', 'AutoTokenizer', 'BertModel', 'BlipCaption',
        'mmpretrain.models.utils.huggingface.register_hf_model',
        'mmpretrain.models.classifiers.hugging_face.HuggingFaceClassifier')),
    "default_scope = 'mmpretrain'\nmodel = dict(type='AutoModelForCausalLM')",
    # Text that is evaluated, where mmcv, mmdet and mmpretrain do so.
    "test_cfg = dict(nms=dict(type='exec(input())', iou_threshold=0.5))",
    "a = dict(type='torchvision/ConvertImageDtype', dtype='float or exec(input())')",
    "a = dict(type='CameraMotionCompensation', warp_mode='exec(input())')",
    "a = dict(type='Albu', transforms=[])",
    # Files and addresses.
    "a = dict(type='KnowledgeDistillationSingleStageDetector', teacher_config='other.py')",
    "a = dict(type='ArcFaceClsHead', margins='http://example.org/margins')",
    "a = dict(type='VectorQuantizer', beit_v2=True)",
    "a = dict(type='VQAGenerationHead', inference_method='rank', answer_list_path='a.json')",
    "a = dict(type='mmengine.dataset.base_dataset.BaseDataset', ann_file='http://a.org/b.pkl')",
    "a = dict(type='CocoDataset', ann_file=['b.json', 'b.yml'])",
    "a = dict(type='mmdet.OpenImagesDataset', hierarchy_file='b.np')",
    "a = dict(type='mmdet.RefCocoDataset', split_file='b.json')",
    "a = dict(type='spartan_mm.inference.Detector', config='b.py')",
    "a = dict(type='spartan_mm.detection.DetInferencer', model='b.py')",
    "a = dict(type='spartan_mm.analysis.models.Named')",
    "a = dict(type='TIMMFeatures', model_name='resnet10t', checkpoint_path='a.pth')",
    "a = dict(type='LoadImageFromFile', backend_args=dict(backend='memcached', sys_path='.'))",
    "a = dict(type='LoadImageFromFile', file_client_args=dict(backend='petrel'))",
    "a = dict(type='SpaRTAN', b=[(dict(trust_remote_code=True), )])",
    "visualizer = dict(vis_backends=[dict(type='WandbVisBackend')])",
    "hook = dict(type='EMAHook', ema_type='HuggingFaceClassifier')",
    "optim_wrapper = dict(constructor='HuggingFaceClassifier')",
    "optim_wrapper = dict(constructor='planted.factory')",
    "hook = dict(type='EMAHook', ema_type='os.system')",
    "runner_type = 'Runner'",
    "visualizer = dict(type='DetLocalVisualizer', save_dir='/somewhere')",
    "a = dict(type='nobody_knows')",
    "a = dict(type='mmseg.NotInstalled', _scope_='mmdet')",
    # Modules.
    *(f"custom_imports = dict(imports=[{name!r}])\na = dict(type='RTDETR')" for name in (
        'test.autotest', 'torch.test', 'idlelib.idle', 'numpy.tests', 'no_such_module', 'imports',
        '', 3)),
    "custom_imports = ['this']",
    "a = [dict(type='RTDETR', _scope_='no_such_module')]",
    "custom_imports = dict(imports=['this'])",
    "custom_imports = dict(imports='os.path')",
    "custom_imports = dict(imports=['pip.__main__'])",
    "default_scope = 'this'",
    "a = dict(type='RTDETR', _scope_='this')",
    'a = ' + '-' * 100_000 + '1',
])
def test_code(text):
    with pytest.raises(CodeError):
        read_text(text)


@pytest.mark.parametrize('text, found', [
    ('a = 1\nb = open("c")', "line 2: open('c')"),
    ("a = {\n'type': 'os.system'}", "type='os.system'"),
    ("custom_imports = dict(imports=['no_such_module'])",
     "it imports 'no_such_module', which is neither installed nor imported"),
])
def test_what_it_is_is_named(text, found):
    with pytest.raises(CodeError) as caught:
        read_text(text)
    assert str(caught.value) == found


@pytest.mark.parametrize('text', [
    "custom_imports = dict(imports=['planted'])", "default_scope = 'planted'",
    "a = dict(type='planted.Net')", "a = dict(type='planted.RTDETR')", "a = dict(type='mmocr.Net')",
    "a = dict(type='RTDETR', _scope_='mmocr')"])
def test_no_file_of_the_current_folder_runs(tmp_path, monkeypatch, text):
    for name in ('planted.py', 'mmocr.py'):
        (tmp_path / name).write_text('open("trace", "w")\nclass Net:\n    pass')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend('')
    with pytest.raises(CodeError):
        read_text(text)
    assert not (tmp_path / 'trace').exists()


def test_no_folder_of_the_current_one_joins_a_package_of_many_places(tmp_path, monkeypatch):
    # Which has no file, and was imported when the folder was not there.
    import mpl_toolkits
    assert not getattr(mpl_toolkits, '__file__', None)
    text = "custom_imports = dict(imports=['mpl_toolkits.{}'])"
    assert read_text(text.format('mplot3d'))
    (tmp_path / 'mpl_toolkits').mkdir()
    (tmp_path / 'mpl_toolkits/planted.py').write_text('')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CodeError, match='neither installed'):
        read_text(text.format('planted'))


def test_a_package_that_is_installed_editable_may_be_named(tmp_path, monkeypatch):
    source, packages = tmp_path / 'source', tmp_path / 'site-packages'
    info = packages / 'own_net-1.dist-info'
    info.mkdir(parents=True)
    (info / 'METADATA').write_text('Name: own-net\nVersion: 1\n')
    (info / 'top_level.txt').write_text('own_net\n')
    (info / 'direct_url.json').write_text(
        json.dumps(dict(url=source.as_uri(), dir_info=dict(editable=True))))
    for name in ('own_net', 'beside_it'):
        (source / name).mkdir(parents=True)
        (source / name / '__init__.py').write_text('')
    monkeypatch.setattr('site.getsitepackages', lambda: [str(packages)])
    monkeypatch.syspath_prepend(source)
    text = "custom_imports = dict(imports=['{}.models'])"
    assert read_text(text.format('own_net'))
    with pytest.raises(CodeError, match='neither installed'):
        read_text(text.format('beside_it'))


def test_of_what_was_imported_classes_may_be_named(tmp_path, monkeypatch):
    (tmp_path / 'own_parts.py').write_text(
        'from mmengine.registry import MODELS\n\n\n@MODELS.register_module()\nclass OwnPart:\n'
        '    pass\n\n\n@MODELS.register_module()\ndef own_factory(**_):\n    pass\n')
    monkeypatch.syspath_prepend(tmp_path)
    import_module('own_parts')
    try:
        text = "custom_imports = dict(imports='own_parts')\na = dict(type='OwnPart')"
        assert read_text(text)
        with pytest.raises(CodeError, match='own_factory'):
            read_text(text.replace('OwnPart', 'own_factory'))
    finally:
        del sys.modules['own_parts']
        del MODELS.module_dict['OwnPart'], MODELS.module_dict['own_factory']


@pytest.mark.parametrize('name', ['rtdetr_r18vd', 'spartan_xt_digits', 'rtdetr_timm',
                                  'retinanet_spartan_t', 'spartan_xt_ema'])
def test_configs_of_this_package_pass(name):
    check(Config.fromfile(config_path(name)).to_dict())


def test_what_is_registered_may_be_built(monkeypatch):
    monkeypatch.setattr(Net, '__module__', 'my.random')
    monkeypatch.setitem(MODELS.module_dict, 'random', Net)
    assert read_text("a = [dict(type='random'), dict(type='my.random.Net')]")
    with pytest.raises(CodeError):
        read_text("a = dict(type='my.random.os')")


class Net:
    pass
