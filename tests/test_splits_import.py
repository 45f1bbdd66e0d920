import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset.catalog import KINDS
from dataset.lists import read_list
from dataset.splits import __main__ as program
from dataset.splits.foreign import import_lists, read_foreign, read_query_index
from utils.errors import UserError

ROOT = Path(__file__).parents[1]
LISTS = ROOT.parent / "shared" / "lists"
PASCAL = KINDS["pascal"]
X = "JPEGImages/x.jpg SegmentationClass/x.png"


@pytest.fixture
def write(tmp_path):
    def written(name: str, text: str) -> Path:
        (tmp_path / name).write_bytes(text.encode())
        return tmp_path / name

    return written


@pytest.mark.parametrize(
    ("folder", "val", "counts"),
    [
        ("st++/pascal/1_16", "st++/pascal", (662, 9920, 1449)),
        ("st++/pascal/92", "st++/pascal", (92, 10490, 1449)),
        ("st++/cityscapes/1_30", "st++/cityscapes", (100, 2875, 500)),
        ("u2pl/pascal/662", "u2pl/pascal", (662, 9920, 1449)),
        ("unimatch/coco/1_512", "unimatch/coco", (232, None, 5000)),
    ],
)
def test_real_lists_come_in_whole_and_read_as_ours(answer, tmp_path, folder, val, counts):
    if not (LISTS / folder).is_dir():
        pytest.skip(f"needs the published lists ../shared/lists/{folder}")
    words = ["--labeled", LISTS / folder / "labeled.txt", "--val", LISTS / val / "val.txt"]
    if counts[1] is not None:
        words += ["--unlabeled", LISTS / folder / "unlabeled.txt"]
    expected = dict(zip(("labeled", "unlabeled", "val"), counts, strict=True))
    expected = {name: count for name, count in expected.items() if count is not None}
    lines = answer(program, "import", *words, "--kind", "pascal", "--out", tmp_path)
    assert lines == [f"{tmp_path}/{n}.txt: {count} images" for n, count in expected.items()]
    for name, count in expected.items():
        samples = read_list(tmp_path / f"{name}.txt", Path("root"), PASCAL)
        assert len(samples) == count
        assert {sample.mask is None for sample in samples} == {name == "unlabeled"}


def test_real_ids_and_paths_of_one_validation_set_give_one_list(tmp_path):
    if not LISTS.is_dir():
        pytest.skip("needs the published lists ../shared/lists")
    for name in ("st++", "u2pl"):
        import_lists({"val": LISTS / name / "pascal/val.txt"}, tmp_path / name, PASCAL)
    ours, theirs = (tmp_path / name / "val.txt" for name in ("u2pl", "st++"))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        X,
        f"{X}\n",
        f"/{X}\n",
        f"/{X.replace(' ', ' /')}",
        f"./{X.replace(' ', ' ./')}\r\n\r\n",
        f"\ufeff{X}\r\n",
        f"\n  {X.replace(' ', chr(9))}  \n",
        "x",
        "\ufeffx\r\n",
    ],
)
def test_every_spelling_in_the_wild_comes_in_as_one(tmp_path, write, text):
    lists = {"labeled": write("a.txt", text), "unlabeled": write("b.txt", text.replace("x", "y"))}
    import_lists(lists, tmp_path / "out", PASCAL)
    assert (tmp_path / "out/labeled.txt").read_bytes() == f"{X}\n".encode()
    assert (tmp_path / "out/unlabeled.txt").read_bytes() == b"JPEGImages/y.jpg\n"
    assert not (tmp_path / "out/val.txt").exists()


def test_order_of_a_list_is_kept(tmp_path, write):
    import_lists({"val": write("v.txt", "b.jpg b.png\na.jpg a.png\nc.jpg c.png")}, tmp_path / "out")
    assert (tmp_path / "out/val.txt").read_text() == "b.jpg b.png\na.jpg a.png\nc.jpg c.png\n"


def test_overlaps_are_told(tmp_path, answer, write):
    one, other = write("a.txt", "x\ny\nz"), write("b.txt", "JPEGImages/x.jpg m.png\nz\nw")
    lines = answer(
        program,
        "import",
        "--labeled",
        one,
        "--val",
        other,
        "--kind",
        "pascal",
        "--out",
        tmp_path / "out",
    )
    assert lines[2:] == [
        "dataset.labeled and dataset.val share 2 images, JPEGImages/x.jpg among them; an image may "
        "stand in one list only"
    ]


