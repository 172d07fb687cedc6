"""The user's model and its description, which is looked up anew whenever the model's parts have changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from ..errors import InputsError, ModelError
from ..plan.inputs import Inputs
from ..plan.pictures import Pictures
from ..plan.sites import Key
from .architecture import Architecture
from .blocks import Block
from .catalogue import site_sizes
from .fingerprint import Fingerprint
from .hook import Hook

Adapter = Callable[[Any], Architecture]
_OF_ALL_ROWS = ("torch.ao.nn.quantized.dynamic", "torch.nn.quantized.dynamic")
"""Where the layers are that take one scale for all that they are called on."""
_LOOKING = ("torch.utils.module_tracker", "transformers.utils.output_capturing")


class Network:
    """A transformer, wrapped but never changed: hooks stand on it only while a plan is applied.

    Attributes:
        module: the user's model.
        adapter: from the model to its description.
        tool: what else runs the model and places what is visited (TransformerLens, nnsight); None where our hooks do.
        trusted: what certificates said of the description, by regime: why it cannot be believed, or nothing; forgotten
            when the model's parts change.
    """

    def __init__(self, module: nn.Module, adapter: Adapter) -> None:
        self.module, self.adapter = module, adapter
        self.tool: Any = None
        self.trusted: dict[Any, str] = {}
        self._fingerprint: Fingerprint | None = None
        self._described: Architecture | None = None
        self._sizes: dict[Key, dict[str, int]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Describe the model anew if its parts have changed since it was described last.

        Raises:
            ModelError: nobody can describe it any more, or torch makes new tensors elsewhere than on the CPU.
        """
        default = torch.get_default_device()
        if default.type != "cpu":
            raise ModelError(
                f"torch.set_default_device({str(default)!r}) is in force, so masks and indices, which belong on the "
                "CPU, would not be there: move the model with .to(), and call torch.set_default_device('cpu')"
            )
        now = Fingerprint(self.module)
        if now == self._fingerprint:
            return
        found = described(self.module, self.adapter)
        self._fingerprint, self._described, self._sizes, self.trusted = now, found, site_sizes(found), {}

    @property
    def architecture(self) -> Architecture:
        """Where the model keeps its parts, as they were when it was last used (see `refresh`)."""
        assert self._described is not None
        return self._described

    @property
    def sizes(self) -> dict[Key, dict[str, int]]:
        """Sizes of the head and last axes of every site, by key."""
        return self._sizes

    @property
    def n_layers(self) -> int:
        """Number of blocks L."""
        return len(self.architecture.blocks)

    @property
    def device(self) -> torch.device:
        """Where the embedding is, and with it everything else (models spread over devices are not supported)."""
        device = next(self.architecture.embed.parameters()).device
        # Of a model that runs elsewhere there are only the shapes here.
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding."""
        return next(self.architecture.embed.parameters()).dtype

    @property
    def angles_by_length(self) -> bool:
        """Whether rotary angles depend on the longest position in a batch."""
        rotary = [block.attention.rotary for block in self.architecture.blocks]
        return any(one is not None and one.by_length for one in rotary)

    def __repr__(self) -> str:
        arch, attention = self.architecture, self.architecture.blocks[0].attention
        heads, groups = attention.q.heads, attention.k.heads
        told = f"{heads} heads" + (f" ({groups} key/value)" if groups != heads else "")
        out = f"vocabulary {arch.vocabulary}" if arch.readout is None else f"{arch.vocabulary} classes"
        out = "no head" if arch.headless else out
        return f"Model({arch.family}: {self.n_layers} layers, {told}, width {arch.width}, {out})"

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        pixels: Tensor | None = None,
        pictures: Pictures | None = None,
        source: Inputs | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of the user's model, called as plainly as the inputs allow; [B, 1, V] of a classifier.

        Of a model without a head, its last states [B, T, M].
        """
        arguments = self.arguments(ids, mask, positions, pixels, pictures, source)
        if self.architecture.pooled:
            return self._every(arguments)
        logits = logits_of(self.module(**arguments))
        return logits if self.architecture.readout is None else logits.unsqueeze(1)

    def _every(self, arguments: dict[str, Any]) -> Tensor:
        """The logits of all tokens, of a model that returns those of one."""
        seen: list[Tensor] = []
        # The last hook there, so it is shown what others made of the logits.
        handle = self.architecture.unembed.register_forward_hook(Hook(lambda _m, _a, out: seen.append(out)))
        try:
            self.module(**arguments)
        finally:
            handle.remove()
        return self.architecture.capped(seen[-1])

    def arguments(
        self,
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        pixels: Tensor | None = None,
        pictures: Pictures | None = None,
        source: Inputs | None = None,
    ) -> dict[str, Any]:
        """What the model is called with."""
        if source is not None:
            return self._decoding(ids, mask, source)
        if pixels is not None:
            # In the model's dtype, as it would bring them into by itself.
            return {"pixel_values": pixels.to(self.device, self.dtype)}
        if self.tool is not None:
            self.tool.require(ids, mask)
        if self.architecture.pools_last and not bool(mask[:, -1].all()):
            raise InputsError(
                f"{type(self.module).__name__} pools the last column, which is padding in some rows: pad them on the "
                "left, or, as it was trained, give ids that the padding is part of, without a mask"
            )
        arguments: dict[str, Any] = {"input_ids": ids.to(self.device)}
        if not bool(mask.all()):
            positions = positions + self.architecture.first_position
            arguments |= {"attention_mask": mask.long().to(self.device), "position_ids": positions.to(self.device)}
        if hasattr(getattr(self.module, "config", None), "use_cache"):
            arguments["use_cache"] = False
        if self.architecture.tower is not None:
            more = self.architecture.tower.arguments(ids, mask, pictures)
            arguments |= {name: self._on(value) for name, value in more.items()}
        known = inspect.signature(self.module.forward).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            # Some count positions by the mask themselves, and encoders have no cache.
            self._require_mask(mask, known)
            arguments = {name: value for name, value in arguments.items() if name in known}
        return arguments

    def _decoding(self, ids: Tensor, mask: Tensor, source: Inputs) -> dict[str, Any]:
        """What a model that decodes what it encodes is called with: no positions, which it counts by columns."""
        given = {"input_ids": source.ids, "attention_mask": source.mask.long(), "decoder_input_ids": ids}
        if not bool(mask.all()):
            given["decoder_attention_mask"] = mask.long()
        return {name: value.to(self.device) for name, value in given.items()} | {"use_cache": False}

    def _require_mask(self, mask: Tensor, known: Mapping[str, Any]) -> None:
        """Raise InputsError for padding that a model is not told of and would attend to."""
        causal = all(block.attention.causal for block in self.architecture.blocks)
        ahead = bool((mask[:, 1:] & ~mask[:, :-1]).any())  # a real token that has padding before it
        if "attention_mask" not in known and not bool(mask.all()) and (ahead or not causal):
            raise InputsError(
                f"{type(self.module).__name__} takes no attention_mask, so it would attend to padding: give rows of "
                "one length, or pad them on the right if it is causal"
            )

    def features(self, ids: Tensor, mask: Tensor, pictures: Pictures) -> Tensor:
        """What the tower makes of images, [places, M], for the places that they take in rows of a text."""
        tower = self.architecture.tower
        assert tower is not None
        look: Any = getattr(self.module, "base_model", self.module).get_image_features
        known = inspect.signature(look).parameters
        given = tower.arguments(ids, mask, pictures)
        given = {name: self._on(value) for name, value in given.items() if name in tower.sees & set(known)}
        found = look(**given, return_dict=True).pooler_output
        return found.flatten(0, 1) if isinstance(found, Tensor) else torch.cat(list(found))

    def _on(self, value: Tensor) -> Tensor:
        return value.to(self.device, self.dtype if value.is_floating_point() else None)

    def mixing(self) -> str:
        """Why what the model makes of a row depends on the rows beside it; empty where it does not."""
        for name, module in self.module.named_modules():
            if type(module).__module__.startswith(_OF_ALL_ROWS):
                return f"{name} quantises its input by the range of all rows at once"
        return ""

    def unshareable(self) -> str:
        """Why the copy-on-write executor cannot be exact on this model as it is now; empty where it can."""
        if self.tool is not None:
            return f"the model is run by {self.tool.name}"
        if any(module.training for module in self.module.modules()):
            return "the model is in training mode"
        if _users(torch_modules._global_forward_hooks) or _users(torch_modules._global_forward_pre_hooks):
            return "there are hooks of yours on all modules"
        for name, module in self.module.named_modules():
            if _users(module._forward_hooks) or _users(module._forward_pre_hooks):
                return f"there are hooks of yours on {name or 'the model'}"
            if "forward" in vars(module):
                return f"the forward of {name or 'the model'} is one of yours"
        if self.architecture.unshared:
            return self.architecture.unshared
        devices = sorted({str(parameter.device) for parameter in self.module.parameters()})
        if len(devices) > 1:
            return f"the model is spread over {', '.join(devices)}"
        return ""


