"""Trainings in TensorBoard and MLflow, read back from what was written."""

import sys
from pathlib import Path

import pytest
import soak
from mmengine.config import Config
from mmengine.registry import VISBACKENDS

from spartan_mm.engine.loggers import LOGGERS, require_loggers
from spartan_mm.errors import ExplainedError, UsageError

TRAIN = Path(__file__).resolve().parents[2] / 'tools' / 'train.py'


@pytest.mark.parametrize('logger', LOGGERS.values(), ids=LOGGERS)
def test_backends_exist(logger, tmp_path):
    VISBACKENDS.build(dict(type=logger.backend, save_dir=str(tmp_path)))


@pytest.mark.parametrize('name, words', [
    ('mlflow', r"spartan_mm\[loggers\]"), ('tensorboard', r"spartan_mm\[loggers\]"),
    ('wandb', '`pip install wandb`'), ('tensorbored', 'one of tensorboard, mlflow')])
def test_what_is_missing_is_said_in_a_sentence(name, words, monkeypatch):
    for module in list(sys.modules):
        if module.partition('.')[0] in ('mlflow', 'tensorboard'):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, 'path', [])
    monkeypatch.setattr(sys, 'path_importer_cache', {})
    with pytest.raises(ExplainedError, match=words) as error:
        require_loggers([name])
    assert '\n' not in str(error.value)


@pytest.mark.slow
def test_a_server_that_is_not_there_ends_it_in_a_line(monkeypatch, tmp_path):
    monkeypatch.setenv('MLFLOW_TRACKING_URI', 'http://127.0.0.1:9')
    monkeypatch.setenv('MLFLOW_HTTP_REQUEST_MAX_RETRIES', '0')
    backend = VISBACKENDS.build(dict(type='ResumableMLflowVisBackend', save_dir=str(tmp_path)))
    with pytest.raises(UsageError, match='no run at http://127.0.0.1:9: ') as error:
        backend.add_config(Config())
    assert '\n' not in str(error.value)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """Train twice, once with loggers and an interruption; return the folders."""
    root = tmp_path_factory.mktemp('loggers')
    trainings = soak.Soak(TRAIN, root, epochs=2)
    trainings.run_whole('detection')
    folder = root / 'logged run'
    for prepare in (lambda rank: soak.at_iteration(6, soak.die), None):
        command = trainings.train('detection', folder, prepare)
        command.arguments += ['--logger', 'tensorboard', 'mlflow']
        outcome = command.run()
    assert outcome.status == 0, outcome.output
    return folder, root / 'detection_whole'


@pytest.mark.slow
class TestRun:

    def test_training_is_the_same_as_without(self, run):
        assert soak.find_differences(*(folder / 'epoch_2.pth' for folder in run)) == []
        # The config stays as it is, or else tests of it would be logged, too.
        config, = run[0].glob('*.py')
        assert 'mlflow' not in config.read_text().lower()

    def test_tensorboard(self, run):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        events = EventAccumulator(str(run[0] / 'tensorboard'), {'images': 0})
        events.Reload()
        tags = events.Tags()
        assert {'loss', 'lr', 'coco/bbox_mAP'} <= set(tags['scalars'])
        assert {event.step for event in events.Scalars('loss')} == {*range(1, 9)}
        assert [event.step for event in events.Scalars('coco/bbox_mAP')] == [1, 2]
        assert sorted(tags['images']) == [f'prediction_{number}' for number in range(1, 5)]
        assert [event.step for event in events.Images('prediction_4')] == [1, 2]
        assert 'config/text_summary' in tags['tensors']

    def test_mlflow(self, run, monkeypatch):
        import mlflow
        monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')
        client = mlflow.MlflowClient((run[0] / 'mlflow').as_uri())
        experiment = client.get_experiment_by_name('spartan-mm')
        # One run, as it was resumed.
        found, = client.search_runs([experiment.experiment_id])
        assert (found.info.run_name, found.info.status) == ('logged run', 'FINISHED')
        assert found.data.params['optim_wrapper.optimizer.lr'] == '0.001'
        assert [metric.step for metric in client.get_metric_history(
            found.info.run_id, 'coco/bbox_mAP')] == [1, 2]
        assert {metric.step for metric in client.get_metric_history(
            found.info.run_id, 'loss')} == {*range(1, 9)}
        files = [file.path for folder in ('', 'pictures')
                 for file in client.list_artifacts(found.info.run_id, folder)]
        assert sorted(files) == ['config.py', 'pictures', *(
            f'pictures/prediction_{number}_{epoch}.png' for number in range(1, 5)
            for epoch in (1, 2))]
