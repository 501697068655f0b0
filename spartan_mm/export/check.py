"""Whether an exported file says what its model says: compared on pictures before it is given away.

The model runs as it was trained, eagerly and in float32; the file as its users run it.

NOTE: Rows of a detector are matched before they are compared. Their order isn't stable, and neither
is their choice at its edge: where two scores differ by less than float32's rounding, two right
programs keep different ones. So it is with the strongest channel that a CMixer picks: of 100,000
positions (640 x 640 pixels) some have two that are equal up to rounding, and all that follows may
change with the pick.
"""
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.special import expit, logit
from torch import Tensor, nn

from ..backbones.spartan import CMixer
from ..errors import ExplainedError
from ..text import count, join, markdown
from .pictures import Pictures, resized
from .race import BareRun, computed_in, open_bare, race

#: The largest differences that float32 may make: of a detector's logits; of its boxes, as a share
#: of the image's sides; of a classifier's logits, as a share of the largest.
LOGITS, BOXES, CLASS_LOGITS = 1e-3, 1e-4, 1e-4

#: How many times as far as PyTorch's float32 a file may be from float64, where a model is so
#: sensitive that its own rounding nears the bounds; and how many times the bounds at most.
ROUNDING, MOST_SLACK = 10., 100.

#: How near a score is to the edge of a choice, of queries or of detections, where it may be
#: another one's turn.
EDGE = 1e-4

#: The same of a channel to the strongest one, as a share of the map's standard deviation.
PICK = 1e-3

#: The share of rows without a partner from which on the others say too little.
TIES = 0.25

#: Detections of lower precision are compared from this score on; if there are none, the best.
SCORE, BEST = 0.3, 10

# Names of what a file gives, and what it gives for images (N, 3, H, W) and their original sizes
# (N, 2), width and height.
Run = Callable[[np.ndarray, np.ndarray | None], Mapping[str, np.ndarray]]
# What each CMixer of a file picks, (N, 1, H, W).
Find = Callable[[np.ndarray, np.ndarray | None], Sequence[np.ndarray]]

INFINITE = 'the file gives numbers that are not finite'


class CheckError(ExplainedError):
    """An exported file that does not compute what its model computes."""


class Rows(NamedTuple):
    """The detections of one picture, or the queries.

    Attributes:
        values: Logits (K, classes), or scores (K, 1).
        boxes: (K, 4), as a share of the image's sides.
        labels: (K,); zeros for queries.
        scores: (K,), the best of each.
        loose: (K,), True for rows at the edge of a choice, which may have no partner.
    """

    values: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    loose: np.ndarray


class Right(NamedTuple):
    """What is right for one picture.

    Attributes:
        rows: Of a detector; of a classifier its logits, or logarithms of its scores, (classes,).
        largest: The largest logit of a classifier, as a number without its sign.
        swaps: How many queries others might stand for, by the edge of their selection.
        others: Which these are, the nearest first: a selected token and one that is not, by their
            ranks.
    """

    rows: Rows | np.ndarray
    largest: float = 0.
    swaps: int = 0
    others: Sequence[tuple[int, int]] = ()


@dataclass
class Difference:
    """How a file's output differs from what is right, for one picture.

    Args:
        values: The largest difference of logits or scores of rows with a partner.
        boxes: Of boxes.
        rows: How many there are.
        ties: Rows without a partner at the edge of a choice.
        top5: Whether a classifier's best five are the same.
        fault: What is wrong, if anything is.
        excess: The largest difference that counts, as a multiple of its bound.
        slack: How many times as large the bounds are that were kept to.
        picks: Positions where another channel is the strongest, by no more than rounding.
    """

    values: float
    boxes: float = 0.
    rows: int = 0
    ties: int = 0
    top5: bool = True
    fault: str | None = None
    excess: float = np.inf
    slack: float = 1.
    picks: int = 0


