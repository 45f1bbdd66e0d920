import pytest
import torch

from utils.errors import exit_with_one_line


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_memory_that_runs_out_is_told_with_what_takes_less(error, capsys):
    def program():
        raise error

    with pytest.raises(SystemExit) as ended:
        exit_with_one_line(program)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: memory: ")
    assert "raise supervised.accumulate and retrain.accumulate, or lower batch_size" in line


def test_an_error_of_ours_keeps_its_traceback():
    def program():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        exit_with_one_line(program)
