"""A pipeline is measured on the data that is there, or on pictures made up in its place."""

import pytest

from spartan_mm.analysis.input_speed import input_table, measure_input
from spartan_mm.errors import UsageError

SHORT = dict(seconds=0.1, num_images=4)


@pytest.mark.parametrize('name, own, pictures', [
    ('rtdetr_spartan_t', {'3 RandomPhotometricDistort', '5 RandomIoUCrop', '8 AntialiasedResize'},
     'made up'),
    ('spartan_t_224', {'2 TorchvisionTransforms: RandAugment'}, 'made up'),
    ('user_classifier.py', {'2 Resize'}, 'classes'),
])
def test_one_process(user_project, monkeypatch, name, own, pictures):
    monkeypatch.chdir(user_project)
    measured = measure_input(name, workers=0, **SHORT)
    assert measured['data'] == pictures
    assert own < measured['parts'].keys()
    assert 0 < sum(measured['parts'].values()) <= measured['seconds']
    table = input_table([measured])
    assert f'| {pictures} |' in table and f'| {min(own)} |' in table


def test_workers(user_project, monkeypatch):
    monkeypatch.chdir(user_project)
    measured = measure_input('user_detector.py', workers=1, **SHORT)
    assert measured['batch'] == 2 and measured['rate'] > 0


def test_mistakes(tmp_path):
    with pytest.raises(UsageError, match='has no train_dataloader'):
        measure_input('xt')
    with pytest.raises(UsageError, match='-1 workers: must be at least 0'):
        measure_input('spartan_t_224', workers=-1)
