"""Pictures show names as they are."""

from matplotlib.text import Text

from spartan_mm.analysis.style import finish, new_figure, write_figure


def test_names_are_no_formulas(tmp_path):
    # matplotlib knows no \foo, and ends with an error.
    name = r'$\foo$'
    figure = new_figure(4, 3)
    axes = figure.add_subplot()
    axes.plot([1, 100], [0, 1], label=name)
    axes.set_yticks([0, 1], [name, 'cat'])
    axes.set(xscale='log', xlabel=name)
    finish(axes, name)
    figure.legend(title=name)
    write_figure(tmp_path / 'figure.png', figure)
    # Of a logarithmic scale.
    formulas = {text.get_text() for text in figure.findobj(Text) if text.get_parse_math()}
    assert any('10^' in formula for formula in formulas) and name not in formulas
