import runpy
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from spartan_mm.backbones import SpaRTAN
from spartan_mm.engine.initialize import ConvertedPretrained
from spartan_mm.engine.reading import CheckpointError, local_file

GOLDEN = Path(__file__).parents[1] / 'data' / 'golden'


@pytest.fixture
def released(tmp_path):
    """A file as the authors write it, their config object included, and the converted backbone."""
    import json

    from spartan_mm.converters.spartan import convert_spartan
    manifest = json.loads((GOLDEN / 'spartan_small.json').read_text())
    fill = runpy.run_path(str(GOLDEN / 'fill.py'))['fill_state_dict']
    weights = {name: torch.from_numpy(value) for name, value in fill(manifest['shapes']).items()}
    module = types.ModuleType('their_config')
    module.Settings = type('Settings', (), dict(__module__='their_config'))
    sys.modules['their_config'] = module
    torch.save(dict(model=weights, config=module.Settings()), tmp_path / 'released.pth')
    del sys.modules['their_config']
    converted, arch = convert_spartan(weights)
    return tmp_path / 'released.pth', arch, {
        name.removeprefix('backbone.'): value for name, value in converted.items()
        if name.startswith('backbone.')}


def test_released_classifier_loads_without_the_packages_it_was_written_with(released):
    path, arch, expected = released
    backbone = SpaRTAN(arch, init_cfg=dict(
        type='ConvertedPretrained', converter='spartan', checkpoint=str(path)))
    backbone.init_weights()
    assert_close(dict(backbone.state_dict()), expected, rtol=0, atol=0)


def test_other_architecture_names_the_file(released):
    path, *_ = released
    with pytest.raises(CheckpointError, match=r'released\.pth does not fit SpaRTAN'):
        ConvertedPretrained(str(path), 'spartan')(SpaRTAN('xt'))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'none\.pth, which init_cfg names, does not exist; '
                                                'point to yours'):
        ConvertedPretrained(str(tmp_path / 'none.pth'), 'spartan')(SpaRTAN('xt'))


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / 'text.pth').write_text('no weights')
    with pytest.raises(CheckpointError, match=r'text\.pth cannot be read as a checkpoint'):
        ConvertedPretrained(str(tmp_path / 'text.pth'), 'spartan')(SpaRTAN('xt'))


def test_unknown_converter():
    with pytest.raises(ValueError, match="converter='timm' is unknown; choose one of"):
        ConvertedPretrained('a.pth', 'timm')


def test_url_is_downloaded_once(tmp_path, monkeypatch):
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


def test_a_download_that_fails(tmp_path, monkeypatch):
    def download(*_, **__):
        raise OSError('no network')

    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    with pytest.raises(CheckpointError, match='org/vd.pth cannot be downloaded: no network'):
        local_file('https://example.org/vd.pth')
