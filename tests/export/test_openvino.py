"""OpenVINO files: those of the ONNX file, with what it says of itself."""
from types import SimpleNamespace

import numpy as np
import openvino
import pytest
from numpy.testing import assert_allclose

from spartan_mm.export import openvino as writer
from spartan_mm.runtime import Runtime

pytestmark = pytest.mark.slow


@pytest.fixture
def write(exported, tmp_path):
    """Writes the small classifier in a precision; gives the file and a run of it."""

    def run(precision):
        source = exported('classifier').path
        metadata = {key: value for key, value in Runtime(source).metadata.items()
                    if key != 'check'} | dict(precision=precision, classes=['<é>', '"&'])
        job = SimpleNamespace(onnx=lambda: source, path=tmp_path / f'{precision}.xml',
                              precision=precision, metadata=metadata)
        return job, writer.write(job)

    return run


def test_float32_equals_the_onnx_file(exported, write):
    job, run = write('fp32')
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), np.uint8)
    wanted = Runtime(job.onnx()).run(images, None)['scores']
    assert_allclose(run(images, None)['scores'], wanted, rtol=0, atol=1e-5)


def test_metadata_survive_and_more_may_be_added(write):
    job, _ = write('fp32')
    assert Runtime(job.path).metadata == job.metadata
    writer.set_metadata(job.path, dict(check='{"rows": 1}'))
    assert Runtime(job.path).metadata == job.metadata | dict(check=dict(rows=1))


def test_float16_is_stored_in_half_the_bytes_and_bfloat16_as_it_is(write):
    size = {precision: write(precision)[0].path.with_suffix('.bin').stat().st_size
            for precision in ('fp32', 'fp16', 'bf16')}
    assert size['fp16'] < 0.6 * size['fp32'] and size['bf16'] == size['fp32']


@pytest.mark.parametrize(('precision', 'hint'), [('fp32', 'f32'), ('bf16', 'bf16')])
def test_files_are_run_in_the_precision_that_they_say(write, monkeypatch, precision, hint):
    asked = []
    compile_model = openvino.Core.compile_model

    def spy(core, model, device, settings):
        asked.append(settings['INFERENCE_PRECISION_HINT'])
        return compile_model(core, model, device, settings)

    monkeypatch.setattr(openvino.Core, 'compile_model', spy)
    write(precision)
    assert set(asked) == {hint}
