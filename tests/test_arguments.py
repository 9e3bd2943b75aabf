"""arguments.py and its tables: other tools' names and values, their files (JSON, YAML), LoRA targets, hints, refusals.

python -m pytest tests/test_arguments.py                            # a few seconds; no model
python -m pytest tests/test_arguments.py --hf-python PYTHON         # also every name that TRL and transformers have
"""

import dataclasses
import json
import math
import re
import sys
import types

import pytest

import dpo
import export
import finetune
import pretrain
import quantize
import reward
import rl
import serve
import trainer
from arguments import _Script, lora_targets, parse_args
from checkpoint import TrainState
from formats.config_files import read_config
from formats.files import UserError
from formats.paddlenlp import ALIASES, CHOICES, HARMLESS, IGNORED, NESTED, OPTIONS, REFUSED, REFUSED_IN, SHORTHANDS

SCRIPTS = {script.__name__: script for script in (pretrain, finetune, dpo, reward, rl, quantize, export, serve)}
NEEDED = {
    "pretrain": "--model_name_or_path m --input_dir d --output_dir o --do_train true --max_steps 1",
    "finetune": "--model_name_or_path m --dataset_name_or_path d --output_dir o --do_train true",
    "dpo": "--model_name_or_path m --train_dataset_path d --output_dir o --do_train true",
    "reward": "--model_name_or_path m --train_dataset_path d --output_dir o --do_train true",
    "rl": "--model_name_or_path m --train_dataset_path d --output_dir o --do_train true --reward_funcs r.py:f",
    "quantize": "--model_name_or_path m --dataset_name_or_path d --output_dir o --do_ptq true",
    "export": "--model_name_or_path m --output_dir o",
    "serve": "--model_name_or_path m",
}


CONFIGS = {}  # {script: a JSON file with these keys}


@pytest.fixture(scope="module", autouse=True)
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, text in NEEDED.items():
        words = text.replace("--", "").split()
        keys = {key: {"true": True, "1": 1}.get(value, value) for key, value in zip(words[::2], words[1::2])}
        CONFIGS[name] = str(folder / f"{name}.json")
        (folder / f"{name}.json").write_text(json.dumps(keys))


def parse(name, text=""):
    """parse_args of a file with a script's required keys, then these."""
    return parse_args(SCRIPTS[name].Args, [CONFIGS[name], *text.split()])


def refusal(name, text):
    with pytest.raises(UserError) as error:
        parse(name, text)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------- data, model, limits