@pytest.mark.parametrize("text", ["", "\n", " \r\n\t\r\n", "\ufeff"])
def test_empty_list_is_known_as_such(complaint, write, tmp_path, text):
    path = write("labeled.txt", text)
    line = complaint(program, "import", "--labeled", path, "--out", tmp_path / "out")
    assert line == (
        f"error: {path}: this list is empty, as 12 lists of ST++ and CISC-R are published; take "
        "another, or 'python -m dataset.splits make' one"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("2007_000033", "a.txt:1: 2007_000033 is a bare id; name the data set"),
        ("x.jpg x.png 3", "a.txt:1: a line reads 'image [mask]'"),
        ("x.jpg ../x.png", "a.txt:1: ../x.png leaves the data root"),
        ("x.jpg\n/x.jpg", "a.txt:2: x.jpg is listed twice"),
        ("/ x.png", "a.txt:1: / leaves the data root"),
    ],
)
def test_malformed_list_is_refused_with_its_line(complaint, write, tmp_path, text, told):
    path = write("a.txt", text)
    assert told in complaint(program, "import", "--val", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_list_that_is_there_stays(complaint, write, tmp_path):
    path = write("a.txt", X)
    write("val.txt", "other.jpg other.png\n")
    assert "val.txt: is there with other lines" in complaint(
        program, "import", "--labeled", path, "--val", path, "--out", tmp_path
    )
    assert not (tmp_path / "labeled.txt").exists()


def test_nothing_to_import(complaint, tmp_path):
    line = complaint(program, "import", "--out", tmp_path)
    assert line == "error: --labeled, --unlabeled, --val: all missing; name the lists to import"


def test_program_as_typed(tmp_path, write):
    words = ["import", "--labeled", write("a.txt", ""), "--out", tmp_path]
    command = [sys.executable, "-m", "dataset.lists", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/a.txt: this list is empty")


ANY = st.text(max_size=40) | st.text("./ a\0\n", max_size=8)


@given(text=ANY, kind=st.sampled_from([None, PASCAL]))
def test_any_text_comes_in_or_is_refused_in_one_line(text, kind, value_or_line, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    path = folder / "list.txt"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    samples = value_or_line(read_foreign, path, kind)
    if samples is not None:
        import_lists({"labeled": path}, folder / "out", kind)
        assert read_list(folder / "out/labeled.txt", Path(), PASCAL) == samples


def names(path, kind=PASCAL) -> list[str]:
    return [sample.name for sample in read_query_index(path, Path("root"), kind)]


def test_query_indices_read_in_three_forms(tmp_path, write):
    write("index.json", json.dumps({"cat": ["x", "/JPEGImages/y.jpg m/y.png"], "dog": ["x", "z"]}))
    write("index.txt", f"{X}\ny\nx\n\nz\n")
    (tmp_path / "index").mkdir()
    for name, text in {"cat": f"x\r\n{X}", "cow": "", "dog": "y\nz"}.items():
        write(f"index/{name}.txt", text)
    expected = [f"JPEGImages/{name}.jpg" for name in "xyz"]
    for form in ("index.json", "index.txt", "index"):
        assert names(tmp_path / form) == expected


def test_a_name_with_spaces_in_an_index_of_ours_is_one_image(tmp_path, write):
    (tmp_path / "my cat.png").write_text("")
    index = write("index.json", json.dumps({"cat": ["my cat.png", "a.png b.png"]}))
    assert [s.name for s in read_query_index(index, tmp_path, PASCAL)] == ["my cat.png", "a.png"]


def test_quoted_paths_that_begin_with_a_slash_and_odd_spaces_come_in(tmp_path, write):
    path = write("a.txt", '"/photos/my cat.jpg" "/m/my cat.png"\n"two  spaces.jpg"\n" edge.jpg"\n')
    import_lists({"val": path}, tmp_path / "out")
    (text,) = [file.read_text() for file in (tmp_path / "out").iterdir()]
    assert text == '"photos/my cat.jpg" "m/my cat.png"\n"two  spaces.jpg"\n" edge.jpg"\n'
    assert [s.name for s in read_list(tmp_path / "out/val.txt", Path(), PASCAL)][1:] == [
        "two  spaces.jpg",
        " edge.jpg",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1, 2]", "a query index reads {class: [image, ...], ...}"),
        ('{"cat": "x"}', "a query index reads {class: [image, ...], ...}"),
        ('{"cat": [7]}', "a query index reads {class: [image, ...], ...}"),
        ("{'cat': []}", "cannot read this query index (Expecting property name"),
        ("[" * 100_000, "cannot read this query index (maximum recursion"),
        (r'{"cat": ["\ud800.jpg"]}', "cannot read this query index ('utf-8' codec can't encode"),
        ('{"cat": []}', "this query index lists no image"),
        ('{"cat": ["x", "../y"]}', ": cat:2: JPEGImages/../y.jpg leaves the data root"),
        ('{"cat": ["x", "/ y.png"]}', ": cat:2: / leaves the data root"),
    ],
)
def test_bad_query_index(write, text, told):
    path = write("index.json", text)
    with pytest.raises(UserError) as raised:
        names(path)
    assert str(raised.value).startswith(str(path))
    assert told in str(raised.value)


def test_folder_without_lists_and_index_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="this query index lists no image; name another"):
        names(tmp_path)
    with pytest.raises(UserError, match=r"gone\.txt: cannot read this list"):
        names(tmp_path / "gone.txt")


@given(text=ANY | st.dictionaries(ANY, st.lists(ANY)).map(json.dumps))
def test_any_text_is_a_query_index_or_one_line(text, value_or_line, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    for path in (folder / "index.json", folder / "index.txt"):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        assert value_or_line(names, path) != []
