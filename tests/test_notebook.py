"""The notebook of the docs runs, cell by cell, with a budget in which nothing is learnt."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip('nbformat')
nbclient = pytest.importorskip('nbclient')

ROOT = Path(__file__).parents[1]
BUDGET = "PICTURES, EPOCHS, SCORE = (8, 4), 1, 0."


@pytest.mark.slow
def test_train_and_look(tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    notebook = nbformat.read(ROOT / 'docs' / 'notebooks' / 'train_and_look.ipynb', 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert not any(cell.outputs for cell in cells)
    cells[0].source += f'\n{BUDGET}'
    nbclient.NotebookClient(notebook, timeout=300, resources=dict(metadata=dict(path=tmp_path))
                            ).execute()
    outputs = [[*output.get('data', {}), output.get('text')] for cell in cells
               for output in cell.outputs if output.output_type != 'stream']
    assert sum('image/png' in kinds for kinds in outputs) == 4
    printed = cells[-1].outputs[0].text
    assert Path(tmp_path, printed.splitlines()[0].split()[-1]).is_file()
