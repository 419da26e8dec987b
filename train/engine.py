"""The loop: a recipe becomes a run, which trains, is watched, is kept, and goes on from wherever it was stopped.

    for each iteration:  for each update of the method:  batches -> Updater -> (skip | step) -> averages
                         now and then: a row of numbers, a sheet of samples, an evaluation, a checkpoint

A run is its folder: `checkpoints/`, `journal`, the resolved recipe, and at the end `student/`. Everything that decides
what happens next is in a checkpoint, so a run that was killed at any moment and started again ends in the same bits.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..arguments import INTERRUPTED
from ..durable import recover, remove, replaced, sole
from .average import Average
from .cast import DTYPES, Casting
from .checkpoint import Store
from .configuration import dump, environment, resolved
from .data import NoiseStreams
from .data.noise import seed_everybody
from .feed import make_feed
from .journal import ANEW, Journal, NullJournal, read_events, read_metrics
from .methods import Cast, Method, TrainingBatch, method_class
from .monitors import Averages, CriticLag, PhaseClock
from .parts import Parts
from .profile import Profile
from .ranks import PATIENCE, Ranks
from .recipe import DiscriminatorRole, FakeScoreRole, PromptsData, RealScoreRole, Recipe
from .result import write_student, written_at
from .run_state import Progress, RunState
from .sharding import check_alike, check_same, views_are_meant
from .signals import Signals
from .update import Outcome, Updater, optimizers_of, trainable
from .watch import Watch

FINISHED, STOPPED = 0, 0  # exit statuses, beside INTERRUPTED
METRICS, SAVED = "metrics.jsonl", "saved"


class TrainingFailed(RuntimeError):
    """The run cannot go on; the message says why, what was kept, and what to do."""


@dataclass
class Trained:
    """How `train` ended."""

    status: int
    iteration: int
    folder: Path


def train(recipe: Recipe, ranks: Ranks, *, fresh: bool = False, profile: bool = False, which: Any = None) -> Trained:
    """Trains as the recipe says; goes on where a run in its folder stopped.

    Args:
        fresh: it is an error if the folder holds a checkpoint.
        profile: write a trace of a few iterations.
        which: a checkpoint to go on from (a step, or a folder) instead of the last.
    """
    alone = sole(recipe.out, "training") if ranks.first else nullcontext()
    with Signals() as signals, alone, views_are_meant():
        run = Run.of(recipe, ranks, signals)
        try:
            run.begin(fresh=fresh, which=which)
            return run.go(profile)
        finally:
            run.close()


@dataclass
class Run:
    recipe: Recipe
    ranks: Ranks
    method: Method
    cast: Cast
    state: RunState
    store: Store
    updater: Updater
    watch: Watch
    averages: Averages
    lag: CriticLag
    signature: dict[str, Any]
    signals: Signals
    journal: Journal | NullJournal
    stopping: int = 0  # the signal that all ranks have agreed to stop at
    saved_at: tuple[int, int] | None = None  # iteration and position of the last checkpoint that this process wrote

    @classmethod
    def of(cls, recipe: Recipe, ranks: Ranks, signals: Signals) -> Run:
        if recipe.compute.threads is not None:
            torch.set_num_threads(recipe.compute.threads)
        seed_everybody(recipe.seed, ranks.rank)
        dtype = DTYPES[recipe.compute.dtype]
        cache = recipe.data.contexts if isinstance(recipe.data, PromptsData) else None
        parts = Parts(recipe.model, dtype=dtype, device=ranks.device, cache=cache)
        casting = Casting(recipe, parts.path, ranks.device, ranks.mesh)
        kind = method_class(recipe.method)
        ranks.watchdog.beat("looking at files", patience=PATIENCE)
        sources = casting.sources()
        check_same(sources, ranks)  # of frozen networks and of shards nothing else would tell
        with _room_to_compile(recipe.compute.compile):
            ranks.watchdog.beat("loading networks", patience=PATIENCE)
            first, wants = casting.networks()[0], kind.wants(recipe.method)
            feed = make_feed(
                recipe.data,
                parts,
                batch=recipe.batch,
                seed=recipe.seed,
                rank=ranks.rank,
                world_size=ranks.world_size,
                wants=wants,
                latent_channels=first.channels,
                latent_factor=first.latent_factor,
                device=ranks.device,
                anchor_sigma=casting.anchor_sigma() if "anchor" in wants else None,
            )
            cast = casting.roles(feed.usual[1:], parts.empty.to(ranks.device))
        shared = NoiseStreams(recipe.seed)  # rank 0's purposes, drawn by every rank alike
        method = kind.build(recipe.method, cast, _Prefixed(shared, "shared "))
        modules = cast.modules()
        if ranks.mesh is None:
            check_alike(modules, ranks)
        optimizers = optimizers_of(recipe, method, modules)
        average = None if recipe.ema is None else Average(trainable(cast.student), recipe.ema)
        streams = NoiseStreams(recipe.seed, ranks.rank)
        clock = PhaseClock(ranks.device)
        return cls(
            recipe=recipe,
            ranks=ranks,
            method=method,
            cast=cast,
            state=RunState(modules, optimizers, average, streams, shared, feed, ranks),
            store=Store(
                recipe.out / "checkpoints",
                keep_last=recipe.checkpoints.keep_last,
                keep_best=recipe.checkpoints.keep_best,
            ),
            updater=Updater(method, optimizers, streams, ranks, dtype, clock),
            watch=Watch(recipe, ranks, method, parts, feed),
            averages=Averages(),
            lag=CriticLag(),
            signature=signature(recipe, feed.identity(), sources),
            signals=signals,
            journal=NullJournal(),
        )

    # Beginning

    def begin(self, *, fresh: bool, which: Any) -> None:
        recipe = self.recipe
        # Rank 0 looks, for all: another rank's file system may know less of the folder.
        goes_on, fault = self.ranks.from_first(lambda: self._what_is_there(fresh, which))
        if fault is not None:
            raise ValueError(fault)
        resumed: int | None = None
        if goes_on:
            self.ranks.watchdog.beat("reading a checkpoint", patience=PATIENCE)
            saved = self.state.restore(self.store, which, self.signature)
            self._recall()
            resumed = self.state.progress.iteration
        elif (recipe.out / METRICS).exists():
            resumed = ANEW  # it ended before its first checkpoint was due
        if self.ranks.first:
            self._write_settings()
            self.journal = Journal(
                recipe.out,
                total=recipe.iterations,
                resumed_at=resumed,
                tensorboard=recipe.watch.tensorboard,
                wandb=recipe.watch.wandb,
                settings=resolved(recipe),
            )
        if goes_on:
            self.journal.event(self.state.progress.iteration, "resumed", checkpoint=saved.path.name)
        if which is not None:  # from now on this is the last one, and the plain command goes on from it
            if self.ranks.first and (recipe.out / "student").exists():
                remove(recipe.out / "student")  # of what is not to be
            aside = self.store.set_aside(self.state.progress.iteration) if self.ranks.first else []
            for folder in aside:
                self.journal.event(self.state.progress.iteration, "damaged, and set aside", checkpoint=folder.name)
            self._save()
            self.journal.event(self.state.progress.iteration, "leave out --checkpoint to go on from here")

    def _what_is_there(self, fresh: bool, which: Any) -> tuple[bool, str | None]:
        """Whether there is a checkpoint to go on from; or why the run cannot begin."""
        out = self.recipe.out
        if fresh and which is not None:
            return False, "--fresh and --checkpoint exclude each other"
        lines = read_metrics(out) if (out / METRICS).exists() else []
        last = lines[-1]["iteration"] if lines else 0
        any_checkpoint = self.store.holds_any()
        if fresh and (any_checkpoint or last or (out / "student").exists()):
            return False, (
                f"{out} holds a run already (its journal ends at iteration {last}); leave out --fresh to go on with "
                f"it, or give another folder: out=..."
            )
        was_saved = any(event["event"] == SAVED for event in read_events(out)) if lines else False
        if which is None and not any_checkpoint and was_saved:
            return False, (
                f"{out} holds the journal of a run up to iteration {last}, and its checkpoints are gone: put them "
                f"back, or give another folder: out=..."
            )
        return any_checkpoint or which is not None, None

    def _write_settings(self) -> None:
        out = self.recipe.out
        recover(out)  # a student that was being written when a process died
        kept = out / "recipe.yaml"
        with replaced(kept) as new:
            dump(self.recipe, new)
            if kept.exists() and kept.read_bytes() != new.read_bytes():
                kept.rename(out / f"recipe-until-{self.state.progress.iteration:08d}.yaml")
        facts = {**environment(), "ranks": self.ranks.world_size, "device": str(self.ranks.device)}
        with (out / "environment.jsonl").open("a", encoding="utf-8") as file:  # a line for every start
            file.write(json.dumps(facts) + "\n")

    # The loop

    def go(self, profile: bool) -> Trained:
        recipe, progress = self.recipe, self.state.progress
        begun = progress.iteration
        if (progress.iteration, progress.position) == (0, 0):
            self.watch.begin(self.journal)
        with Profile(recipe.out, self.ranks, wanted=profile) as trace:
            while progress.iteration < recipe.iterations:
                if not self._iteration():
                    return self._stopped()
                progress = self.state.progress  # another object after a return to an earlier checkpoint
                trace.step()
        if self.saved_at != (progress.iteration, 0) and not self._is_saved():
            self._save()
        folder = recipe.out / "student"
        is_there = self.ranks.from_first(lambda: written_at(folder) == progress.iteration)
        if progress.iteration != begun or not is_there:
            self.ranks.watchdog.beat("writing the student", patience=PATIENCE)
            with self._averaged():
                folder = write_student(recipe, self.cast, self.ranks, progress.iteration)
        self.journal.event(progress.iteration, "finished", student=str(folder))
        return Trained(FINISHED, progress.iteration, recipe.out)

    def _iteration(self) -> bool:
        """One iteration, or what is left of one; False where the run is to stop."""
        progress = self.state.progress
        kinds = self.method.updates(progress.iteration)
        while progress.position < len(kinds):
            kind = kinds[progress.position]
            self.updater.doing = f"a {kind} update of iteration {progress.iteration + 1}"
            self.ranks.watchdog.beat(f"the data of {self.updater.doing}", PATIENCE if not self.updater.known else 1.0)
            outcome = self.updater.run(kind, self._batches(), self.signals.received)
            if outcome.faults and self._skipped(kind, outcome):
                return True  # gone back
            if not outcome.faults:
                self._moved(kind, outcome)
            progress.position += 1
            if outcome.stop and progress.position < len(kinds):
                self.stopping = outcome.stop
                return False
        progress.iteration, progress.position = progress.iteration + 1, 0
        self._look(progress)
        self.stopping = int(self.ranks.highest([float(self.signals.received)])[0])
        return not self.stopping

    def _batches(self) -> list[TrainingBatch]:
        """What an update gets. A source that fails ends the run on all ranks, with everything kept."""
        before, failed, batches = self.state.feed.state_dict(), None, []
        try:
            with self.updater.clock.phase("data"):
                batches = [next(self.state.feed) for _ in range(self.recipe.accumulate)]
        except Exception as error:  # whatever a source of data may raise
            failed = error
        if self.ranks.highest([float(failed is not None)])[0]:
            saved = self._save(feed_state=before)
            raise TrainingFailed(
                f"the data could not be read: {failed or 'on another rank; see its message'}; the run is kept as it "
                f"was before this batch ({saved}): mend the data, and the same command goes on"
            ) from failed
        return batches

    def _moved(self, kind: str, outcome: Outcome) -> None:
        self.state.progress.skipped.pop(kind, None)
        if kind == "generator":
            if self.state.average is not None:
                self.state.average.follow()
            if hasattr(self.method, "follow"):
                self.method.follow()
        self.averages.add({**outcome.metrics, f"{kind}_gradient_norm": outcome.norm})

    def _look(self, progress: Progress) -> None:
        """What is due after an iteration."""
        recipe, at = self.recipe, progress.iteration
        if at % recipe.watch.every == 0 or at == recipe.iterations:
            numbers = self._numbers()
            self.journal.numbers(at, numbers)
            self.journal.advance(at, {name: value for name, value in numbers.items() if name.endswith("loss")})
        else:
            self.journal.advance(at, {})
        with self._averaged() if self.watch.due(at) else nullcontext():
            metrics = self.watch.look(at, self.journal)
        progress.owed = progress.owed or at % recipe.checkpoints.every == 0
        # Not while updates are being skipped: then the last good checkpoint is the one from before.
        if progress.owed and not progress.skipped:
            self._save(metrics)

    def _numbers(self) -> dict[str, float]:
        found = self.ranks.mean(self.averages.take())
        if "fake_score_loss" in found:
            found["critic_lag"] = self.lag.update(found["fake_score_loss"])
        found |= self.updater.clock.take()
        found |= {f"{kind}_rate": optimizer.rate for kind, optimizer in self.state.optimizers.items()}
        return found | {"skipped_updates": float(self.state.progress.skipped_in_all)}

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The student as it is sampled, judged and exported."""
        with nullcontext() if self.state.average is None else self.state.average.in_place():
            yield

    # Trouble

    def _skipped(self, kind: str, outcome: Outcome) -> bool:
        """Counts an update that was not taken; True where the run has gone back to a checkpoint."""
        progress, trouble = self.state.progress, self.recipe.trouble
        progress.skipped[kind] = progress.skipped.get(kind, 0) + 1
        progress.skipped_in_all += 1
        self.journal.event(
            progress.iteration,
            f"skipped a {kind} update that is not finite",
            in_a_row=f"{progress.skipped[kind]} of {trouble.in_a_row}",
            faults="; ".join(outcome.faults[:4]),
        )
        if progress.skipped[kind] < trouble.in_a_row:
            return False
        self._go_back(kind, outcome.faults)
        return True

    def _go_back(self, kind: str, faults: list[str]) -> None:
        progress, trouble = self.state.progress, self.recipe.trouble
        report = (
            f"{progress.skipped[kind]} {kind} updates in a row were not finite, at iteration {progress.iteration + 1}: "
            f"{'; '.join(faults[:8])}"
        )
        advice = "lower optimizers.*.lr or clip, set compute.dtype=float32, or look at the data there"
        if progress.iteration > progress.failed_at + self.recipe.checkpoints.every:
            progress.returns = 0  # it had recovered since
        if progress.returns >= trouble.returns:
            raise TrainingFailed(f"{report}; {progress.returns} returns to a checkpoint did not help. {advice}")
        latest = self.store.latest()
        if latest is None:
            raise TrainingFailed(f"{report}; there is no checkpoint to go back to yet. {advice}")
        returns, skipped_in_all, failed_at = progress.returns + 1, progress.skipped_in_all, progress.iteration
        factors = {kind: trouble.lower * optimizer.factor for kind, optimizer in self.state.optimizers.items()}
        self.ranks.watchdog.beat("going back to a checkpoint", patience=PATIENCE)
        self.state.restore(self.store, None, self.signature)
        self._recall()
        progress = self.state.progress
        progress.returns, progress.skipped_in_all, progress.failed_at = returns, skipped_in_all, failed_at
        progress.skipped = {}
        for kind, optimizer in self.state.optimizers.items():
            optimizer.factor = factors[kind]
        self.journal.rewind(progress.iteration)
        rates = ", ".join(f"{kind} {optimizer.rate:.3g}" for kind, optimizer in self.state.optimizers.items())
        self.journal.event(progress.iteration, "went back to the last good checkpoint", because=report, rates=rates)
        self._save()  # so that a run that is stopped now goes on with the lower rates

    # Keeping

    def _save(self, metrics: Mapping[str, float] | None = None, feed_state: Mapping[str, Any] | None = None) -> str:
        self.ranks.watchdog.beat("writing a checkpoint", patience=PATIENCE)
        progress = self.state.progress
        progress.owed = False
        progress.watched = {
            "averages": self.averages.state_dict(),
            "lag": self.lag.state_dict(),
            "watch": self.watch.state_dict(),
        }
        if not metrics and self.ranks.first:
            # A checkpoint that takes the place of one that was judged has its student: the generator's update is the
            # last of an iteration, and what is saved before it has moved guidance alone.
            metrics = next((one.metrics for one in self.store.all() if one.step == progress.iteration), None)
        self.journal.sync()  # no row that the checkpoint knows of is lost before it
        with self.updater.clock.phase("checkpoint"):
            saved = self.state.save(self.store, self.signature, metrics, feed_state)
        self.saved_at = (progress.iteration, progress.position)
        self.journal.event(progress.iteration, SAVED, checkpoint=saved.path.name)
        return saved.path.name

    def _is_saved(self) -> bool:
        latest = self.store.latest()
        return latest is not None and latest.step == self.state.progress.iteration

    def _recall(self) -> None:
        """What the monitors knew."""
        watched = self.state.progress.watched
        self.averages.load_state_dict(watched["averages"])
        self.lag.load_state_dict(watched["lag"])
        self.watch.load_state_dict(watched["watch"])

    # Stopping

    def _stopped(self) -> Trained:
        progress = self.state.progress
        if self.saved_at != (progress.iteration, progress.position):
            self._save()
        self.journal.event(
            progress.iteration, f"stopped by {signal.Signals(self.stopping).name}; the same command goes on"
        )
        status = INTERRUPTED if self.stopping == signal.SIGINT else STOPPED
        return Trained(status, progress.iteration, self.recipe.out)

    def close(self) -> None:
        self.state.feed.close()
        self.journal.close()


