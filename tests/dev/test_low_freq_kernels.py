"""The table of low-frequency kernels: its data, a training, its rows."""
import torch
from low_freq_kernels import Classifier, count, load_digits, make_table, train
from torch.testing import assert_close


def test_digits_to_learn_from_and_to_test_on_are_others():
    data = load_digits()
    (images, labels), (others, _) = data['train'], data['test']
    assert (len(images), len(others)) == (359, 1438) and images.shape[1:] == (3, 48, 48)
    assert labels.bincount().min() > 30
    assert torch.cdist(images[:, 0].flatten(1), others[:, 0].flatten(1)).min() > 0


def test_a_training_learns():
    data = {split: (images[::4], labels[::4]) for split, (images, labels) in load_digits().items()}
    assert train('dcls', 0, 1, data | dict(test=data['train'])) >= 5


def test_rows():
    sizes = {kernel: count(kernel) for kernel in (3, 'dcls')}
    assert sizes[3].parameters == sizes['dcls'].parameters == sum(
        p.numel() for p in Classifier(3).parameters())
    text = make_table({3: [90., 92.], 'dcls': [91.]}, sizes)
    assert '| stacked 3x3 | `3` |' in text and '| 91.00 ± 1.41 |' in text
    assert "| DCLS, bilinear | `'dcls'` |" in text and '| 91.00 |' in text
    assert_close(float(text.split('|')[-3]), sizes['dcls'].multiply_adds / 1e6, rtol=0, atol=0.005)
