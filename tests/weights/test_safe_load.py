"""Checkpoints are read as data: what runs code is refused, whatever way it comes in."""

import copy
import hashlib
import io
import json
import os
import pickle
import runpy
import sys
import tarfile
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader, load_checkpoint
from safetensors.torch import save_file
from torch import nn

from spartan_mm import SpaRTAN, config_from
from spartan_mm.errors import CheckpointError
from spartan_mm.weights import CheckedPretrained, ConvertedPretrained
from spartan_mm.weights.converters.convert import convert, read_source
from spartan_mm.weights.loading import find_classes, load_for_inference
from spartan_mm.weights.publish import publish
from spartan_mm.weights.safe_load import local_file, read_checkpoint, read_foreign

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
WEIGHTS = dict(weight=torch.ones(3, 2), bias=torch.zeros(3))


class Attack:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(trace):
    """Ways to leave a trace, and what the message says of each."""
    return {
        'posix.system|nt.system': Attack(os.system, f'echo > "{trace}"'),
        'builtins.exec': Attack(exec, f'open({str(trace)!r}, "w")'),
        'io.open': Attack(open, str(trace), 'w'),
        'getattr of HistoryBuffer.__init__': Attack(getattr, HistoryBuffer, '__init__'),
        'getattr of HistoryBuffer.register_statistics': Attack(
            getattr, HistoryBuffer, 'register_statistics'),
        'torch.storage._load_from_bytes': Attack(
            torch.storage._load_from_bytes, pickle.dumps(Attack(open, str(trace), 'w'))),
    }


@pytest.fixture
def malicious(tmp_path):
    """A checkpoint that has the right weights, and writes a file if it is unpickled."""
    trace, path = tmp_path / 'trace', tmp_path / 'malicious.pth'
    torch.save(dict(state_dict=WEIGHTS, meta={}, optimizer=attacks(trace)['builtins.exec']), path)
    yield path
    assert not trace.exists()
    # The test could have failed: nothing but the reader's care has spared us the file.
    torch.load(path, weights_only=False)
    assert trace.exists()


def saved(tmp_path, content, **options):
    torch.save(content, tmp_path / 'checkpoint.pth', **options)
    return tmp_path / 'checkpoint.pth'


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'before torch 1.6'])
@pytest.mark.parametrize('name', attacks(None))
def test_what_runs_is_refused_by_name(tmp_path, name, zipped):
    trace = tmp_path / 'trace'
    path = saved(tmp_path, dict(a=attacks(trace)[name]), _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf'checkpoint\.pth is refused: .* run ({name}), '
                                              '.*Nothing was run'):
        read_checkpoint(path)
    assert not trace.exists()


@pytest.mark.parametrize('name, attack', [
    *list(attacks('trace').items())[:5], ('getattr', Attack(Path.touch, Path('trace')))])
def test_what_runs_is_refused_in_files_of_others(tmp_path, monkeypatch, name, attack):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path, dict(a=attack, model=WEIGHTS))
    with pytest.raises(CheckpointError, match=rf'checkpoint\.pth is refused: .* run ({name})'):
        read_foreign(path)
    assert os.listdir() == ['checkpoint.pth']


@pytest.mark.parametrize('load', [
    lambda path: load_for_inference(nn.Linear(2, 3), path),
    lambda path: CheckedPretrained(path)(nn.Linear(2, 3)),
    lambda path: ConvertedPretrained(path, 'spartan')(SpaRTAN('xt')),
    lambda path: CheckpointLoader.load_checkpoint(path),
    lambda path: load_checkpoint(nn.Linear(2, 3), path),
    lambda path: nn_initialize(path),
    lambda path: config_from(path),
    lambda path: publish(path, 'published'),
    lambda path: det_inferencer(path),
    lambda path: image_classification_inferencer(path),
], ids=['load_for_inference', 'CheckedPretrained', 'ConvertedPretrained', 'CheckpointLoader',
        "mmengine's load_checkpoint", "mmengine's Pretrained", 'config_from', 'publish',
        'DetInferencer', 'ImageClassificationInferencer'])
