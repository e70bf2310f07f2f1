"""A stack as a picture for a slide: one SVG without outside resources, alone or in an HTML page."""

from collections import Counter
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path

from ..costs import Estimate, LayerCost
from ..spec import BranchedSpec, LayerSpec, MoEFFNSpec, NoFFN, StackSpec
from .words import Repeated, design, ffn_name, in_bytes, mixer_name, override_line, repeats, runs, short

COLOURS = {
    "attention": "#3b6fb6",
    "latent_attention": "#274b7d",
    "mamba1": "#f0b76f",
    "mamba2": "#e08a2e",
    "retnet": "#2f8f62",
    "linear_attention": "#4fb0a8",
    "rwkv": "#c4513d",
    "hyena": "#8560b0",
}
WINDOWED, OTHER = "#8fb3e0", "#7a828e"
DARK_TEXT = {"#f0b76f", WINDOWED, "#4fb0a8", "#e08a2e"}
INK, GREY, PALE, LINE = "#1f2630", "#667080", "#eef0f4", "#cfd4dc"
WIDTH, MARGIN, LEFT = 1240, 48, 152
MIXER, FFN, ROW, GAP = 282, 184, 46, 8
COLUMNS = tuple(LEFT + MIXER + FFN + 36 + 184 * i for i in range(3))
BAR = 156
TIMES = "\u00d7"
FONT = "Helvetica Neue, Helvetica, Arial, Liberation Sans, sans-serif"


def page_for(path: Path) -> Callable[[str], str]:
    """What wraps the picture in a file of this name. Raises ValueError for one that is neither .svg nor .html."""
    if path.suffix == ".svg":
        return lambda picture: picture
    if path.suffix == ".html":
        return lambda picture: (
            '<!doctype html>\n<meta charset="utf-8">\n<title>eulerstack</title>\n'
            f'<body style="margin:0;background:#fff">\n{picture}</body>\n'
        )
    raise ValueError(f"--picture {path}: give a name that ends in .svg or .html")


def uses(cost: Estimate) -> Counter[int]:
    """How many layers have the weights of each layer that has its own."""
    return Counter(c.layer.weights_of for c in cost.layers)


def drawn_as(cost: Estimate) -> Callable[[LayerCost], str]:
    """Layers of equal keys are drawn once: one template and design, with one set of weights for all or one each."""
    shared = {owner for owner, times in uses(cost).items() if times > 1}

    def key(one: LayerCost) -> str:
        layer = one.layer
        owner = layer.weights_of if layer.weights_of in shared else ""
        return f"{layer.template} {owner} {override_line(layer)} {design(layer)}"

    return key


def svg(spec: StackSpec, cost: Estimate) -> str:
    """The whole picture."""
    y, body = 212.0, [*_header(spec, cost), *_strip(cost)]
    body += _columns(spec, y - 22)
    body += _plain_row(y, "embedding", f"{spec.model.vocab_size:,} x {spec.model.d_model}")
    body.append(_text(COLUMNS[0], y + 28, short(spec.model.vocab_size * spec.model.d_model, "TBMk"), 14, GREY))
    y += ROW + GAP
    for part in repeats(cost.layers, drawn_as(cost)):
        rows, y = _part(part, cost, y)
        body += rows
    ahead = "" if spec.head.mtp is None else f", and {spec.head.mtp.n_predict} for tokens further ahead"
    body += _plain_row(
        y, "norm, head" + (", tied" if spec.tied else ""), f"{spec.model.d_model} x {spec.model.vocab_size:,}{ahead}"
    )
    body += _totals(spec, cost, y)
    y += ROW + 40
    legend, y = _legend(cost, y)
    inside = "\n".join([*body, *legend])
    size = f'width="{WIDTH}" height="{y:g}" viewBox="0 0 {WIDTH} {y:g}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{FONT}" role="img">\n'
        f"<title>{escape(spec.model.name)}</title>\n"
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n{inside}\n</svg>\n'
    )


