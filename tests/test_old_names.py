"""Names that the first version's README, docs and configs mention: they go on to work.

Commands under ``tools/`` with their flags, configs, registered types, and Python API. Internals may
be renamed, and so may what only maintainers ran, the tables of README and docs; these may not.
"""

import re
import runpy
import sys
from importlib import import_module
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import (
    HOOKS,
    LOOPS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    PARAM_SCHEDULERS,
    WEIGHT_INITIALIZERS,
    Registry,
)

import spartan_mm

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / 'tools'

COMMANDS = {
    'analysis_tools/benchmark.py':
        '--against --against-channels-last --against-compile --against-deploy --against-fused '
        '--amp --batch --channels-last --compile --count --data --deploy --device --fused --json '
        '--multi-scale --parts --repeats --size --threads --train --workers',
    'analysis_tools/browse_dataset.py':
        '--cfg-options --columns --number --out-dir --seed --side --split --stage',
    'analysis_tools/compare.py':
        '--accuracy --amp --batch --deploy --device --names --no-times --out-dir --rounds --shape '
        '--threads',
    'analysis_tools/compare_pretraining.py':
        '--cfg-options --data-root --epochs --num-train --num-val --seeds --work-dir',
    'analysis_tools/confusion_matrix.py': '--cfg-options --iou-thr --out-dir --score-thr',
    'analysis_tools/effective_receptive_field.py':
        '--device --layer --names --num-images --out-dir --random --seed --size',
    'analysis_tools/get_flops.py': '--deploy --depth --json --shape',
    'analysis_tools/grad_cam.py':
        '--class --device --layer --list-layers --method --names --out-dir --score-thr --top',
    'analysis_tools/interaction_order.py':
        '--baseline --batch-size --contexts --device --distance --grid --names --num-images '
        '--orders --out-dir --pairs --random --seed --target',
    'analysis_tools/plot_curves.py': '--metrics --names --out --x',
    'analysis_tools/spectra.py': '--device --num-images --out-dir --random --seed --window',
    'analysis_tools/worst_errors.py': '--cfg-options --iou-thr --number --out-dir --score-thr',
    'check_dataset.py': '--cfg-options --decode --out --split --workers',
    'dataset_converters/make_digit_folder.py': '--seed',
    'dataset_converters/make_digits.py': '--image-size --num-train --num-val --seed',
    'demo.py': '--cfg-options --data-root --quick --work-dir',
    'demo_classification.py': '--cfg-options --data-root --quick --work-dir',
    'dev/make_coco_like.py': '--boxes --images',
    'dev/replay_batch.py': '--device',
    'dev/soak.py': '--kills --seed --work-dir',
    'infer.py': '--batch-size --device --out-dir --score-thr --top',
    'model_converters/mm_to_rtdetr.py': '--to',
    'model_converters/mm_to_spartan.py': '',
    'model_converters/publish_model.py': '--classes --config',
    'model_converters/rtdetr_to_mm.py': '',
    'model_converters/spartan_to_mm.py': '',
    'model_converters/switch_to_deploy.py': '',
    'report.py': '--images --out --predictions --score-thr --test',
    'test.py':
        '--cfg-options --compile --launcher --out --show --show-dir --wait-time --work-dir',
    'train.py':
        '--amp --auto-scale-lr --cfg-options --channels-last --compile --deterministic --launcher '
        '--no-fuse --resume --save-every --seed --work-dir',
}

SCRIPTS = ('dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh')

MODEL_NAMES = '''
    spartan_xt_224 spartan_xt spartan_t_224 spartan_t spartan_xt_ema spartan_xt_bce
    spartan_xt_digits table4_conv_mlp table4_smixer_mlp table4_smixer_mlp_se table4_conv_mlp_se
    table4_conv_cmixer table4_smixer_cmixer table5_3x3 table5_5x5 table6_gelu_gelu table6_gelu_silu
    table6_silu_gelu table6_silu_silu table7_bn_bn table7_bn_ln table7_ln_bn table7_ln_ln
    table8_full table8_depthwise table8_hybrid rtdetr_spartan_t rtdetr_spartan_xt rtdetr_r18vd
    rtdetr_r34vd rtdetr_r50vd rtdetr_r101vd rtdetr_timm retinanet_spartan_t
    rtdetr_spartan_xt_digits
'''.split()

