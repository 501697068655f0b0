"""A page shows its texts as they are, and loads nothing."""

import base64
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from spartan_mm.analysis.report.html import (
    Facts,
    Folded,
    Note,
    Pairs,
    Pictures,
    Section,
    Table,
    embed_figure,
    embed_image,
    render,
)

NASTY = '</pre><script>alert("x")</script><img src=x onerror=\'y\'>&amp;{{ 7 * 7 }}'


def make_figure(points):
    figure = Figure(figsize=(3, 2))
    axes = figure.add_subplot()
    axes.plot(np.random.default_rng(0).random(points))
    axes.set_title('left < right', loc='left')
    return figure


@pytest.mark.parametrize('text', ['plain', NASTY])
def test_texts_are_shown_as_they_are(text, read_self_contained):
    picture = embed_image(Image.new('RGB', (80, 60)), (text, ))
    blocks = [Note(text), Note(text, 'missing'), Note(text, 'heading'), Facts([(text, text)]),
              Table(text, [text], [[text]], 0), Table(text, [text], [[text]] * 13),
              Pictures([picture]), Pairs([(text, (picture, picture))]), Folded(text, text)]
    html = render(text, text, [(text, text)], [Section('part', text, blocks)])
    reader = read_self_contained(html)
    assert html.count('<img ') == 3 and '49' not in re.sub('base64,[^"]*', '', html)
    # A long table is folded.
    assert html.count('<details>') == 2
    assert sum(text in part for part in reader.texts) == 36
    assert {attributes['alt'] for tag, attributes in reader.tags if tag == 'img'} == {text}


def test_parts_are_linked(read_self_contained):
    html = render('title', '', [], [Section('one', 'One', []), Section('two', 'Two', [])])
    tags = read_self_contained(html).tags
    assert [attributes['href'] for tag, attributes in tags if tag == 'a'] == ['#one', '#two']
    assert [attributes['id'] for tag, attributes in tags if tag == 'section'] == ['one', 'two']


@pytest.mark.parametrize('points, kind', [(10, 'image/svg+xml'), (8000, 'image/png')])
def test_figures_are_svg_or_png_whichever_is_lighter(points, kind):
    picture = embed_figure(make_figure(points))
    assert picture.source.startswith(f'data:{kind};base64,')
    assert (picture.size, picture.alt) == ((300, 200), 'left < right')
    # The same every time.
    assert picture == embed_figure(make_figure(points))


@pytest.mark.parametrize('side, kind, coarse', [(8, 'png', True), (200, 'jpeg', False)])
def test_images(side, kind, coarse):
    picture = embed_image(Image.new('RGB', (side, side), (200, 0, 0)), ('red', ))
    assert picture.source.startswith(f'data:image/{kind};base64,') and picture.coarse == coarse
    content = base64.b64decode(picture.source.partition(',')[2])
    assert content[:3] == (b'\x89PN' if coarse else b'\xff\xd8\xff')
