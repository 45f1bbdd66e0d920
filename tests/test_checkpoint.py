import pytest
import torch
from torch import nn

from utils import checkpoint
from utils.errors import UserError


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


@pytest.mark.parametrize("wrap", [dict, lambda w: {"model": w, "epoch": 3}], ids=["bare", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_formats_of_the_family_load(tmp_path, wrap, prefix):
    source, net = network(), network()
    weights = {prefix + key: value for key, value in source.state_dict().items()}
    checkpoint.save(tmp_path / "net.pth", wrap(weights))
    checkpoint.load_weights(net, tmp_path / "net.pth")
    for ours, theirs in zip(net.state_dict().values(), source.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_weights_of_another_network_are_refused_and_change_nothing(tmp_path):
    other = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.Conv2d(5, 1, 1))
    checkpoint.save(tmp_path / "net.pth", other.state_dict())
    net = network()
    before = net[0].weight.clone()
    with pytest.raises(UserError) as error:
        checkpoint.load_weights(net, tmp_path / "net.pth")
    assert "0 keys missing, 2 unexpected, 6 of another shape" in str(error.value)
    assert "0.bias is (5,), not (4,)" in str(error.value)
    assert "\n" not in str(error.value)
    torch.testing.assert_close(net[0].weight, before)


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_truncated_files_are_named(tmp_path, keep):
    path = tmp_path / "net.pth"
    checkpoint.save(path, network().state_dict())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=r"net\.pth: not a whole checkpoint"):
        checkpoint.load(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"net\.pth: no such checkpoint"):
        checkpoint.load(tmp_path / "net.pth")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickled_code_is_not_run(tmp_path):
    torch.save({"model": Payload(tmp_path / "owned")}, tmp_path / "net.pth")
    with pytest.raises(UserError, match="not a whole checkpoint of tensors"):
        checkpoint.load(tmp_path / "net.pth")
    assert not (tmp_path / "owned").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "net.pth"
    checkpoint.save(path, {"epoch": 1})
    with pytest.raises(AttributeError):
        checkpoint.save(path, {"epoch": lambda: 2})  # cannot be pickled
    assert checkpoint.load(path) == {"epoch": 1}