def test_every_way_in(malicious, load):
    with pytest.raises((CheckpointError, ValueError), match=r'malicious\.pth.* refused: .*exec'):
        load(str(malicious))


def nn_initialize(path):
    from mmengine.model import initialize
    initialize(nn.Linear(2, 3), dict(type='Pretrained', checkpoint=path))


def det_inferencer(path):
    from mmdet.apis import DetInferencer
    DetInferencer(weights=path, device='cpu')


def image_classification_inferencer(path):
    from mmpretrain import ImageClassificationInferencer
    config = Config.fromfile(Path(__file__).parents[1] / 'data' / 'user_classifier.py')
    ImageClassificationInferencer(config, pretrained=path)


@pytest.mark.parametrize('command', [
    ('test.py', 'user_detector.py', 'FILE'),
    ('infer.py', 'pictures', 'user_detector.py', 'FILE'),
    ('infer.py', 'pictures', 'FILE'),
    ('train.py', 'user_detector.py', '--resume', 'FILE'),
    ('train.py', 'user_detector.py', '--cfg-options', 'load_from=FILE'),
    ('model_converters/publish_model.py', 'FILE', 'published'),
    ('model_converters/spartan_to_mm.py', 'FILE', 'converted.pth'),
], ids=' '.join)
def test_every_command(malicious, user_project, monkeypatch, capfd, command):
    monkeypatch.chdir(user_project)
    monkeypatch.setattr(sys, 'argv', [word.replace('FILE', str(malicious)) for word in command])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(TOOLS / command[0]), run_name='__main__')
    message = str(end.value.code) + capfd.readouterr().err
    assert end.value.code != 0 and 'error: ' in message
    assert 'malicious.pth' in message and 'exec' in message and 'refused' in message


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """Has a file downloaded, whatever the URL; the folder of what was downloaded."""
    def download(path):
        monkeypatch.setattr(torch.hub, 'urlopen', lambda *_, **__: _Response(path.read_bytes()))
        return tmp_path / 'checkpoints'

    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    return download


class _Response(io.BytesIO):

    def info(self):
        return Message()


class TestDownload:
    URL = 'https://example.org/'

    def test_it_is_read_as_data(self, malicious, downloads):
        downloads(malicious)
        with pytest.raises(CheckpointError, match='refused'):
            CheckpointLoader.load_checkpoint(f'{self.URL}weights.pth?version=1')

    def test_names_that_two_files_share(self, tmp_path, downloads):
        first, second = f'{self.URL}a/last.pth', f'{self.URL}b/last.pth?c=1'
        downloads(saved(tmp_path, dict(a=1)))
        assert read_checkpoint(local_file(first)) == dict(a=1)
        downloads(saved(tmp_path, dict(a=2)))
        assert read_checkpoint(local_file(second)) == dict(a=2)
        assert read_checkpoint(local_file(first)) == dict(a=1)

    def test_the_hash_in_the_name(self, tmp_path, downloads):
        path = saved(tmp_path, WEIGHTS)
        name = f'a-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth'
        folder = downloads(path)
        assert local_file(self.URL + name) == folder / name
        assert (folder / name).is_file()

    def test_another_hash(self, tmp_path, downloads):
        folder = downloads(saved(tmp_path, WEIGHTS))
        with pytest.raises(CheckpointError, match=r'a-00000000\.pth is refused: .*hash'):
            local_file(f'{self.URL}a-00000000.pth')
        assert not list(folder.iterdir())

    def test_a_date_is_no_hash(self, tmp_path, downloads):
        downloads(saved(tmp_path, WEIGHTS))
        assert local_file(f'{self.URL}run-20260131.pth').name.endswith('-run-20260131.pth')

    def test_url_is_downloaded_once(self, tmp_path, monkeypatch):
        calls = []

        def download(url, target, hash_prefix, progress):
            calls.append(url)
            Path(target).write_bytes(b'weights')

        monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
        monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
        url = 'https://example.org/some/vd.pth'
        path = local_file(url)
        assert local_file(url) == path and path.name.endswith('-vd.pth')
        assert path.parent == tmp_path / 'checkpoints'
        assert calls == [url]

    def test_a_download_that_fails(self, tmp_path, monkeypatch):
        def download(*_, **__):
            raise OSError('no network')

        monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
        monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
        with pytest.raises(CheckpointError, match='org/vd.pth cannot be downloaded: no network'):
            local_file('https://example.org/vd.pth')


