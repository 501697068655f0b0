"""The server: real sockets, a small model, and clients of all kinds."""
import asyncio
import gc
import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from onnx import TensorProto, helper
from PIL import Image

from spartan_mm import cli
from spartan_mm.errors import InputError
from spartan_mm.inference import Classifier, Detector
from spartan_mm.runtime import Runtime
from spartan_mm.serving import Limits, load_served, server
from spartan_mm.serving.batching import READERS, Batcher
from spartan_mm.serving.models import Prepared, ServedModel


class Echo(ServedModel):
    """Finds in a picture its width, after a while; fails at 13 pixels, NaN at 14."""

    name, task, classes = 'echo', 'classification', ()

    def __init__(self, seconds=0.):
        self.seconds, self.batches = seconds, []

    def prepare(self, content):
        return Prepared(*Image.open(io.BytesIO(content)).size, None)

    def find(self, pictures):
        widths = [picture.width for picture in pictures]
        self.batches.append(widths)
        if 640 not in widths:
            time.sleep(self.seconds)
        if 13 in widths:
            raise RuntimeError('13 is\nno number')
        return widths

    def describe(self, found, score, top):
        return [dict(label=found if found != 14 else float('nan'))] * top


@contextmanager
def serving(model, **limits):
    """Serve in a thread; gives a function that sends a request and returns status and JSON."""
    servers, started = [], threading.Event()

    class Server(server._Server):
        async def startup(self, sockets=None):
            servers.append(self)
            await super().startup(sockets)
            started.set()

    with pytest.MonkeyPatch.context() as patch, server.bind('127.0.0.1', 0) as taken:
        port = taken.getsockname()[1]
        patch.setattr(server, '_Server', Server)
        thread = threading.Thread(target=server.serve, args=(model, taken, Limits(**limits)))
        thread.start()
        assert started.wait(60)

        def ask(body=None, path='/predict', headers=(), method=None):
            connection = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
            connection.request(method or ('GET' if body is None else 'POST'), path, body,
                               dict(headers))
            response = connection.getresponse()
            content = response.read().decode()
            ask.headers = response.headers
            connection.close()
            is_json = response.headers['content-type'] == 'application/json'
            return response.status, json.loads(content) if is_json else content

        ask.port = port
        ask.stop = lambda: servers[0].handle_exit(signal.SIGTERM, None)
        try:
            yield ask
        finally:
            ask.stop()
            thread.join(60)
    assert not thread.is_alive()


def picture_of(width=20, height=10, kind='PNG', **options):
    content = io.BytesIO()
    Image.new('RGB', (width, height), (200, 100, 0)).save(content, kind, **options)
    return content.getvalue()


def png_that_claims(width, height):
    def chunk(name, data):
        return struct.pack('>I', len(data)) + name + data + struct.pack(
            '>I', zlib.crc32(name + data))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0,
                                                           0))
            + chunk(b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b''))


def tiff_of_tiles(side):
    """A small picture in one large tile."""
    tags = [(256, 20), (257, 10), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side),
            (324, 8), (325, 20)]
    entries = b''.join(struct.pack('<HHII', number, 4, 1, value) for number, value in tags)
    return b'II*\0' + struct.pack('<IH', 8, len(tags)) + entries + bytes(24)


def form_of(*files, **fields):
    lines = [f'--mark\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
             for name, value in fields.items()]
    for content in files:
        lines += [b'--mark\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n'
                  b'Content-Type: image/png\r\n\r\n', content, b'\r\n']
    return b''.join([*lines, b'--mark--\r\n'])


FORM = {'Content-Type': 'multipart/form-data; boundary=mark'}


@pytest.fixture(scope='module')
def echo():
    with serving(Echo(), max_bytes=100_000, max_pixels=1_000_000, seconds=5) as ask:
        yield ask


@pytest.fixture(scope='module')
def checkpoints(user_project):
    """Untrained models of the user, as weights by task."""
    paths = {}
    for scope in ('mmdet', 'mmpretrain'):
        name = dict(mmdet='detector', mmpretrain='classifier')[scope]
        torch.manual_seed(0)
        with DefaultScope.overwrite_default_scope(scope):
            model = MODELS.build(Config.fromfile(user_project / f'user_{name}.py').model)
        paths[name] = str(user_project / f'served_{name}.pth')
        torch.save(dict(state_dict=model.state_dict(),
                        meta=dict(dataset_meta=dict(classes=('square', 'disc')))), paths[name])
    return paths


