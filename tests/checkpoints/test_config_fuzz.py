"""Whatever JSON a config holds, reading it gives a value or a CheckpointError with a bounded
message.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.errors import CheckpointError
from checkpoints.hf_config import read_generation_defaults, read_model_config
from checkpoints.peft_config import read_peft_config
from checkpoints.tokenizer_files import read_chat_templates
from tests.checkpoints.fixtures import hf_config_dict, tiny_config, write_adapter

_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 70),
    st.sampled_from([2**31, 2**63, 10**400, -(10**400)]),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(
        ["q_proj", "layers", "yarn", "llama3", "linear", "full_attention", "(", "pissa"]
    ),
)
_KEYS = st.one_of(
    st.text(max_size=3),
    st.sampled_from(["rope_type", "type", "factor", "rope_theta", "q_proj", "*", "full_attention"]),
)
_JSON = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=5,
)

_MODEL_FIELDS = [
    *hf_config_dict(tiny_config(architecture="Qwen2ForCausalLM")),
    *("rope_scaling", "rope_theta", "layer_types", "quantization_config", "partial_rotary_factor"),
    *("original_max_position_embeddings", "torch_dtype", "num_experts", "pruned_heads"),
]
_ADAPTER_FIELDS = [
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "use_dora"),
    *("init_lora_weights", "modules_to_save", "base_model_name_or_path", "stray", "loftq_config"),
]
_GENERATION_FIELDS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty"]


def _sound_adapter() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        write_adapter(directory, tiny_config(), seed=0)
        found: dict[str, Any] = json.loads((Path(directory) / "adapter_config.json").read_text())
        return found


_READERS: dict[str, tuple[str, list[str], dict[str, Any], Callable[[str], object]]] = {
    "model": (
        "config.json",
        _MODEL_FIELDS,
        hf_config_dict(tiny_config(architecture="Qwen2ForCausalLM")),
        read_model_config,
    ),
    "adapter": (
        "adapter_config.json",
        _ADAPTER_FIELDS,
        _sound_adapter(),
        lambda path: read_peft_config(path, num_layers=2),
    ),
    "generation": (
        "generation_config.json",
        [*_GENERATION_FIELDS, "do_sample", "eos_token_id"],
        {},
        read_generation_defaults,
    ),
    "tokenizer": ("tokenizer_config.json", ["chat_template"], {}, read_chat_templates),
}


@pytest.mark.row(26)
@pytest.mark.parametrize("reader", _READERS)
def test_no_json_value_escapes_as_another_error(reader: str) -> None:
    file, fields, sound, read = _READERS[reader]

    @settings(deadline=None, max_examples=250)
    @given(st.dictionaries(st.sampled_from(fields), _JSON, min_size=1, max_size=2))
    def check(changes: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / file).write_text(json.dumps(sound | changes))
            try:
                read(directory)
            except CheckpointError as error:
                assert len(str(error)) < 1000

    check()