def without_wrapper(module: nn.Module) -> nn.Module:
    """The model that an adapter of peft's was put into, which computes the same; any other model itself.

    Raises:
        ModelError: it puts tokens before the prompt, which the model does not know of.
    """
    inner = getattr(module, "get_base_model", None)
    if inner is None or not type(module).__module__.startswith("peft"):
        return module
    for name, config in getattr(module, "peft_config", {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise ModelError(
                f"the adapter {name!r} ({type(config).__name__}) puts tokens before the prompt, whose positions nobody "
                "could name: adapters that change layers (LoRA, IA3) can be wrapped"
            )
    return inner()


def described(module: nn.Module, adapter: Adapter) -> Architecture:
    """The description that an adapter gives of a model.

    Raises:
        ModelError: it gives something else, the model was compiled, or two layers are one module.
    """
    for name, part in module.named_modules():
        if hasattr(part, "_orig_mod") or vars(part).get("_compiled_call_impl") is not None:
            raise ModelError(
                f"{name or 'the model'} was compiled, and hooks that are placed later would be ignored in silence: "
                "wrap the model before it is compiled (model._orig_mod of what torch.compile returned)"
            )
    found = adapter(module)
    if not isinstance(found, Architecture):
        raise ModelError(f"an adapter returns an Architecture, this one a {type(found).__name__}")
    for part in found.stacks.values():
        _require_distinct(part.blocks)
    return found


def _require_distinct(blocks: tuple[Block, ...]) -> None:
    """Raise ModelError where one module stands in two layers, so that an edit of one would be an edit of both."""
    known: dict[nn.Module, tuple[int, str]] = {}
    for layer, block in enumerate(blocks):
        parts = {"block": block.module, "attention": block.attention.module, "output projection": block.attention.out}
        parts |= {f"projection to {name}": getattr(block.attention, name).module for name in "qkv"}
        if block.mlp is not None:
            parts["MLP"] = block.mlp.module
        for name, part in parts.items():
            other, role = known.setdefault(part, (layer, name))
            if other != layer:
                raise ModelError(
                    f"layers {other} and {layer} are one module (the {role} of one is the {name} of the other), so an "
                    "edit of one would edit both: give each layer modules of its own (copy.deepcopy)"
                )


def _users(hooks: dict[int, Any]) -> bool:
    # A counter of torch's own (of operations, say), or what records hidden states, looks and changes nothing.
    return any(
        not isinstance(hook, Hook) and getattr(hook, "__module__", "") not in _LOOKING for hook in hooks.values()
    )


def logits_of(output: Any) -> Tensor:
    """The logits among what a model returns: alone, by name, or first in a tuple; of one without a head its states."""
    if isinstance(output, tuple):
        output = output[0]
    if isinstance(output, Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output.last_hidden_state
