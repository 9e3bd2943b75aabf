"""Published models by name: their shapes, and what to download when a model is not on this disk."""

import difflib
import functools
import json
from pathlib import Path

from families import ModelConfig
from formats.gguf_folder import open_folder

CATALOGUE = Path(__file__).resolve().parents[1] / "configs" / "models.json"


@functools.cache
def presets() -> dict[str, dict]:
    """{name: {"repo", "licence", "parameters", "config"}} of configs/models.json.

    A preset with "like" is another checkpoint of the same shape: it inherits what it does not define itself.
    """
    catalogue = json.loads(CATALOGUE.read_text(encoding="utf-8"))
    for name, preset in catalogue.items():
        base = catalogue.get(preset.get("like"), {})
        catalogue[name] = {**base, **preset, "config": {**base.get("config", {}), **preset.get("config", {})}}
    return catalogue


def find_preset(name: str) -> tuple[str, dict] | None:
    """(name, preset) by the preset's name or its Hugging Face repository, in upper or lower case; None if unknown."""
    wanted = str(name).lower().rstrip("/")
    return next((item for item in presets().items() if wanted in (item[0], (item[1]["repo"] or "").lower())), None)


def missing_model_message(key: str, path: str) -> str:
    """The error line for a model that is not on this disk: what to download and to where, or the nearest names."""
    if (item := find_preset(path)) is None:
        names = {name.lower(): name for name in [*presets(), *(p["repo"] for p in presets().values() if p["repo"])]}
        near = [names[name] for name in difflib.get_close_matches(str(path).lower(), names, 3)]
        line = f"{key}: {path}: no such folder, and no preset of configs/{CATALOGUE.name}"
        return line + (f"; nearest: {', '.join(near)}" if near else "")
    name, preset = item
    if preset["repo"] is None:
        return (
            f"{key}: {name} has no published weights: pretrain.py trains them; tokenizer_name_or_path is the folder of "
            "the tokenizer"
        )
    files = "config.json, *.safetensors or *.bin, and the tokenizer's files"
    if key.startswith("tokenizer"):
        files = "the tokenizer's files"
    else:
        files += f", {2 * preset['parameters'] / 1e9:,.1f} GB with 16 bits a weight"
    return (
        f"{key}: {path} is not here: download {preset['repo']} from Hugging Face ({files}) into the folder {path}, or "
        "give the folder that holds it"
    )


def model_config(path: str) -> ModelConfig:
    """ModelConfig of a folder, or of a preset."""
    if Path(path).exists() or (item := find_preset(path)) is None:
        return ModelConfig.from_json(open_folder(path))
    return ModelConfig.from_dict(dict(item[1]["config"]), f"{CATALOGUE.name}: {item[0]}")
