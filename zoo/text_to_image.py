"""A model that draws: a pipeline's encoder of text and autoencoder around a teacher or a student, of any family.

    model = load_text_to_image("miniature", steps=8)     a pipeline's transformer
    model = load_text_to_image("runs/first")             the student that a run left
    images = model.draw(["a red circle"], seeds=[0])     [1, 3, H, W] in [-1, 1]

An image depends on its caption and its seed: noise is drawn on the CPU, for each image by itself. What shares its batch
changes the last bits only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..arguments import usable_device
from .autoencoder import Autoencoder, load_autoencoder
from .context import Context
from .encoders import TextEncoder, load_text_encoder
from .loading import load_backbone
from .place import folder_or_hub_id
from .saved_student import load_student, pipeline_path, student_facts, student_folder
from .student import Student
from .teacher import EVERYWHERE, Generators, Teacher, check_eta, check_interval


@dataclass
class TextToImage:
    text_encoder: TextEncoder
    autoencoder: Autoencoder
    model: Teacher | Student

    @property
    def steps(self) -> int:
        return self.model.steps

    def evaluations(self, size: tuple[int, int] | None = None) -> int:
        """Of the network for an image (NFE); guidance takes two a step."""
        if isinstance(self.model, Student):
            return self.steps
        height, width = self.size(size)
        return self.model.evaluations(height // self.autoencoder.factor, width // self.autoencoder.factor)

    @property
    def device(self) -> torch.device:
        return self.autoencoder.device

    def size(self, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Height and width in pixels: those given, or the square that the model was made for."""
        height, width = (self.autoencoder.sample_size,) * 2 if size is None else size
        network = self.model.backbone if isinstance(self.model, Teacher) else self.model.distinct_networks()[0]
        step = self.autoencoder.factor * network.latent_factor
        if height < 1 or width < 1 or height % step or width % step:
            raise ValueError(f"the size is {height} x {width}, expected multiples of {step}: this model's patches")
        return height, width

    def noise(self, seeds: Sequence[int], size: tuple[int, int] | None = None) -> Tensor:
        """[N, C, H, W], each image's from its seed alone."""
        return self.start(seeds, size)[0]

    def start(self, seeds: Sequence[int], size: tuple[int, int] | None = None) -> tuple[Tensor, list[torch.Generator]]:
        """The noise, and the generators that drew it: given to `latents` they draw the noise of eta too, and an image
        is its seed's alone."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        height, width = self.size(size)
        shape = (self.autoencoder.channels, height // self.autoencoder.factor, width // self.autoencoder.factor)
        return torch.stack([torch.randn(shape, generator=one) for one in generators]).to(self.device), generators

    @torch.no_grad()
    def contexts(self, captions: Sequence[str]) -> Context:
        return self.text_encoder.encode(list(captions)).to(self.device)

    @torch.no_grad()
    def latents(
        self,
        noise: Tensor,
        context: Context,
        on_step: Callable[[int, Tensor], None] | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """`generator` draws the noise of a teacher's eta, as in Teacher.sample."""
        if isinstance(self.model, Student):
            return self.model.sample(noise, context, on_step=on_step)
        return self.model.sample(noise, context, on_step=on_step, generator=generator)

    @torch.no_grad()
    def images(self, latents: Tensor) -> Tensor:
        """[N, 3, H, W] in [-1, 1], float32."""
        return self.autoencoder.decode(latents).float().clamp(-1, 1)

    def draw(self, captions: Sequence[str], seeds: Sequence[int], size: tuple[int, int] | None = None) -> Tensor:
        if len(captions) != len(seeds):
            raise ValueError(f"draw: {len(captions)} captions and {len(seeds)} seeds, expected one for each image")
        noise, generators = self.start(seeds, size)
        return self.images(self.latents(noise, self.contexts(captions), generator=generators))


def load_text_to_image(
    path: str | Path,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    guidance_interval: tuple[float, float] = EVERYWHERE,
    eta: float = 0.0,
    eta_interval: tuple[float, float] = EVERYWHERE,
    shift: float | None = None,
    subfolder: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    fused: bool = True,
) -> TextToImage:
    """From a pipeline's folder or hub id, "miniature", or the folder of a run or its student.

    Args:
        steps, guidance, guidance_interval, eta, eta_interval, shift: of a pipeline's transformer, as of Teacher, where
            no guidance is 1; a student has its own and takes none. Of a base that flow matching has trained steps and
            guidance are those of its run's samples, unless they are given.
        subfolder: where in a pipeline the transformer lies, if not in `transformer`; a student takes none either.
    """
    device = usable_device(device, "load_text_to_image: the device")
    if not math.isfinite(1.0 if guidance is None else guidance):
        raise ValueError(f"load_text_to_image: guidance is {guidance}, expected a number; 1 is none")
    student = student_folder(path)
    facts = {} if student is None else student_facts(student)
    sampler = facts.get("sampler")
    unsaid = 1.0 if sampler is None else sampler["guidance"]
    guidance = unsaid if guidance is None else guidance
    guidance_interval = check_interval("load_text_to_image", guidance_interval, guidance)
    eta_interval = check_interval("load_text_to_image", eta_interval, check_eta("load_text_to_image", eta), of="eta")
    if student is not None:
        if sampler is None and (steps is not None or guidance != 1 or eta or shift is not None):
            raise ValueError(
                f"load_text_to_image: {path} is a student, which has steps of its own; leave out steps, guidance, eta "
                f"and shift"
            )
        if subfolder is not None:
            raise ValueError(
                f"load_text_to_image: the subfolder is {subfolder!r}, and {path} is a student, whose networks are its "
                f"own; leave out subfolder"
            )
        pipeline = pipeline_path(facts["pipeline"])
        loaded = load_student(student, dtype=dtype, device=device, fused=fused)
        model: Teacher | Student = loaded
        network = None if sampler is None else loaded.distinct_networks()[0]
        steps = steps if sampler is None or steps is not None else sampler["steps"]
    else:
        pipeline = pipeline_path(str(path))
        folder = Path(folder_or_hub_id(pipeline, "load_text_to_image"))
        if (folder / "export.json").is_file() and not (folder / "model_index.json").is_file():
            raise ValueError(
                f"load_text_to_image: {path} is an export in a form of its own (docs/export.md says what loads it); "
                f"give the run, or export it as a pipeline's folder"
            )
        if folder.is_dir() and not (folder / "model_index.json").is_file():
            raise ValueError(
                f"load_text_to_image: {path} has neither model_index.json (a pipeline) nor student.json (what a run "
                f"leaves when it is finished: the same train command goes on)"
            )
        if steps is None:
            what = "a pipeline" if folder.is_dir() else "no folder here, and so a pipeline of the hub's"
            raise ValueError(f"load_text_to_image: {path} is {what}; say how many steps it is to take")
        network = load_backbone(pipeline, dtype=dtype, device=device, fused=fused, subfolder=subfolder)
        network.requires_grad_(False)
    if network is not None:
        assert steps is not None
        model = Teacher(
            network,
            steps=steps,
            shift=shift,
            guidance=guidance,
            guidance_interval=guidance_interval,
            eta=eta,
            eta_interval=eta_interval,
        )
    text_encoder = load_text_encoder(pipeline, dtype=dtype, device=device)
    autoencoder = load_autoencoder(pipeline, dtype=dtype, device=device)
    if isinstance(model, Teacher) and guidance != 1:
        model.negative = text_encoder.encode([""]).to(device)
    return TextToImage(text_encoder, autoencoder, model)
