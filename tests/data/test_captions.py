"""Captions and labels as people have them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ldm_cli.data.bad_samples import BadSampleError
from ldm_cli.data.captions import MAX_CAPTION_LENGTH, clean_caption, decode_text, field_of, parse_json, parse_label
from ldm_cli.data.config import DataConfig
from ldm_cli.data.sample_decoder import Draw, Members, MembersDecoder, Wanted


@pytest.mark.parametrize(
    ("data", "text", "remarks"),
    [
        ("café 猫".encode(), "café 猫", ()),
        (b"\xef\xbb\xbfmarked", "marked", ()),
        ("café".encode("latin-1"), "café", ("Windows-1252 text",)),
    ],
)
def test_text_is_utf8_or_counted_as_windows_1252(data: bytes, text: str, remarks: tuple[str, ...]) -> None:
    assert decode_text(data) == (text, remarks)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a red circle \n", "a red circle"),
        ("a\0b\x1b[31mc", "a b [31mc"),
        ("two\r\nlines", "two lines"),
        ("a\u202ebackwards\u202c", "a backwards"),
        ("family \U0001f468\u200d\U0001f469\u200d\U0001f467", "family \U0001f468\u200d\U0001f469\u200d\U0001f467"),
    ],
)
def test_control_characters_and_bidi_overrides_go_and_emoji_stay(text: str, cleaned: str) -> None:
    assert clean_caption(text).text == cleaned


def test_an_endless_caption_is_cut_and_counted() -> None:
    assert clean_caption("x" * 10**6) == ("x" * MAX_CAPTION_LENGTH, ("long caption",))


@pytest.mark.parametrize("data", [b"{", b"[1]", b"\xff", b"9" * 5000, b"[" * 100_000, b""])
def test_broken_json_is_a_bad_sample(data: bytes) -> None:
    with pytest.raises(BadSampleError, match="damaged json"):
        parse_json(data)


def test_fields_are_found_by_name_and_by_path() -> None:
    metadata = {"caption": "a", "meta": {"text": {"en": "b"}}, "dotted.name": "c"}
    assert [field_of(metadata, path) for path in ("caption", "meta.text.en", "dotted.name")] == ["a", "b", "c"]
    assert [field_of(metadata, path) for path in ("nothing", "caption.en", "meta.nothing.en")] == [None] * 3


def test_one_of_several_captions_is_chosen_evenly_and_blank_ones_never() -> None:
    config = DataConfig(shards="*.tar", caption="json:text", missing_caption="empty")
    decoder = MembersDecoder(config, Wanted(image=False))

    def chosen(value: Any, choice: float) -> str:
        members = {"json": json.dumps({"text": value}).encode()}
        return decoder.decode_members(Members(members.get, members), Draw(caption=choice)).caption

    found = [chosen(["a", " ", "b", 3, "c"], (k + 0.5) / 300) for k in range(300)]
    assert [found.count(text) for text in ("a", "b", "c")] == [100] * 3
    assert chosen("only", 0.9) == "only"
    for nothing in (None, 3, [], ["", " "], {"en": "a"}):
        assert chosen(nothing, 0.5) == ""


@pytest.mark.parametrize(
    ("members", "place", "detail"),
    [
        (
            {"jpg": b"", "json": b'{"url": "u", "TEXT": "a cat"}'},
            "txt",
            "no text in txt; the sample has jpg, json (fields: url, TEXT); take data.caption=json:TEXT",
        ),
        (
            {"jpg": b"", "json": b'{"caption": " ", "alt": "a cat"}'},
            "json:caption",
            "no text in json:caption; the sample has jpg, json (fields: caption, alt); take data.caption=json:alt",
        ),
        (
            {"jpg": b"", "caption": b"a cat"},
            "txt",
            "no text in txt; the sample has jpg, caption; take data.caption=caption",
        ),
        ({"jpg": b"", "json": b"{"}, "txt", "no text in txt; the sample has jpg, json; data.caption can name another"),
    ],
)
def test_a_missing_caption_says_what_the_sample_has(members: dict[str, bytes], place: str, detail: str) -> None:
    decoder = MembersDecoder(DataConfig(shards="*.tar", caption=place), Wanted(image=False, label=False))
    with pytest.raises(BadSampleError) as caught:
        decoder.decode_members(Members(members.get, members), Draw())
    assert (caught.value.reason, caught.value.detail) == ("missing caption", detail)


@pytest.mark.parametrize(("value", "label"), [("7", 7), (7, 7), ("0", 0), (" 3 ", 3)])
def test_labels_are_class_indexes(value: Any, label: int) -> None:
    assert parse_label(value) == label


@pytest.mark.parametrize("value", ["cat", "", "-1", -1, 1.0, True, "1e3", [1], 2**63])
def test_anything_else_is_a_bad_label(value: Any) -> None:
    with pytest.raises(BadSampleError, match="bad label"):
        parse_label(value)


def test_no_label_is_a_missing_one() -> None:
    with pytest.raises(BadSampleError, match="missing label"):
        parse_label(None)
