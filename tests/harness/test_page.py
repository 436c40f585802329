"""Oracles for pages: they are parsed, and what a reader sees is compared with what went in."""

import json
from html.parser import HTMLParser

import pytest

from bench import curves
from harness import page


class Read(HTMLParser):
    """A page's tags with their attributes, and all its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.raw = [], "", text
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


# ----------------------------------------------------------------------------------------------------------- curves
def metrics(folder, **columns):
    folder.mkdir()
    lines = [dict(zip(("step", *columns), row)) for row in zip(range(1, 99), *columns.values())]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_curves_of_runs_lie_over_each_other_and_constants_are_left_out(tmp_path, capsys):
    a = metrics(tmp_path / "a", gap=[3.0, 2.0, 1.5], ratio_mean=[1.0] * 3, seconds=[1.0] * 3)
    b = metrics(tmp_path / "b<b>", gap=[9.0, 8.0], ratio_mean=[1.0] * 2, seconds=[2.0] * 2)
    assert curves.main([a, b]) == 0
    found = Read(capsys.readouterr().out)
    plots = found.raw.split("<svg")[1:]
    assert len(plots) == 2 and "ratio_mean" not in found.text, "seconds are constant in each run, and not alike"
    for name, plot in zip(("gap", "seconds"), plots):
        text = Read("<svg" + plot).text
        assert "step" in text and name in text and a in text and b in text, "axes and runs are named"
        assert plot.count("stroke-width: 1.5") == 2 + 2, "a line each, and its sample in the legend"
    assert "[s]" in found.text and not any(tag == "b" for tag, _ in found.tags), "no name becomes a tag"
    links = [value for _, attrs in found.tags for key, value in attrs.items() if key.endswith(("src", "href"))]
    assert all(link.startswith("#") for link in links), "and nothing is fetched"
    assert curves.main([a, str(tmp_path / "nowhere")]) == 2 and "nowhere" in capsys.readouterr().err


def test_smoothing_keeps_a_constant_begins_at_the_first_value_and_follows_by_hand():
    assert page.smoothed([0.3] * 9) == pytest.approx([0.3] * 9)
    # w = 1/2: s_1 = 4; s_2 = (1/4 * 4 + 1/2 * 1) / (3/4) = 2; s_3 = (1/8 * 4 + 1/4 * 1 + 1/2 * 7) / (7/8) = 4.857
    assert page.smoothed([4.0, 1.0, 7.0], 0.5) == pytest.approx([4.0, 2.0, 34 / 7])
