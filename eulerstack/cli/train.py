"""fit and test: the stack is checked before Lightning, or torch, is loaded."""

import sys

from ..spec import StackSpec, load

ALIASES = {"--preset": "--model.spec", "--checkpoint": "--model.spec"}

HELP = {
    "fit": """\
usage: eulerstack fit --preset FILE [--data.KEY VALUE ...] [--trainer.KEY VALUE ...] [--model.KEY VALUE ...]

Train a stack. FILE is a YAML file, a preset's name, or a checkpoint directory to go on from.

  eulerstack fit --preset arch_expert_research_mini --trainer.max_steps 1000
  eulerstack fit --preset my.yml --data.path my_texts/ --data.seq_len 1024 --trainer.precision bf16-mixed
  eulerstack fit --preset my.yml --trainer.max_steps 1000 --ckpt_path last      go on with a run that was stopped
  eulerstack fit --config run.yaml                                              all keys from a file

The run's folder (--trainer.default_root_dir, runs/NAME by default) then holds checkpoint/, resume/, logs/, loss.png.
Without --data.path it trains on Python's own standard library. All keys:
""",
    "test": """\
usage: eulerstack test --checkpoint DIR [--data.KEY VALUE ...]

Measure bits per byte on the held-out part of a text, beside the text's unigram entropy and gzip -9.

  eulerstack test --checkpoint runs/arch_expert_research_mini/checkpoint
  eulerstack test --checkpoint DIR --data.path my_texts/

All keys:
""",
}


def run(verb: str, arguments: list[str]) -> None:
    """Check the stack that the words name, then hand all of them to Lightning's command line."""
    arguments = [_alias(argument) for argument in arguments]
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(HELP[verb], flush=True)
        arguments = ["--help"]
    spec = _spec(arguments)
    seed = spec.training_hints.seed if spec else 0
    from ..training.cli import run as train

    train(verb, arguments, seed)


def _alias(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return ALIASES.get(name, name) + equals + value


def _spec(arguments: list[str]) -> StackSpec | None:
    """The spec on the command line, so that its problems are said at once; None where a --config names it."""
    for i, argument in enumerate(arguments):
        if argument.startswith("--model.spec="):
            return load(argument.partition("=")[2])
        if argument == "--model.spec" and i + 1 < len(arguments):
            return load(arguments[i + 1])
    if "--config" not in arguments and "--help" not in arguments:
        print("give the stack to train: --preset FILE (see --help)", file=sys.stderr)
        sys.exit(2)
    return None
