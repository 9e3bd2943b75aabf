"""What ranks do in tests/test_checkpoint.py and tests/bench/bench_checkpoint.py; see tests/ranks/pool.py."""

import contextlib
import importlib
import io
import json
import types
from pathlib import Path

import numpy as np
from jobs_parallel import quick


def train(script, keys):
    """Run a script: {"losses", "printed", "read": bytes of tensors read, "error": message of a UserError or None}."""
    import kernels

    import arguments
    import checkpoint
    import trainer
    from formats.files import UserError
    from formats.tensor_files import LazyTensor

    module, printed, error, before = importlib.import_module(script), io.StringIO(), None, LazyTensor.bytes_read
    out = Path(keys["output_dir"])
    argv = [
        word
        for key, value in keys.items()
        for word in (f"--{key}", json.dumps(value) if not isinstance(value, str) else value)
    ]
    with contextlib.redirect_stdout(printed), quick():
        try:
            args = arguments.parse_args(module.Args, argv)
            args.check_model()
            trainer._choose_device(args)
            module.main(args)
        except UserError as wrong:
            error = str(wrong)
        finally:
            kernels.bf16 = False
            if "args" in locals():
                checkpoint.unlock_output_dir(args.output_dir)  # this process lives on
    log = out / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return {
        "losses": {row["step"]: row["loss"] for row in rows},
        "printed": printed.getvalue(),
        "error": error,
        "read": LazyTensor.bytes_read - before,
    }


