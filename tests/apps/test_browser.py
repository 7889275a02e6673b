"""The page of features, looked at in a real browser where there is one."""

from __future__ import annotations

import dataclasses
import json
import random
import re

import browser as driver
import pytest

from bae_fast.analysis.features import TokenLift
from bae_fast.interpret.records import FeatureContext, FeatureRecord, Histogram, Partner
from bae_fast.report.browser import write_browser

HOSTILE = (
    "<script>document.title='broken'</script>",
    '"><img src=x onerror=alert(1)>',
    "</script>",
)


def records(n: int, seed: int = 0):
    """Features of random words; #7 is the planted one, #8 is hostile, every third has no score."""
    r = random.Random(seed)
    words = [" " + "".join(r.choices("bcdfghklmnprst", k=r.randint(2, 7))) for _ in range(5000)]
    for f in range(n):
        tokens, pieces, phrase = r.choices(words, k=4), r.choices(words, k=20), None
        if f == 7:
            tokens[0], pieces[9:12], phrase = " zebra", [" New", " Zea", "land"], "Antipodes"
        if f == 8:
            tokens[:3] = pieces[:3] = HOSTILE
            phrase = HOSTILE[0]
        yield FeatureRecord(
            feature=f,
            density=((f * 7919) % n + 1) / (n + 1),
            burstiness=None if f % 5 == 0 else 1 + (f * 31 % 17) / 10,
            tokens=[TokenLift(t, i, 9.5 - i, 5, 20 + i) for i, t in enumerate(tokens)],
            contexts=[FeatureContext(tuple(pieces), 10, (3,), f, 0.5) for _ in range(4)],
            lens=[(r.choice(words), 0.25) for _ in range(4)],
            neighbours=[((f + 1) % n, 0.5), (n + 5, 0.25)],
            histogram=Histogram(-2, 2, (1, 5, 0, 2)),
            phrase=phrase,
            scores={"ComSem": None if f % 3 == 0 else (f * 13 % 11) / 10},
        )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "features.html"
    return write_browser(
        path, records(300), title="Features <b>", subtitle="a & b", notes=["note <i>"]
    )


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    if driver.find() is None:
        pytest.skip(f"no browser: none of {', '.join(driver.NAMES)} is on the path")
    found = driver.Browser(tmp_path_factory.mktemp("profile"))
    found.size(1200, 800)
    yield found
    found.close()


@pytest.fixture
def seen(tab, page):
    """The page open, and quiet to the end."""
    tab.errors.clear()
    tab.size(1200, 800)
    yield lambda state="": tab.open(page, state)
    assert tab.errors == []


LIST = "[...document.querySelectorAll('.row')].map(row => Number(row.id.slice(3)))"


def numbers(tab) -> list[int]:
    """Features of the rows that are drawn, from the top."""
    return tab.run(LIST)


def test_the_file_needs_nothing_else_and_holds_no_text_as_markup(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)\s*=|https?://(?!www\.w3\.org/2000/svg)|@import", text)
    assert "default-src 'none'" in text
    assert "Features &lt;b&gt;" in text
    assert "note &lt;i&gt;" in text
    assert not any(hostile in text for hostile in HOSTILE[:2])
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert way not in text


def test_the_list_comes_in_order_of_numbers_with_the_first_one_shown(tab, seen):
    seen()
    assert numbers(tab)[:5] == [0, 1, 2, 3, 4]
    assert len(numbers(tab)) < 40  # only what is in view
    assert tab.run("document.querySelector('#feature h2').textContent") == "#0"
    assert tab.run("document.getElementById('count').textContent") == "300 features"
    assert tab.run("document.title") == "Features <b>"


@pytest.mark.parametrize(
    ("query", "scope", "expected"),
    [
        ("zebra", "", [7]),
        ("ZEBRA", "&in=tokens", [7]),
        ("zebra", "&in=contexts", []),
        ("new zealand", "", [7]),  # across tokens
        ("new zealand", "&in=tokens", []),
        ("antipodes", "&in=phrase", [7]),
        ("%23123", "", [123]),
        ("123", "", [123]),
        ("%23999", "", []),
        ("onerror", "", [8]),
    ],
)
def test_a_search_finds_the_planted_feature_and_no_other(tab, seen, query, scope, expected):
    seen(f"#q={query}{scope}")
    assert numbers(tab) == expected
    assert tab.run("document.documentElement.dataset.shown") == str(len(expected))


