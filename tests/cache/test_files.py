"""Atomic writes, and JSON that tells whether it is what was written (FIX C3, C4, C12, C13, C14; B: modes)."""

import json
import os
import random
import re
import stat
import string

import pytest
import torch
from safetensors.torch import save_file

from hsae.cache.files import PARTIAL, check_seal, parse_json, parse_toml, sealed, sweep, write_atomically


def test_a_file_gets_the_mode_of_any_new_file_whoever_wrote_it(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("x")
    write_atomically(tmp_path / "w.safetensors", lambda path: save_file({"x": torch.zeros(2)}, path))
    assert stat.S_IMODE((tmp_path / "w.safetensors").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_failed_write_leaves_the_old_file_nothing_else_and_names_the_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(partial):
        partial.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=re.escape(str(path))):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_two_writers_of_one_file_never_share_a_partial_name(tmp_path):
    names = []

    def write(partial):
        names.append(partial.name)
        partial.write_text("x")

    for _ in range(50):  # the same process number each time, as in two containers
        write_atomically(tmp_path / "file", write)
    assert len(set(names)) == 50


def test_sweep_deletes_partial_files_only(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / f".x.0123456789abcdef{PARTIAL}").write_text("half")
    (tmp_path / "a" / "x").write_text("whole")
    assert sweep(tmp_path) == 1
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["x"]


def test_what_is_being_written_is_not_swept_and_what_a_dead_writer_left_goes_with_the_next_write(tmp_path):
    """FIX C11"""
    path, left = tmp_path / "file", tmp_path / f".file.0123456789abcdef{PARTIAL}"
    left.write_bytes(b"half")
    os.utime(left, (1, 1))

    def write(partial):
        partial.write_text("whole")
        os.utime(partial, (1, 1))
        assert sweep(tmp_path) == 1 and partial.exists()
        left.write_bytes(b"half")
        os.utime(left, (1, 1))

    write_atomically(path, write)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "whole")]


def test_any_changed_character_of_a_sealed_file_is_noticed_or_changes_nothing():
    content = {"name": "a b", "n": 12345, "list": [1.5e-7, None, True], "inner": {"text": 'é"x'}}
    text, chance = json.dumps(sealed(content), indent=1), random.Random(0)
    check_seal(json.loads(text))
    for at in range(len(text)):
        other = text[:at] + chance.choice(string.printable) + text[at + 1 :]
        try:
            held = parse_json(other)
            check_seal(held)
        except (ValueError, TypeError):
            continue
        held.pop("checksum")
        assert held == content


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, b"\xff\xfe\xfa", "{", ""])
def test_whatever_is_wrong_with_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize("text", [b"x=" + b"[" * 100_000, b'name="\xff"', b"x = 1" + b"1" * 5000, b"="])
def test_whatever_is_wrong_with_toml_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_toml(text)


def test_toml_may_begin_with_a_byte_order_mark():
    assert parse_toml(b"\xef\xbb\xbfx = 1") == {"x": 1}