def test_a_checkpoint_of_the_authors(tmp_path):
    path = saved(tmp_path, dict(model=WEIGHTS, cfg=Attack(Part, 1)))
    with pytest.raises(CheckpointError, match=r'converted by spartan-mm convert'):
        read_checkpoint(path)


def pickled(tmp_path, content):
    """A checkpoint that holds just these bytes of pickle."""
    empty, path = saved(tmp_path, {}), tmp_path / 'pickled.pth'
    with zipfile.ZipFile(empty) as source, zipfile.ZipFile(path, 'w') as target:
        for name in source.namelist():
            target.writestr(name, content if name.endswith('data.pkl') else source.read(name))
    return path


def named(name):
    """Asks for a function or class by its name, and pushes it."""
    return f'c{name.rpartition(".")[0]}\n{name.rpartition(".")[2]}\n'.encode()


class TestWhatIsNotWritten:
    """Nothing that Python's pickle could write, but that its machine understands."""

    def test_a_known_class_is_not_changed(self, tmp_path):
        # Gives the class HistoryBuffer a state: a dict of what is set on it.
        content = (b'\x80\x02' + named('mmengine.logging.history_buffer.HistoryBuffer')
                   + b'N}X\x04\x00\x00\x00mean' + named('torch.float32') + b's\x86b.')
        with pytest.raises(CheckpointError, match='refused: .* run a change of type, .*Nothing'):
            read_checkpoint(pickled(tmp_path, content))

    def test_an_array_of_objects_over_bytes(self, tmp_path):
        # NumPy would take the bytes for the address of an object.
        bytes_of = b'c_codecs\nencode\nX\x08\x00\x00\x0012345678X\x06\x00\x00\x00latin1\x86R'
        content = (b'\x80\x02' + named('numpy.ndarray') + b'(K\x01\x85X\x01\x00\x00\x00O'
                   + bytes_of + b'tR.')
        with pytest.raises(CheckpointError, match=r'refused: .* run numpy\.ndarray'):
            read_checkpoint(pickled(tmp_path, content))

    def test_a_type_of_numbers_that_claims_to_hold_objects(self, tmp_path):
        state = (3, '|', None, ('a', ), {'a': ('object', 0)}, 8, 8, 63)
        # Without the head and the end of a pickle.
        content = (b'\x80\x02' + named('numpy.dtype') + b'X\x02\x00\x00\x00f8\x89\x88\x87R'
                   + pickle.dumps(state, 2)[2:-1] + b'b.')
        found = read_checkpoint(pickled(tmp_path, content))
        assert (found, found.names, found.hasobject) == (np.dtype('f8'), None, False)

    def test_an_array_whose_numbers_a_tensor_looks_at(self, tmp_path):
        # NumPy would free them.
        state = (1, (2, ), np.dtype('f8'), False, bytes(16))
        change = pickle.dumps(state, 2)[2:-1] + b'b'
        tensor = (b'h\xff' + named('torch.float64') + b'X\x03\x00\x00\x00cpu\x89')
        content = (b'\x80\x02' + named('numpy._core.multiarray._reconstruct') + b')R' + change
                   + b'q\xff' + named('torch._utils._rebuild_device_tensor_from_numpy') + b'('
                   + tensor + b'tRh\xff' + change + b'\x86.')
        with pytest.raises(CheckpointError, match='refused: .* run a second change of a numpy'):
            read_checkpoint(pickled(tmp_path, content))

    @pytest.mark.parametrize('function', ['torch.load', 'torch.hub.load', 'numpy.load'])
    def test_functions_of_known_packages(self, tmp_path, function):
        content = b'\x80\x02' + named(function) + b'X\x01\x00\x00\x00a\x85R.'
        with pytest.raises(CheckpointError, match=f'refused: .* run {function}'):
            read_checkpoint(pickled(tmp_path, content))

    @pytest.mark.parametrize('name', ['numpy array', 'numpy dtype d'])
    def test_types_that_are_for_states_alone(self, tmp_path, name):
        content = b'\x80\x02c\n' + name.encode() + b'\n)R.'
        with pytest.raises(CheckpointError, match='refused'):
            read_checkpoint(pickled(tmp_path, content))


