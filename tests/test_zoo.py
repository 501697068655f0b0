"""Models by name: configs, models and inferencers, without a download."""

import copy
import shutil
import socket
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch.testing import assert_close

import spartan_mm
from spartan_mm import zoo
from spartan_mm.engine import launch
from spartan_mm.errors import CheckpointError
from spartan_mm.weights.initialize import without_pretrained, without_training

CONFIGS = Path(__file__).parents[1] / 'configs'
TEN = tuple('abcdefghij')


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whatever is built here needs no connection."""
    def refuse(*args, **kwargs):
        raise AssertionError('a connection was opened')
    monkeypatch.setattr(socket.socket, 'connect', refuse)


class TestNames:

    def test_every_config_has_one(self):
        # An example to copy is no model of its own.
        files = [str(path) for path in CONFIGS.rglob('*.py')
                 if path.parent.name != '_base_' and path.name != 'rtdetr_spartan_t_finetune.py']
        assert sorted(map(zoo.config_path, zoo.list_models())) == sorted(files)
        assert all(Path(zoo.config_path(name)).stem == name for name in zoo.list_models())

    def test_pattern_and_task(self):
        assert zoo.list_models('spartan_t*') == ['spartan_t_224', 'spartan_t']
        detectors = zoo.list_models(task='detection')
        assert {'rtdetr_r50vd', 'retinanet_spartan_t'} < set(detectors)
        assert zoo.list_models(task='pretraining') == ['spark_spartan_xt', 'spark_spartan_t']
        assert sorted(name for task in zoo.TASKS for name in zoo.list_models(task=task)) == sorted(
            zoo.list_models())

    def test_unknown_task(self):
        with pytest.raises(ValueError, match="'segmentation' must be one of 'classification'"):
            zoo.list_models(task='segmentation')

    @pytest.mark.parametrize('function', [zoo.config_path, zoo.get_config, zoo.get_model])
    def test_unknown_name(self, function):
        with pytest.raises(zoo.UnknownModelError, match='did you mean rtdetr_r18vd, '):
            function('rtdetr_r18')

    def test_nothing_close(self):
        with pytest.raises(zoo.UnknownModelError, match=r'see spartan_mm\.list_models\(\)'):
            zoo.config_path('yolo')

    def test_two_models_of_one_name(self, tmp_path):
        (tmp_path / 'model-index.yml').write_text('Import: [a.yml, a.yml]')
        (tmp_path / 'a.yml').write_text('Models: [{Name: a}]')
        with pytest.raises(ValueError, match=r'a\.yml: there are two models called a'):
            zoo.read_metafiles(tmp_path)


class TestConfigs:

    def test_by_name(self):
        assert zoo.get_config('rtdetr_spartan_t').model.backbone.arch == 't'

    def test_in_place_of_a_file(self):
        config = launch.load_config('spartan_t_224')
        assert config.model.backbone.arch == 't'
        assert config.work_dir == 'work_dirs/spartan_t_224'

    def test_a_file_comes_first(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / 'spartan_t').write_text('')
        assert zoo.find_config('spartan_t') == Path('spartan_t')

    def test_neither(self):
        with pytest.raises(FileNotFoundError, match='config spartan_s does not exist, and there is '
                                                    "no model 'spartan_s'; did you mean"):
            launch.load_config('spartan_s')

    def test_as_a_base_of_a_users_own(self, tmp_path):
        (tmp_path / 'own.py').write_text(
            "_base_ = __import__('spartan_mm').config_path('rtdetr_spartan_t')\n"
            'model = dict(bbox_head=dict(num_classes=3))\n')
        config = Config.fromfile(tmp_path / 'own.py')
        assert (config.model.backbone.arch, config.model.bbox_head.num_classes) == ('t', 3)

    @pytest.mark.parametrize('name, toolbox, extra', [
        ('rtdetr_r18vd', 'mmdet', 'detection'), ('spartan_t', 'mmpretrain', 'classification')])
    def test_without_the_toolbox(self, name, toolbox, extra, monkeypatch):
        monkeypatch.delitem(sys.modules, f'spartan_mm.{extra}', raising=False)
        monkeypatch.setitem(sys.modules, toolbox, None)
        with pytest.raises(ImportError, match=rf"{toolbox} >= .*install 'spartan_mm\[{extra}\]"):
            spartan_mm.get_config(name)


class TestModels:

    def test_random_weights(self):
        """The config names a file that isn't there."""
        model = zoo.get_model('rtdetr_spartan_xt')
        assert not model.training
        # The prior of one in a hundred that mmengine gives a head when it initialises.
        assert_close(model.bbox_head.cls_branches[0].bias, torch.full((80, ), -4.59512))
        assert model.cfg.model.backbone.init_cfg.checkpoint == 'checkpoints/spartan_xt.pth'

    def test_initialising_says_nothing(self, capfd):
        zoo.get_model('spartan_xt_digits')
        assert 'backbone.stem' not in ''.join(capfd.readouterr())

    @pytest.mark.parametrize('name, meta, classes', [
        ('rtdetr_spartan_xt_digits', dict(dataset_meta=dict(classes=TEN)), TEN),
        ('spartan_xt_digits', dict(dataset_meta=dict(classes=TEN)), TEN),
        ('spartan_xt_digits', None, None), ('spartan_xt_digits', dict(dataset_meta=None), None)])
    def test_checkpoint(self, name, meta, classes, tmp_path):
        weights = weights_of(name)
        torch.save(dict(state_dict=weights, meta=meta), tmp_path / 'it.pth')
        model = zoo.get_model(name, pretrained=tmp_path / 'it.pth')
        assert_close(model.state_dict(), weights)
        meta = model.dataset_meta if 'rtdetr' in name else model._dataset_meta
        assert meta == (dict(classes=classes) if classes else {})

    @pytest.mark.parametrize('classes', [('a', 'b'), TEN + ('k', )])
    def test_checkpoint_with_another_number_of_names(self, classes, tmp_path):
        torch.save(dict(state_dict=weights_of('spartan_xt_digits'), meta=dict(CLASSES=classes)),
                   tmp_path / 'it.pth')
        with pytest.raises(CheckpointError, match=r'it\.pth names (2|11) classes \(a, b.*tells 10'):
            zoo.get_model('spartan_xt_digits', pretrained=tmp_path / 'it.pth')

    def test_checkpoint_of_another_model(self, tmp_path):
        torch.save(weights_of('spartan_xt_digits'), tmp_path / 'digits.pth')
        with pytest.raises(CheckpointError, match='of another shape'):
            zoo.get_model('spartan_xt', pretrained=tmp_path / 'digits.pth')

    def test_missing_checkpoint(self):
        with pytest.raises(FileNotFoundError, match=r'nothing\.pth'):
            zoo.get_model('spartan_xt', pretrained='nothing.pth')

    def test_number_of_classes(self):
        assert zoo.get_model('spartan_xt', num_classes=7).head.fc.out_features == 7
        detector = zoo.get_model('rtdetr_spartan_xt_digits', num_classes=7)
        assert detector.bbox_head.cls_branches[0].out_features == 7
        assert detector.cfg.model.bbox_head.num_classes == 7

    def test_config_in_place_of_a_name(self):
        config = zoo.get_config('rtdetr_spartan_xt_digits')
        config.model.num_queries = 5
        before = copy.deepcopy(config)
        assert zoo.get_model(config, num_classes=3).num_queries == 5
        assert config.model == before.model

    def test_without_pretrained(self):
        kept = dict(type='TruncNormal', layer='Linear')
        settings = dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='x'), depth=18),
                        parts=[dict(pretrained=True, init_cfg=kept)], sizes=(1, 2))
        expected = dict(backbone=dict(depth=18), parts=[dict(init_cfg=kept)], sizes=(1, 2))
        taught = dict(settings, distillation=dict(teacher='x'))
        assert without_pretrained(taught) == dict(expected, distillation=dict(teacher='x'))
        assert without_training(taught) == expected


