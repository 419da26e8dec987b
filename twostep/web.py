"""The page of `twostep demo --web`: teacher and student draw the same captions from the same noise, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gradio

    from .zoo import TextToImage

COUNT, MOST = 8, 16  # images at once
SHOWN = 192  # pixels that a small image is enlarged to
FIRST = "a red circle above a green square"


def page(models: Mapping[str, TextToImage], title: str = "twostep") -> gradio.Blocks:
    """A column for each model. Nothing is loaded from elsewhere, and nothing is told to anybody."""
    import gradio

    draw = _drawing(models)
    first = iter(draw(FIRST, 0, COUNT))  # there before anybody asks
    outputs: list[Any] = []
    made = gradio.Blocks(title=title, analytics_enabled=False)
    with made:
        gradio.Markdown(f"# {title}\nThe same captions and noise; the time is that of all images together.")
        with gradio.Row():
            caption = gradio.Textbox(FIRST, label="Caption", scale=4)
            seed = gradio.Number(0, label="Seed", precision=0, minimum=0)
            count = gradio.Slider(1, MOST, COUNT, step=1, label="Images")
        button = gradio.Button("Draw", variant="primary")
        with gradio.Row():
            for name, model in models.items():
                with gradio.Column():
                    gradio.Markdown(f"## {name}\n{_evaluations(model)}")
                    outputs.append(
                        gradio.Gallery(next(first), label=name, columns=4, object_fit="contain", format="png")
                    )
                    outputs.append(gradio.Markdown(next(first)))
        gradio.on([button.click, caption.submit], draw, [caption, seed, count], outputs, api_name="draw")
    return made


def serve(made: gradio.Blocks, *, host: str, port: int) -> str:
    """Starts a server for the page, in threads of its own; returns where it is."""
    import gradio

    # Named fonts, since gradio's own are fetched from the web.
    theme = gradio.themes.Base(font=["sans-serif"], font_mono=["monospace"])
    made.launch(server_name=host, server_port=port, quiet=True, prevent_thread_lock=True, theme=theme)
    return str(made.local_url)


def _evaluations(model: TextToImage) -> str:
    return f"{model.steps} steps, {model.evaluations()} evaluations of the network"


def _drawing(models: Mapping[str, TextToImage]) -> Callable[[str, float, float], list[Any]]:
    import gradio
    from PIL import Image

    from .images import pil_image, to_bytes

    def draw(caption: str, seed: float, count: float) -> list[Any]:
        if seed is None or seed < 0 or seed != int(seed):
            raise gradio.Error(f"The seed is {seed}; a whole number from 0 on is wanted.")
        if not 1 <= count <= MOST:
            raise gradio.Error(f"{count} images are asked for; 1 to {MOST} are drawn at once.")
        seeds = range(int(seed), int(seed) + int(count))
        found: list[Any] = []
        for model in models.values():
            begun = time.perf_counter()
            try:
                pixels = to_bytes(model.draw([caption] * len(seeds), seeds))
            except (ValueError, RuntimeError) as error:
                raise gradio.Error(str(error)) from error
            taken = time.perf_counter() - begun
            images = [pil_image(one) for one in pixels]
            times = max(1, SHOWN // images[0].width)  # every pixel a square
            larger = [one.resize((one.width * times, one.height * times), Image.Resampling.NEAREST) for one in images]
            found += [larger, f"{1000 * taken:.0f} ms, {1000 * taken / len(images):.1f} ms an image"]
        return found

    return draw