@pytest.fixture
def exported(tmp_path):
    """A file in which red, green and blue are the classes."""
    nodes = [helper.make_node('Cast', ['images'], ['floats'], to=TensorProto.FLOAT),
             helper.make_node('ReduceMean', ['floats', 'space'], ['mean'], keepdims=0),
             helper.make_node('Div', ['mean', 'full'], ['scores'])]
    graph = helper.make_graph(
        nodes, 'mean', [helper.make_tensor_value_info('images', TensorProto.UINT8,
                                                      ['batch', 3, 32, 32])],
        [helper.make_tensor_value_info('scores', TensorProto.FLOAT, ['batch', 3])],
        [onnx.numpy_helper.from_array(np.int64([2, 3]), 'space'),
         onnx.numpy_helper.from_array(np.float32(255), 'full')])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=9)
    rule = dict(rule='stretch', size=[32, 32], crop=None, interpolation='bilinear', antialias=True,
                upright=True)
    metadata = dict(format=1, spartan_mm='0.2', task='classification', outputs=['scores'],
                    classes=['red', 'green', 'blue'], raw=False, precision='fp32', resize=rule,
                    input=dict(size=[32, 32], dynamic=['batch']))
    helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
    path = tmp_path / 'colours.onnx'
    onnx.save(model, path)
    return path


class TestResults:

    @pytest.mark.parametrize('task', ['detector', 'classifier'])
    def test_are_those_of_inference(self, user_project, checkpoints, task):
        config = str(user_project / f'user_{task}.py')
        pictures = [(user_project / 'pictures' / f'{index}.png').read_bytes() for index in range(4)]
        with serving(load_served(config, checkpoints[task], 'cpu')) as ask:
            if task == 'detector':
                model, options, key = Detector(config, checkpoints[task], 'cpu'), 'score=0', 'bbox'
                expected = [found.as_records() for found in model.detect(pictures)]
            else:
                model, options, key = Classifier(config, checkpoints[task], 'cpu'), 'top=2', 'label'
                expected = [found.as_records() for found in model.classify(pictures)]
            with ThreadPoolExecutor(4) as threads:
                answers = [*threads.map(lambda each: ask(each, f'/predict?{options}'), pictures)]
            for index, (status, answer) in enumerate(answers):
                assert status == 200
                assert (answer['width'], answer['height']) == (96, 48 + 16 * index)
                records = answer['detections' if task == 'detector' else 'predictions']
                assert len(records) == len(expected[index])
                for record, other in zip(records, expected[index], strict=True):
                    np.testing.assert_allclose(record[key], other[key], atol=0.02)
                    assert abs(record['score'] - other['score']) < 2e-4
                    assert record['class_name'] in ('square', 'disc')
            # In a form, and by the defaults of the server.
            status, answer = ask(form_of(pictures[1], note='x'), headers=FORM)
            assert status == 200
            assert all(each['score'] >= .3 for each in answer.get('detections', ()))

    def test_of_exported_file(self, exported):
        served = load_served(str(exported))
        assert served.max_batch == 8
        with serving(served) as ask:
            status, answer = ask(picture_of(), '/predict?top=2')
            best = Runtime(exported)(picture_of()).top(2)
            assert status == 200 and answer == dict(width=20, height=10,
                                                    predictions=best.as_records())
            status, answer = ask(path='/')
            assert answer['classes'] == ['red', 'green', 'blue'] and status == 200


