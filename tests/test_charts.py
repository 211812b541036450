"""Charts on a page: places, shapes and colours that can be told apart."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from simclr_fast.pages import charts, parts
from simclr_fast.pages.document import STYLE


def svgs(figure):
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", figure)]


def test_scatters_keep_places_classes_and_shape():
    points = [[0, 0], [10, 5], [10, 0], [float("nan"), 1], [5, 2.5]]
    (svg,) = svgs(charts.scatter("PCA <of> h", points, [0, 1, 1, 0, -1], ["a", "b & c"]))
    assert svg.attrib["aria-label"] == "PCA <of> h: 4 points in 2 classes"
    groups = {group.find("title").text: group.find("path").attrib["d"] for group in svg.iter("g")}
    assert groups["a"] == "M20 740h0"
    assert groups["b & c"] == "M980 260h0M980 740h0"
    assert groups["other images"] == "M500 500h0"
    assert charts.scatter("x", [], [], []) == ""
    assert svgs(charts.scatter("x", [[1, 1]], [-1], []))[0].attrib["aria-label"] == "x: 1 points"


def test_many_classes_leave_the_most_frequent_in_colour():
    labels = [k for k in range(50) for _ in range(k + 1)]
    classes = [f"c{k}" for k in range(50)]
    shown = charts.coloured(labels, classes)
    assert shown == list(range(30, 50))
    (svg,) = svgs(charts.scatter("x", np.zeros((len(labels), 2)).tolist(), labels, classes))
    kinds = [(group.attrib["class"], group.find("path").attrib["class"], group.find("path").attrib["d"].split("h")[0])
             for group in svg.iter("g")]  # fmt: skip
    assert len(kinds) == 21
    look = {(hue, mark, re.sub(r"M\d+ \d+", "", group.find("path").attrib["d"])[:14])
            for (hue, mark, _), group in zip(kinds, svg.iter("g"), strict=True)}  # fmt: skip
    assert len(look) == 21  # no two alike
    assert len(svgs(charts.scatter_legend(shown, classes))) == 20


def test_curves_of_several_runs_differ_in_hue_and_dash():
    rows = {"a": [(0, 1.0), (1, 0.5)], "empty": [], "b": [(0, 2.0), (2, None), (3, 0.25)]}
    (svg,) = svgs(charts.chart("Loss", rows, parts.plain))
    assert svg.attrib["aria-label"] == "Loss: a 0.5 at epoch 1; b 0.25 at epoch 3"
    lines = [path.attrib["class"] for path in svg.iter("path") if "line" in path.attrib.get("class", "")]
    assert lines == ["line", "line d2"]
    assert [group.attrib["class"] for group in svg.iter("g") if group.attrib["class"].startswith("s")] == ["s0", "s2"]
    assert charts.chart("Loss", {"a": []}, parts.plain) == ""


def colours(dark):
    """The variables of the style in one scheme, as linear [3] in [0, 1]."""
    blocks = re.findall(r":root \{(.*?)\}", STYLE, re.S)
    found = {}
    for block in blocks[: 1 + dark]:
        for name, code in re.findall(r"--(\w+): #([0-9a-f]+)", block):
            code = code if len(code) == 6 else "".join(2 * digit for digit in code)
            found[name] = np.array([int(code[k : k + 2], 16) / 255 for k in (0, 2, 4)])
    return found


def contrast(first, second):
    """That of WCAG 2."""
    light = []
    for colour in (first, second):
        linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
        light.append(linear @ [0.2126, 0.7152, 0.0722])
    return (max(light) + 0.05) / (min(light) + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_colours_can_be_told_apart(dark):
    known = colours(dark)
    assert contrast(np.zeros(3), np.ones(3)) == pytest.approx(21)
    for ground in ("page", "card"):
        for text in ("ink", "soft", "main", "right", "wrong"):
            assert contrast(known[text], known[ground]) >= 4.5, (text, ground)
        for hue in range(charts.HUES):
            assert contrast(known[f"s{hue}"], known["card"]) >= 3, hue
    for tint in ("main", "wrong"):  # of a matrix's cells, at its strongest
        assert contrast(known["ink"], (known[tint] + known["card"]) / 2) >= 4.5, tint
