"""FLUX.2-klein in two steps, with a transformer for each. Written by twostep (Apache-2.0); needs diffusers alone.

pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
image = pipeline(prompt="a red circle").images[0]
"""

from diffusers import Flux2KleinPipeline


class TwoStepFlux2KleinPipeline(Flux2KleinPipeline):
    """Flux2KleinPipeline's own loop; after the first step the second transformer takes the first one's place."""

    model_cpu_offload_seq = "text_encoder->transformer->transformer_2->vae"

    def __init__(
        self, scheduler, vae, text_encoder, tokenizer, transformer, transformer_2,
        is_distilled=True, step_sigmas=(1.0, 0.75),
    ):  # fmt: skip
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer, is_distilled)
        self.register_modules(transformer_2=transformer_2)
        self.register_to_config(step_sigmas=list(step_sigmas))

    def __call__(self, image=None, prompt=None, **kwargs):
        sigmas = list(self.config.step_sigmas)
        for name, only in (("num_inference_steps", len(sigmas)), ("sigmas", sigmas), ("guidance_scale", 1.0)):
            given = kwargs.setdefault(name, only)
            if given is not None and given != only:
                raise ValueError(f"{type(self).__name__}: {name} is {given}; this model was made for {only} alone")
            kwargs[name] = only
        first, then = self.transformer, kwargs.pop("callback_on_step_end", None)

        def switch(pipeline, step, timestep, tensors):
            pipeline.transformer = pipeline.transformer_2
            return tensors if then is None else then(pipeline, step, timestep, tensors)

        try:
            return super().__call__(image, prompt, callback_on_step_end=switch, **kwargs)
        finally:
            self.transformer = first