class _Prefixed:
    """Streams whose purposes begin with a word, so that they are no other's."""

    def __init__(self, streams: NoiseStreams, word: str) -> None:
        self._streams, self._word = streams, word

    def __getitem__(self, purpose: str) -> torch.Generator:
        return self._streams[self._word + purpose]


def signature(recipe: Recipe, data: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
    """What a checkpoint belongs to: all that decides what its tensors mean, and nothing that may change at a resume
    (how long, how often, how many ranks, learning rates, where files lie)."""
    plain = resolved(recipe)
    usual = {"real_score": RealScoreRole(), "fake_score": FakeScoreRole(), "discriminator": DiscriminatorRole()}
    for name, role in usual.items():
        if plain["roles"][name] == resolved(role):
            plain["roles"][name] = None  # defaults, spelled out
    for role in plain["roles"].values():
        if role is not None:
            role.pop("source")  # what lies there counts, which `sources` says
    optimizers = {"generator": recipe.optimizers.generator.kind}
    guidance = recipe.optimizers.guidance
    if guidance is not None and guidance.kind != recipe.optimizers.generator.kind:
        optimizers["guidance"] = guidance.kind
    kept = {name: plain[name] for name in ("method", "roles", "guidance", "seed", "ema")}
    facts = {"optimizers": optimizers, "dtype": recipe.compute.dtype, "data": dict(data), "sources": dict(sources)}
    return {**kept, **facts}


@contextmanager
def _room_to_compile(wanted: bool) -> Iterator[None]:
    """A block that serves several adapters compiles once for each: more often than dynamo's default bears."""
    if wanted:
        import torch._dynamo

        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    yield
