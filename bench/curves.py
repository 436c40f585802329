"""How did several runs learn? Their metrics laid over each other, smoothed, as a page without network.

    python -m bench.curves runs/a runs/b > curves.html
"""

import sys
from pathlib import Path

from harness import page
from harness.run import read_metrics


def main(folders: list[str]) -> int:
    """0, or 2 and one line for a folder without metrics."""
    found = {}
    for folder in folders:
        rows = found[folder.rstrip("/")] = read_metrics(Path(folder))
        if not rows:
            print(f"error: {folder}: no metrics.jsonl of a run", file=sys.stderr)
            return 2
    if not found:
        print("usage: python -m bench.curves RUN [RUN ...] > curves.html", file=sys.stderr)
        return 2
    print(page.document("Curves", [page.curves(found)]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