class TestBatches:

    def test_what_comes_together_runs_together(self):
        model = Echo(seconds=0.1)
        with serving(model, batch_size=4) as ask, ThreadPoolExecutor(12) as threads:
            assert model.batches == [[640], [640] * 2, [640] * 4]
            model.batches.clear()
            answers = [*threads.map(lambda width: ask(picture_of(width)), range(1, 13))]
            assert [answer['predictions'][0]['label'] for _, answer in answers] == [*range(1, 13)]
            sizes = [*map(len, model.batches)]
            assert sum(sizes) == 12 and {*sizes} <= {1, 2, 4} and 4 in sizes
            assert sorted(sum(model.batches, [])) == [*range(1, 13)]
            text = ask(path='/metrics')[1]
            assert 'spartan_mm_requests_total{status="200"} 12\n' in text
            assert f'spartan_mm_batches_total {len(sizes)}\n' in text
            median = float(re.search(r'quantile="0.5"} (\S+)', text)[1])
            assert 0.1 < median < 60

    def test_a_fault_hits_the_picture_that_has_it(self, capfd):
        with serving(Echo(seconds=0.1)) as ask, ThreadPoolExecutor(8) as threads:
            answers = [*threads.map(lambda width: ask(picture_of(width)), range(8, 16))]
        assert [status for status, _ in answers] == [200] * 5 + [500] * 2 + [200]
        assert answers[5][1] == dict(error='the model fails on this picture: 13 is')
        assert 'JSON' in answers[6][1]['error']  # it has no NaN
        assert 'error: RuntimeError: 13 is\n' in capfd.readouterr().err

    def test_model_that_takes_no_batches(self):
        model = Echo()
        model.find = lambda pictures: [0] if len(pictures) < 3 else 1 / 0
        with server.bind('127.0.0.1', 0) as taken, pytest.raises(
                InputError, match='echo fails on 4 pictures in a batch: division .* 2$'):
            server.serve(model, taken, Limits())

    def test_what_nobody_waits_for_is_not_kept(self):
        async def leave():
            batcher, start = Batcher(Echo(), Limits()), threading.Event()
            for _ in range(READERS):
                batcher._readers.submit(start.wait)
            content = bytes(1000)
            before = sys.getrefcount(content)
            task = asyncio.ensure_future(batcher(content))
            await asyncio.sleep(0)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            del task
            gc.collect()
            try:
                assert sys.getrefcount(content) == before and batcher.in_work == 0
            finally:
                start.set()
                batcher.close()

        asyncio.run(leave())

    def test_full_queue(self):
        with serving(Echo(seconds=0.5), queue=2, batch_size=1) as ask:
            with ThreadPoolExecutor(6) as threads:
                answers = [*threads.map(lambda width: ask(picture_of(width)), range(1, 7))]
            refused = [answer for status, answer in answers if status == 503]
            assert len(refused) == 4 and refused[0]['error'] == (
                'the server has 2 pictures in work, as many as it takes: try again in a second')
            assert ask(picture_of())[0] == 200

    def test_too_slow(self):
        with serving(Echo(seconds=1.5), seconds=0.3) as ask:
            status, answer = ask(picture_of())
            assert status == 504 and 'no answer within 0.3 s' in answer['error']
            assert ask(path='/ready') == (200, dict(status='ready'))


