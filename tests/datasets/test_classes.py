"""The heads of a model, and of its config."""
from torch import nn

from spartan_mm.datasets.classes import find_heads


class Part(nn.Module):

    def __init__(self, num_classes, **children):
        super().__init__()
        self.num_classes = num_classes
        for name, child in children.items():
            self.add_module(name, child)


def test_heads_of_a_model_and_of_its_config():
    boxes = [dict(type='Part', num_classes=3), dict(type='Part', num_classes=7)]
    config = dict(backbone=dict(type='Part', num_classes=9), rpn_head=dict(num_classes=1),
                  roi_head=dict(bbox_head=boxes, mask_head=dict(type='Part', num_classes=5)))
    model = Part(None, backbone=Part(9), rpn_head=Part(1), roi_head=Part(
        None, bbox_head=nn.ModuleList([Part(3), Part(7)]), mask_head=Part(5)))
    heads = [('roi_head.bbox_head.0', 'Part', 3), ('roi_head.bbox_head.1', 'Part', 7),
             ('roi_head.mask_head', 'Part', 5)]
    assert list(find_heads(config)) == list(find_heads(model)) == heads
