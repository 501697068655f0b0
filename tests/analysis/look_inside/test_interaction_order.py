"""Interactions that are known in closed form, the sampling, and the file that results grow in."""

import itertools
import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from spartan_mm.analysis.look_inside.inputs import choose_images
from spartan_mm.analysis.look_inside.interaction_order import (
    FRACTIONS,
    MaskedImage,
    Results,
    Settings,
    count_contexts,
    draw_contexts,
    draw_pairs,
    draw_strengths,
    log_odds,
    measure,
    measure_image,
    measure_interactions,
    relative_strength,
)
from spartan_mm.errors import UsageError

EXACT = 10 ** 6
SETTINGS = Settings(grid=3, pairs=4, contexts=2, fractions=(0, 0.5, 1))
CLOSE = dict(rtol=0, atol=1e-6)


def all_pairs(players):
    return np.array(list(itertools.combinations(range(players), 2)))


def interactions(game, players, contexts=EXACT, orders=None, seed=0, **options):
    orders = range(players - 1) if orders is None else orders
    return measure_interactions(
        game, players, all_pairs(players), orders, contexts, np.random.default_rng(seed), **options)


@pytest.mark.parametrize('contexts', [EXACT, 3])
@pytest.mark.parametrize(('game', 'expected'), [
    # Players that add up do not interact, in whatever context.
    (lambda masks: masks.double() @ torch.arange(8.).double() + 3, lambda order, pair: 0),
    # What two players give together they give in any context; other pairs do not interact.
    (lambda masks: 2.5 * (masks[:, 1] & masks[:, 4]).double(),
     lambda order, pair: 2.5 * (pair == (1, 4))),
    # Parity.
    (lambda masks: 1 - 2 * (masks.sum(1) % 2).double(), lambda order, pair: 4 * (-1) ** order),
    # With one vote short of a majority of 5, two more help each other; with two, one is enough.
    (lambda masks: (masks.sum(1) >= 5).double(), lambda order, pair: {3: 1, 4: -1}.get(order, 0)),
], ids=['sum', 'product', 'parity', 'majority'])
def test_same_in_every_context(game, expected, contexts):
    expected = [[expected(order, tuple(pair)) for pair in all_pairs(8)] for order in range(7)]
    assert_close(interactions(game, 8, contexts), np.array(expected, float), **CLOSE)


@pytest.fixture
def any_game():
    """A game of six players with a random value for each of its 64 coalitions."""
    values = torch.randn(64, dtype=torch.float64)
    powers = 2 ** torch.arange(6)
    return values, lambda masks: values[(masks * powers).sum(1)]


def test_any_game(any_game):
    """The definition, sum by sum."""
    values, game = any_game

    def worth(coalition):
        return float(values[sum(2 ** player for player in coalition)])

    expected = []
    for order in range(5):
        expected.append([])
        for i, j in all_pairs(6):
            differences = [
                worth({*context, i, j}) - worth({*context, i}) - worth({*context, j})
                + worth(context)
                for context in itertools.combinations(set(range(6)) - {i, j}, order)]
            expected[-1].append(sum(differences) / len(differences))
    assert_close(interactions(game, 6), np.array(expected), **CLOSE)


@pytest.mark.parametrize('batch_size', [1, 7, 10_000])
def test_full_batches(any_game, batch_size):
    sizes = []
    found = interactions(any_game[1], 6, batch_size=batch_size, done=sizes.append)
    assert_close(found, interactions(any_game[1], 6), **CLOSE)
    assert sum(sizes) == 15 * 4 * 2 ** 4
    assert set(sizes[:-1]) <= {batch_size}


def test_sampling_comes_close():
    """The error of the average of 1500 of 3432 contexts is within five standard errors."""
    weights = torch.randn(16, 16, dtype=torch.float64)

    def game(masks):
        return ((masks.double() @ weights) * masks).sum(1).tanh()
    pair, order = np.array([[2, 9]]), [7]
    options = dict(players=16, pairs=pair, orders=order)
    exact = measure_interactions(game, contexts=3432, generator=None, **options)
    sampled = measure_interactions(
        game, contexts=1500, generator=np.random.default_rng(1), **options)
    single = [measure_interactions(game, contexts=1, generator=np.random.default_rng(seed),
                                   **options).item() for seed in range(200)]
    assert 0 < abs(sampled - exact).item() < 5 * np.std(single) / 1500 ** 0.5


