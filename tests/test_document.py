"""Sections of a Markdown file: what stands around them stays, to the byte."""

import pytest
from conftest import refusal

from utils.document import check_section, put_section

BEGIN, END = "<!-- study demo -->", "<!-- end of study demo -->"


def test_a_section_is_added_and_replaced(tmp_path):
    file = tmp_path / "results.md"
    file.write_text("# Results")
    for text in ("## demo\n\nold\n", "## demo\n\nnew\n"):
        put_section(file, "demo", text)
        put_section(file, "other", "## other\n")
    other = "<!-- study other -->\n## other\n<!-- end of study other -->\n"
    assert file.read_text() == f"# Results\n\n{BEGIN}\n## demo\n\nnew\n{END}\n\n{other}"


def test_a_new_file_begins_with_the_section(tmp_path):
    put_section(tmp_path / "new.md", "demo", "x\n")
    assert (tmp_path / "new.md").read_text() == f"{BEGIN}\nx\n{END}\n"


def test_what_stands_around_stays_to_the_byte(tmp_path):
    file = tmp_path / "results.md"
    before, after = b"\xef\xbb\xbf# R\xc3\xa9sum\xc3\xa9\r\n\r\n", b"\r\nlast\x0cline"
    file.write_bytes(before + f"{BEGIN} \r\nold\r\n{END}\r\n".encode() + after)
    put_section(file, "demo", "new\n")
    assert file.read_bytes() == before + f"{BEGIN}\r\nnew\r\n{END}\r\n".encode() + after
    file.write_bytes(f"{BEGIN}\nold\n{END}".encode())  # no newline at the end
    put_section(file, "demo", "new\n")
    assert file.read_text() == f"{BEGIN}\nnew\n{END}\n"


@pytest.mark.parametrize(
    "lines",
    [
        ["text", BEGIN, "kept", "no end"],
        ["text", END],
        ["text", END, "kept", BEGIN],
        ["text", BEGIN, "old", END, "kept", BEGIN, "old", END],
        ["text", BEGIN, "kept", BEGIN, "old", END],
    ],
)
def test_marks_that_are_no_pair_are_refused(tmp_path, lines):
    file, content = tmp_path / "results.md", "\n".join(lines)
    file.write_text(content)
    for attempt in (lambda: check_section(file, "demo"), lambda: put_section(file, "demo", "x\n")):
        assert f"{file}:2: {BEGIN} and {END} do not stand once each" in refusal(attempt)
    assert file.read_text() == content


def test_no_text_is_refused(tmp_path):
    (tmp_path / "x.md").write_bytes(b"\xff\xfe#\x00")
    assert "cannot read this as UTF-8" in refusal(check_section, tmp_path / "x.md", "demo")
    assert "cannot read this as UTF-8" in refusal(check_section, tmp_path, "demo")
