"""What a stack remembers between calls: one state a layer, and the position.

A layer's state is a small dataclass of tensors, batch first. Everything one does to a state is written here once,
over those tensors. A state handed to `chunkwise` or `recurrent` is consumed: use what comes back.
"""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Protocol, Self
from zlib import crc32

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .disk import to_disk
from .paths import expand_home

FORMAT = 2
PART = ".part"
"""The end of the names of folders, beside saved states, that hold what is being written."""


class LayerState:
    """Base of every layer's state: a frozen dataclass whose fields are tensors [B, ...]."""

    KINDS: ClassVar[dict[str, str]] = {}  # field -> kind

    def tensors(self) -> dict[str, Tensor]:
        named = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of each kind of state."""
        count: Counter[str] = Counter()
        for name, tensor in self.tensors().items():
            count[self.KINDS[name]] += tensor.numel() * tensor.element_size()
        return dict(count)

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, **{name: change(t) for name, t in self.tensors().items()})  # type: ignore[type-var]

    @property
    def bounded(self) -> bool:
        """Whether there is room for max_tokens tokens and no more."""
        return False

    def by_position(self) -> set[str]:
        """The tensors [B, S, ...] that hold the token at position p in slot p, for every token."""
        return set()

    def croppable(self, tokens: int) -> set[str]:
        """The tensors that have forgotten their last `tokens` tokens once the position says so."""
        return self.by_position()

    def rewindable(self, tokens: int) -> bool:
        """Whether the last `tokens` tokens can be forgotten exactly."""
        return tokens == 0 or self.croppable(tokens) == self.tensors().keys()


@dataclass(frozen=True)
class RingState(LayerState):
    """Caches of S slots, [B, S, ...]: the token at position p is in slot p % S.

    `window` is how many tokens a query sees (None: all that S slots hold). A ring of S > window slots can be rolled
    back by S - window.
    """

    window: int | None = field(default=None, kw_only=True)

    @property
    def slots(self) -> int:
        return next(iter(self.tensors().values())).shape[1]

    @property
    def bounded(self) -> bool:
        return self.window is None

    def by_position(self) -> set[str]:
        return set(self.tensors()) if self.window is None else set()

    def croppable(self, tokens: int) -> set[str]:
        return set(self.tensors()) if self.window is None or tokens <= self.slots - self.window else set()


@dataclass(frozen=True)
class KVState(RingState):
    """keys and values [B, S, Hkv, K]."""

    KINDS: ClassVar[dict[str, str]] = {"keys": "KV", "values": "KV"}
    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class LatentState(RingState):
    """latent [B, S, L], from which keys and values are made, and the rotated key [B, S, R] that all heads share."""

    KINDS: ClassVar[dict[str, str]] = {"latent": "latent", "rotated": "latent"}
    latent: Tensor
    rotated: Tensor


@dataclass(frozen=True)
class RetentionState(LayerState):
    """The decayed sum of k^T v: kv [B, H, K, V], unscaled, at least float32.

    Normalised linear attention keeps the sum of its keys as one more value channel.
    """

    KINDS: ClassVar[dict[str, str]] = {"kv": "retention"}
    kv: Tensor


@dataclass(frozen=True)
class SSMState(LayerState):
    """ssm [B, H, P, N] (Mamba-1: [B, D, N]), at least float32; conv [B, W-1, D], the convolution's last inputs."""

    KINDS: ClassVar[dict[str, str]] = {"ssm": "SSM", "conv": "conv"}
    ssm: Tensor
    conv: Tensor


@dataclass(frozen=True)
class WKVState(LayerState):
    """shift [B, 1, D], the last input, and RWKV's sums, each [B, D] and at least float32, scaled by exp(-top).

    Where weight is zero nothing was summed yet, whatever top says.
    """

    KINDS: ClassVar[dict[str, str]] = {"shift": "conv", "total": "WKV", "weight": "WKV", "top": "WKV"}
    shift: Tensor
    total: Tensor
    weight: Tensor
    top: Tensor


