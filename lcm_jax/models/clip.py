"""CLIP text encoder (arXiv 2103.00020) as used by Stable Diffusion; parameters are named as in transformers 5."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lcm_jax.errors import UserError
from lcm_jax.models.policy import FP32, Policy

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Configuration of a CLIP text encoder; names and defaults are those of transformers' config.json."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int | None = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    @property
    def least_tensors(self) -> int:
        """A lower bound on the number of tensors: those of the layers."""
        return 16 * self.num_hidden_layers


class _Embeddings(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(0.02)
        self.token_embedding = nnx.Embed(config.vocab_size, config.hidden_size, embedding_init=init, rngs=rngs)
        self.position_embedding = nnx.Embed(
            config.max_position_embeddings, config.hidden_size, embedding_init=init, rngs=rngs
        )

    def __call__(self, input_ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        # lookup before the cast: nnx.Embed would cast the complete table to float32
        tokens = jnp.take(self.token_embedding.embedding[...], input_ids, axis=0)
        positions = self.position_embedding.embedding[: input_ids.shape[1]]
        return tokens.astype(jnp.float32) + positions.astype(jnp.float32)


class _SelfAttention(nnx.Module):
    """Causal self-attention."""

    def __init__(self, config: CLIPTextConfig, *, policy: Policy, rngs: nnx.Rngs) -> None:
        self.heads, width, dtype = config.num_attention_heads, config.hidden_size, policy.compute
        self.q_proj = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.k_proj = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.v_proj = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.out_proj = nnx.Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        q, k, v = (f(x).reshape(*x.shape[:2], self.heads, -1) for f in (self.q_proj, self.k_proj, self.v_proj))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.reshape(x.shape))


class _MLP(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, policy: Policy, rngs: nnx.Rngs) -> None:
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nnx.Linear(config.hidden_size, config.intermediate_size, dtype=policy.compute, rngs=rngs)
        self.fc2 = nnx.Linear(config.intermediate_size, config.hidden_size, dtype=policy.compute, rngs=rngs)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        return self.fc2(self.activation(self.fc1(x)))


def _layer_norm(config: CLIPTextConfig, *, policy: Policy, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size, epsilon=config.layer_norm_eps, dtype=policy.compute, use_fast_variance=False, rngs=rngs
    )


class _Layer(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, policy: Policy, rngs: nnx.Rngs) -> None:
        options = {"policy": policy, "rngs": rngs}
        self.self_attn = _SelfAttention(config, **options)
        self.layer_norm1 = _layer_norm(config, **options)
        self.mlp = _MLP(config, **options)
        self.layer_norm2 = _layer_norm(config, **options)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Encoder(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, policy: Policy, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List(_Layer(config, policy=policy, rngs=rngs) for _ in range(config.num_hidden_layers))


class CLIPTextModel(nnx.Module):
    """CLIP text encoder: token ids to one feature vector per token."""

    def __init__(self, config: CLIPTextConfig, *, policy: Policy = FP32, rngs: nnx.Rngs) -> None:
        self.config, self.policy = config, policy
        self.embeddings = _Embeddings(config, rngs=rngs)
        self.encoder = _Encoder(config, policy=policy, rngs=rngs)
        self.final_layer_norm = _layer_norm(config, policy=policy, rngs=rngs)

    def __call__(self, input_ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """Returns the last layer's features after the final norm, which SD 1.x and 2.x condition on."""
        return self.final_layer_norm(self._layers(input_ids)[-1])

    def hidden_states(self, input_ids: Int[Array, "b l"]) -> tuple[list[jax.Array], Float[Array, "b d"]]:
        """Returns the embeddings and each layer's output (without the final norm), and the pooled vector.

        The pooled vector is the final norm's output at the end token: the first `eos_token_id`, or the largest id in
        old configs where `eos_token_id` is 2. `CLIPTextModelWithProjection` also projects it.
        """
        states = self._layers(input_ids)
        end = input_ids if self.config.eos_token_id == 2 else (input_ids == self.config.eos_token_id)
        place = jnp.argmax(end.astype(jnp.int32), axis=-1)
        pooled = self.final_layer_norm(states[-1])[jnp.arange(len(input_ids)), place]
        return states, self._project(pooled)

    def _layers(self, input_ids: Int[Array, "b l"]) -> list[jax.Array]:
        length, most = input_ids.shape[1], self.config.max_position_embeddings
        if length > most:  # an out-of-range position would give NaN, not an error
            raise UserError(f"the prompt has {length} tokens; this text encoder takes {most}")
        states = [self.embeddings(input_ids).astype(self.policy.compute)]
        for i, layer in enumerate(self.encoder.layers):
            with jax.named_scope(f"layers.{i}"):
                states.append(layer(states[-1]))
        return states

    def _project(self, pooled: Float[Array, "b d"]) -> Float[Array, "b p"]:
        return pooled


class CLIPTextModelWithProjection(CLIPTextModel):
    """CLIP text encoder with a linear projection of the pooled vector: SDXL's second text encoder."""

    def __init__(self, config: CLIPTextConfig, *, policy: Policy = FP32, rngs: nnx.Rngs) -> None:
        super().__init__(config, policy=policy, rngs=rngs)
        if not config.projection_dim:
            raise UserError(
                f"projection_dim is {config.projection_dim}; CLIPTextModelWithProjection needs a positive whole number"
            )
        self.text_projection = nnx.Linear(
            config.hidden_size, config.projection_dim, use_bias=False, dtype=policy.compute, rngs=rngs
        )

    def _project(self, pooled: Float[Array, "b d"]) -> Float[Array, "b p"]:
        return self.text_projection(pooled)