USED = """
finetune --max_seq_length 512             max_length=512 src_length=256
finetune --max_seq_len 4096               max_length=4096 src_length=1024
finetune --cutoff_len 300                 max_length=300
finetune --max_prompt_length 100          src_length=100
finetune --dev_dataset_path D             dev_dataset_path='D'
finetune --eval_dataset D                 dev_dataset_path='D'
finetune --validation_file D              dev_dataset_path='D'
finetune --train_file MINE                dataset_name_or_path='MINE'
finetune --dataset MINE                   dataset_name_or_path='MINE'
finetune --dataset_name MINE              dataset_name_or_path='MINE'
finetune --train_dataset_path MINE        dataset_name_or_path='MINE'
finetune --model MINE                     model_name_or_path='MINE'
finetune --packing true                   zero_padding=True
finetune --gradient_checkpointing         recompute=True
finetune --finetuning_type lora           lora=True
finetune --finetuning_type full           lora=False
finetune --fine_tuning LoRA               lora=True
finetune --use_lora true                  lora=True
finetune --use_peft --lora_r 4            lora=True lora_rank=4 lora_alpha=8.0
finetune --torch_dtype bfloat16           bf16=True
finetune --dtype float32                  bf16=False fp16=False
finetune --tensor_model_parallel_size 1   tensor_parallel_degree=1
finetune --per_device_batch_size 3        per_device_train_batch_size=3
finetune --num_epochs 2 --lr 1e-3         num_train_epochs=2.0 learning_rate=1e-3
finetune --warmup_steps 0.1               warmup_steps=0 warmup_ratio=0.1
finetune --warmup_steps 7                 warmup_steps=7
finetune --eval_strategy steps            evaluation_strategy='steps'
finetune --early_stopping_patience 3 --eval_strategy steps    early_stopping_patience=3
finetune --early_stopping_steps 2 --eval_strategy steps       early_stopping_patience=2
finetune --use_cpu true                   device='cpu'
finetune --save_only_model true           ignore_save_lr_and_optim=True
finetune --eval_split_ratio 0.1            val_size=0.1
finetune --val_size 0                     val_size=None
finetune --mask_history true              train_on='last'
finetune --mask_history false             train_on='all'
finetune --max_train_samples 9            max_samples=9
finetune --template qwen2                 chat_template='qwen2'
finetune --template qwen                  chat_template='qwen2.5'
finetune --stage sft                      do_train=True
finetune --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":1e-6}   min_learning_rate=1e-6
dpo      --dataset_name_or_path MINE      train_dataset_path='MINE' dev_dataset_path='MINE'
dpo      --dataset MINE --eval_dataset D  train_dataset_path='MINE' dev_dataset_path='D'
dpo      --eval_dataset D --dataset MINE  train_dataset_path='MINE' dev_dataset_path='D'
dpo      --train_file MINE                train_dataset_path='MINE' dev_dataset_path=''
dpo      --src_length 99                  max_prompt_len=99
dpo      --max_prompt_length 99           max_prompt_len=99
dpo      --max_seq_length 99              max_seq_len=99
dpo      --pref_loss simpo --pref_beta 2  loss_type='simpo' beta=2.0
dpo      --rpo_alpha 0.5                  sft_loss_ratio=0.5
dpo      --stage kto --kto_chosen_weight 2  loss_type='kto' desirable_weight=2.0
dpo      --stage dpo                      loss_type='sigmoid'
dpo      --loss_type sigmoid,bco_pair,sft --loss_weights 0.8,0.2,1  loss_type=['sigmoid','bco_pair'] sft_loss_ratio=1.0
dpo      --sync_ref_model true --ref_model_sync_steps 9  ref_model_update_steps=9 ref_model_mixup_alpha=0.6
pretrain --max_length 99                  max_seq_length=99
pretrain --cutoff_len 99                  max_seq_length=99
pretrain --data_path D                    input_dir='D'
pretrain --dtype bf16                     bf16=True
quantize --cutoff_len 99 --max_prompt_len 9   max_length=99 src_length=9
export   --export_dir E --dtype float16   output_dir='E' save_dtype='float16' fp16=False
serve    --max_model_len 99               total_max_length=99
serve    --max_new_tokens 9               max_length=9
"""


@pytest.mark.parametrize("row", USED.strip().splitlines())
def test_a_name_of_another_tool_sets_our_key(row, capsys):
    name, *words = row.split()
    expected = [word for word in words if "=" in word and not word.startswith(("--", "{"))]
    args = parse(name, " ".join(words[: len(words) - len(expected)]))
    for word in expected:
        key, _, value = word.partition("=")
        assert getattr(args, key) == eval(value), word
    assert "ignored: " not in capsys.readouterr().out


