"""The `eulerstack` command. `validate`, `presets` and `checkpoint inspect` load no torch."""

import gc
import os
import sys
import warnings
from typing import Any

import click

from .output import end_code, replace_streams

gc.set_threshold(100_000)  # most of a light verb's time is imports: collect less often
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # we use none, and the search reads every package

EPILOG = "A FILE is a stack's YAML file, a preset's name (`eulerstack presets list`), or a checkpoint directory."


class Verbs(click.Group):
    """Verbs in the order one meets them; errors are sentences and exit with 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> object:
        warnings.formatwarning = _sentence
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:  # SpecError among them: a user's mistake, said in a sentence
            print(error, file=sys.stderr)
            ctx.exit(2)


_place_and_code = warnings.formatwarning


def _sentence(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
    """What a stack file says without effect is no fault of the line of code that found it."""
    if category.__name__ == "SpecWarning":
        return f"Warning: {message}\n"
    return _place_and_code(message, category, *place, **more)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.version_option(package_name="eulerstack")
def cli() -> None:
    """Mix attention, Mamba and RetNet layers in one YAML file; train the stack; write text with it.

    \b
      eulerstack presets list                          what is there to start from
      eulerstack explain arch_expert_research_mini     its layers, drawn
      eulerstack fit --preset arch_expert_research_mini --trainer.max_steps 1000
      eulerstack generate --checkpoint runs/arch_expert_research_mini/checkpoint --prompt "def "
    """


def _settings(command: click.decorators.FC) -> click.decorators.FC:
    text = "Change a value first, as in --set model.d_model=512; give many."
    return click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, help=text)(command)


def _file(command: click.decorators.FC) -> click.decorators.FC:
    """FILE, or --preset FILE as in the v1 language, with `--set`."""
    command = _settings(command)
    command = click.option("--preset", "preset", metavar="FILE", help="The same as FILE.")(command)
    return click.argument("file", required=False)(command)


def _named(file: str | None, preset: str | None) -> str:
    if (file is None) == (preset is None):
        raise click.UsageError("give one FILE, or --preset FILE")
    return file or preset or ""


@cli.command()
@_file
@click.option("--report", "realism", is_flag=True, help="Also what is unlikely to be meant: sizes, ratios, budgets.")
@click.option("--json", "as_data", is_flag=True, help="Print errors and warnings as JSON.")
def validate(file: str | None, preset: str | None, settings: tuple[str, ...], realism: bool, as_data: bool) -> None:
    """Check a stack file: every problem with its line and its fix.

    \b
      eulerstack validate my.yml
      eulerstack validate my.yml --set layer_schedule.0.repeat=24
      eulerstack validate my.yml --report --json
    """
    from .validate import as_json, say

    name = _named(file, preset)
    if not as_data:
        return say(name, settings, realism)
    text, good = as_json(name, settings, realism)
    print(text)
    sys.exit(0 if good else 2)


@cli.command()
@_file
@click.option("--picture", metavar="FILE", help="Draw it into FILE.svg or FILE.html, for a slide.")
def explain(file: str | None, preset: str | None, settings: tuple[str, ...], picture: str | None) -> None:
    """Draw a stack: its layers and repeats, parameters, FLOPs and state.

    \b
      eulerstack explain arch_expert_research
      eulerstack explain my.yml --picture my.svg
    """
    from .explain import explain as show

    show(_named(file, preset), settings, picture)


@cli.command()
@_file
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1, 1 << 24), help="Rows.")
@click.option("--tokens", type=click.IntRange(1, 1 << 40), help="Tokens of a row; max_seq_len by default.")
@click.option("--device", help="What fits on a GPU, as in a100, h100 or rtx4090.")
@click.option("--precision", default="32-true", show_default=True, help="Of training: 32-true, bf16-mixed, bf16-true.")
@click.option("--match", metavar="parameters=FILE", help="The FFN width that gives the stack another's parameters.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def estimate(file: str | None, preset: str | None, **options: Any) -> None:
    """Count parameters, FLOPs, state and training memory, without building the weights.

    \b
      eulerstack estimate llm_2b_jamba --tokens 8192 --batch 4 --device h100 --precision bf16-mixed
      eulerstack estimate my.yml --match parameters=baseline.yml
    """
    from .estimate import estimate as show

    show(_named(file, preset), **options)


@cli.command("compile")
@_file
@click.option("--output", metavar="FILE.json", help="Where to write it; printed by default.")
def compile_(file: str | None, preset: str | None, settings: tuple[str, ...], output: str | None) -> None:
    """Write the expanded stack as JSON: every layer with all its values, and where they came from.

    \b
      eulerstack compile --preset arch_expert_research_mini --output stack.json
    """
    from .compile import compile_ as write

    write(_named(file, preset), settings, output)


@cli.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="[B]", required=False)
@_settings
def diff(first: str, second: str | None, settings: tuple[str, ...]) -> None:
    """Say what two stacks differ in as designs: mixers, order, widths, parameters, state. `--set` changes B.

    \b
      eulerstack diff arch_expert_research_mini arch_expert_research_mini_mamba
      eulerstack diff my.yml --set model.n_kv_heads=1       my.yml, and what it would become
    """
    from .compare import compare

    if second is None and not settings:
        raise click.UsageError("give two stacks, or one and --set KEY=VALUE")
    compare(first, second or first, settings)


@cli.command()
def doctor() -> None:
    """List the providers of kernels: which can serve here, why others cannot, and how to install them.

    \b
      eulerstack doctor
    """
    from .doctor import doctor as show

    show()


@cli.group()
def presets() -> None:
    """The stack files that come with eulerstack."""


@presets.command("list")
def list_() -> None:
    """All presets as a table: parameters, state of 8,192 tokens, layers by mixer, purpose.

    \b
      eulerstack presets list | grep retnet
    """
    from .listing import listing

    print(listing())


@presets.command("show")
@click.argument("name")
def show_(name: str) -> None:
    """Print a preset's file, to start your own from.

    \b
      eulerstack presets show arch_expert_research_mini > my.yml
    """
    from ..spec import presets as shipped

    if name not in shipped():
        raise ValueError(f"there is no preset {name!r}; there are {', '.join(shipped())}")
    print(shipped()[name].read_text(encoding="utf-8"), end="")


@cli.command()
@click.option("--extensions", is_flag=True, help="With the mixers that installed packages bring.")
def schema(extensions: bool) -> None:
    """Print the language's JSON Schema, for editors.

    \b
      eulerstack schema > eulerstack-v1.json
    """
    from ..spec import schema as written

    print(written(extensions), end="")


PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@cli.command(context_settings=PASSED_ON, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def fit(arguments: tuple[str, ...]) -> None:
    """Train a stack on text with Lightning; `eulerstack fit --help` lists all keys."""
    from .train import run

    run("fit", list(arguments))


@cli.command(context_settings=PASSED_ON, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def test(arguments: tuple[str, ...]) -> None:
    """Measure bits per byte on held-out text."""
    from .train import run

    run("test", list(arguments))


@cli.group()
def checkpoint() -> None:
    """Trained stacks on the disk: what is in one, and one from a run that was stopped."""


@checkpoint.command()
@click.argument("folder", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def inspect(folder: str, as_json: bool) -> None:
    """Say what a checkpoint directory holds, without reading its weights.

    \b
      eulerstack checkpoint inspect runs/mine/checkpoint
    """
    from .stored import inspect as show

    show(folder, as_json)


@checkpoint.command()
@click.argument("source")
@click.argument("target")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the weights; as they are.")
def convert(source: str, target: str, dtype: str | None) -> None:
    """Write a run's .ckpt, or a checkpoint directory, as a checkpoint directory TARGET.

    With --dtype, what must stay float32 does: decays, dt biases, balancing biases.

    \b
      eulerstack checkpoint convert runs/mine/resume/last.ckpt mine
      eulerstack checkpoint convert runs/mine/checkpoint mine16 --dtype bfloat16
    """
    from .convert import convert as write

    write(source, target, dtype)


@cli.command()
@click.option("--checkpoint", required=True, metavar="DIR", help="The checkpoint/ folder that `fit` wrote.")
@click.option("--prompt", "prompts", multiple=True, required=True, help="Where to go on from; give many for a batch.")
@click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(1))
@click.option("--temperature", default=0.8, show_default=True, type=click.FloatRange(0), help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(1), help="Sample among the k likeliest.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample among the likeliest that reach p.")
@click.option("--min-p", type=click.FloatRange(0, 1), help="Sample among those p times as likely as the likeliest.")
@click.option("--repetition-penalty", default=1.0, type=click.FloatRange(0, min_open=True), help="1 is none.")
@click.option("--stop", "stops", multiple=True, help="Stop before this text; give many for the first of them.")
@click.option("--logprobs", type=click.IntRange(0), help="Print a line a token, with the N likeliest.")
@click.option("--seed", type=int, help="The same seed, the same text.")
@click.option("--draft", metavar="DIR", help="The checkpoint/ of a small stack that guesses ahead, for speed.")
@click.option("--ahead", type=click.IntRange(1), help="How many tokens the draft guesses at a time.  [default: 4]")
@click.option("--device", default="cpu", show_default=True)
def generate(prompts: tuple[str, ...], **options: object) -> None:
    """Write text from a trained stack, token by token through its state.

    \b
      eulerstack generate --checkpoint runs/mine/checkpoint --prompt "def " --temperature 0
    """
    from .write import write

    write(list(prompts), **options)  # type: ignore[arg-type]


@cli.command()
@click.option("--checkpoint", required=True, metavar="DIR", help="The checkpoint/ folder that `fit` wrote.")
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 lets other machines in: give a key.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--api-key", envvar="EULERSTACK_API_KEY", help="What /v1 asks for, as `Authorization: Bearer KEY`.")
@click.option("--slots", default=8, show_default=True, type=click.IntRange(1, 4096), help="Answers written at once.")
@click.option("--max-tokens", type=click.IntRange(2), help="Of a prompt and its answer; max_seq_len by default.")
@click.option("--budget", metavar="BYTES", help="What the slots' states may take, as 2GiB; else fewer slots.")
@click.option("--prefix-bytes", metavar="BYTES", help="What prompts that begin alike may keep to be read once.")
@click.option("--sessions", metavar="DIR", help="Where conversations are parked between two requests of a `session`.")
@click.option("--queue", default=64, show_default=True, type=click.IntRange(0), help="Answers that may wait; else 429.")
@click.option("--body", default="1MiB", show_default=True, metavar="BYTES", help="The longest request.")
@click.option(
    "--drain", default=30.0, show_default=True, type=click.FloatRange(0), help="Seconds to end in on SIGTERM."
)
@click.option("--device", default="cpu", show_default=True)
def serve(**options: Any) -> None:
    """Serve a trained stack over HTTP, with the routes of OpenAI's API (docs/serving.md).

    \b
      eulerstack serve --checkpoint runs/mine/checkpoint
      curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "def "}'
    """
    from .serve import serve as run

    run(**options)


def main() -> None:
    """The console script: no verb ends in a traceback over something the user typed, or over who reads it."""
    out = replace_streams()
    try:
        cli(prog_name="eulerstack")
    except SystemExit as end:
        code = end_code(out)
        sys.exit(end.code or code)
