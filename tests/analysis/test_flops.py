"""Counting by name: known sizes, in both forms, module by module."""

import pytest
from torch import nn

from spartan_mm.analysis import flops
from spartan_mm.analysis.flops import CountError, count_model, forms_table, tree
from spartan_mm.analysis.named_models import NamedModel
from spartan_mm.errors import CheckpointError


@pytest.mark.parametrize('name', ['timm:resnet18', 'mmpretrain:resnet18_8xb32_in1k'])
def test_resnet_whoever_builds_it(name):
    total = count_model(name).total
    assert (total.parameters, total.multiply_adds, total.flops, total.activations) == (
        11689512, 1814073344, 3628146688, 2484712)


def test_forms():
    trained, deployed = (count_model('rtdetr_spartan_t', deploy=deploy) for deploy in (False, True))
    assert (trained.form, deployed.form) == ('training form', 'deploy form')
    assert trained.total.multiply_adds == 37736892160
    assert deployed.total.multiply_adds == 34093090560
    lines = forms_table([trained, deployed]).splitlines()
    assert lines[2] == ('| training form | 640 x 640 | 22,177,836 | 37,736,892,160 | '
                        '75,473,784,320 | 145,020,352 | '
                        f'{trained.kernels.kernels:,} | {trained.kernels.bytes / 1e9:.3f} |')
    assert lines[3].startswith('| deploy form |')
    assert deployed.kernels.kernels < trained.kernels.kernels < 2000
    assert deployed.kernels.bytes < trained.kernels.bytes < 4e9

    for text, depth in ((tree(deployed, 1), 1), (tree(deployed, None), None)):
        lines = text.splitlines()[1:]
        assert lines[0].startswith('rtdetr_spartan_t (RTDETR)') and lines[0].endswith('100.0')
        shares = [float(line.split()[-1]) for line in lines
                  if len(line) - len(line.lstrip()) == 2]
        assert sum(shares) == pytest.approx(100, abs=0.5)
        assert (len(lines) > 100) == (depth is None)
    content = deployed.to_dict()
    assert content['modules']['backbone']['kind'] == 'SpaRTAN'
    assert content['modules']['']['flops'] == 2 * 34093090560


class ReadsNumbers(nn.Module):
    """Looks at what it computes on its way."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        x = self.conv(x)
        return x if x.sum().item() < 1e9 else x + 1


def test_model_that_reads_numbers(monkeypatch):
    monkeypatch.setattr(flops, 'load_named_model', lambda name, device='cpu': NamedModel(
        name, 'config', 'backbone', ReadsNumbers().to(device), (4, 4), None))
    found = count_model('any')
    assert found.total.multiply_adds == 4 * 4 * 6
    assert {'convolution', '_local_scalar_dense'} <= found.kernels.by_operation.keys()


def test_mistakes(user_project, tmp_path):
    with pytest.raises(CountError, match='cannot be run on images of 100x100: Input height'):
        count_model('timm:vit_tiny_patch16_224', (100, 100))
    with pytest.raises(CheckpointError, match='has no deploy form'):
        count_model('timm:resnet18', deploy=True)
    path = tmp_path / 'config.py'
    base = str(user_project / 'user_classifier.py')
    path.write_text(f'_base_ = {base!r}\ntest_dataloader = dict(_delete_=True)\n')
    with pytest.raises(CountError, match='give a size with --shape'):
        count_model(path)
    assert count_model(path, (32, 32)).shape == (32, 32)
