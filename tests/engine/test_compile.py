import pytest
import torch
from mmengine.registry import HOOKS
from torch import nn

from spartan_mm.engine import compile_model


class Detector(nn.Module):
    """Parts as a detector's."""

    def __init__(self):
        super().__init__()
        self.backbone, self.neck, self.head = (nn.Linear(2, 2) for _ in range(3))


def compiled(model):
    return [name for name, part in model.named_modules() if part._compiled_call_impl is not None]


def test_parts_are_compiled_in_place():
    model = Detector()
    names = list(model.state_dict())
    compile_model(model)
    assert compiled(model) == ['backbone', 'neck']
    assert list(model.state_dict()) == names


def test_a_backbone_is_its_own_part():
    model = nn.Linear(2, 2)
    compile_model(model, dynamic=True)
    assert compiled(model) == ['']


def test_a_model_may_know_its_own_parts():
    class Own(Detector):
        def compile(self, mode, dynamic):
            self.asked_for = mode, dynamic

    model = Own()
    compile_model(model, 'reduce-overhead', False)
    assert model.asked_for == ('reduce-overhead', False) and not compiled(model)


def test_hook_compiles_before_the_run():
    class Runner:
        model = Detector()

    HOOKS.build(dict(type='CompileHook')).before_run(Runner)
    assert compiled(Runner.model) == ['backbone', 'neck']


def test_unknown_mode_is_named():
    with pytest.raises(RuntimeError, match='fastest'):
        compile_model(Detector(), 'fastest')


def test_copies_are_not_compiled():
    import copy
    model = nn.Linear(2, 2)
    compile_model(model)
    assert not compiled(copy.deepcopy(model))
    assert torch.is_tensor(copy.deepcopy(model)(torch.ones(2)))
