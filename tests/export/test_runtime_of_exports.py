"""An exported file and the model that it was made of, from photographs to results."""
import json
from pathlib import Path

import pytest
import sklearn

from spartan_mm import runtime
from spartan_mm.inference import find_source, infer, load_model

PHOTOS = Path(sklearn.__file__).parent / 'datasets' / 'images'


@pytest.mark.parametrize('task', ['detector', 'classifier'])
def test_results_are_those_of_infer(exported, task, tmp_path):
    """Every pixel of the images is the same, so that results are, too."""
    given = exported(task)
    infer(load_model(str(given.config), str(given.checkpoint), 'cpu'),
          find_source(PHOTOS, tmp_path / 'torch'), tmp_path / 'torch')
    assert runtime.main([str(given.path), str(PHOTOS), '--out-dir', str(tmp_path / 'bare')]) == 0
    expected, found = (json.loads((tmp_path / name / 'results.json').read_text())
                       for name in ('torch', 'bare'))

    assert [*found] == [*expected] and found['classes'] == expected['classes']
    assert len(found['results']) == 2 and not found['failures']
    for ours, theirs in zip(found['results'], expected['results'], strict=True):
        records = ours.pop('detections' if task == 'detector' else 'predictions')
        others = theirs.pop('detections' if task == 'detector' else 'predictions')
        assert ours == theirs and records
        for one, other in zip(records, others, strict=True):
            assert one.pop('bbox', []) == pytest.approx(other.pop('bbox', []), abs=0.011)
            assert one == other | dict(score=pytest.approx(other['score'], abs=1e-3))