class TestRefusals:

    @pytest.mark.parametrize('content, status, message', [
        (b'', 400, 'the request has no picture'),
        (b'<html>', 400, 'no BMP, JPEG, PNG, TIFF or WebP picture, or is damaged'),
        (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n', 400, 'no BMP, JPEG, PNG'),
        (b'\x80\x04\x95' * 99, 400, 'no BMP, JPEG, PNG'),
        (png_that_claims(1001, 1000), 413,
         'is 1001x1000 pixels, 1,001,000 in all, and no more than 1,000,000'),
        (png_that_claims(60_000, 60_000), 413, 'no more than 1,000,000|more than 1,000,000'),
        (tiff_of_tiles(60_000), 413, '60000x60000 pixels'),
        (picture_of(kind='JPEG') + b'\xff\xda' * 64, 413, 'the JPEG has 65 scans'),
        (bytes(100_001), 413, 'the request has more than 0.0953674 MiB'),
        (iter([bytes(60_000)] * 2), 413, 'the request has more than'),
    ], ids=['empty', 'text', 'PostScript', 'pickle', 'bomb', 'large bomb', 'tiles', 'scans', 'long',
            'long without length'])
    def test_content(self, echo, content, status, message):
        found, answer = echo(content, method='POST')
        assert found == status and re.search(message, answer['error'])
        assert echo(picture_of())[0] == 200

    @pytest.mark.parametrize('body, headers, message', [
        (form_of(name='x'), FORM, 'the form has no file: send the picture as one'),
        (form_of(picture_of(), picture_of()), FORM, 'the form cannot be read: Too many files'),
        (b'garbage', FORM, 'the form '),
        (form_of(picture_of()), {'Content-Type': 'multipart/form-data'}, 'the form cannot be read'),
    ], ids=['no file', 'two files', 'garbage', 'no boundary'])
    def test_forms(self, echo, body, headers, message):
        status, answer = echo(body, headers=headers)
        assert status == 400 and answer['error'].startswith(message)

    @pytest.mark.parametrize('path, status, message', [
        ('/predict?top=0', 422, 'top=0: Input should be greater than or equal to 1'),
        ('/predict?top=many', 422, 'top=many: Input should be a valid integer'),
        ('/predict?score=0.5', 422, 'there is no parameter score: classification has top'),
        ('/elsewhere', 404, 'POST /elsewhere: Not Found; POST a picture to /predict, or GET'),
        ('/health', 405, 'POST /health: Method Not Allowed; POST a picture to /predict'),
    ])
    def test_requests(self, echo, path, status, message):
        found, answer = echo(picture_of(), path)
        assert found == status and answer['error'].startswith(message)

    def test_score_that_is_no_number(self):
        model = Echo()
        model.task = 'detection'
        with serving(model) as ask:
            for score in ('nan', '2', '-1', 'x'):
                assert ask(picture_of(), f'/predict?score={score}')[0] == 422

    @pytest.mark.parametrize('kind', ['checkpoint', 'exported'])
    def test_damaged_picture(self, user_project, checkpoints, exported, kind):
        served = load_served(str(exported)) if kind == 'exported' else load_served(
            str(user_project / 'user_detector.py'), checkpoints['detector'], 'cpu')
        with serving(served) as ask:
            status, answer = ask(picture_of(99, 99)[:-40])
            assert status == 400 and re.match('the bytes (cannot be|is of no)', answer['error'])


class TestClients:

    @pytest.mark.parametrize('start, answer', [
        (b'', b''), (b'POST /pre', b''),
        (b'POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nabc',
         b'the request did not arrive within 0.5 s: send a smaller picture'),
    ], ids=['nothing', 'half a head', 'half a body'])
    def test_slow_ones_do_not_block(self, monkeypatch, start, answer):
        monkeypatch.setattr(server, 'HEAD_SECONDS', 0.5)
        with serving(Echo(), seconds=0.5, queue=1) as ask:
            slow = [socket.create_connection(('127.0.0.1', ask.port)) for _ in range(20)]
            for each in slow:
                each.sendall(start)
            assert ask(picture_of())[0] == 200
            for each in slow:
                each.settimeout(30)
                received = b''.join(iter(lambda each=each: each.recv(2**16), b''))
                assert answer in received and bool(received) == bool(answer)
                each.close()

    def test_head_that_drips(self, monkeypatch):
        """Each byte comes in time, the head does not."""
        monkeypatch.setattr(server, 'HEAD_SECONDS', 0.5)
        with serving(Echo()) as ask, socket.create_connection(('127.0.0.1', ask.port)) as slow:
            slow.settimeout(0.1)
            start = time.monotonic()
            with pytest.raises(OSError):
                for letter in b'GET /' + b'a' * 300:
                    slow.sendall(bytes([letter]))
                    try:
                        assert slow.recv(9) == b''
                        raise ConnectionError
                    except TimeoutError:
                        pass
            assert time.monotonic() - start < 15

    def test_pictures_of_those_that_went_away_do_not_run(self):
        model = Echo(seconds=0.5)
        with serving(model, batch_size=1) as ask, ThreadPoolExecutor(2) as threads:
            first = threads.submit(ask, picture_of(1))
            time.sleep(0.2)
            content = picture_of(2)
            for _ in range(3):
                with socket.create_connection(('127.0.0.1', ask.port)) as gone:
                    gone.sendall(b'POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n'
                                 % len(content) + content)
            assert ask(picture_of(3))[0] == 200 and first.result()[0] == 200
            assert [2] not in model.batches
            assert 'requests_total{status="499"} 3\n' in ask(path='/metrics')[1]

    def test_garbage_in_place_of_http(self, echo):
        for content in (b'\x16\x03\x01' + bytes(500), b'GET /\r\n\r\n',
                        b'POST /predict HTTP/1.1\r\nA: ' + b'b' * 99999):
            with socket.create_connection(('127.0.0.1', echo.port)) as client:
                client.settimeout(30)
                client.sendall(content)
                assert client.recv(99).startswith(b'HTTP/1.1 400 ')
        assert echo(path='/health') == (200, dict(status='alive'))


class TestStop:

    def test_what_is_in_work_is_finished_and_nothing_else(self):
        model = Echo(seconds=0.5)
        with serving(model, batch_size=1) as ask, ThreadPoolExecutor(3) as threads:
            slow = socket.create_connection(('127.0.0.1', ask.port))
            slow.sendall(b'POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nabc')
            running = [threads.submit(ask, picture_of(width)) for width in (1, 2, 3)]
            time.sleep(0.3)
            ask.stop()
            slow.settimeout(30)
            answer = b''.join(iter(lambda: slow.recv(2**16), b''))
            slow.close()
            assert b'503' in answer and b'the server is stopping' in answer
            assert [each.result()[0] for each in running] == [200] * 3
            with pytest.raises(OSError):
                ask(picture_of())

    @pytest.mark.slow
    def test_process(self, user_project, checkpoints, tmp_path):
        """The command, SIGTERM with requests in work, and its end."""
        command = [sys.executable, '-m', 'spartan_mm.cli', 'serve', 'user_detector.py',
                   checkpoints['detector'], '--port', '0', '--device', 'cpu', '--score-thr', '0',
                   '--threads', '1']
        with subprocess.Popen(command, cwd=user_project, stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.PIPE, env=dict(os.environ)) as process:
            line = ''
            while not line.endswith('Ctrl-C stops it\n'):
                line = process.stdout.readline()
                assert line, process.stderr.read()
            place = SimpleNamespace(**re.search(
                r'^served_detector\.pth \(detection, 2 classes\) is served at '
                r'http://(?P<host>[\d.]+):(?P<port>\d+)/predict', line).groupdict())
            assert place.host == '127.0.0.1'
            content, statuses = (user_project / 'pictures' / '1.png').read_bytes(), []

            def ask():
                try:
                    while True:
                        connection = http.client.HTTPConnection(place.host, int(place.port))
                        connection.request('POST', '/predict', content)
                        response = connection.getresponse()
                        response.read()
                        statuses.append(response.status)
                except (ConnectionRefusedError, ConnectionResetError):
                    pass  # nothing was sent, or nobody had read it

            clients = [threading.Thread(target=ask) for _ in range(4)]
            for client in clients:
                client.start()
            while len(statuses) < 20:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            rest, errors = process.communicate(timeout=60)
            for client in clients:
                client.join()
        assert (process.returncode, rest, errors) == (0, 'stopped\n', '')
        assert {*statuses} <= {200, 503} and statuses.count(200) >= 20


class TestCommand:

    def test_port_in_use(self, capsys):
        with server.bind('127.0.0.1', 0) as taken:
            taken.listen()
            port = taken.getsockname()[1]
            assert cli.main(['serve', 'rtdetr_spartan_t', '--port', str(port)]) == 2
        assert re.fullmatch(rf'error: port {port} of 127\.0\.0\.1 cannot be had: Address already '
                            r'in use; take another --host or --port\n', capsys.readouterr().err)

    @pytest.mark.parametrize('words, message', [
        (['{exported}', 'x.pth'], 'has its weights and classes inside .* leave out CHECKPOINT'),
        (['{exported}', '--device', 'cpu'], 'leave out --device'),
    ])
    def test_what_does_not_go_with_exported_files(self, exported, capsys, words, message):
        words = [word.format(exported=exported) for word in words]
        assert cli.main(['serve', *words, '--port', '0']) == 2
        assert re.fullmatch(rf'error: .*{message}\n', capsys.readouterr().err)

    def test_files_that_cannot_be_served(self, exported):
        with pytest.raises(InputError, match='missing.onnx is missing'):
            load_served('missing.onnx')
        model = onnx.load(exported)
        for entry in model.metadata_props:
            entry.value = 'true' if entry.key == 'raw' else entry.value
        onnx.save(model, exported)
        with pytest.raises(InputError, match='with --raw, which gives no results: export it'):
            load_served(str(exported))


def test_race_cancels_what_lost():
    from spartan_mm.serving.app import _race

    async def guard():
        raise ConnectionError

    async def run():
        work = asyncio.create_task(asyncio.sleep(60))
        with pytest.raises(ConnectionError):
            await _race(work, guard(), 5)
        assert work.cancelled()

    asyncio.run(run())
