"""What the ranks of tests/ranks/pool.py do, see there."""

import contextlib
import importlib
import io
import json
from pathlib import Path


def whole(weight, tensor, topology):
    """A weight, or a tensor of its shape (a gradient, a moment), of all ranks of tp, as numpy in the file's layout."""
    import distributed.collectives

    if weight.shard_spec is None:
        return weight.to_numpy(tensor)
    found = distributed.collectives.gather_full_tensor(tensor, weight.shard_spec, topology.tp)
    return found.T if weight.transposed else found


def script(name, argv):
    """Run a script's main() here; returns the rows of metrics.jsonl (without training none) and what was printed."""
    import arguments
    import trainer

    module, printed = importlib.import_module(name), io.StringIO()
    with contextlib.redirect_stdout(printed):
        args = arguments.parse_args(module.Args, argv)
        args.check_model()
        trainer._choose_device(args)
        module.main(args)
    path = Path(args.output_dir) / "metrics.jsonl"
    rows = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(row) for row in rows], printed.getvalue()


@contextlib.contextmanager
def quick():
    """Drawing and measuring take longer than tiny runs themselves."""
    import logger
    import trainer

    before = logger.draw_curves, trainer.measure_matmul_peak
    logger.draw_curves, trainer.measure_matmul_peak = (lambda folder: None), (lambda: 1e11)
    try:
        yield
    finally:
        logger.draw_curves, trainer.measure_matmul_peak = before
