"""How strongly the patches of an image interact in a classifier, by the size of their context.

The paper's Figure 1, after Deng et al., "Discovering and Explaining the Representation Bottleneck
of DNNs" (ICLR 2022). An image is cut into n patches, the players N of a game; f(S) is what the
classifier makes of the image with only the patches S left, as the log odds of a class, log(p / (1 -
p)). What patches i and j are worth to each other among m others is the interaction of order m

    I^(m)(i, j) = E_S [f(S + i + j) - f(S + i) - f(S + j) + f(S)],  S of N without i, j; |S| = m

and the strength of order m is the average of |I^(m)(i, j)| over pairs and images, relative to its
average over the measured orders:

    J^(m) = E_x E_ij |I^(m)(i, j | x)| / E_m' E_x E_ij |I^(m')(i, j | x)|

A curve that is low in the middle is what that paper calls the representation bottleneck.

The defaults are the settings that its authors released: a grid of 16 x 16 patches, 200 pairs at
most 2 patches apart in either direction, 100 contexts, the 13 orders of ``FRACTIONS``, patches
removed by setting them to the average colour of the training images. Their 50 images are the
caller's choice.

NOTE: where there are no more contexts than are asked for, each is taken once, so that the smallest
and the largest order are exact; the released code draws the same one again and again. Pairs are
drawn uniformly, where it draws those at the border more often.

NOTE: with few contexts, |average over contexts| is too large by about the standard error of that
average. Curves are comparable only for equal settings, which the file of results enforces.
"""

import hashlib
import json
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...files import write_json
from ...text import count
from ..style import COLOURS, Figure, finish, new_figure
from .inputs import GivenModel

#: Orders of the released settings, in parts of n - 2.
FRACTIONS = (0., 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.)
BASELINES = ('zero', 'mean')
TARGETS = ('predicted', 'true')

_MARKERS = 'osD^vP*'

# Of f(S + i + j), f(S + i), f(S + j) and f(S).
_SIGNS = (1., -1., -1., 1.)

#: (B, n), True for the patches that are left, to f, (B,).
Game = Callable[[Tensor], Tensor]


def _ignore(count: int) -> None:
    """Do nothing about so many masked images that are done."""


@dataclass(frozen=True)
class Settings:
    """What is measured; two results can be compared if they have the same.

    Args:
        grid: Patches along each side of the image, at least 2; n is its square.
        pairs: Number of pairs of patches in an image; all there are if that is less.
        contexts: Number of contexts for each pair and order; all there are if that is not more.
        fractions: Orders m in parts of n - 2, each from 0 to 1.
        distance: The largest distance in a pair, in patches along either side; None for any.
        baseline: What a patch that is left out is filled with: 'zero' after the normalization of
            the model's input (the average colour of the training images), or 'mean', the average
            colour of the image.
        target: The class whose log odds f is: 'predicted', what the model takes the whole image
            for, or 'true'.
        seed: Of the pairs and contexts, which are the same for all models.

    Raises:
        UsageError: If a setting is not among the legal ones.
    """

    grid: int = 16
    pairs: int = 200
    contexts: int = 100
    fractions: tuple[float, ...] = FRACTIONS
    distance: int | None = 2
    baseline: str = 'zero'
    target: str = 'predicted'
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in dict(grid=2, pairs=1, contexts=1, distance=1).items():
            if (value := getattr(self, name)) is not None and value < least:
                raise UsageError(f'{name}={value} must be at least {least}')
        for name, choices in dict(baseline=BASELINES, target=TARGETS).items():
            if (value := getattr(self, name)) not in choices:
                raise UsageError(f'{name}={value!r} must be one of {", ".join(choices)}')
        if not self.fractions or not all(0 <= part <= 1 for part in self.fractions):
            raise UsageError(f'fractions={self.fractions} must be orders in parts of n - 2, each '
                             'from 0 to 1')

    @property
    def players(self) -> int:
        """Number of patches, n."""
        return self.grid ** 2

    @property
    def orders(self) -> list[int]:
        """The orders, ascending; fractions that come to the same one count once."""
        # Without the small number 0.29 of 100 would be 28.
        return sorted({int(part * (self.players - 2) + 1e-9) for part in self.fractions})

    @property
    def cost(self) -> int:
        """Number of masked images that go through a model for each image."""
        pairs = len(draw_pairs(self.grid, self.pairs, self.distance, np.random.default_rng(0)))
        return sum(pairs * 4 * count_contexts(self.players, order, self.contexts)
                   for order in self.orders)