def called(name, *arguments):
    """Calls a function or class with plain arguments."""
    return b'\x80\x02' + named(name) + pickle.dumps(arguments, 2)[2:-1] + b'R.'


def as_tensor(shape, strides, count=4, function='torch._utils._rebuild_tensor_v2'):
    """A tensor of a storage that claims `count` numbers; it has four."""
    identity = (b'(X\x07\x00\x00\x00storage' + named('torch.FloatStorage')
                + b''.join(pickle.dumps(part, 2)[2:-1] for part in ('0', 'cpu', count)) + b'tQ')
    return (b'\x80\x02' + named(function) + b'(' + identity + b'K\x00'
            + pickle.dumps(shape, 2)[2:-1] + pickle.dumps(strides, 2)[2:-1] + b'\x89'
            + named('collections.OrderedDict') + b')RtR.')


HUGE = 10**13
RANGE = called('builtins.range', HUGE)[2:-1]


class TestClaims:
    """What a file says of its sizes is held against its own, before there is any memory for it."""

    @pytest.mark.parametrize('content', [
        called('builtins.bytearray', HUGE), called('builtins.bytes', HUGE),
        called('torch.Tensor', HUGE), called('torch.FloatTensor', HUGE),
        called('torch.storage.UntypedStorage', HUGE),
        b'\x80\x02' + named('torch.FloatTensor') + pickle.dumps((HUGE, ), 2)[2:-1] + b'\x81.',
        *(b'\x80\x02' + named(f'builtins.{name}') + RANGE + b'\x85R.'
          for name in ('list', 'set', 'frozenset', 'tuple', 'bytearray')),
        b'\x80\x02' + named('torch._tensor._rebuild_from_type_v2') + b'(' + named(
            'builtins.bytearray') + b'N' + pickle.dumps((HUGE, ), 2)[2:-1] + b'NtR.',
    ])
    @pytest.mark.parametrize('read', [read_checkpoint, read_foreign])
    def test_calls_that_take_memory(self, tmp_path, content, read):
        with pytest.raises(CheckpointError, match='cannot be read .* take any amount of memory'):
            read(pickled(tmp_path, content))

    @pytest.mark.parametrize('content', [
        as_tensor((HUGE, ), (1, ), count=HUGE), as_tensor((HUGE, ), (1, )),
        as_tensor((2, HUGE), (0, 0)), as_tensor((2, ), (4, )), as_tensor((2, ), (-1, )),
        as_tensor((2, 2), (1, )), as_tensor((HUGE, ), (0, ), 4, 'torch._utils._rebuild_qtensor'),
    ], ids=['storage', 'shape', 'expanded', 'stride', 'backwards', 'strides', 'quantized'])
    def test_tensors(self, tmp_path, content):
        with pytest.raises(CheckpointError, match='its tensors claim more than the .* bytes'):
            read_checkpoint(pickled(tmp_path, content))

    def test_many_tensors_in_one_place(self, tmp_path):
        weight = torch.zeros(300).expand(4, 300)
        assert read_checkpoint(saved(tmp_path, [weight]))[0].shape == (4, 300)
        with pytest.raises(CheckpointError, match='claim more'):
            read_checkpoint(saved(tmp_path, [weight.expand(100, 4, 300) for _ in range(9)]))

    def test_storages_before_torch_1_6(self, tmp_path):
        path = saved(tmp_path, dict(a=torch.zeros(1000)), _use_new_zipfile_serialization=False)
        content = path.read_bytes()
        count = pickle.dumps(1000, 2)[2:-1]
        assert content.count(count) >= 1
        path.write_bytes(content.replace(count, b'M\xff\xff'))
        with pytest.raises(CheckpointError, match='its tensors claim more than the'):
            read_checkpoint(path)

    def test_entries_that_unfold(self, tmp_path):
        with zipfile.ZipFile(tmp_path / 'a.pth', 'w', zipfile.ZIP_DEFLATED) as file:
            file.writestr('archive/data.pkl', b'\x80\x02N.')
            file.writestr('archive/data/0', bytes(10**6))
        with pytest.raises(CheckpointError, match='its entries claim more bytes than it has'):
            read_checkpoint(tmp_path / 'a.pth')

    @pytest.mark.filterwarnings('ignore:Duplicate name')
    @pytest.mark.parametrize('name', ['archive/other/0', 'archive/data/0', 'b/data/0'])
    def test_entries_of_one_name(self, tmp_path, name):
        path = pickled(tmp_path, as_tensor((1000, ), (1, ), count=1000))
        with zipfile.ZipFile(path, 'a') as file:
            file.writestr('archive/data/0', bytes(16))
            file.writestr(name, bytes(4000))
        with pytest.raises(CheckpointError, match='claim more bytes than their entries'):
            read_checkpoint(path)

    def test_a_zip_behind_a_file_before_torch_1_6(self, tmp_path):
        path = saved(tmp_path, dict(a=Attack(bytearray, 10**6)),
                     _use_new_zipfile_serialization=False)
        with zipfile.ZipFile(path, 'a') as file:
            file.writestr('archive/version', '3')
        with pytest.raises(CheckpointError, match='take any amount of memory'):
            read_checkpoint(path)

    @pytest.mark.parametrize('header', [
        (2**60).to_bytes(8, 'little') + b'{}', (10**6).to_bytes(8, 'little') + b'{}',
        *(len(text).to_bytes(8, 'little') + text for text in (
            b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}',
            b'{"__metadata__":{"meta":"' + b'[' * 100_000 + b'"}}'))],
        ids=['header', 'longer than the file', 'tensor', 'nested'])
    def test_safetensors(self, tmp_path, header):
        (tmp_path / 'a.safetensors').write_bytes(header)
        with pytest.raises(CheckpointError, match='cannot be read as a checkpoint'):
            read_checkpoint(tmp_path / 'a.safetensors')

    def test_a_config_that_grows_as_one_goes_through_it(self, tmp_path):
        content = ['a'] * 10
        for _ in range(30):
            content = [content] * 10
        path = saved(tmp_path, dict(meta=dict(config=dict(a=content)), state_dict=WEIGHTS))
        with pytest.raises(CheckpointError, match='config inside of .* has more than'):
            config_from(path)
        assert 'cfg' not in CheckpointLoader.load_checkpoint(str(path))['meta']

    def test_names_of_classes_without_end(self, tmp_path):
        path = saved(tmp_path, dict(meta=dict(dataset_meta=dict(classes=range(HUGE)))))
        assert find_classes(read_checkpoint(path)) is None


