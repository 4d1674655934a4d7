"""FLUX.1 Kontext [dev] as published, without a folder: sizes are enough to plan with."""

from pathlib import Path

from lorweb_jax.common.errors import UserError
from lorweb_jax.flow.schedule import Schedule
from lorweb_jax.models.autoencoder.model import VAEConfig
from lorweb_jax.models.clip.towers import CLIPTextConfig, ClipVision, CLIPVisionConfig
from lorweb_jax.models.flux1.config import FluxConfig
from lorweb_jax.models.image_encoder.encoder import ImageEncoderFolder, open_image_encoder
from lorweb_jax.models.image_encoder.processor import ImageProcessor
from lorweb_jax.models.t5.model import T5Config
from lorweb_jax.pipeline.folder import MAX_TEXT_TOKENS, PipelineFolder

PIPELINE, IMAGE_ENCODER = "FLUX.1-Kontext-dev", "clip-vit-large-patch14"
# T5 v1.1 XXL.
T5_XXL = T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)


def open_pipeline(folder: str, image_encoder: str = "") -> PipelineFolder:
    """The folder if it is there; if not, and its name is FLUX.1-Kontext-dev, a stand-in that has sizes alone.

    image_encoder: the folder of the router's image encoder; where it isn't there, its name must be
    clip-vit-large-patch14.
    """
    if image_encoder and not Path(image_encoder).is_dir() and Path(image_encoder).name != IMAGE_ENCODER:
        raise UserError(
            f"there is no image encoder {image_encoder}; set --config.basis.encoder to a folder, or to "
            f"{IMAGE_ENCODER}, whose sizes are known",
            2,
        )
    if Path(folder).is_dir():
        there = not image_encoder or Path(image_encoder).is_dir()
        pipeline = PipelineFolder(folder, image_encoder if there else None)
        pipeline.encoder = pipeline.encoder if there else _image_encoder("")
        return pipeline
    if Path(folder).name != PIPELINE:
        raise UserError(
            f"there is no pipeline {folder}; set --config.pipeline to a folder, or to {PIPELINE}, whose "
            "sizes are known",
            2,
        )
    return KontextSizes(image_encoder)


class KontextSizes(PipelineFolder):
    """A PipelineFolder that can make models, but has no weights and no tokenizers."""

    text_tokens = MAX_TEXT_TOKENS

    def __init__(self, image_encoder: str):
        self.folder = Path(PIPELINE)
        self.flux_config, self.vae_config, self.t5_config = FluxConfig(), VAEConfig(), T5_XXL
        self.schedule = Schedule()
        self.encoder_folder = Path(image_encoder or IMAGE_ENCODER)
        self.encoder = _image_encoder(image_encoder)

    def clip_text_config(self):
        """CLIP ViT-L/14's text tower, of which the defaults are off in widths alone."""
        return CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768)


def _image_encoder(folder: str) -> ImageEncoderFolder:
    """CLIP ViT-L/14 with its projection, unless there is such a folder."""
    if folder and Path(folder).is_dir():
        return open_image_encoder(folder)
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        projection_dim=768,
    )
    processor = ImageProcessor(
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        shortest_edge=224,
        crop=(224, 224),
    )

    def no_weights():
        raise UserError(f"there is no image encoder {folder or IMAGE_ENCODER}; give its folder")

    return ImageEncoderFolder(lambda rngs: ClipVision(config, rngs=rngs), no_weights, processor)
