"""check_mixer: is your mixer one operator with three forms? Our own tests are made of the same checks.

from eulerstack.testing import check_mixer

def test_min_gru() -> None:
    check_mixer("min_gru", {"expand": 2})
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .builder import StackBuilder
from .kernels.provider import Target
from .mixers import Mixer, extension, make_mixer
from .segments import Segments
from .spec import ExtensionSpec, expand
from .spec.extensions import installed, known
from .state import BranchedState, HistoryState, LayerState, RingState

WIDTH, TOKENS, ROOM = 16, 27, 96
MODEL: dict[str, Any] = {"d_model": WIDTH, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 256}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
HALF = 1e-2
"""Largest differences, relative to the largest value; in bfloat16 a ratio of root mean squares of most tokens."""


def check_mixer(mixer: str | type[Mixer[Any]], options: dict[str, Any] | None = None, **model: Any) -> None:
    """Raises AssertionError with a sentence for each part of the contract that the mixer breaks.

    mixer: the name that stack files give it, or the class that a registered or installed spec names. options: its
    keys, as in a file; choose small ones (chunks of 8, few heads). model: keys of StackBuilder other than d_model 16,
    n_heads 4, n_kv_heads 2, max_seq_len 256. It runs on torch.get_default_device(). Raises SpecError where these are
    wrong, ValueError for an unknown class.
    """
    name = mixer if isinstance(mixer, str) else _name_of(mixer)
    model = MODEL | model
    contract = Contract(lambda dtype: built(name, options or {}, model, "auto", dtype, seed=0), model["d_model"])
    contract.make(torch.float64)
    broken = list(contract.broken())
    if broken:
        raise AssertionError("\n".join([f"{name} breaks the contract of a mixer:", *broken]))


def _name_of(mixer: type[Mixer[Any]]) -> str:
    """The name that a spec gives this class."""
    for blocks in (known, installed):
        for name, block in blocks().items():
            spec = block.model_fields[name].annotation
            if isinstance(spec, type) and issubclass(spec, ExtensionSpec) and extension(spec) is mixer:
                return name
    raise ValueError(f"no spec names {mixer.__name__}: es.register(NAME, SPEC) first, or install its package")


def built(
    kind: str, options: dict[str, Any], model: dict[str, Any], kernels: str, dtype: torch.dtype, seed: int
) -> Mixer[Any]:
    """A mixer with weights scaled up, so that it matters what it does."""
    torch.manual_seed(seed)
    spec = StackBuilder(**model).add(kind, options).spec()
    target = Target(kernels, torch.get_default_device().type, dtype)
    mixer = make_mixer(expand(spec)[0].mixer, spec, target).to(dtype)
    mixer.reset_parameters()
    with torch.no_grad():
        for key, weight in mixer.named_parameters():
            if key.endswith("proj.weight"):
                weight.mul_(2.0)
            if key.endswith(("proj.bias", "sinks")):
                weight.normal_()
    return mixer


def close(got: Tensor, wanted: Tensor, tolerance: float, what: str = "results") -> None:
    """Raises AssertionError unless both are finite and differ by `tolerance` times the largest value at most."""
    assert got.shape == wanted.shape, f"{what} are {list(got.shape)} and not {list(wanted.shape)}"
    for one in (got, wanted):
        assert torch.isfinite(one).all(), f"{what} are not all finite"
    scale = wanted.abs().max().clamp(min=1e-30) if wanted.numel() else 1.0
    error = ((got - wanted).abs().max() / scale).item() if wanted.numel() else 0.0
    assert error <= tolerance, f"{what} differ by {error:.1e} of the largest ({tolerance:.0e} is allowed)"


def rms_ratio(got: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference over that of what is wanted."""
    return ((got.double() - wanted.double()).square().mean() / wanted.double().square().mean()).sqrt().item()


