"""Names from anywhere are written so that they steer, forge and break nothing."""
import os

import pytest

from spartan_mm.datasets.data_errors import DataError, MissingDataError
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
    str(UnwritableError(13, 'closed', HOSTILE))], ids=repr)
def test_wherever_a_name_is_written(written):
    assert HARMLESS in written
    assert printable(written) == written and written.encode()


def test_further_lines_of_a_message():
    assert str(CheckpointError('missing keys:', 'a\nb', 'c')) == 'missing keys:\n  a\\nb\n  c'