def test_typing_searches_and_the_address_keeps_it(tab, seen):
    seen()
    tab.press("/")
    for letter in "zebra":
        tab.press(letter)
    assert numbers(tab) == [7]
    assert "q=zebra" in tab.run("location.hash")
    tab.press("Escape")
    assert len(numbers(tab)) > 1


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize(
    ("sort", "value"),
    [
        ("density", lambda r: r.density),
        ("burstiness", lambda r: r.burstiness),
        ("score+ComSem", lambda r: r.scores["ComSem"]),
        ("feature", lambda r: r.feature),
    ],
)
def test_every_order_is_right_in_both_directions_and_none_comes_last(tab, seen, sort, value, down):
    seen(f"#sort={sort}" + ("&down=1" if down else ""))
    have = [(value(r), r.feature) for r in records(300)]
    known = sorted(
        (v * (-1 if down else 1), f) for v, f in have if v is not None
    )  # equal ones by number
    expected = [f for _, f in known] + [f for v, f in have if v is None]
    top = numbers(tab)
    assert top == expected[: len(top)]
    assert len(top) > 10
    tab.run("document.getElementById('list').scrollTop = 1e9")
    tab.wait(f"{LIST}.at(-1) === {expected[-1]}", 5)
    bottom = numbers(tab)
    assert bottom == expected[-len(bottom) :]


def test_hostile_text_is_shown_and_does_nothing(tab, seen):
    seen("#f=8")
    tab.wait("document.documentElement.dataset.feature === '8'")
    assert tab.run("document.title") == "Features <b>"
    assert tab.run("document.querySelectorAll('main img, main script').length") == 0
    shown = tab.run("document.getElementById('feature').textContent")
    assert all(hostile in shown for hostile in HOSTILE)


def test_one_feature_shows_all_that_is_known_of_it(tab, seen):
    seen("#f=7")
    tab.wait("document.documentElement.dataset.feature === '7'")
    shown = tab.run("document.getElementById('feature').textContent")
    assert "Antipodes" in shown
    assert "␣zebra \u00d79.5 5/20" in shown
    assert tab.run("document.querySelector('.contexts mark:not(.also)').textContent") == "␣Zea"
    assert tab.run("document.querySelectorAll('.contexts li').length") == 4
    assert tab.run("document.querySelectorAll('.contexts mark.also').length") == 4
    assert tab.run("document.querySelectorAll('svg rect').length") == 4
    assert "#305" in shown  # a neighbour that this file lacks is no link
    assert tab.run("document.querySelectorAll('#feature a').length") == 1
    tab.run("document.querySelector('#feature a').click()")
    tab.wait("document.documentElement.dataset.feature === '8'")


def test_keys_move_through_the_list(tab, seen):
    seen()
    for key in ("j", "j", "k", "ArrowDown"):
        tab.press(key)
    tab.wait("document.documentElement.dataset.feature === '2'")
    tab.press("End")
    tab.wait("document.documentElement.dataset.feature === '299'")
    assert 299 in numbers(tab)
    tab.press("s")
    tab.wait("location.hash.includes('sort=density') && location.hash.includes('down=1')")


def test_a_narrow_window_shows_the_list_or_the_feature(tab, seen):
    tab.size(390, 800)
    seen()
    visible = "['list', 'detail'].map(id => document.getElementById(id).offsetHeight > 0)"
    assert tab.run(visible) == [True, False]
    tab.press("Enter")
    assert tab.run(visible) == [False, True]
    tab.press("Escape")
    assert tab.run(visible) == [True, False]
    assert tab.run("document.documentElement.scrollWidth") <= 390


def test_twenty_thousand_features_open_and_are_searched(tab, tmp_path):
    tab.errors.clear()
    path = write_browser(tmp_path / "many.html", records(20_000), title="many")
    assert path.stat().st_size < 40e6
    tab.open(path, "#q=zebra")
    times = json.loads(tab.run("JSON.stringify(document.documentElement.dataset)"))
    assert numbers(tab) == [7]
    # milliseconds to the first list, to all texts, and of the search through them: each was reached
    assert times.keys() >= {"first", "ready", "refresh"}
    assert tab.errors == []