# ------------------------------------------------------------------------------------ interactions


def draw_pairs(grid: int, pairs: int, distance: int | None,
               generator: np.random.Generator) -> np.ndarray:
    """Draw pairs of patches, each at most once: their indices, row by row, (P, 2)."""
    reach = grid - 1 if distance is None else min(distance, grid - 1)
    patches = np.arange(grid ** 2)
    rows, columns = np.divmod(patches, grid)
    candidates = []
    for down in range(reach + 1):
        # Each pair once: the second patch comes after the first.
        for right in range(-reach if down else 1, reach + 1):
            column = columns + right
            first = patches[(rows + down < grid) & (0 <= column) & (column < grid)]
            candidates.append(np.stack([first, first + down * grid + right], 1))
    return generator.permutation(np.concatenate(candidates))[:pairs]


def count_contexts(players: int, order: int, contexts: int) -> int:
    """Tell how many contexts a pair gets, at most all there are."""
    return min(contexts, math.comb(players - 2, order))


def draw_contexts(players: int, pair: Sequence[int], order: int, contexts: int,
                  generator: np.random.Generator) -> np.ndarray:
    """Draw sets of `order` players without a pair; or list all, where no more are asked for.

    Returns:
        True for the players in each context, (K, n).
    """
    others = np.delete(np.arange(players), pair)
    if math.comb(len(others), order) <= contexts:
        chosen = np.array(list(combinations(others, order)), dtype=int)
    else:
        ranks = generator.random((contexts, len(others)), dtype=np.float32).argsort(1)
        chosen = others[ranks[:, :order]]
    inside = np.zeros((len(chosen), players), dtype=bool)
    np.put_along_axis(inside, chosen, True, axis=1)
    return inside


def measure_interactions(game: Game, players: int, pairs: np.ndarray, orders: Sequence[int],
                         contexts: int, generator: np.random.Generator, batch_size: int = 256,
                         done: Callable[[int], Any] = _ignore) -> np.ndarray:
    """Measure the interaction of each pair at each order.

    Args:
        game: f; it is called with full batches, which reach over pairs and orders.
        players: Number of players n.
        pairs: (P, 2), different players from 0 to n - 1.
        orders: Numbers of players in a context, each from 0 to n - 2.
        contexts: Number of contexts; the result is exact where there are no more.
        generator: Random numbers.
        batch_size: Number of masks that the game gets at once.
        done: Called after each batch, with its size.

    Returns:
        I^(m)(i, j), (orders, P).

    Raises:
        UsageError: If the game gives numbers that are not finite.
    """
    values = []
    for masks in _batches(players, pairs, orders, contexts, generator, batch_size):
        value = game(torch.from_numpy(masks))
        if not torch.isfinite(value).all():
            raise UsageError('the model gives log odds that are NaN or infinite, of which there '
                             'are no interactions; look at its weights')
        values.append(value.cpu().numpy())
        done(len(masks))

    counts = [count_contexts(players, order, contexts) for order in orders]
    ends = np.cumsum([len(pairs) * 4 * count for count in counts])
    by_order = np.split(np.concatenate(values), ends[:-1])
    return np.stack([(value.reshape(len(pairs), count, 4) @ _SIGNS).mean(1)
                     for value, count in zip(by_order, counts, strict=True)])


def _batches(players: int, pairs: np.ndarray, orders: Sequence[int], contexts: int,
             generator: np.random.Generator, size: int) -> Iterator[np.ndarray]:
    """The players in each term of each difference, in parts (size, n), but for the last."""
    waiting = np.empty((0, players), dtype=bool)
    for order, pair in product(orders, pairs):
        context = draw_contexts(players, pair, order, contexts, generator)
        terms = context[:, None].repeat(4, axis=1)  # (K, 4, n)
        terms[:, (0, 1), pair[0]] = True
        terms[:, (0, 2), pair[1]] = True
        waiting = np.concatenate([waiting, terms.reshape(-1, players)])
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if len(waiting):
        yield waiting


def relative_strength(strengths: np.ndarray) -> np.ndarray:
    """Relate strengths to their average over the orders, J^(m); zeros if nothing interacts."""
    average = strengths.mean()
    return strengths / average if average else np.zeros_like(strengths)


# ------------------------------------------------------------------------------------------ images