@cache
def weights_of(name):
    """Random weights of a model."""
    return zoo.get_model(name).state_dict()


@pytest.fixture
def picture(tmp_path):
    """A picture as an array and as a file."""
    import cv2
    array = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'picture.png'), array)
    return array, str(tmp_path / 'picture.png')


@pytest.mark.filterwarnings('ignore')
class TestInferencers:

    def test_detector(self, picture):
        from spartan_mm.detection import DetInferencer
        inferencer = DetInferencer('rtdetr_spartan_xt_digits', device='cpu', show_progress=False)
        from_array, from_file = (
            inferencer(it, no_save_vis=True)['predictions'][0] for it in picture)
        assert from_array == from_file
        assert len(from_array['scores']) == 60 * 5

    def test_weights_that_do_not_fit(self, user_project, tmp_path):
        """Which mmdet's own takes, and predicts with random weights."""
        from spartan_mm.detection import DetInferencer
        torch.save({'a.b': torch.zeros(1)}, tmp_path / 'wrong.pth')
        with pytest.raises(CheckpointError, match=r'wrong\.pth does not fit the config.s RTDETR: '):
            DetInferencer(str(user_project / 'user_detector.py'), str(tmp_path / 'wrong.pth'),
                          'cpu')

    @pytest.mark.parametrize('meta', [None, dict(dataset_meta=None)])
    def test_weights_without_class_names(self, meta, user_project, tmp_path):
        from spartan_mm.detection import DetInferencer
        config = Config.fromfile(user_project / 'user_detector.py')
        weights = zoo.get_model(config).state_dict()
        torch.save(dict(state_dict=weights, meta=meta), tmp_path / 'it.pth')
        inferencer = DetInferencer(config, str(tmp_path / 'it.pth'), 'cpu')
        assert_close(inferencer.model.state_dict(), weights)

    def test_detector_of_mmdet(self, monkeypatch):
        from mmengine.infer import BaseInferencer

        from spartan_mm.detection import DetInferencer
        inferencer = DetInferencer.__new__(DetInferencer)
        inferencer.scope = 'mmdet'
        config, weights = inferencer._load_model_from_metafile('retinanet_r18_fpn_1x_coco')
        assert config.model.type == 'RetinaNet' and weights.startswith('https://')
        assert BaseInferencer in DetInferencer.__mro__

    def test_unknown_detector(self):
        from spartan_mm.detection import DetInferencer
        with pytest.raises(zoo.UnknownModelError, match='did you mean .* mmdet has none'):
            DetInferencer('rtdetr_r18', device='cpu')

    def test_classifier(self, picture):
        init_default_scope('mmpretrain')
        from mmpretrain import ImageClassificationInferencer, list_models
        spartan_mm.get_config('spartan_xt_digits')  # registers the names
        assert 'spartan_t' in list_models('spartan*')
        inferencer = ImageClassificationInferencer('spartan_xt_digits', device='cpu',
                                                   classes=list('0123456789'))
        from_array, from_file = (inferencer(it)[0] for it in picture)
        assert_close(from_array['pred_scores'], from_file['pred_scores'])
        assert from_array['pred_scores'].shape == (10, )

    def test_built_models_go_into_mmpretrains_inferencer(self, picture):
        init_default_scope('mmpretrain')
        from mmpretrain import ImageClassificationInferencer
        model = zoo.get_model('spartan_xt_digits')
        result, = ImageClassificationInferencer(model)(picture[0])
        assert result['pred_scores'].shape == (10, )

    def test_built_models_go_into_mmdets_function(self, picture):
        init_default_scope('mmdet')
        from mmdet.apis import inference_detector
        model = zoo.get_model('rtdetr_spartan_xt_digits')
        assert len(inference_detector(model, picture[1]).pred_instances) == 300


class TestMMDetsTools:
    """mmdet's own commands take a config that imports this package."""

    @pytest.fixture
    def run_here(self, user_project, tmp_path, monkeypatch, capfd):
        import runpy

        import mmdet
        tools = Path(mmdet.__file__).parent / '.mim' / 'tools'
        if not tools.is_dir():
            pytest.skip('this mmdet comes without its tools')
        shutil.copytree(user_project, tmp_path / 'project')
        monkeypatch.chdir(tmp_path / 'project')

        def run(name, *arguments):
            monkeypatch.setattr(sys, 'argv', [name, *arguments])
            runpy.run_path(str(tools / name), run_name='__main__')
            return ''.join(capfd.readouterr())
        return run

    @pytest.mark.slow
    def test_train_test_and_count(self, run_here):
        run_here('train.py', 'user_detector.py', '--cfg-options', 'train_cfg.max_epochs=1')
        output = run_here('test.py', 'user_detector.py', 'work_dirs/user_detector/epoch_1.pth')
        assert 'bbox_mAP_copypaste' in output
        output = run_here('analysis_tools/get_flops.py', 'user_detector.py', '--num-images', '1')
        assert 'Params:' in output
