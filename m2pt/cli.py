# PYTHON_ARGCOMPLETE_OK
"""The command line: `m2pt train`, `pretrain`, `eval`, `memory`, `recipes`, `matrix`, `merge`, `convert`, `check` and
`demo`.

Whatever needs no tensors does not import torch: help, recipes, and the shell's completion (by argcomplete, if that is
installed).
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .checks import nearest

if TYPE_CHECKING:
    from .train import Recipe
    from .train.memory import MemoryEstimate

RESUMING = "to continue from the last checkpoint, run the same command with --resume"
AUX_DTYPES = ("bfloat16", "int8", "int4", "float8_e4m3fn")


class _Parser(argparse.ArgumentParser):
    """A parser that reports errors as its own command's and suggests the nearest option or choice."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        for word in words:
            option = word.partition("=")[0]
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                break  # what follows is not an option, or belongs to the command
            if option.startswith("--") and not any(known.startswith(option) for known in self._option_string_actions):
                self.error(f"unknown option {option}{nearest(option, self._option_string_actions)}")
        return super().parse_known_args(words, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            expected = f"expected one of {', '.join(action.choices)}; got {value!r}{nearest(value, action.choices)}"
            raise argparse.ArgumentError(action, expected)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from .version import __version__

        print(f"{parser.prog} {__version__}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status.

    0: done. 1: `check` found a faulty kernel. 2: refused, or stopped by a loss that is not finite, a lost data worker
    or a GPU out of memory; a line on stderr says why. 130: interrupted by Ctrl-C; the first one lets training finish
    its step and save its state.

    Raises:
        SystemExit: help or the version was printed (0), the arguments are invalid (2), or SIGTERM came during training,
            which finished its step and saved its state, to be resumed (143).
    """
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:
        _complete(parser)
    arguments, rest = parser.parse_known_args(argv)  # `key=value` may stand anywhere, which argparse has no word for
    takes_values = hasattr(arguments, "overrides")
    if stray := [word for word in rest if not takes_values or word.startswith("-") or "=" not in word]:
        expected = ": expected key=value after the recipe" if takes_values else ""
        arguments.parser.error(f"unrecognized arguments: {' '.join(stray)}{expected}")
    arguments.overrides = rest
    if getattr(arguments, "dry_run", None) is False and arguments.out is None:
        arguments.parser.error("the following arguments are required: --out, or --dry-run")
    try:
        return arguments.run(arguments) or 0
    except KeyboardInterrupt as interrupt:
        can_resume = hasattr(arguments, "resume") and arguments.out and (arguments.out / "last.pth").exists()
        if os.environ.get("RANK", "0") == "0":
            print("m2pt: interrupted", *interrupt.args, *[RESUMING] * bool(can_resume), sep="; ", file=sys.stderr)
        return 130
    except (ArithmeticError, ImportError, MemoryError, OSError, TypeError, ValueError) as error:
        print("m2pt: error:", *str(error).split(), file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="m2pt", description="Multimodal Pathway: improve a transformer with another modality's frozen weights."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser(
        "demo",
        help="train and compare a small pathway model on real data, without a download",
        description="Connect a transformer of handwritten digits to one of speech, fine-tune it on few labels beside a "
        "plain model and one with shuffled digit weights, merge it, and write a report. Takes about two minutes on two "
        "CPU cores. Finished runs are not trained again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for report, figure and runs")
    demo.add_argument("--seeds", type=int, default=5, help="fine-tuning runs of each variant, at least 2")
    demo.add_argument("--aux-dtype", choices=AUX_DTYPES, help="how the auxiliary weights are stored")
    demo.set_defaults(run=_demo)

    merge = commands.add_parser(
        "merge",
        help="fold a trained pathway into plain linear layers",
        description="Replace weight, aux_weight and cross_modal_scale of every fused layer with one merged weight. "
        "If every name begins with torch's `module.` or `_orig_mod.`, that is removed; names are kept otherwise.",
    )
    _add_input(merge, "trained checkpoint")
    merge.add_argument("merged", metavar="OUT", help="merged checkpoint to write: .safetensors")
    merge.add_argument("--force", action="store_true", help="overwrite OUT")
    merge.set_defaults(run=_merge)

    convert = commands.add_parser(
        "convert",
        help="convert another project's checkpoint to timm's names",
        description="Read a checkpoint of timm, MAE, AudioMAE, Point-MAE, VideoMAE, DINOv2, or of Hugging Face: ViT, "
        "DeiT, AST, BEiT, VideoMAE, DINOv2, CLIP, SigLIP, Wav2Vec2, HuBERT or Whisper, write what a timm model has a "
        "place for, and report every entry that was left out.",
    )
    _add_input(convert, "checkpoint from any of these")
    convert.add_argument("converted", metavar="OUT", help="converted checkpoint to write: .safetensors")
    convert.set_defaults(run=_convert)

    check = commands.add_parser(
        "check",
        help="compare every kernel with float64 on this GPU, and time it",
        description="Compute every product with every kernel on this GPU, compare it with float64 and time it. What is "
        "faulty is no longer used on such a GPU. Without a GPU, Triton's interpreter runs the portable kernels.",
    )
    check.add_argument("--model", metavar="NAME", help="check the linear layers of this timm model instead")
    check.add_argument("--batch", type=int, default=64, help="batch size for that model (default: 64)")
    check.add_argument("--json", type=Path, metavar="FILE", help="write every row to this file")
    check.set_defaults(run=_check)

    _add_training(commands)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell's question for completions and exit, if argcomplete is installed."""
    try:
        from argcomplete import autocomplete
    except ImportError:
        return
    autocomplete(parser)


def _complete_recipe(prefix: str, **_: Any) -> list[str]:
    from argcomplete.completers import FilesCompleter

    from .train.recipe import shipped_recipes

    return [*shipped_recipes(), *FilesCompleter(("toml",))(prefix)]


def _add_training(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="fine-tune or probe a model, with or without a pathway from another modality",
        description="Train as a recipe says, evaluate, merge the pathway, and evaluate the merged model. Under "
        "torchrun the same command uses every process.",
    )
    _add_recipe(train)
    _add_output(train)
    train.add_argument("--init", metavar="PATH", help="checkpoint to start from")
    train.add_argument(
        "--aux", metavar="PATH", action="append", help="checkpoint of the auxiliary model; repeat for several"
    )
    train.add_argument("--aux-modality", metavar="NAME", help="what the auxiliary model was trained on, for the log")
    dtypes = ("float32", "float16", *AUX_DTYPES)
    train.add_argument("--aux-dtype", choices=dtypes, help="how the auxiliary weights are stored")
    train.add_argument("--train-aux", action="store_true", help="train the auxiliary weights too")
    _add_preset(train)
    train.set_defaults(run=_train)

    pretrain = commands.add_parser(
        "pretrain",
        help="pretrain a masked autoencoder of a modality",
        description="Pretrain as a recipe says. The file that it writes can be passed to --init and to --aux.",
    )
    _add_recipe(pretrain)
    _add_output(pretrain)
    pretrain.add_argument("--init", metavar="PATH", help="checkpoint to start from")
    _add_preset(pretrain)
    pretrain.set_defaults(run=_pretrain)

    memory = commands.add_parser(
        "memory",
        help="estimate a training step's peak memory, and what makes it fit a GPU",
        description="Simulate the peak memory of a training step, by part, with a pathway from one auxiliary model of "
        "the same size unless --aux names others, and with every further way to lower it. Nothing is computed.",
    )
    _add_recipe_name(memory, "recipe", what="a shipped recipe, a TOML file, or the name of a timm ViT")
    memory.add_argument("--batch", type=int, metavar="N", help="samples per step, instead of the recipe's")
    memory.add_argument("--gpu", type=float, metavar="GIB", help="memory of the GPU; default: what is free on this one")
    memory.add_argument("--aux", metavar="PATH", action="append", help="an auxiliary model; its file is not read")
    memory.add_argument("--aux-dtype", choices=dtypes, help="how the auxiliary weights are stored")
    _add_preset(memory)
    memory.add_argument("--measure", action="store_true", help="also run a step on this machine's GPU")
    memory.set_defaults(run=_memory)

    evaluation = commands.add_parser(
        "eval",
        help="evaluate a trained, interrupted or merged checkpoint",
        description="Print the metrics of a checkpoint on the test split of a recipe's data.",
    )
    evaluation.add_argument("checkpoint", metavar="CHECKPOINT", help="last.pth or merged.safetensors of a run")
    _add_weights(evaluation)
    _add_recipe(evaluation, "--recipe", required=True)
    evaluation.set_defaults(run=_eval)

    recipes = commands.add_parser(
        "recipes",
        help="list the shipped recipes, or print one with all its values",
        description="List the shipped recipes. With a recipe, print it as TOML with every value, including defaults "
        "and values set by key=value. The output can be saved and used as a recipe.",
    )
    _add_recipe_name(recipes, "recipe", nargs="?")
    recipes.set_defaults(run=_recipes)

    matrix = commands.add_parser(
        "matrix",
        help="train targets with every auxiliary over several seeds, and report the gains",
        description="Train every target of a configuration alone and with every auxiliary model, once for each seed, "
        "and write a table of the gains with their spread. Finished runs are not trained again.",
    )
    matrix.add_argument("configuration", metavar="TOML", type=Path, help="see m2pt.matrix")
    matrix.add_argument("--out", type=Path, required=True, help="folder to write to")
    matrix.set_defaults(run=_matrix)


def _add_input(parser: argparse.ArgumentParser, what: str) -> None:
    help_text = f"{what}: .safetensors, a torch file, or a folder that save_pretrained wrote"
    parser.add_argument("checkpoint", metavar="IN", help=help_text)
    _add_weights(parser)


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        choices=("raw", "ema"),
        help="which to read from a file with weights and their moving average; default: the average if there is one",
    )


def _add_recipe(parser: argparse.ArgumentParser, name: str = "recipe", **settings: Any) -> None:
    _add_recipe_name(parser, name, **settings)
    parser.add_argument("--data", metavar="ROOT", help="folder of the data set; none if the recipe's is embedded")


def _add_recipe_name(
    parser: argparse.ArgumentParser, name: str, what: str = "a shipped recipe or a TOML file", **settings: Any
) -> None:
    recipe = parser.add_argument(name, metavar="RECIPE", help=f"{what}; key=value overrides its values", **settings)
    recipe.completer = _complete_recipe  # type: ignore[attr-defined]
    parser.epilog = "Every further argument key=value overrides a value of the recipe, such as schedule.epochs=10."
    parser.set_defaults(overrides=[])


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="folder to write to")
    parser.add_argument(
        "--dry-run", action="store_true", help="only open the data, build the model and say what would run"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in that folder")


def _add_preset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        choices=("low-memory",),
        help="low-memory: everything that lowers peak memory and fits the recipe; key=value takes precedence",
    )


