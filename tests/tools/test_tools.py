"""The commands, run as a user runs them: from the user's folder, on the user's config."""

import os
import pickle
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

from spartan_mm.cli import main

TOOLS = Path(__file__).resolve().parents[2] / 'tools'


def run(command, cwd):
    """Run a command in processes of its own, without a GPU; return what it printed."""
    environment = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='',
                       PYTHON=sys.executable)
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(autouse=True)
def in_project(user_project, monkeypatch):
    monkeypatch.chdir(user_project)


@pytest.fixture(scope='module')
def trained(user_project):
    """Two epochs of the user's detector."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(user_project)
        assert main(['train', 'user_detector.py', '--seed', '1', '--auto-scale-lr',
                     '--cfg-options', 'optim_wrapper.optimizer.lr=0.05']) == 0
    return user_project / 'work_dirs' / 'user_detector'


def best_scores(path):
    """The best score of each picture in a file of predictions."""
    return [float(item['pred_instances']['scores'][0])
            for item in sorted(pickle.loads(path.read_bytes()), key=lambda item: item['img_path'])]


@pytest.fixture(scope='module')
def averaged_scores(trained, user_project):
    """The best score of each picture by the moving average; the trained weights give others."""
    from spartan_mm.inference import Detector
    checkpoint = torch.load(trained / 'epoch_2.pth', weights_only=False)
    checkpoint['state_dict'] = {name.removeprefix('module.'): value
                                for name, value in checkpoint.pop('ema_state_dict').items()
                                if name != 'steps'}
    torch.save(checkpoint, user_project / 'trained.pth')
    pictures = sorted((user_project / 'pictures').glob('*.png'))
    averaged, last = (
        [float(found.scores[0]) for found in detector.detect([detector.read(p) for p in pictures])]
        for detector in (Detector(user_project / 'user_detector.py', file)
                         for file in (trained / 'epoch_2.pth', user_project / 'trained.pth')))
    assert averaged != pytest.approx(last, abs=1e-5)
    return averaged


class TestTrainAndTest:

    def test_training_leaves_checkpoints_in_the_default_folder(self, trained):
        assert {'epoch_1.pth', 'epoch_2.pth', 'user_detector.py'} <= set(os.listdir(trained))
        log, = trained.glob('*/*.log')
        output = log.read_text()
        assert 'LR is set based on batch size of 4 and the current batch size is 2' in output
        assert 'seed: 1' in output

    def test_resume(self, trained, run_here):
        output = run_here('train', 'user_detector.py', '--resume', '--cfg-options',
                          'train_cfg.max_epochs=3')
        assert 'resumed epoch: 2, iter: 4' in output
        assert (trained / 'epoch_3.pth').exists()

    def test_evaluation_of_averaged_weights(self, trained, averaged_scores, user_project,
                                            run_here):
        """What is tested is the moving average."""
        output = run_here('test', 'user_detector.py', trained / 'epoch_2.pth', '--out',
                          'predictions.pkl', '--show-dir', 'shown')
        assert 'bbox_mAP_copypaste' in output
        assert best_scores(user_project / 'predictions.pkl') == pytest.approx(averaged_scores,
                                                                              abs=1e-6)
        predictions = pickle.loads((user_project / 'predictions.pkl').read_bytes())
        assert len(predictions) == 4
        assert len(list(trained.glob('*/shown/*.png'))) == 4

    @pytest.mark.parametrize('form', ['prefixed', 'bare'])
    def test_other_forms_of_a_checkpoint(self, trained, averaged_scores, user_project, run_here,
                                         form):
        """A name's prefix, or a file without meta data, must not leave random weights."""
        weights = torch.load(trained / 'epoch_2.pth', weights_only=False)['state_dict']
        torch.save(weights if form == 'bare' else
                   dict(state_dict={f'module.{name}': value for name, value in weights.items()}),
                   user_project / f'{form}.pth')
        run_here('test', 'user_detector.py', f'{form}.pth', '--out', f'{form}.pkl')
        assert best_scores(user_project / f'{form}.pkl') == pytest.approx(averaged_scores, abs=1e-6)

    @pytest.mark.parametrize('words', [['test'], ['train', '--resume']], ids=' '.join)
    def test_checkpoint_of_another_architecture(self, trained, fail_here, words):
        command, *flags = words
        said, status = fail_here(
            command, 'user_detector.py', *flags, trained / 'epoch_2.pth', '--cfg-options',
            'model.decoder.num_layers=1', 'train_cfg.max_epochs=3')
        assert f'error: checkpoint {trained / "epoch_2.pth"} does not fit' in said and status == 1
        assert 'keys are unknown to the model (' in said

    def test_classifier(self, user_project, run_here):
        output = run_here('train', 'user_classifier.py', '--work-dir', 'classified')
        assert 'accuracy/top1' in output
        assert (user_project / 'classified' / 'epoch_1.pth').exists()

    @pytest.mark.parametrize('word, files', [
        ('train', []), ('test', ['a.pth']), ('deploy', ['a.pth', 'b.pth'])])
    def test_no_such_config(self, fail_here, word, files):
        said, status = fail_here(word, 'none.py', *files)
        assert said == ("error: config none.py does not exist, and there is no model 'none.py'; "
                        'see spartan_mm.list_models()' + (
                            '; there is no folder of data of this name, either'
                            if word == 'train' else '')) and status == 2

    @pytest.mark.parametrize('word, arguments, message', [
        ('train', ['user_detector.py', '--resume', 'none.pth'],
         'error: checkpoint none.pth does not exist'),
        ('test', ['user_detector.py', 'none.pth'], 'error: checkpoint none.pth does not exist'),
        ('infer', ['none.jpg', 'user_detector.py', 'none.pth'],
         'error: input none.jpg does not exist'),
    ])
    def test_mistakes(self, fail_here, word, arguments, message):
        assert fail_here(word, *arguments) == (message, 1)

    @pytest.mark.parametrize('words, message', [
        (['train', 'user_detector.py', '--save-every', '0'],
         'error: --save-every 0: must be at least 1'),
        (['test', 'user_detector.py', 'none.pth', '--out', 'predictions.json'],
         'predictions.json: the name must end in .pkl or .pickle'),
        (['infer', 'pictures', 'user_detector.py', 'none.pth', '--score-thr', '1.5'],
         '1.5 must be a number from 0 to 1'),
        (['infer', 'pictures', 'user_detector.py', 'none.pth', '--batch-size', '0'],
         '--batch-size: 0 must be a whole number, at least 1'),
        (['infer', 'pictures', 'user_detector.py', 'none.pth', '--device', 'cuda:99'],
         "error: device 'cuda:99': torch finds"),
    ])
    def test_wrong_flags(self, fail_here, words, message):
        said, status = fail_here(*words)
        assert message in said and status == 2


