"""Tokenizer and chat template files are found wherever Hugging Face puts them, and stay plain
text.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from checkpoints.errors import CheckpointNotFound, InvalidCheckpoint
from checkpoints.tokenizer_files import (
    find_tokenizer,
    read_chat_templates,
    read_tokenizer_config,
)
from tests.checkpoints.fixtures import write_json


def test_tokenizer_is_found_or_its_absence_explained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"holds no tokenizer\.json$"):
        find_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointNotFound, match=r"it holds tokenizer\.model"):
        find_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert find_tokenizer(str(tmp_path)) == str(tmp_path / "tokenizer.json")


def test_templates_come_from_config_then_files(tmp_path: Path) -> None:
    assert read_chat_templates(str(tmp_path)) == {} == read_tokenizer_config(str(tmp_path))
    write_json(tmp_path, "tokenizer_config.json", {"chat_template": "{{ ''.__class__ }}"})
    assert read_chat_templates(str(tmp_path)) == {"default": "{{ ''.__class__ }}"}
    named = [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]
    write_json(tmp_path, "tokenizer_config.json", {"chat_template": named})
    assert read_chat_templates(str(tmp_path)) == {"default": "a", "rag": "b"}
    (tmp_path / "chat_template.jinja").write_text("c")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("d")
    (tmp_path / "additional_chat_templates" / "notes.txt").write_text("not a template")
    assert read_chat_templates(str(tmp_path)) == {"default": "c", "rag": "b", "tool_use": "d"}


@pytest.mark.parametrize(
    "value", [7, {"default": "x"}, ["x"], [{"name": "x"}], [{"name": 1, "template": "x"}]]
)
def test_template_of_wrong_type_is_refused_by_name(value: object, tmp_path: Path) -> None:
    write_json(tmp_path, "tokenizer_config.json", {"chat_template": value})
    with pytest.raises(InvalidCheckpoint) as caught:
        read_chat_templates(str(tmp_path))
    assert caught.value.field == "chat_template"


def test_template_outside_root_or_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    inside = tmp_path / "inside"
    inside.mkdir()
    os.symlink(tmp_path / "secret", inside / "chat_template.jinja")
    with pytest.raises(InvalidCheckpoint, match="outside"):
        read_chat_templates(str(inside), root=str(inside))
    (inside / "chat_template.jinja").unlink()
    (inside / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidCheckpoint, match="not UTF-8"):
        read_chat_templates(str(inside), root=str(inside))
