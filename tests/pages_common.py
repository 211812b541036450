"""What every page has to keep to, and results to show on one."""

import re

from tests.test_report import Reader

HEADINGS = ("h1", "h2", "h3", "h4")


def check(page: str) -> Reader:
    """The page's elements; fails where it is not whole, not of one file, or not for all readers."""
    reader = Reader(page)  # every tag is closed once
    assert page.startswith("<!DOCTYPE html>")
    assert [tag for tag, _ in reader.elements if tag in ("script", "iframe", "object", "form", "base")] == []
    assert reader.of("html") == [{"lang": "en"}]
    assert len(reader.of("main")) == len(reader.of("h1")) == page.split("</head>")[0].count("<title>") == 1
    assert any(tag.get("http-equiv") == "Content-Security-Policy" for tag in reader.of("meta"))
    assert all(tag["src"].startswith("data:image/") and tag["alt"].strip() for tag in reader.of("img"))
    assert not re.search(r"url\(|@import|https?://", page)
    levels = [HEADINGS.index(tag) for tag, _ in reader.elements if tag in HEADINGS]
    assert levels[0] == 0
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert all(tag.get("scope") in ("row", "col") for tag in reader.of("th"))
    tables = re.findall(r"<table>(.*?)</table>", page, re.S)
    assert len(tables) == len(reader.of("table"))
    assert all(re.match(r"<caption[^>]*>.*?[^>]</", table, re.S) for table in tables)
    assert len(re.findall(r"<details[^>]*><summary>", page)) == len(reader.of("details"))
    for svg in reader.of("svg"):
        assert svg.get("aria-hidden") == "true" or svg["role"] == "img"
        assert svg.get("aria-hidden") == "true" or svg["aria-label"].strip()
    assert all(tag["role"] == "region" and tag["aria-label"] for _, tag in reader.elements if tag.get("tabindex"))
    names = [tag["id"] for _, tag in reader.elements if "id" in tag]
    assert len(set(names)) == len(names)
    return reader


def result(**changes):
    """An evaluation as its file holds it."""
    return {
        "name": "knn-pets-1", "checkpoint": "/runs/a/checkpoints/last.pt", "step": 1313, "weights": "0123456789abcdef",
        "settings": {"k": None, "temperature": 0.1, "layer": "h"}, "protocol": "knn", "data": "pets",
        "figures": {"top-1": 0.75, "top-5": 1.0}, "counts": {"training images": 4000, "test images": 12},
        "classes": ["cat", "dog", "<eel>"], "confusion": [[0, 0, 4], [1, 0, 1], [1, 1, 3], [2, 1, 2], [2, 2, 2]],
        "tables": [], "scatters": [], "pictures": [], "notes": [], "seconds": 2.5, "when": "2026-11-29T23:43:09Z",
        "versions": {"torch": "2.14.1"}, "precision": "bf16",
    } | changes  # fmt: skip
