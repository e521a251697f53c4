"""One run in training: its model, optimiser and counters, and what a step does to them.

Shapes: B vectors of a batch, D residual width, F latents of a level. x is scaled so that E||x||^2 = D.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hsae.cache.device import can_compile
from hsae.cache.language_model.matmul import bfloat16_is_slow
from hsae.train.config.run_config import RunConfig
from hsae.train.model.activations import widened
from hsae.train.model.composition_map import Composition
from hsae.train.model.fused import Compiled
from hsae.train.model.levels import LevelOutput
from hsae.train.model.sparse_products import fired, mean_l0
from hsae.train.model.trainable_sae import TRAINABLE, Output, seed_of
from hsae.train.parallel.latent_sharding import UNDIVIDED, Latents
from hsae.train.parallel.workers import ALONE, Workers
from hsae.train.training.curriculum import Curriculum, Moment
from hsae.train.training.optimiser import forget, make_optimiser, rename_state, restore_state, schedule, set_rates
from hsae.train.training.resampling import resample
from hsae.train.training.scaling import Scaling
from hsae.train.training.training_losses import (
    Dead,
    LevelStep,
    SparsityController,
    explained_variance,
    level_losses,
    losses_of,
)

COMPILED_STEPS = 2000
"""Steps of the shortest run that is compiled: that takes some ten seconds for each stage of a curriculum."""
DEAD_STEPS = 16
"""Steps after which AuxK's lists of dead latents are made anew; only then a step waits for the device."""
MAPS_JUDGED = 0.7  # share of the run after which a map W that is no good is complained of


