"""A tiny Stable Diffusion XL of diffusers with random weights."""

import json
import pathlib

from fixtures_folders import SCHEDULE, TOKENS, UNET, VAE, randomize, write_tokenizer

WIDTHS, TIME_DIM = (8, 16), 4
PROJECTION = 8  # the first encoder's width, so that its pooled vector would fit too


def build_sdxl(root: pathlib.Path, layers: int = 3, **unet):
    """Builds a tiny StableDiffusionXLPipeline of diffusers.

    Args:
      root: for the tokenizers.
      layers: of each text encoder.
      unet: changes the configuration of the UNet.
    """
    import diffusers
    import transformers

    tokenizers = []
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):  # as SDXL's own differ
        write_tokenizer(root / name)
        config = json.loads((root / name / "tokenizer_config.json").read_text())
        (root / name / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": pad}))
        tokenizers.append(transformers.CLIPTokenizer.from_pretrained(str(root / name)))
    configs = [
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            projection_dim=PROJECTION,
            hidden_act=act,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for tokenizer, width, act in zip(tokenizers, WIDTHS, ("quick_gelu", "gelu"), strict=True)
    ]
    parts = {
        "unet": diffusers.UNet2DConditionModel(
            **{**UNET, "cross_attention_dim": sum(WIDTHS), "transformer_layers_per_block": (2, 1)} | unet,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME_DIM,
            projection_class_embeddings_input_dim=PROJECTION + 6 * TIME_DIM,
        ),
        "vae": diffusers.AutoencoderKL(**VAE, scaling_factor=0.13025),
        "text_encoder": transformers.CLIPTextModel(configs[0]),
        "text_encoder_2": transformers.CLIPTextModelWithProjection(configs[1]),
    }
    for seed, part in enumerate(parts.values()):
        randomize(part, seed)
        part.eval()
    pipeline = diffusers.StableDiffusionXLPipeline(
        **parts,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        scheduler=diffusers.DDIMScheduler(**SCHEDULE, timestep_spacing="trailing", clip_sample=False),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
