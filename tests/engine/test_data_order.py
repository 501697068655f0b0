"""The random numbers of a training item depend on its place in the run, and on nothing else."""

import pickle
import random

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler
from torch.testing import assert_close
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from spartan_mm.engine import data_order
from spartan_mm.engine.data_order import PlacedDataset, place_batches


class Drawing(Dataset):
    """Its items are their index and a number from each generator."""

    metainfo = dict(classes=('a', 'b'))
    pipeline = 'first'

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()])


class Endless(IterableDataset):
    def __iter__(self):
        return iter([torch.zeros(1)])


def make_loader(seed=3, workers=0, batch_sampler=False, **settings):
    dataset = Drawing()
    sampler = DefaultSampler(dataset, shuffle=True, seed=0)
    order = (dict(batch_sampler=BatchSampler(sampler, 2, False)) if batch_sampler else
             dict(sampler=sampler, batch_size=2))
    loader = DataLoader(dataset, num_workers=workers, **order, **settings)
    place_batches(loader, seed)
    return loader


def read(loader, epoch=0, first=0):
    loader.sampler.set_epoch(epoch) if hasattr(loader.sampler, 'set_epoch') else None
    loader.batch_sampler.epoch, loader.batch_sampler.first = epoch, first
    return list(loader)


@pytest.mark.parametrize('workers', [0, 2])
def test_the_rest_of_an_epoch_is_the_same_from_any_batch_on(workers):
    whole = read(make_loader())
    assert len(whole) == len(make_loader()) == 4
    assert sorted(torch.cat(whole)[:, 0].tolist()) == list(range(7))
    assert_close(read(make_loader(workers=workers), first=1), whole[1:], rtol=0, atol=0)
    assert read(make_loader(), first=4) == []


def test_workers_that_stay_know_the_epoch():
    loader = make_loader(workers=1, persistent_workers=True)
    assert_close([read(loader, epoch) for epoch in range(2)],
                 [read(make_loader(), epoch) for epoch in range(2)], rtol=0, atol=0)


def test_batch_samplers_of_other_kinds():
    loader = make_loader(batch_sampler=True)
    assert_close(read(loader), read(make_loader()), rtol=0, atol=0)
    assert loader.batch_sampler.batch_size == 2  # the wrapped one's


def test_every_place_draws_its_own_numbers(monkeypatch):
    def numbers(epoch=0, **settings):
        return {row[column].item() for row in torch.cat(read(make_loader(**settings), epoch))
                for column in (1, 2, 3)}

    runs = [numbers(), numbers(epoch=1), numbers(seed=4)]
    monkeypatch.setattr(data_order, 'get_rank', lambda: 1)
    runs.append(numbers())
    assert len(set.union(*runs)) == 4 * 7 * 3


def test_an_item_that_comes_twice_is_drawn_twice():
    dataset = PlacedDataset(Drawing(), 3, 0)
    first, second, again = (dataset[5, place, ()] for place in [(0, 0, 0), (0, 0, 1), (0, 0, 0)])
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


def test_the_training_s_own_numbers_are_not_touched():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    def seed():
        random.seed(0), np.random.seed(0), torch.manual_seed(0)

    seed()
    expected = draw()
    for workers in (0, 1):
        seed()
        read(make_loader(workers=workers))
        assert draw() == expected


def test_the_dataset_is_reached_through_the_loader():
    loader = make_loader()
    assert loader.dataset.metainfo == Drawing.metainfo
    loader.dataset.pipeline = 'second'  # as hooks do that switch the pipeline
    assert loader.dataset.dataset.pipeline == 'second'
    assert loader.sampler.dataset is loader.dataset.dataset
    assert not hasattr(loader.dataset, 'missing')
    assert pickle.loads(pickle.dumps(loader.dataset)).pipeline == 'second'


@pytest.mark.parametrize('loader', [DataLoader(Endless()), DataLoader(Drawing(), batch_size=None)])
def test_loaders_without_an_order_stay(loader):
    dataset, order = loader.dataset, loader.batch_sampler
    place_batches(loader, 0)
    assert (loader.dataset, loader.batch_sampler) == (dataset, order)
