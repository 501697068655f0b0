"""The steps of an export: what is refused before work, and what is left when something is wrong."""
import os
import shutil
import signal

import onnx
import pytest

from spartan_mm import cli, runtime
from spartan_mm.errors import ExplainedError
from spartan_mm.export import job
from spartan_mm.export.formats import FORMATS, find_format


@pytest.mark.parametrize('to, precision, dynamic, message', [
    ('ncnn', 'fp32', None, '--to ncnn: no such format; there are onnx, openvino'),
    ('tensorrt', 'int8', None, 'it is written in fp32 or fp16'),
    ('tensorrt', 'fp32', ('batch', 'size'), 'its size is fixed; give --dynamic batch'),
    ('coreml', 'fp32', ('batch', ), 'its batch is fixed; give --dynamic none'),
])
def test_what_a_format_lacks_is_said(to, precision, dynamic, message):
    with pytest.raises(ExplainedError, match=message):
        find_format(to, precision, dynamic)


def test_batch_is_free_where_it_can_be():
    assert {name: find_format(name, 'fp32', None)[1] for name in FORMATS} == dict(
        onnx=('batch', ), openvino=('batch', ), tensorrt=('batch', ), pt2=('batch', ), coreml=(),
        litert=())


@pytest.mark.slow
@pytest.mark.parametrize('flags, message', [
    ([], 'is a config without weights'),
    (['{checkpoint}', '--size', '64', '80', '--dynamic', 'batch,size'],
     'sides are multiples of 32 from 64 on, and 64x80 is not'),
    (['missing.pth'], 'missing.pth does not exist'),
    (['{checkpoint}', '--out-dir', '{checkpoint}'], 'cannot be written'),
    (['--accuracy'], 'name a config file, or a model, and its checkpoint'),
    (['{checkpoint}', '--accuracy', '--raw'], 'drop --raw'),
    (['{checkpoint}', '--accuracy', '--to', 'pt2'], 'files for pt2 are not tested'),
])
def test_wrong_arguments_are_said_in_a_line(exported, capsys, flags, message, tmp_path):
    given = exported('detector')
    flags = [flag.format(checkpoint=given.checkpoint) for flag in flags]
    try:
        status = cli.main(['export', str(given.config), *flags, *(
            [] if '--out-dir' in flags else ['--out-dir', str(tmp_path)])])
    except SystemExit as error:
        status = error.code
    # A status that is a text is printed when Python ends.
    [line] = f'{capsys.readouterr().err}{status}'.removesuffix('\n2').splitlines()
    assert message in line
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_a_size_that_would_be_padded_is_refused(exported, capsys):
    model = exported('detector').model
    model.data_preprocessor.pad_size_divisor = 48
    with pytest.raises(ExplainedError, match=r'--size 64 96: .* pads to multiples of 48'):
        job._check_size(model, (64, 96), ('batch', ))


@pytest.mark.slow
def test_a_file_that_is_wrong_is_not_left(exported, tmp_path, monkeypatch):
    given = exported('classifier')
    older = tmp_path / given.path.name
    older.write_text('what was there before')

    def write_nonsense(graph, path, size, dynamic):
        model = onnx.load(given.path)
        weight = max(model.graph.initializer, key=lambda each: len(each.raw_data))
        weight.raw_data = bytes(len(weight.raw_data))
        onnx.save(model, path)

    monkeypatch.setattr(job, 'write_onnx', write_nonsense)
    with pytest.raises(ExplainedError, match='the file does not compute what the model computes'):
        job.export_model(given.config, given.checkpoint, out_dir=tmp_path)
    assert [*tmp_path.iterdir()] == [older]
    assert older.read_text() == 'what was there before'


def test_sigterm_leaves_nothing_behind(tmp_path, monkeypatch):
    def export(*_):
        with job._workplace(tmp_path) as folder:
            (folder / 'half.onnx').touch()
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr('spartan_mm.export.export_model', export)
    try:
        with pytest.raises(SystemExit) as left:
            cli.main(['export', 'model', 'weights.pth'])
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert left.value.code == 128 + signal.SIGTERM
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_runtime_lies_beside_the_file(exported):
    beside = exported('classifier').path.with_name('runtime.py')
    with open(runtime.__file__, 'rb') as file:
        assert beside.read_bytes() == file.read()


@pytest.mark.slow
def test_the_command_shows_what_the_check_found(exported, tmp_path, monkeypatch, capsys):
    given = exported('classifier')
    # Two tests in one process, whose visualizers have the same name, as in OpenMMLab's configs.
    config = given.config.with_name('shown.py')
    config.write_text(
        f"_base_ = './{given.config.name}'\nvisualizer = dict(type='UniversalVisualizer', "
        "name='visualizer', vis_backends=[dict(type='LocalVisBackend')])\n")
    monkeypatch.chdir(given.config.parent)
    monkeypatch.setattr(job, 'write_onnx', lambda graph, path, *_: shutil.copy(given.path, path))
    assert cli.main(['export', str(config), str(given.checkpoint), '--out-dir', str(tmp_path),
                     '--check', '3', '--accuracy']) == 0
    printed = capsys.readouterr().out
    assert 'Compared with torch' in printed and '3 ' in printed
    assert printed.strip().endswith(f'wrote {tmp_path / "shown.onnx"}')
    accuracy = runtime.Runtime(tmp_path / 'shown.onnx').metadata['accuracy']
    assert accuracy['accuracy/top1'][0] == accuracy['accuracy/top1'][1] > 0
    assert '| accuracy/top1 ' in printed


