"""Random weights for a torch module and the same as flat parameters, and a comparison of two outputs."""

import jax.numpy as jnp
import numpy as np
import torch
from fixtures_folders import randomize

from lcm_jax.interop import names
from lcm_jax.interop.network_configs import MODEL_CLASSES
from lcm_jax.models import Flat, Network

CLIP_PREFIX = "text_model."  # which transformers' class with a projection has, and the one without has not


def network(peer: torch.nn.Module, **options) -> Network:
    """Returns our network with the configuration of a diffusers or transformers model, as in its config.json."""
    config = peer.config.to_dict() if hasattr(peer.config, "to_dict") else dict(peer.config)
    known = MODEL_CLASSES[type(peer).__name__]
    return Network(known.model, known.read(config), **options)


def random_weights(peer: torch.nn.Module, seed: int) -> Flat:
    """Gives every parameter of `peer` a random value, norms included, and returns them in our names and layout."""
    randomize(peer.eval(), seed)
    flat = {}
    net = network(peer)
    state = {key.removeprefix(CLIP_PREFIX): tensor for key, tensor in peer.state_dict().items()}
    for path in net.shapes:
        tensor = state.pop(names.file_key(path)).numpy()
        flat[path] = jnp.asarray(np.ascontiguousarray(names.from_file(path, tensor)))
    assert not [key for key in state if not key.endswith("position_ids")], "the peer has weights that we lack"
    net.check(flat)
    return flat


def nchw(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


def nhwc(tensor: torch.Tensor) -> np.ndarray:
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_close(ours, theirs, tolerance: float = 1e-4) -> None:
    """max |difference| <= tolerance * max |reference|, of arrays that are finite and not nearly constant."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert ours.dtype == np.float32
    assert np.isfinite(theirs).all()
    assert theirs.std() > 1e-2 * np.abs(theirs).max(), "a reference that is nearly constant proves nothing"
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error <= tolerance, f"relative error {error:.1e}"
