"""generation_config.json: the ids that end a reply, and the sampling defaults that come with a model.

    content = read_generation_config([adapter_folder, model_folder])      # of the first that has one
    eos_ids(content)                                                      # [2], [151645, 151643], …
    write_generation_config(folder, content, stop_ids, bos_id, pad_id)    # what is saved beside a trained model

transformers and vLLM stop at the ids of generation_config.json; without the file, at those of config.json. Unknown keys
are kept: the file is the base model's, with the stop ids of the format that was trained.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from formats.files import UserError, atomic_file, brief, read_json

GENERATION_FILE = "generation_config.json"
# What transformers takes from config.json where there is no GENERATION_FILE.
CONFIG_KEYS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
)


def read_generation_config(folders: Iterable[str | Path]) -> dict:
    """The content of the first generation_config.json, else what config.json says of generation; {} without either.

    folders: an adapter's and then its base's, or a model's. eos_token_id is config.json's where the file has none.
    UserError: not JSON, not an object, or an eos_token_id that is neither an id nor a list of ids.
    """
    content = {}
    for name in (GENERATION_FILE, "config.json"):
        if (path := next((Path(f) / name for f in folders if (Path(f) / name).is_file()), None)) is None:
            continue
        found = read_json(path)
        if not isinstance(found, dict):
            raise UserError(f"{path}: must hold a JSON object, found {brief(found)}")
        eos = found.get("eos_token_id")
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(type(i) is int for i in ids):
            raise UserError(f"{path}: eos_token_id: an id or a list of ids is expected, found {brief(eos)}")
        if name == GENERATION_FILE:
            content = found
        elif not content:
            content = {key: found[key] for key in CONFIG_KEYS if found.get(key) is not None}
        elif content.get("eos_token_id") is None and ids:
            content = {**content, "eos_token_id": eos}
    return content


def eos_ids(content: dict) -> list[int]:
    """eos_token_id of read_generation_config() as a list; negative ids, which mean none, are left out."""
    eos = content.get("eos_token_id")
    return [i for i in (eos if isinstance(eos, list) else [eos]) if i is not None and i >= 0]


def write_generation_config(
    folder: str | Path, content: dict, stop_ids: list[int], bos_id: int | None = None, pad_id: int | None = None
) -> None:
    """Write generation_config.json: `content` with all stop_ids; if it is empty, with bos and pad too.

    Nothing is changed where the content has the same stop ids already.
    """
    content = dict(content) or {
        key: i for key, i in (("bos_token_id", bos_id), ("pad_token_id", pad_id)) if i is not None
    }
    ids = list(dict.fromkeys([*eos_ids(content), *stop_ids]))
    if set(ids) != set(eos_ids(content)):
        content["eos_token_id"] = ids if len(ids) > 1 else ids[0]
        content.pop("_from_model_config", None)  # with it transformers 4 would read config.json's ids again
    with atomic_file(Path(folder) / GENERATION_FILE) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
