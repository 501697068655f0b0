"""Weights from and to the Hugging Face Hub: huggingface_hub itself, against a server of our own."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import constants
from mmengine.config import Config
from mmengine.runner import CheckpointLoader

from spartan_mm import cli, config_from, get_model
from spartan_mm.errors import CheckpointError, UsageError
from spartan_mm.weights import hub, model_card
from spartan_mm.weights.publish import publish
from spartan_mm.weights.safe_load import local_file

DATA = Path(__file__).parents[1] / 'data'
TOKEN = 'hf_ours'
MISSING = 401, {'X-Error-Code': 'RepoNotFound'}, {}


class Hub:
    """What the Hub answers: repositories as {name: {file: content}}, the newest commit of each."""

    def __init__(self):
        self.repositories = {}
        self.requests = []

    def commit(self, name):
        return hashlib.sha1(repr(sorted(self.repositories[name].items())).encode()).hexdigest()

    def answer(self, method, path, body, token):
        """Status, headers and content."""
        self.requests.append(f'{method} {path}')
        parts = [unquote(part) for part in urlsplit(path).path.strip('/').split('/')]
        if method == 'POST' and token != f'Bearer {TOKEN}':
            return 401, {}, {}
        match parts:
            case ['api', 'repos', 'create']:
                asked = json.loads(body)
                name = f'{asked["organization"]}/{asked["name"]}'
                status = 409 if name in self.repositories else 200
                self.repositories.setdefault(name, {})
                return status, {}, dict(url=f'{constants.ENDPOINT}/{name}')
            case ['api', 'validate-yaml']:
                return 200, {}, {}
            case ['api', 'models', org, name, action, revision, *_]:
                return self.of_repository(f'{org}/{name}', action, revision, body)
            case [org, name, 'resolve', revision, file] if f'{org}/{name}' in self.repositories:
                name = f'{org}/{name}'
                content = self.repositories[name].get(file)
                if content is None:
                    return 404, {'X-Error-Code': 'EntryNotFound'}, {}
                return 200, {'ETag': f'"{hashlib.sha256(content).hexdigest()}"',
                             'X-Repo-Commit': self.commit(name)}, content
        return MISSING

    def of_repository(self, name, action, revision, body):
        if name not in self.repositories:
            return MISSING
        files = self.repositories[name]
        if revision not in ('main', self.commit(name)):
            return 404, {'X-Error-Code': 'RevisionNotFound'}, {}
        match action:
            case 'tree':
                return 200, {}, [dict(type='file', path=path, size=len(content), oid='0')
                                 for path, content in files.items()]
            case 'preupload':
                asked = json.loads(body)['files']
                return 200, {}, dict(files=[dict(path=file['path'], uploadMode='regular',
                                                 shouldIgnore=False) for file in asked])
            case 'commit':
                for change in map(json.loads, body.decode().splitlines()):
                    value = change['value']
                    if change['key'] == 'file':
                        files[value['path']] = base64.b64decode(value['content'])
                    elif change['key'] == 'deletedFile':
                        del files[value['path']]
                return 200, {}, dict(commitOid='1' * 40,
                                     commitUrl=f'{constants.ENDPOINT}/{name}/commit/{"1" * 40}')
        return 404, {}, {}


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub on this machine, which is the one that huggingface_hub knows."""
    ours = Hub()

    class Handler(BaseHTTPRequestHandler):

        def respond(self):
            length = int(self.headers.get('Content-Length') or 0)
            body = self.rfile.read(length)
            status, headers, content = ours.answer(self.command, self.path, body,
                                                   self.headers.get('Authorization'))
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for key, value in dict(headers, **{'Content-Length': len(content)}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != 'HEAD':
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = respond

        def log_message(self, *args):
            pass

    running = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{running.server_port}'
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, 'ENDPOINT', address)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'token'))
    for variable in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'http_proxy', 'HTTP_PROXY'):
        monkeypatch.delenv(variable, raising=False)

    def stop():
        running.shutdown()
        running.server_close()

    ours.stop = stop
    yield ours
    stop()


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A user's classifier, published, and the files of a repository with it."""
    folder = tmp_path_factory.mktemp('classifier')
    config = Config.fromfile(DATA / 'user_classifier.py')
    torch.manual_seed(0)
    model = get_model(config)
    files = publish(model, folder / 'shapes', config, ('square', 'disc'))
    return SimpleNamespace(model=model, config=config, files=files,
                           content={path.name: path.read_bytes() for path in files})