class TestBeforeTheFirstIteration:

    @pytest.mark.parametrize('task, options, message', [
        ('detector', ['train_dataloader.batch_size=16', 'train_dataloader.drop_last=True'],
         'train_dataloader gives no batch: it has 4 images, too few for one of batch_size=16, and '
         'drop_last=True leaves out what is no whole batch; set train_dataloader.batch_size lower'),
        ('detector', ['train_dataloader.batch_size=16', 'train_dataloader.drop_last=True',
                      'train_cfg._delete_=True', 'train_cfg.by_epoch=False',
                      'train_cfg.max_iters=2'], 'train_dataloader gives no batch: it has 4 images'),
        ('detector', ['train_dataloader.batch_size=5', 'train_dataloader.drop_last=True',
                      'train_dataloader.batch_sampler.type=AspectRatioBatchSampler'],
         'too few for one of batch_size=5'),
        ('classifier', ['val_dataloader.batch_size=16', 'val_dataloader.drop_last=True'],
         'val_dataloader gives no batch: '),
        ('detector', ['train_dataloader.dataset.indices=0'], 'train_dataloader has no images: '),
        ('detector', ['val_dataloader.dataset.filter_cfg.min_size=999',
                      'val_dataloader.dataset.test_mode=False'],
         "no image is left after filter_cfg={'min_size': 999}"),
    ])
    def test_no_batch(self, fail_here, tmp_path, task, options, message):
        said, status = fail_here('train', f'user_{task}.py', '--work-dir', tmp_path,
                                 '--cfg-options', *options)
        assert said.startswith('error: ') and message in said and status == 1
        assert not list(tmp_path.glob('*.pth'))

    def test_no_batch_in_a_test(self, trained, fail_here):
        said, status = fail_here('test', 'user_detector.py', trained / 'epoch_2.pth',
                                 '--cfg-options', 'test_dataloader.batch_size=9',
                                 'test_dataloader.drop_last=True')
        assert said.startswith('error: test_dataloader gives no batch: ') and status == 1

    def test_loaders_without_workers_and_with_a_batch_sampler(self, run_here, tmp_path):
        """What torch and mmengine refuse to see together."""
        settings = ['train_dataloader.persistent_workers=True', 'train_dataloader.drop_last=True',
                    'train_dataloader.batch_sampler.type=AspectRatioBatchSampler',
                    'val_dataloader.prefetch_factor=2', 'test_dataloader.persistent_workers=True']
        run_here('train', 'user_detector.py', '--work-dir', tmp_path, '--cfg-options', *settings,
                 'train_cfg.max_epochs=1')
        run_here('test', 'user_detector.py', tmp_path / 'epoch_1.pth', '--work-dir', tmp_path,
                 '--cfg-options', *settings)
        run_here('check-data', 'user_detector.py', '--out', tmp_path / 'out', '--cfg-options',
                 *settings)

    @pytest.mark.parametrize('words, message', [
        (['train', 'user_detector.py', '--work-dir', 'pictures/0.png'],
         'pictures/0.png is a file, not a folder; name another place'),
        (['test', 'user_detector.py', 'user_detector.py', '--work-dir', 'pictures/0.png/deeper'],
         'pictures/0.png is a file, not a folder; name another place'),
        (['test', 'user_detector.py', 'user_detector.py', '--out', 'pictures/0.png/a.pkl'],
         'a.pkl cannot be written: '),
        (['train', 'user_detector.py', '--work-dir', 'out_dir', '--cfg-options',
          'default_hooks.checkpoint.type=CheckpointHook',
          'default_hooks.checkpoint.out_dir=pictures/0.png'], '0.png is a file, not a folder'),
    ])
    def test_a_file_in_the_way(self, fail_here, words, message):
        said, status = fail_here(*words)
        assert said.startswith('error: ') and message in said and status == 1

    @pytest.mark.parametrize('options, message', [
        (['optimizer.lr=0.1'], 'nobody reads optimizer='),
        (['train_cfg.max_epochs=0'], 'train_cfg.max_epochs=0 must be'),
        (['val_cfg=None'], 'has no val_cfg: '),
        (['pipeline.9.x=3'], '--cfg-options do not fit user_detector.py: '),
    ])
    def test_settings(self, fail_here, options, message):
        said, status = fail_here('train', 'user_detector.py', '--cfg-options', *options)
        assert said.startswith('error: ') and message in said and status == 2

    @pytest.mark.parametrize('option, message', [
        ('custom_hooks.0.type=EMAHookk', 'EMAHookk is not in the mmdet::hook registry'),
        ('model.neck.width=3', "unexpected keyword argument 'width'"),
    ])
    def test_what_cannot_be_built(self, fail_here, tmp_path, option, message):
        said, status = fail_here('train', 'user_detector.py', '--work-dir', tmp_path,
                                 '--cfg-options', option)
        assert said.startswith('error: what the config says cannot be built: ') and status == 1
        assert message in said

    def test_a_broken_import_shows_where_it_comes_from(self, tmp_path, monkeypatch):
        (tmp_path / 'broken_part.py').write_text('import not_there_at_all')
        (tmp_path / 'own.py').write_text("custom_imports = dict(imports=['broken_part'])")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ImportError) as error:
            main(['train', str(tmp_path / 'own.py')])
        assert 'not_there_at_all' in ''.join(traceback.format_exception(error.value))

    def test_nothing_left_to_do(self, trained, run_here):
        output = run_here('train', 'user_detector.py', '--resume', trained / 'epoch_2.pth')
        assert ('nothing is left to do: epoch 2 of 2 is done; to go on, set train_cfg.max_epochs '
                'higher') in output