REFUSALS = """
dpo      --max_length 512                 max_seq_len limits a row, so a prompt with both replies
dpo      --cutoff_len 512                 max_seq_len limits a row, so a prompt with both replies
dpo      --prefix_path p                  prefix_path needs prefix_tuning
dpo      --label_smoothing_factor 0.1     it has no label smoothing
dpo      --ref_model m                    the reference is the model before training
finetune --sync_ref_model true            only dpo.py has a reference that follows the policy
finetune --label_smoothing_factor 0.1     it has no label smoothing
finetune --label_smoothing 0.1            it has no label smoothing
finetune --loss_type dft                  dpo.py has others
finetune --input_dir d                    give them as dataset_name_or_path
finetune --data_file d                    give them as dataset_name_or_path
finetune --total_max_length 9             src_length limits a prompt, max_length prompt and reply
finetune --batch_size 4                   set per_device_train_batch_size
finetune --finetuning_type freeze         all layers are trained, or LoRA
finetune --finetuning_type galore         possible are lora, full
finetune --torch_dtype int8               possible are auto, float32
finetune --optim sgd                      the only optimizer is adamw
finetune --load_in_4bit true              QLoRA
finetune --deepspeed ds.json              sharding: stage1, stage2 or stage3
finetune --stage dpo                      this is finetune.py; run dpo.py
finetune --stage kto                      this is finetune.py; run dpo.py
finetune --stage orpo                     this is finetune.py; possible are pt, sft, rm, dpo, kto, ppo
finetune --lora_bias all                  only the weights of LoRA itself are trained
finetune --assistant_only_loss false      only replies are learned
finetune --block_size 512                 src_length limits a prompt, max_length prompt and reply
finetune --rank 16                        set lora_rank
pretrain --block_size 512                 a sample has max_seq_length tokens
finetune --template llama2                without it the model's own template is used
finetune --max_target_length 9            a prompt and a reply share one limit
finetune --num_hidden_layers 2            the model's config.json defines it
finetune --tensor_model_parallel_size 2   = 2 processes, but this run has 1
finetune --early_stopping_patience 0      it must be at least 1
finetune --early_stopping_patience 2      needs evaluation_strategy: steps or epoch
finetune --dev_dataset_path D --val_size 0.1   are both given; choose one
finetune --warmup_steps 1.5               a whole number is needed, or a share of all steps below 1
finetune --lora_target_modules (q         is no regular expression
pretrain --dataset_name_or_path d         give them as input_dir
pretrain --train_file d                   give them as input_dir
pretrain --dev_dataset_path d             give them as input_dir
pretrain --src_length 9                   a sample has max_seq_length tokens
pretrain --lora_path p                    use finetune.py for adapters
pretrain --finetuning_type lora           use finetune.py for fine-tuning
export   --dataset_name_or_path d         export.py reads no data
serve    --dataset_name_or_path d         give prompt or data_file
serve    --resume_from_checkpoint c       give it as model_name_or_path
serve    --system x                       system is the system text before prompt
"""


@pytest.mark.parametrize("row", REFUSALS.strip().splitlines())
def test_what_cannot_be_used_is_refused_with_the_right_name(row):
    name, given, text = re.fullmatch(r"(\w+) +((?:--\w+ \S+ ?)+) +(.*)", row).groups()
    line = refusal(name, given)
    key = given.split()[0]
    assert text in line and (key[2:] in line or "parallel" in key), line


def test_no_key_of_data_model_or_a_limit_is_ignored(capsys):
    """Every name with such a meaning, in every script: the printed lines never say that it is ignored."""
    names = """dataset_name_or_path train_dataset_path dev_dataset_path dataset dataset_name train_file validation_file
        eval_dataset data_path input_dir data_file eval_datasets ptx_datasets train_datasets max_seq_length max_seq_len
        max_length cutoff_len src_length max_prompt_length max_prompt_len total_max_length max_new_tokens max_samples
        val_size eval_split_ratio lora_path prefix_path adapter_name_or_path num_hidden_layers batch_size
        test_file max_target_length split model_revision""".split()
    for script in SCRIPTS:
        for name in names:
            value = "2000" if any(part in name for part in ("max", "len", "size", "layers", "ratio")) else "given"
            try:
                parse(script, f"--{name} {value}")
            except UserError as error:
                shown = name in str(error) or "lora_path needs lora: true" in str(error)
                shown = shown or script == "serve" and "lora_path: given: no such folder" in str(error)  # its own name
                assert shown and "unknown key" not in str(error), error
            assert "ignored" not in capsys.readouterr().out, (script, name)


def test_evaluation_is_never_on_the_records_that_are_trained_on(tmp_path):
    """One file given as the whole data set is not both, whatever it is called; a folder has two files."""
    for name in ("mine.json", "train.json", "dev.json"):
        (tmp_path / name).write_text("{}")
    file, other = tmp_path / "mine.json", tmp_path / "dev.json"
    same = f"{tmp_path}/../{tmp_path.name}/train.json"
    for script, keys in (
        ("dpo", f"--dataset_name_or_path {file} --do_eval true"),
        ("dpo", f"--train_dataset_path {tmp_path} --dev_dataset_path {same} --do_eval true"),
        ("finetune", f"--dataset_name_or_path {file} --evaluation_strategy epoch"),
    ):
        line = refusal(script, keys)
        assert "is trained on and cannot be the dev data too" in line and "val_size: 0.05" in line, line
    keys = {"model_name_or_path": "m", "output_dir": "o", "do_train": True, "do_eval": True}
    blend = finetune.Args(**keys, dataset_name_or_path=f"0.5 {file} 0.5 {tmp_path}")
    prompts = rl.Args(**keys, train_datasets=str(file), eval_datasets=str(file), reward_funcs="x.py:f")
    for args in (blend, prompts):
        with pytest.raises(UserError, match="mine.json is trained on"):
            args.check()
    assert "test.json" in refusal("finetune", f"--dataset_name_or_path {file} --val_size 0.1 --do_predict true")
    for keys in ("--do_eval 1 --val_size 0.1", f"--do_eval 1 --dev_dataset_path {other}", "--do_train 0 --do_eval 1"):
        parse("finetune", f"--dataset_name_or_path {file} {keys}")
    assert parse("dpo", f"--dataset_name_or_path {tmp_path} --do_eval true").dev_dataset_path == str(tmp_path)


