"""The page loads nothing, runs nothing, and shows what it was given; the figures are figures."""

from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser
from io import BytesIO

import pytest
import torch

from bae_fast.analysis import ContextExample, FeatureSummary, TokenLift
from bae_fast.report import (
    Figure,
    Metric,
    Point,
    plot_density,
    plot_fvu_bits,
    plot_training,
    write_page,
    write_report,
)

matplotlib_image = pytest.importorskip("matplotlib.image")

EVIL = "<script>alert('x')</script>\"&"
SPECTRUM = torch.arange(1, 65, dtype=torch.float64).pow(-1.0)
LOG = [
    {"step": s, "mse": 2 / s, "entropy_bits": 300 + s % 7, "l0": 50.0, "dead_share": s / 1e3}
    for s in range(1, 201)
]


def _pixels(png):
    pixels = matplotlib_image.imread(BytesIO(png), format="png")
    return (pixels[..., :3] * 255).round().astype(int)


def _share(png, colour):
    """Share of pixels within a little of a colour given as #rrggbb."""
    target = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return float((abs(_pixels(png) - target).max(-1) <= 6).mean())


class Page(HTMLParser):
    """Collects what a browser would fetch, the tags, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "href", "data", "action", "poster", "background"):
                self.sources.append(value)
            assert not name.startswith("on")

    def handle_data(self, data):
        self.texts.append(data)


def _feature(text=EVIL):
    return FeatureSummary(
        7, 1234, 5000,
        (TokenLift(text, 3, 12.3, 10, 20),),
        (ContextExample(f"before {text}", " fires", f"after {text}", 0, 1.0),),
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "made" / "here"
    files = write_report(
        folder,
        title=EVIL,
        subtitle=EVIL,
        metrics=[Metric(EVIL, EVIL, EVIL), Metric("FVU", "0.139")],
        log=LOG,
        density=torch.rand(500, generator=torch.Generator().manual_seed(0)).pow(6),
        eigenvalues=SPECTRUM,
        points=[Point("this run", 0.2, 300, True)],
        features=[_feature()],
        notes=[EVIL],
    )
    return folder, files


def test_the_page_asks_for_nothing_from_outside(report):
    _, files = report
    text = files["page"].read_text(encoding="utf-8")
    sources = Page(text).sources
    assert len(sources) == 6  # three figures, each light and dark
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    without_images = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", without_images)
    assert "default-src 'none'" in text


def test_every_text_is_escaped(report):
    _, files = report
    text = files["page"].read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert "<script" not in text
    seen = "".join(page.texts)
    # title, heading, subtitle, three cells, note, token, and both sides of the context
    assert seen.count(EVIL) == 10


def test_the_page_shows_metrics_and_marks_the_firing_token(report):
    _, files = report
    text = files["page"].read_text(encoding="utf-8")
    assert "<th scope=row>FVU</th><td class=value>0.139</td>" in text
    assert "<mark>␣fires</mark>" in text
    assert "24.7 % of rows (1,234 of 5,000)" in text
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text


def test_images_in_the_page_are_the_files_beside_it(report):
    folder, files = report
    text = files["page"].read_text(encoding="utf-8")
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "report.html", "fvu_bits.png", "density_histogram.png", "training_curves.png"
    }  # fmt: skip
    embedded = {
        base64.b64decode(m) for m in re.findall(r'src="data:image/png;base64,([^"]+)', text)
    }
    assert embedded == {files[k].read_bytes() for k in ("fvu_bits", "density", "training")}


@pytest.mark.usefixtures("undrawn")
def test_a_report_without_a_log_has_no_training_figure(tmp_path):
    files = write_report(
        tmp_path, title="t", metrics=[], log=[], density=torch.rand(9), eigenvalues=SPECTRUM,
        points=[],
    )  # fmt: skip
    assert set(files) == {"page", "fvu_bits", "density"}
    assert "Training" not in files["page"].read_text(encoding="utf-8")


def test_a_failed_write_leaves_the_old_page(tmp_path):
    path = write_page(tmp_path / "p.html", title="old")
    with pytest.raises(TypeError):
        write_page(path, title="new", figures=[Figure("a", "b", None)])  # type: ignore[arg-type]
    assert "<title>old</title>" in path.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["p.html"]


@pytest.mark.parametrize(("dark", "surface"), [(False, "#ffffff"), (True, "#171b23")])
def test_figures_decode_and_have_the_scheme_of_the_page(dark, surface):
    pictures = [
        plot_training(LOG, dark=dark),
        plot_density(torch.rand(300).pow(4), dark=dark),
        plot_fvu_bits(SPECTRUM, [Point("a", 0.2, 300)], dark=dark),
    ]
    for png in pictures:
        assert _pixels(png).shape[1] > 900
        assert 0.3 < _share(png, surface) < 0.99


def test_dead_features_are_drawn_apart():
    live = torch.full((100,), 0.01)
    with_dead = plot_density(torch.cat([live, torch.zeros(60)]))
    assert _share(with_dead, "#c2570c") > 5 * _share(plot_density(live), "#c2570c")
    plot_density(torch.zeros(10))  # nothing alive at all: still a figure


def test_a_training_log_may_have_gaps_and_strangers():
    clean = plot_training(LOG)
    untidy = [
        *LOG,
        {"step": None, "mse": 1.0},
        {"mse": 1.0},
        {"step": 201},
        {"step": 202, "mse": math.nan, "l0": None, "entropy_bits": "many", "note": object()},
        {"event": "evaluation"},
    ]
    assert plot_training(untidy) == clean
    assert plot_training([{"step": 1, "mse": 0.5}]) != clean
    with pytest.raises(ValueError, match="log has no row"):
        plot_training([{"step": 1, "loss": 3.0}])


def test_a_highlighted_code_stands_out():
    plain = plot_fvu_bits(SPECTRUM, [Point("a", 0.2, 300)])
    marked = plot_fvu_bits(SPECTRUM, [Point("a", 0.2, 300, highlight=True)])
    assert _share(plain, "#c2570c") == 0
    assert _share(marked, "#c2570c") > 0


def test_codes_of_a_series_have_their_own_colour_and_stand_in_a_legend():
    points = [Point("k=16", 0.25, 200, series="a"), Point("k=32", 0.2, 390, series="a")]
    image = plot_fvu_bits(SPECTRUM, [*points, Point("b", 0.2, 800)])
    alone = plot_fvu_bits(SPECTRUM, [point._replace(series=None) for point in points])
    assert _share(image, "#0072b2") > 0 == _share(alone, "#0072b2")
    assert _pixels(image).shape[1] > _pixels(alone).shape[1]


def test_many_codes_at_one_place_are_still_drawn():
    points = [Point(f"code number {i}", 0.2, 300) for i in range(20)]
    assert _pixels(plot_fvu_bits(SPECTRUM, points)).shape[1] > 900


@pytest.mark.parametrize("point", [Point("a", math.nan, 3), Point("a", 0.1, 0), Point("a", -1, 3)])
def test_codes_without_a_place_are_refused(point):
    with pytest.raises(ValueError, match=r"points must have .*; got Point"):
        plot_fvu_bits(SPECTRUM, [point])


def test_drawing_needs_no_display_and_leaves_matplotlib_as_it_was(monkeypatch):
    import matplotlib

    monkeypatch.delenv("DISPLAY", raising=False)
    before = dict(matplotlib.rcParams)
    plot_density(torch.rand(10))
    assert dict(matplotlib.rcParams) == before