def uneven_vocabulary(V=33, M=100, D=8):
    """(losses, gradients) of a head whose ids the ranks share out unevenly, in chunks of few tokens, on the reference
    kernels; and what one process has of them."""
    import kernels.reference as reference

    import paddle

    from distributed.collectives import Axis, Gloo
    from distributed.tensor import vocab_shard
    from distributed.watchdog import Launch

    launch, generator, results, limit = Launch.of_environment(), np.random.default_rng(0), [], reference.LOGITS
    tp = Axis("tp", list(range(launch.world)), launch.rank, Gloo(launch))
    arrays = [generator.standard_normal(shape).astype(np.float32) for shape in ((M, D), (D, V))]
    labels = paddle.to_tensor(generator.integers(0, V, M))
    reference.LOGITS = 20 * -(-V // tp.size)  # the narrower shard would take 21 tokens at a time
    try:
        for start, stop, shard in (
            (tp.rank * V // tp.size, (tp.rank + 1) * V // tp.size, vocab_shard(V, tp)),
            (0, V, None),
        ):
            hidden, weight = paddle.to_tensor(arrays[0]), paddle.to_tensor(arrays[1][:, start:stop])
            hidden.stop_gradient = weight.stop_gradient = False
            losses = reference.linear_cross_entropy(hidden, weight, labels, vocabulary=shard)
            losses.sum().backward()
            results.append([losses.numpy().tolist(), weight.grad.numpy().T.tolist()])
    finally:
        reference.LOGITS = limit
    return results


# ------------------------------------------------------------------------------------------- saves without training


class Run:
    """A model on a topology with moments, and its CheckpointManager; all values are a function of the step."""

    def __init__(self, folder, config, degrees, options="", topology=None, **keys):
        import adapters
        import arguments
        import checkpoint
        import distributed.collectives
        import distributed.sharding
        import distributed.watchdog
        import families
        import formats.tensor_files
        import formats.weights
        import model as M
        import parallel
        import trainer

        args = arguments.TrainingArgs(output_dir=str(folder), unified_checkpoint_config=options, do_train=True, **keys)
        args.device = "cpu"
        args.check()
        if topology is None:
            launch = distributed.watchdog.Launch.of_environment()
            groups = distributed.collectives.Gloo(launch) if launch.world > 1 else None
            topology = parallel.Topology(parallel.Degrees(**degrees), launch.rank, groups)
        self.topology = topology
        self.model = parallel.parallelize(M.build(families.ModelConfig.from_dict(config)), self.topology)
        formats.weights.init_weights(self.model, 1)
        self.weights = adapters.trainable_weights(self.model)
        self.shards = distributed.sharding.ZeroOptimizer(self.model, self.weights, self.topology)
        self.optimizer = trainer.AdamW(self.shards.pieces, args)
        tokenizer = types.SimpleNamespace(save=lambda folder: None)
        self.checkpoints = checkpoint.CheckpointManager(
            args, self.model, tokenizer, optimizer=self.optimizer, shards=self.shards, topology=self.topology
        )
        self.args = args

    def set(self, step):
        from model import set_parameter

        self.optimizer.steps = step
        for weight in self.weights:
            values = weight.from_numpy(content(weight.name, weight.shape, step))
            set_parameter(weight.parameter, values)
            for i, moment in enumerate(self.optimizer.moments.get(weight.name, ()), 1):
                extent = self.shards.extent(weight)
                moment.set_value((values if extent is None else values.reshape([-1])[slice(*extent)]) * i)
        self.shards.adopt_full_values()

    def save(self, step):
        import checkpoint

        self.checkpoints.save(checkpoint.TrainState(step=step))


def content(name, shape, step):
    """Values of a weight at a step, in the stored layout."""
    start = float(sum(name.encode()) % 1000 + 1000 * step)
    return (start + np.arange(int(np.prod(shape)), dtype=np.float32) / 7).reshape(shape)


def save_until_killed(folder, config, degrees, options, first):
    """Save step after step; folder/saved-RANK names the last that is known to be written."""
    run = Run(folder, config, degrees, options, save_total_limit=2)
    note, blocking = Path(folder) / f"saved-{run.topology.rank}", "async_save" not in options
    for step in range(first, first + 10_000):
        run.set(step)
        run.save(step)
        note.with_suffix(".tmp").write_text(str(step if blocking else step - 1))
        note.with_suffix(".tmp").replace(note)


def save_one(folder, config, degrees, options="", step=1, **keys):
    """Save one checkpoint, and the model for use; returns the message of a UserError, or None."""
    from formats.files import UserError

    run = Run(folder, config, degrees, options, **keys)
    run.set(step)
    try:
        run.save(step)
        run.set(step + 1)  # what is copied must not be what comes next
        run.checkpoints.wait()
        run.set(step)
        run.checkpoints.write_model(Path(folder) / "model")
    except UserError as error:
        return str(error)
    return None


def save_to_full_disk(folder, config, degrees, options, rank):
    """A checkpoint that fits, then one for which rank `rank` finds the disk full; returns the error's message."""
    import distributed.shard_files
    from formats.files import UserError

    run, real = Run(folder, config, degrees, options), distributed.shard_files.write_safetensors
    run.set(1)
    run.save(1)
    run.checkpoints.wait()

    def full(path, *args, **more):
        if path.name.startswith(f"optimizer-{rank + 1:05d}"):
            raise OSError(28, "No space left on device")
        return real(path, *args, **more)

    distributed.shard_files.write_safetensors = full
    try:
        run.save(2)
        run.checkpoints.wait()
    except UserError as error:
        return str(error)
    finally:
        distributed.shard_files.write_safetensors = real


def save_until_full(folder, config, degrees, options):
    """Save until that fails; returns the message."""
    from formats.files import UserError

    run = Run(folder, config, degrees, options)
    try:
        for step in range(1, 9):
            run.set(step)
            run.save(step)
            run.checkpoints.wait()
    except UserError as error:
        return str(error)


def find(folder, degrees, path=True):
    """(the checkpoint found, what was printed), or (None, the error's message)."""
    import arguments
    import checkpoint
    import distributed.collectives
    import distributed.sharding
    import distributed.watchdog
    import parallel
    from formats.files import UserError

    launch, printed = distributed.watchdog.Launch.of_environment(), io.StringIO()
    topology = parallel.Topology(parallel.Degrees(**degrees), launch.rank, distributed.collectives.Gloo(launch))
    args = arguments.TrainingArgs(output_dir=str(folder), resume_from_checkpoint=path)
    try:
        with contextlib.redirect_stdout(printed):
            return str(checkpoint.find_checkpoint(args, topology)), "\n".join(
                line for line in printed.getvalue().splitlines()
            )
    except UserError as error:
        return None, str(error)


def tokenize(source, kind):
    """(records that this process has tokenized, arrays of the data set, what it counts)"""
    from formats.tokenizer import load_tokenizer

    tokenizer, encodes = load_tokenizer(Path(__file__).resolve().parents[2] / "demo" / "llama"), [0]
    room, name, *limits = {
        "sft": ("data", "SFTDataset", 20, 44),
        "pairs": ("data", "PreferenceDataset", 60, 30),
        "replies": ("alignment.preference_data", "UnpairedDataset", 60, 30),
    }[kind]
    cls = getattr(importlib.import_module(room), name)

    class Counted(cls):
        def _encode(self, *args):
            encodes[0] += 1
            return super()._encode(*args)

    dataset = Counted(source, tokenizer, *limits)
    arrays = dataset._tokens, dataset._ends, dataset._places, dataset.numbers, dataset.lengths
    counts = list(dataset.why_dropped.items()), dataset.dropped, dataset.not_learned
    return encodes[0], [(array.dtype.name, array.tolist()) for array in arrays], counts


def without_temporary_folders(source):
    """tokenize() where a machine has no place for them."""
    import distributed.record_shares

    make, distributed.record_shares._make_folder = distributed.record_shares._make_folder, lambda: None
    try:
        return tokenize(source, "sft")
    finally:
        distributed.record_shares._make_folder = make
