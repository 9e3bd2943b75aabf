"""What the ranks of tests/ranks.py do, see there."""
import contextlib
import importlib
import io
import json
from pathlib import Path


def script(name, argv):
    """Run a script's main() here; returns the rows of metrics.jsonl and what was printed."""
    import trainer

    module, printed = importlib.import_module(name), io.StringIO()
    with contextlib.redirect_stdout(printed):
        args = trainer.parse_args(module.Args, argv)
        args.check_model()
        trainer._choose_device(args)
        module.main(args)
    path = Path(args.output_dir) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()], printed.getvalue()
