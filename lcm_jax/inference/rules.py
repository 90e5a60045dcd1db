"""Which samplers, timesteps and guidance a model supports, and its defaults."""

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from lcm_jax.diffusion import sampling
from lcm_jax.diffusion.guidance import is_guided
from lcm_jax.diffusion.process import Process
from lcm_jax.errors import UserError, one_of, plain
from lcm_jax.families import Family
from lcm_jax.host import arguments
from lcm_jax.interop.folder import Folder
from lcm_jax.interop.recipe import Recipe

SAMPLERS = (
    "ddim",
    "dpmpp",
    "euler",
    "lcm",
)  # diffusion models need an LCM-LoRA for "lcm"; consistency models have only "lcm"
SPACINGS = ("leading", "trailing")
TEACHER_STEPS, LCM_STEPS = 50, 4


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a call samples, checked and with the model's defaults filled in.

    Attributes:
      sampler: "lcm", "ddim", "dpmpp" or "euler".
      timesteps: descending, one per step.
      guidance_scale: w + 1.
      guided: whether each step calls the denoiser with and without the prompt.
      noise_scale: factor of the initial noise.
    """

    sampler: str
    timesteps: Int[np.ndarray, " n"]
    guidance_scale: float
    guided: bool
    noise_scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a model supports, with the LoRAs that are attached to it.

    Attributes:
      folder: the model's.
      family: of the folder.
      process: its noise process.
      w_embedding_dim: of its denoiser; None or 0 without a w-embedding.
      recipe: that of the folder, None unless lcm_jax distilled it.
      lora_recipe: that of an attached LCM-LoRA that lcm_jax distilled.
      has_loras: whether any LoRA is attached.
    """

    folder: Folder
    family: Family
    process: Process
    w_embedding_dim: int | None
    recipe: Recipe | None
    lora_recipe: Recipe | None = None
    has_loras: bool = False

    @property
    def is_lcm(self) -> bool:
        """Whether the folder holds a consistency model."""
        return self.folder.scheduler_class == "LCMScheduler"

    def settings(
        self,
        steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        timesteps: int | Sequence[int] | None = None,
        *,
        strength: float | None = None,
        from_image: bool = False,
    ) -> Settings:
        """Returns the checked settings of a call; raises UserError.

        The arguments are those of the pipeline's call, and `from_image`: whether it starts from an image.
        """
        if strength is not None and not from_image:
            raise UserError("strength has no effect without an image; give both, or neither")
        if strength is not None and timesteps is not None:
            raise UserError("give strength or timesteps, not both: sampling starts at the first timestep")
        kind = self.sampler(sampler)
        if from_image and timesteps is None:
            strength = self.family.strength if strength is None else arguments.number("strength", strength)
        grid = self._timesteps(kind, steps, timesteps, strength)
        scale = self._guidance(kind, guidance_scale)
        noise_scale = 1.0
        if kind == "euler" and not from_image and self.folder.scheduler.get("timestep_spacing") == "trailing":
            noise_scale = float(self.process.sigma(grid[0]))  # diffusers starts all others from more noise than z_t has
        return Settings(kind, grid, scale, is_guided(scale, self.w_embedding_dim), noise_scale)

    def check_negatives(self, texts: Sequence[str], settings: Settings) -> None:
        """Raises UserError if a negative prompt is not empty and can't have an effect."""
        if any(texts) and self.w_embedding_dim:
            raise UserError(
                "a consistency model with a w-embedding takes no negative_prompt: its guidance was distilled with "
                "the empty prompt; leave it out"
            )
        if any(texts) and not settings.guided:
            scale = settings.guidance_scale
            raise UserError(f"negative_prompt has no effect at guidance_scale {scale:g}; choose one above 1")

    def sampler(self, given: str | None) -> str:
        """Returns the given sampler or the default one; raises UserError if the model does not support it."""
        if self.is_lcm:
            if given is not None and str(given) != "lcm":
                raise UserError(
                    f"sampler is {plain(repr(given), 60)}, but the folder holds a consistency model; leave it out"
                )
            return "lcm"
        if given is None:
            return "lcm" if self.lora_recipe else SAMPLERS[0]
        one_of("sampler", given, SAMPLERS)
        if given == "lcm" and not self.has_loras:
            raise UserError(
                f"the sampler lcm needs a consistency model or an LCM-LoRA, but {self.folder.path} holds a diffusion "
                "model: attach an LCM-LoRA (--lora=FILE, in Python loras={file: 1.0}), or use ddim"
            )
        return given

    def default_guidance(self, kind: str) -> float:
        """Returns the default guidance_scale with this sampler."""
        if kind != "lcm":
            return self.family.guidance
        if not self.w_embedding_dim:
            return 1.0  # guidance is distilled into such a student
        return (
            (self.recipe.guidance_min + self.recipe.guidance_max) / 2 if self.recipe else self.family.student_guidance
        )

    def lcm_timesteps(self, steps: int) -> Int[np.ndarray, " n"]:
        """Returns `steps` of the timesteps that the model or LCM-LoRA was trained on; raises UserError for too many."""
        original, _ = self.lcm_grid
        return sampling.lcm_timesteps(arguments.whole("steps", steps), self.process, original)

    @property
    def lcm_grid(self) -> tuple[int, float]:
        """N (original_inference_steps) and timestep_scaling of the model or the attached LCM-LoRA."""
        recipe, scheduler = self.lora_recipe, self.folder.scheduler
        if self.is_lcm or recipe is None:
            return scheduler.get("original_inference_steps", 50), float(scheduler.get("timestep_scaling", 10.0))
        return recipe.original_inference_steps, recipe.timestep_scaling

    def _timesteps(
        self, kind: str, steps: int | None, timesteps: int | Sequence[int] | None, strength: float | None
    ) -> np.ndarray:
        total = self.process.num_train_timesteps
        if timesteps is not None:
            if steps is not None:
                raise UserError("give steps or timesteps, not both")
            return sampling.check_timesteps(arguments.wholes("timesteps", timesteps), total)
        if steps is None:
            steps = LCM_STEPS if kind == "lcm" else TEACHER_STEPS
        steps = arguments.whole("steps", steps)
        if kind == "lcm" and strength is not None and self.folder.pipeline_class == "LatentConsistencyModelPipeline":
            return sampling.lcm_timesteps(steps, self.process, self.lcm_grid[0], strength)
        if kind == "lcm":
            grid = self.lcm_timesteps(steps)
        elif kind == "euler":
            grid = self._euler_timesteps(steps)
        else:
            grid = sampling.trailing_timesteps(steps, total)
        return grid if strength is None else sampling.last_part(grid, strength)

    def _euler_timesteps(self, steps: int) -> np.ndarray:
        """Returns the timesteps of diffusers' EulerDiscreteScheduler with the folder's settings."""
        scheduler = self.folder.scheduler
        for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
            if scheduler.get(name):
                raise UserError(f"{self.folder.path}/scheduler: {name} is true; the sampler euler supports false")
        spacing = scheduler.get("timestep_spacing", "linspace")
        one_of(f"{self.folder.path}/scheduler: timestep_spacing, for the sampler euler,", spacing, SPACINGS)
        total = self.process.num_train_timesteps
        if spacing == "trailing":
            return sampling.trailing_timesteps(steps, total)
        return sampling.leading_timesteps(steps, total, scheduler.get("steps_offset") or 0)

    def _guidance(self, kind: str, guidance_scale: float | None) -> float:
        if guidance_scale is None:
            return self.default_guidance(kind)
        guidance_scale = arguments.number("guidance_scale", guidance_scale)
        if self.w_embedding_dim and self.recipe:
            low, high = self.recipe.guidance_min, self.recipe.guidance_max
            if not low <= guidance_scale <= high:
                warnings.warn(
                    f"guidance_scale {guidance_scale:g} is outside this model's trained range, {low:g} to {high:g}",
                    UserWarning,
                    stacklevel=4,
                )
        return guidance_scale
