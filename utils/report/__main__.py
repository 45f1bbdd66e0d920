"""Write one page of HTML about runs: did unlabeled images help, where, where not, and why.

python -m utils.report outdir/demo [outdir/other ...] [--out report.html]
"""

from pathlib import Path

from utils.errors import Parser, UserError, exit_with_one_line, refuse_repeated
from utils.files import write_text
from utils.outputs import Output, refuse_outputs
from utils.report.page import page
from utils.report.reading import read_run


def main() -> None:
    """Read the command line and the run folders; write the page."""
    parser = Parser(prog="python -m utils.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, outdir/<name>")
    parser.add_argument("--out", type=Path, help="the page; of one run: <run>/report.html")
    arguments = parser.parse_args()
    if arguments.out is None and len(arguments.runs) > 1:
        raise UserError("--out: missing; name the page of several runs, such as report.html")
    refuse_repeated(arguments.runs)
    out = arguments.out or arguments.runs[0] / "report.html"
    runs = [read_run(folder) for folder in arguments.runs]
    refuse_outputs([Output("--out", out, [".html", ".htm"])], {})
    write_text(out, page(runs))
    print(f"{out}: open it in a browser")


if __name__ == "__main__":
    exit_with_one_line(main)
