"""The page to try a model on, in a browser without a screen."""

import os
import re
import runpy
import shutil
import socket
import struct
import zlib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from spartan_mm import cli, demo, get_model
from spartan_mm.errors import UsageError
from spartan_mm.inference import load_model
from spartan_mm.page import Viewer, _take_upload, make_page, serve
from spartan_mm.runtime import Runtime
from spartan_mm.weights.publish import publish

pytest.importorskip('gradio')

HOSTILE = '<img src=x onerror=alert(1)>.jpg'
DATA = Path(__file__).parent / 'data'


def load(task, folder):
    """A user's model with random weights."""
    config = Config.fromfile(DATA / f'user_{task}.py')
    torch.manual_seed(0)
    model = get_model(config)
    for branch in model.bbox_head.cls_branches if task == 'detector' else ():
        # Scores from low to high.
        torch.nn.init.normal_(branch.weight)
        torch.nn.init.zeros_(branch.bias)
    files = publish(model, folder / task, config, ('<b>square</b>', 'disc'))
    return load_model(str(files.safetensors), device='cpu')


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """A picture, and what is none."""
    folder = tmp_path_factory.mktemp('pictures')
    picture = np.full((150, 200, 3), 60, np.uint8)
    cv2.rectangle(picture, (30, 30), (90, 90), (0, 128, 255), -1)
    cv2.imwrite(str(folder / 'square.png'), picture)

    def chunk(kind, content):
        return (struct.pack('>I', len(content)) + kind + content
                + struct.pack('>I', zlib.crc32(kind + content)))

    header = struct.pack('>IIBBBBB', 50_000, 50_000, 8, 2, 0, 0, 0)
    (folder / 'bomb.png').write_bytes(
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(bytes(1000)))
        + chunk(b'IEND', b''))
    (folder / HOSTILE).write_bytes(b'nothing')
    return folder


@pytest.fixture(scope='module')
def viewer(tmp_path_factory):
    """A detector's viewer that counts how often the model runs."""
    viewer = Viewer(load('detector', tmp_path_factory.mktemp('models')), 'shapes <i>')
    viewer.runs = 0

    def count(*_):
        viewer.runs += 1

    viewer.model.model.backbone.register_forward_hook(count)
    return viewer


@pytest.fixture(scope='module')
def site(viewer, pictures):
    """The address of the page, a score that some detections have, and who was called."""
    scores = viewer.look(str(pictures / 'square.png')).found.scores
    middle = round(float(np.median(scores)), 2)
    called, connect = set(), socket.socket.connect

    def note(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            called.add(address[0])
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, 'connect', note)
        with serve(viewer, threshold=0., examples=[pictures / 'square.png']) as address:
            yield SimpleNamespace(address=address, called=called, boxes=len(scores),
                                  middle=middle, above=int((scores >= middle).sum()))


@pytest.fixture(scope='module')
def browser():
    sync_api = pytest.importorskip('playwright.sync_api')
    chromium = shutil.which('chromium') or shutil.which('chromium-browser')
    if chromium is None:
        pytest.skip('there is no chromium on this machine')
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, site):
    """Open the page in a window of a width; dialogs and hosts are noted."""
    opened = []

    def open_page(width):
        page = browser.new_page(viewport=dict(width=width, height=800))
        page.set_default_timeout(60_000)
        page.hosts, page.dialogs = set(), []
        page.on('request', lambda request: page.hosts.add(re.split('[/:]+', request.url)[1]))
        page.on('dialog', lambda dialog: (page.dialogs.append(dialog.message), dialog.dismiss()))
        page.goto(site.address)
        opened.append(page)
        return page

    yield open_page
    for page in opened:
        page.close()


@pytest.mark.slow
class TestInABrowser:

    @pytest.mark.parametrize('width', [1280, 360], ids=['desktop', 'phone'])
    def test_drop_slide_and_explain(self, visit, site, viewer, pictures, width):
        page, runs = visit(width), viewer.runs
        page.locator('input[type=file]').first.set_input_files(pictures / 'square.png')
        rows = page.locator('#listed tr')
        page.locator('#listed', has_text=f'{site.boxes} detections').wait_for()
        assert rows.count() == 1 + site.boxes and viewer.runs == runs + 1
        assert '200 × 150 pixels' in page.inner_text('#listed')
        shown = page.locator('#result img')
        before = shown.get_attribute('src')

        slider = page.locator('input[type=number]')
        slider.fill(str(site.middle))
        slider.press('Enter')
        page.locator('#listed', has_text=f'{site.above} detections').wait_for()
        assert site.above < site.boxes and viewer.runs == runs + 1
        assert shown.get_attribute('src') != before

        page.get_by_role('tab', name='Where it looks').click()
        page.get_by_role('button', name='Show where it looks').click()
        page.locator('#overlay img').wait_for()
        page.locator('#told', has_text=f'{site.above} ').wait_for()
        assert page.evaluate('document.documentElement.scrollWidth') <= width
        assert page.hosts == {'127.0.0.1'} and site.called <= {'127.0.0.1'}

    def test_errors_are_sentences_on_the_page(self, visit, site, pictures):
        page = visit(1280)
        for name, message in (('bomb.png', 'no more than 50,000,000 are taken'),
                              (HOSTILE, 'what was sent is no BMP, JPEG, PNG, TIFF')):
            page.locator('input[type=file]').first.set_input_files(pictures / name)
            page.locator('#listed', has_text=message).wait_for()
            assert 'spartan_mm_page' not in page.inner_text('#listed')
            assert not page.locator('#result img').count()
            page.reload()
        page.locator('input[type=file]').first.set_input_files(pictures / 'square.png')
        page.locator('#listed', has_text=f'{site.boxes} detections').wait_for()
        assert not page.dialogs


