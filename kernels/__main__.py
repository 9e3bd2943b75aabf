"""Which back end runs each op on this machine, and why.

    python -m kernels
    python -m kernels --device gpu:1 --kernels reference

How fast they are: python tests/bench/ops.py.
"""

import argparse
import sys

import kernels

from formats.files import UserError


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="cpu, gpu, gpu:1, dcu, xpu, npu, …")
    parser.add_argument("--kernels", default="auto", help="reference, or op=back end, …: see kernels/__init__.py")
    options = parser.parse_args(argv)
    for op, (backend, reason) in kernels.configure(options.device, options.kernels).items():
        print(f"{op:28} {backend:10} {reason}")
    if reason := kernels.bf16_missing():
        print(f"no products in bfloat16: {reason}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
