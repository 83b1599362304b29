"""Text files of strangers: what is read, and what is refused at once in one line."""

import time
from itertools import pairwise
from string import ascii_lowercase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bkind3d.documents import dump_yaml, parse_json, parse_yaml, read_json, read_toml, read_yaml
from bkind3d.errors import InputError

BOMB = "a: &a [1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n" for old, new in pairwise(ascii_lowercase[:15])
)
HOSTILE_YAML = {
    "alias bomb": BOMB,
    "an alias of itself": "a: &a [*a]",
    "brackets": "[" * 100_000,
    "braces": "{a: " * 100_000,
    "dashes": "- " * 100_000 + "1",
    "many": "- \n" * 600_000,
    "a large number": "a: 1" + "0" * 400,
    "a very large number": "a: 1" + "0" * 5000,
    "code": "a: !!python/object/apply:os.system [ls]",
    "a key of lists": "? [1]\n: 2",
    "no number": "a: !!int x",
    "no time": "a: !!timestamp x",
    "control characters": "a: \x01",
}
HOSTILE_TOML = {
    "dotted": ".".join("a" * 20_000) + " = 1",
    "dotted and quoted": '"a,=".' * 20_000 + '"b" = 1',
    "dotted after a text": 'x = ["""a\n\\"""", {' + ".".join("a" * 20_000) + " = 1}]",
    "brackets": "a = " + "[" * 100_000,
    "a large number": "a = 1" + "0" * 400,
    "unclosed": 'a = "' + '\\"' * 200_000,
}


def refused(call, *arguments):
    """The message, in one line, of a call that refuses within two seconds."""
    began = time.process_time()
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert time.process_time() - began < 2
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize("what", HOSTILE_YAML)
def test_hostile_yaml(what):
    assert refused(parse_yaml, HOSTILE_YAML[what], "the.yaml").startswith("the.yaml: not a YAML file")


@pytest.mark.parametrize("what", HOSTILE_TOML)
def test_hostile_toml(tmp_path, what):
    path = tmp_path / "the.toml"
    path.write_text(HOSTILE_TOML[what])
    assert "not a TOML file" in refused(read_toml, path)


@pytest.mark.parametrize("text", ["[" * 100_000, "[1" + "0" * 400 + "]", "{", "nan", '{"a": 1'])
def test_hostile_json(text):
    assert "not valid JSON" in refused(parse_json, text, "the.json")


def test_files_that_are_none(tmp_path):
    (tmp_path / "list").write_text("[1]")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "large").write_bytes(b" " * (65 << 20))
    for read in (read_yaml, read_json):
        assert "expected keys and values, not [1]" in refused(read, tmp_path / "list")
        assert "not a text file" in refused(read, tmp_path / "bytes")
        assert "larger than" in refused(read, tmp_path / "large")
        assert "cannot be read (No such file" in refused(read, tmp_path / "absent")
        assert "cannot be read (Is a directory" in refused(read, tmp_path)


def test_numbers_and_texts_of_yaml():
    """Numbers as other programs write them; words, dates and names with zeros in front stay texts."""
    found = parse_yaml("[2e-3, 1., no, yes, 2026-12-01, 012, 1:30, 7, -3, .inf, true, ~, '']", "x")
    assert found == [0.002, 1.0, "no", "yes", "2026-12-01", "012", "1:30", 7, -3, float("inf"), True, None, ""]
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a", "x") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": {"x": 1},
    }


TEXTS = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=8) | st.sampled_from(
    ["1e3", "no", "012", "0x1f", "<<", "=", "~", "null", "1:30", "a: b", "2026-12-01", "- x", ".inf"]
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(TEXTS, PLAIN, max_size=3))
def test_what_is_written_is_read(content):
    assert parse_yaml(dump_yaml(content), "x") == content