def test_plain_types_and_ranges_are_no_code(tmp_path):
    content = dict(kinds=[int, str, float, bool, list, dict, tuple, range, frozenset],
                   ranges=[range(3), slice(1, 2)], sets=[{1}, frozenset('a')],
                   bytes=[b'', b'1', bytearray(b'2'), bytearray()])
    for protocol in (True, False):
        path = saved(tmp_path, content, _use_new_zipfile_serialization=protocol)
        assert read_checkpoint(path) == content


def test_several_threads_read_at_once(tmp_path):
    paths = []
    for number in range(8):
        torch.save(dict(a=np.arange(number), cfg=Part(1)), tmp_path / f'{number}.pth')
        paths.append(tmp_path / f'{number}.pth')
    before = torch.serialization.get_safe_globals()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read_foreign, paths * 4))
    assert [len(content['a']) for content in found] == [*range(8)] * 4
    assert torch.serialization.get_safe_globals() == before


@pytest.mark.parametrize('value', [np.array([{}]), np.dtype('f4,f8'), np.array(['text'])],
                         ids=['objects', 'record', 'text'])
def test_arrays_of_numbers_alone(tmp_path, value):
    with pytest.raises(CheckpointError, match=r'refused: .* run numpy\.dtype'):
        read_checkpoint(saved(tmp_path, dict(a=value)))


