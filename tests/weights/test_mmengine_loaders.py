"""mmengine reads through our reader, whatever the address."""
import pytest
from mmengine.runner import CheckpointLoader, checkpoint

from spartan_mm.weights import mmengine_loaders as ours


def test_every_scheme_of_mmengine_is_safe():
    # They find the address and call `load_from_http`.
    indirect = {checkpoint.load_from_torchvision, checkpoint.load_from_openmmlab,
                checkpoint.load_from_mmcls}
    assert set(CheckpointLoader._schemes.values()) == indirect | {
        ours.load_from_local, ours.load_from_http, ours.refuse_scheme}
    assert checkpoint.load_from_http is ours.load_from_http


def test_a_store_that_is_not_read():
    with pytest.raises(RuntimeError, match='s3://a.pth is refused: .* download it'):
        CheckpointLoader.load_checkpoint('s3://a.pth')
