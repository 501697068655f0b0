"""The commands, killed and in several processes, in forks that need no imports of their own."""

import json
import os
import signal
from pathlib import Path

import pytest
import soak

import spartan_mm.classification  # noqa: F401 - for the forks
import spartan_mm.detection  # noqa: F401
from spartan_mm.engine.claim import claim_work_dir

TOOLS = Path(__file__).resolve().parents[2] / 'tools'

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def trainings(tmp_path_factory):
    """Small trainings, of each task one that nobody interrupts."""
    trainings = soak.Soak(TOOLS / 'train.py', tmp_path_factory.mktemp('interruptions'), epochs=2)
    trainings.run_whole('detection')
    return trainings


def interrupt(trainings, name, prepare, task='detection', ranks=1):
    """Start or go on with a training in which something goes wrong."""
    command = trainings.train(task, trainings.root / name, prepare)
    command.ranks = ranks
    if ranks > 1:
        command.arguments += ['--cfg-options', 'train_dataloader.batch_size=2']
    command.start()
    return command.wait()


def find_differences(trainings, name, whole='detection_whole'):
    last, = sorted((trainings.root / whole).glob('epoch_*.pth'))[-1:]
    return soak.find_differences(last, trainings.root / name / last.name)


def terminate(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def test_killed_again_and_again(trainings):
    """While writing, by the cluster, with a full disk, and in the middle of the last iteration."""
    def fill_disk_and_die(rank):
        soak.at_write(1, soak.fill_disk)
        soak.at_iteration(8, soak.die)

    for prepare, status in (
            (lambda rank: soak.at_write(3, soak.die), -signal.SIGKILL),
            (lambda rank: soak.at_iteration(5, terminate), 128 + signal.SIGTERM),
            (fill_disk_and_die, -signal.SIGKILL)):
        outcome, = interrupt(trainings, 'killed', prepare)
        assert outcome.status == status, outcome.output
    outcome, = interrupt(trainings, 'killed', None)
    assert outcome.status == 0, outcome.output
    assert find_differences(trainings, 'killed') == []
    output = (trainings.root / 'killed' / 'output.log').read_text()
    assert 'SIGTERM received, saved after iteration 5; go on with --resume' in output
    assert 'cannot be written' in output and 'No space left on device' in output
    assert not list((trainings.root / 'killed').glob('.*'))

    # Without --resume it starts from the beginning.
    command = trainings.train('detection', trainings.root / 'killed',
                              lambda rank: soak.at_iteration(1, soak.die))
    command.arguments.remove('--resume')
    assert command.run().status == -signal.SIGKILL


def test_all_processes_leave_if_one_is_told_to(trainings):
    whole = interrupt(trainings, 'whole_of_two', None, 'classification', ranks=2)
    assert [outcome.status for outcome in whole] == [0, 0], whole[0].output

    # One hears it in an iteration, and all know of it after the next.
    outcomes = interrupt(
        trainings, 'two', lambda rank: rank == 1 and soak.at_iteration(4, terminate),
        'classification', ranks=2)
    assert [outcome.status for outcome in outcomes] == [128 + signal.SIGTERM] * 2
    assert 'saved after iteration 5' in outcomes[0].output
    outcomes = interrupt(trainings, 'two', None, 'classification', ranks=2)
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].output
    assert find_differences(trainings, 'two', 'whole_of_two') == []


def test_all_processes_leave_if_one_fails(trainings):
    def fail():
        raise RuntimeError('this batch is spoilt')

    outcomes = interrupt(
        trainings, 'failed', lambda rank: rank == 1 and soak.at_iteration(2, fail),
        'classification', ranks=2)
    assert [outcome.status for outcome in outcomes] == [1, 1]
    assert ('error: process 1 of 2 failed: RuntimeError: this batch is spoilt'
            in outcomes[0].output.splitlines())


def test_all_processes_refuse_a_work_dir_in_use(trainings):
    with claim_work_dir(trainings.root / 'claimed'):
        outcomes = interrupt(trainings, 'claimed', None, 'classification', ranks=2)
    assert [outcome.status for outcome in outcomes] == [1, 1]
    assert all('error: another training is running in ' in outcome.output for outcome in outcomes)
    # Nothing else was written.
    assert set(os.listdir(trainings.root / 'claimed')) == {'training.lock', 'output.log'}


@pytest.mark.parametrize('task', ['detection', 'classification'])
def test_an_evaluation_does_not_depend_on_processes_and_batches(trainings, task):
    if task == 'classification':
        trainings.run_whole(task)
    work_dir = trainings.root / f'{task}_whole'
    checkpoint = sorted(work_dir.glob('epoch_*.pth'))[-1]
    found = []
    for ranks, batch in ((1, 4), (1, 1), (2, 3)):
        folder = trainings.root / f'test_{task}_{ranks}_{batch}'
        command = soak.Command(TOOLS / 'test.py', [
            str(trainings.configs[task]), str(checkpoint), '--work-dir', str(folder),
            '--cfg-options', f'test_dataloader.batch_size={batch}'], folder / 'output.log', ranks)
        command.start()
        outcomes = command.wait()
        assert [outcome.status for outcome in outcomes] == [0] * ranks, outcomes[0].output
        # mmengine's own lets each process write the file of the metrics.
        assert 'OneWriterLoggerHook' in outcomes[0].output
        metrics, = folder.glob('*/*.json')
        found.append({name: value for name, value in json.loads(metrics.read_text()).items()
                      if 'time' not in name})
    print(f'{task}: {found[0]}')
    assert found[0] == found[1] == found[2]