def test_a_class_of_ones_own_can_be_allowed(tmp_path):
    path = saved(tmp_path, dict(a=Part(3)))
    with pytest.raises(CheckpointError, match=r'Part, .*add_safe_globals'):
        read_checkpoint(path)
    with torch.serialization.safe_globals([Part]):
        assert read_checkpoint(path)['a'].number == 3


def test_torch_is_not_left_with_other_safe_classes(tmp_path):
    with torch.serialization.safe_globals([HistoryBuffer, np.ndarray]):
        before = set(torch.serialization.get_safe_globals())
        read_checkpoint(saved(tmp_path, {}))
        assert set(torch.serialization.get_safe_globals()) == before


def test_what_stands_for_a_name_is_not_the_users(tmp_path):
    path = saved(tmp_path, dict(a=np.arange(3)))
    with torch.serialization.safe_globals([np.ndarray, np.dtype, np.array([]).__reduce__()[0]]):
        assert read_checkpoint(path)['a'].tolist() == [0, 1, 2]
        with pytest.raises(CheckpointError, match=r'refused: .* run numpy\.dtype'):
            read_checkpoint(saved(tmp_path, dict(a=np.array([{}]))))


def test_an_array_is_written_as_any_other(tmp_path):
    found = read_checkpoint(saved(tmp_path, dict(a=np.arange(3))))
    again = read_checkpoint(saved(tmp_path, copy.deepcopy(found)))
    assert again['a'].tolist() == [0, 1, 2]


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_no_advice_to_be_careless(tmp_path):
    path = tmp_path / 'protocol.pth'
    torch.save(dict(a=b'1'), path, pickle_protocol=4)
    with pytest.raises(CheckpointError, match='cannot be read as a checkpoint: .') as caught:
        read_checkpoint(path)
    assert 'weights_only' not in str(caught.value) and '\n' not in str(caught.value)


class Part:

    def __init__(self, number):
        self.number = number


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'before torch 1.6'])
def test_all_that_a_training_writes(tmp_path, zipped):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(4, 2)).sum().backward()
    optimizer.step()
    content = dict(
        state_dict=model.state_dict(), optimizer=optimizer.state_dict(), parameter=model[0].bias,
        half=torch.ones(2, dtype=torch.bfloat16), shape=torch.Size([1, 2]), numbers={1, 2},
        parts=(frozenset([1]), range(3), slice(1)),
        best=np.float64(0.5), count=np.int64(3), flag=np.bool_(True), bytes=b'\xff\x00',
        random=np.random.get_state(), meta=dict(classes=('a', 'b'), none=None),
        message_hub=dict(log_scalars=dict(loss=HistoryBuffer([0.5, 0.25], [1, 1]))))
    found = read_checkpoint(saved(tmp_path, content, _use_new_zipfile_serialization=zipped))
    log = found.pop('message_hub')['log_scalars']['loss']
    assert (log.mean(), log.statistics('current')) == (0.375, 0.25)
    del content['message_hub']
    assert found.keys() == content.keys()
    assert found['state_dict']._metadata == content['state_dict']._metadata
    np.testing.assert_array_equal(found['random'][1], content['random'][1])
    for key in ('state_dict', 'parameter', 'half'):
        torch.testing.assert_close(found[key], content[key], rtol=0, atol=0)
    for key in ('shape', 'numbers', 'best', 'count', 'flag', 'bytes', 'meta'):
        assert (type(found[key]), found[key]) == (type(content[key]), content[key])
    optimizer.load_state_dict(found['optimizer'])


