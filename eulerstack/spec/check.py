"""The rules between keys: what Pydantic's fields cannot say one by one."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from pydantic_core import PydanticCustomError

from .base import Block, UnknownValueError
from .errors import Problem, near
from .extensions import ExtensionMixer
from .ffn import MoEFFNSpec, NoFFN
from .mixers import AttentionMixer, AttentionSpec, Mamba2Spec, MambaMixer, Plain, RetNetMixer, side_by_side
from .schedule import Placed, uses

if TYPE_CHECKING:
    from .layer import LayerTemplate
    from .stack import StackSpec

MAX_LAYERS = 4096
T = TypeVar("T")


def refuse(problems: list[Problem]) -> None:
    """Raise one Pydantic error that carries all the problems."""
    if problems:
        text = "; ".join(f"{p.key}: {p.message}" for p in problems)
        raise PydanticCustomError("stack", "{text}", {"text": text, "problems": problems})


def cross_check(spec: "StackSpec") -> list[Problem]:
    """Every broken rule of a spec whose fields are right one by one; those that read a forgotten one are left out."""
    rules = (_embedding, _scaling, _alibi, _heads, _kv_heads, _vocabulary, _ties, _head, _length, _names, _shared)
    hints = (_idle, _groups, _decay)
    found = [p for rule in (*rules, _templates, *hints) for p in judged(rule(spec))]
    return found or list(judged(_mup(spec)))


def judged(found: Iterator[T]) -> Iterator[T]:
    """What is found before a forgotten value is read."""
    try:
        yield from found
    except UnknownValueError:
        return


def forget(spec: "StackSpec", paths: Iterable[tuple[str | int, ...]]) -> None:
    """Take values out of a spec that stand for wrong ones: reading one raises UnknownValueError."""
    for path in sorted(paths, key=len, reverse=True):
        held = [spec, *(_reached(spec, path[: i + 1]) for i in range(len(path)))]
        if isinstance(held[-1], Block) and not isinstance(held[-2], Block):
            held[-1].__dict__.clear()  # a named block, or an entry of a list
        else:  # a key; of a word or a number in a list, the key that has the list
            last = max((i for i, value in enumerate(held[:-1]) if isinstance(value, Block)), default=0)
            held[last].__dict__.pop(str(path[last]), None)


def _reached(value: Any, path: tuple[str | int, ...]) -> Any:
    """What stands at the path; None where it leads nowhere."""
    for step in path:
        if isinstance(value, Block):
            value = getattr(value, str(step), None)
        elif isinstance(value, dict):
            value = value.get(step)
        else:
            value = value[step] if isinstance(value, tuple) and isinstance(step, int) and step < len(value) else None
    return value


def unused_templates(spec: "StackSpec") -> list[str]:
    """Templates that no schedule entry names: a warning, not an error."""
    used = {place.template for place in _uses(spec)}
    used |= set() if spec.head.mtp is None else {spec.head.mtp.head_template}
    return [name for name in spec.layer_templates if name not in used]


def _problem(key: str, message: str, fix: str) -> Problem:
    return Problem(key, message, fix, "Compatibility")


def _divides(key: str, value: int, whole_key: str, whole: int) -> Iterator[Problem]:
    if whole % value:
        fix = f"choose {key.rpartition('.')[2]} among the divisors of {whole}, or change {whole_key}"
        yield _problem(key, f"{value} does not divide {whole_key} = {whole}", fix)


def _heads(spec: "StackSpec") -> Iterator[Problem]:
    yield from _divides("model.n_heads", spec.model.n_heads, "model.d_model", spec.model.d_model)


def _kv_heads(spec: "StackSpec") -> Iterator[Problem]:
    yield from _divides("model.n_kv_heads", spec.model.kv_heads, "model.n_heads", spec.model.n_heads)


def _mup(spec: "StackSpec") -> Iterator[Problem]:
    """The stack can be built at the base's widths."""
    model = spec.model
    if model.mup is None:
        return
    heads = model.mup.n_heads or model.n_heads
    if model.kv_heads * heads % model.n_heads:
        message = f"{heads} heads leave no whole number of the {model.kv_heads} kv heads that {model.n_heads} have"
        yield _problem("model.mup.n_heads", message, "write a multiple of n_heads / n_kv_heads")
        return
    if spec.training_hints.optimizer == "muon":
        message = "muon also trains the embedding and the head, for which muP has no rule"
        yield _problem("training_hints.optimizer", message, "write optimizer: hybrid, or remove model.mup")
    for problem in cross_check(spec.base):
        message = f"d_model = {model.mup.d_model} with {heads} heads cannot be built: {problem.key}: {problem.message}"
        yield replace(problem, key="model.mup", message=message)