def _header(spec: StackSpec, cost: Estimate) -> Iterator[str]:
    model = spec.model
    yield _text(MARGIN, 64, model.name, 30, weight=700)
    active = f" ({short(cost.active_parameters, 'TBMk')} a token)" if cost.active_parameters != cost.parameters else ""
    facts = [f"{short(cost.parameters, 'TBMk').strip()} parameters{active}", f"{len(cost.layers)} layers"]
    facts += [f"width {model.d_model}", f"{model.n_heads} heads of {model.kv_heads} kv"]
    facts += [f"context {model.max_seq_len:,}", model.dtype]
    yield _text(MARGIN, 94, "  ·  ".join(facts), 16, GREY)


def _strip(cost: Estimate) -> Iterator[str]:
    """Every layer as a cell of its mixer's colour, first to last."""
    step = (WIDTH - 2 * MARGIN) / len(cost.layers)
    gap = min(2.0, step / 5)
    for i, one in enumerate(cost.layers):
        for part, (_, _, colour) in enumerate(found := _mixers(one.layer)):
            high = 20 / len(found)
            yield _box(MARGIN + i * step, 114 + part * high, step - gap, high, colour, radius=0 if high < 20 else 2)
    yield _text(MARGIN, 150, "all layers, first to last", 12, GREY)


def _columns(spec: StackSpec, y: float) -> Iterator[str]:
    names = ("parameters", f"state at {spec.model.max_seq_len:,} tokens", "FLOPs a token")
    for x, name in zip(COLUMNS, names, strict=True):
        yield _text(x, y, name, 13, GREY, weight=600)
    yield _text(LEFT, y, "mixer", 13, GREY, weight=600)
    yield _text(LEFT + MIXER + 6, y, "FFN", 13, GREY, weight=600)


def _plain_row(y: float, name: str, detail: str) -> Iterator[str]:
    yield _box(LEFT, y, MIXER + FFN + 6, ROW, PALE)
    yield _text(LEFT + 14, y + 28, name, 15, weight=600)
    yield _text(LEFT + MIXER + FFN - 8, y + 28, detail, 13, GREY, anchor="end")


def _part(part: Repeated[LayerCost], cost: Estimate, y: float) -> tuple[list[str], float]:
    """A pattern's rows with a bracket for its rounds, and where the next row stands."""
    rows: list[str] = []
    start = y
    length = len(part.items)
    for run in runs(part.items, drawn_as(cost)):
        times = part.times * len(run) if length == 1 else len(run)
        rows += _row(run[0], cost, y)
        if times > 1:
            rows.append(_text(LEFT - 12, y + 29, f"{times} {TIMES}", 17, anchor="end", weight=600))
        y += ROW + GAP
    if part.times > 1 and length > 1:
        x, end = 82, y - GAP
        rows.append(f'<path d="M{x + 10} {start:g}H{x}V{end:g}H{x + 10}" fill="none" stroke="{INK}" stroke-width="2"/>')
        rows.append(_text(x - 8, (start + end) / 2 + 7, f"{part.times} {TIMES}", 21, anchor="end", weight=700))
    return rows, y


def _row(one: LayerCost, cost: Estimate, y: float) -> Iterator[str]:
    """A layer: its mixers side by side, its FFN, and what it costs beside the dearest layer."""
    layer, mixers = one.layer, _mixers(one.layer)
    width = (MIXER - 4 * (len(mixers) - 1)) / len(mixers)
    for i, (name, mixer, colour) in enumerate(mixers):
        x, ink = LEFT + i * (width + 4), INK if colour in DARK_TEXT else "#ffffff"
        notes = ", ".join([*_keys(mixer), *(_origin(layer, uses(cost)) if i == len(mixers) - 1 else [])])
        yield _box(x, y, width, ROW, colour)
        yield _text(x + 14, y + (21 if notes else 28), name.partition("(")[0], 15, ink, weight=600, room=width - 20)
        yield _text(x + 14, y + 37, notes, 12, ink, room=width - 20)
    if not isinstance(layer.ffn, NoFFN):
        moe = isinstance(layer.ffn, MoEFFNSpec)
        yield _box(LEFT + MIXER + 6, y, FFN, ROW, "#f6e3a8" if moe else PALE)
        yield _text(LEFT + MIXER + 18, y + 21, ffn_name(layer).rstrip(","), 14, weight=600, room=FFN - 20)
        yield _text(LEFT + MIXER + 18, y + 37, f"{layer.ffn.activation}, {layer.hidden} wide", 12, GREY)
    yield from _costs(one, cost, y, mixers[0][2])