def weights_equal(one, other):
    return all(torch.equal(value, other.state_dict()[key])
               for key, value in one.state_dict().items())


class TestLoading:

    def test_the_safetensors_file_of_two(self, server, trained):
        server.repositories['me/shapes'] = trained.content
        config = config_from('hf://me/shapes')
        model = get_model(config, pretrained='hf://me/shapes', num_classes=None)
        assert weights_equal(trained.model, model)
        assert not [line for line in server.requests if line.endswith('.pth')]

    def test_a_file_of_a_revision_and_mmengine_itself(self, server, trained):
        server.repositories['me/shapes'] = trained.content
        revision = server.commit('me/shapes')
        address = f'hf://me/shapes@{revision}/{trained.files.pth.name}'
        found = CheckpointLoader.load_checkpoint(address)
        assert found['meta']['dataset_meta']['classes'] == ('square', 'disc')
        with pytest.raises(CheckpointError, match='the repository has no such revision'):
            local_file('hf://me/shapes@v9')

    def test_without_network_from_the_cache(self, server, trained):
        server.repositories['me/shapes'] = trained.content
        path = local_file('hf://me/shapes')
        server.stop()
        assert local_file('hf://me/shapes') == path
        with pytest.raises(CheckpointError, match='cannot be reached from here, and the cache'):
            local_file('hf://me/others')

    def test_without_network_in_a_subfolder(self, server, trained, monkeypatch):
        snapshot = Path(constants.HF_HUB_CACHE, 'models--me--deep', 'snapshots', 'a' * 40)
        (snapshot / 'sub').mkdir(parents=True)
        (snapshot.parents[1] / 'refs').mkdir()
        (snapshot.parents[1] / 'refs' / 'main').write_text('a' * 40)
        (snapshot / 'sub' / 'x.pth').write_bytes(trained.files.pth.read_bytes())
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
        assert hub.fetch('hf://me/deep') == snapshot / 'sub' / 'x.pth'

    @pytest.mark.parametrize('address', ['hf://me/x', 'hf://me/x/a.pth'])
    def test_an_answer_that_is_a_no(self, server, monkeypatch, address):
        monkeypatch.setattr(server, 'answer', lambda *_: (403, {}, {}))
        with pytest.raises(CheckpointError, match='the Hugging Face Hub answers 403 Forbidden'):
            hub.fetch(address)

    @pytest.mark.parametrize(('files', 'address', 'message'), [
        ({'a.pth': b'1', 'b.pth': b'2'}, 'me/x', 'several weights: .* a.pth, b.pth'),
        ({'README.md': b''}, 'me/x', 'no weights .* among its files: README.md'),
        ({'a.pth': b''}, 'me/x/b.pth', 'the repository has no such file'),
        ({}, 'me/y', 'no such repository, or it is not open to who is not logged in: `hf auth'),
        ({}, 'me', 'is no address on the Hugging Face Hub'),
        ({}, 'me/x/../y.pth', 'is no address on the Hugging Face Hub'),
        ({'a-00000000.safetensors': b'1'}, 'me/x', 'is refused: .* states the hash of'),
    ])
    def test_what_there_is_not(self, server, files, address, message):
        server.repositories['me/x'] = files
        with pytest.raises(CheckpointError, match=message) as caught:
            local_file(f'hf://{address}')
        assert '\n' not in str(caught.value)

    def test_code_is_refused_as_in_any_file(self, server, tmp_path):
        torch.save(dict(meta={}, state_dict=dict(a=print)), tmp_path / 'evil.pth')
        server.repositories['me/evil'] = {'evil.pth': (tmp_path / 'evil.pth').read_bytes()}
        with pytest.raises(CheckpointError, match=r'reading it would run builtins\.print'):
            config_from('hf://me/evil')