@pytest.mark.parametrize('variable', ['TORCH_FORCE_WEIGHTS_ONLY_LOAD',
                                      'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'])
def test_what_torch_is_told_elsewhere(tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, '1')
    path = saved(tmp_path, dict(log=HistoryBuffer([0.5], [1])))
    assert read_checkpoint(path)['log'].mean() == 0.5
    with pytest.raises(CheckpointError, match='refused'):
        read_checkpoint(saved(tmp_path, dict(a=Attack(exec, ''))))


PLACES = [
    lambda text: dict(meta=dict(cfg=text)),
    lambda text: dict(meta=dict(config=text)),
    lambda text: dict(message_hub=dict(runtime_info=dict(cfg=text))),
]


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('text', ['import os\nos.system("ls")', 'a = dict(type="os.system")'])
def test_a_config_that_runs_code(tmp_path, place, text):
    path = saved(tmp_path, dict(place(text), state_dict=WEIGHTS))
    message = r'checkpoint\.pth is refused: the config in it would run code \(.*os'
    with pytest.raises(CheckpointError, match=message):
        config_from(path)
    with pytest.raises(CheckpointError, match=message):
        convert(read_source(path, 'mm'), tmp_path / 'new.pth', 'spartan')


class TestConfigs:
    """One that runs code does no harm, and no more than that."""

    @pytest.fixture(params=[
        "kind = 'os.system'\nmodel = dict(type=kind, command='COMMAND')",
        "model = dict([('type', 'os.system'), ('command', 'COMMAND')])",
        "key = 'type'\nmodel = {key: 'os.system', 'command': 'COMMAND'}",
        "a = [('type', 'os.system')]\nmodel = dict(a, command='COMMAND')",
        "model = dict(type='torch.PyTorchFileWriter', file_name='TRACE')",
    ])
    def path(self, request, tmp_path):
        trace = tmp_path / 'trace'
        text = request.param.replace('COMMAND', f'echo > {trace}').replace('TRACE', str(trace))
        yield saved(tmp_path, dict(meta=dict(cfg=text), state_dict=WEIGHTS))
        assert not trace.exists()
        # The test could have failed.
        MODELS.build(Config.fromstring(text, '.py').model)
        assert trace.exists()

    def test_building_from_it(self, path):
        with pytest.raises(CheckpointError, match='would run code'):
            MODELS.build(config_from(path).model)

    def test_an_inferencer(self, path):
        from mmdet.apis import DetInferencer
        with pytest.raises(RuntimeError, match=r'checkpoint\.pth is refused.* would run code'):
            DetInferencer(weights=str(path), device='cpu')


@pytest.mark.parametrize('place', PLACES)
def test_weights_beside_a_config_that_is_not_used(tmp_path, place):
    path = saved(tmp_path, dict(place("a = dict(type='my.Own')"), state_dict=WEIGHTS))
    for load in (load_for_inference, load_checkpoint):
        model = nn.Linear(2, 3)
        load(model, str(path))
        torch.testing.assert_close(dict(model.state_dict()), WEIGHTS)


def test_a_refusal_is_not_made_into_code(tmp_path):
    # In the message that takes its place, these braces meet.
    text = """a = f('{' '{$NONE:")\\nopen("trace", "w")#}' '}', "'")"""
    path = saved(tmp_path, dict(meta=dict(cfg=text), state_dict=WEIGHTS))
    replaced = CheckpointLoader.load_checkpoint(str(path))['meta']['cfg']
    assert '{' not in replaced
    with pytest.raises(RuntimeError, match='would run code'):
        Config.fromstring(replaced, '.py')


