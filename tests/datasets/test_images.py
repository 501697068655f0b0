"""Images are read up to a number of pixels, and what they are called helps to find them."""
import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from spartan_mm.datasets.data_errors import DataError, UndecodableError, read_lines
from spartan_mm.datasets.images import (
    LoadCheckedImage,
    decode_image,
    find_max_pixels,
    load_image,
    open_picture,
)
from spartan_mm.drawing import open_image


def forge(width, height):
    """A PNG of a few bytes that claims to be so large."""
    def chunk(kind, data):
        return (struct.pack('>I', len(data)) + kind + data
                + struct.pack('>I', zlib.crc32(kind + data)))
    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'0'))
            + chunk(b'IEND', b''))


@pytest.fixture
def bomb(tmp_path):
    path = tmp_path / 'bomb.png'
    path.write_bytes(forge(30_000, 40_000))
    return str(path)


READERS = dict(
    decode=lambda path: decode_image(open(path, 'rb').read()),
    pillow=lambda path: decode_image(open(path, 'rb').read(), backend='pillow'),
    load=lambda path: load_image(path, f'image {path!r}', ''),
    pipeline=lambda path: LoadCheckedImage()(dict(img_path=path)), draw=open_image)


@pytest.mark.parametrize('reader', READERS)
def test_bombs_are_refused_before_they_are_decoded(bomb, reader):
    with pytest.raises(UndecodableError, match=r'30000x40000 pixels, 1,200,000,000 in all, and no '
                                               r'more than 200,000,000 .* '
                                               r'SPARTAN_MM_MAX_PIXELS=1200000000'):
        READERS[reader](bomb)


def test_the_limit_can_be_moved(tmp_path, bomb, monkeypatch):
    path = str(tmp_path / 'small.png')
    cv2.imwrite(path, np.zeros((10, 20, 3), np.uint8))
    monkeypatch.setenv('SPARTAN_MM_MAX_PIXELS', '199')
    with pytest.raises(UndecodableError, match='20x10 pixels, 200 in all, and no more than 199'):
        decode_image(open(path, 'rb').read())
    monkeypatch.setenv('SPARTAN_MM_MAX_PIXELS', '1200000000')
    monkeypatch.setattr('PIL.Image.MAX_IMAGE_PIXELS', 10)  # Pillow refuses twice as many
    assert decode_image(open(path, 'rb').read(), backend='pillow').shape == (10, 20, 3)
    assert decode_image(open(path, 'rb').read()).shape == (10, 20, 3)
    with open_picture(open(bomb, 'rb').read()) as picture:  # beyond Pillow's own limit, too
        assert picture.size == (30_000, 40_000)


@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
def test_no_decoder_that_starts_programs(backend, monkeypatch):
    content = io.BytesIO()
    Image.new('RGB', (9, 8)).save(content, 'EPS')
    monkeypatch.setattr('PIL.EpsImagePlugin.EpsImageFile.load', lambda *_: pytest.fail('it runs'))
    with pytest.raises(UndecodableError, match='it is of no known image format, or damaged'):
        decode_image(content.getvalue(), backend=backend)


@pytest.mark.parametrize('value', ['many', '-1', '0'])
def test_a_limit_that_is_none(value, monkeypatch):
    monkeypatch.setenv('SPARTAN_MM_MAX_PIXELS', value)
    with pytest.raises(DataError, match='SPARTAN_MM_MAX_PIXELS=.* must be a whole number'):
        find_max_pixels()


def test_lines_of_windows(tmp_path):
    for encoding in ('utf-8', 'utf-8-sig', 'utf-16'):
        (tmp_path / 'names.txt').write_bytes('dog\r\ncät\r\n'.encode(encoding))
        assert read_lines(str(tmp_path / 'names.txt')) == ['dog', 'cät']
    (tmp_path / 'names.txt').write_bytes('cät'.encode('latin-1'))
    with pytest.raises(DataError, match='names.txt: not a text in UTF-8, or in UTF-16 with a byte'):
        read_lines(str(tmp_path / 'names.txt'))