def test_keys_without_the_key_that_they_belong_to(capsys):
    """They are said or refused, never ignored."""
    parse("finetune", "--lora_r 4 --lora_target q_proj --val_size 0.1")
    printed = capsys.readouterr().out
    for key in (
        "lora_rank is not read: lora is false",
        "lora_target_modules is not read",
        "val_size: records are held",
    ):
        assert key in printed
    parse("finetune", "--lora_r 4 --use_lora true")
    assert "not read" not in capsys.readouterr().out
    assert "needs early_stopping_patience" in refusal("finetune", "--early_stopping_threshold 0.1")


# ---------------------------------------------------------------------------------------------- hints


def test_hints_are_keys_that_the_script_takes():
    wrong = {"dataset": "ptx_datasets", "packing": "eval_packing", "gradient_checkpointing": "unified_checkpoint"}
    wrong |= {"finetuning_type": "min_learning_rate", "use_lora": "rslora", "label_smoothing_factor": "label_smoothing"}
    wrong |= {"torch_dtype": "dtype", "train_file": "data_file", "lora_bias": "lora_rank"}
    for name, hint in wrong.items():
        value = "lora" if name == "finetuning_type" else "float32" if name == "torch_dtype" else "1"
        try:
            parse("finetune", f"--{name} {value}")
        except UserError as error:
            assert hint not in str(error).split() and "did you mean" not in str(error)
    for script, module in SCRIPTS.items():
        takes = _Script(module.Args)
        for typo in (
            "learning_rat",
            "cutof_len",
            "max_sequ_length",
            "lora_alfa",
            "train_fil",
            "model_nam_or_path",
            "sed",
        ):
            line = refusal(script, f"--{typo} 1")
            assert f"unknown key '{typo}'" in line
            if "did you mean" in line:
                assert takes.takes(line.split("'")[3]), (script, line)
    assert refusal("finetune", "--cutof_len 1").endswith("did you mean 'cutoff_len'?")
    assert refusal("serve", "--prompts x").endswith("did you mean 'prompt'?")
    assert refusal("finetune", "--zzz 1").endswith("unknown key 'zzz'")


def test_tables_are_consistent():
    """Each name has one meaning, and each alias leads to a key that some script has."""
    fields = {name: {field.name for field in dataclasses.fields(script.Args)} for name, script in SCRIPTS.items()}
    every = set().union(*fields.values())
    for table in (IGNORED, OPTIONS, CHOICES, NESTED, SHORTHANDS):
        assert not set(table) & set(ALIASES), set(table) & set(ALIASES)
        assert not set(table) & set(REFUSED), set(table) & set(REFUSED)
    for name, keys in ALIASES.items():
        for choice in keys.split():
            assert set(choice.split("+")) <= every, name
    for choices in CHOICES.values():
        for keys in choices.values():
            assert isinstance(keys, str) or set(keys) <= every
    for script, table in REFUSED_IN.items():
        assert not set(table) & fields[script], (script, set(table) & fields[script])
    assert set(HARMLESS) <= set(REFUSED) and set(NESTED["lr_scheduler_kwargs"].values()) <= every


# ---------------------------------------------------------------------------------------------- files of other tools