class TestViewer:

    def test_names_of_classes_are_text(self, viewer, pictures):
        look = viewer.look(str(pictures / 'square.png'))
        assert '&lt;b&gt;square&lt;/b&gt;' in viewer.show(look, 0.)[1]
        assert '<b>square' not in viewer.show(look, 0.)[1]

    def test_a_large_picture_is_shown_small_and_its_boxes_with_it(self, viewer, tmp_path):
        cv2.imwrite(str(tmp_path / 'large.png'), np.zeros((1000, 2560, 3), np.uint8))
        look = viewer.look(str(tmp_path / 'large.png'))
        detections, = viewer.model.detect([tmp_path / 'large.png'])
        assert look.picture.shape == (500, 1280, 3) and look.size == (2560, 1000)
        np.testing.assert_allclose(look.found.boxes, detections.boxes / 2, rtol=1e-5)
        left, top, *_ = detections.boxes[0]
        assert f'{left:.0f}, {top:.0f}' in viewer.show(look, 0.)[1]

    def test_nothing_to_explain(self, viewer, pictures):
        look = viewer.look(str(pictures / 'square.png'))
        with pytest.raises(UsageError, match='no <b>square.* score of at least 1.00: move the'):
            viewer.explain(look, 1., 0)

    def test_a_classifier(self, pictures, tmp_path):
        viewer = Viewer(load('classifier', tmp_path), 'shapes')
        look = viewer.look(str(pictures / 'square.png'))
        picture, html = viewer.show(look, 0.9)
        assert html.count('<tr>') == 3 and picture.shape[1] > look.picture.shape[1]
        overlay, told = viewer.explain(look, 0., 0)
        assert overlay.ndim == 3 and '<b>&lt;b&gt;square' in told

    def test_an_exported_file(self, pictures, tmp_path):
        tools = runpy.run_path(str(DATA.parent / 'test_runtime.py'))
        path = tools['write_graph'](tmp_path / 'tiny.onnx', tools['metadata_of']())
        viewer = Viewer(Runtime(path), 'tiny')
        look = viewer.look(str(pictures / 'square.png'))
        found = Runtime(path)(str(pictures / 'square.png'))
        np.testing.assert_allclose(look.found.boxes, found.boxes)
        assert viewer.exported and '3 detections' in viewer.show(look, 0.)[1]


class TestUploads:

    @pytest.mark.parametrize('way', ['another path', 'up', 'a link', 'the folder', 'missing'])
    def test_nothing_else_is_read(self, tmp_path, way):
        uploads, secret = tmp_path / 'uploads', tmp_path / 'secret.png'
        uploads.mkdir()
        secret.write_bytes(b'mine')
        (uploads / 'link.png').symlink_to(secret)
        path = {'another path': secret, 'up': uploads / '..' / 'secret.png', 'the folder': uploads,
                'a link': uploads / 'link.png', 'missing': uploads / 'none.png'}[way]
        with pytest.raises(UsageError, match='this is no upload'):
            _take_upload(str(uploads), SimpleNamespace(path=str(path)))

    def test_of_gradio(self, viewer, pictures):
        blocks = make_page(viewer)
        picture, = (block for block in blocks.blocks.values()
                    if getattr(block, 'placeholder', None))
        upload = Path(picture.GRADIO_CACHE, 'test_of_uploads', 'square.png')
        upload.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copy(pictures / 'square.png', upload)
            assert picture.preprocess(SimpleNamespace(path=str(upload))) == os.path.realpath(upload)
        finally:
            shutil.rmtree(upload.parent)
        assert picture.preprocess(None) is picture.preprocess(SimpleNamespace(path=None)) is None
        with pytest.raises(UsageError):
            picture.preprocess(SimpleNamespace(path=str(pictures / 'square.png')))


class TestCommand:

    @pytest.mark.parametrize(('words', 'message'), [
        ([], 'no detector of the training demo in'),
        (['missing.onnx'], 'missing.onnx is missing'),
        (['missing.onnx', 'a.pth'], 'which has its weights: leave a.pth out'),
        (['rtdetr_r18vd'], 'is a config without weights; name a checkpoint, too'),
        (['rtdetr_r18vd', 'a.pth', '--examples', 'nowhere'], '--examples nowhere holds no images'),
    ])
    def test_what_cannot_be_opened(self, words, message, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(demo, 'find_home', lambda root: tmp_path)
        with pytest.raises(SystemExit) if words == ['rtdetr_r18vd'] else nullcontext() as left:
            assert cli.main(['demo', *words]) == 2
        assert message in capsys.readouterr().err + str(left and left.value)

    def test_a_port_that_is_taken(self, viewer):
        with socket.socket() as taken:
            taken.bind(('127.0.0.1', 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(UsageError, match=f'127.0.0.1:{port}: it is taken'), \
                    serve(viewer, port=port):
                pass