@dataclass(frozen=True)
class HistoryState(LayerState):
    """Hyena's past: inputs [B, S, depth, D] of the long convolutions, the token at position p in slot p.

    conv [B, W-1, (depth + 1) D] holds the short convolution's last inputs.
    """

    KINDS: ClassVar[dict[str, str]] = {"inputs": "history", "conv": "conv"}
    inputs: Tensor
    conv: Tensor

    @property
    def bounded(self) -> bool:
        return True

    def by_position(self) -> set[str]:
        return {"inputs"}


@dataclass(frozen=True)
class BranchedState(LayerState):
    """The states of mixers side by side, one each."""

    branches: tuple[LayerState, ...]

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": t for i, state in enumerate(self.branches) for name, t in state.tensors().items()}

    def bytes_by_kind(self) -> dict[str, int]:
        return sum_by_kind(self.branches)

    def map(self, change: Callable[[Tensor], Tensor]) -> "BranchedState":
        return BranchedState(tuple(state.map(change) for state in self.branches))

    @property
    def bounded(self) -> bool:
        return any(state.bounded for state in self.branches)

    def by_position(self) -> set[str]:
        return {f"{i}.{name}" for i, state in enumerate(self.branches) for name in state.by_position()}

    def croppable(self, tokens: int) -> set[str]:
        return {f"{i}.{name}" for i, state in enumerate(self.branches) for name in state.croppable(tokens)}


def sum_by_kind(states: Iterable[LayerState]) -> dict[str, int]:
    """Bytes of each kind of state in all of them."""
    count: Counter[str] = Counter()
    for state in states:
        count.update(state.bytes_by_kind())
    return dict(count)


class Stateful(Protocol):
    """What saving and loading need of a model."""

    def fingerprint(self) -> str: ...

    def init_state(self, batch: int, max_tokens: int | None = None, *, rollback: int = 0) -> "StackState": ...


