"""What is published of a recipe names no machine."""

from __future__ import annotations

import pytest

from afd_train.public import without_machine


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/home/me/runs/x", "x"),
        ("~/secret/weights.pt", "weights.pt"),
        ("../../secret/weights.pt", "weights.pt"),
        (r"C:\Users\me\weights.pt", "weights.pt"),
        ("file:///home/me/x.mp4", "x.mp4"),
        ("/home/me/my videos/x", "x"),
        ("captions=/home/me/x.csv, fit=crop", "captions=x.csv, fit=crop"),
        ("seen in (/mnt/data/x) today", "seen in (x) today"),
        ("https://me:password@host/x?signature=1#a", "https://host/x"),
        ("from https://host/x?signature=1 today", "from https://host/x today"),
    ],
)
def test_paths_and_logins_are_cut_to_what_they_name(text, public):
    assert without_machine({"key": [text, 1]}) == {"key": [public, 1]}


@pytest.mark.parametrize("text", ["runs/quickstart", "hf://OWNER/REPO@main/x.pt", "and/or", "a / b", "24/30", "", "x?"])
def test_other_texts_stay(text):
    assert without_machine(text) == text
