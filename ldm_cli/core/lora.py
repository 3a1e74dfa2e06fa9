"""Low-rank adapters that are trained beside a frozen model (Hu et al. 2021, arXiv:2106.09685), with DoRA (Liu et al.
2024, arXiv:2402.09353).

An adapter adds to the output of one module through a forward hook: modules, names and state dict of the model stay as
they are. Letters: B batch, I O channels in and out, R rank, k kernel size.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_cli import philox
from ldm_cli.core.lora_config import PRESETS, LoRAConfig
from ldm_cli.core.low_rank import LowRank
from ldm_cli.errors import RecipeError

Adaptable = nn.Linear | nn.Conv2d


class Adapter(nn.Module):
    """The update of one linear layer or convolution; its parameters are float32.

    Attributes:
        down: [R, I], or [R, I, k, k].
        up: [O, R], or [O, R, 1, 1].
        magnitude: [O], of DoRA; else None.
    """

    def __init__(self, base: Adaptable, rank: int, alpha: float, *, dora: bool) -> None:
        """Begin as no update: `down` is random as a linear layer's weight, `up` zero.

        Args:
            base: the module whose output is adapted.
            rank: R.
            alpha: the update is scaled by alpha / R.
            dora: whether the norms of the rows are trained apart.
        """
        super().__init__()
        self.rank, self.alpha = rank, alpha
        weight = base.weight
        ones = [1] * (weight.ndim - 2)
        new = weight.new_empty
        self.down = nn.Parameter(new(rank, *weight.shape[1:], dtype=torch.float32))
        self.up = nn.Parameter(new(len(weight), rank, *ones, dtype=torch.float32).zero_())
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        norms = torch.linalg.vector_norm(weight.detach().float().flatten(1), dim=1) if dora else None
        self.magnitude = None if norms is None else nn.Parameter(norms)

    def low_rank(self) -> LowRank:
        """The update; its tensors are the parameters."""
        return LowRank(self.down, self.up, self.alpha, self.magnitude)

    def adapted(self, base: Adaptable, x: Tensor, output: Tensor) -> Tensor:
        """The output of `base` with the update.

        Args:
            base: as for the class.
            x: its input, in which dropout may have set numbers to zero.
            output: its output, of the whole input; its type is kept.
        """
        scale = self.alpha / self.rank
        if isinstance(base, nn.Conv2d):
            inner = F.conv2d(x, self.down, None, base.stride, base.padding, base.dilation)
            update = F.conv2d(inner, self.up) * scale
        else:
            update = F.linear(F.linear(x, self.down), self.up) * scale
        if self.magnitude is None:
            return output + update
        ones = [1] * (self.down.ndim - 2)
        # arXiv:2402.09353, eq. 5 and §4.3: no gradient flows through the norm.
        ratio = (self.magnitude / self._norms(base)).view(-1, *ones)
        bias = None if base.bias is None else base.bias.view(-1, *ones)
        product = output if bias is None else output - bias
        adapted = ratio * (product + update)
        # Norms and biases are float32 under autocast; layers that follow expect the type that `base` gives.
        return (adapted if bias is None else adapted + bias).to(output.dtype)

    @torch.no_grad()
    def _norms(self, base: Adaptable) -> Tensor:
        updated = base.weight.float() + self.low_rank().delta().view_as(base.weight)
        norms: Tensor = torch.linalg.vector_norm(updated.flatten(1), dim=1)
        return norms


class Adapters(nn.Module):
    """The adapters of a model, each under the path of the module that it adapts.

    A hook of each module adds its update, whoever calls the model. In training mode inputs are dropped out by counter:
    a sample's mask follows from `seed`, its epoch and its position, so that it is the same in a recomputed layer, in a
    continued run, and for every number of parts.

    Attributes:
        samples: epoch and position of each sample of the batch, int64 [B] each, for dropout in training; None: no
            dropout.
    """

    def __init__(self, model: nn.Module, ranks: Mapping[str, int], config: LoRAConfig, *, seed: int = 0) -> None:
        """Adapt a model, whose parameters are frozen.

        Args:
            model: any.
            ranks: path of a linear layer or ungrouped convolution in it → R; see `chosen_ranks`.
            config: scale, dropout and kind of the updates.
        """
        super().__init__()
        model.requires_grad_(False)
        self.samples: tuple[Tensor, Tensor] | None = None
        self._dropout, self._seed = config.dropout, seed
        self.modules_by_path: dict[str, Adapter] = {}
        for path, rank in ranks.items():
            base = model.get_submodule(path)
            if not isinstance(base, Adaptable):
                raise ValueError(f"Adapters: '{path}' is a {type(base).__name__}")
            adapter = Adapter(base, rank, rank if config.alpha is None else config.alpha, dora=config.dora)
            self.modules_by_path[path] = adapter
            _put(self, path, adapter)
            base.register_forward_hook(self._hook(path, adapter))

    def _hook(self, path: str, adapter: Adapter) -> Callable[[Any, tuple[Any, ...], Tensor], Tensor]:
        key = philox.key(self._seed, f"adapter dropout {path}") if self._dropout else None

        def adapt(base: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            x = inputs[0]
            if key is not None and adapter.training and self.samples is not None:
                x = x * self._mask(key, self.samples, x)
            return adapter.adapted(base, x, output)

        return adapt

    def _mask(self, key: philox.Key, samples: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        """For x [B·n, …], n rows of each sample: 0 with the probability of dropout, else what keeps the mean."""
        numbers = philox.uniform(key, *samples, x.numel() // len(samples[0])).view(x.shape)
        return (numbers >= self._dropout).to(x.dtype) / (1.0 - self._dropout)

    def low_rank(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, LowRank]:
        """Path → update.

        Args:
            weights: a state dict of this module in place of its own parameters.
        """
        found = self.state_dict() if weights is None else weights
        return {
            path: LowRank(found[f"{path}.down"], found[f"{path}.up"], one.alpha, found.get(f"{path}.magnitude"))
            for path, one in self.modules_by_path.items()
        }

    def load_low_rank(self, updates: Mapping[str, LowRank]) -> None:
        """Inverse of `low_rank`.

        Raises:
            ValueError: paths, ranks or kinds are others.
        """
        own = {path: (one.rank, one.magnitude is None) for path, one in self.modules_by_path.items()}
        given = {path: (one.rank, one.magnitude is None) for path, one in updates.items()}
        if own != given:
            different = sorted(path for path in own.keys() | given.keys() if own.get(path) != given.get(path))
            raise ValueError(f"Adapters: {len(different)} modules differ in rank or kind, {different[0]} first")
        tensors = {
            f"{path}.{name}": value
            for path, one in updates.items()
            for name, value in (("down", one.down), ("up", one.up), ("magnitude", one.magnitude))
            if value is not None
        }
        self.load_state_dict(tensors)


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Register a module under a dotted path, so that its parameters are named by it."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)


def chosen_ranks(model: nn.Module, targets: Sequence[str], rank: int, conv_rank: int | None = None) -> dict[str, int]:
    """The modules of a model that some targets select, and the rank of each.

    Args:
        model: any; on the meta device, too.
        targets: names of `PRESETS` and patterns, as in `LoRAConfig.targets`.
        rank: of linear layers and 1×1 convolutions.
        conv_rank: of larger convolutions; None: none of these is selected.

    Raises:
        RecipeError: a pattern matches nothing, or nothing is selected.
    """
    possible = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Adaptable) and getattr(module, "groups", 1) == 1
    }
    chosen: set[str] = set()
    unmatched = []
    for target in targets:
        name = target.removeprefix("!")
        matched = {path for path in possible if any(fnmatch.fnmatchcase(path, p) for p in _patterns(name))}
        chosen = chosen - matched if target.startswith("!") else chosen | matched
        if not matched:
            unmatched.append(target)
    if unmatched:
        raise RecipeError(
            f"lora.targets: no layer matches {', '.join(map(repr, unmatched))}", f"names are {', '.join(PRESETS)}"
        )
    ranks = {
        path: own
        for path in possible
        if path in chosen and (own := conv_rank if _is_large(possible[path]) else rank) is not None
    }
    if not ranks:
        raise RecipeError("lora.targets leaves nothing to train", "convolutions need lora.conv_rank")
    if conv_rank is not None and not any(_is_large(possible[path]) for path in ranks):
        raise RecipeError("lora.conv_rank applies to nothing", "no larger convolution is among lora.targets", "add all")
    return ranks


def _patterns(target: str) -> tuple[str, ...]:
    return PRESETS.get(target, (target,))


def _is_large(module: Adaptable) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
