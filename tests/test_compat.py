"""mmcv with and without its compiled extension."""

import copy
import doctest
import inspect
import pickle
import subprocess
import sys

import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import revert_sync_batchnorm

from spartan_mm import compat


def write_package(folder, name, **files):
    (folder / name).mkdir()
    for module, content in dict({'__init__': ''}, **files).items():
        (folder / name / f'{module}.py').write_text(content)


def run_python(code):
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def without_ops():
    if not compat.stand_in_for_mmcv_ext():
        pytest.skip('this mmcv has compiled ops')


class TestWithoutExtension:

    def test_mmdet_and_mmpretrain_can_be_imported(self, without_ops):
        out = run_python('import spartan_mm, mmdet.models, mmdet.apis, mmpretrain.models, sys\n'
                         'print(type(sys.modules["mmcv._ext"]).__name__)')
        assert out.split()[-1] == 'MMCVExtStandIn'

    def test_missing_op_names_itself_and_the_remedy(self):
        op = compat.MMCVExtStandIn().deform_conv_forward
        with pytest.raises(RuntimeError, match="op 'deform_conv_forward' needs .* `mim install"):
            op(torch.ones(1), op=3)

    def test_looks_like_an_ordinary_module(self):
        module = compat.MMCVExtStandIn()
        for probe in ('__file__', '__path__', '__wrapped__', '__all__', '__warningregistry__'):
            assert not hasattr(module, probe)
        assert module.nms_rotated is module.nms_rotated
        assert inspect.getmodule(module) is module
        assert doctest.DocTestFinder().find(module, 'mmcv._ext') is not None

    def test_what_walks_all_modules_still_works(self, without_ops):
        assert inspect.getmodule(inspect.currentframe()) is not None
        assert pickle.loads(pickle.dumps(HistoryBuffer)) is HistoryBuffer
        assert copy.deepcopy(torch.nn.ReLU()).inplace is False

    def test_mmcv_knows_that_it_has_no_ops(self, without_ops):
        from mmcv.utils import collect_env
        from mmcv.utils.ext_loader import check_ops_exist
        assert collect_env()['MMCV Compiler'] == 'n/a'
        assert not check_ops_exist()

    def test_mmengine_can_look_for_the_layers_of_compiled_mmcv(self):
        model = revert_sync_batchnorm(torch.nn.Sequential(torch.nn.SyncBatchNorm(4)))
        assert not isinstance(model[0], torch.nn.SyncBatchNorm)

    def test_no_mmcv_at_all(self, monkeypatch):
        monkeypatch.delitem(sys.modules, 'mmcv._ext', raising=False)
        monkeypatch.setitem(sys.modules, 'mmcv', None)
        assert not compat.stand_in_for_mmcv_ext()
        assert 'mmcv._ext' not in sys.modules


class TestWithExtension:

    def test_nothing_is_replaced(self, tmp_path, monkeypatch):
        write_package(tmp_path, 'mmcv', _ext='')
        monkeypatch.delitem(sys.modules, 'mmcv._ext', raising=False)
        monkeypatch.delitem(sys.modules, 'mmcv', raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        assert not compat.stand_in_for_mmcv_ext()
        assert 'mmcv._ext' not in sys.modules

    def test_same_package_without_extension_is_completed(self, tmp_path, monkeypatch):
        write_package(tmp_path, 'mmcv', other='')
        monkeypatch.setitem(sys.modules, 'mmcv._ext', None)
        del sys.modules['mmcv._ext']  # put back by monkeypatch
        monkeypatch.delitem(sys.modules, 'mmcv', raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        assert compat.stand_in_for_mmcv_ext()

    def test_mmcv_calls_the_loaded_extension(self):
        run_python('import sys, types\n'
                   'class Everything(types.ModuleType):\n'
                   '    def __getattr__(self, name):\n'
                   '        if name.startswith("__"): raise AttributeError(name)\n'
                   '        return name\n'
                   'real = Everything("mmcv._ext")\n'
                   'sys.modules["mmcv._ext"] = real\n'
                   'import spartan_mm\n'
                   'assert not spartan_mm.compat.stand_in_for_mmcv_ext()\n'
                   'import mmcv.ops.nms\n'
                   'assert sys.modules["mmcv.ops.nms"].ext_module is real\n')


def greedy_nms(boxes, scores, threshold, offset):
    """Non-maximum suppression as its definition says, one pair at a time."""
    kept = []
    for index in scores.argsort(descending=True).tolist():
        x1, y1, x2, y2 = boxes[index].tolist()
        for other in kept:
            a1, b1, a2, b2 = boxes[other].tolist()
            width = max(0, min(x2, a2) - max(x1, a1) + offset)
            height = max(0, min(y2, b2) - max(y1, b1) + offset)
            area = (x2 - x1 + offset) * (y2 - y1 + offset) + (a2 - a1 + offset) * (b2 - b1 + offset)
            if width * height / (area - width * height) > threshold:
                break
        else:
            kept.append(index)
    return kept


class TestNMS:

    @pytest.mark.parametrize('offset', [0, 1])
    @pytest.mark.parametrize('threshold', [0.1, 0.5, 0.9])
    def test_matches_the_definition(self, offset, threshold):
        corners = torch.randint(0, 30, (60, 2)).double()
        boxes = torch.cat([corners, corners + torch.randint(1, 20, (60, 2))], dim=1)
        scores = torch.randperm(60).double() / 60
        kept = compat.MMCVExtStandIn.nms(boxes, scores, threshold, offset)
        assert kept.tolist() == greedy_nms(boxes, scores, threshold, offset)

    def test_offset_decides(self):
        """Boxes of 2 x 4 and 2 x 3: IoU 1/2 by their corners, 8/12 with inclusive pixels."""
        boxes = torch.tensor([[0., 0, 2, 4], [0., 2, 2, 4]])
        scores = torch.tensor([0.9, 0.8])
        assert compat.MMCVExtStandIn.nms(boxes, scores, 0.55, offset=0).tolist() == [0, 1]
        assert compat.MMCVExtStandIn.nms(boxes, scores, 0.55, offset=1).tolist() == [0]

    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype):
        boxes = torch.tensor([[0., 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]], dtype=dtype)
        scores = torch.tensor([0.5, 0.75, 0.25], dtype=dtype)
        assert compat.MMCVExtStandIn.nms(boxes, scores, 0.5).tolist() == [1, 2]

    def test_no_boxes(self):
        kept = compat.MMCVExtStandIn.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
        torch.testing.assert_close(kept, torch.zeros(0, dtype=torch.long))

    def test_through_mmcv(self):
        from mmcv.ops import batched_nms
        boxes = torch.tensor([[0., 0, 10, 10], [0, 0, 10, 9], [0, 0, 9, 10]])
        scores = torch.tensor([0.9, 0.8, 0.7])
        dets, kept = batched_nms(boxes, scores, torch.tensor([0, 0, 1]),
                                 dict(type='nms', iou_threshold=0.5))
        assert kept.tolist() == [0, 2]
        torch.testing.assert_close(dets, torch.cat([boxes, scores[:, None]], dim=1)[[0, 2]])

    def test_without_torchvision(self, monkeypatch):
        monkeypatch.setitem(sys.modules, 'torchvision.ops', None)
        with pytest.raises(ImportError, match='needs torchvision'):
            compat.MMCVExtStandIn.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
