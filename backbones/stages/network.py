"""Hierarchies of VAE, LVAE and BIVA stages, as the BIVA and HVAE codes share them.

Stages are counted from the image upwards. Within the top-down pass a stage draws its
latents given the state `d` that comes from above, and turns them into the next state.
References: Maaloe et al., 2019, BIVA, https://arxiv.org/abs/1902.02102; Havtorn et al.,
2021, Hierarchical VAEs know what they don't know, https://arxiv.org/abs/2102.08248
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backbones.stages.layers import Block, BlockSpec, Conv, Dense, Projection, Shape, Stack
from ebm_prior.errors import EbmPriorError
from ebm_prior.memory import recomputed

__all__ = [
    "Draw", "Family", "LatentSpec", "Moments", "Network", "StageSpec", "log_normal", "normal_kl",
]  # fmt: skip

Moments = tuple[Tensor, Tensor]
"""Mean and standard deviation, each (B, *shape)."""


def log_normal(z: Tensor, moments: Moments) -> Tensor:
    """Log-density of independent normals, summed over units: (B,), nats."""
    mu, sigma = moments
    score = ((z - mu) / sigma).square() + 2 * sigma.log() + math.log(2 * math.pi)
    return -0.5 * score.flatten(1).sum(1)


def normal_kl(q: Moments, p: Moments) -> Tensor:
    """KL(q || p) of independent normals, summed over units: (B,), nats."""
    ratio, distance = q[1] / p[1], (q[0] - p[0]) / p[1]
    return 0.5 * (ratio.square() + distance.square() - 1 - 2 * ratio.log()).flatten(1).sum(1)


@dataclass(frozen=True)
class Family:
    """What differs between the two codes.

    Attributes:
        names: Public module name for each role.
        projection: Public name of the layer inside a projection.
        sigma: Standard deviation from the second half of a head's output.
        top_sigma: The same for the stored prior of the top group.
        needless_aux: See `Block`.
        widen: See `Block`.
    """

    names: dict[str, str]
    projection: str
    sigma: Callable[[Tensor], Tensor]
    top_sigma: Callable[[Tensor], Tensor]
    needless_aux: bool
    widen: bool


@dataclass(frozen=True)
class LatentSpec:
    """Latents of a stage: `size` units, or channels where `dense` is false."""

    size: int
    dense: bool
    kernel: int = 3
    normed: bool = True


@dataclass(frozen=True)
class StageSpec:
    """One stage.

    Attributes:
        kind: "vae", "lvae" or "biva".
        blocks: Inference blocks, in order.
        latent: Its latents.
        merge: Block that joins inference and top-down state, where there is one.
        top: Block on both inference paths (BIVA's top stage).
        condition: Block that conditions the bottom-up prior on the top-down latents.
        reverse: Whether the generative stack uses the blocks in reverse order.
        infer_skip: Whether the inference stack sees features of the stage below.
        generate_skip: Whether the generative stack sees those of the stage above.
    """

    kind: str
    blocks: tuple[BlockSpec, ...]
    latent: LatentSpec
    merge: BlockSpec | None = None
    top: BlockSpec | None = None
    condition: BlockSpec | None = None
    reverse: bool = True
    infer_skip: bool = True
    generate_skip: bool = True


class Stochastic(nn.Module):
    """Heads of one group: q, and p given the state above or a stored p at the top.

    Args:
        family: Names and rules.
        spec: Its latents.
        activation: Applied to the input of the heads.
        q_shape: Feature map the posterior is read from.
        p_shape: Feature map the prior is read from; None at the top.
    """

    def __init__(
        self,
        family: Family,
        spec: LatentSpec,
        activation: Callable[[], nn.Module],
        q_shape: Shape,
        p_shape: Shape | None,
    ) -> None:
        super().__init__()
        self.family = family
        self.activation = activation()
        self.shape = (spec.size,) if spec.dense else (spec.size, *q_shape[1:])
        if p_shape is None:
            stored = torch.zeros(2 * spec.size, *self.shape[1:])
            self.register_buffer(family.names["stored_prior"], stored)
        for role, shape in (("q_head", q_shape), ("p_head", p_shape)):
            if shape is not None:
                self.add_module(family.names[role], self._head(spec, shape))
        if p_shape is not None and not spec.dense and p_shape[1:] != q_shape[1:]:
            raise EbmPriorError("a stage whose up- and down-sampling differ is not supported")

    @staticmethod
    def _head(spec: LatentSpec, shape: Shape) -> nn.Module:
        if spec.dense:
            return Dense(math.prod(shape), 2 * spec.size, spec.normed)
        return Conv(shape, 2 * spec.size, spec.kernel, shape[1:], spec.normed)

    def posterior(self, h: Tensor) -> Moments:
        """Moments of q(z | h)."""
        return self._moments("q_head", h)

    def prior_moments(self, d: Tensor | None, like: Tensor) -> Moments:
        """Moments of p(z | d); of the stored prior without `d`, repeated as `like` is."""
        if d is not None:
            return self._moments("p_head", d)
        stored = getattr(self, self.family.names["stored_prior"])
        mu, raw = stored.chunk(2, 0)
        shape = (len(like), *self.shape)
        return mu.expand(shape), self.family.top_sigma(raw).expand(shape)

    def _moments(self, role: str, h: Tensor) -> Moments:
        head = self.get_submodule(self.family.names[role])
        mu, raw = head(self.activation(h)).chunk(2, 1)
        return mu, self.family.sigma(raw)


class Draw(NamedTuple):
    """One group's latents with the distributions they may come from."""

    z: Tensor
    p: Moments
    q: Moments | None = None


@dataclass
class Upward:
    """What inference hands from stage to stage, and keeps for the way down.

    Attributes:
        x: Input of the next inference stack, per path.
        aux: Features beside it.
        h: Per stage, what the top-down posterior is read from.
        draws: Per stage, posterior of the latents that inference draws, and the draw.
    """

    x: tuple[Tensor, ...]
    aux: Tensor | None = None
    h: list[Tensor] = field(default_factory=list)
    draws: list[tuple[Moments, Tensor] | None] = field(default_factory=list)


class Stage(nn.Module):
    """One stage of any kind.

    Args:
        family: Names and rules.
        spec: Its geometry.
        activation: Makes an activation for the blocks.
        head_activation: Makes an activation for the heads.
        inputs: Feature maps the inference paths start from: one, or two for BIVA.
        aux_shape: Features of the stage below, or None at the bottom.
        bottom: Whether it is the lowest stage.
        is_top: Whether it is the highest.
    """

    def __init__(
        self,
        family: Family,
        spec: StageSpec,
        activation: Callable[[], nn.Module],
        head_activation: Callable[[], nn.Module],
        inputs: tuple[Shape, ...],
        aux_shape: Shape | None,
        bottom: bool,
        is_top: bool,
    ) -> None:
        super().__init__()
        self.family, self.spec, self.is_top = family, spec, is_top
        self.activation, self.head_activation = activation, head_activation
        self.aux_in = aux_shape if spec.infer_skip else None
        names = family.names
        if spec.kind == "biva":
            bu = self._infer_stack(inputs[0], self.aux_in, bottom)
            td = self._infer_stack(inputs[1], bu.out_shape, bottom)
            self.add_module("q_bu_convs", bu)
            self.add_module("q_td_convs", td)
            self.feature_shape = bu.out_shape
            h_shape = td.out_shape
            self.aux_out: Shape = (bu.out_shape[0] + h_shape[0], *h_shape[1:])
            if is_top:
                self.add_module("q_top", self._block(self.aux_out, spec.top))
                h_shape = self.q_top.out_shape
        else:
            stack = self._infer_stack(inputs[0], self.aux_in, bottom)
            self.add_module(names["q_stack"], stack)
            self.feature_shape = h_shape = self.aux_out = stack.out_shape
        self.h_shape = h_shape

    def _block(self, shape: Shape, spec: BlockSpec, **options) -> Block:  # noqa: ANN003
        f = self.family
        return Block(
            shape, spec, self.activation, needless_aux=f.needless_aux, widen=f.widen, **options
        )

    def _infer_stack(self, shape: Shape, aux: Shape | None, bottom: bool) -> Stack:
        blocks = []
        for i, spec in enumerate(self.spec.blocks):
            blocks.append(
                self._block(shape, spec, aux_shape=aux, residual=not (bottom and i == 0))
            )
            shape = blocks[-1].out_shape
        return Stack(blocks)

    def build_down(self, d_shape: Shape | None, skips: list[Shape] | None) -> Shape:
        """Make the top-down half, whose shapes depend on the stage above.

        Args:
            d_shape: State from above; None at the top.
            skips: Shapes of the skip list (changed); None at the top.

        Returns:
            Shape of the state this stage hands down.
        """
        family, spec, names = self.family, self.spec, self.family.names
        latent, head = spec.latent, self.head_activation
        h_shape = self.h_shape
        if spec.merge is not None:
            merge = self._block(h_shape, spec.merge, aux_shape=d_shape)
            self.add_module("merge", merge)
            h_shape = merge.out_shape
        if spec.kind == "biva" and not self.is_top:
            p_shape = d_shape
            if spec.condition is not None:
                if latent.dense:
                    raise EbmPriorError("conditional_bu with dense latents is not supported")
                z_shape = (latent.size, *h_shape[1:])
                self.bu_condition = self._block(z_shape, spec.condition, aux_shape=d_shape)
                p_shape = self.bu_condition.out_shape
            self.bu_stochastic = Stochastic(family, latent, head, self.feature_shape, p_shape)
            self.td_stochastic = Stochastic(family, latent, head, h_shape, d_shape)
            if latent.dense:
                self.bu_proj = Projection(latent.size, self.feature_shape, family.projection)
                self.z_proj = Projection(2 * latent.size, h_shape, family.projection)
            z_shape = h_shape if latent.dense else (2 * latent.size, *h_shape[1:])
            if self.bu_stochastic.shape[1:] != self.td_stochastic.shape[1:]:
                raise EbmPriorError("a stage whose two paths differ in size is not supported")
        else:
            self.stochastic = Stochastic(family, latent, head, h_shape, d_shape)
            z_shape = h_shape if latent.dense else (latent.size, *h_shape[1:])
            if latent.dense:
                roles = {"vae": ("q_proj", "p_proj"), "lvae": ("p_proj",), "biva": ("z_proj",)}
                for role in roles[spec.kind]:
                    # the code's own order of sizes: back to the head's input
                    proj = Projection(latent.size, h_shape, family.projection)
                    self.add_module(names[role], proj)
        self.z_shape: Shape = z_shape
        self._build_generate(z_shape, d_shape, skips)
        return self.generator.out_shape

    def _build_generate(
        self, shape: Shape, above: Shape | None, skips: list[Shape] | None
    ) -> None:
        specs = self.spec.blocks[::-1] if self.spec.reverse else self.spec.blocks
        declared = above if self.spec.generate_skip else None
        if skips is None or declared is None:
            skips = []
        blocks: list[Block] = []
        for i, spec in enumerate(specs):
            blocks.append(
                self._block(shape, spec, aux_shape=declared, residual=i > 0, upward=True)
            )
            shape = blocks[-1].out_shape
            if declared is not None:
                given = skips.pop()
                if blocks[-1].aux_op is not None and given != declared:
                    raise EbmPriorError(
                        f"a skip connection of {given} where {declared} is declared is not "
                        "supported; strides must be in the last block of each stage"
                    )
            skips.insert(0, shape)
        self.skip_shapes = skips
        self.add_module(self.family.names["p_stack"], Stack(blocks))

    @property
    def generator(self) -> Stack:
        """The generative stack."""
        return self.get_submodule(self.family.names["p_stack"])

    @property
    def groups(self) -> tuple[tuple[str, Stochastic], ...]:
        """Suffix and heads of its groups, in the order the prior draws them."""
        if self.spec.kind == "biva" and not self.is_top:
            return ("_td", self.td_stochastic), ("_bu", self.bu_stochastic)
        return (("", self.stochastic),)

    # --- upwards ---------------------------------------------------------------------

    def infer(self, up: Upward, noise: Sequence[Tensor]) -> None:
        """Run the inference half, drawing what it draws (`noise` is per group)."""
        aux = up.aux if self.aux_in is not None else None
        if self.spec.kind == "biva":
            bu = self.q_bu_convs(up.x[0], aux)
            td = self.q_td_convs(up.x[1], bu)
            both = torch.cat([bu, td], 1)
            if self.is_top:
                h = self.q_top(both)
                up.draws.append(self._draw(self.stochastic, h, noise[0]))
            else:
                h = td
                draw = self._draw(self.bu_stochastic, bu, noise[1])
                up.draws.append(draw)
                up.x = (self._project("bu_proj", draw[1]), td)
            up.aux = both
        else:
            h = self.get_submodule(self.family.names["q_stack"])(up.x[0], aux)
            if self.spec.kind == "vae":
                draw = self._draw(self.stochastic, h, noise[0])
                up.draws.append(draw)
                up.x = (draw[1] if self.is_top else self._project("q_proj", draw[1]),)
            else:
                up.draws.append(None)
                up.x = (h,)
            up.aux = h
        up.h.append(h)

    @staticmethod
    def _draw(group: Stochastic, h: Tensor, noise: Tensor) -> tuple[Moments, Tensor]:
        q = group.posterior(h)
        return q, torch.addcmul(q[0], q[1], noise)

    def _project(self, role: str, z: Tensor) -> Tensor:
        """Latents as a feature map: through their projection, if dense."""
        if not self.spec.latent.dense:
            return z
        return self.get_submodule(self.family.names[role])(z)

    def posterior_down(self, h: Tensor, d: Tensor | None) -> Moments:
        """Posterior that also sees the state from above (LVAE; BIVA's top-down group)."""
        if self.spec.merge is not None:
            h = self.merge(h, d)
        return self.groups[0][1].posterior(h)

    # --- downwards -------------------------------------------------------------------

    def prior_state(self, index: int, d: Tensor | None, drawn: list[Tensor]) -> Tensor | None:
        """What the prior of the stage's group `index` is read from."""
        if index == 1 and self.spec.condition is not None:
            return self.bu_condition(drawn[0], d)
        return d

    def combine(self, drawn: list[Tensor]) -> Tensor:
        """The stage's latents as the feature map its generative stack takes."""
        z = torch.cat(drawn, 1) if len(drawn) > 1 else drawn[0]
        return self._project("z_proj" if self.spec.kind == "biva" else "p_proj", z)


class Network(nn.Module):
    """All stages; families add the layer that makes likelihood parameters.

    Args:
        family: Names and rules.
        specs: Stages, from the image upwards.
        in_shape: Images as the network takes them.
        activation: Makes an activation for the blocks.
        head_activation: Makes an activation for the heads.
    """

    def __init__(
        self,
        family: Family,
        specs: Sequence[StageSpec],
        in_shape: Shape,
        activation: Callable[[], nn.Module],
        head_activation: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        stages: list[Stage] = []
        inputs, aux = (in_shape,) * 2, None
        for i, spec in enumerate(specs):
            last = i == len(specs) - 1
            stage = Stage(family, spec, activation, head_activation, inputs, aux, i == 0, last)
            stages.append(stage)
            aux = stage.aux_out
            features = stage.feature_shape
            latent = spec.latent
            passed = features if latent.dense else (latent.size, *features[1:])
            if spec.kind == "biva":
                inputs = (passed, stage.h_shape)
            else:
                inputs = (passed if spec.kind == "vae" else features,) * 2
        self.stages = nn.ModuleList(stages)
        d, skips = None, None
        for stage in reversed(stages):
            d = stage.build_down(d, skips)
            skips = stage.skip_shapes
        if d[1:] != in_shape[1:]:
            raise EbmPriorError(f"the decoder ends at {d[1]}x{d[2]}, not at the image's size")
        self.out_shape: Shape = d
        bottom = stages[0]
        above = stages[1].generator.out_shape if len(stages) > 1 else (0, 0, 0)
        if above[0] and above[1:] != bottom.z_shape[1:]:
            raise EbmPriorError("a stage whose up- and down-sampling differ is not supported")
        self.feature_shape: Shape = (above[0] + bottom.z_shape[0], *bottom.z_shape[1:])

    @property
    def groups(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of every group, in the order the prior draws them."""
        return [
            (f"z{i + 1}{suffix}", group.shape)
            for i, stage in reversed(list(enumerate(self.stages)))
            for suffix, group in stage.groups
        ]

    def descend(
        self,
        choose: Callable[[int, Stage, int, Tensor | None, Moments], Draw],
        like: Tensor,
        output: str = "latents",
        checkpointing: bool = False,
    ) -> tuple[list[Draw], Tensor | None]:
        """The top-down pass.

        Args:
            choose: Given a group's index, its stage, its index in there, the state `d` from
                above and the prior's moments, gives the latents to go on with.
            like: Tensor of the batch's length.
            output: "latents" stops at the last group; "features" also gives the state
                there; "decoder" the output of the last generative stack.
            checkpointing: Whether a gradient keeps the states between stages alone, and goes
                through each stage once more; `choose` must then be a pure function.

        Returns:
            What was chosen per group, and the output asked for.
        """
        draws: list[Draw] = []
        skips: list[Tensor] = []
        d: Tensor | None = None
        for number in range(len(self.stages) - 1, -1, -1):
            step = partial(self._through_stage, number, len(draws), choose, like, output)
            drawn, d, skips = recomputed(step, d, skips) if checkpointing else step(d, skips)
            draws += drawn
        return draws, d

    def _through_stage(
        self,
        number: int,
        first: int,
        choose: Callable[[int, Stage, int, Tensor | None, Moments], Draw],
        like: Tensor,
        output: str,
        d: Tensor | None,
        skips: Sequence[Tensor],
    ) -> tuple[list[Draw], Tensor | None, list[Tensor]]:
        """Draws of a stage, whose groups count from `first`, its output, and the skip list."""
        stage = self.stages[number]
        draws: list[Draw] = []
        for index, (_, group) in enumerate(stage.groups):
            p = group.prior_moments(stage.prior_state(index, d, [g.z for g in draws]), like)
            draws.append(choose(first + index, stage, index, d, p))
        if number == 0 and output == "latents":
            return draws, None, []
        h = stage.combine([draw.z for draw in draws])
        if number == 0 and output == "features":
            return draws, h if d is None else torch.cat([d, h], 1), []
        skips = list(skips)  # which the stack changes
        return draws, stage.generator.generate(h, skips), skips

    def infer(
        self, x: Tensor, noise: Sequence[Tensor], output: str = "latents"
    ) -> tuple[list[Draw], Tensor | None]:
        """Draw from q(z|x): bottom-up for what inference draws, then top-down.

        Args:
            x: Images as the network takes them, (B, *in_shape).
            noise: Standard-normal tensor per group, in the prior's order.
            output: As for `descend`.
        """
        first: dict[int, int] = {}
        count = 0
        for number in range(len(self.stages) - 1, -1, -1):
            first[number] = count
            count += len(self.stages[number].groups)
        up = Upward((x, x))
        for number, stage in enumerate(self.stages):
            stage.infer(up, noise[first[number] : first[number] + len(stage.groups)])
        numbers = {id(stage): number for number, stage in enumerate(self.stages)}

        def choose(i: int, stage: Stage, index: int, d: Tensor | None, p: Moments) -> Draw:
            number = numbers[id(stage)]
            done = up.draws[number]
            # The last group of a stage is the one that inference has drawn, if any.
            if done is not None and index == len(stage.groups) - 1:
                q, z = done
            else:
                q = stage.posterior_down(up.h[number], d)
                z = torch.addcmul(q[0], q[1], noise[i])
            return Draw(z, p, q)

        return self.descend(choose, x, output)