class TestSafetensors:

    def write(self, path, **metadata):
        path.parent.mkdir(exist_ok=True)
        save_file(WEIGHTS, path, {key: json.dumps(value) for key, value in metadata.items()})
        return path

    @pytest.mark.parametrize('name', ['weights.safetensors', 'gewichte für alle/weights',
                                      '重み.safetensors'])
    def test_weights_and_meta(self, tmp_path, name):
        meta = dict(dataset_meta=dict(classes=['one', 'twö'], palette=[[1, 2, 3], [4, 5, 6]]))
        path = self.write(tmp_path / name, meta=meta)
        found = read_checkpoint(path)
        assert found['meta']['dataset_meta'] == dict(classes=('one', 'twö'),
                                                     palette=[(1, 2, 3), (4, 5, 6)])
        torch.testing.assert_close(found['state_dict'], WEIGHTS)

    @pytest.mark.parametrize('load', [
        lambda model, path: load_for_inference(model, path),
        lambda model, path: CheckedPretrained(path)(model),
        lambda model, path: load_checkpoint(model, path, map_location='cpu', strict=True),
    ], ids=['load_for_inference', 'CheckedPretrained', "mmengine's"])
    def test_wherever_a_checkpoint_is_taken(self, tmp_path, load):
        model = nn.Linear(2, 3)
        load(model, str(self.write(tmp_path / 'weights.safetensors')))
        torch.testing.assert_close(dict(model.state_dict()), WEIGHTS)

    def test_code_in_the_config(self, tmp_path):
        path = self.write(tmp_path / 'weights.safetensors', meta=dict(cfg='exec("")'))
        with pytest.raises(CheckpointError, match='refused'):
            config_from(path)

    def test_the_header_is_no_dict(self, tmp_path):
        path = self.write(tmp_path / 'weights.safetensors', meta=[1])
        with pytest.raises(CheckpointError, match="the entry 'meta' of its header is no dict"):
            read_checkpoint(path)


def truncated_safetensors(path):
    save_file(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:-4])


def truncated_zip(path):
    torch.save(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:-200])


def script(path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 3)), path)


def tar(path):
    with tarfile.open(path, 'w') as file:
        file.add(__file__)


@pytest.mark.parametrize('name, write, message', [
    ('a.safetensors', truncated_safetensors, ''),
    ('a.safetensors', lambda path: torch.save(WEIGHTS, path), ''),
    ('a.safetensors', lambda path: path.write_bytes(b''), ''),
    ('a.pth', lambda path: path.write_bytes(b''), ''),
    ('a.pth', lambda path: path.write_text('<html>Not found</html>'), ''),
    ('a.pth', truncated_zip, ''),
    ('a.pth', script, 'TorchScript'),
    ('a.pth', tar, 'tar archive'),
])
def test_files_of_another_kind(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(CheckpointError, match=rf'{name} cannot be read as a checkpoint: .*{message}'
                       ):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize('name', ['none.pth', 'none.safetensors', '.'])
def test_no_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match='does not exist'):
        read_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError, match='does not exist|is a folder, not a checkpoint'):
        read_foreign(tmp_path / name)


def test_foreign_objects_are_read_without_their_package(tmp_path, monkeypatch):
    """As the authors' checkpoints, which hold a config object beside the weights."""
    module = types.ModuleType('foreign_config')
    exec('class Config(dict):\n    pass\n\nclass Node(list):\n    def __init__(self, value):\n'
         '        self.value = value\n    def __reduce__(self):\n'
         '        return type(self), (self.value,), None, iter([1])', module.__dict__)
    monkeypatch.setitem(sys.modules, 'foreign_config', module)
    config = module.Config(path=Path('here'))
    config.content = dict(depth=module.Node(3), kind=dict)
    path = saved(tmp_path, dict(config=config, model=WEIGHTS))
    monkeypatch.delitem(sys.modules, 'foreign_config')
    torch.testing.assert_close(read_foreign(path)['model'], WEIGHTS)
