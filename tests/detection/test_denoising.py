import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmengine.structures import InstanceData
from torch.testing import assert_close

from spartan_mm.detection import DenoisingGenerator
from spartan_mm.detection.targets import gather_targets

OBJECTS = [(torch.tensor([1, 4, 0]), torch.tensor([[.5, .5, .2, .4], [.1, .9, .1, .1],
                                                   [.7, .2, .6, .3]])),
           (torch.tensor([], dtype=torch.long), torch.zeros(0, 4)),
           (torch.tensor([3]), torch.tensor([[.05, .5, .1, 1.]]))]


def targets_of(objects):
    """The ground truth of images with these labels and boxes."""
    return gather_targets([
        DetDataSample(metainfo=dict(img_shape=(1, 1)),
                      gt_instances=InstanceData(labels=labels, bboxes=bbox_cxcywh_to_xyxy(boxes)))
        for labels, boxes in objects])


TARGETS, EMPTY = targets_of(OBJECTS), targets_of([OBJECTS[1], OBJECTS[1]])


def noised_as_officially(targets, num_classes, num_queries, label_noise, box_noise):
    """Labels and boxes drawn step by step, in the order and shapes of the official code."""
    slots = max(len(labels) for labels, _ in targets)
    groups = max(1, num_queries // slots)
    labels = torch.full((len(targets), slots), num_classes, dtype=torch.int32)
    boxes = torch.zeros(len(targets), slots, 4)
    real = torch.zeros(len(targets), slots)
    for i, (image_labels, image_boxes) in enumerate(targets):
        labels[i, :len(image_labels)] = image_labels.int()
        boxes[i, :len(image_labels)] = image_boxes
        real[i, :len(image_labels)] = 1
    labels, boxes, real = (labels.tile(1, 2 * groups), boxes.tile(1, 2 * groups, 1),
                           real.tile(1, 2 * groups))
    negative = torch.zeros(len(targets), 2 * slots, 1)
    negative[:, slots:] = 1
    negative = negative.tile(1, groups, 1)

    change = torch.rand_like(labels, dtype=torch.float) < label_noise * 0.5
    new = torch.randint_like(real, 0, num_classes, dtype=torch.int32)
    labels = torch.where(change & real.bool(), new, labels)

    centre, size = boxes[..., :2], boxes[..., 2:]
    corners = torch.cat([centre - size / 2, centre + size / 2], -1)
    spread = size.tile(1, 1, 2) / 2 * box_noise
    sign = torch.randint_like(boxes, 0, 2) * 2.0 - 1.0
    amount = torch.rand_like(boxes)
    amount = (amount + 1) * negative + amount * (1 - negative)
    corners = (corners + amount * sign * spread).clamp(0, 1)
    low, high = corners.chunk(2, -1)
    boxes = torch.cat([(low + high) / 2, high - low], -1).clamp(0, 1)
    return labels, torch.log(boxes.clamp(min=1e-5) / (1 - boxes).clamp(min=1e-5)), groups


def test_equals_the_official_noise_number_by_number():
    generator = DenoisingGenerator(num_classes=5, embed_dims=8, num_queries=10)
    torch.manual_seed(3)
    labels, reference, groups = noised_as_officially(OBJECTS, 5, 10, 0.5, 1.)
    torch.manual_seed(3)
    denoising = generator(TARGETS, num_matching=4)
    assert (denoising.num_groups, denoising.num_slots) == (groups, 3) == (3, 3)
    assert_close(denoising.reference, reference)
    assert_close(denoising.content, generator.label_embedding(labels))


@pytest.mark.parametrize('most, groups', [(1, 100), (3, 33), (7, 14), (50, 2), (100, 1), (101, 1)])
def test_number_of_groups(most, groups):
    targets = targets_of([(torch.zeros(most, dtype=torch.long), torch.rand(most, 4))])
    denoising = DenoisingGenerator(80, 8)(targets, 300)
    assert denoising.num_groups == groups
    assert denoising.reference.shape == (1, 2 * groups * most, 4)


def test_positives_stay_within_half_a_box_and_negatives_go_beyond():
    box = torch.tensor([[.5, .5, .2, .2]])
    denoising = DenoisingGenerator(5, 8, 200, label_noise=0.)(
        targets_of([(torch.tensor([2]), box)]), 1)
    boxes = denoising.reference[0].sigmoid()
    corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
    moved = (corners - torch.tensor([.4, .4, .6, .6])).abs() / 0.1
    positive, negative = moved[0::2], moved[1::2]
    assert positive.max() <= 1 + 1e-4
    assert positive.mean() > 0.4
    # Negatives whose sides cross keep a width of zero at the crossing's centre: look at the others.
    plain = (boxes[1::2, 2:] > 0.01).all(1)
    assert plain.any() and negative[plain].min() >= 1 - 1e-3


def test_padding_is_a_tiny_box_in_the_corner_with_an_empty_label():
    denoising = DenoisingGenerator(5, 8, 3)(TARGETS, 4)
    assert_close(denoising.reference[1], torch.full((6, 4), -11.5129), rtol=1e-4, atol=0)
    assert not denoising.content[1].any()


def test_mask_hides_ground_truth_and_other_groups():
    mask = DenoisingGenerator.attention_mask(num_groups=2, group_size=2, num_matching=3)
    seen = ['1100111', '1100111', '0011111', '0011111', '0000111', '0000111', '0000111']
    assert_close(~mask, torch.tensor([[c == '1' for c in row] for row in seen]))


def test_empty_batch_keeps_the_graph():
    generator = DenoisingGenerator(5, 8, 100)
    denoising = generator(EMPTY, 4)
    assert (denoising.num_groups, denoising.num_slots) == (1, 1)
    assert denoising.reference.isfinite().all() and denoising.attn_mask.shape == (6, 6)
    denoising.content.sum().backward()
    assert not generator.label_embedding.weight.grad.any()


def test_no_denoising():
    """Switched off, or for an empty batch as in the first version."""
    assert DenoisingGenerator(5, 8, num_queries=0)(TARGETS, 4) is None
    generator = DenoisingGenerator(5, 8, skip_empty_batch=True)
    assert generator(EMPTY, 4) is None
    assert generator(TARGETS, 4) is not None