def _demo(arguments: argparse.Namespace) -> None:
    import torch

    from .demo.experiment import run_demo
    from .demo.report import markdown, write_report

    torch.set_num_threads(1)  # the tensors are too small to share, and on a busy machine threads wait for each other
    results = run_demo(arguments.out, arguments.seeds, arguments.aux_dtype or "")
    write_report(results, arguments.out)
    print(f"\n{markdown(results)}\n\nWritten to {arguments.out}: report.md, results.json, scales.png, and every run")


def _merge(arguments: argparse.Namespace) -> None:
    from .checkpoints import TAKEN, checked_target, merge_state_dict, read_weights, save_state_dict, without_wrapping

    target = checked_target(arguments.merged)
    if os.path.lexists(target) and not arguments.force:
        raise FileExistsError(f"{target}: already exists: choose another name, or overwrite it with --force")
    state_dict, taken = read_weights(arguments.checkpoint, arguments.weights)
    said = f"; {TAKEN[taken]}" if taken else ""
    try:
        merged = merge_state_dict(state_dict)
    except ValueError as error:
        reason = str(error).removeprefix("state_dict: ")
        if reason.endswith(".aux_weight is missing"):
            reason += ", as with auxiliary.in_checkpoints=false: use the run's merged.safetensors instead"
        raise ValueError(f"{arguments.checkpoint}: {reason}{said}") from None
    save_state_dict(without_wrapping(merged), target)
    layers = sum(name.endswith("cross_modal_scale") for name in state_dict)
    print(f"{layers} layers folded, written to {target}{said}")