def log_odds(logits: Tensor, label: int) -> Tensor:
    """The log odds log(p / (1 - p)) of a class, (B,), without the rounding of p near 1.

    They are computed of logits (B, K) of two classes or more, in float64 on the CPU.
    """
    logits = logits.cpu().double()
    others = torch.cat([logits[:, :label], logits[:, label + 1:]], 1)
    return logits[:, label] - others.logsumexp(1)


class MaskedImage:
    """The game of a classifier and an image, whose players are the patches of a grid.

    Args:
        model: Takes images (B, 3, H, W) to logits (B, K).
        image: As the model sees it, normalised, (3, H, W).
        settings: Of which grid and baseline count. Where the grid does not divide H or W, some
            patches are a pixel longer than others.
        label: Class index; None for what the model takes the whole image for.

    Raises:
        UsageError: If there are more patches than pixels along a side, or the model is no
            classifier of two classes or more.
    """

    def __init__(self, model: nn.Module, image: Tensor, settings: Settings,
                 label: int | None = None) -> None:
        (height, width), grid = image.shape[1:], settings.grid
        if grid > min(height, width):
            raise UsageError(f'a grid of {grid}×{grid} patches needs images of at least that many '
                             f'pixels, and the model sees {height}×{width}: take a smaller grid')
        self.model, self.image = model, image
        self.baseline = (image.mean((1, 2), keepdim=True) if settings.baseline == 'mean'
                         else image.new_zeros(3, 1, 1))
        # The patch that each pixel belongs to, (H, W).
        rows, columns = (torch.arange(length) * grid // length for length in (height, width))
        self.patches = (rows[:, None] * grid + columns).to(image.device)

        with torch.inference_mode():
            logits = model(image[None])
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
            raise UsageError('the model gives no scores of two classes or more for an image; '
                             'interactions are measured on classifiers')
        self.classes = logits.shape[1]
        self.label = int(logits.argmax()) if label is None else label
        self.log_odds = float(log_odds(logits, self.label))  # f(N), of the whole image

    @torch.inference_mode()
    def __call__(self, masks: Tensor) -> Tensor:
        """The log odds (B,) of the image with the patches of each mask (B, n) left."""
        left = masks.to(self.image.device)[:, self.patches][:, None]  # (B, 1, H, W)
        return log_odds(self.model(torch.where(left, self.image, self.baseline)), self.label)


# ----------------------------------------------------------------------------------------- results


class Results:
    """Strengths of models at images, in a file that grows with each image.

    Args:
        path: The file; if it is there, its results are continued.
        settings: What is measured.

    Raises:
        UsageError: If the file was made with other settings, or is no such file.
    """

    def __init__(self, path: str | Path, settings: Settings) -> None:
        self.path, self.settings = Path(path), settings
        # As JSON gives them back.
        stated = json.loads(json.dumps(asdict(settings)))
        self.content: dict[str, Any] = dict(
            settings=stated, orders=settings.orders, cost=settings.cost, models={})
        if not self.path.exists():
            return
        try:
            content = json.loads(self.path.read_text(encoding='utf-8'))
            found, content['models'] = content['settings'], dict(content['models'])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f'{self.path} holds no interactions; move it away or write somewhere '
                             'else') from error
        changes = [f'{name} {found.get(name)} instead of {wanted}'
                   for name, wanted in stated.items() if found.get(name) != wanted]
        if changes:
            raise UsageError(f'{self.path} was measured with {", ".join(changes)}: take these '
                             'settings, or write somewhere else')
        self.content = content

    def of_model(self, given: GivenModel) -> dict[str, Any]:
        """Get the record of a model, a new one if there is none.

        Raises:
            UsageError: If the file has results of another model of that title.
        """
        record = self.content['models'].setdefault(
            given.title, dict(weights=given.digest, images={}))
        if record['weights'] != given.digest:
            raise UsageError(f'{self.path} has results of {given.title} with other weights: write '
                             'somewhere else')
        return record

    def save(self) -> None:
        """Write the file."""
        write_json(self.path, self.content)


