"""A folder with everything that a configuration points at, small enough to write per test."""

import json
from pathlib import Path
from typing import Any

import yaml

MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 6,
    "max_position_embeddings": 8192,
}


def write_model_folder(folder: Path, **changes: Any) -> Path:
    """A folder that looks like a Hugging Face checkpoint; a change to None removes the key."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {name: value for name, value in (MODEL | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "model.safetensors").touch()
    (folder / "tokenizer.json").write_text("{}")
    return folder


def write_run(folder: Path) -> Path:
    """A valid configuration file whose model and data exist; absolute paths throughout."""
    write_model_folder(folder / "model")
    (folder / "train.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    settings = {
        "run": {"dir": str(folder / "run"), "steps": 10},
        "model": {"path": str(folder / "model")},
        "data": {"path": str(folder / "train.jsonl")},
        "rewards": {"functions": [{"type": "math"}]},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path
