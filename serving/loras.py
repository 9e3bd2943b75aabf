"""LoRA adapters that come and go while an engine answers requests.

    load_lora(engine, "poet", "checkpoints/poet").result()     # between two steps of the engine's thread
    unload_lora(engine, "poet").result()                       # new requests for it are refused; running ones finish

Both return a concurrent.futures.Future, whose exception is a UserError where it cannot be.
"""

import functools
import re
from concurrent.futures import Future
from pathlib import Path

from adapters import load_adapter, lora_layers
from formats.files import UserError, read_json
from formats.peft import LoraConfig
from formats.weights import stored_tensors
from model import CausalLM, MoE, block_linears
from serving.engine import Engine
from serving.fused import FusedRunner
from serving.runners import AdapterLinear, PagedRunner, _mix_slices

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
LORA_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_(A|B|magnitude_vector)(\.default)?(\.weight|\.bias)?")


def load_lora(engine: Engine, name: str, path: str) -> Future:
    """Put the LoRA of a PEFT folder beside those that are loaded, under this name."""
    return engine.between_steps(lambda: _load(engine, name, path))


def unload_lora(engine: Engine, name: str) -> Future:
    """Take a LoRA away: at once for new requests, and from the model when the last of its replies is finished."""

    def refuse_new():
        with engine.condition:
            if name not in engine.adapters:
                known = ", ".join(engine.adapters) or "none"
                raise UserError(f"lora_name: {name!r} is not loaded; loaded are {known}")
            engine.adapters.remove(name)
        drop()

    def drop():
        if engine.uses_adapter(name):
            engine.between_steps(drop)
        else:
            remove_lora(engine.runner, name)

    return engine.between_steps(refuse_new)


def _load(engine, name, path):
    runner = engine.runner
    if not isinstance(runner, PagedRunner) or runner.weights_are_free:
        raise UserError("lora_path: adapters at run time need mode dynamic, and --allow_runtime_lora from the start")
    if name in runner.adapters:
        state = "is loaded already" if name in engine.adapters else "is being unloaded: its replies are not finished"
        raise UserError(f"lora_name: {name!r} {state}")
    check_lora(runner.model, path)
    add_lora(runner, name, path)
    engine.pool.reset_prefix_cache()  # of another adapter that had this name
    with engine.condition:
        engine.adapters.append(name)


def check_lora(model: CausalLM, path: str) -> None:
    """UserError unless the folder holds a LoRA of the blocks' linears alone: nothing else may change in a running
    server."""
    config_path = Path(path) / "adapter_config.json"
    if not config_path.is_file():
        raise UserError(f"lora_path: {config_path}: no such file; an adapter is a PEFT folder on the server's disk")
    config = read_json(config_path)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"lora_path: {config_path}: peft_type must be LORA")
    LoraConfig.from_json(config, config_path)
    if config.get("bias", "none") != "none":
        raise UserError(f"lora_path: {config_path}: it trained biases, which all adapters share")
    modules = block_linears(model).keys()
    for name in stored_tensors(path, WEIGHT_FILES):
        match = LORA_TENSOR.fullmatch(name)
        if match is None or match[1] not in modules:
            reason = "is not a LoRA of a linear of this model's blocks"
            raise UserError(f"lora_path: {path}: {name} {reason}; give such an adapter as model_name_or_path")


def _unwrapped(model: CausalLM) -> dict[str, tuple]:
    """Takes every AdapterLinear out of the model: {module path: (parent, attribute, base, {name: LoRALinear})}."""
    entries = {}
    for module, (parent, attribute, layer) in block_linears(model).items():
        base, loras = (layer.base, layer.by_name) if isinstance(layer, AdapterLinear) else (layer, {})
        entries[module] = (parent, attribute, base, dict(loras))
        setattr(parent, attribute, base)
    return entries


def _wrap(runner: PagedRunner, entries: dict[str, tuple]) -> None:
    """Put the linears back, each with the LoRAs that it has."""
    for parent, attribute, base, loras in entries.values():
        setattr(parent, attribute, AdapterLinear(base, loras, runner.slices) if loras else base)
    for mlp in runner.model.sublayers():
        if isinstance(mlp, MoE):
            mlp.__dict__.pop("dispatch_and_combine", None)
            if any(isinstance(layer, AdapterLinear) for layer in mlp.experts.sublayers()):
                mlp.dispatch_and_combine = functools.partial(_mix_slices, mlp, runner.slices)
    runner.model.eval()


def add_lora(runner: PagedRunner, name: str, path: str) -> None:
    """The model is as before where the folder cannot be loaded."""
    entries = _unwrapped(runner.model)
    try:
        load_adapter(runner.model, path)
        found = lora_layers(runner.model)
    except BaseException:
        _wrap(runner, entries)
        raise
    for module, layer in found.items():
        entries[module][3][name] = layer
    _wrap(runner, entries)
    runner.adapters.append(name)
    if isinstance(runner, FusedRunner):
        runner.pack()


def remove_lora(runner: PagedRunner, name: str) -> None:
    entries = _unwrapped(runner.model)
    for _, _, _, loras in entries.values():
        loras.pop(name, None)
    _wrap(runner, entries)
    runner.adapters.remove(name)
    if isinstance(runner, FusedRunner):
        runner.pack()