def test_contexts_are_uniform():
    contexts = draw_contexts(10, (3, 7), 4, 20_000 // 10, np.random.default_rng(0))
    assert len(contexts) == math.comb(8, 4)  # all there are
    contexts = draw_contexts(16, (3, 7), 5, 2000, np.random.default_rng(0))
    assert contexts.shape == (2000, 16)
    assert (contexts.sum(1) == 5).all()
    assert not contexts[:, [3, 7]].any()
    # Binomial, 0.011 standard deviation.
    assert abs(np.delete(contexts, [3, 7], 1).mean(0) - 5 / 14).max() < 0.05


@pytest.mark.parametrize(('distance', 'total'), [(None, 120), (1, 42), (3, 120)])
def test_pairs(distance, total):
    pairs = draw_pairs(4, 1000, distance, np.random.default_rng(0))
    assert len({tuple(pair) for pair in pairs}) == len(pairs) == total
    rows, columns = pairs // 4, pairs % 4
    apart = np.maximum(abs(rows[:, 0] - rows[:, 1]), abs(columns[:, 0] - columns[:, 1]))
    assert apart.min() == 1 and apart.max() <= (distance or 3)
    assert len(draw_pairs(4, 5, distance, np.random.default_rng(0))) == 5


def test_published_settings():
    settings = Settings()
    assert settings.orders == [0, 12, 25, 50, 76, 101, 127, 152, 177, 203, 228, 241, 254]
    # 200 pairs of 4: 11 orders of 100 contexts, and one context where there are no others.
    assert settings.cost == 200 * 4 * (11 * 100 + 2) == 881_600
    assert count_contexts(256, 254, 100) == 1


@pytest.mark.parametrize('change', [
    dict(grid=1), dict(pairs=0), dict(contexts=0), dict(distance=0), dict(baseline='blur'),
    dict(target='any'), dict(fractions=()), dict(fractions=(0.5, 1.1))])
def test_bad_settings(change):
    with pytest.raises(UsageError, match=next(iter(change))):
        Settings(**change)


def test_relative_strength():
    assert_close(relative_strength(np.array([1., 2, 6])), np.array([1 / 3, 2 / 3, 2]))
    assert_close(relative_strength(np.zeros(3)), np.zeros(3))


def test_log_odds():
    logits = torch.randn(4, 6, dtype=torch.float64)
    chances = logits.softmax(1)[:, 2]
    assert_close(log_odds(logits, 2), (chances / (1 - chances)).log())
    assert_close(log_odds(torch.tensor([[80., 0.]]), 0), torch.tensor([80.]).double())


class Patches(nn.Module):
    """A classifier of two classes; the log odds depend on the averages of 3 x 3 patches."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        averages = nn.functional.adaptive_avg_pool2d(images, 3).mean(1).flatten(1)
        scores = self.function(averages)
        return torch.stack([scores, torch.zeros_like(scores)], 1)


def test_measure_image():
    """In closed form, of three patches that a product consists of: 3 of the 36 pairs."""
    settings = Settings(grid=3, pairs=36, contexts=EXACT, distance=None)
    model, image = Patches(lambda x: 1 - 5 * x[:, 0] * x[:, 4] * x[:, 8]), torch.ones(3, 12, 9)
    game = MaskedImage(model, image, settings)
    assert (game.label, game.classes) == (1, 2)
    game = MaskedImage(model, image, settings, label=0)
    # The chance that the context has the third.
    chances = np.array(settings.orders) / 7
    found = measure_interactions(game, 9, np.array([[0, 4], [0, 1]]), settings.orders, EXACT, None)
    assert_close(found, np.stack([-5 * chances, 0 * chances], 1), **CLOSE)
    record = measure_image(game, 'a.png', settings)
    assert_close(np.array(record['strength']), 3 / 36 * 5 * chances, **CLOSE)
    assert record['masked_images'] == settings.cost == 36 * 4 * 2 ** 7
    assert record['label'] == 0 and record['log_odds'] == pytest.approx(-4)
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize(('baseline', 'expected'), [('zero', 0.), ('mean', 2.)])
def test_baseline(baseline, expected):
    seen = []
    image = torch.full((3, 9, 9), 1.)
    image[:, 4:] = 2.8  # 2 on average
    game = MaskedImage(Patches(lambda x: seen.append(x) or x[:, 0]), image,
                       Settings(grid=3, baseline=baseline))
    game(torch.zeros(2, 9, dtype=torch.bool))
    assert_close(seen[-1], torch.full((2, 9), expected))


def test_uneven_patches():
    """A side that is no multiple of the grid: each pixel belongs to one patch, in order."""
    game = MaskedImage(Patches(lambda x: x[:, 0]), torch.ones(3, 7, 8), SETTINGS)
    assert game.patches[:, 0].tolist() == [0, 0, 0, 3, 3, 6, 6]
    assert game.patches[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


def test_refused_models():
    image = torch.ones(3, 8, 8)
    with pytest.raises(UsageError, match='grid of 9×9'):
        MaskedImage(Patches(lambda x: x[:, 0]), image, Settings(grid=9))
    with pytest.raises(UsageError, match='two classes'):
        MaskedImage(nn.Sequential(nn.Flatten(), nn.Linear(192, 1)), image, Settings(grid=2))
    with pytest.raises(UsageError, match='two classes'):
        MaskedImage(nn.Conv2d(3, 3, 1), image, Settings(grid=2))
    broken = MaskedImage(Patches(lambda x: x[:, 0] / x[:, 1]), image, SETTINGS)
    with pytest.raises(UsageError, match='NaN'):
        measure_interactions(broken, 9, np.array([[0, 1]]), [0], 1, None)


# ----------------------------------------------------------------------------------------- results

@pytest.fixture
def pictures(tmp_path):
    """Pictures of two classes, in a folder for each."""
    root = tmp_path / 'pictures'
    for index, folder in enumerate(['black', 'black', 'white', 'white']):
        (root / folder).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / folder / f'{index}.png'),
                    np.random.default_rng(index).integers(0, 256, (12, 12, 3), np.uint8))
    return root, sorted(root.glob('*/*.png'))


def make_given(title='model', digest='abc'):
    def read(path):
        return torch.from_numpy(cv2.imread(str(path))).permute(2, 0, 1) / 255
    model = Patches(lambda x: 3 * x[:, 0] * x[:, 4] - 5 * x.prod(1) - 0.2)
    return SimpleNamespace(title=title, named=SimpleNamespace(model=model), read=read,
                           digest=digest)


def test_resuming(pictures, tmp_path, monkeypatch):
    """Interrupted in the second image, it goes on there and comes to what it would have come to."""
    root, images = pictures
    whole = measure([make_given()], images, root, Results(tmp_path / 'a.json', SETTINGS))

    path, calls = tmp_path / 'b.json', []

    def interrupted(count):
        calls.append(count)
        if len(calls) == 2:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        measure([make_given()], images, root, Results(path, SETTINGS), done=interrupted)
    stored = json.loads(path.read_text())['models']['model']['images']
    assert list(stored) == ['black/0.png']

    from spartan_mm.analysis.look_inside import interaction_order
    measured = []
    original = interaction_order.measure_image
    monkeypatch.setattr(interaction_order, 'measure_image', lambda game, name, *rest:
                        measured.append(name) or original(game, name, *rest))
    counts = []
    resumed = measure([make_given()], images, root, Results(path, SETTINGS),
                      done=counts.append)
    assert measured == ['black/1.png', 'white/2.png', 'white/3.png']
    assert sum(counts) == 4 * SETTINGS.cost
    assert_close(resumed, whole, rtol=0, atol=0)

    # Another image of the same name is measured anew, another model is added.
    shutil.copy(images[0], images[3])
    measure([make_given(), make_given('other', 'def')], images[2:], root,
            Results(path, SETTINGS))
    assert measured[3:] == ['white/3.png', 'white/2.png', 'white/3.png']
    content = json.loads(path.read_text())
    assert len(content['models']['model']['images']) == 4
    assert content['models']['model']['curve']['images'] == 2
    assert content['models']['model']['images']['white/3.png']['seconds'] >= 0


def test_refused_results(pictures, tmp_path):
    root, images = pictures
    path = tmp_path / 'results.json'
    measure([make_given()], images[:1], root, Results(path, SETTINGS))
    with pytest.raises(UsageError, match='pairs 4 instead of 5, seed 0 instead of 3: take these'):
        Results(path, replace(SETTINGS, pairs=5, seed=3))
    with pytest.raises(UsageError, match='model with other weights'):
        measure([make_given(digest='xyz')], images, root, Results(path, SETTINGS))
    path.write_text('[1, 2')
    with pytest.raises(UsageError, match='holds no interactions'):
        Results(path, SETTINGS)


def test_true_class(pictures, tmp_path):
    root, images = pictures
    settings = replace(SETTINGS, target='true')
    results = Results(tmp_path / 'results.json', settings)
    measure([make_given()], images, root, results)
    records = results.content['models']['model']['images']
    assert [record['label'] for record in records.values()] == [0, 0, 1, 1]

    with pytest.raises(UsageError, match='true class of 0.png is not known'):
        measure([make_given()], images[:1], root / 'black', results)
    (root / 'yellow').mkdir()
    with pytest.raises(UsageError, match='3 folders, and model has 2 classes'):
        measure([make_given()], images, root, results)


def test_chosen_images():
    images = list(range(20))
    assert choose_images(images, 5, seed=1) == choose_images(images, 9, seed=1)[:5]
    assert choose_images(images, 5, seed=1) != choose_images(images, 5, seed=2)
    assert sorted(choose_images(images, None, seed=1)) == images


def test_drawing():
    settings = Settings(fractions=FRACTIONS)
    curve = np.linspace(0, 2, len(settings.orders))
    axes, = draw_strengths({'ours': curve, 'theirs': curve[::-1]}, settings, 3).axes
    lines = axes.get_lines()
    assert [line.get_label() for line in lines[:2]] == ['ours', 'theirs']
    assert_close(lines[0].get_xdata()[[0, -1]], np.array([0., 1.]))
    assert_close(lines[1].get_ydata(), curve[::-1].copy())
