"""AutoencoderKL: encodes images to latents and decodes latents to images."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lcm_jax.errors import UserError
from lcm_jax.models import strips
from lcm_jax.models.layers import ResnetBlock2D, conv, enlarge
from lcm_jax.models.norms import GroupNorm
from lcm_jax.models.policy import FP32, Policy

EPS = 1e-6  # epsilon of every norm in this model


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Configuration of AutoencoderKL; names and defaults are those of diffusers' config.json."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None  # one per channel; diffusers' SDXL pipelines use both
    latents_std: tuple[float, ...] | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @property
    def least_tensors(self) -> int:
        """A lower bound on the number of tensors: those of the encoder's and decoder's residual blocks."""
        return 16 * len(self.block_out_channels) * self.layers_per_block

    @property
    def factor(self) -> int:
        """Pixels per latent, in height and in width."""
        return 2 ** (len(self.block_out_channels) - 1)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Returns a square image's latent shape (h, w, C); raises UserError unless 2^(levels - 1) divides its size."""
        if image_size % self.factor:
            raise UserError(
                f"config.data.image_size={image_size} is not a multiple of {self.factor}, which this VAE needs"
            )
        return image_size // self.factor, image_size // self.factor, self.latent_channels


class _Downsample(nnx.Module):
    """Stride-2 convolution, padded by one only at the bottom and right, unlike the UNet's."""

    def __init__(self, channels: int, *, policy: Policy, rngs: nnx.Rngs) -> None:
        self.conv = conv(channels, channels, stride=2, padding=((0, 1), (0, 1)), dtype=policy.compute, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return self.conv(x)


class _Upsample(nnx.Module):
    def __init__(self, channels: int, *, policy: Policy, rngs: nnx.Rngs) -> None:
        self.conv = conv(channels, channels, dtype=policy.compute, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return self.conv(enlarge(x))


class _Attention(nnx.Module):
    """Single-head self-attention over all pixels, with group norm and a residual connection."""

    def __init__(self, channels: int, groups: int, *, policy: Policy, rngs: nnx.Rngs) -> None:
        self.group_norm = GroupNorm(groups, channels, EPS, policy=policy)
        options = {"dtype": policy.compute, "rngs": rngs}
        self.to_q = nnx.Linear(channels, channels, **options)
        self.to_k = nnx.Linear(channels, channels, **options)
        self.to_v = nnx.Linear(channels, channels, **options)
        self.to_out = nnx.List([nnx.Linear(channels, channels, **options)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        y = self.group_norm(x).reshape(b, h * w, c)
        q, k, v = (f(y)[:, :, None] for f in (self.to_q, self.to_k, self.to_v))
        y = jax.nn.dot_product_attention(q, k, v)[:, :, 0]
        return x + self.to_out[0](y).reshape(b, h, w, c)


class _Mid(nnx.Module):
    def __init__(self, channels: int, groups: int, attention: bool, *, policy: Policy, rngs: nnx.Rngs) -> None:
        options = {"time_dim": None, "groups": groups, "eps": EPS, "policy": policy, "rngs": rngs}
        if attention:
            self.attentions = nnx.List([_Attention(channels, groups, policy=policy, rngs=rngs)])
        self.resnets = nnx.List(ResnetBlock2D(channels, channels, **options) for _ in range(2))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = self.resnets[0](x)
        if hasattr(self, "attentions"):
            x = self.attentions[0](x)
        return self.resnets[1](x)


class _Level(nnx.Module):
    """Residual blocks of one level, then a resampling layer if `sampler` is "down" or "up"."""

    def __init__(
        self, c_in: int, c_out: int, count: int, groups: int, sampler: str, *, policy: Policy, rngs: nnx.Rngs
    ) -> None:
        self.resnets = nnx.List(
            ResnetBlock2D(
                c_in if i == 0 else c_out, c_out, time_dim=None, groups=groups, eps=EPS, policy=policy, rngs=rngs
            )
            for i in range(count)
        )
        if sampler == "down":
            self.downsamplers = nnx.List([_Downsample(c_out, policy=policy, rngs=rngs)])
        if sampler == "up":
            self.upsamplers = nnx.List([_Upsample(c_out, policy=policy, rngs=rngs)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        for resnet in self.resnets:
            x = resnet(x)
        for name in ("downsamplers", "upsamplers"):
            if hasattr(self, name):
                x = getattr(self, name)[0](x)
        return x


class _Encoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, policy: Policy, rngs: nnx.Rngs) -> None:
        channels, groups, n = config.block_out_channels, config.norm_num_groups, len(config.block_out_channels)
        options = {"policy": policy, "rngs": rngs}
        self.conv_in = conv(config.in_channels, channels[0], dtype=policy.compute, rngs=rngs)
        self.down_blocks = nnx.List(
            _Level(
                channels[max(i - 1, 0)],
                channels[i],
                config.layers_per_block,
                groups,
                "down" if i < n - 1 else "",
                **options,
            )
            for i in range(n)
        )
        self.mid_block = _Mid(channels[-1], groups, config.mid_block_add_attention, **options)
        self.conv_norm_out = GroupNorm(groups, channels[-1], EPS, policy=policy)
        self.conv_out = conv(channels[-1], 2 * config.latent_channels, dtype=policy.compute, rngs=rngs)

    def __call__(self, x: Float[Array, "b H W i"]) -> Float[Array, "b h w c2"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x), silu=True))


class _Decoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, policy: Policy, rngs: nnx.Rngs) -> None:
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        n, options = len(channels), {"policy": policy, "rngs": rngs}
        self.conv_in = conv(config.latent_channels, channels[0], dtype=policy.compute, rngs=rngs)
        self.mid_block = _Mid(channels[0], groups, config.mid_block_add_attention, **options)
        self.up_blocks = nnx.List(
            _Level(
                channels[max(i - 1, 0)],
                channels[i],
                config.layers_per_block + 1,
                groups,
                "up" if i < n - 1 else "",
                **options,
            )
            for i in range(n)
        )
        self.conv_norm_out = GroupNorm(groups, channels[-1], EPS, policy=policy)
        self.conv_out = conv(channels[-1], config.out_channels, dtype=policy.compute, rngs=rngs)

    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b H W o"]:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


class AutoencoderKL(nnx.Module):
    """KL autoencoder; `encode` and `decode` use unscaled latents, `to_latents` and `to_images` scaled ones."""

    def __init__(self, config: VAEConfig, *, policy: Policy = FP32, rngs: nnx.Rngs) -> None:
        self.config, self.policy = config, policy
        self.encoder = _Encoder(config, policy=policy, rngs=rngs)
        self.decoder = _Decoder(config, policy=policy, rngs=rngs)
        c = config.latent_channels
        if config.use_quant_conv:
            self.quant_conv = conv(2 * c, 2 * c, 1, dtype=policy.compute, rngs=rngs)
        if config.use_post_quant_conv:
            self.post_quant_conv = conv(c, c, 1, dtype=policy.compute, rngs=rngs)

    def __call__(self, images: Float[Array, "b H W i"]) -> Float[Array, "b H W o"]:
        """Encodes images to the mean and decodes it."""
        return self.decode(self.encode(images)[0])

    def encode(self, images: Float[Array, "b H W i"]) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Encodes images in [-1, 1] to float32 mean and log-variance (clipped to [-30, 20]) of q(z|x)."""
        moments = self.encoder(images.astype(self.policy.compute))
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, z: Float[Array, "b h w c"], *, in_strips: bool = False) -> Float[Array, "b H W o"]:
        """Decodes unscaled latents to float32 images, approximately in [-1, 1].

        `in_strips`: the same image up to rounding, with less memory.
        """
        z = z.astype(self.policy.compute)
        if self.config.use_post_quant_conv:
            z = self.post_quant_conv(z)
        return (strips.decode(self.decoder, z) if in_strips else self.decoder(z)).astype(jnp.float32)

    def to_latents(
        self, images: Float[Array, "b H W i"], noise: Float[Array, "b h w c"] | None
    ) -> Float[Array, "b h w c"]:
        """Encodes images in [-1, 1] to scaled latents: a sample of q(z|x) with standard normal `noise`, or its mean."""
        return scaled_draw(self.config, *self.encode(images), noise)

    def to_images(self, latents: Float[Array, "b h w c"], *, in_strips: bool = False) -> Float[Array, "b H W o"]:
        """Decodes scaled latents to float32 images, approximately in [-1, 1]; `in_strips` as in `decode`."""
        return self.decode(unscaled(self.config, latents), in_strips=in_strips)


def scaled_draw(
    config: VAEConfig, mean: Float[Array, "b h w c"], logvar: Float[Array, "b h w c"], noise: Array | None
) -> Float[Array, "b h w c"]:
    """Returns scaled latents of q(z|x) = N(mean, exp(logvar)): a sample with standard normal `noise`, or the mean."""
    z = mean if noise is None else mean + jnp.exp(0.5 * logvar) * noise
    if config.latents_mean is None or config.latents_std is None:
        return (z - (config.shift_factor or 0.0)) * config.scaling_factor
    return (z - jnp.asarray(config.latents_mean)) * config.scaling_factor / jnp.asarray(config.latents_std)


def unscaled(config: VAEConfig, z: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Returns the decoder's input for scaled latents."""
    if config.latents_mean is None or config.latents_std is None:
        return z / config.scaling_factor + (config.shift_factor or 0.0)
    return z * jnp.asarray(config.latents_std) / config.scaling_factor + jnp.asarray(config.latents_mean)
