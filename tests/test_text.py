"""Names from anywhere are written so that they steer, forge and break nothing."""
import json
import logging
import os

import numpy as np
import pytest
from PIL import Image

from spartan_mm import cli
from spartan_mm.datasets.data_errors import DataError, Finding, MissingDataError
from spartan_mm.drawing import add_caption, draw_bars, draw_boxes
from spartan_mm.engine.launch import _make_printable
from spartan_mm.errors import CheckpointError, UsageError
from spartan_mm.files import UnwritableError
from spartan_mm.text import join, markdown, printable, shorten

HOSTILE = 'a\nerror: forged\x1b[2J\x9b\u2028\u202etxt' + os.fsdecode(b'caf\xe9') + '.png'
HARMLESS = r'a\nerror: forged\x1b[2J\x9b\u2028\u202etxtcaf\udce9.png'


def test_what_steers_becomes_an_escape_sequence():
    assert printable(HOSTILE) == HARMLESS
    assert printable(HARMLESS) == HARMLESS


@pytest.mark.parametrize('name', ['süb folder/drei 3.png', '猫\u3000👩\u200d🚀', 'C:\\new', "it's"])
def test_other_names_stay(name):
    assert printable(name) == name


@pytest.mark.parametrize('written', [
    shorten(HOSTILE, 99), join([HOSTILE]), markdown([['name'], [HOSTILE]]).splitlines()[-1],
    *(str(kind(HOSTILE)) for kind in (UsageError, CheckpointError, DataError, MissingDataError)),
    str(UnwritableError(13, 'closed', HOSTILE)), Finding('note', 'kind', HOSTILE).message],
    ids=repr)
def test_wherever_a_name_is_written(written):
    assert HARMLESS in written
    assert printable(written) == written and written.encode()


def test_further_lines_of_a_message():
    assert str(CheckpointError('missing keys:', 'a\nb', 'c')) == 'missing keys:\n  a\\nb\n  c'


def test_lines_of_a_log():
    record = logging.LogRecord('', logging.INFO, '', 1, 'a %s\n\ttable', ('\x1b[2J', ), None)
    assert _make_printable(record) and record.getMessage() == 'a \\x1b[2J\n\ttable'


def test_names_are_drawn():
    picture = np.zeros((99, 99, 3), np.uint8)
    draw_boxes(picture, np.array([[1, 1, 50, 50]]), [HOSTILE], [(255, 0, 0)])
    assert picture.any()
    assert draw_bars(picture, [HOSTILE], [0.5], [(255, 0, 0)]).any()
    assert add_caption(Image.new('RGB', (50, 50)), HOSTILE).height > 50


def test_names_on_the_screen(tmp_path, monkeypatch, capsys):
    """Whatever the names of a folder, its files and a config are."""
    from spartan_mm.commands import infer as command
    from spartan_mm.inference import Detections, InputError, take_image
    root = tmp_path / HOSTILE.replace('.png', '')
    try:
        root.mkdir()
    except OSError:
        pytest.skip('this file system takes no such name')
    (root / HOSTILE).write_text('no image')
    Image.new('RGB', (9, 9)).save(root / 'a\nb.png')

    def refuse(*args):
        raise InputError(f'{HOSTILE} describes neither')

    class Model:
        task, classes, files, read = 'detection', (HOSTILE, ), ('x', ), staticmethod(take_image)

        def __call__(self, images, batch_size):
            return [Detections(np.empty((0, 4)), np.empty(0, int), np.empty(0)) for _ in images]

    for load, message in ((refuse, f'error: {HARMLESS} describes neither'),
                          (lambda *_: Model(), f'{HARMLESS} cannot be decoded as an image')):
        monkeypatch.setattr(command, 'load_model', load)
        with pytest.raises(SystemExit) as stopped:
            raise SystemExit(cli.main(['infer', str(root), 'x', '--device', 'cpu', '--out-dir',
                                       str(tmp_path / 'out' / HOSTILE)]))
        captured = capsys.readouterr()
        printed = f'{captured.out}{captured.err}{stopped.value.code}'
        assert message in printed and not {*'\x1b\x9b\u2028\u202e'} & {*captured.err}
        assert not [line for line in printed.splitlines() if line.startswith('error: forged')]
    content = json.loads((tmp_path / 'out' / HOSTILE / 'results.json').read_text())
    assert content['classes'] == [HOSTILE] and [*content['failures']] == [HOSTILE]
    assert content['results'][0]['file'] == 'a\nb.png'