def _vocabulary(spec: "StackSpec") -> Iterator[Problem]:
    vocab = spec.model.vocab_size
    if spec.tokenizer_contract.type == "byte" and vocab < 256:
        yield _problem("model.vocab_size", f"{vocab} is less than the byte tokenizer's 256", "write vocab_size: 256")


def _ties(spec: "StackSpec") -> Iterator[Problem]:
    tie, head = spec.embedding.tie_word_embeddings, spec.head.tie_weights
    if head is not None and head != tie:
        fix = "give both the same value, or leave head.tie_weights out"
        yield _problem("head.tie_weights", f"{head} contradicts embedding.tie_word_embeddings = {tie}".lower(), fix)


def _head(spec: "StackSpec") -> Iterator[Problem]:
    mtp, several = spec.head.mtp, spec.head.type == "causal_lm_mtp"
    if mtp is None and several:
        yield _problem("head.mtp", "is required by head.type: causal_lm_mtp", "add `mtp: {head_template: NAME}`")
    if mtp is not None and not several:
        yield _problem("head.mtp", "does nothing with head.type: causal_lm", "write head.type: causal_lm_mtp")
    if mtp is not None:
        yield from _known(spec, "head.mtp.head_template", mtp.head_template)


def _known(spec: "StackSpec", key: str, template: str) -> Iterator[Problem]:
    names = spec.layer_templates
    if template not in names:
        meant = near(template, names)
        fix = f"did you mean {meant!r}?" if meant else f"use one of {', '.join(names)}, or define it"
        message = f"{template!r} is not one of layer_templates"
        yield Problem(key, message, fix, "Compatibility", value=template, allowed=list(names), near=meant)


def _embedding(spec: "StackSpec") -> Iterator[Problem]:
    embedding = spec.embedding
    for key in ("rope_theta", "rope_scaling"):
        if key in embedding.model_fields_set and getattr(embedding, key) is not None and not turns(spec):
            fix = f"remove {key}, or set embedding.positional: rope"
            yield _problem(f"embedding.{key}", "no layer uses rotary positions, so it would do nothing", fix)


def _scaling(spec: "StackSpec") -> Iterator[Problem]:
    scaling = spec.embedding.rope_scaling
    if scaling is not None and scaling.type != "yarn" and scaling.original_max_seq_len is not None:
        message = f"{scaling.type} scaling needs no original length, so it would do nothing"
        yield _problem("embedding.rope_scaling.original_max_seq_len", message, "remove it, or write type: yarn")


def _alibi(spec: "StackSpec") -> Iterator[Problem]:
    mixers = _mixers(spec)
    if spec.embedding.positional == "alibi" and not any(isinstance(m, AttentionMixer) for m in mixers):
        fix = "write positional: none, or add a template of attention"
        yield _problem("embedding.positional", "alibi is attention's, and no template has attention", fix)


def turns(spec: "StackSpec") -> bool:
    """Whether anything uses rotary positions (a file may say so before it has such a layer)."""
    mixers = _mixers(spec)
    return spec.embedding.positional == "rope" or any(isinstance(m, RetNetMixer) and m.retnet.rope for m in mixers)


def _uses(spec: "StackSpec") -> Iterator[Placed]:
    for i, entry in enumerate(spec.layer_schedule):
        yield from judged(uses(entry, f"layer_schedule.{i}"))