@dataclass(frozen=True)
class StackState:
    """The states of all layers and the only owner of position.

    length: [B] int64, tokens of the row's document seen so far. reach: [B] int64, the most of them that were ever
    written, which a rollback leaves behind. bound: an upper limit of `length`, known without
    asking the device. max_tokens: what it was made for, a limit where some layer is bounded. rollback_limit: the
    largest rollback that windowed caches were made for.
    """

    layers: tuple[LayerState, ...]
    length: Tensor
    reach: Tensor
    bound: int
    max_tokens: int
    rollback_limit: int = 0

    @property
    def bounded(self) -> bool:
        """Whether max_tokens is a limit: some layer keeps every token."""
        return any(layer.bounded for layer in self.layers)

    @property
    def batch(self) -> int:
        return self.length.shape[0]

    def nbytes(self) -> int:
        """Bytes of all layers' states (the position's 8 bytes a row not counted)."""
        return sum(self.bytes_by_kind().values())

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of each kind of state."""
        return sum_by_kind(self.layers)

    def map(self, change: Callable[[Tensor], Tensor]) -> "StackState":
        """A state with `change` applied to every tensor, `length` included."""
        layers = tuple(s.map(change) for s in self.layers)
        return replace(self, layers=layers, length=change(self.length), reach=change(self.reach))

    def select(self, rows: Tensor | Sequence[int]) -> "StackState":
        """An independent copy of some rows, in the order asked for; a row may be asked for many times."""
        index = self._rows(rows)
        return self.map(lambda t: t.index_select(0, index))

    def fork(self, copies: int) -> "StackState":
        """`copies` independent copies of every row, those of a row side by side."""
        if copies < 1:
            raise ValueError(f"copies = {copies} must be 1 or more")
        return self.select(torch.arange(self.batch, device=self.length.device).repeat_interleave(copies))

    def join(self, other: "StackState") -> "StackState":
        """An independent state of this one's rows and then the other's.

        Raises ValueError where the two were not made for the same max_tokens.
        """
        self._check_like(other, "join")
        rows = iter(other.tensors().values())
        return replace(self.map(lambda t: torch.cat([t, next(rows)])), bound=max(self.bound, other.bound))

    def snapshot(self) -> "StackState":
        """An independent copy: steps taken later do not touch it."""
        return self.map(torch.clone)

    def restore(self, snapshot: "StackState") -> "StackState":
        """The snapshot's values in this state's own memory; raises ValueError where the shapes differ."""
        with torch.no_grad():
            for mine, theirs in zip(self.tensors().values(), snapshot.tensors().values(), strict=True):
                if mine.shape != theirs.shape:
                    raise ValueError(
                        f"cannot restore: the state holds {tuple(mine.shape)}, the snapshot {tuple(theirs.shape)}"
                    )
                if not theirs.is_set_to(mine):
                    mine.copy_(theirs)
        return replace(self, bound=snapshot.bound)

    def put(self, rows: Tensor | Sequence[int], other: "StackState") -> "StackState":
        """The same state with other's rows, in order, in place of these: written into its own memory.

        Raises ValueError where the two were not made for the same max_tokens.
        """
        index = self._rows(rows)
        self._check_like(other, "put")
        if other.batch != len(index):
            raise ValueError(f"cannot put a state of {other.batch} rows into {len(index)}: give a row for each")
        with torch.no_grad():
            for mine, theirs in zip(self.tensors().values(), other.tensors().values(), strict=True):
                if len(index) == 1 and theirs.is_set_to(mine[int(index) : int(index) + 1]):
                    continue  # that very row, written in place
                shared = theirs.untyped_storage().data_ptr() == mine.untyped_storage().data_ptr()  # rows of this state
                mine.index_copy_(0, index, (theirs.clone() if shared else theirs).to(mine.dtype))
        return replace(self, bound=max(self.bound, other.bound))

    def reset(self, rows: Tensor | Sequence[int]) -> "StackState":
        """The same state with some rows back at the start of an empty document."""
        index = self._rows(rows)
        state = self.map(lambda t: t.index_fill(0, index, 0))
        return replace(state, bound=int(state.length.max()) if self.batch else 0)

    def rollback(self, tokens: int | Tensor) -> "StackState":
        """Forget the last `tokens` tokens (one number, or [B]) exactly, or raise ValueError.

        Consumes this state, as a step does; take a snapshot() to keep it.
        """
        length = self.shortened(tokens)
        behind = self.behind(length)
        for index, layer in enumerate(self.layers):
            if not layer.rewindable(behind):
                raise ValueError(f"cannot roll back {behind} tokens: layer {index} {_why_not(layer, behind)}")
        return self.cropped(length)

    def shortened(self, tokens: int | Tensor) -> Tensor:
        """[B]: the length without the last `tokens` (one number, or [B]); ValueError where there are not so many."""
        back = torch.as_tensor(tokens, dtype=torch.int64, device=self.length.device).expand(self.batch)
        if bool((back < 0).any()) or bool((back > self.length).any()):
            raise ValueError(f"cannot roll back {back.tolist()} tokens: the rows hold {self.length.tolist()}")
        return self.length - back

    def behind(self, length: Tensor) -> int:
        """How far a state of `length` [B] would stand behind what was ever written."""
        return int((self.reach - length).max()) if self.batch else 0

    def cropped(self, length: Tensor) -> "StackState":
        """The state at `length` [B], if nothing but the position has to change."""
        return replace(self, length=length, bound=int(length.max()) if self.batch else 0)

    def span(self, start: int, stop: int) -> dict[str, Tensor]:
        """What the tokens from start to stop left in slots of their own: views of what is indexed by position."""
        slots = self._by_position()
        return {name: t[:, start:stop] for name, t in self._layers().items() if name in slots}

    def rest(self) -> dict[str, Tensor]:
        """All that layers keep beside such slots: sums, last inputs, windows."""
        slots = self._by_position()
        return {name: t for name, t in self._layers().items() if name not in slots}

    def to(self, device: torch.device | str) -> "StackState":
        return self.map(lambda t: t.to(device))

    def save(self, path: str | Path, model: Stateful, **more: Tensor) -> None:
        """Write a safetensors file that names the spec and the weights the state belongs to, whole or not at all.

        Of what is indexed by position it holds the slots in use. `more`: tensors to keep beside the state.
        Raises OSError where it cannot be written; what was there before stays.
        """
        longest = int(self.length.max()) if self.batch else 0
        named = {**self.span(0, longest), **self.rest(), "length": self.length, "reach": self.reach, **more}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
        header = {
            "format": FORMAT,
            "model": model.fingerprint(),
            "batch": self.batch,
            "max_tokens": self.max_tokens,
            "rollback": self.rollback_limit,
            "sums": {name: _checksum(tensor) for name, tensor in tensors.items()},
        }
        _write(expand_home(path), tensors, {"eulerstack": json.dumps(header)})

    @staticmethod
    def load(path: str | Path, model: Stateful) -> "StackState":
        """Read what `save` wrote; raises ValueError for another model's state or a file that is none."""
        return Saved.open(path, model).made(model)

    def _rows(self, rows: Tensor | Sequence[int]) -> Tensor:
        """Row numbers as [n] int64; raises ValueError for masks, fractions and rows that are not there."""
        index = torch.as_tensor(rows, device=self.length.device)
        if index.numel() and (index.dtype == torch.bool or index.is_floating_point()):
            raise ValueError(f"rows are {index.dtype}: give row numbers, such as mask.nonzero()[:, 0]")
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < self.batch):
            raise ValueError(f"rows {index.tolist()} reach outside a state of {self.batch} rows")
        return index.long()

    def _check_like(self, other: "StackState", act: str) -> None:
        """Raises ValueError unless rows of the two are alike."""
        mine, theirs = ({name: t.shape[1:] for name, t in s.tensors().items()} for s in (self, other))
        for name in mine.keys() | theirs.keys():
            if mine.get(name) != theirs.get(name):
                here, there = (s[name] and list(s[name]) if name in s else "nothing" for s in (mine, theirs))
                raise ValueError(
                    f"cannot {act} rows of another form: {name} is {there} and not {here}; make both of one model with "
                    f"init_state(max_tokens={self.max_tokens}, rollback={self.rollback_limit})"
                )

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name: a layer's number with its own names, and `length` and `reach`."""
        return {**self._layers(), "length": self.length, "reach": self.reach}

    def _layers(self) -> dict[str, Tensor]:
        return {f"{i}.{n}": t for i, layer in enumerate(self.layers) for n, t in layer.tensors().items()}

    def _by_position(self) -> set[str]:
        return {f"{i}.{n}" for i, layer in enumerate(self.layers) for n in layer.by_position()}


