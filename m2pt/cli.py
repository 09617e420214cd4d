"""The command line: `m2pt demo` and `m2pt merge`."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status.

    0: done; 2: refused, with a line on stderr that says why; 130: interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except (OSError, TypeError, ValueError) as error:
        print("m2pt: error:", *str(error).split(), file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="m2pt", description="Multimodal Pathway: improve a transformer with another modality's frozen weights."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('m2pt-triton')}")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser(
        "demo",
        help="train and compare a small pathway model on real data, without a download",
        description="Connect a transformer of handwritten digits to one of speech, fine-tune it with few labels beside "
        "a plain and a shuffled one, merge it, and write a report. Takes about two minutes on two CPU cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for report, figures and checkpoint")
    demo.add_argument("--seeds", type=int, default=5, help="fine-tuning runs of each variant, at least 2")
    demo.set_defaults(run=_demo)

    merge = commands.add_parser(
        "merge",
        help="fold a trained pathway into plain linear layers",
        description="Replace weight, aux_weight and cross_modal_scale of every fused layer by one merged weight.",
    )
    merge.add_argument("checkpoint", metavar="IN", help="trained checkpoint: .safetensors, or a torch file")
    merge.add_argument("merged", metavar="OUT", help="merged checkpoint to write: .safetensors")
    merge.set_defaults(run=_merge)
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    import torch

    from .demo.experiment import run_experiment
    from .demo.plots import plot_accuracy, plot_scales
    from .demo.report import markdown, write_report
    from .demo.settings import Settings

    settings, out = Settings(seeds=arguments.seeds), arguments.out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the tensors are too small to share, and on a busy machine threads wait for each other
    results = run_experiment(settings, out / "merged.safetensors")
    plot_accuracy(results, out / "accuracy.png")
    plot_scales(results, out / "scales.png")
    write_report(results, out)
    print(markdown(results))
    print(f"\nWritten to {out}: report.md, results.json, accuracy.png, scales.png, merged.safetensors")


def _merge(arguments: argparse.Namespace) -> None:
    from .checkpoints import load_state_dict, merge_state_dict, save_state_dict

    state_dict = load_state_dict(arguments.checkpoint)
    save_state_dict(merge_state_dict(state_dict), arguments.merged)
    layers = sum(name.endswith("cross_modal_scale") for name in state_dict)
    print(f"{layers} layers folded, written to {arguments.merged}")