def measure(models: Sequence[GivenModel], images: Sequence[Path], root: Path, results: Results,
            batch_size: int = 256, done: Callable[[int], Any] = _ignore) -> dict[str, np.ndarray]:
    """Measure models at images, of which those that the results have are not measured again.

    Args:
        models: Classifiers.
        images: Files under ``root``.
        root: The folder that the names in the results start from; with the true class as the
            target, it has a folder for each class, in the order of the classes.
        results: What is there already; each image is written to them as soon as it is done.
        batch_size: Number of masked images in one pass.
        done: Called with the number of masked images, after each batch and for what is there
            already.

    Returns:
        J^(m) of each model by its title.

    Raises:
        DataError: If an image cannot be read; all are read before anything is measured.
        UsageError: If the results have other weights, a model is no classifier of the classes, the
            grid is too fine, or the folders are not those of classes.
    """
    settings = results.settings
    names = [path.relative_to(root).as_posix() for path in images]
    labels: list[int | None] = [None] * len(images)
    if settings.target == 'true':
        folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        labels = [_find_label(name, folders, root) for name in names]
    for given in models:
        results.of_model(given)
        for path, label in zip(images, labels, strict=True):
            game = MaskedImage(given.named.model, given.read(path), settings)
            if label is not None and len(folders) != game.classes:
                raise UsageError(f'{root} has {len(folders)} folders, and {given.title} has '
                                 f'{game.classes} classes: the true class of an image is known if '
                                 'there is a folder for each class, in the order of the classes')

    curves = {}
    for given in models:
        record = results.of_model(given)
        stored = record['images']
        for path, name, label in zip(images, names, labels, strict=True):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            # It may be another one of the same name.
            if name not in stored or stored[name]['digest'] != digest:
                game = MaskedImage(given.named.model, given.read(path), settings, label)
                stored[name] = dict(
                    digest=digest, **measure_image(game, name, settings, batch_size, done))
                results.save()
            else:
                done(settings.cost)
        strengths = np.mean([stored[name]['strength'] for name in names], axis=0)
        curve = curves[given.title] = relative_strength(strengths)
        record['curve'] = dict(images=len(names), strength=strengths.tolist(),
                               relative_strength=curve.tolist())
        results.save()
    return curves


def measure_image(game: MaskedImage, name: str, settings: Settings, batch_size: int = 256,
                  done: Callable[[int], Any] = _ignore) -> dict[str, Any]:
    """Measure how strongly the patches of one image interact, see :func:`measure`.

    Random numbers depend on its name, whichever others there are.

    Returns:
        A record fit for JSON: the class, its log odds, the strength E_ij |I^(m)| of each order, and
        what it took.
    """
    start = time.perf_counter()
    generator = np.random.default_rng([settings.seed, zlib.crc32(name.encode(errors='replace'))])
    pairs = draw_pairs(settings.grid, settings.pairs, settings.distance, generator)
    interactions = measure_interactions(game, settings.players, pairs, settings.orders,
                                        settings.contexts, generator, batch_size, done)
    return dict(label=game.label, log_odds=game.log_odds,
                strength=np.abs(interactions).mean(1).tolist(), masked_images=settings.cost,
                seconds=round(time.perf_counter() - start, 3))


def _find_label(name: str, folders: Sequence[str], root: Path) -> int:
    folder = name.partition('/')[0]
    if folder not in folders:
        raise UsageError(f'the true class of {name} is not known: it must lie in a folder of '
                         f'{root} that stands for its class')
    return folders.index(folder)


def draw_strengths(curves: Mapping[str, np.ndarray], settings: Settings, images: int) -> Figure:
    """Draw the strengths J^(m) of models over the order, averages over some images."""
    figure = new_figure(8, 4.6)
    axes = figure.add_subplot()
    x = np.array(settings.orders) / (settings.players - 2)
    for index, (name, curve) in enumerate(curves.items()):
        axes.plot(x, curve, color=COLOURS[index % len(COLOURS)], linewidth=1.8, markersize=5,
                  marker=_MARKERS[index % len(_MARKERS)], label=name, clip_on=False, zorder=3)
    axes.axhline(1, color='0.6', linewidth=1, linestyle='--')
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    finish(axes, 'Interactions between patches, by the size of their context', 13)
    axes.set_xlabel('order m, in parts of n − 2', fontsize=12)
    axes.set_ylabel('relative strength J⁽ᵐ⁾', fontsize=12)
    axes.tick_params(labelsize=11)
    figure.supxlabel(
        f'{count(images, "image")}, {settings.grid}×{settings.grid} patches, {settings.pairs} '
        f'pairs, {settings.contexts} contexts', fontsize=10, color='0.35', x=0.01, ha='left')
    axes.legend(frameon=False, fontsize=11)
    return figure