def rms_ratio_of_most(got: Tensor, wanted: Tensor) -> float:
    """`rms_ratio` over all tokens of [B, T, D] but the worst in 16.

    Where a norm divides by a sum that nearly cancels, rounding turns a head's sign: such tokens are few, and say
    nothing of a mixer.
    """
    error, size = (t.double().square().sum(-1).flatten() for t in (got.double() - wanted.double(), wanted))
    kept = error.argsort()[: len(error) - len(error) // 16]
    return (error[kept].sum() / size[kept].sum()).sqrt().item()


@dataclass
class Result:
    """Outputs [B, T, D], what the final state says, and gradients by name."""

    y: Tensor
    state: dict[str, Tensor]
    grads: dict[str, Tensor]

    def agrees(self, wanted: "Result", tolerance: float) -> None:
        """Each gradient relative to its own largest value, but not to less than 1/1000 of the largest of all.

        In float32 gradients are allowed five times `tolerance`: they add up terms that were rounded in the forward
        already, and such sums cancel more than outputs do.
        """
        close(self.y, wanted.y, tolerance, "outputs")
        for name, tensor in wanted.state.items():
            close(self.state[name], tensor, tolerance, f"final states ({name})")
        scale = max(g.abs().max().item() for g in wanted.grads.values())
        for name, grad in wanted.grads.items():
            worst = (self.grads[name] - grad).abs().max().item()
            slack = 1 if grad.dtype == torch.float64 else 5
            allowed = slack * tolerance * max(grad.abs().max().item(), 1e-3 * scale)
            assert worst <= allowed, f"gradients of {name} differ by {worst:.1e} ({allowed:.0e} is allowed)"


def seen(state: LayerState, length: int) -> dict[str, Tensor]:
    """What a state says about the future: of a cache, only the slots that a later query can see."""
    if isinstance(state, BranchedState):
        parts = [seen(branch, length) for branch in state.branches]
        return {f"{i}.{name}": tensor for i, part in enumerate(parts) for name, tensor in part.items()}
    if isinstance(state, HistoryState):
        return {"inputs": state.inputs[:, :length], "conv": state.conv}
    if not isinstance(state, RingState):
        return state.tensors()
    slots = state.slots
    first = 0 if state.window is None else max(0, length - state.window + 1)
    return {name: tensor[:, torch.arange(first, length) % slots] for name, tensor in state.tensors().items()}


def in_pieces(
    mixer: Mixer[Any], x: Tensor, state: LayerState, segments: Segments, pieces: list[int], sizes: list[int | None]
) -> tuple[Tensor, LayerState]:
    """Continue `state` by x in pieces of these lengths; a chunk size of 0 means the recurrent form, None the spec's."""
    outs, at = [], 0
    for i, length in enumerate(pieces):
        size = sizes[i] if len(sizes) > 1 else sizes[0]
        part, where = x[:, at : at + length], segments.slice(at, at + length)
        if size == 0:
            y, state = mixer.recurrent(part, state, where)
        else:
            y, state = mixer.chunkwise(part, state, where, chunk_size=size)
        outs.append(y)
        at += length
    return torch.cat(outs, 1), state


def run(
    mixer: Mixer[Any], x: Tensor, state: LayerState, start: int, pieces: list[int], sizes: list[int | None]
) -> Result:
    """`in_pieces` with gradients, by x and by the state as well; `state` has seen `start` tokens."""
    x = x.clone().requires_grad_()
    opening = state.map(lambda t: t.clone().requires_grad_())
    y, now = in_pieces(mixer, x, opening, Segments.dense(x.shape[1], start), pieces, sizes)
    final = seen(now, start + x.shape[1])
    return Result(y, final, gradients(mixer, [y, *final.values()], {"x": x, **opening.tensors()}))


def gradients(mixer: Mixer[Any], outputs: list[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of the outputs, by the leaves and the weights."""
    wanted = {**leaves, **dict(mixer.named_parameters())}
    dice, double = torch.Generator("cpu").manual_seed(1), torch.float64
    total = sum((o * torch.randn(o.shape, generator=dice, dtype=double, device="cpu").to(o)).sum() for o in outputs)
    assert isinstance(total, Tensor)
    found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return {key: torch.zeros_like(wanted[key]) if g is None else g for key, g in zip(wanted, found, strict=True)}


def splits(tokens: int) -> Iterator[tuple[str, list[int], list[int | None]]]:
    """Ways to cut T > 20 tokens: name, lengths, chunk sizes."""
    yield "whole", [tokens], [None]
    yield "chunk 1", [tokens], [1]
    yield "chunk 5", [tokens], [5]
    yield "chunk T", [tokens], [tokens]
    yield "chunk 4T", [tokens], [4 * tokens]
    yield "steps", [1] * tokens, [0]
    yield "chunks of one", [1] * tokens, [3]
    yield "ragged", [1, 2, tokens - 8, 5], [None]
    yield "chunk size changes", [7, 9, tokens - 16], [3, 64, 8]
    yield "chunks to steps", [tokens - 4, 1, 1, 1, 1], [4, 0, 0, 0, 0]
    yield "steps to chunks", [1, 1, 1, tokens - 3], [0, 0, 0, 6]
    yield "steps amid chunks", [6, 1, 1, tokens - 8], [4, 0, 0, None]


CUTS = {name: (pieces, sizes) for name, pieces, sizes in splits(TOKENS)}


@dataclass
class Row:
    """A row of a batch: padding on the left, documents, padding on the right; its state has seen `start` tokens."""

    left: int
    documents: list[int]
    right: int
    carries: bool
    start: int

    @property
    def length(self) -> int:
        return self.left + sum(self.documents) + self.right


ROWS = {
    "right padding": [Row(0, [9], 6, True, 0), Row(0, [15], 0, True, 4), Row(0, [1], 14, True, 11)],
    "left padding": [Row(6, [9], 0, True, 0), Row(0, [15], 0, True, 4), Row(14, [1], 0, True, 11)],
    "both sides": [Row(2, [9], 4, True, 3), Row(5, [10], 0, True, 0), Row(0, [2], 13, False, 8)],
    "packed": [Row(0, [4, 6, 5], 0, True, 0), Row(0, [1, 1, 13], 0, True, 9), Row(0, [14, 1], 0, True, 2)],
    "packed, nothing carried": [Row(0, [4, 6, 5], 0, False, 7), Row(0, [15], 0, False, 9)],
    "packed and padded": [Row(3, [5, 4], 3, True, 5), Row(0, [2, 3, 4], 6, False, 5), Row(7, [3, 5], 0, True, 0)],
    "a row of padding": [Row(15, [], 0, True, 6), Row(0, [10], 5, True, 6), Row(15, [], 0, False, 3)],
}
WAYS: dict[str, tuple[list[int], list[int | None]]] = {
    "whole": ([15], [None]),
    "chunk 4": ([15], [4]),
    "steps": ([1] * 15, [0] * 15),
    "ragged": ([2, 1, 7, 5], [None, 0, 3, None]),
}
FROM_NOTHING = ("right padding", "left padding", "packed", "packed and padded")


def batch_of(rows: list[Row]) -> tuple[Segments, Tensor]:
    """Unplaced segments of rows of one length, and how many tokens each row's state has seen."""
    real = torch.zeros(len(rows), rows[0].length, dtype=torch.bool)
    document = torch.full(real.shape, 99)
    for i, row in enumerate(rows):
        at = row.left
        for number, length in enumerate(row.documents):
            real[i, at : at + length] = True
            document[i, at : at + length] = 5 - number
            at += length
    carries = torch.tensor([row.carries for row in rows])
    return Segments(real, document, carries=carries), torch.tensor([row.start for row in rows])


@dataclass(frozen=True)
class Contract:
    """What a mixer promises, as checks that raise AssertionError; their docstrings are the promises.

    make: the mixer in a dtype, the same weights every time. width: channels of its inputs.
    """

    make: Callable[[torch.dtype], Mixer[Any]]
    width: int = WIDTH

    def broken(self) -> Iterator[str]:
        """A sentence for each promise that some case breaks."""
        for check, cases in self.grid().items():
            wrong = [(case, why) for case in cases if (why := _why_not(check, case)) is not None]
            if wrong:
                case, why = wrong[0]
                where = f" ({', '.join(str(part).removeprefix('torch.') for part in case)})" if case else ""
                more = f"; so do {len(wrong) - 1} of the other {len(cases) - 1} cases" if len(wrong) > 1 else ""
                yield f"- {str(check.__doc__).strip()} Not so{where}: {why}{more}"

    def grid(self) -> dict[Callable[..., None], list[tuple[Any, ...]]]:
        """The checks, and the cases of each."""
        alone: list[tuple[Any, ...]] = [()]
        exact, single = torch.float64, torch.float32
        return {
            self.weights: alone,
            self.splits: [*((cut, 19, exact) for cut in CUTS), ("whole", 3, single), ("steps", 3, single)],
            self.parallel: [(cut, dtype) for dtype in TOLERANCE for cut in ("whole", "chunk 5", "steps")],
            self.handed_over: alone,
            self.forward: alone,
            self.causal: alone,
            self.one_token: alone,
            self.without_grad: alone,
            self.refusals: alone,
            self.nothing: alone,
            self.documents: [(rows, way, exact) for rows in ROWS for way in WAYS],
            self.whole_documents: [(rows,) for rows in FROM_NOTHING],
            self.packed_gradients: [("parallel",), ("chunkwise",)],
            self.padding: alone,
            self.state_dtypes: alone,
            self.bfloat16: [("parallel",), ("chunkwise",), ("recurrent",)],
            self.state_bytes: alone,
            self.counts: alone,
            self.adapted: [(layers,) for layers in self.linears()],
            self.hooked: [(form,) for form in FORMS],
        }

    def weights(self) -> None:
        """`reset_parameters` draws every weight."""
        mixer = self.make(torch.float64)
        for weight in mixer.parameters():
            weight.data.fill_(torch.nan)
        mixer.reset_parameters()
        left = [name for name, weight in mixer.named_parameters() if not torch.isfinite(weight).all()]
        assert not left, f"it leaves {', '.join(left)} as they were"

    def splits(self, cut: str, start: int, dtype: torch.dtype) -> None:
        """However a sequence is cut into calls and chunks, it gives what single steps give, gradients too."""
        mixer, x = self.make(dtype), self.drawn(2, TOKENS, dtype)
        state = self.after(mixer, 2, start, dtype)
        other = CUTS["chunk T" if cut == "steps" else "steps"]
        run(mixer, x, state, start, *CUTS[cut]).agrees(run(mixer, x, state, start, *other), TOLERANCE[dtype])

    def parallel(self, cut: str, dtype: torch.dtype) -> None:
        """`parallel` gives what the forms with a state give, gradients too."""
        mixer, x = self.make(dtype), self.drawn(2, TOKENS, dtype).requires_grad_()
        wanted, state = mixer.parallel(x), self.after(mixer, 2, 0, dtype)
        y, _ = in_pieces(mixer, x, state, Segments.dense(TOKENS), *CUTS[cut])
        got = Result(y, {}, gradients(mixer, [y], {"x": x}))
        got.agrees(Result(wanted, {}, gradients(mixer, [wanted], {"x": x})), TOLERANCE[dtype])

    def handed_over(self) -> None:
        """A state means what the tokens before it meant to `parallel`."""
        mixer, x = self.make(torch.float64), self.drawn(2, 40)
        empty = mixer.init_state(2, 64, dtype=torch.float64)
        _, state = mixer.chunkwise(x[:, :13], empty, Segments.dense(13), chunk_size=4)
        y, _ = mixer.chunkwise(x[:, 13:], state, Segments.dense(27, 13), chunk_size=6)
        close(y, mixer.parallel(x)[:, 13:], 1e-12, "outputs")

    def forward(self) -> None:
        """`forward` gives what `parallel` gives."""
        mixer, x = self.make(torch.float64), self.drawn(2, TOKENS)
        close(mixer(x), mixer.parallel(x), 1e-12, "outputs")

    def causal(self, leaks: float = 1e-14, behind: int = 0) -> None:
        """No token sees the future, beyond rounding, and each sees itself and `behind` tokens before."""
        mixer, x = self.make(torch.float64), self.drawn(1, 12).requires_grad_()
        (grad,) = torch.autograd.grad(mixer.parallel(x)[0, 6].sum(), x)
        reach = grad[0].abs().sum(-1)
        blind = next((i for i in range(6 - behind, 7) if reach[i] == 0), None)
        assert blind is None, f"token 6 does not see token {blind}"
        first = next((i for i in range(7, 12) if reach[i] > leaks * reach.max()), None)
        assert first is None, f"token 6 sees token {first}"

    def one_token(self) -> None:
        """A sequence of one token is the same in all forms."""
        mixer, x = self.make(torch.float64), self.drawn(3, 1)
        for step in (mixer.recurrent, mixer.chunkwise):
            y, _ = step(x, mixer.init_state(3, 4, dtype=torch.float64), Segments.dense(1))
            close(y, mixer.parallel(x), 1e-12, "outputs")

    def without_grad(self) -> None:
        """Under no_grad, where buffers may be written in place, the outputs are the same."""
        mixer, x = self.make(torch.float64), self.drawn(2, 9)
        state = self.after(mixer, 2, 6)
        wanted = run(mixer, x, state, 6, [4, 1, 4], [None, 0, 3]).y
        with torch.no_grad():
            y, _ = in_pieces(mixer, x, state.map(torch.clone), Segments.dense(9, 6), [4, 1, 4], [None])
        close(y, wanted, 1e-12, "outputs")

    def refusals(self) -> None:
        """`recurrent` of two tokens, a state without positions and a chunk of 0 tokens are ValueErrors."""
        mixer, x = self.make(torch.float64), self.drawn(1, 2)
        state, two = mixer.init_state(1, 4), Segments.dense(2)
        calls: dict[str, Callable[[], Any]] = {
            "recurrent takes two tokens": lambda: mixer.recurrent(x, state, two),
            "chunkwise takes a state without segments": lambda: mixer.chunkwise(x, state),
            "chunkwise takes chunk_size=0": lambda: mixer.chunkwise(x, state, two, chunk_size=0),
        }
        for what, call in calls.items():
            try:
                call()
            except ValueError:
                continue
            raise AssertionError(what)

    def nothing(self) -> None:
        """A call of no tokens leaves the state alone."""
        mixer = self.make(torch.float64)
        state = self.after(mixer, 2, 5)
        y, after = mixer.chunkwise(self.drawn(2, 0), state.map(torch.clone), Segments.dense(0, 5))
        assert y.shape == (2, 0, self.width), f"outputs are {list(y.shape)}"
        for name, tensor in state.tensors().items():
            assert torch.equal(after.tensors()[name], tensor), f"{name} changes"

    def documents(self, rows: str, way: str, dtype: torch.dtype) -> None:
        """In a padded or packed batch, each document gives what it gives alone."""
        self.batch(ROWS[rows], *WAYS[way], dtype)

    def batch(self, rows: list[Row], pieces: list[int], sizes: list[int | None], dtype: torch.dtype) -> None:
        """`documents` of any rows in any pieces."""
        mixer, x = self.make(dtype), self.drawn(len(rows), rows[0].length, dtype)
        state = self.opening(mixer, rows, dtype)
        segments, start = batch_of(rows)
        placed = segments.placed(start, x.shape[1], bound=int(start.max()))
        y, after = in_pieces(mixer, x, state.map(torch.clone), placed, pieces, sizes)
        lengths = placed.ends(start)
        for i, row in enumerate(rows):
            wanted, final, length = self.alone(mixer, x[i : i + 1], row, _row(state, i))
            close(y[i : i + 1], wanted, TOLERANCE[dtype], f"outputs of row {i}")
            assert int(lengths[i]) == length
            got = seen(_row(after, i), length)
            for name, tensor in final.items():
                close(got[name], tensor, TOLERANCE[dtype], f"final states of row {i} ({name})")

    def whole_documents(self, rows: str) -> None:
        """`parallel` and `forward` keep documents apart."""
        mixer = self.make(torch.float64)
        fresh = [Row(r.left, r.documents, r.right, True, 0) for r in ROWS[rows]]
        x, (segments, start) = self.drawn(len(fresh), 15), batch_of(fresh)
        empty = mixer.init_state(1, ROOM, dtype=torch.float64)
        for form in (mixer.parallel, mixer.forward):
            y = form(x, segments.placed(start, 15))
            for i, row in enumerate(fresh):
                close(y[i : i + 1], self.alone(mixer, x[i : i + 1], row, empty)[0], 1e-12, f"outputs of row {i}")

    def packed_gradients(self, form: str) -> None:
        """Gradients of packed documents are those of separate ones."""
        mixer, x = self.make(torch.float64), self.drawn(1, 12).requires_grad_()
        document = torch.tensor([[0] * 5 + [1] * 3 + [2] * 4])
        placed = Segments(document=document).placed(torch.zeros(1, dtype=torch.int64), 12)
        if form == "parallel":
            packed = mixer.parallel(x, placed)
        else:
            packed = mixer.chunkwise(x, mixer.init_state(1, 12, dtype=torch.float64), placed, chunk_size=4)[0]
        separate = torch.cat([mixer.parallel(part) for part in x.split([5, 3, 4], 1)], 1)
        close(packed, separate, 1e-12, "outputs")
        got, wanted = gradients(mixer, [packed], {"x": x}), gradients(mixer, [separate], {"x": x})
        scale = max(g.abs().max() for g in wanted.values())
        for name, grad in wanted.items():
            assert (got[name] - grad).abs().max() <= 1e-12 * scale, f"gradients of {name} differ"

    def padding(self) -> None:
        """Padding gets no gradient and gives none; its outputs are zero."""
        mixer, x = self.make(torch.float64), self.drawn(2, 8)
        x[0, 5:] = 1e6  # what stands in the padding must not matter
        x.requires_grad_()
        real = torch.tensor([[True] * 5 + [False] * 3, [False] * 2 + [True] * 6])
        y = mixer.parallel(x, Segments(real=real).placed(torch.zeros(2, dtype=torch.int64), 8))
        assert (y[~real] == 0).all(), "outputs of padding are not zero"
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        assert torch.isfinite(grad).all(), "gradients are not all finite"
        assert (grad[~real] == 0).all(), "padding has gradients"

    def state_dtypes(self) -> None:
        """The state of a bfloat16 mixer keeps its dtypes from call to call."""
        mixer, x = self.make(torch.bfloat16), self.drawn(1, 5, torch.bfloat16)
        state = mixer.init_state(1, 8)
        _, after = mixer.chunkwise(x[:, :4], state, Segments.dense(4))
        _, last = mixer.recurrent(x[:, 4:], after, Segments.dense(1, 4))
        for form, now in (("chunkwise", after), ("recurrent", last)):
            for name, tensor in now.tensors().items():
                before = state.tensors()[name].dtype
                assert tensor.dtype == before, f"{form} makes {name} {tensor.dtype} of {before}"

    def bfloat16(self, form: str) -> None:
        """In bfloat16, 48 tokens stay near what the same weights give in float64."""
        half, full = self.make(torch.bfloat16), self.make(torch.bfloat16).to(torch.float64)
        x = self.drawn(2, 48, torch.bfloat16)
        if form == "parallel":
            y = half.parallel(x)
        else:
            pieces, size = ([48], None) if form == "chunkwise" else ([1] * 48, 0)
            y, _ = in_pieces(half, x, half.init_state(2, ROOM), Segments.dense(48), pieces, [size])
        assert y.dtype == torch.bfloat16, f"outputs are {y.dtype}"
        error = rms_ratio_of_most(y, full.parallel(x.double()))
        assert error < HALF, f"outputs differ by {error:.1e} in root mean square ({HALF:.0e} is allowed)"

    def state_bytes(self) -> None:
        """A state's bytes are known before it is used: by kind, on the meta device, and constant unless `grows`."""
        mixer = self.make(torch.float32)
        told = mixer.init_state(2, 32, "meta").bytes_by_kind()
        state = mixer.init_state(2, 32)
        assert all(tensor.shape[0] == 2 for tensor in state.tensors().values()), "its tensors are not batch first"
        _, after = mixer.chunkwise(self.drawn(2, 5, torch.float32), state, Segments.dense(5))
        assert told == state.bytes_by_kind() == after.bytes_by_kind(), "they change as it is used"
        assert state.bounded == mixer.grows, f"grows is {mixer.grows}, but the state's `bounded` is {state.bounded}"
        short, long = (mixer.init_state(1, n, "meta").bytes_by_kind() for n in (1 << 20, 1 << 21))
        assert (short != long) == mixer.grows, f"grows is {mixer.grows}, but max_tokens says otherwise"

    def counts(self) -> None:
        """`flops` is a whole number that rises with the tokens."""
        mixer = self.make(torch.float32)
        few, many = mixer.flops(16), mixer.flops(32)
        assert isinstance(few, int), f"it is {few!r}"
        assert 0 < few < many, f"it is {few} for 16 tokens and {many} for 32"

    def linears(self) -> dict[str, list[str]]:
        """Names of the mixer's linear layers: each by itself, and `all` of them."""
        names = [name for name, part in self.make(torch.float64).named_modules() if isinstance(part, nn.Linear)]
        return {**{name: [name] for name in names}, **({"all": names} if names else {})}

    def adapted(self, layers: str) -> None:
        """A module in a linear layer's place is called, in every form: the mixer computes with it, and it learns."""
        mixer, merged, x = self.make(torch.float64), self.make(torch.float64), self.drawn(2, TOKENS).requires_grad_()
        for name in self.linears()[layers]:
            adapter = Adapter(mixer.get_submodule(name))
            _replace(mixer, name, adapter)
            adapter.merge_into(merged.get_submodule(name))
        y = mixer.parallel(x)
        close(y, merged.parallel(x), 1e-11, "outputs, before and after merging,")
        wanted = Result(y, {}, gradients(mixer, [y], {"x": x}))
        idle = [name for name, grad in wanted.grads.items() if name.endswith((".down", ".up")) and not grad.any()]
        assert not idle, f"{', '.join(idle)} get no gradient"
        for cut in ("whole", "chunk 5", "steps"):
            z, _ = in_pieces(mixer, x, self.after(mixer, 2, 0), Segments.dense(TOKENS), *CUTS[cut])
            Result(z, {}, gradients(mixer, [z], {"x": x})).agrees(wanted, 1e-11)

    def hooked(self, form: str) -> None:
        """Hooks on linear layers run in every form, for any number of rows, with what they change."""
        for batch in (1, 40):
            mixer, merged, x = self.make(torch.float64), self.make(torch.float64), self.drawn(batch, 3)
            met: set[str] = set()
            for name in self.linears().get("all", []):
                mixer.get_submodule(name).register_forward_hook(partial(_louder, met, name))
                for weight in merged.get_submodule(name).parameters():
                    weight.data.mul_(LOUDER)
            with torch.no_grad():
                y = _in_form(mixer, x, form, self.after(mixer, batch, 0))
                close(y, _in_form(merged, x, form, self.after(merged, batch, 0)), 1e-11, "outputs")
            deaf = [name for name in self.linears() if name not in met | {"all"}]
            assert not deaf, f"hooks on {', '.join(deaf)} do not run for {batch} rows"

    def drawn(self, batch: int, tokens: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Inputs [B, T, D]."""
        return torch.randn(batch, tokens, self.width, dtype=dtype)

    def after(self, mixer: Mixer[Any], batch: int, start: int, dtype: torch.dtype = torch.float64) -> LayerState:
        """The state after `start` drawn tokens (an empty one for 0)."""
        state: LayerState = mixer.init_state(batch, ROOM, dtype=dtype)
        if start:
            with torch.no_grad():
                _, state = mixer.chunkwise(self.drawn(batch, start, dtype), state, Segments.dense(start), chunk_size=7)
        return state

    def opening(self, mixer: Mixer[Any], rows: list[Row], dtype: torch.dtype) -> LayerState:
        """One state whose rows have seen different numbers of tokens."""
        states = [self.after(mixer, 1, row.start, dtype) for row in rows]
        rows_of = iter(list(zip(*(state.tensors().values() for state in states), strict=True)))
        return states[0].map(lambda first: torch.cat(next(rows_of)))

    def alone(self, mixer: Mixer[Any], x: Tensor, row: Row, state: LayerState) -> tuple[Tensor, dict[str, Tensor], int]:
        """The row's outputs with each document run by itself in single steps, its final state and its length."""
        y, at, length = torch.zeros_like(x), row.left, row.start
        final = seen(state, row.start)
        for number, count in enumerate(row.documents):
            fresh = number > 0 or not row.carries
            length = count if fresh else row.start + count
            begin = mixer.init_state(1, ROOM, dtype=x.dtype) if fresh else state
            result = run(mixer, x[:, at : at + count], begin, length - count, [1] * count, [0])
            y[:, at : at + count], final = result.y.detach(), result.state
            at += count
        return y, final, length


class Adapter(nn.Module):
    """A linear layer with a product of low rank beside it (LoRA, Hu et al. 2021, arXiv 2106.09685).

    It has none of the names of a linear layer, so that whoever reads weights in its place is found out.
    """

    def __init__(self, inner: nn.Module, rank: int = 2) -> None:
        super().__init__()
        assert isinstance(inner, nn.Linear)
        self.inner = inner
        self.down = nn.Parameter(torch.randn(rank, inner.in_features).to(inner.weight) / inner.in_features**0.5)
        self.up = nn.Parameter(torch.randn(inner.out_features, rank).to(inner.weight) / 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x) + x @ self.down.T @ self.up.T
        return y

    @torch.no_grad()
    def merge_into(self, layer: nn.Module) -> None:
        """Add the product to the weight of a plain layer."""
        layer.get_parameter("weight").add_(self.up @ self.down)


FORMS = ("parallel", "chunkwise", "recurrent")
LOUDER = 1.25


def _louder(met: set[str], name: str, layer: nn.Module, given: Any, output: Tensor) -> Tensor:
    met.add(name)
    return output * LOUDER


def _replace(mixer: nn.Module, name: str, part: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(mixer.get_submodule(path), leaf, part)


def _in_form(mixer: Mixer[Any], x: Tensor, form: str, state: LayerState) -> Tensor:
    """x [B, T, D] in one of the FORMS, token by token in the recurrent one."""
    if form == "parallel":
        return mixer.parallel(x)
    pieces, size = ([x.shape[1]], None) if form == "chunkwise" else ([1] * x.shape[1], 0)
    return in_pieces(mixer, x, state, Segments.dense(x.shape[1]), pieces, [size])[0]


def _row(state: LayerState, i: int) -> LayerState:
    return state.map(lambda t: t[i : i + 1])


def _why_not(check: Callable[..., None], case: tuple[Any, ...]) -> str | None:
    """What is wrong, in words; None if nothing is."""
    try:
        check(*case)
    except AssertionError as error:
        return str(error)
    except Exception as error:  # whatever a mixer may raise
        return f"it raises {type(error).__name__}: {error}"
    return None
