"""The heads of a model, and of its config; the classes of datasets."""
from types import SimpleNamespace

from torch import nn

from spartan_mm.datasets.classes import classes_of, find_heads, find_parts


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


def test_what_a_users_dataset_reads_from_is_no_dataset_of_its_own():
    names = SimpleNamespace(metainfo=dict(classes=('disc', )), dataset=[1, 2])
    assert find_parts(names) == [names] and classes_of(names, 'loader') == ('disc', )
    wrapper = SimpleNamespace(dataset=names)
    assert find_parts(wrapper) == [names]
    assert classes_of(SimpleNamespace(metainfo=None), 'loader') is None
