"""The metafiles say what the models are, and the READMEs say what the metafiles say."""

import copy
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from readme_tables import (
    find_wrong_counts,
    insert_tables,
    make_texts,
    write_counts,
)

from spartan_mm import zoo
from spartan_mm.analysis.models import build_without_weights

ROOT = Path(__file__).parents[2]
TOOL = ROOT / 'tools' / 'dev' / 'readme_tables.py'
REMEDY = 'run tools/dev/readme_tables.py'
# Those that are counted: a pre-training predicts nothing.
NAMES = [name for name in zoo.list_models() if zoo.task_of(name) != 'pretraining']
FOLDERS = dict.fromkeys(zoo.TASKS.values())
# All numbers of these are counted, of the others the parameters.
COUNTED = [*(name for name in zoo.list_models(task='detection')
             if Path(zoo.config_path(name)).parent.name != 'neighbours'),
           'spartan_xt_224', 'spartan_xt', 'spartan_t_224', 'spartan_t', 'table7_ln_bn',
           'spartan_xt_digits', 'moganet_xt']


@pytest.fixture
def models():
    """Entries of the metafiles that a test may change."""
    return {name: copy.deepcopy(zoo.read_metafiles()[name]) for name in NAMES}


# ---- counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', [name for name in NAMES if name not in COUNTED])
def test_parameters(name):
    """Of the ablations; the tool's --check counts the operations of these, too."""
    model = build_without_weights(zoo.get_config(name))
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert zoo.read_metafiles()[name]['Metadata']['Parameters'] == counted


@pytest.mark.slow
@pytest.mark.parametrize('name', COUNTED)
def test_counts(name, models):
    if name == 'rtdetr_timm':
        pytest.importorskip('timm', reason='needs timm')
    assert find_wrong_counts({name: models[name]}) == []


def test_wrong_counts_are_found(models):
    model = models['rtdetr_spartan_xt_digits']
    keys = ['Parameters', 'Multiply-Adds', 'FLOPs', 'Parameters (deploy)', 'Multiply-Adds (deploy)',
            'FLOPs (deploy)']
    for key in keys:
        model['Metadata'][key] += 1
    problems = find_wrong_counts({'rtdetr_spartan_xt_digits': model})
    assert [re.match(r'rtdetr_spartan_xt_digits: (.*) is \d+ in', problem)[1]
            for problem in problems] == keys


def test_counts_are_written():
    text = 'Models:\n  - Name: a\n    FLOPs: 1  \n  - Name: b\n    Metadata:\n      FLOPs: 1\n'
    assert write_counts(text, dict(b=dict(FLOPs=2))) == text[:-2] + '2\n'


def test_two_flops_for_a_multiply_add(models):
    for model in models.values():
        said = model['Metadata']
        for form in ('', ' (deploy)'):
            if f'FLOPs{form}' in said or not form:
                assert said[f'FLOPs{form}'] == 2 * said[f'Multiply-Adds{form}']