def _mixers(spec: "StackSpec") -> list[Plain | ExtensionMixer]:
    """Every mixer that a template names."""
    return [m for template in spec.layer_templates.values() for m in side_by_side(template.mixer).values()]


def _length(spec: "StackSpec") -> Iterator[Problem]:
    layers = sum(place.layers for i, entry in enumerate(spec.layer_schedule) for place in uses(entry, str(i)))
    if layers > MAX_LAYERS:
        yield _problem("layer_schedule", f"{layers} layers are more than {MAX_LAYERS}", "lower the repeats")
    if layers == 0:
        yield _problem("layer_schedule", "names no layer", f"name templates: {', '.join(spec.layer_templates)}")


def _names(spec: "StackSpec") -> Iterator[Problem]:
    for place in _uses(spec):
        yield from _known(spec, place.key, place.template)
        if place.override is not None and place.template in spec.layer_templates:
            key = f"{place.key.removesuffix('.template')}.override"
            yield from judged(_override(spec.layer_templates[place.template], place, key))


def _override(template: "LayerTemplate", place: Placed, key: str) -> Iterator[Problem]:
    assert place.override is not None
    given = place.override.given()
    if not any(given.values()):
        yield _problem(key, "changes nothing", "remove it, or give a value")
    if given.get("attention") and not isinstance(template.mixer, AttentionMixer):
        message = f"template {place.template!r} mixes with {template.mixer.type}, not with attention"
        yield _problem(f"{key}.attention", message, "remove it, or name a template of attention")
    activation = given.get("ffn", {}).get("activation")
    if activation is not None:
        field = type(template.ffn).model_fields.get("activation")
        allowed = get_args(field.annotation) if field is not None else ()
        if activation not in allowed:
            fix = f"use one of {', '.join(allowed)}" if allowed else "remove it"
            message = f"{activation!r} is none of a {template.ffn.type} FFN's activations"
            yield _problem(f"{key}.ffn.activation", message, fix)


def _shared(spec: "StackSpec") -> Iterator[Problem]:
    """Layers that share weights are of one template with one override, and there are two of them at least."""
    groups: dict[str, list[Placed]] = {}
    for place in _uses(spec):
        if place.shared is not None:
            groups.setdefault(place.shared, []).append(place)
    for name, places in groups.items():
        key = places[0].key.removesuffix("template") + "shared"
        if len({(p.template, str(p.override)) for p in places}) > 1:
            fix = "share within one template and override, or give the others a name of their own"
            yield _problem(key, f"{name!r} is shared by layers of different templates or overrides", fix)
        if sum(place.layers for place in places) == 1:
            yield _problem(key, f"only one layer has {name!r}, so nothing is shared", "remove it, or name it twice")


def _templates(spec: "StackSpec") -> Iterator[Problem]:
    for name, template in spec.layer_templates.items():
        key = f"layer_templates.{name}"
        for rule in (_mixers_of, _ffn, _experts, _state):
            yield from judged(rule(spec, template, key))


def _mixers_of(spec: "StackSpec", template: "LayerTemplate", key: str) -> Iterator[Problem]:
    for branch, mixer in side_by_side(template.mixer).items():
        for rule in (_turned, _window, _latent, _values, _mamba, _extension):
            yield from judged(rule(spec, mixer, f"{key}.mixer{branch}"))


def _turned(spec: "StackSpec", mixer: Plain | ExtensionMixer, key: str) -> Iterator[Problem]:
    """Rotations need an even number of channels."""
    rope, width, heads = spec.embedding.positional == "rope", spec.model.d_model, spec.model.n_heads
    turned = isinstance(mixer, RetNetMixer) and mixer.retnet.rope
    turned = turned or (isinstance(mixer, AttentionMixer) and rope and mixer.attention.latent_dim is None)
    if turned and width % heads == 0 and width // heads % 2:
        fix = "choose d_model and n_heads so that d_model / n_heads is even, or do without rope"
        yield _problem(key, f"rope turns pairs of channels, but a head has {width // heads}", fix)