class Snapshots:
    """The last `keep` snapshots of what no crop of up to `span` tokens brings back, oldest first.

    A row that has begun a new document since a snapshot stands in it at that document's empty start.
    """

    def __init__(self, keep: int, span: int) -> None:
        self.span = span
        self.kept: deque[dict[str, Tensor]] = deque(maxlen=keep)

    def __len__(self) -> int:
        return len(self.kept)

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for snapshot in self.kept for t in snapshot.values())

    def take(self, state: StackState) -> None:
        """One more; the oldest goes where there are `keep`."""
        cropped = {f"{i}.{name}" for i, layer in enumerate(state.layers) for name in layer.croppable(self.span)}
        self.kept.append({n: t.clone() for n, t in state.tensors().items() if n not in cropped and n != "reach"})

    def begin(self, rows: Tensor) -> None:
        """These rows [n] begin a new document: no going back behind its start."""
        for snapshot in self.kept if len(rows) else ():
            snapshot.update({name: t.index_fill(0, rows, 0) for name, t in snapshot.items()})

    def clear(self) -> None:
        self.kept.clear()

    def floor(self, state: StackState) -> Tensor:
        """[B]: the length that each row can go back to."""
        return self.kept[0]["length"] if self.kept else state.length

    def since(self, state: StackState) -> int:
        """The most tokens that a row has taken since the newest."""
        return int((state.length - self.kept[-1]["length"]).max()) if self.kept and state.batch else 0

    def forget(self, length: Tensor) -> None:
        """Drop those that stand beyond `length` [B] in some row."""
        while self.kept and bool((self.kept[-1]["length"] > length).any()):
            self.kept.pop()

    def restored(self, state: StackState, rows: Tensor) -> StackState:
        """The state with rows, a mask [B], as the newest snapshot has them."""
        newest = self.kept[-1]

        def back(name: str, mine: Tensor) -> Tensor:
            chosen = rows.reshape(-1, *[1] * (mine.dim() - 1))
            return torch.where(chosen, newest[name], mine) if name in newest else mine

        values = iter([back(name, mine) for name, mine in state.tensors().items()])
        state = state.map(lambda _: next(values))
        return state.cropped(state.length)


