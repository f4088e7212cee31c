"""Tokenizers of every kind: what they may not give is refused, or does not come out of a text."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError
from edge_runtime.features.growth import growth
from edge_runtime.features.tokens import Encoder

PAD, UNK, BEGIN, END = range(4)
NAMES = ("<pad>", "<unk>", "<s>", "</s>")
LETTERS = "aehllo▁</>sp"
WORDS = list(dict.fromkeys([*NAMES, *LETTERS, "hello"]))
SPACES = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
IDS = {word: at for at, word in enumerate(WORDS)}
MODELS = {
    "BPE": {"type": "BPE", "unk_token": "<unk>", "vocab": IDS, "merges": []},
    "Unigram": {
        "type": "Unigram",
        "unk_id": UNK,
        "vocab": [[word, 0.0 if word in NAMES else -3.0] for word in WORDS],
    },
    "WordPiece": {
        "type": "WordPiece",
        "unk_token": "<unk>",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": IDS,
    },
    "WordLevel": {"type": "WordLevel", "unk_token": "<unk>", "vocab": IDS},
}
EVERY_KIND = pytest.mark.parametrize("kind", MODELS)


def added(*, special):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    named = enumerate(NAMES)
    return [{"id": at, "content": name, "special": special} | flags for at, name in named]


def template(*, texts=1, end=END):
    marks = {
        name: {"id": name, "ids": [at], "tokens": [name]}
        for name, at in (("<s>", BEGIN), ("</s>", end))
    }
    begin, close = ({"SpecialToken": {"id": name, "type_id": 0}} for name in marks)
    text = {"Sequence": {"id": "A", "type_id": 0}}
    pair = [text, {"Sequence": {"id": "B", "type_id": 0}}]
    single = [begin, *[text] * texts, close]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": marks}


def made(kind="WordLevel", length=8, **changes):
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added(special=True),
        "normalizer": None,
        "pre_tokenizer": SPACES if kind == "Unigram" else {"type": "WhitespaceSplit"},
        "post_processor": template(),
        "decoder": None,
        "model": MODELS[kind],
    }
    return Encoder(json.dumps(whole | changes), length)


def refusal(kind="WordLevel", length=8, **changes):
    with pytest.raises(ConfigError) as caught:
        made(kind, length, **changes)
    assert caught.value.code == "bad_tokenizer"
    return str(caught.value)


@EVERY_KIND
@pytest.mark.parametrize("special", [True, False])
def test_padding_and_marks_come_out_of_no_text(kind, special):
    encode = made(kind, 16, added_tokens=added(special=special))
    assert encode("") == [BEGIN, END, *[PAD] * 14]

    @given(st.lists(st.sampled_from([*WORDS, " ", "\0", "漢", "x" * 40])).map("".join) | st.text())
    def holds(text):
        row = encode(text)
        end = row.index(END)
        assert (len(row), row[0]) == (16, BEGIN)
        assert {PAD, BEGIN, END}.isdisjoint(row[1:end])
        assert max(row) < len(WORDS)
        assert set(row[end + 1 :]) <= {PAD}

    holds()


@EVERY_KIND
def test_what_stands_behind_a_written_mark_is_read(kind):
    encode = made(kind, 32, added_tokens=added(special=False))
    row = encode("</s> <pad> hello")
    assert IDS["hello" if kind != "BPE" else "h"] in row[1 : row.index(END)]
    assert row != encode("") != encode("hello")


@EVERY_KIND
@pytest.mark.parametrize("texts", [0, 2, 3])
def test_a_post_processor_that_gives_a_text_otherwise_than_once_is_refused(kind, texts):
    assert "otherwise than once" in refusal(kind, post_processor=template(texts=texts))


@EVERY_KIND
def test_a_text_of_any_length_has_as_many_ids_as_columns(kind):
    row = made(kind, 5)("hello " * 1000)
    assert (len(row), row[0], row[-1], PAD in row) == (5, BEGIN, END, False)


def test_ids_that_are_drawn_by_chance_are_refused():
    assert "by chance" in refusal(model=MODELS["BPE"] | {"dropout": 0.1})
    assert made(model=MODELS["BPE"] | {"dropout": None})("hello")


def test_padding_and_marks_beyond_the_vocabulary_are_refused():
    padding = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 4_000_000_000, "pad_type_id": 0, "pad_token": "<pad>"}
    assert "the id 4000000000" in refusal(padding=padding)
    assert "the id 999999" in refusal(post_processor=template(end=999_999))


def test_padding_that_is_a_mark_is_refused():
    assert "a mark, too" in refusal(post_processor=template(end=PAD))


def test_marks_that_leave_no_room_are_refused():
    assert "3 ids at least" in refusal(length=2)


def replace(old, new):
    return {"type": "Replace", "pattern": old, "content": new}


def sequence(*steps):
    return {"type": "Sequence", "normalizers": list(steps)}


def table(*texts):
    """A table of SentencePiece whose trie finds nothing."""
    data = (1024).to_bytes(4, "little") + bytes(1024) + "\0".join([*texts, ""]).encode()
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


DOUBLED = replace({"String": "q"}, "qq")
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    "normalizer",
    [
        sequence(*[DOUBLED] * 40),
        sequence(*[sequence(DOUBLED, DOUBLED)] * 20),
        sequence(*[replace({"Regex": "q"}, "qq")] * 40),
        sequence(*[replace({"String": ""}, "q")] * 40),
        replace({"String": "q"}, "q" * 5000),
        sequence(*[{"type": "Prepend", "prepend": "q"}, DOUBLED] * 20),
        sequence(*[{"type": "ByteLevel"}] * 20),
        sequence(*[replace({"String": " "}, "\ufdfa"), {"type": "NFKD"}] * 20),
        sequence(*[table("q" * 18)] * 10),
        table("q" * 5000),
    ],
)
def test_a_normalizer_that_can_grow_a_text_without_bound_is_refused(normalizer):
    assert "characters of one" in refusal(normalizer=normalizer)


def test_a_pre_tokenizer_that_can_grow_a_text_without_bound_is_refused():
    steps = {"type": "Sequence", "pretokenizers": [BYTES] * 20}
    assert "characters of one" in refusal(pre_tokenizer=steps)


UNIT = {"type": "StripAccents"}
SPM = table("q" * 18), replace({"Regex": " {2,}"}, "▁")
BERT = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}
QUOTES = replace({"String": "``"}, '"'), replace({"String": "''"}, '"')
USUAL = {
    "BERT": (BERT | {"strip_accents": None, "lowercase": True}, {"type": "BertPreTokenizer"}, 8),
    "RoBERTa": (None, BYTES, 4),
    "XLM-R": (sequence(*SPM), SPACES, 72),
    "T5": (
        sequence(SPM[0], {"type": "Strip", "strip_left": False, "strip_right": True}, SPM[1]),
        SPACES,
        72,
    ),
    "ALBERT": (
        sequence(*QUOTES, {"type": "NFKD"}, UNIT, {"type": "Lowercase"}, *SPM),
        SPACES,
        2592,
    ),
    "Llama": (
        sequence({"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁")),
        None,
        2,
    ),
    "Qwen": (
        {"type": "NFC"},
        {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": "\\s+|\\S+"},
                    "behavior": "Isolated",
                    "invert": False,
                },
                BYTES,
            ],
        },
        12,
    ),
}


@pytest.mark.parametrize("name", USUAL)
def test_tokenizers_in_common_use_are_accepted(name):
    normalizer, steps, most = USUAL[name]
    assert growth(normalizer) * growth(steps) == most
    kind = "BPE" if name in ("RoBERTa", "Llama", "Qwen") else "Unigram"
    assert made(kind, 32, normalizer=normalizer, pre_tokenizer=steps)("hello").count(PAD) > 1
