"""A web page for trying heads: Gaussian beside energy prior, and the chains as a strip.

In a Space of the Hub, `app.py` is two lines:

    from ebm_prior.demo import load, page
    page({"digits": load("user/name")}).launch()
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from PIL import Image

from ebm_prior.errors import EbmPriorError
from ebm_prior.hub import HeadsSource, open_source
from ebm_prior.images import grid, to_pil, to_uint8
from ebm_prior.pictures import Strip
from ebm_prior.prior import EnergyPrior, SamplerConfig
from ebm_prior.registry import load_backbone

if TYPE_CHECKING:
    import gradio

__all__ = ["draw", "load", "page"]

IMAGES = 16
MAX_STEPS, MAX_TEMPERATURE, MAX_SEED = 200, 2.0, 2**32 - 1


def load(source: str | HeadsSource, ckpt: str | None = None, device: str = "cpu") -> EnergyPrior:
    """Heads with their backbone.

    Args:
        source: Saved folder, run folder or Hub id.
        ckpt: The backbone; by default the one stored with the heads or beside them.
        device: Where the weights go.

    Raises:
        EbmPriorError: If there are no such heads, or their backbone is not found.
    """
    heads = source if isinstance(source, HeadsSource) else open_source(source)
    family = heads.config["backbone"]["name"]
    backbone = load_backbone(family, heads.checkpoint(ckpt), device)
    return EnergyPrior.from_pretrained(heads, backbone=backbone)


def draw(
    prior: EnergyPrior, steps: int, temperature: float, seed: int
) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Pictures of 16 samples: Gaussian prior, energy prior from the same noise, and the strip.

    Args:
        prior: What to sample.
        steps: Length of the chains, 1 to 200.
        temperature: Of both priors, above 0, at most 2.
        seed: Sample i uses seed + i.

    Raises:
        EbmPriorError: If an argument is out of range.
    """
    from ebm_prior.sampling import seeded_batches

    for name, value, least, most in (
        ("steps", steps, 1, MAX_STEPS),
        ("temperature", temperature, 0.05, MAX_TEMPERATURE),
        ("seed", seed, 0, MAX_SEED),
    ):
        if not (isinstance(value, (int, float)) and least <= value <= most):
            raise EbmPriorError(f"{name} must lie between {least} and {most}")
    config = SamplerConfig(prior.sampler.transition, int(steps), prior.sampler.step_size)
    seeds = range(int(seed), int(seed) + IMAGES)
    strip = Strip(prior, config.steps, temperature)
    (batch,) = seeded_batches(prior, seeds, config, temperature=temperature, callback=strip)
    strip.close(batch.start)
    before, after = (
        to_pil(grid(to_uint8(prior.images(eps, temperature)), columns=4))
        for eps in (batch.start, batch.end)
    )
    return before, after, to_pil(strip.picture())


def page(priors: Mapping[str, EnergyPrior]) -> gradio.Blocks:
    """The page, ready for `.launch()`.

    Args:
        priors: What the visitor may choose from, by the name shown.

    Raises:
        EbmPriorError: If there are none, or Gradio is not installed.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise EbmPriorError("the page needs Gradio: pip install 'ebm-prior[demo]'") from error
    if not priors:
        raise EbmPriorError("there are no heads to show; name some")
    first = next(iter(priors))

    def sample(name: str, steps: int, temperature: float, seed: int) -> Any:
        try:
            return draw(priors[name], steps, temperature, seed)
        except EbmPriorError as error:
            raise gr.Error(str(error)) from error

    def defaults(name: str) -> int:
        return min(priors[name].sampler.steps, MAX_STEPS)

    with gr.Blocks(title="ebm-prior", analytics_enabled=False) as blocks:
        gr.Markdown(
            "# ebm-prior\n"
            "A frozen hierarchical VAE draws its latents from a Gaussian prior. Small energy "
            "heads tilt it: the same noise, before and after a chain of Langevin steps."
        )
        with gr.Row():
            heads = gr.Dropdown(list(priors), value=first, label="Heads", scale=2)
            steps = gr.Slider(1, MAX_STEPS, value=defaults(first), step=1, label="Steps")
            temperature = gr.Slider(
                0.05, MAX_TEMPERATURE, value=1.0, step=0.05, label="Temperature"
            )
            seed = gr.Number(0, minimum=0, maximum=MAX_SEED, precision=0, label="Seed")
        button = gr.Button("Sample", variant="primary")
        # a label of the image's own would lie on top of its first row
        show = {"show_label": False, "format": "png", "buttons": ["fullscreen"]}
        with gr.Row():
            with gr.Column():
                gr.Markdown("### Gaussian prior")
                before = gr.Image(**show)
            with gr.Column():
                gr.Markdown("### Energy prior, from the same noise")
                after = gr.Image(**show)
        gr.Markdown("### Eight chains, step by step")
        strip = gr.Image(**show)
        settings = [heads, steps, temperature, seed]
        heads.change(defaults, heads, steps)
        button.click(sample, settings, [before, after, strip], api_name="sample")
        blocks.load(sample, settings, [before, after, strip], api_name=False)
    return blocks