@pytest.mark.parametrize('name', NAMES)
def test_size_and_epochs_are_the_configs(name, models):
    config, said = zoo.get_config(name), models[name]['Metadata']
    assert said['Epochs'] == config.train_cfg.max_epochs
    steps = [inner for step in config.test_dataloader.dataset.pipeline
             for inner in step.get('transforms', [step])]
    size = [step.get('scale') or step.get('size') for step in steps
            if step['type'].endswith(('Resize', 'CenterCrop'))][-1]
    width, height = (size, size) if isinstance(size, int) else size
    # mmdet pads RetinaNet's input to a multiple of 32.
    divisor = config.model.data_preprocessor.get('pad_size_divisor', 1)
    assert said['Input Size'] == [-(-side // divisor) * divisor for side in (height, width)]


# ---- results -------------------------------------------------------------------------------------


def test_results_say_where_they_come_from(models):
    for name, model in models.items():
        for result in model.get('Results', []):
            assert result['Source'] in ('paper', 'converted', 'measured here'), name
            measured = {'Command', 'Machine', 'Precision', 'Batch', 'Version', 'Date'}
            assert set(result.get('Measured', ())) == (
                set() if result['Source'] == 'paper' else measured), name


def test_the_papers_figure_is_the_one_in_the_config(models):
    for name, model in models.items():
        for result in model.get('Results', []):
            if result['Source'] == 'paper':
                top1, ap = (result['Metrics'].get(key) for key in ('Top 1 Accuracy', 'box AP'))
                quoted = f'{top1} % top-1 (paper' if top1 else f'{ap} AP (paper'
                assert quoted in Path(zoo.config_path(name)).read_text(encoding='utf-8'), name


def test_sizes_agree_with_the_papers(models):
    """Within 3 %, but for what the READMEs name."""
    beyond = set()
    for name, model in models.items():
        said = model['Metadata']
        pairs = {'Parameters (M)': said.get('Parameters (deploy)', said['Parameters']) / 1e6,
                 'MACs (M)': said['Multiply-Adds'] / 1e6,
                 'FLOPs (G)': said.get('Multiply-Adds with Norms and Pools', said['FLOPs']) / 1e9}
        for key, printed in said.get('Paper', {}).items():
            if key in pairs:
                digits = len(printed.partition('.')[2])
                difference = abs(pairs[key] / float(printed) - 1)
                if difference > 0.03 and f'{pairs[key]:.{digits}f}' != printed:
                    beyond.add((name, key))
    # Table V counts the parameters of another head; of the medium detectors the papers count the
    # three decoder layers that only train.
    assert beyond == {(name, 'Parameters (M)') for name in (
        'table5_3x3', 'table5_5x5', 'rtdetrv2_r50vd_m', 'deim_rtdetr_r50vd_m')}


def test_multiply_adds_of_table_8(models):
    """What is above the paper's are products of weights alone."""
    said = {name: model['Metadata'] for name, model in models.items()
            if 'MACs (M)' in model['Metadata'].get('Paper', {})}
    assert said.keys() == {'table8_full', 'table8_depthwise', 'table8_hybrid'}
    for metadata in said.values():
        assert metadata['Multiply-Adds'] / 1e6 == pytest.approx(
            float(metadata['Paper']['MACs (M)']), rel=5e-4)


# ---- tables --------------------------------------------------------------------------------------


def test_the_tables_are_up_to_date():
    for path, text in make_texts(ROOT).items():
        assert path.read_text(encoding='utf-8') == text, REMEDY


def test_the_tables_have_every_model():
    for task in FOLDERS:
        text = (ROOT / 'configs' / task / 'README.md').read_text(encoding='utf-8')
        table = text.partition('begin -->')[2].partition('<!--')[0]
        links = re.findall(r'\]\((\S+)\)', table)
        assert [Path(link).stem for link in links] == zoo.list_models(task=task)
        assert all((ROOT / 'configs' / task / link).is_file() for link in links)


@pytest.mark.parametrize('change', [
    lambda model: model['Metadata'].update(FLOPs=10**12),
    lambda model: model['Metadata']['Paper'].update({'Parameters (M)': '99'}),
    lambda model: model['Results'][0]['Metrics'].update({'box AP': '99'}),
    lambda model: model['Results'][0].update(Source='measured here'),
])
def test_a_wrong_number_is_seen(change, models):
    change(models['rtdetr_r18vd'])
    texts = make_texts(ROOT, models)
    assert any(path.read_text(encoding='utf-8') != text for path, text in texts.items())


def test_what_nobody_measured_is_a_dash(models):
    for model in models.values():
        model.pop('Results', None)
    text = make_texts(ROOT, models)[ROOT / 'configs' / 'detection' / 'README.md']
    row = next(line for line in text.splitlines() if line.startswith('| [rtdetr_r18vd]'))
    assert row.endswith('| – | – | – | – | – | – | – |')


def test_text_without_marks():
    with pytest.raises(ValueError, match=r"marks for the tables \['a'\], not for \['b'\]"):
        insert_tables('<!-- table a: begin -->\nx\n<!-- table a: end -->\n', dict(b=''))


class TestCommand:

    @pytest.fixture
    def run(self, tmp_path, monkeypatch, models):
        """The command in a copy of the checkout, on the entry of one model alone."""
        shutil.copytree(ROOT / 'configs', tmp_path / 'configs')
        shutil.copy(ROOT / 'README.md', tmp_path)
        (tmp_path / 'tools' / 'dev').mkdir(parents=True)
        tool = shutil.copy(TOOL, tmp_path / 'tools' / 'dev')
        few = dict(spartan_xt_digits=models['spartan_xt_digits'])
        monkeypatch.setattr(zoo, 'read_metafiles', lambda folder=None: few)

        def run(*arguments):
            monkeypatch.setattr(sys, 'argv', ['readme_tables.py', *arguments])
            runpy.run_path(str(tool), run_name='__main__')
        return run, few

    def test_writes_and_checks(self, run, tmp_path):
        run, models = run
        run()
        assert 'rtdetr_r18vd.py)' not in (tmp_path / 'configs/detection/README.md').read_text()
        run('--check')
        models['spartan_xt_digits']['Metadata']['Parameters'] += 10_000
        with pytest.raises(SystemExit) as error:
            run('--check')
        assert re.findall(r'^error: (\S+)', str(error.value), re.MULTILINE) == [
            'configs/classification/README.md', 'spartan_xt_digits:']


def test_mim_reads_the_metafiles():
    """By its own reader, which mmpretrain uses, too."""
    modelindex = pytest.importorskip('modelindex.load_model_index', reason='needs model-index')
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    assert [model.name for model in index.models] == zoo.list_models()
    assert index.models[0].metadata.data['Parameters'] == 2_222_792


def test_collections_have_members():
    for task in FOLDERS:
        content = yaml.safe_load((ROOT / 'configs' / task / 'metafile.yml').read_text())
        assert {model['In Collection'] for model in content['Models']} == {
            collection['Name'] for collection in content['Collections']}
