"""The list of images that a run keeps: what changed is told by name, and what cannot be told is not."""

import pytest

from simclr_fast.data import changes, fingerprint, open_dataset, write_images
from tests.images_common import encoded, fill

NAMES = ["train/ant/0.jpg", "train/ant/1.jpg", "train/bee/0.jpg", "train/bee/1.jpg", "test/ant/0.jpg"]


@pytest.fixture
def began(tmp_path):
    """A data set, and the list of its images."""
    root = fill(tmp_path / "data", *NAMES)
    write_images(tmp_path / "list", open_dataset(str(root)))
    return root, tmp_path / "list"


def told(began):
    root, listed = began
    return changes(listed, open_dataset(str(root)))


def test_without_a_change_there_is_nothing_to_tell(began):
    assert told(began) == ""


def test_what_is_gone_new_or_changed_is_named(began):
    root, _ = began
    (root / NAMES[0]).unlink()
    assert told(began) == "1 is gone (ant/0.jpg)"
    (root / NAMES[-1]).unlink()
    fill(root, "train/bee/new.jpg", "train/bee/newer.jpg")
    (root / NAMES[1]).write_bytes(encoded((20, 20)))
    assert (
        told(began) == "2 are gone (the first ant/0.jpg), 2 are new (the first bee/new.jpg), 1 has changed (ant/1.jpg)"
    )
    fill(root, *NAMES)
    (root / NAMES[-1]).unlink()
    assert told(began).startswith("1 is gone (ant/0.jpg of the test images), ")


def test_another_class_is_a_change(began):
    root, _ = began
    (root / "train" / "bee").rename(root / "train" / "wasp")
    assert "2 are gone (the first bee/0.jpg), 2 are new (the first wasp/0.jpg)" in told(began)


def test_names_that_would_break_a_line_are_kept_apart(tmp_path):
    root = fill(tmp_path / "data", "a\n0.jpg", "a\t0.jpg", "a 0.jpg")
    dataset = open_dataset(str(root))
    write_images(tmp_path / "list", dataset)
    assert changes(tmp_path / "list", dataset) == ""
    (root / "a\n0.jpg").unlink()
    assert told((root, tmp_path / "list")) == "1 is gone (a\\n0.jpg)"


def test_the_same_images_give_the_same_file(began, tmp_path):
    root, listed = began
    write_images(tmp_path / "again", open_dataset(str(root)))
    assert listed.read_bytes() == (tmp_path / "again").read_bytes()


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_a_list_that_cannot_be_read_tells_nothing(began, damage):
    root, listed = began
    before = fingerprint(open_dataset(str(root)))
    content = listed.read_bytes()
    listed.unlink() if damage == "missing" else listed.write_bytes(content[:-9] if damage == "cut" else b"images")
    (root / NAMES[0]).unlink()
    assert told(began) == ""
    assert fingerprint(open_dataset(str(root))) != before