def _values(spec: "StackSpec", mixer: Plain | ExtensionMixer, key: str) -> Iterator[Problem]:
    """Values are split over the heads."""
    if isinstance(mixer, RetNetMixer):
        wanted = mixer.retnet.value_expand * spec.model.d_model
        if abs(wanted - round(wanted)) > 1e-6 * wanted or round(wanted) % spec.model.n_heads:
            message = f"values of {wanted:g} channels cannot be split over {spec.model.n_heads} heads"
            fix = "choose value_expand so that value_expand * d_model is a multiple of n_heads"
            yield _problem(f"{key}.retnet.value_expand", message, fix)


def _extension(spec: "StackSpec", mixer: Plain | ExtensionMixer, key: str) -> Iterator[Problem]:
    if isinstance(mixer, ExtensionMixer):
        for problem in mixer.spec.problems(spec):
            yield replace(problem, key=f"{key}.{mixer.type}.{problem.key}", category="Compatibility")


def _window(spec: "StackSpec", mixer: Plain | ExtensionMixer, key: str) -> Iterator[Problem]:
    if not isinstance(mixer, AttentionMixer):
        return
    if mixer.attention.window_mode == "sliding" and mixer.attention.window is None:
        yield _problem(f"{key}.attention.window_mode", "sliding needs a window", "write `window: N` beside it")


def _latent(spec: "StackSpec", mixer: Plain | ExtensionMixer, key: str) -> Iterator[Problem]:
    if not isinstance(mixer, AttentionMixer):
        return
    if mixer.attention.latent_dim is None:
        if mixer.attention.rope_head_dim is not None:
            message = "is the latent cache's, and there is no latent_dim"
            yield _problem(f"{key}.attention.rope_head_dim", message, "remove it")
        return
    for rule in (_latent_width, _latent_rotation, _latent_extras):
        yield from judged(rule(spec, mixer.attention, f"{key}.attention"))


def _latent_width(spec: "StackSpec", attention: AttentionSpec, key: str) -> Iterator[Problem]:
    latent, width = attention.latent_dim, spec.model.d_model
    if latent is not None and latent >= width:
        yield _problem(f"{key}.latent_dim", f"{latent} is not below d_model = {width}", f"write {width - 1} or less")


def _latent_rotation(spec: "StackSpec", attention: AttentionSpec, key: str) -> Iterator[Problem]:
    rotated = attention.rope_head_dim
    if rotated is not None and spec.embedding.positional != "rope":
        yield _problem(f"{key}.rope_head_dim", "nothing is rotated without positional: rope", "remove it")
    elif rotated is not None and rotated % 2:
        yield _problem(f"{key}.rope_head_dim", f"rope turns pairs of channels, not {rotated}", "write an even number")


def _latent_extras(spec: "StackSpec", attention: AttentionSpec, key: str) -> Iterator[Problem]:
    for name, what in (("qk_norm", "the latent is normed already"), ("qkv_bias", "its projections have no biases")):
        if getattr(attention, name):
            yield _problem(f"{key}.{name}", f"does not go with latent_dim: {what}", "remove it")