class TestInfer:

    def test_no_place(self, fail_here):
        said, status = fail_here('infer', 'pictures', 'user_detector.py', 'none.pth', '--out-dir',
                                 'user_detector.py')
        assert 'results.json cannot be written: ' in said and 'is a file' in said and status == 1

    def test_folder(self, trained, user_project, run_here, tmp_path):
        output = run_here('infer', 'pictures', 'user_detector.py', trained / 'epoch_2.pth',
                          '--out-dir', tmp_path, '--score-thr', 0, '--batch-size', 3)
        assert '80 detections in 4 images' in output
        assert {path.name for path in tmp_path.iterdir()} == {
            '0.png', '1.png', '2.png', '3.png', 'results.json'}

    def test_broken_picture(self, trained, run_here, tmp_path):
        (tmp_path / 'broken.jpg').write_text('no picture')
        output = run_here('infer', tmp_path, 'user_detector.py', trained / 'epoch_2.pth',
                          '--out-dir', tmp_path / 'out', status=1)
        assert (f'error: {tmp_path}/broken.jpg cannot be decoded as an image: it is of no known '
                'image format, or damaged\n') in output


class TestDistributed:

    @pytest.mark.slow
    def test_two_processes_without_gpu(self, trained, averaged_scores, user_project):
        output = run(['bash', TOOLS / 'dist_test.sh', 'user_detector.py', trained / 'epoch_2.pth',
                      2, '--out', 'two.pkl'], cwd=user_project)
        assert 'GPU number: 2' in output
        assert 'sync_bn is ignored' in output
        assert best_scores(user_project / 'two.pkl') == pytest.approx(averaged_scores, abs=1e-6)

    @pytest.fixture
    def recorder(self, tmp_path):
        """A program that prints its arguments, one a line."""
        path = tmp_path / 'recorder'
        path.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
        path.chmod(0o755)
        return path

    def dry_run(self, recorder, script, *arguments, **variables):
        environment = dict(os.environ, PYTHON=str(recorder), **variables)
        done = subprocess.run(['bash', TOOLS / script, *arguments], env=environment, text=True,
                              capture_output=True, check=True)
        return done.stdout.splitlines()

    def test_one_node(self, recorder):
        words = self.dry_run(recorder, 'dist_train.sh', 'a config.py', '4', '--amp', 'bfloat16')
        assert words == ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '4',
                         f'{TOOLS}/train.py', 'a config.py', '--amp', 'bfloat16', '--launcher',
                         'pytorch']

    def test_one_node_with_port(self, recorder):
        words = self.dry_run(recorder, 'dist_test.sh', 'config.py', 'a.pth', '4', PORT='12345')
        assert words == ['-m', 'torch.distributed.run', '--nnodes', '1', '--node_rank', '0',
                         '--master_addr', '127.0.0.1', '--master_port', '12345', '--nproc_per_node',
                         '4', f'{TOOLS}/test.py', 'config.py', 'a.pth', '--launcher', 'pytorch']

    def test_several_nodes(self, recorder):
        words = self.dry_run(recorder, 'dist_train.sh', 'config.py', '8', NNODES='2', NODE_RANK='1',
                             MASTER_ADDR='10.0.0.1')
        assert words[2:10] == ['--nnodes', '2', '--node_rank', '1', '--master_addr', '10.0.0.1',
                               '--master_port', '29500']

    @pytest.mark.parametrize('arguments, variables, message', [
        (['config.py'], {}, 'usage: '),
        (['config.py', 'four'], {}, "positive number, not 'four'"),
        (['config.py', '0'], {}, "positive number, not '0'"),
        (['config.py', '8'], dict(NNODES='2'), 'NNODES=2 needs MASTER_ADDR'),
    ])
    def test_mistakes(self, recorder, arguments, variables, message):
        environment = dict(os.environ, PYTHON=str(recorder), **variables)
        done = subprocess.run(['bash', TOOLS / 'dist_train.sh', *arguments], env=environment,
                              text=True, capture_output=True)
        assert done.returncode == 2
        assert message in done.stderr

    @pytest.fixture
    def slurm(self, tmp_path):
        """A cluster of programs: srun notes its options and runs the command as the last node."""
        (tmp_path / 'srun').write_text(
            '#!/usr/bin/env bash\n'
            'while [[ "$1" == -* ]]; do echo "srun $1"; shift; done\n'
            'SLURM_NODEID=$((NNODES - 1)) SLURM_JOB_NODELIST=node[1-2] "$@"\n')
        (tmp_path / 'scontrol').write_text('#!/usr/bin/env bash\nprintf "node1\\nnode2\\n"\n')
        for name in ('srun', 'scontrol'):
            (tmp_path / name).chmod(0o755)
        return dict(PATH=f'{tmp_path}:{os.environ["PATH"]}')

    def test_slurm_train(self, recorder, slurm):
        words = self.dry_run(recorder, 'slurm_train.sh', 'part', 'job', 'config.py', 'a work dir',
                             '--resume', GPUS='16', SRUN_ARGS='--qos=high --mem=0', **slurm)
        assert words == [
            'srun --partition=part', 'srun --job-name=job', 'srun --nodes=2', 'srun --ntasks=2',
            'srun --ntasks-per-node=1', 'srun --gres=gpu:8', 'srun --cpus-per-task=40',
            'srun --kill-on-bad-exit=1', 'srun --qos=high', 'srun --mem=0',
            '-m', 'torch.distributed.run', '--nnodes', '2', '--node_rank', '1', '--master_addr',
            'node1', '--master_port', '29500', '--nproc_per_node', '8', f'{TOOLS}/train.py',
            'config.py', '--work-dir', 'a work dir', '--resume', '--launcher', 'pytorch']

    def test_slurm_test(self, recorder, slurm):
        words = self.dry_run(recorder, 'slurm_test.sh', 'part', 'job', 'config.py', 'a.pth',
                             GPUS='2', CPUS_PER_TASK='3', **slurm)
        assert 'srun --nodes=1' in words and 'srun --cpus-per-task=6' in words
        assert words[8:] == ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
                             f'{TOOLS}/test.py', 'config.py', 'a.pth', '--launcher', 'pytorch']


@pytest.mark.slow
def test_commands_work_from_a_checkout_that_is_not_installed():
    """The interpreter is told to forget what is installed in editable mode."""
    code = ('import runpy, sys\n'
            'sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]\n'
            'sys.argv = ["spartan-mm", "train", "--help"]\n'
            'runpy.run_module("spartan_mm.cli", run_name="__main__")\n')
    output = run([sys.executable, '-c', code], cwd=TOOLS.parent)
    assert output.startswith('usage: spartan-mm train')
