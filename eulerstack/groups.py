"""Parameters by their names: which decay, which Muon trains, and which a group of optimizer_groups holds."""

from fnmatch import fnmatchcase

from .spec import GroupSpec

UNDECAYED = ("bias", "A_log", "D", "dt_bias", "gamma", "sinks", "decay", "bonus", "mix_k", "mix_v", "mix_r")
ROUTER = "router_proj.weight"
MATRICES = ("proj.weight", "embedding.weight", "head.weight")


def decays(name: str) -> bool:
    """Whether a parameter decays: all but biases, norms, decays and mixes. By name: marks on tensors get lost."""
    *owners, last = name.split(".")
    return last not in UNDECAYED and not any(owner.endswith("norm") for owner in owners)


def group_of(name: str, groups: tuple[GroupSpec, ...]) -> GroupSpec | None:
    """The first group whose glob matches."""
    return next((group for group in groups if fnmatchcase(name, group.match)), None)


def check_groups(names: list[str], groups: tuple[GroupSpec, ...]) -> None:
    """Raises ValueError for a group that changes no parameter."""
    for i, group in enumerate(groups):
        matched = [name for name in names if fnmatchcase(name, group.match)]
        won = [name for name in matched if group_of(name, groups[:i]) is None]
        where = f"training_hints.optimizer_groups.{i}.match = {group.match!r}"
        if not matched:
            shown = ", ".join(names[:: max(1, len(names) // 5)][:6])
            raise ValueError(f"{where} matches no parameter; some names are {shown}")
        if not won:
            raise ValueError(f"{where}: an entry before it has all the parameters it matches; put it first")
        if group.weight_decay is not None and not any(map(decays, won)):
            raise ValueError(f"{where} has a weight_decay, but matches only norms, biases and decays, which have none")


def to_muon(name: str, dims: int, optimizer: str) -> bool:
    """Whether Muon trains a parameter: `muon` every matrix, `hybrid` the layers' projections but routers."""
    if dims != 2 or optimizer == "adamw":
        return False
    if optimizer == "muon":
        return name.endswith(MATRICES)
    return name.endswith("proj.weight") and not name.endswith(ROUTER)