class TrainingRun:
    """A run between its first and last step. Same configuration, stream, machine and number of workers: same bits.

    `workers` are those who share its batches, `latents` says how others share its latents. `compiled` says whether
    forward pass and losses go through torch.compile; by default on a GPU, where no others share, levels are dense, and
    the run is long enough.
    """

    def __init__(
        self,
        config: RunConfig,
        scaling: Scaling,
        *,
        steps: int,
        seed: int,
        device: str,
        workers: Workers = ALONE,
        latents: Latents = UNDIVIDED,
        compiled: bool | None = None,
    ) -> None:
        self.config, self.scaling, self.steps, self.seed, self.device = config, scaling, steps, seed, device
        self.workers, self.latents = workers, latents
        slow = bfloat16_is_slow(torch.device(device).type)
        self.rounds = config.precision == "bfloat16" or (config.precision == "auto" and not slow)
        self.losses = losses_of(config)
        self.step_number = 0
        self.failure: str | None = None
        d_in = len(scaling.median)
        self.model = TRAINABLE[config.structure](config, d_in, seed=seed, latents=latents, workers=workers)
        with torch.no_grad():
            self.model.bias(1).copy_(scaling.median)
        generator = torch.Generator().manual_seed(seed_of(seed, config.number, 1))
        pairs = pairwise(config.widths) if config.composition.mode != "none" else ()
        maps = [Composition(fine, coarse, config.composition, generator, latents, workers) for fine, coarse in pairs]
        self.compositions = nn.ModuleList(maps)
        self.model.to(device).train()
        self.model.use_sparse()
        self.compositions.to(device)
        if compiled is None:
            is_dense = not any(self.model.level(number).sparse for number in range(1, config.levels + 1))
            is_long = steps >= COMPILED_STEPS and workers.world * latents.world == 1
            compiled = is_dense and is_long and can_compile(device)
        self.compiled = compiled
        self.forward = Compiled(self._forward) if compiled else self._forward
        self.curriculum = Curriculum(config, steps)
        self.optimiser = make_optimiser(self.model, self.compositions, config)
        owned = [latents.own(width) for width in config.widths]
        self.tokens_since_fired = [torch.zeros(width, dtype=torch.int64, device=device) for width in owned]
        self.dead = [self._dead(number) for number in range(1, config.levels + 1)]
        ramp = steps // 2
        self.controllers = [SparsityController(l0, config.sparsity_start, ramp, device) for l0 in config.l0]
        self.first_bad = torch.tensor([-1.0, 0.0], dtype=torch.float64, device=device)
        self.warned: set[str] = set()

    def composition(self, level: int) -> Composition:
        """The map from level `level - 1` to `level`."""
        module = self.compositions[level - 2]
        assert isinstance(module, Composition)
        return module

    def step(self, x_BD: Tensor) -> dict[str, Tensor]:
        """One optimiser step on a scaled batch, of which `x_BD` is this worker's share; returns the loss and its parts
        (scalars, still on the device) over all of it. Nothing in it waits for the device, but once in `DEAD_STEPS`."""
        config, step = self.config, self.step_number
        moment = self.curriculum.at(step)
        if moment.starts and moment.stage.refresh:
            forget(self.optimiser, moment.stage.refresh)
        if step % DEAD_STEPS == 0:
            self.dead = [self._dead(number) for number in range(1, config.levels + 1)]
        base_rate = set_rates(self.optimiser, config, moment, step, self.steps)
        active = [self.model.level(number) for number in moment.stage.levels]
        learning = tuple(number for number in moment.stage.levels if moment.stage.rates.get(number, 1.0) > 0)
        strength = config.composition.weight * moment.composition
        forward = self.forward if all(level.has_begun for level in active) else self._forward
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.rounds):
            output, parts = forward(
                x_BD,
                tuple(moment.stage.levels),
                learning,
                torch.full((), strength, device=self.device) if strength > 0 else None,
            )
        loss = torch.stack([part.float() for part in parts.values()]).sum()
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        parameters = [parameter for group in self.optimiser.param_groups for parameter in group["params"]]
        self.workers.average_gradients(parameters)
        self.latents.sum_gradients(self.model.biases)
        for level in active:
            level.remove_parallel_gradient()
        self.optimiser.grad_scale = self.latents.gradient_scale(parameters, self.model.biases, config.gradient_clip)
        self.optimiser.step()
        for level in active:
            level.normalise_decoder()
        for number in self._mapped(output) if moment.composition > 0 else ():
            self.composition(number).project(base_rate, moment.stage.sparsify)
        for number in range(1, config.levels) if config.child_gate and moment.composition == 1 else ():
            self.model.get_buffer(f"parents{number}").copy_(self.composition(number + 1).parents())
        self._count(output, moment)
        self.step_number += 1
        self.last_moment = moment
        self.last_output = Output(
            {number: level.detached() for number, level in output.levels.items()},
            {number: reconstruction.detach() for number, reconstruction in output.reconstructions.items()},
        )
        self.resampled = dict.fromkeys(output.levels, 0)
        if config.resample_steps and self.step_number % config.resample_steps == 0:
            self._resample(x_BD)
        return self.workers.means({"loss": loss, **parts})

    def _forward(
        self, x_BD: Tensor, active: tuple[int, ...], learning: tuple[int, ...], strength: Tensor | None
    ) -> tuple[Output, dict[str, Tensor]]:
        """Forward pass and losses of the `active` levels, of which some learn; `strength` of composition, if it is on.

        It sees of the run only what rarely changes, and tensors: that is what it is compiled for.
        """
        output = self.model(x_BD, active)
        return output, self._losses(x_BD, output, learning, strength)

    def _losses(
        self, x_BD: Tensor, output: Output, learning: tuple[int, ...], strength: Tensor | None
    ) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        for number, level in output.levels.items():
            if number not in learning and not self.model.is_nested:
                continue  # a frozen stacked level has nothing of its own to learn
            target, decoded = self.model.target(number, x_BD, output)
            step = LevelStep(
                config=self.config,
                number=number,
                level=self.model.level(number),
                output=level,
                bias_I=self.model.bias(number),
                x_BD=x_BD,
                reconstruction_BD=output.reconstructions[number],
                target_BI=target,
                decoded_BI=decoded,
                variance=self.scaling.variance,
                dead=self.dead[number - 1],
                coefficient=self.controllers[number - 1].coefficient,
            )
            parts |= level_losses(step, self.losses)
        for number in self._mapped(output):
            module, fine, coarse = self.composition(number), output.levels[number - 1], output.levels[number]
            module.track(fine.code, coarse.code)
            if strength is not None:
                parts[f"composition{number}"] = strength * module.loss(fine.code, coarse.acts)
        return parts

    def _mapped(self, output: Output) -> list[int]:
        """Numbers of the levels in `output` that a map W composes of the level below, which is in it too."""
        numbers = range(2, len(self.compositions) + 2)
        return [number for number in numbers if {number, number - 1} <= output.levels.keys()]

    @torch.no_grad()
    def _count(self, output: Output, moment: Moment) -> None:
        """Per-level counters: tokens since each latent fired, and the controllers, but not those of frozen levels."""
        for number, level in output.levels.items():
            counter = self.tokens_since_fired[number - 1]
            counter += len(level.read) * self.workers.world
            counter.masked_fill_(self.workers.either(fired(level.code)), 0)
            if self.model.level(number).is_controlled and moment.stage.rates.get(number, 1.0) > 0:
                self.controllers[number - 1].update(self._mean_l0(level))

    def _resample(self, x_BD: Tensor) -> None:
        """Resample the dead latents of every level that learns, until the learning rate falls."""
        config, output, moment = self.config, self.last_output, self.last_moment
        if self.step_number > self.steps * (1 - config.decay):
            return
        for number, level in output.levels.items():
            if moment.stage.rates.get(number, 1.0) == 0.0:
                continue
            target, reconstruction = self.model.target(number, x_BD, output)
            loss_B = widened(target - reconstruction).square().sum(1)
            dead = self._is_dead(number)
            generator = torch.Generator().manual_seed(seed_of(self.seed, config.number, self.step_number, number))
            module, bias = self.model.level(number), self.model.bias(number)
            self.resampled[number] = resample(module, level.read, bias, loss_B, dead, self.optimiser, generator)
            self.tokens_since_fired[number - 1][dead] = 0
            self.dead[number - 1] = self._dead(number)

    @torch.no_grad()
    def metrics(self, x_BD: Tensor, parts: dict[str, Tensor]) -> dict[str, Any]:
        """What metrics.jsonl says of the step just taken on `x_BD`; levels finest first, null for inactive ones."""
        output, moment = self.last_output, self.last_moment
        numbers = range(1, self.config.levels + 1)
        values = {name: part.item() for name, part in parts.items()}
        composition = [value for name, value in values.items() if name.startswith("composition")]
        strength = self.config.composition.weight * moment.composition
        health = {
            number: self.composition(number).health(output.levels[number - 1].acts, output.levels[number].acts)
            for number in (self._mapped(output) if moment.composition > 0 else ())
        }
        l0 = {number: self._mean_l0(level).item() for number, level in output.levels.items()}
        levels = {
            number: explained_variance(x_BD, reconstruction, self.workers).item()
            for number, reconstruction in output.reconstructions.items()
        }
        return {
            "kind": "metrics",
            "step": self.step_number,
            "tokens": self.step_number * len(x_BD) * self.workers.world,
            "stage": moment.stage.name,
            "loss": values["loss"],
            "parts": {name: value for name, value in values.items() if name != "loss"},
            "explained_variance": levels[min(levels)],
            "learning_rate": self.config.rate * schedule(self.config, self.step_number - 1, self.steps),
            "l0": [l0.get(number) for number in numbers],
            "dead": [self.latents.whole(self._is_dead(number)).float().mean().item() for number in numbers],
            "level_explained_variance": [levels.get(number) for number in numbers],
            "composition_loss": sum(composition) / strength if composition and strength else None,
            "composition": [health.get(number) for number in numbers],
        }

    def _mean_l0(self, level: LevelOutput) -> Tensor:
        return self.workers.mean(self.latents.sum(mean_l0(level.code)))

    def _is_dead(self, number: int) -> Tensor:
        """[F] which latents of a level are dead."""
        return self.tokens_since_fired[number - 1] >= self.config.dead_after_tokens

    def _dead(self, number: int) -> Dead:
        return Dead.of(self._is_dead(number), self.latents, filled=self.compiled)

    def complaints(self, metrics: dict[str, Any]) -> list[str]:
        """What is wrong with the step of `metrics`, each said once: dead levels, and maps W that went bad, by name."""
        problems = {}
        for index, (l0, dead) in enumerate(zip(metrics["l0"], metrics["dead"], strict=True)):
            if l0 == 0:
                problems[f"silent{index}"] = f"level {index + 1} does not fire at all (L0 = 0)"
            if dead > 0.5:
                problems[f"dead{index}"] = f"{dead:.0%} of level {index + 1}'s latents are dead"
        if self.last_moment.composition == 1 and self.step_number >= MAPS_JUDGED * self.steps:
            for number, health in enumerate(metrics["composition"], 1):
                failures = map_failures(number, health) if health is not None else {}
                problems |= {f"{name}{number}": text for name, text in failures.items()}
        new = [text for key, text in problems.items() if key not in self.warned]
        self.warned |= problems.keys()
        return new

    def check_weights(self) -> bool:
        """Whether every weight is finite; if not, the run has failed."""
        tensors = [*self.model.parameters(), *self.compositions.parameters()]
        if self.latents.workers.any(not all(bool(torch.isfinite(tensor).all()) for tensor in tensors)):
            self.failure = f"a weight became NaN or infinite by step {self.step_number}"
        return self.failure is None

    def check_same(self) -> None:
        """Raise UserError if what several workers hold has come to differ between them."""
        maps = {f"map {name}": tensor for name, tensor in self.compositions.named_parameters()}
        self.workers.check_same({**dict(self.model.named_parameters()), **maps})
        self.latents.workers.check_same(dict(self.model.biases.named_parameters("biases")))

    def _names(self) -> dict[nn.Parameter, str]:
        modules = nn.ModuleDict({"model": self.model, "composition": self.compositions})
        return {parameter: name for name, parameter in modules.named_parameters()}

    def state(self, *, moments: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a resumed run needs: tensors by name, Adam's `moments` among them, and a JSON-ready rest.

        Where latents are divided all workers take part, and worker 0 alone is given tensors, which are whole.
        """
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"composition.{name}": tensor for name, tensor in self.compositions.state_dict().items()}
        tensors |= {f"fired.{index}": counter for index, counter in enumerate(self.tokens_since_fired)}
        for index, (dead, counter) in enumerate(zip(self.dead, self.tokens_since_fired, strict=True)):
            own_N = dead.own_N[: int(dead.number)]
            tensors[f"dead.{index}"] = torch.zeros_like(counter, dtype=torch.bool).index_fill_(0, own_N, True)
        adam = rename_state(self.optimiser, self._names()) if moments else {}
        tensors |= {f"adam/{name}": tensor for name, tensor in adam.items()}
        rest = {
            "step": self.step_number,
            "controllers": [controller.state() for controller in self.controllers],
            "warned": sorted(self.warned),
        }
        return self.latents.collected({name: tensor.detach() for name, tensor in tensors.items()}), rest

    def share_state(self) -> None:
        """Take over the state of worker 0 of those who share batches."""
        if self.workers.world > 1:
            tensors, rest = self.state()
            self.restore(self.workers.copies(tensors), self.workers.from_first(lambda: rest))

    def restore(self, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
        """Put back what `state` gave; the next step is the one an uninterrupted run would take."""

        def below(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        self.model.load_state_dict(below("model."))
        self.compositions.load_state_dict(below("composition."))
        for index, counter in enumerate(self.tokens_since_fired):
            counter.copy_(tensors[f"fired.{index}"])
        for index in range(len(self.dead)):
            mask = tensors.get(f"dead.{index}")  # older checkpoints have none
            mask = self._is_dead(index + 1) if mask is None else mask.to(self.device)
            self.dead[index] = Dead.of(mask, self.latents, filled=self.compiled)
        for level in map(self.model.level, range(1, self.config.levels + 1)):
            level.has_begun |= not torch.isnan(level.threshold)
        restore_state(self.optimiser, self._names(), below("adam/"))
        self.step_number = int(rest["step"])
        for controller, state in zip(self.controllers, rest["controllers"], strict=True):
            controller.restore(state)
        self.warned = set(rest["warned"])

    def undivided(self) -> "TrainingRun":
        """The run with whole levels, for its final model; where they are divided, a copy for worker 0 alone."""
        if self.latents.world == 1:
            return self
        tensors, rest = self.state(moments=False)
        if not self.latents.workers.is_first:
            return self
        whole = TrainingRun(self.config, self.scaling, steps=self.steps, seed=self.seed, device="cpu")
        whole.restore(tensors, rest)
        return whole

    @property
    def is_done(self) -> bool:
        """Whether all steps have been taken."""
        return self.step_number >= self.steps

    def watch(self, loss: Tensor) -> None:
        """Remember, on the device, the first step whose loss was not finite, and that loss."""
        now = torch.stack([torch.full_like(loss, self.step_number, dtype=torch.float64), loss.double()])
        self.first_bad = torch.where((self.first_bad[0] < 0) & ~torch.isfinite(loss), now, self.first_bad)

    def check_loss(self) -> bool:
        """Whether the losses that were watched are all finite; if not, the run has failed. Waits for the device."""
        step, loss = self.first_bad.tolist()
        if step >= 0:
            self.failure = f"the loss became {loss} at step {step:.0f}"
        return self.failure is None


def map_failures(number: int, health: dict[str, float]) -> dict[str, str]:
    """Known ways in which the map W of level `number` fails, by name, from `Composition.health`."""
    if health["nonzero"] == 0:
        return {"W-collapsed": f"W-collapsed: the map of level {number} is all zero"}
    if (error := health["unexplained"]) > 0.98:
        text = f"scale-drain: W explains nothing of level {number}'s code (relative error {error:.2f}); "
        return {"scale-drain": f"{text}scale has moved out of W, or the codes have nothing to do with each other"}
    if (share := health["participation"]) < 1.1:
        return {"copy": f"copy: half of level {number}'s latents copy one latent below (participation {share:.2f})"}
    return {}