def _convert(arguments: argparse.Namespace) -> None:
    from .checkpoint_formats import read_checkpoint
    from .checkpoints import save_state_dict

    state_dict, report = read_checkpoint(arguments.checkpoint, arguments.weights)
    save_state_dict(state_dict, arguments.converted)
    print(f"{report}\nwritten to {arguments.converted}")


def _check(arguments: argparse.Namespace) -> int:
    from m2pt_kernels.check import run

    return run(arguments.model, arguments.batch, arguments.json)


def _train(arguments: argparse.Namespace) -> None:
    from .train import preview, train
    from .train.run import require_training

    recipe = _fitted(_recipe(arguments), arguments)
    if arguments.dry_run:
        require_training(recipe)
        _say(preview(recipe))
        return
    result = train(recipe, arguments.out, arguments.resume)
    _say(*(f"{model}: {_metrics(metrics)}" for model, metrics in result.items()), f"written to {arguments.out}")


def _pretrain(arguments: argparse.Namespace) -> None:
    from .train import pretrain, preview
    from .train.run import require_pretraining

    recipe = _fitted(_recipe(arguments), arguments)
    if arguments.dry_run:
        require_pretraining(recipe)
        _say(preview(recipe))
        return
    pretrain(recipe, arguments.out, arguments.resume)
    _say(f"written to {arguments.out}")


