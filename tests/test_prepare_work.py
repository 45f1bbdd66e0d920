import pytest
from conftest import refusal

from dataset.prepare.work import DataSet, Step, prepare, read_words, refuse_missing
from utils.errors import UserError
from utils.files import write_text

NAMES = ["a", "b", "c", "d"]


@pytest.fixture
def step(tmp_path):
    """Copy four files from ``from`` to ``to``."""
    (tmp_path / "from").mkdir()
    for name in NAMES:
        (tmp_path / f"from/{name}").write_text(name)
    sources = {tmp_path / f"to/{name}": tmp_path / f"from/{name}" for name in NAMES}
    return Step("files", write_or_break, sources)


def run(root, step, workers=0, count=4):
    data = DataSet("", [], {"train": count}, lambda _: ({"train": NAMES}, [step]))
    prepare(data, root, False, workers)


def write_or_break(source, path):
    """Copy a file, and fail at one that says so."""
    if source.read_text() == "damaged":
        raise UserError(f"{source}: this one is damaged; fetch it anew")
    write_text(path, source.read_text())


@pytest.mark.parametrize("workers", [0, 2])
def test_files_and_then_the_list_are_written(tmp_path, step, workers, capsys):
    run(tmp_path, step, workers)
    assert [path.read_text() for path in step.sources] == NAMES
    assert (tmp_path / "train.txt").read_text() == "a\nb\nc\nd\n"
    assert capsys.readouterr().out == f"{tmp_path}: ready, with train.txt (4 images)\n"


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_off_run_goes_on_and_leaves_whole_files_alone(tmp_path, step, workers):
    (tmp_path / "from/c").write_text("damaged")
    with pytest.raises(UserError, match=r"from/c: this one is damaged; fetch it anew$"):
        run(tmp_path, step, workers)
    assert not (tmp_path / "train.txt").exists()
    before = (tmp_path / "to/a").stat().st_mtime_ns
    (tmp_path / "from/a").write_text("changed")
    (tmp_path / "from/c").write_text("c")
    run(tmp_path, step, workers)
    assert (tmp_path / "to/a").stat().st_mtime_ns == before
    assert [path.read_text() for path in step.sources] == NAMES
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == NAMES


def test_other_count_is_refused_before_anything_is_written(tmp_path, step):
    assert refusal(run, tmp_path, step, count=5) == (
        f"{tmp_path}: 4 images for train.txt where the data set has 5; nothing is written: "
        "complete the files and run it again"
    )
    assert not (tmp_path / "to").exists()


def test_list_of_the_users_own_is_not_overwritten(tmp_path, step):
    (tmp_path / "train.txt").write_text("mine\n")
    with pytest.raises(UserError, match=r"train\.txt: is there with other lines.*rename or"):
        run(tmp_path, step)
    assert (tmp_path / "train.txt").read_text() == "mine\n"


def test_missing_files_are_named_and_counted(tmp_path):
    (tmp_path / "a").touch()
    line = refusal(refuse_missing, (tmp_path / name for name in NAMES))
    assert line.startswith(f"{tmp_path / 'b'}: no such file (3 are missing in all); ")
    with pytest.raises(UserError, match=r"none\.txt: no such file .*unpack its archive again"):
        read_words(tmp_path / "none.txt")