def _why_not(layer: LayerState, tokens: int) -> str:
    if isinstance(layer, BranchedState):
        return next(_why_not(state, tokens) for state in layer.branches if not state.rewindable(tokens))
    if isinstance(layer, RingState):
        return (
            f"keeps a window of {layer.window} tokens in {layer.slots} slots; "
            "make the state with init_state(..., rollback=N)"
        )
    kinds = " and ".join(sorted(set(layer.KINDS.values())))
    return (
        f"keeps {kinds} state, a running sum that cannot be cropped; step the model through "
        "eulerstack.inference.tape.Tape, which goes back exactly, or take a snapshot() before and restore() it"
    )


@dataclass(frozen=True)
class Saved:
    """What `StackState.save` wrote. tensors: the state's and those beside it, read where the file is mapped."""

    path: Path
    batch: int
    max_tokens: int
    rollback_limit: int
    tensors: dict[str, Tensor]

    @staticmethod
    def open(path: str | Path, model: Stateful) -> "Saved":
        """Raises ValueError for a file that is none, is damaged, or holds another model's state."""
        path = expand_home(path)
        try:
            with safe_open(str(path), framework="pt") as file:
                header = _header(path, file.metadata(), model)
                tensors = {name: file.get_tensor(name) for name in header["sums"]}
            damaged = [name for name, tensor in tensors.items() if _checksum(tensor) != header["sums"][name]]
            saved = Saved(path, header["batch"], header["max_tokens"], header["rollback"], tensors)
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a saved state: {error}") from error
        if damaged:
            raise ValueError(f"{path} is damaged: {damaged[0]} is not what was saved")
        return saved

    def made(self, model: Stateful, max_tokens: int | None = None) -> StackState:
        """A state of its own, with room for `max_tokens` (as it was saved by default)."""
        return self.into(model.init_state(self.batch, max_tokens or self.max_tokens, rollback=self.rollback_limit))

    def into(self, state: StackState) -> StackState:
        """An empty state with the saved values, in its own memory. Raises ValueError where they do not fit."""
        with torch.no_grad():
            for mine, theirs in self.fitted(state):
                mine.copy_(theirs)
        return replace(state, bound=self.longest)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.tensors["length"].max()) if self.batch else 0

    def fitted(self, state: StackState) -> list[tuple[Tensor, Tensor]]:
        """The state's tensors beside the saved ones; raises ValueError where these do not fit.

        They may have other numbers of slots: up to the longest row, the token at position p is in slot p of both.
        """
        longest, pairs = self.longest, []
        if state.batch != self.batch or (state.bounded and longest > state.max_tokens):
            here = f"there is room for {state.batch} of {state.max_tokens}"
            raise ValueError(f"{self.path} holds {self.batch} rows of up to {longest} tokens, and {here}")
        for name, mine in state.tensors().items():
            theirs = self.tensors[name]
            slots = slice(None) if mine.shape == theirs.shape else (slice(None), slice(longest))
            if mine[slots].shape != theirs[slots].shape or mine.dtype != theirs.dtype:
                raise ValueError(f"{self.path} holds {name} in another form; it was saved for another rollback")
            pairs.append((mine[slots], theirs[slots]))
        return pairs


def _checksum(tensor: Tensor) -> int:
    return crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Beside its place first, and moved there when it is on the disk: what is there is always whole.

    In a folder of its own, since safetensors writes to a file beside the one it is given, under a name of its choice.
    """
    try:
        with TemporaryDirectory(PART, f".{path.name}.", path.parent, ignore_cleanup_errors=True) as work:
            part = Path(work) / path.name
            save_file(tensors, str(part), metadata)
            to_disk(part)
            part.replace(path)
            to_disk(path.parent)
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def _header(path: str | Path, metadata: dict[str, str] | None, model: Stateful) -> dict[str, Any]:
    if not metadata or "eulerstack" not in metadata:
        raise ValueError(f"{path} is not a state saved by eulerstack")
    header: dict[str, Any] = json.loads(metadata["eulerstack"])
    if header["format"] != FORMAT:
        raise ValueError(f"{path} has state format {header['format']}; this version reads {FORMAT}")
    if header["model"] != model.fingerprint():
        raise ValueError(f"{path} is the state of another model: the spec or the weights differ")
    return header