def _memory(arguments: argparse.Namespace) -> None:
    from .train.memory import GIB, estimate_memory, free_bytes, measured_peak, with_pathway

    gpu_bytes = free_bytes() if arguments.gpu is None else int(arguments.gpu * GIB)
    recipe = _fitted(_recipe(arguments, with_pathway), arguments, gpu_bytes)
    found = estimate_memory(recipe, gpu_gib=None if gpu_bytes is None else gpu_bytes / GIB)
    print(f"{arguments.recipe}: {found.step}\n\n{found}\n")
    if arguments.measure:
        print(f"measured: {measured_peak(recipe) / GIB:.2f} GiB\n")
    if gpu_bytes is not None:
        how = _how_it_fits(found, arguments)
        print(f"On a GPU with {gpu_bytes / GIB:.1f} GiB free, of which 1 is left to CUDA: {how}")


def _how_it_fits(found: "MemoryEstimate", arguments: argparse.Namespace) -> str:
    """The command to run, or for a timm model what to call."""
    from .models import SIZES
    from .train.levers import IN_PYTHON
    from .train.memory import STAND_IN, advice, assignments

    recipe = found.recipe
    if not found.fitting:
        return "it fits." if found.fits else f"{advice(recipe, None)}."
    if recipe.model.size not in SIZES:
        return "it fits with " + "; ".join(IN_PYTHON[lever] for lever in found.fitting)
    batch = [f"data.batch_size={arguments.batch}"] if arguments.batch else []
    stand_in = ["PATH"] if STAND_IN in recipe.auxiliary.paths else []
    options = [f"--aux {path}" for path in arguments.aux or stand_in]
    options += [f"--aux-dtype {arguments.aux_dtype}"] if arguments.aux_dtype else []
    options += [f"--preset {arguments.preset}"] if arguments.preset else []
    words = [arguments.recipe, *options, *batch, *arguments.overrides, assignments(found.fitting)]
    return f"it fits with\n\n  m2pt {'pretrain' if recipe.pretraining else 'train'} {' '.join(words)}"