LLAMA_FACTORY = """### model
model_name_or_path: m
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: my_data  # a file or a folder here
template: qwen2
cutoff_len: 2048
preprocessing_num_workers: 16

### output
output_dir: saves/mine
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none  # choices: [none, wandb, tensorboard]

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
loraplus_lr_ratio: null
"""
PADDLEFORMERS = """train_dataset_type: erniekit
train_dataset_path: ./train.jsonl
train_dataset_prob: "1.0"
eval_dataset_path: ./eval.jsonl
eval_dataset_prob: "1.0"
max_seq_len: 8192
packing: false
mix_strategy: concat
model_name_or_path: m
_attn_implementation: flashmask
stage: DPO
fine_tuning: full
seed: 23
do_train: true
do_eval: true
num_train_epochs: 1
max_steps: -1
evaluation_strategy: no
output_dir: o
learning_rate: 1.0e-6
loss_type: sigmoid
tensor_model_parallel_size: 1
pipeline_model_parallel_size: 1
sharding: stage1
recompute_granularity: full
recompute_method: uniform
recompute_num_layers: 1
bf16: true
unified_checkpoint: false
save_checkpoint_format: flex_checkpoint
"""


def test_yaml_of_other_tools(tmp_path, capsys):
    path = tmp_path / "theirs.yaml"
    path.write_text(LLAMA_FACTORY)
    args = parse_args(finetune.Args, [str(path), "--seed", "7"])
    found = (args.lora, args.lora_target_modules, args.dataset_name_or_path, args.chat_template, args.max_length)
    assert found == (True, "all-linear", "my_data", "qwen2", 2048) and args.seed == 7
    assert (args.learning_rate, args.num_train_epochs, args.bf16, args.report_to) == (1e-4, 3.0, True, ["none"])
    ignored = [line.split(":")[1].strip() for line in capsys.readouterr().out.splitlines()]
    assert ignored == ["trust_remote_code", "preprocessing_num_workers", "plot_loss"]
    path.write_text(PADDLEFORMERS)
    args = parse_args(dpo.Args, [str(path)])
    assert (args.train_dataset_path, args.dev_dataset_path) == ("./train.jsonl", "./eval.jsonl")
    assert (args.max_seq_len, args.lora, args.evaluation_strategy) == (8192, False, "no")
    with pytest.raises(UserError, match=r"theirs.yaml:11: stage: 'DPO': this is finetune.py; run dpo.py"):
        parse_args(finetune.Args, [str(path)])


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: 1\nb: 2\na: 3\n", r":3: key 'a' is given twice"),
        ("a: 1\nb: [1, 2\n", r":3: not YAML: "),
        ("- 1\n", r": holds a sequence; keys and values are needed"),
        ("", r": holds nothing"),
        ("a: .nan\n", r":1: .nan is not a finite number"),
        ("a: !!python/object/apply:os.system [ls]\n", r":1: the tag .* is not read"),
        ("[1, 2]: 3\n", r":1: a key must be one word"),
        ("a: &a [*a]\n", r":1: not a file of flat keys: it is nested more than 20 deep"),
        ("a: 1\n---\nb: 2\n", r":2: not YAML: "),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    (tmp_path / "bad.yml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_config(str(tmp_path / "bad.yml"))
    assert "\n" not in str(error.value)


def test_yaml_values_and_lines(tmp_path, monkeypatch):
    path = tmp_path / "a.yaml"
    lines = 'a: 1e-4|b: "1"|c: no|d: 0x10|e: null|f:|  - x|  - true|g: {h: 1.}|i: 010|j: 2024-01-01|k: on|l: ~'
    path.write_text(lines.replace("|", "\n"))
    found = read_config(str(path))
    values = [1e-4, "1", "no", 16, None, ["x", True], {"h": 1.0}, 10, "2024-01-01", "on", None]
    assert [value for value, _ in found.values()] == values and "".join(found) == "abcdefgijkl"
    assert [line for _, line in found.values()] == [1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 13]
    path.write_text("do_train: true\nmax_step: 3\n")
    with pytest.raises(UserError, match="a.yaml:2: unknown key 'max_step'; did you mean 'max_steps'?"):
        parse_args(finetune.Args, [str(path)])
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(UserError, match="a.yaml: reading YAML needs PyYAML: pip install pyyaml"):
        read_config(str(path))


# ---------------------------------------------------------------------------------------------- LoRA targets


def test_lora_targets_from_the_shell_and_from_json(tmp_path):
    both = ["q_proj", "v_proj"]
    for words, expected in (
        (["q_proj", "v_proj"], both),
        (["q_proj,v_proj"], both),
        (["q_proj v_proj"], both),
        (['["q_proj", "v_proj"]'], both),
        (["q_proj"], ["q_proj"]),
        (["self_attn.q_proj"], ["self_attn.q_proj"]),
        (["all-linear"], "all-linear"),
        (["all"], "all-linear"),
        ([r".*\.(q|v)_proj"], r".*\.(q|v)_proj"),
        (["[qv]_proj"], "[qv]_proj"),
        (["none"], None),
    ):
        argv = [*NEEDED["finetune"].split(), "--lora", "true", "--lora_target_modules", *words]
        assert parse_args(finetune.Args, argv).lora_target_modules == expected, words
        path = tmp_path / "a.json"
        path.write_text(json.dumps({"lora_target_modules": words if len(words) > 1 else words[0]}))
        if words != ["none"]:
            argv = [*NEEDED["finetune"].split(), str(path)]
            assert parse_args(finetune.Args, argv).lora_target_modules == expected, words
    assert lora_targets([".*q_proj.*", "v_proj"]) == r"(?:.*q_proj.*)|(?:(.*\.)?v_proj)"  # PaddleNLP's lists


# ---------------------------------------------------------------------------------------------- live

NAMES = """
import dataclasses
from transformers import TrainingArguments
from trl import DPOConfig, ModelConfig, ScriptArguments, SFTConfig
arrays = {c.__name__: np.array([f.name for f in dataclasses.fields(c) if f.init])
          for c in (TrainingArguments, SFTConfig, DPOConfig, ModelConfig, ScriptArguments)}
"""


@pytest.mark.torch
def test_every_name_of_trl_and_transformers_is_known(hf_python):
    """Used, ignored with a reason or refused with one, and never unknown: in finetune.py, and DPOConfig's in dpo.py."""
    for tool, names in hf_python(NAMES).items():
        script = dpo if tool == "DPOConfig" else finetune
        fields = {field.name for field in dataclasses.fields(script.Args)}
        known = fields | {*ALIASES, *CHOICES, *NESTED, *IGNORED, *REFUSED, *OPTIONS}
        assert not set(names.tolist()) - known, (tool, set(names.tolist()) - known)


STOPS = """
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments
rng, arrays = np.random.default_rng(0), {}
for run in range(200):
    values = rng.integers(0, 8, 12) / 4  # ties and steps of exactly the threshold
    patience, threshold, greater = int(rng.integers(1, 4)), float(rng.choice([0, 0.25, 0.5])), bool(rng.integers(2))
    callback = EarlyStoppingCallback(patience, threshold)
    args = TrainingArguments(sys.argv[1] + ".d", metric_for_best_model="loss", greater_is_better=greater)
    state, control, best = TrainerState(), TrainerControl(), None
    for stop, value in enumerate(values):
        callback.on_evaluate(args, state, control, {"eval_loss": value})
        if control.should_training_stop:
            break
        if state.best_metric is None or (value > state.best_metric if greater else value < state.best_metric):
            state.best_metric = value  # Trainer._determine_best_metric
    arrays[f"run{run}"] = np.array([patience, threshold, greater, stop, control.should_training_stop, *values])
"""


@pytest.mark.torch
def test_early_stopping_stops_where_transformers_does(hf_python):
    for patience, threshold, greater, stop, stopped, *values in hf_python(STOPS).values():
        args = parse("finetune", f"--early_stopping_patience {int(patience)} --evaluation_strategy steps")
        args.early_stopping_threshold, args.greater_is_better = threshold, bool(greater)
        state, log = TrainState(), types.SimpleNamespace(print=lambda text: None)
        steps = [i for i, value in enumerate(values) if trainer.stops_early(args, state, {"eval_loss": value}, log)]
        assert (steps[0] if steps else len(values) - 1, bool(steps)) == (int(stop), bool(stopped))


def test_early_stopping_counts_what_is_not_finite_as_no_gain():
    args = parse("finetune", "--early_stopping_patience 2 --evaluation_strategy steps --load_best_model_at_end false")
    state, log = TrainState(), types.SimpleNamespace(print=lambda text: None)
    found = [
        trainer.stops_early(args, state, {"eval_loss": value}, log) for value in (math.nan, 1.0, math.inf, math.nan)
    ]
    assert found == [False, False, False, True] and state.early_stopping_best == 1.0
