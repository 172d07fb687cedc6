"""Activations of many prompts on disk: written shard by shard, resumed, mapped into memory.

A folder holds ``header.json``, which says of what they are, and shards ``00000.safetensors``, each with the real tokens
of some prompts: a tensor [n, ...] for each site, and ``row``, ``pos`` and ``token`` int64 [n] of each token.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from hooks import (
    Inputs,
    Model,
    ModelError,
    Plan,
    ResultError,
    Site,
    World,
    as_plan,
    captured,
    digest_of,
    fingerprint,
    record,
    site,
    write_all,
)
from interp.progress import tqdm
from interp.provenance import model_identity

SCHEMA, VERSION = "interp.activations", 1
_SQUARE = ("scores", "pattern")
_TOKENS = ("row", "pos", "token")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}


@dataclass(frozen=True, eq=False)
class Activations:
    """Activations of the real tokens of prompts, mapped into memory from a folder.

    Attributes:
        path: the folder.
        sites: what was kept, by name, in the order in which it was asked for.
        rows: how many prompts.
        shards: the files.
    """

    path: Path
    sites: tuple[str, ...]
    rows: int
    shards: tuple[Path, ...]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Activations:
        """Open a folder that `save_activations` has finished.

        Raises:
            ResultError: it is none, or not all shards are there and whole.
        """
        folder = Path(path)
        header = _read_header(folder)
        shards = tuple(folder / _name(number) for number in range(header["shards"]))
        for shard in shards:
            if not _is_whole(shard, header):
                raise ResultError(f"{shard} is missing or not of these activations: call save_activations once more")
        return cls(folder, tuple(header["sites"]), header["rows"], shards)

    def __len__(self) -> int:
        return sum(len(part["pos"]) for part in self._mapped)

    @cached_property
    def _mapped(self) -> list[dict[str, Tensor]]:
        return [_mapped(shard) for shard in self.shards]

    def parts(self, where: Site | str) -> list[Tensor]:
        """The values of a site [n, ...], one tensor a shard, read from disk as they are looked at.

        Raises:
            ResultError: it was not kept.
        """
        name = where if where in _TOKENS else str(site(where))
        if name not in (*self.sites, *_TOKENS):
            raise ResultError(f"{name} was not kept; there are {', '.join((*self.sites, *_TOKENS))}")
        return [part[str(name)] for part in self._mapped]

    def __getitem__(self, where: Site | str) -> Tensor:
        """The values of a site [tokens, ...] as one tensor (mapped where there is one shard, else a copy)."""
        parts = self.parts(where)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def batches(self, where: Site | str, size: int, *, seed: int | None = None) -> Iterator[Tensor]:
        """Values [size, ...] of tokens, in order or shuffled; the last batch may be smaller.

        Args:
            where: the site.
            size: tokens a batch.
            seed: of the order, over all shards; None for that of the prompts.
        """
        parts, total = self.parts(where), len(self)
        starts = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
        order = torch.arange(total) if seed is None else torch.randperm(total, generator=_generator(seed))
        for chosen in order.split(size):
            shard = torch.searchsorted(starts, chosen, right=True) - 1
            batch = parts[0].new_empty(len(chosen), *parts[0].shape[1:])
            for number in shard.unique().tolist():
                mine = shard == number
                batch[mine] = parts[number][chosen[mine] - starts[number]]
            yield batch


def save_activations(
    model: Model,
    prompts: Inputs | Sequence[Any],
    capture: Any,
    path: str | os.PathLike[str],
    *,
    plan: Any = None,
    rows_per_shard: int = 256,
    dtype: torch.dtype | None = None,
    budget: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Activations:
    """Run many prompts and write the activations of their real tokens to disk, shard by shard.

    Call it again, after an interrupt, with the same arguments, and it goes on where it stopped.

    Args:
        model: the wrapped model.
        prompts: texts or lists of ids, which are prepared a shard at a time, or `Inputs`.
        capture: what to keep, as `Model.run` takes it; whole sites with one vector or matrix a token.
        path: the folder.
        plan: what is done to the model meanwhile.
        rows_per_shard: prompts a file.
        dtype: of the files; default the model's.
        budget: bytes that activations may take in memory, as for sweeps.
        seed: of random interventions, which know a prompt by its place among all of them.
        progress: show a bar.

    Raises:
        ResultError: the folder holds activations of something else, or a site has none for each token.
        PlanError, SiteError, InputsError: the plan, a site or the prompts do not fit the model.
    """
    sites, todo, folder = captured(model, capture), as_plan(plan), Path(path)
    _require_tokens(model, sites)
    total = len(prompts)
    if total < 1 or rows_per_shard < 1:
        raise ResultError(f"{total} prompts in shards of {rows_per_shard}: there is nothing to write")
    header = {
        "schema": SCHEMA,
        "version": VERSION,
        "sites": [str(place) for place in sites],
        "rows": total,
        "shards": -(-total // rows_per_shard),
        "identity": _identity(model, prompts, todo, dtype, rows_per_shard, seed),
    }
    folder.mkdir(parents=True, exist_ok=True)
    _require_same(folder, header)
    write_all({folder / "header.json": json.dumps(header, indent=1).encode()})
    for number in tqdm(range(header["shards"]), desc="activations", disable=not progress):
        target = folder / _name(number)
        if _is_whole(target, header):
            continue
        window = slice(number * rows_per_shard, min((number + 1) * rows_per_shard, total))
        tensors = _shard(model, _inputs(model, prompts, window), sites, todo, dtype, budget, seed)
        write_all({target: save(tensors, {"identity": digest_of(header)})})
    return Activations.open(folder)


def _shard(
    model: Model,
    inputs: Inputs,
    sites: Sequence[Site],
    plan: Plan,
    dtype: torch.dtype | None,
    budget: float | None,
    seed: int,
) -> dict[str, Tensor]:
    kept: dict[str, list[Tensor]] = {str(place): [] for place in sites}
    for outcome in record(model, [World(inputs, plan)], sites, executor="sequential", budget=budget, seed=seed):
        real = inputs.mask[outcome.rows]
        for place, value in zip(sites, outcome.values, strict=True):
            kept[str(place)].append(value.to("cpu", dtype)[real])
    tensors = {name: torch.cat(parts).contiguous() for name, parts in kept.items()}
    where = inputs.row_ids[:, None].expand_as(inputs.ids)
    return tensors | {
        "row": where[inputs.mask].contiguous(),
        "pos": inputs.positions[inputs.mask].contiguous(),
        "token": inputs.ids[inputs.mask].contiguous(),
    }


def _inputs(model: Model, prompts: Inputs | Sequence[Any], window: slice) -> Inputs:
    if isinstance(prompts, Inputs):
        return prompts.rows(window)
    return model.inputs(list(prompts[window]), row_ids=torch.arange(window.start, window.stop))


def _require_tokens(model: Model, sites: Sequence[Site]) -> None:
    if model.holds:
        raise ResultError("a plan is held on the model: hand it over as plan=, so that the files say of what they are")
    if any(module.training for module in model.module.modules()):
        raise ModelError("the model is in training mode, so dropout may change what is written: call .eval() first")
    if not sites:
        raise ResultError("there is nothing to keep: name a site")
    for place in sites:
        model.require(place)
        if place.restricted:
            raise ResultError(f"{place}: whole sites are written; take the part when reading")
        if place.name in _SQUARE or (model.architecture.readout is not None and place.name == "logits"):
            raise ResultError(f"{place} has no value of its own for each token: sweep it, or keep it with run()")


def _identity(model: Model, prompts: Any, plan: Plan, dtype: Any, rows_per_shard: int, seed: int) -> dict[str, str]:
    given = (prompts.ids, prompts.mask, prompts.row_ids, prompts.pixels) if isinstance(prompts, Inputs) else prompts
    return {
        **model_identity(model),
        "prompts": digest_of(given if isinstance(given, tuple) else [_plain(one) for one in given]),
        "plan": fingerprint(plan),
        "dtype": str(dtype),
        "rows_per_shard": str(rows_per_shard),
        "seed": str(seed),
    }


def _plain(prompt: Any) -> Any:
    return prompt if isinstance(prompt, str) else [int(token) for token in prompt]


def _require_same(folder: Path, header: dict[str, Any]) -> None:
    """Raise ResultError where a folder holds something else."""
    if not (folder / "header.json").exists():
        if any(folder.iterdir()):
            raise ResultError(f"{folder} holds files that are no activations; give an empty folder")
        return
    known = _read_header(folder)
    if known != header:
        old, new = ({**h, **h["identity"]} for h in (known, header))
        different = [k for k in new if k != "identity" and old.get(k) != new[k]]
        raise ResultError(f"{folder} holds activations of something else: they differ in {', '.join(different)}")


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / "header.json"
    try:
        header = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ResultError(f"{folder} holds no activations that can be read: {error}") from None
    if not isinstance(header, dict) or header.get("schema") != SCHEMA or header.get("version") != VERSION:
        raise ResultError(f"{path} is not of activations that this release reads")
    return header


def _is_whole(path: Path, header: dict[str, Any]) -> bool:
    """Whether a shard is there, and of these activations."""
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("identity") == digest_of(header)
    except Exception:  # cut off, or no such file at all: safetensors raises errors of its own kinds
        return False


def _mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, which is mapped into memory: nothing is read before it is looked at."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        names = json.loads(file.read(length))
    size = path.stat().st_size
    whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    found = {}
    for name, entry in names.items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            found[name] = whole[start:end].view(_DTYPES[entry["dtype"]]).view(entry["shape"])
    return found


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _name(number: int) -> str:
    return f"{number:05}.safetensors"