def _eval(arguments: argparse.Namespace) -> None:
    from .train import evaluate_checkpoint

    _say(_metrics(evaluate_checkpoint(_recipe(arguments), arguments.checkpoint, arguments.weights)))


def _recipes(arguments: argparse.Namespace) -> None:
    from .train.recipe import describe_recipe, shipped_recipes

    if arguments.recipe is not None:
        print(_recipe(arguments).as_toml())
        return
    names = shipped_recipes()
    width = max(map(len, names))
    for name in names:
        print(f"{name:{width}}  {describe_recipe(name)}")


def _matrix(arguments: argparse.Namespace) -> None:
    from .matrix import load_matrix, run_matrix

    _say(run_matrix(load_matrix(arguments.configuration), arguments.out))


def _recipe(arguments: argparse.Namespace, load: "Callable[..., Recipe] | None" = None) -> "Recipe":
    """The recipe as the arguments say, except for `data.batch_size=auto`, which `_fitted` handles."""
    from .train.levers import low_memory
    from .train.recipe import load_recipe, parse_assignment

    keys = {
        "data": "data.root",
        "init": "model.init",
        "aux": "auxiliary.path",
        "aux_modality": "auxiliary.modality",
        "aux_dtype": "auxiliary.dtype",
        "train_aux": "auxiliary.trainable",
    }
    given = {key: value for option, key in keys.items() if (value := getattr(arguments, option, None))}
    if len(paths := given.get("auxiliary.path", [])) == 1:
        given["auxiliary.path"] = paths[0]
    batch = {"data.batch_size": size} if (size := getattr(arguments, "batch", None)) else {}
    given |= batch | dict(map(parse_assignment, arguments.overrides))
    arguments.fills_gpu = given.get("data.batch_size") == "auto"
    if arguments.fills_gpu:
        given = {key: value for key, value in given.items() if key != "data.batch_size"} | batch
    recipe = (load or load_recipe)(arguments.recipe, given)
    if getattr(arguments, "preset", None):
        on_gpu = arguments.run is _memory or _has_gpu()
        typed = {*given, "machine.step_in_backward"} if arguments.fills_gpu else given
        levers = low_memory(recipe, on_gpu, _processes())
        recipe = recipe.with_overrides({key: value for key, value in levers.items() if key not in typed})
    return recipe


def _processes() -> int:
    """The number of processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _fitted(recipe: "Recipe", arguments: argparse.Namespace, gpu_bytes: int | None = None) -> "Recipe":
    """The recipe with micro-batches that the GPU holds, if they are asked for."""
    if not arguments.fills_gpu:
        return recipe
    from .train.memory import fit_micro_batches, whole_bytes

    gpu_bytes = whole_bytes() if gpu_bytes is None else gpu_bytes
    if gpu_bytes is None:
        raise ValueError("data.batch_size: auto: there is no GPU to fill")
    fitted = fit_micro_batches(recipe, gpu_bytes, processes=_processes())
    _say(f"data.batch_size=auto: {fitted.data.batch_size} samples, micro-batches {fitted.machine.accumulation}")
    return fitted


def _metrics(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())


def _say(*lines: str) -> None:
    """Print in the first process only."""
    from .train.distributed import is_first_process

    if is_first_process():
        print(*lines, sep="\n")


if __name__ == "__main__":
    sys.exit(main())
