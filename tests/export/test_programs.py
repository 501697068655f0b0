"""Programs of torch.export: compiled here, or handed to the converters of LiteRT and Core ML."""
import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from spartan_mm.export import convert_program, coreml, litert, programs, pt2
from spartan_mm.export.metadata import as_properties

SCRIPT = Path(convert_program.__file__)
FAKE = '''
class Model:
    def export(self, path):
        open(path, 'w').write('converted')

def convert(module, inputs):
    module(*inputs)
    assert {condition}, 'this is not taken'
    return Model()
'''


class Graph(nn.Module):
    """As small as a graph can be."""

    input_names, output_names = ('images', 'orig_target_sizes'), ('scores', 'boxes')

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=8)

    def forward(self, images, orig_target_sizes):
        x = self.conv(images.float() / 255).mean((2, 3))
        return x.softmax(1), x * orig_target_sizes.repeat(1, 2).float()


class Scores(Graph):
    """One that does not ask for sizes, as a classifier's."""

    input_names, output_names = ('images', ), ('scores', )

    def forward(self, images):
        return super().forward(images, torch.ones(images.shape[0], 2))[:1]


@pytest.fixture
def make_job(tmp_path):
    """Makes a job of a small graph."""
    def make(suffix, dynamic=(), kind=Graph):
        metadata = dict(outputs=kind.output_names, precision='fp32')
        return SimpleNamespace(graph=kind().eval(), path=tmp_path / f'small{suffix}',
                               size=(64, 96), dynamic=dynamic, metadata=metadata)
    return make


def compare(run, graph, batch=1):
    images = np.random.default_rng(0).integers(0, 256, (batch, 3, 64, 96)).astype(np.uint8)
    sizes = np.array([[640, 480]] * batch)
    found = run(images, sizes)
    with torch.no_grad():
        given = map(torch.from_numpy, (images, sizes)[:len(graph.input_names)])
        expected = graph(*given)
    assert [*found] == [*graph.output_names]
    for x, right in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(x, right.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('g++') is None, reason='there is no C++ compiler')
def test_a_compiled_program(make_job):
    job = make_job('.pt2', ('batch', ), Scores)
    run = pt2.write(job)
    for batch in (1, 3):
        compare(run, job.graph, batch)
    pt2.set_metadata(job.path, as_properties(job.metadata))
    assert json.loads(job.path.with_name('small.pt2.json').read_text())['precision'] == 'fp32'


@pytest.mark.parametrize('module, suffix, dtype', [
    (litert, '.tflite', torch.uint8), (coreml, '.mlpackage', torch.float32)])
def test_what_a_converter_elsewhere_is_handed(module, suffix, dtype, make_job, monkeypatch, capsys,
                                              tmp_path):
    monkeypatch.setattr(programs, 'find_spec', lambda name: None)
    job = make_job(suffix)
    assert module.write(job) is None
    assert job.path.name == f'small{suffix}.pt2'
    assert {path.name for path in tmp_path.iterdir()} == {
        f'small{suffix}.pt2', f'small{suffix}.json', 'convert_program.py'}
    said = capsys.readouterr().out
    assert f'pip install torch=={torch.__version__.partition("+")[0]} ' in said
    assert f'python convert_program.py small{suffix}.pt2' in said

    program = torch.export.load(job.path)
    images, sizes = program.example_inputs[0]
    assert images.dtype is dtype and len(images) == 1

    def run(images, sizes):
        images = torch.from_numpy(images).to(dtype)
        return programs.by_name(Graph.output_names, [
            x.detach() for x in program.module()(images, torch.from_numpy(sizes))])

    compare(run, job.graph)
    # What is known at the end only is written for the file to be.
    module.set_metadata(job.path, as_properties(dict(job.metadata, check=None)))
    assert 'check' in json.loads((tmp_path / f'small{suffix}.json').read_text())


@pytest.mark.slow
@pytest.mark.parametrize('works', [True, False])
def test_a_converter_in_a_process_of_its_own(works, make_job, monkeypatch, tmp_path):
    package = tmp_path / 'packages' / 'litert_torch.py'
    package.parent.mkdir()
    package.write_text(FAKE.format(condition=works))
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv('PYTHONPATH', str(package.parent))
    monkeypatch.setattr(litert, 'find_spec', lambda name: None)
    job = make_job('.tflite')
    if works:
        assert litert.write(job) is None
        assert job.path.read_text() == 'converted'
        assert not convert_program.program_of(job.path).exists()
    else:
        with pytest.raises(programs.ConversionError) as error:
            litert.write(job)
        assert str(error.value) == ('litert_torch cannot convert small: AssertionError: this is '
                                    'not taken')


def test_the_script_needs_nothing_of_ours():
    names = set()
    for node in ast.walk(ast.parse(SCRIPT.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            names.add(node.module.partition('.')[0])
    assert names == {'json', 'sys', 'pathlib', 'torch', 'litert_torch', 'coremltools'}


@pytest.mark.parametrize('arguments', [[], ['model.pt2'], ['model.tflite'], ['a.tflite.pt2', 'b']])
def test_the_script_says_how_it_is_called(arguments):
    done = subprocess.run([sys.executable, '-I', str(SCRIPT), *arguments], capture_output=True,
                          text=True)
    assert done.returncode == 2
    assert 'python convert_program.py model.tflite.pt2' in done.stderr
