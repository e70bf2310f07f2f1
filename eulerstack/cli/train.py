"""fit and test: the stack is checked before Lightning, or torch, is loaded."""

from itertools import pairwise

from ..spec import load

ALIASES = {"--preset": "--model.spec", "--checkpoint": "--model.spec", "--set": "--model.settings+"}

HELP = {
    "fit": """\
usage: eulerstack fit --preset FILE [--data.KEY VALUE ...] [--trainer.KEY VALUE ...] [--model.KEY VALUE ...]

Train a stack. FILE is a YAML file, a preset's name, or a checkpoint directory to go on from.

  eulerstack fit --preset arch_expert_research_mini --trainer.max_steps 1000
  eulerstack fit --preset my.yml --data.path my_texts/ --data.seq_len 1024 --trainer.precision bf16-mixed
  eulerstack fit --preset my.yml --set model.d_model=512 --set layer_schedule.0.repeat=4
  eulerstack fit --preset my.yml --trainer.max_steps 1000 --ckpt_path last      go on with a run that was stopped
  eulerstack fit --preset my.yml --trainer.val_check_interval 500 --keep_best 3    the best three, in best/
  eulerstack fit --config run.yaml                                              all keys from a file

The run's folder (--trainer.default_root_dir, runs/NAME by default) then holds checkpoint/, resume/, best/ if asked for,
logs/, loss.png.
Without --data.path it trains on Python's own standard library. All keys:
""",
    "test": """\
usage: eulerstack test --checkpoint DIR [--data.KEY VALUE ...]

Measure bits per byte on a text, beside the text's unigram entropy and gzip -9: on its split `test`, or else the one for
validation; without splits on all of it, or on what was held out if DIR was trained on the same files.

  eulerstack test --checkpoint runs/arch_expert_research_mini/checkpoint        held out of the standard library
  eulerstack test --checkpoint DIR --data.path my_texts/
  eulerstack test --checkpoint DIR --data.path my_texts/ --data.held_out 0.1    what fit with 0.1 holds out

All keys:
""",
}


def run(verb: str, arguments: list[str]) -> None:
    """Check the stack that the words name, then hand all of them to Lightning's command line."""
    arguments = [_alias(argument) for argument in arguments]
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(HELP[verb], flush=True)
        arguments = ["--help"]
    _check_spec(arguments)
    from ..training.cli import run as train

    train(verb, arguments)


def _alias(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return ALIASES.get(name, name) + equals + value


def _check_spec(arguments: list[str]) -> None:
    """Say the problems of the spec on the command line at once; one that a config names is checked later."""
    given = _values(arguments, "--model.spec")
    if given:
        load(given[-1], _values(arguments, ALIASES["--set"]))
    elif not any(argument.partition("=")[0] in ("--config", "-c", "--model", "--help") for argument in arguments):
        raise ValueError("give the stack: --preset FILE, or --checkpoint DIR (see --help)")


def _values(arguments: list[str], name: str) -> list[str]:
    """What an option is given, as `--name value` or `--name=value`."""
    apart = [value for key, value in pairwise(arguments) if key == name]
    return [*apart, *(argument.partition("=")[2] for argument in arguments if argument.startswith(f"{name}="))]
