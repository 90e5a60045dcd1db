"""The training step of latent consistency distillation in torch, with diffusers' networks."""

import dataclasses
import pathlib
import time
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

W_DIM, SKIP, DECAY, TIMESTEP_SCALING, HUBER_C = 256, 20, 0.95, 10.0, 1e-3


@dataclasses.dataclass(frozen=True)
class Settings:
    """Torch options; each is faster on some machines."""

    dtype: str = "float32"  # of the forward passes; student, EMA and optimizer are float32
    channels_last: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        """The name in the table."""
        return "torch" + ", channels_last" * self.channels_last + ", compiled" * self.compiled


class TorchStep:
    """Student, target and teacher; each `run` is one step on a fixed batch of latents with new random draws."""

    def __init__(self, folder: pathlib.Path, inputs: pathlib.Path, settings: Settings) -> None:
        """Loads a diffusers folder and runs a step on `inputs`, a file of `step_vs_torch.draw_inputs`."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cudnn.benchmark = True  # picks the fastest convolution algorithm
        self.dtype = getattr(torch, settings.dtype)
        load: dict[str, Any] = {"use_safetensors": True}
        self.teacher = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", **load)
        self.text = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
        own = {name: value for name, value in self.teacher.config.items() if not name.startswith("_")}
        config = {**own, "time_cond_proj_dim": W_DIM}
        self.student, self.target = (diffusers.UNet2DConditionModel.from_config(config) for _ in range(2))
        for unet in (self.student, self.target):
            unet.load_state_dict(self.teacher.state_dict(), strict=False)
            torch.nn.init.zeros_(unet.time_embedding.cond_proj.weight)
        for module in (self.teacher, self.text):
            module.to(self.device, self.dtype)
        for module in (self.student, self.target):
            module.to(self.device).train()
        for module in (self.teacher, self.text, self.target):
            module.requires_grad_(False)
        if settings.channels_last:
            for module in (self.teacher, self.student, self.target):
                module.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
        abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
        self.alpha, self.sigma = (x.sqrt().float().to(self.device) for x in (abar, 1 - abar))

        given = {name: torch.from_numpy(array).to(self.device) for name, array in np.load(inputs).items()}
        self.z_0, self.ids, self.null_ids = (given[name] for name in ("z_0", "input_ids", "null_ids"))
        if settings.channels_last:
            self.z_0 = self.z_0.to(memory_format=torch.channels_last)
        start = time.perf_counter()
        if settings.compiled:
            for module in (self.teacher, self.student, self.target, self.text):
                module.compile()
        loss, norm = self.step(given["eps"], given["i"], given["w"])
        self._wait()
        self.facts = {"loss": loss.item(), "grad_norm": norm.item(), "first_seconds": time.perf_counter() - start}

    def run(self) -> None:
        """Runs one step with new random draws and waits for it."""
        count = len(self.z_0)
        self.step(
            torch.randn_like(self.z_0),
            torch.randint(0, 50, (count,), device=self.device),
            2 + 12 * torch.rand(count, device=self.device),
        )
        self._wait()

    def memory(self) -> int:
        """Returns the GPU's peak memory in bytes, 0 without one."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def step(self, eps: torch.Tensor, i: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs Algorithm 1 of arXiv 2310.04378 with DDIM; returns loss and gradient norm."""
        t = SKIP * (i + 1) - 1
        s = torch.clamp(t - SKIP, min=0)
        alpha_t, sigma_t, alpha_s, sigma_s = (x[:, None, None, None] for x in self._at(t) + self._at(s))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            with torch.no_grad():
                context = self.text(self.ids)[0]
                null = self.text(self.null_ids)[0].expand_as(context)
                z_t = alpha_t * self.z_0 + sigma_t * eps
                conditional = self.teacher(z_t, t, encoder_hidden_states=context).sample.float()
                unconditional = self.teacher(z_t, t, encoder_hidden_states=null).sample.float()
                guided = conditional + w[:, None, None, None] * (conditional - unconditional)
                z_s = alpha_s * (z_t - sigma_t * guided) / alpha_t + sigma_s * guided
                w_embedding = self._embedding(w)
                goal = self._f(self.target, z_s, s, context, w_embedding)
            difference = self._f(self.student, z_t, t, context, w_embedding) - goal
            loss = (torch.sqrt(difference**2 + HUBER_C**2) - HUBER_C).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.student.parameters()), 1 - DECAY)
        return loss, norm

    def _at(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.alpha[t], self.sigma[t]

    def _embedding(self, w: torch.Tensor) -> torch.Tensor:
        half = W_DIM // 2
        frequencies = torch.exp(-np.log(10000.0) / (half - 1) * torch.arange(half, device=self.device))
        angles = 1000 * w[:, None] * frequencies
        return torch.cat([torch.sin(angles), torch.cos(angles)], 1)

    def _f(self, unet: Any, z: torch.Tensor, t: torch.Tensor, context: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        eps = unet(z, t, encoder_hidden_states=context, timestep_cond=w).sample.float()
        alpha, sigma = (x[:, None, None, None] for x in self._at(t))
        tau = TIMESTEP_SCALING * t[:, None, None, None].float()
        c_skip, c_out = 0.25 / (tau**2 + 0.25), tau / torch.sqrt(tau**2 + 0.25)
        return c_skip * z + c_out * (z - sigma * eps) / alpha
