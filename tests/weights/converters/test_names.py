"""Names of several tensors."""
import torch

from spartan_mm.weights.converters.names import rename, rename_back


def test_names_of_several_tensors_are_joined_and_split():
    names = dict(joint=['a', 'b', 'c'], single=['d'])
    foreign = {name: torch.randn(4, 2) for name in 'abcd'}
    ours = rename(foreign, names)
    assert ours['joint'].shape == (12, 2)
    back = rename_back(ours, names)
    torch.testing.assert_close(back, foreign, rtol=0, atol=0)
    # safetensors refuses tensors that share memory.
    assert len({tensor.untyped_storage().data_ptr() for tensor in back.values()}) == 4