class Reference:
    """What a file is compared with: the model as it was trained, eager, in float32.

    Args:
        model: A detector or a classifier, in evaluation mode and in none of the other forms.
        metadata: Of the file: its `task`, and whether it is `raw`.
    """

    def __init__(self, model: nn.Module, metadata: Mapping[str, Any]) -> None:
        self.model = model
        self.detects = metadata['task'] == 'detection'
        self.raw = bool(metadata['raw'])
        self.dtype = torch.float32
        #: How many times as large bounds and edges are.
        self.slack = 1.

    def in_float64(self) -> 'Reference':
        """The same model, nearly without rounding."""
        exact = copy.copy(self)
        exact.model, exact.dtype = copy.deepcopy(self.model).double(), torch.float64
        return exact

    def compare(self, right: Right, found: Rows | np.ndarray) -> Difference:
        """Compare what is right for a picture with what a file found."""
        if self.detects:
            return compare_rows(right.rows, found, right.swaps, self.raw, self.slack)
        return compare_logits(right.rows, found, right.largest, self.slack)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, sizes: np.ndarray,
                 swap: tuple[int, int] | None = None, picks: Sequence[np.ndarray] = ()
                 ) -> list[Right]:
        """Say what is right for images (N, 3, H, W), RGB bytes, of the original sizes (N, 2).

        Args:
            images: The images.
            sizes: Width and height of each before it was resized.
            swap: Ranks of two tokens that change places before the best are selected.
            picks: What each CMixer is to pick, (N, 1, H, W), where its own pick is as strong up to
                rounding.

        Raises:
            CheckError: The model gives numbers that are not finite.
        """
        inputs = [torch.from_numpy(image[::-1].copy()) for image in images]
        batch = self.model.data_preprocessor(dict(inputs=inputs, data_samples=None), False)
        inputs = batch['inputs'].to(self.dtype)
        left = iter(picks)
        with self._before_mixers((lambda x: raise_picks(x, next(left))) if picks else None):
            right = self._detect(inputs, sizes, swap) if self.detects else self._classify(inputs)
        if not all(np.isfinite(part).all() for each in right
                   for part in (each.rows if self.detects else [each.rows])):
            raise CheckError('the model itself gives numbers that are not finite, with which no '
                             'file can be compared; look for a fault in the checkpoint')
        return right

    def strongest(self, images: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
        """The strongest channel at each position, of each CMixer in its turn, (N, 1, H, W)."""
        found = []
        with self._before_mixers(lambda x: found.append(x.argmax(1, keepdim=True).numpy())):
            self(images, sizes)
        return found

    @contextmanager
    def _before_mixers(self, look: Callable[[Tensor], Tensor | None] | None) -> Iterator[None]:
        """Let something see, or change, what comes to each CMixer in its turn."""
        hooks = [module.register_forward_pre_hook(lambda _, args: look(args[0]))
                 for module in self.model.modules() if look and isinstance(module, CMixer)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _classify(self, inputs: Tensor) -> list[Right]:
        features = self.model.extract_feat(inputs)
        logits = self.model.head(features).float()
        values = logits.numpy() if self.raw else _log(torch.stack([
            sample.pred_score for sample in self.model.head.predict(features)]).numpy())
        return [Right(own, float(largest)) for own, largest in zip(
            values, logits.abs().amax(1), strict=True)]

    def _detect(self, inputs: Tensor, sizes: np.ndarray, swap: tuple[int, int] | None
                ) -> list[Right]:
        head, ranked = self.model.bbox_head, []

        def look(module: nn.Module, args: Any, logits: Tensor) -> Tensor | None:
            scores, order = logits.float().amax(-1).sort(1, descending=True)  # (N, L)
            ranked.append(scores.sigmoid())
            if swap is not None:
                image, (one, other) = torch.arange(len(order)), order[:, swap].unbind(1)
                logits = logits.clone()
                logits[image, one], logits[image, other] = logits[image, other], logits[image, one]
            return logits

        # In evaluation the last branch rates the tokens, of which the best become queries.
        hook = head.cls_branches[-1].register_forward_hook(look)
        try:
            logits, boxes = self.model.infer(inputs)
        finally:
            hook.remove()
        scores, kept = ranked[-1], logits.shape[1]
        selected, left = scores[:, :kept], scores[:, kept:]
        first_left = left[:, :1] if left.shape[1] else torch.full((len(left), 1), -1.)
        edge = EDGE * self.slack
        loose = selected - first_left <= edge  # (N, Q)
        counts = torch.minimum(loose.sum(1), (selected[:, -1:] - left <= edge).sum(1)).tolist()
        if self.raw:
            found = [queries(*of_image) for of_image in zip(
                logits.numpy(), boxes.numpy(), loose.numpy(), strict=True)]
        else:
            found = self._detections(logits, boxes, loose, inputs.shape[2:], sizes)
        pairs = [(one, other) for one, other in (
            (kept - 1, kept), (kept - 2, kept), (kept - 1, kept + 1)) if other < scores.shape[1]]
        return [Right(rows, swaps=swaps, others=[
            (one, other) for one, other in pairs if own[one] - own[other] <= edge])
            for rows, swaps, own in zip(found, counts, scores, strict=True)]

    def _detections(self, logits: Tensor, boxes: Tensor, loose: Tensor, shape: Sequence[int],
                    sizes: np.ndarray) -> list[Rows]:
        """Rows of detections as :meth:`RTDETRHead.predict_by_feat` makes them."""
        sides = np.asarray(shape[::-1], np.float32)
        found = self.model.bbox_head.predict_by_feat(logits, boxes, [
            dict(img_shape=tuple(shape), batch_input_shape=tuple(shape), scale_factor=sides / size)
            for size in sizes])
        # The same choice once more, for the query of each.
        keep = len(found[0].scores)
        query = logits.sigmoid().flatten(1).topk(keep).indices // logits.shape[2]
        return [detections(each.labels.numpy(), each.bboxes.numpy(), each.scores.numpy(), *of_image)
                for each, *of_image in zip(found, sizes, loose.gather(1, query).numpy(),
                                           strict=True)]


def raise_picks(x: Tensor, picks: np.ndarray) -> Tensor:
    """Make channels (N, 1, H, W) the strongest of a map (N, C, H, W) where they nearly are."""
    picks, strongest = torch.from_numpy(picks).long(), x.amax(1, keepdim=True)
    own = x.gather(1, picks)
    near = (x.argmax(1, keepdim=True) != picks) & (strongest - own <= PICK * x.std())
    return x.scatter(1, picks, torch.where(
        near, strongest.nextafter(torch.full_like(strongest, torch.inf)), own))


def queries(logits: np.ndarray, boxes: np.ndarray, loose: np.ndarray | bool = False) -> Rows:
    """Make rows of the logits (Q, classes) and boxes (Q, 4) (cx, cy, w, h; 0 to 1) of a picture."""
    return Rows(logits, boxes, np.zeros(len(boxes), int), expit(logits.max(1)),
                np.broadcast_to(loose, len(boxes)))


def detections(labels: np.ndarray, boxes: np.ndarray, scores: np.ndarray, size: Sequence[int],
               loose: np.ndarray | bool = False) -> Rows:
    """Make rows of the detections of a picture of a width and height, `boxes` in its pixels."""
    return Rows(scores[:, None], boxes / np.tile(np.asarray(size, float), 2), labels, scores,
                loose | (scores - scores.min() <= EDGE))


def compare_rows(right: Rows, found: Rows, swaps: int, raw: bool, slack: float = 1.
                 ) -> Difference:
    """Match rows and compare them.

    Args:
        right: Those of the model.
        found: Those of the file.
        swaps: How many boxes of `found` may belong to queries that the model did not select.
        raw: Whether rows are queries.
        slack: How many times as large the bounds are.
    """
    if not all(np.isfinite(part).all() for part in found):
        return Difference(np.inf, np.inf, fault=INFINITE)
    scores = right.scores[:, None]
    bounds = slack * (LOGITS if raw else LOGITS * scores * (1 - scores) + 1e-6)
    values = cdist(right.values, found.values, 'chebyshev')
    boxes = cdist(right.boxes, found.boxes, 'chebyshev')
    # Times the bound; nobody is of another class.
    distance = np.maximum(values / bounds, boxes / (slack * BOXES))
    distance[right.labels[:, None] != found.labels] = 1e9
    # No row that has its partner is given another one to mend what is far apart anyway.
    own, partner = linear_sum_assignment(distance.clip(max=100))
    good = distance[own, partner] <= 1
    result = Difference(
        values[own, partner][good].max(initial=0), boxes[own, partner][good].max(initial=0),
        len(good), int((~good).sum()), slack=slack,
        excess=slack * distance[own, partner][good | ~right.loose[own]].max(initial=0))
    if good.all():
        return result

    own, partner = own[~good], partner[~good]
    nearest = linear_sum_assignment(distance[np.ix_(own, partner)])
    own, partner = own[nearest[0]], partner[nearest[1]]
    entered = partner[~found.loose[partner]]
    excess = len(np.unique(found.boxes[entered], axis=0)) > swaps
    wrong = ~right.loose[own] | (~found.loose[partner] if excess else False)
    if not wrong.any():
        return result
    first = np.flatnonzero(wrong)[distance[own, partner][wrong].argmax()]
    own, partner = own[first], partner[first]
    what = 'query' if raw else 'detection'
    kind = 'logits' if raw else 'scores'
    if right.labels[own] != found.labels[partner]:
        problem = (f'has no partner: the nearest that is left is of class {found.labels[partner]}, '
                   f'not {right.labels[own]}')
    else:
        problem = (f'differs from its nearest partner by {values[own, partner]:.2g} in {kind} '
                   f'(bound {np.broadcast_to(bounds, values.shape)[own, partner]:.2g}) and by '
                   f'{boxes[own, partner]:.2g} of the image in its box (bound {slack * BOXES:g})')
    result.fault = (f'{what} {own} of {len(right.boxes)}, of score {right.scores[own]:.3f}, '
                    f'{problem}; {count(int(wrong.sum()), "row")} of this kind')
    return result


def compare_logits(right: np.ndarray, found: np.ndarray, largest: float, slack: float = 1.
                   ) -> Difference:
    """Compare logits, or logarithms of scores, (classes,) of a picture.

    Args:
        right: Those of the model.
        found: Those of the file.
        largest: The largest logit, as a number without its sign.
        slack: How many times as large the bound is.
    """
    if not np.isfinite(found).all():
        return Difference(np.inf, fault=INFINITE)
    bound, difference = slack * CLASS_LOGITS * largest, np.abs(right - found)
    # In the order of the file; where it is another, equals may have changed places.
    best = right[np.argsort(-found, kind='stable')[:5]]
    top5 = bool(np.abs(best - np.sort(right)[::-1][:5]).max() <= bound / 10)
    result = Difference(float(difference.max()), top5=top5, slack=slack,
                        excess=slack * float(difference.max()) / bound)
    if result.values > bound:
        result.fault = (f'the logit of class {difference.argmax()} differs by '
                        f'{result.values:.2g} (bound {bound:.2g})')
    elif not top5:
        result.fault = 'the five best classes are others, or in another order'
    return result


def check_file(reference: Reference, run: Run, pictures: Pictures, metadata: Mapping[str, Any],
               find: Find | None = None) -> dict[str, Any]:
    """Compare a file with its model.

    Pictures go through in batches of 1, 2 and 5 where the batch is free, and two more sizes follow
    where the size is. In float32 the first picture that is beyond a bound ends it; lower precisions
    have no bounds, see :func:`measure`.

    Args:
        reference: The model.
        run: Runs the file, as :meth:`Runtime.run` does.
        pictures: What to compare them on.
        metadata: Of the file.
        find: Says what the file's CMixers pick; None for what cannot be asked.

    Returns:
        What was found, fit for JSON.

    Raises:
        CheckError: A float32 file is wrong.
    """
    dynamic, size = metadata['input']['dynamic'], tuple(metadata['input']['size'])
    result = dict(pictures=pictures.source, reference=f'torch {torch.__version__}, as trained, '
                  'eager, float32', precision=metadata['precision'])
    batches = _split(len(pictures.images), 'batch' in dynamic)
    if metadata['precision'] != 'fp32':
        return result | measure(reference, run, pictures, batches, size)
    plan = [(size, batch) for batch in batches]
    if 'size' in dynamic:
        plan += [(other, range(min(2 if 'batch' in dynamic else 1, len(pictures.images))))
                 for other in _other_sizes(size, metadata['input'].get('min_size', 32))]
    compared = 'logits' if reference.raw or not reference.detects else 'scores'
    rows = {}
    for shape, batch in plan:
        row = rows.setdefault((len(batch), shape), {
            'batch': len(batch), 'size': list(shape), 'pictures': 0, 'slack': 1., 'picks': 0,
            compared: 0., **(dict(boxes=0., detections=0, ties=0) if reference.detects else {})})
        for place, difference in zip(batch, _compare(reference, run, pictures, batch, shape, find),
                                     strict=True):
            if difference.fault:
                raise CheckError(
                    f'the file does not compute what the model computes: {pictures.names[place]}, '
                    f'batch of {len(batch)}, {shape[0]}x{shape[1]} pixels: {difference.fault}')
            row['pictures'] += 1
            row['slack'] = max(row['slack'], difference.slack)
            row['picks'] += difference.picks
            row[compared] = max(row[compared], float(difference.values))
            if reference.detects:
                row['boxes'] = max(row['boxes'], float(difference.boxes))
                row['detections'] += difference.rows
                row['ties'] += difference.ties
    bounds = (dict(logits=f'{CLASS_LOGITS:g} of the largest') if not reference.detects else
              {compared: f'{LOGITS:g}' if reference.raw else f'{LOGITS:g} s (1 - s)',
               'boxes': f"{BOXES:g} of the image's sides",
               'ties': f'within {EDGE:g} of the edge of a choice'})
    return result | dict(bounds=bounds, rows=[*rows.values()])


def measure(reference: Reference, run: Run, pictures: Pictures, batches: Sequence[Sequence[int]],
            size: tuple[int, int]) -> dict[str, Any]:
    """Say how far a file of lower precision is from its model.

    Returns:
        `relative_rms` of the logits, of rows that were matched; for a detector, how many
        `detections` there are and the share `kept` that has a partner of the same class at an IoU
        of 0.9; for a classifier, the share of pictures with the same `top1`.

    Raises:
        CheckError: There are numbers that are not finite.
    """
    errors, squares, kept, total = [], [], [], 0
    for batch in batches:
        images, sizes = _batch(pictures, batch, size)
        found = _read(reference, run(images, sizes), sizes)
        for place, right, other in zip(batch, reference(images, sizes), found, strict=True):
            one = right.rows
            if not np.isfinite(other.values if reference.detects else other).all():
                raise CheckError(f'{pictures.names[place]}: {INFINITE}; keep to float32')
            if reference.detects:
                kept += _find_partners(one, other, reference.raw).tolist()
                one, other = _match_logits(one, other, reference.raw)
            else:
                # Scores say their logits up to a constant.
                one, other = one - one.mean(), other - other.mean()
                kept.append(bool(one.argmax() == other.argmax()))
            errors.append(np.square(one - other).sum())
            squares.append(np.square(one).sum())
            total += 1
    result = dict(images=total, relative_rms=float(np.sqrt(sum(errors) / sum(squares))))
    share = float(np.mean(kept))
    return result | (dict(detections=len(kept), kept=share) if reference.detects
                     else dict(top1=share))


def count_flips(reference: Reference, find: BareRun, pictures: Pictures, size: tuple[int, int]
                ) -> dict[str, Any] | None:
    """Count the positions whose strongest channel is another one than in the model.

    Args:
        reference: The model.
        find: Gives what each argmax of the file picks, see :func:`open_bare`.
        pictures: On what.
        size: Height and width of the images.

    Returns:
        The share of positions, of `all` CMixers and of `each`; None for a model without, or a file
        that has another number of argmax.
    """
    flips, positions = 0, 0
    for place in range(len(pictures.images)):
        images, sizes = _batch(pictures, [place], size)
        right, found = reference.strongest(images, sizes), find(images, sizes)
        if not right or [each.size for each in right] != [each.size for each in found]:
            return None
        flips = flips + np.array([(one.ravel() != other.ravel()).sum()
                                  for one, other in zip(right, found, strict=True)])
        positions = positions + np.array([one.size for one in right])
    return dict(all=float(flips.sum() / positions.sum()),
                each=[*map(float, np.round(flips / positions, 6))])


def check_export(model: nn.Module, run: Run, metadata: Mapping[str, Any], pictures: Pictures,
                 path: str | Path, float32: str | Path | None = None) -> dict[str, Any]:
    """Check a file that was exported.

    Args:
        model: What it was made of, in the form that it was trained in.
        run: Runs the file.
        metadata: Of the file, as a dict.
        pictures: See :func:`find_pictures`.
        path: The file; what argmax picks is looked for in .onnx and .xml.
        float32: An ONNX file of the same model in float32, to compare times with in the same
            library; None for none.

    Returns:
        What was found, fit for JSON: the metadata's `check`.

    Raises:
        CheckError: A float32 file is wrong.
    """
    precision, size = metadata['precision'], tuple(metadata['input']['size'])
    reference = Reference(model, metadata)
    library = {'.onnx': 'onnxruntime', '.xml': 'openvino'}.get(Path(path).suffix)
    find = library and cache(partial(open_bare, path, library, precision, argmax=True))
    result = check_file(reference, run, pictures, metadata,
                        find and (lambda *given: find()(*given)))
    if precision == 'fp32' or find is None:
        return result
    if library == 'openvino':
        result['computed_in'] = computed_in(precision)
    result['flips'] = count_flips(reference, find(), pictures, size)
    if float32 is not None:
        given = _batch(pictures, [0], size)
        times = race([partial(each, *given) for each in (open_bare(float32, library), run)])
        result['milliseconds'] = dict(zip(('fp32', precision), times, strict=True))
    return result


def print_check(result: Mapping[str, Any]) -> str:
    """Write what a check found as tables for people."""
    head = f"Compared with {result['reference']} on {result['pictures']}.\n\n"
    if 'rows' in result:
        bounds = join(f'{name} {value}' for name, value in result['bounds'].items())
        head += f'Bounds: {bounds}.\n\n'
        slack = max(row['slack'] for row in result['rows'])
        if slack > 1:
            head += (f'So sensitive is the model that float32 rounding takes it near them: the '
                     f'file is within {slack:.1f} times the bounds of float64, no more than '
                     f'{ROUNDING:g} times as far as PyTorch is.\n\n')
        left_out = {'slack'} if any(row['picks'] for row in result['rows']) else {'slack', 'picks'}
        rows = [{key: value for key, value in row.items() if key not in left_out}
                for row in result['rows']]
        table = [[f'{value:.1e}' if isinstance(value, float) else
                  'x'.join(map(str, value if isinstance(value, list) else [value]))
                  for value in row.values()] for row in rows]
        return head + markdown([[*rows[0]], *table]) + _warn_of_ties(result['rows'])
    precision = computed = result['precision']
    if (found := result.get('computed_in', computed)) != computed:
        computed = f'{precision}, but computed in {found}: this processor has no {precision}'
    rows = [['precision', computed],
            ['relative RMS of the logits', f"{result['relative_rms']:.2g}"]]
    if 'kept' in result:
        rows.append(['detections with a partner (class, IoU 0.9)',
                     f"{100 * result['kept']:.1f} % of {result['detections']}"])
    else:
        rows.append(['same class first', f"{100 * result['top1']:.1f} % of {result['images']}"])
    if result.get('flips'):
        rows.append(['positions with another strongest channel',
                     f"{100 * result['flips']['all']:.2f} %"])
    if times := result.get('milliseconds'):
        rows.append(['ms a picture', f"{times[precision]:.1f}; in float32 {times['fp32']:.1f}"])
    return (f'{head}{markdown([["", ""], *rows])}\n'
            'Accuracy on data with labels: spartan-mm test CONFIG FILE')


def _warn_of_ties(rows: Sequence[Mapping[str, Any]]) -> str:
    ties, total = (sum(row.get(name, 0) for row in rows) for name in ('ties', 'detections'))
    if ties <= total * TIES:
        return ''
    return (f'\nWARNING: {100 * ties / total:.0f} % of the rows were not compared, because their '
            'scores are equal up to rounding at the edge of a choice. This is what weights do that '
            'were not trained: check the file with trained ones')


def _compare(reference: Reference, run: Run, pictures: Pictures, batch: Sequence[int],
             shape: tuple[int, int], find: Find | None) -> list[Difference]:
    """Compare the pictures of a batch."""
    images, sizes = _batch(pictures, batch, shape)
    found = _read(reference, run(images, sizes), sizes)
    picked = cache(lambda: find(images, sizes) if find else [])
    return [_compare_one(reference, *each, images[place:place + 1], sizes[place:place + 1],
                         lambda place=place: [own[place:place + 1] for own in picked()])
            for place, each in enumerate(zip(reference(images, sizes), found, strict=True))]


def _compare_one(reference: Reference, right: Right, found: Rows | np.ndarray, image: np.ndarray,
                 size: np.ndarray, find: Callable[[], Sequence[np.ndarray]]) -> Difference:
    shapes = [np.shape(each.values if reference.detects else each) for each in (right.rows, found)]
    if shapes[0] != shapes[1]:
        return Difference(np.inf, fault=f'the output is {shapes[1]}, where {shapes[0]} is right')
    first = reference.compare(right, found)
    if not first.fault:
        return first
    picks, own, flips = find(), reference.strongest(image, size), 0
    if [each.shape for each in picks] != [each.shape for each in own]:
        picks = ()
    elif flips := sum(int((one != other).sum()) for one, other in zip(picks, own, strict=True)):
        right, = reference(image, size, picks=picks)

    def search(reference: Reference, right: Right) -> Difference | None:
        # Queries attend to each other: with one that is another, all are.
        for swap in (None, *right.others):
            rows = right if swap is None else reference(image, size, swap, picks)[0]
            difference = reference.compare(rows, found)
            if not difference.fault:
                return replace(difference, ties=difference.ties + bool(swap), picks=flips)
        return None

    if difference := search(reference, right):
        return difference
    exact = reference.in_float64()
    slack = ROUNDING * reference.compare(exact(image, size, picks=picks)[0], right.rows).excess
    if 1 < slack <= MOST_SLACK:
        exact.slack = slack
        return search(exact, exact(image, size, picks=picks)[0]) or first
    return first


def _read(reference: Reference, outputs: Mapping[str, np.ndarray], sizes: np.ndarray
          ) -> list[Rows | np.ndarray]:
    """Read the outputs of a file, for each picture."""
    if not reference.detects:
        return [*(outputs['logits'] if reference.raw else _log(outputs['scores']))]
    if reference.raw:
        return [*map(queries, outputs['logits'], outputs['boxes'])]
    return [*map(detections, outputs['labels'], outputs['boxes'], outputs['scores'], sizes)]


def _batch(pictures: Pictures, places: Sequence[int], shape: tuple[int, int]
           ) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, H, W) of a shape, and the sizes (N, 2) of their originals."""
    return (np.stack([resized(pictures.images[place], shape) for place in places]),
            np.array([pictures.sizes[place] for place in places], np.int64))


def _split(number: int, free: bool) -> list[list[int]]:
    """Split so many pictures into batches of 1, 2 and 5 in turns, or of 1.

    Too few for that go through more than once.
    """
    if not free:
        return [[place] for place in range(number)]
    batches, places = [], [place % number for place in range(max(number, 8))]
    while places:
        size = (1, 2, 5)[len(batches) % 3]
        batches.append(places[:size])
        del places[:size]
    return batches


def _other_sizes(size: tuple[int, int], least: int) -> list[tuple[int, int]]:
    """Two more sizes, of whole multiples of 32: one that is flatter, one that is wider."""
    height, width = (side // 32 * 32 for side in size)
    flatter, wider = height - max(32, height // 128 * 32), width + max(32, width // 128 * 32)
    return [(flatter if flatter >= least else height + 64, width), (height, wider)]


def _match_logits(right: Rows, found: Rows, raw: bool) -> tuple[np.ndarray, np.ndarray]:
    """The logits of rows and of their nearest partners."""
    distance = cdist(right.boxes, found.boxes, 'chebyshev') + np.abs(
        right.scores[:, None] - found.scores) + (right.labels[:, None] != found.labels)
    own, partner = linear_sum_assignment(distance)
    pair = right.values[own], found.values[partner]
    return pair if raw else tuple(logit(np.clip(scores, 1e-6, 1 - 1e-6)) for scores in pair)


def _find_partners(right: Rows, found: Rows, raw: bool) -> np.ndarray:
    """Whether each detection has one of the same class at an IoU of at least 0.9."""
    chosen = right.scores >= SCORE
    if not chosen.any():
        chosen = np.argsort(-right.scores)[:BEST]
    corners = [_corners(rows.boxes) if raw else rows.boxes for rows in (right, found)]
    labels = [rows.values.argmax(1) if raw else rows.labels for rows in (right, found)]
    same = labels[0][chosen][:, None] == labels[1]
    return (same & (_overlaps(corners[0][chosen], corners[1]) >= 0.9)).any(1)


def _corners(boxes: np.ndarray) -> np.ndarray:
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    return np.concatenate([centre - half, centre + half], 1)


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU (N, M) of boxes (N, 4) and (M, 4)."""
    sides = (np.minimum(boxes[:, None, 2:], others[:, 2:])
             - np.maximum(boxes[:, None, :2], others[:, :2])).clip(min=0)
    areas = [(each[:, 2:] - each[:, :2]).prod(1) for each in (boxes, others)]
    both = sides.prod(2)
    return both / (areas[0][:, None] + areas[1] - both).clip(min=1e-12)


def _log(scores: np.ndarray) -> np.ndarray:
    return np.log(np.clip(scores, 1e-30, None))
