"""peft's adapter_config.json of a LoRA: which keys are used, which are refused, which modules they name.

    config = LoraConfig.from_json(_json_object(path), path)     # UserError names the key that cannot be honored
    config.targets("model.layers.0.self_attn.q_proj")           # True or False, by peft's rules
    config.rank_of(path), config.alpha_of(path)

docs/adapters.md has the table of keys. Paths are those of Hugging Face's modules, as peft sees them.
"""

import dataclasses
import re
from pathlib import Path

from formats.files import UserError, brief

# Keys that must be absent or false, as what they ask for is not here.
UNSUPPORTED_KEYS = (
    "layer_replication",
    "target_parameters",
    "use_qalora",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "megatron_config",
)

MOST_RANK = 1 << 16  # beyond the width of any model

# What peft does with the base weights when it opens an adapter with this init_lora_weights: "keep" them, or take a
# decomposition out of them that follows from the weights alone. UNREPEATABLE: something that cannot be done again.
START = {"true": "keep", "false": "keep", "gaussian": "keep", "orthogonal": "keep", "eva": "keep", "mica": "keep",
         "pissa": "pissa", "olora": "olora"}  # fmt: skip
UNREPEATABLE = {
    "pissa_niter": "its start is a random approximation, which peft does not repeat either",
    "corda": "its start depends on activations of data that the folder does not hold",
    "loftq": "its start quantizes the base model",
    "lora_ga": "its start depends on gradients of data that the folder does not hold",
}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The keys of adapter_config.json that shape a LoRA, under peft's names and with peft's defaults."""

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False  # B has a bias
    bias: str = "none"  # which biases of the base are trained: "none", "all", "lora_only"
    target_modules: str | list | None = None  # None: every linear of the blocks
    exclude_modules: str | list | None = None
    layers_to_transform: int | list | None = None
    layers_pattern: str | list | None = None
    rank_pattern: dict = dataclasses.field(default_factory=dict)  # {pattern: rank}, the first that fits
    alpha_pattern: dict = dataclasses.field(default_factory=dict)
    modules_to_save: list | None = None  # modules trained in full
    trainable_token_indices: list | dict | None = None  # rows of embeddings that are trained
    start: str = dataclasses.field(default="keep", metadata={"key": "init_lora_weights"})  # see START

    @classmethod
    def from_json(cls, config: dict, path: Path) -> "LoraConfig":
        """The content of adapter_config.json; UserError for what is malformed or cannot be honored."""
        for key in UNSUPPORTED_KEYS:
            if config.get(key):
                raise UserError(f"{path}: {key} = {brief(config[key])} is not supported")
        names = {field.name for field in dataclasses.fields(cls)} - {"start"}
        values = {key: config[key] for key in names & config.keys() if config[key] is not None}
        result = cls(**values, start=_start(config.get("init_lora_weights", True), path))
        result.check(path)
        return result

    def check(self, path: Path) -> None:
        """UserError for a value of a wrong kind, and for combinations that peft refuses too."""
        lists = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save")
        for key, kinds in {
            **dict.fromkeys(lists, (str, list)),
            "layers_to_transform": (int, list),
            "rank_pattern": dict,
            "alpha_pattern": dict,
            "trainable_token_indices": (list, dict),
        }.items():
            value = getattr(self, key)
            items = value if isinstance(value, list) and key in lists else ()
            if value is not None and not isinstance(value, kinds) or not all(isinstance(i, str) for i in items):
                raise UserError(f"{path}: {key} = {brief(value)} is not what peft writes there")
        for where, rank in [("r", self.r), *((f"rank_pattern {name!r}", r) for name, r in self.rank_pattern.items())]:
            if type(rank) is not int or not 1 <= rank <= MOST_RANK:
                raise UserError(f"{path}: {where} = {brief(rank)}; a rank is a whole number from 1 to {MOST_RANK}")
        if self.bias not in ("none", "all", "lora_only"):
            raise UserError(f'{path}: bias = {brief(self.bias)}; "none", "all" and "lora_only" are possible')
        for key in ("rank_pattern", "alpha_pattern"):
            if not all(isinstance(value, int | float) and value > 0 for value in getattr(self, key).values()):
                raise UserError(f"{path}: {key} = {brief(getattr(self, key))}; each value must be a number above 0")
        if isinstance(self.target_modules, str) and (self.layers_to_transform is not None or self.layers_pattern):
            raise UserError(f"{path}: layers_to_transform and layers_pattern need target_modules as a list")
        if self.lora_bias and self.use_dora:
            raise UserError(f"{path}: lora_bias is not possible with use_dora")
        patterns = [*self.rank_pattern, *self.alpha_pattern]
        patterns += [p for p in (self.target_modules, self.exclude_modules) if isinstance(p, str)]
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{path}: {pattern!r} is not a regular expression: {error}") from None

    def to_json(self) -> dict:
        """The keys for adapter_config.json: the first seven always, others where they differ from peft's defaults."""
        always = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "bias")
        fields = [field for field in dataclasses.fields(self) if field.name != "start"]
        values = {field.name: getattr(self, field.name) for field in fields}
        return {key: v for key, v in values.items() if key in always or not (v is None or v is False or v in ({}, []))}

    @property
    def all_linear(self) -> bool:
        return self.target_modules in (None, "all-linear", [])

    def rank_of(self, path: str) -> int:
        return _first_match(self.rank_pattern, path, self.r)

    def alpha_of(self, path: str) -> float:
        return _first_match(self.alpha_pattern, path, self.lora_alpha)

    def targets(self, path: str) -> bool:
        """Whether a module gets a LoRA."""
        exclude, saved = self.exclude_modules, self.modules_to_save or ()
        if exclude and (re.fullmatch(exclude, path) if isinstance(exclude, str) else _ends_with(path, exclude)):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in saved):
            return False
        if self.all_linear:
            return self._layer_is_wanted(path)
        if isinstance(self.target_modules, str):
            return bool(re.fullmatch(self.target_modules, path))
        return path in self.target_modules or _ends_with(path, self.target_modules) and self._layer_is_wanted(path)

    def _layer_is_wanted(self, path):
        wanted = self.layers_to_transform
        if wanted is None or wanted == []:
            return True
        names = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or [None]
        for name in names:
            match = re.match(rf"(?:^|.*?\.){name}\.(\d+)\." if name else r".*?\.[^.]*\.(\d+)\.", path)
            if match:
                return int(match[1]) in (wanted if isinstance(wanted, list) else [wanted])
        return False

    def is_saved(self, module: str) -> bool:
        """Whether a module is in modules_to_save."""
        return any(module.endswith(name) for name in self.modules_to_save or ())


def _start(value: object, path: Path) -> str:
    """init_lora_weights -> a value of START."""
    name = str(value).lower()
    if name in START:
        return START[name]
    for prefix, why in UNREPEATABLE.items():
        if name.startswith(prefix):
            mend = "in peft, save it with path_initial_model_for_weight_conversion, as a plain LoRA"
            raise UserError(f"{path}: init_lora_weights = {value!r} is not supported: {why}; {mend}")
    raise UserError(f"{path}: init_lora_weights = {brief(value)} is not known; known are {', '.join(START)}")


def _first_match(patterns: dict, path: str, default):
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _ends_with(path: str, names: list[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)
