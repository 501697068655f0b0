"""An exported file and the model that it was made of, from photographs to results."""
import shutil
from pathlib import Path

import numpy as np
import pytest
import sklearn
from mmengine.config import Config

from spartan_mm.export.metadata import as_properties
from spartan_mm.export.onnx import set_metadata
from spartan_mm.export.preprocessing import describe_resize
from spartan_mm.inference import load_model
from spartan_mm.runtime import Runtime

PHOTOS = sorted((Path(sklearn.__file__).parent / 'datasets' / 'images').glob('*.jpg'))


@pytest.mark.parametrize('task', ['detector', 'classifier'])
def test_results_are_those_of_torch(exported, task, tmp_path):
    """Where Pillow resizes, every pixel is the same."""
    given = exported(task)
    cfg = Config.fromfile(given.config)
    for step in cfg.test_dataloader.dataset.pipeline:
        if step['type'] == 'Resize':
            step['backend'] = 'pillow'
    path = shutil.copy(given.path, tmp_path)
    set_metadata(path, as_properties(dict(resize=describe_resize(cfg))))
    runtime, model = Runtime(path), load_model(cfg, str(given.checkpoint), 'cpu')

    assert len(PHOTOS) == 2 and list(runtime.classes) == list(model.classes)
    found = runtime(PHOTOS, batch_size=2)
    expected = model.detect(PHOTOS) if task == 'detector' else model.classify(PHOTOS)
    for ours, theirs in zip(found, expected, strict=True):
        for field in vars(theirs):
            np.testing.assert_allclose(getattr(ours, field), getattr(theirs, field), atol=1e-3)
