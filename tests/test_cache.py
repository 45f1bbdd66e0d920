from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dataset.cache import Memory, sample_reader
from dataset.lists import read_sample, read_splits, with_pseudo_masks
from dataset.loader import SampleKey
from utils.config.reading import read_config
from utils.config.schema import DatasetSection
from utils.errors import UserError
from utils.run.stages import Run

KEYS = [[SampleKey(0, 0), SampleKey(0, 1)], [SampleKey(1, 3), SampleKey(0, 2)]]


def test_memory_holds_what_the_files_hold(splits):
    read = sample_reader("ram", splits.labeled, threads=3)
    for sample in splits.labeled:
        for ours, theirs in zip(read(sample), read_sample(sample), strict=True):
            assert ours.mode == theirs.mode
            assert np.array_equal(ours, theirs)
    assert sample_reader(None, splits.labeled, threads=3) is read_sample


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_share_the_memory_and_give_the_same_batches(retrain, querier, start, splits):
    if start not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"this system does not {start}")
    expected = list(DataLoader(retrain, batch_sampler=KEYS))
    memory = Memory(splits.val + splits.labeled, 2)
    spoilt = with_pseudo_masks(splits.val, splits.val[0].image / "nowhere")  # by name alone
    query = replace(querier, read=memory).draw
    cached = replace(retrain, unlabeled=spoilt, query=query, read=memory)
    loader = DataLoader(cached, batch_sampler=KEYS, num_workers=1, multiprocessing_context=start)
    for ours, theirs in zip(loader, expected, strict=True):
        assert all(map(torch.equal, ours[:-1], theirs[:-1]))
        assert all(map(torch.equal, ours.queried, theirs.queried))


def test_block_that_the_system_refuses_is_told_in_one_line(splits, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("unable to allocate\nshared memory")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    with pytest.raises(
        UserError, match=r"^cache: .*0\.00 GB .*unable to allocate shared memory\); set cache"
    ):
        Memory(splits.labeled, 1)


def test_unreadable_picture_ends_the_filling_in_one_line(demo_copy):
    splits = read_splits(DatasetSection(kind="demo", root=str(demo_copy)))
    image = splits.labeled[2].image
    image.write_bytes(image.read_bytes()[:600])
    with pytest.raises(UserError, match=rf"^{image}: cannot read this picture"):
        Memory(splits.labeled, 2)


def test_cache_may_change_between_the_stages_of_a_run(demo_overrides):
    plain, cached = (
        read_config("demo.yaml", [*demo_overrides, f"cache={value}"]) for value in ("null", "ram")
    )
    with Run(plain) as run:
        run.stage("1_supervised", lambda _: {})
    assert Run(cached).stages == {}  # not refused