class TestPushing:

    def test_the_command_and_back(self, server, trained, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv('HF_TOKEN', TOKEN)
        older = 'shapes-01234567.pth'
        server.repositories['me/shapes'] = {older: b'', 'other-01234567.pth': b''}
        assert cli.main(['publish', str(trained.files.pth), str(tmp_path / 'shapes'), '--push',
                         'me/shapes']) == 0
        assert '/me/shapes/commit/' in capsys.readouterr().out.splitlines()[-1]
        files = server.repositories['me/shapes']
        assert {*files} == {*trained.content, 'README.md', 'other-01234567.pth'}
        assert all(files[name] == content for name, content in trained.content.items())
        # What a person wrote there stays.
        files['README.md'] = b'mine'
        hub.push(trained.files, 'me/shapes', 'another')
        assert files['README.md'] == b'mine'
        address = f'hf://me/shapes/{trained.files.safetensors.name}'
        assert weights_equal(trained.model, get_model(trained.config, pretrained=address))

    def test_only_what_was_published_is_replaced(self, server, tmp_path, monkeypatch):
        monkeypatch.setenv('HF_TOKEN', TOKEN)
        new, older = 'di[gt]s*-0123abcd.pth', 'di[gt]s*-89abcdef.pth'
        kept = {f'di[gt]s*-{word}.pth' for word in ('finetune', '20251129', 'ABCDEF01')} | {
            'digs*-89abcdef.pth', 'di[gt]s*s-89abcdef.pth', 'di[gt]s*-89abcdef.pth.txt'}
        server.repositories['me/x'] = dict.fromkeys([older, *kept], b'')
        (tmp_path / new).write_bytes(b'new')
        hub.push([tmp_path / new], 'me/x', '')
        assert {*server.repositories['me/x']} == kept | {new, 'README.md'}

    def test_nobody_is_logged_in(self, server, trained, tmp_path, capsys):
        assert cli.main(['publish', str(trained.files.pth), str(tmp_path / 'new'), '--push',
                         'me/shapes']) == 2
        assert 'nobody is logged in to the Hugging Face Hub' in capsys.readouterr().err
        assert not [*tmp_path.glob('new*')] and not server.requests

    def test_no_repository(self):
        with pytest.raises(UsageError, match='shapes is no repository .* write ORG/NAME'):
            hub.check_repository('shapes')

    def test_a_token_of_somebody_else(self, server, trained, monkeypatch):
        monkeypatch.setenv('HF_TOKEN', 'hf_another')
        with pytest.raises(CheckpointError, match='me/shapes was not written: '):
            hub.push(trained.files, 'me/shapes', '')


class TestCard:

    def test_a_users_model(self, trained):
        card = model_card.make_card(trained.files.safetensors, 'me/shapes')
        assert 'pipeline_tag: image-classification' in card
        assert '2 classes: `square`, `disc`.' in card
        assert 'spartan-mm infer photos/ hf://me/shapes' in card
        assert "paper's figures" not in card

    def test_a_model_of_the_paper_with_other_classes(self, tmp_path):
        model = get_model('spartan_xt', num_classes=2)
        files = publish(model, tmp_path / 'pets', classes=('cat`s', 'dog\n# x'))
        card = model_card.make_card(files.safetensors, 'me/pets')
        assert 'of the architecture `spartan_xt`' in card
        assert '| Input Size | [256, 256] |' in card
        assert "Top 1 Accuracy 74.4 on ImageNet-1k. What these weights reach is not" in card
        assert '`cats`' in card and '\n# x' not in card
