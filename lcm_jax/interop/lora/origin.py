"""Infers the base model of a LoRA file from the names and shapes of its tensors."""

import re
from collections.abc import Iterable, Mapping, Sequence

from lcm_jax.errors import few
from lcm_jax.interop.lora.keys import module_text

Shapes = Mapping[str, tuple[int, ...]]

_OF_TEXT_WIDTH = {
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    1280: "the refiner of SDXL",
    2048: "SDXL",
}
_TEXT_KEY = re.compile(r"attn2[._](?:processor[._])?to_[kv].*(?:lora_A|down)\b")
_SD = "Stable Diffusion 1.x or Stable Diffusion 2.x"
_FAMILIES = {
    r"(^|[._])(double_blocks|single_blocks|single_transformer_blocks)[._]\d": "Flux or a model like it",
    r"(^|[._])joint_blocks[._]\d|attn[._]add_[qkv]_proj|^lora_te3_": "Stable Diffusion 3 or a model like it",
    r"motion_modules|temporal_transformer|temp_attentions": "a video model with motion modules",
    r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn|ffn)[._]": "Wan, a video model",
    r"layers[._]\d+[._](self_attn[._]o_proj|mlp[._](gate|up|down)_proj)": "a language model",
    r"(^|[._])(control_model|lora_controlnet|controlnet)([._]|$)": "a ControlNet",
    r"^lora_te2_|^text_encoder_2\.|label_emb|add_embedding": "SDXL",
}
# What names show if the model lacks these modules: a second layer in a transformer; more levels than SDXL's three, or
# attention in its first.
_BLOCKS = {
    r"(attentions[._]\d+|put_blocks[._]\d+[._]1|middle_block[._]1)[._]transformer_blocks[._][1-9]": "SDXL",
    r"down_blocks[._](0[._]attentions|3)[._]|up_blocks[._](2[._]attentions|3)[._]": _SD,
    r"input_blocks[._]([12][._]1|9|1\d)[._]": _SD,
}
# a usual module of a transformer: the model lacks the whole layer, not a module in it
_MORE_LAYERS = re.compile(
    r"transformer_blocks[._]\d.*[._](to_[qkv]|to_out|net[._][02])|"
    r"(mid_block[._]attentions[._]0|middle_block[._]1)[._]proj_(in|out)"
)


def strangers(file: Shapes, keys: Sequence[str], kernels: Mapping[str, Shapes], fault: str) -> str:
    """Returns the error message for a file (key → shape) whose tensors `keys` match no module of the model.

    `kernels` is component → module → kernel shape. `fault` describes the first key; it is used if nothing shows that
    the file was made for another base model.
    """
    lost = list(dict.fromkeys(map(module_text, keys)))
    total = len(set(map(module_text, file)))
    if reason := other_base(file, kernels, keys) or _larger(kernels, keys):
        return f"{reason}: {len(lost)} of its {total} modules are not in this model ({few(lost)})"
    more = f" ({len(lost)} of its {total} modules are not in this model: {few(lost)})" if len(lost) > 1 else ""
    return f"{fault}{more}; was it trained on another base model?"


def other_base(file: Shapes, kernels: Mapping[str, Shapes], keys: Sequence[str] = ()) -> str:
    """Returns "it was trained on A; this model is B", with text widths; "" if nothing shows that A and B differ.

    `file` is key → shape, `kernels` component → module → kernel shape of the model, and `keys` are those of the file
    that match no module of it.
    """
    theirs, ours = _text_width(file), _own_width(kernels)
    family = _named(_FAMILIES, file) or _named(_BLOCKS, keys)
    own_family = "SDXL" if _is_sdxl(kernels) else _OF_TEXT_WIDTH.get(ours, "")
    if theirs not in (0, ours) and family in ("", "SDXL", _SD):
        family = f"{_OF_TEXT_WIDTH.get(theirs, family or 'a model')} (text width {theirs})"
    elif not family or (own_family and own_family in family):
        return ""
    own = f"is {own_family} with" if own_family else "has"
    return f"it was trained on {family}; this model {own} text width {ours}"


def _named(patterns: Mapping[str, str], keys: Iterable[str]) -> str:
    return next((name for pattern, name in patterns.items() if any(re.search(pattern, key) for key in keys)), "")


def _larger(kernels: Mapping[str, Shapes], keys: Sequence[str]) -> str:
    """Returns what a file is for whose tensors `keys` a smaller relative of SDXL lacks; "" if that is not shown."""
    if not _is_sdxl(kernels) or not any(map(_MORE_LAYERS.search, keys)):
        return ""
    return "it was trained on a larger model of SDXL's kind; this model has fewer transformer layers"


def _is_sdxl(kernels: Mapping[str, Shapes]) -> bool:
    return "text_encoder_2" in kernels


def _text_width(file: Shapes) -> int:
    """Returns the width of the text features in the file's cross-attention; 0 if it has none."""
    return next((shape[1] for key, shape in file.items() if len(shape) > 1 and _TEXT_KEY.search(key)), 0)


def _own_width(kernels: Mapping[str, Shapes]) -> int:
    modules = [item for of in kernels.values() for item in of.items()]
    return next((shape[-2] for module, shape in modules if module.endswith("attn2.to_k")), 0)
