"""Box edges as probability distributions over distances, and how they become boxes.

Source: `D-FINE <https://arxiv.org/abs/2410.13842>`_, section 4.1, equations 2 to 4. Everything here
is computed in float32, whatever the input's type: distances reach 4, where float16 has steps of
0.004, 0.05 % of a box' side.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from .shape_cache import cached_by_shape


@cached_by_shape
def edge_distances(reg_max: int, reg_scale: float, half: float = 0.5,
                   device: torch.device | None = None) -> Tensor:
    """W(n) of the paper: how far outwards each bin moves an edge, dense around 0.

    Args:
        reg_max: Number of the last bin, even; R below.
        reg_scale: A distance of so much is the box' whole side.
        half: Distance of the bins 1 and R - 1, as a share of the box' side.
        device: Where the result lies.

    Returns:
        (R + 1,), from -2 c to 2 c for c = `half` * `reg_scale`, 0 in the middle.
    """
    farthest, middle = half * reg_scale, reg_max // 2
    base = (farthest + 1) ** (2 / (reg_max - 2))
    outwards = [base ** step - 1 for step in range(1, middle)] + [2 * farthest]
    return torch.tensor([-step for step in reversed(outwards)] + [0., *outwards], device=device)


def refined_boxes(base: Tensor, corners: Tensor, reg_scale: float) -> Tensor:
    """The boxes that distributions make of others.

    An edge whose distance is 0 stays where it is.

    NOTE: As officially a box may leave the image, and both sides of an edge may swap: width and
    height of such a box are negative.

    Args:
        base: (..., 4), boxes (cx, cy, w, h).
        corners: (..., 4 * (R + 1)), logits of the distances of the left, top, right and bottom
            edge.
        reg_scale: See :func:`edge_distances`.

    Returns:
        (..., 4), boxes (cx, cy, w, h), float32.
    """
    corners = corners.unflatten(-1, (4, -1)).float()
    steps = edge_distances(corners.shape[-1] - 1, reg_scale, device=corners.device)
    # NOTE: Not a matrix product, which autocast computes in float16 as the official code does.
    distances = (corners.softmax(-1) * steps).sum(-1)
    low, high = (0.5 * reg_scale + distances).chunk(2, -1)
    center, size = base.float().chunk(2, -1)
    unit = size / reg_scale
    first, last = center - low * unit, center + high * unit
    return torch.cat([(first + last) / 2, last - first], -1)


def edge_labels(base: Tensor, targets: Tensor, reg_max: int,
                reg_scale: float) -> tuple[Tensor, Tensor]:
    """Between which bins the edges of other boxes lie.

    Args:
        base: (..., 4), boxes (cx, cy, w, h) that are to be refined.
        targets: (..., 4), boxes (x1, y1, x2, y2) that they are to become.
        reg_max: See :func:`edge_distances`.
        reg_scale: See there.

    Returns:
        For the left, top, right and bottom edge the number n of the bin on the one side, (..., 4),
        below `reg_max`, and the share of bin n + 1, (..., 4), 0 to 1. Edges beyond the outermost
        bins count as lying on these.
    """
    center, size = base.chunk(2, -1)
    first, last = targets.chunk(2, -1)
    unit = size / reg_scale + 1e-16
    outwards = torch.cat([center - first, last - center], -1)
    distances = outwards / torch.cat([unit, unit], -1) - 0.5 * reg_scale
    steps = edge_distances(reg_max, reg_scale, device=base.device)
    index = (steps <= distances[..., None]).sum(-1).sub(1).clamp(0, reg_max - 1)
    share = (distances - steps[index]) / (steps[index + 1] - steps[index])
    return index, share.clamp(0, 1)


def edge_statistics(corners: Tensor, most: int = 4) -> Tensor:
    """How sure the distributions are: the largest probabilities of each edge, and their mean.

    Args:
        corners: (..., 4 * (R + 1)), logits.
        most: Probabilities of each edge.

    Returns:
        (..., 4 * (most + 1)), float32.
    """
    largest = corners.unflatten(-1, (4, -1)).float().softmax(-1).topk(most, -1).values
    return torch.cat([largest, largest.mean(-1, keepdim=True)], -1).flatten(-2)


def localization_loss(corners: Tensor, index: Tensor, share: Tensor) -> Tensor:
    """Cross-entropy with both bins around each edge, by their shares.

    Args:
        corners: (..., 4 * (R + 1)), logits.
        index: (..., 4), see :func:`edge_labels`.
        share: (..., 4), likewise.

    Returns:
        (..., 4), float32.
    """
    log = corners.unflatten(-1, (4, -1)).float().log_softmax(-1)
    near, far = log.gather(-1, torch.stack([index, index + 1], -1).expand(
        *log.shape[:-1], 2)).unbind(-1)
    return -(1 - share) * near - share * far


def distillation_loss(corners: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """How far distributions are from a teacher's, softened: T^2 KL(teacher || student), by edge.

    Args:
        corners: (..., 4 * (R + 1)), logits.
        teacher: (..., 4 * (R + 1)), logits that get no gradient.
        temperature: T.

    Returns:
        (..., 4), float32.
    """
    student, teacher = (x.unflatten(-1, (4, -1)).float() / temperature
                        for x in (corners, teacher.detach().expand_as(corners)))
    return temperature ** 2 * F.kl_div(student.log_softmax(-1), teacher.softmax(-1),
                                       reduction='none').sum(-1)


def moved_distributions(corners: Tensor, base: Tensor, reg_scale: float, own_base: Tensor,
                        own_max: int, own_scale: float, temperature: float) -> Tensor:
    """The distributions of the same edges, as distances from the edges of another box.

    Each bin's probability goes to both bins of the other box around its place, by their shares, so
    that the mean place of an edge stays; places beyond the outermost bins go to these. Of equal
    boxes and bins nothing moves.

    Args:
        corners: (..., 4 * (R + 1)), logits.
        base: (..., 4), the boxes (cx, cy, w, h) that they refine.
        reg_scale: See :func:`edge_distances`.
        own_base: (..., 4), the other boxes.
        own_max: Number of their last bin.
        own_scale: Their `reg_scale`.
        temperature: Softens the distributions before they are moved.

    Returns:
        (..., 4 * (own_max + 1)), logits that need the same temperature; -inf where nothing went.
    """
    corners = corners.unflatten(-1, (4, -1)).float()  # (..., 4, R + 1)
    steps = edge_distances(corners.shape[-1] - 1, reg_scale, device=corners.device)
    center, size = base.float().unsqueeze(-2).chunk(2, -1)
    outwards = (steps + 0.5 * reg_scale)[:, None] * size / reg_scale  # (..., R + 1, 2)
    places = torch.cat([center - outwards, center + outwards], -1)
    index, share = (x.transpose(-1, -2) for x in edge_labels(
        own_base.float().unsqueeze(-2), places, own_max, own_scale))
    probabilities = (corners / temperature).softmax(-1)
    moved = corners.new_zeros(*corners.shape[:-1], own_max + 1)
    moved.scatter_add_(-1, index, probabilities * (1 - share))
    moved.scatter_add_(-1, index + 1, probabilities * share)
    return (temperature * moved.log()).flatten(-2)