def _mamba(spec: "StackSpec", mixer: Plain | ExtensionMixer, key: str) -> Iterator[Problem]:
    """Mamba-2's inner width is split into heads, and those into groups."""
    if not isinstance(mixer, MambaMixer) or not isinstance(mixer.mamba, Mamba2Spec):
        return
    mamba, inner = mixer.mamba, mixer.mamba.inner_width(spec.model.d_model)
    yield from _divides(f"{key}.mamba.head_dim", mamba.head_dim, "expand * d_model", inner)
    if inner % mamba.head_dim == 0:
        yield from _divides(f"{key}.mamba.n_groups", mamba.n_groups, "the number of heads", inner // mamba.head_dim)


def _experts(spec: "StackSpec", template: "LayerTemplate", key: str) -> Iterator[Problem]:
    ffn = template.ffn
    if isinstance(ffn, MoEFFNSpec) and ffn.moe.top_k > ffn.moe.experts:
        message = f"{ffn.moe.top_k} are more than the {ffn.moe.experts} experts"
        yield _problem(f"{key}.ffn.moe.top_k", message, f"write {ffn.moe.experts} or less")


def _ffn(spec: "StackSpec", template: "LayerTemplate", key: str) -> Iterator[Problem]:
    ffn = template.ffn
    if isinstance(ffn, NoFFN):
        return
    ratio, width = ffn.mlp_ratio or spec.model.mlp_ratio, spec.model.d_model
    if round(ratio * width) < 1:
        own = "model.mlp_ratio" if ffn.mlp_ratio is None else f"{key}.ffn.mlp_ratio"
        yield _problem(own, f"{ratio:g} times d_model = {width} leaves no channel", f"write {1 / width:g} or more")


def _state(spec: "StackSpec", template: "LayerTemplate", key: str) -> Iterator[Problem]:
    mixers = side_by_side(template.mixer).values()
    kept = {name for mixer in mixers for name in _keeps(mixer)}
    for name in ("kv_cache", "ssm_state"):
        if getattr(template.state, name) is not None and name not in kept:
            message = f"a {template.mixer.type} mixer has no {name}"
            yield _problem(f"{key}.state.{name}", message, f"remove it, or write {min(kept)}")


def _keeps(mixer: "Plain | ExtensionMixer") -> tuple[str, ...]:
    """The words for what a mixer keeps; an extension may use either."""
    if isinstance(mixer, ExtensionMixer):
        return "kv_cache", "ssm_state"
    return ("ssm_state",) if mixer.type in ("mamba", "rwkv") else ("kv_cache",)


def _idle(spec: "StackSpec") -> Iterator[Problem]:
    hints = spec.training_hints
    for name, (why, fix) in idle_hints(spec, hints.optimizer, hints.schedule).items():
        if name in hints.model_fields_set:
            yield _problem(f"training_hints.{name}", f"{why}, so it would do nothing", fix)


def _groups(spec: "StackSpec") -> Iterator[Problem]:
    for i, group in enumerate(spec.training_hints.optimizer_groups):
        if not group.model_fields_set & {"lr_multiplier", "weight_decay"}:
            message = f"{group.match!r} gets neither lr_multiplier nor weight_decay"
            yield _problem(f"training_hints.optimizer_groups.{i}", message, "give one of them, or remove the entry")


def _decay(spec: "StackSpec") -> Iterator[Problem]:
    hints = spec.training_hints
    rising, falling = hints.warmup_steps_ratio, hints.decay_steps_ratio
    if hints.schedule == "wsd" and rising + falling > 1:
        message = f"{falling:g} of the steps decay after {rising:g} of them warm up: more than there are"
        yield _problem("training_hints.decay_steps_ratio", message, f"write {1 - rising:g} or less")


def idle_hints(spec: "StackSpec", optimizer: str, schedule: str) -> dict[str, tuple[str, str]]:
    """Training hints without an effect in this stack, with this optimizer and schedule: why, and what to do."""
    unused = unused_templates(spec)
    ffns = [template.ffn for name, template in spec.layer_templates.items() if name not in unused]
    moes = [ffn.moe for ffn in ffns if isinstance(ffn, MoEFFNSpec)]
    idle = {}
    if optimizer == "adamw":
        idle["muon"] = "the optimizer is adamw", "remove it, or write optimizer: hybrid (or muon)"
    if schedule != "wsd":
        idle["decay_steps_ratio"] = f"it is the schedule wsd's, not {schedule}'s", "remove it, or write schedule: wsd"
    if schedule == "constant":
        idle["lr_floor_ratio"] = "a constant learning rate falls to no floor", "remove it, or write another schedule"
    if not moes:
        idle["router_lr_multiplier"] = "no layer has a mixture of experts", "remove it, or write ffn: {type: moe}"
    if all(moe.load_balance_coef is not None for moe in moes):
        why = "each mixture of experts has its own load_balance_coef" if moes else "no layer has a mixture of experts"
        idle["router_aux_loss_coef"] = why, "remove it"
    return idle