# By the registry of mmengine that they are in, or by the toolbox and the name of its own.
TYPES = {
    HOOKS: 'ClassCountCheckHook FiniteNumbersHook ResumableCheckpointHook',
    LOOPS: 'ResumableTrainLoop',
    MODELS: 'SpaRTAN TIMMFeatures',
    OPTIM_WRAPPER_CONSTRUCTORS: 'RuleOptimWrapperConstructor',
    WEIGHT_INITIALIZERS: 'CheckedPretrained ConvertedPretrained',
    ('mmdet', 'DATASETS'): 'CheckedCocoDataset',
    ('mmdet', 'METRICS'): 'CheckedCocoMetric',
    ('mmdet', 'MODELS'):
        'BatchRandomResize HybridEncoder IoUAwareVarifocalLoss PairedGIoULoss RTDETR RTDETRHead '
        'ResNetVd',
    ('mmdet', 'TRANSFORMS'):
        'AntialiasedResize FilterSmallBoxes LoadCheckedImage RandomIoUCrop '
        'RandomPhotometricDistort RandomZoomOut',
    ('mmpretrain', 'DATASETS'): 'CheckedImageFolder CheckedImageNet',
    ('mmpretrain', 'MODELS'): 'HardLabelSmoothLoss',
    ('mmpretrain', 'TRANSFORMS'): 'TorchvisionTransforms',
}
CLASSIFICATION_TYPES = {HOOKS: 'AverageStatisticsHook', PARAM_SCHEDULERS: 'WarmupCosineLR'}

API = {
    'spartan_mm': 'SpaRTAN __version__ config_from config_path get_config get_model list_models',
    'spartan_mm.backbones': 'SpaRTAN',
    'spartan_mm.backbones.fused': 'fuse',
    'spartan_mm.detection':
        'AntialiasedResize BatchRandomResize CheckedCocoDataset CheckedCocoMetric DetInferencer '
        'HybridEncoder ResNetVd RTDETR RTDETRDecoder RTDETRHead',
    'spartan_mm.classification': 'CheckedImageFolder CheckedImageNet TorchvisionTransforms',
}


@pytest.mark.parametrize('command', COMMANDS)
def test_tools_and_their_flags(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [command, '--help'])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(TOOLS / command), run_name='__main__')
    assert exit_.value.code == 0
    assert {*COMMANDS[command].split()} <= {*re.findall(r'--[\w-]+', capsys.readouterr().out)}


@pytest.mark.parametrize('script', SCRIPTS)
def test_scripts(script):
    assert (TOOLS / script).is_file()


@pytest.mark.parametrize('name', MODEL_NAMES)
def test_models(name):
    path = spartan_mm.config_path(name)
    assert Path(path).stem == name and Config.fromfile(path).model


@pytest.mark.parametrize(('registry', 'names'), (TYPES | CLASSIFICATION_TYPES).items(), ids=str)
def test_registered_types(registry, names):
    import spartan_mm.classification
    import spartan_mm.detection  # noqa: F401
    if not isinstance(registry, Registry):
        toolbox, attribute = registry
        registry = getattr(import_module(f'{toolbox}.registry'), attribute)
    for name in names.split():
        found = registry.module_dict.get(name)
        assert found and found.__module__.startswith('spartan_mm.'), name


@pytest.mark.parametrize('module', API)
def test_python_api(module):
    for name in API[module].split():
        assert hasattr(import_module(module), name), name


def test_methods_of_models():
    model = spartan_mm.get_model('spartan_xt_digits')
    assert callable(spartan_mm.get_model('rtdetr_spartan_xt_digits').switch_to_deploy)
    assert callable(model.backbone.switch_to_deploy)
