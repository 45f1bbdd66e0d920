import torch

from utils.spill import Spill


def test_rows_come_back_once_in_their_order_and_leave_nothing(tmp_path):
    spill = Spill(tmp_path / "rows", torch.device("cpu"))
    rows = [(["a", "b"], torch.randn(2, 3).bfloat16(), 7), (["c"], torch.ones(1).long(), 8)]
    for row in rows:
        spill.add(*row)
    back = list(spill)
    assert [(names, number) for names, _, number in back] == [(["a", "b"], 7), (["c"], 8)]
    assert all(torch.equal(one[1], other[1]) for one, other in zip(back, rows, strict=True))
    assert back[0][1].dtype == torch.bfloat16
    assert list(spill) == []
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_removed(tmp_path):
    Spill(tmp_path / "rows", torch.device("cpu")).add(torch.ones(1))
    assert list(tmp_path.iterdir())
    assert list(Spill(tmp_path / "rows", torch.device("cpu"))) == []
    assert not list(tmp_path.iterdir())