def _costs(one: LayerCost, cost: Estimate, y: float, colour: str) -> Iterator[str]:
    figures = [_figures(other) for other in cost.layers]
    texts = (short(one.parameters, "TBMk"), in_bytes(_figures(one)[1]), short(one.flops_per_token))
    for i, (x, text) in enumerate(zip(COLUMNS, texts, strict=True)):
        value, most = _figures(one)[i], max(figure[i] for figure in figures)
        yield _text(x, y + 20, text if value else "none", 14)
        yield _box(x, y + 29, BAR, 7, PALE, radius=3)
        if value:
            yield _box(x, y + 29, max(3.0, BAR * value / most), 7, colour, radius=3)


def _figures(one: LayerCost) -> tuple[float, float, float]:
    return one.parameters, sum(one.state_bytes.values()), one.flops_per_token


def _totals(spec: StackSpec, cost: Estimate, y: float) -> Iterator[str]:
    tokens = spec.model.max_seq_len
    state, flops = cost.state_bytes(1, tokens)["total"], cost.flops(tokens) / tokens
    texts = (short(cost.parameters, "TBMk"), in_bytes(state), short(flops))
    yield f'<path d="M{COLUMNS[0]} {y + 6:g}H{COLUMNS[2] + BAR}" stroke="{LINE}" stroke-width="1.5"/>'
    for x, text in zip(COLUMNS, texts, strict=True):
        yield _text(x, y + 32, f"{text.strip()} in all", 16, weight=700)


def _legend(cost: Estimate, y: float) -> tuple[list[str], float]:
    """A square and a name for each kind of mixer, with the number of its layers."""
    kinds = [dict.fromkeys((name, colour) for name, _, colour in _mixers(one.layer)) for one in cost.layers]
    counts = Counter(kind for layer in kinds for kind in layer)
    out, x = [], float(LEFT)
    for (name, colour), number in counts.items():
        label = f"{name}: {number} layer{'s' if number > 1 else ''}"
        wide = 22 + 8.0 * len(label) + 24
        if x + wide > WIDTH - MARGIN:
            x, y = LEFT, y + 28
        out += [_box(x, y, 14, 14, colour, radius=3), _text(x + 22, y + 12, label, 14)]
        x += wide
    return out, y + 44


def _mixers(layer: LayerSpec) -> list[tuple[str, object, str]]:
    """The name, the spec and the colour of the mixer, or of each of those side by side."""
    named: list[tuple[str, object]]
    if isinstance(layer.mixer, BranchedSpec):
        named = [(branch.type, branch.spec) for branch in layer.mixer.branches.values()]
    else:
        named = [(layer.mixer_type, layer.mixer)]
    return [(mixer_name(kind, spec), spec, _colour(kind, spec)) for kind, spec in named]


def _colour(kind: str, spec: object) -> str:
    family, _, window = mixer_name(kind, spec).partition("(")
    return WINDOWED if window and family == "attention" else COLOURS.get(family, OTHER)


def _keys(mixer: object) -> Iterator[str]:
    """The keys that a reader of the picture looks for."""
    for key in ("window", "latent_dim", "d_state", "gamma", "logit_softcap", "depth"):
        if (value := getattr(mixer, key, None)) is not None:
            yield f"{key} {value}"


def _origin(layer: LayerSpec, used: Counter[int]) -> Iterator[str]:
    if used[layer.weights_of] > 1:
        yield f"weights shared by {used[layer.weights_of]} layers"
    if layer.override is not None:
        yield f"override: {override_line(layer)}"


def _box(x: float, y: float, width: float, height: float, colour: str, radius: float = 6) -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {where} rx="{radius:g}" fill="{colour}"/>'


def _text(
    x: float,
    y: float,
    text: str,
    size: int,
    colour: str = INK,
    *,
    anchor: str = "start",
    weight: int = 400,
    room: float | None = None,
) -> str:
    """One line of text, cut where it would leave its room."""
    if room is not None and len(text) * size * 0.56 > room:
        text = text[: max(1, int(room / (size * 0.56)) - 1)] + "…"
    style = f'font-size="{size}" font-weight="{weight}" fill="{colour}" text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text.strip())}</text>'