# -- two models --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Feature f stands beside the other model's 299 - f, whose own best is f but for #4; #3 stands
    alone."""
    others = {record.feature: record for record in records(300, seed=1)}

    def both():
        for r in records(300):
            partner = Partner(others[299 - r.feature], 0.75, "same", r.feature, -0.5)
            if r.feature == 4:
                partner = Partner(others[295], 0.125, "subset", 9)
            agreement = {"Jaccard": 0.0 if r.feature == 3 else partner.agreement}
            partner = None if r.feature == 3 else partner
            yield dataclasses.replace(r, partner=partner, scores=agreement)

    path = tmp_path_factory.mktemp("pairs") / "features.html"
    return write_browser(path, both(), title="Two", models=("results/a", "results/b"))


def column(tab, which):
    return tab.run(f"document.getElementById('{which}').innerText")


def test_a_feature_stands_beside_its_partner(tab, pairs):
    tab.errors.clear()
    tab.size(1200, 800)
    tab.open(pairs, "#f=7")
    tab.wait("document.documentElement.dataset.feature === '7'")
    own, other = column(tab, "own"), column(tab, "other")
    assert own.startswith("results/a")
    assert "#7Antipodes" in own.replace("\n", "").replace(" ", "")
    assert other.startswith("results/b")
    assert "#292" in other
    expected = list(records(300, seed=1))[292]
    assert all(one.text.strip() in other for one in expected.tokens)
    assert f"{100 * expected.density:.3g} %" in other
    relation = " ".join(column(tab, "relation").split())
    assert relation == "match the same Jaccard index 0.75 cosine of the decoder directions -0.5"
    # beside one another where there is room, below one another where there is none
    tops = "['own', 'other'].map(id => document.getElementById(id).getBoundingClientRect().top)"
    first, second = tab.run(tops)
    assert first == second
    tab.size(390, 800)
    tab.open(pairs, "#f=7")
    first, second = tab.run(tops)
    assert first < second
    assert tab.run("document.documentElement.scrollWidth") <= 390
    assert tab.errors == []


def test_who_has_no_partner_or_one_that_likes_another_better_is_told_so(tab, pairs):
    tab.size(1200, 800)
    tab.open(pairs, "#f=3")
    tab.wait("document.documentElement.dataset.feature === '3'")
    assert "No feature of this model is on where this one is." in column(tab, "other")
    assert column(tab, "relation") == ""
    tab.open(pairs, "#f=4&sort=score+Jaccard")
    tab.wait("document.documentElement.dataset.feature === '4'")
    assert numbers(tab)[:3] == [3, 4, 0]
    relation = " ".join(column(tab, "relation").split())
    assert relation.startswith("match within a feature of the other Jaccard index 0.125")
    assert relation.endswith("best partner of the other's #295 #9")
    tab.run("document.querySelector('#relation a').click()")
    tab.wait("document.documentElement.dataset.feature === '9'")


@pytest.mark.parametrize("dark", [False, True])
def test_pairs_are_read_by_keys_and_by_everybody(tab, pairs, dark):
    tab.errors.clear()
    tab.size(1200, 800, dark)
    tab.open(pairs)
    for key in ("j", "j", "j", "j", "Enter"):
        tab.press(key)
    tab.wait("document.documentElement.dataset.feature === '4'")
    assert tab.run("document.activeElement.id") == "detail"
    # what is open is scrolled, and the list stays where it is
    tab.press_until("End", "document.getElementById('detail').scrollTop > 0")
    assert tab.run("document.documentElement.dataset.feature") == "4"
    tab.press("j")
    tab.wait("document.documentElement.dataset.feature === '5'")
    tab.press("Escape")
    assert tab.run("document.activeElement.id") == "list"
    tab.open(pairs, "#f=4")
    tab.wait("document.documentElement.dataset.feature === '4'")
    tab.run("document.getElementById('help').open = true")
    worst = tab.run(driver.CONTRAST)
    assert len(worst) > 100
    assert [one for one in worst if one[0] < 4.5] == []
    assert tab.nameless() == []
    steps = tab.walk(12)
    assert {"query", "sort", "list", "detail", "A"} <= {where for where, _ in steps}
    assert [where for where, seen in steps if not seen] == []
    tab.size(1200, 800)
    assert tab.errors == []


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "records must not be empty"),
        ([FeatureRecord(1, 0.5), FeatureRecord(1, 0.5)], "feature 1 twice"),
        ([FeatureRecord(1, 1.5)], r"feature 1: density must lie in \[0, 1\]; got 1.5"),
        ([FeatureRecord(1, 0.5, float("nan"))], "feature 1: numbers must be finite; got nan"),
        ([FeatureRecord(1, 0.5, contexts=[FeatureContext(("a",), 1)])], "feature 1: at=1"),
        ([FeatureRecord(1, 0.5, histogram=Histogram(1, 1, (2,)))], "feature 1: histogram"),
        (
            [
                FeatureRecord(
                    1, 0.5, partner=Partner(FeatureRecord(2, 0.5), float("nan"), "same", 1)
                )
            ],
            "feature 1, partner 2: numbers must be finite; got nan",
        ),
    ],
)
def test_an_inconsistent_record_is_named_and_no_file_is_left(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        write_browser(tmp_path / "page.html", given, title="t")
    assert list(tmp_path.iterdir()) == []
