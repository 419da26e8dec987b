"""A few-step teacher becomes a two-step student, in a loop of one's own.

    python examples/own_loop.py FOLDER --prompts prompts.txt --iterations 1000 --out student

FOLDER is a diffusers pipeline of Z-Image's classes, the teacher; prompts.txt has a caption a line.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from twostep import losses, ops
from twostep.zoo import Discriminator, FakeScore, Teacher, TwoStepStudent, load_backbone, load_text_encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--latent", type=int, nargs=2, default=(16, 16), metavar=("H", "W"))
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    encoder = load_text_encoder(args.folder, dtype=torch.float32, device=args.device)
    prompts = [line.strip() for line in args.prompts.read_text().splitlines() if line.strip()]
    contexts, empty = encoder.encode(prompts), encoder.encode([""])
    backbone = load_backbone(args.folder, dtype=torch.float32, device=args.device).requires_grad_(False)
    teacher = Teacher(backbone, guidance=args.guidance, negative=empty)
    student, fake = TwoStepStudent.from_teacher(backbone), FakeScore.from_teacher(backbone)
    discriminator = Discriminator(backbone)
    mine = torch.optim.Adam(student.trainable_parameters(), lr=1e-5, betas=(0.0, 0.9))
    theirs = torch.optim.Adam([*fake.trainable_parameters(), *discriminator.parameters()], lr=1e-4, betas=(0.0, 0.9))
    g = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        return torch.randn(args.batch, backbone.channels, *args.latent, generator=g).to(args.device)

    def noised(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        level = sigma.view(-1, 1, 1, 1)
        return (1 - level) * x + level * draw()

    def levels(low: float, high: float) -> torch.Tensor:
        return losses.uniform_sigmas(args.batch, low, high, generator=g, device=args.device)

    for iteration in range(args.iterations):
        index = torch.randint(len(prompts), (args.batch,), generator=g)
        context = contexts[index]

        for _ in range(5):  # guidance: the fake score, and the discriminator's heads against the teacher's images
            x, real = student.sample(draw(), context), teacher.sample(draw(), context, guidance=1.0)
            noise, sigma = draw(), levels(0.0, 1.0)
            level = sigma.view(-1, 1, 1, 1)
            v = fake.velocity((1 - level) * x + level * noise, sigma, context)
            sigma = levels(0.02, 0.98)
            logits = [discriminator(noised(image, sigma), sigma, context) for image in (x, real)]
            loss = losses.fake_score_loss(v, x, noise) + losses.discriminator_loss(*logits)
            theirs.zero_grad()
            loss.backward()
            theirs.step()

        def judged(x: torch.Tensor, below: float, context=context) -> torch.Tensor:
            sigma = levels(0.02, below)
            with torch.no_grad():
                seen = noised(x, sigma)
                matching = teacher.clean(seen, sigma, context), fake.clean(seen, sigma, context)
            sigma = levels(0.02, 0.98)
            logits = discriminator(noised(x, sigma), sigma, context)
            return losses.dmd_loss(x, *matching) + 0.1 * losses.generator_adversarial_loss(logits)

        mine.zero_grad()
        result = ops.two_step_backward(  # the gradient through both steps, with the activations of one
            lambda x, context=context: student.velocity(0, x, context),
            lambda z, context=context: student.velocity(1, z, context),
            draw(),
            student.sigmas,
            lambda x_a: judged(x_a, 0.98),
            lambda x: judged(x, student.sigmas[1]),
            inherit=0.1,
        )
        mine.step()
        if iteration % 10 == 0 or iteration == args.iterations - 1:
            print(
                f"{iteration}: final {float(result.final_loss):.4f}, first {float(result.first_loss):.4f}", flush=True
            )

    for name, network in (("transformer", student.first), ("transformer_2", student.second)):
        network.model.save_pretrained(args.out / name)
    print(f"wrote {args.out}/transformer and transformer_2: step 1 and step 2")


if __name__ == "__main__":
    main()
