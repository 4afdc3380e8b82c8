"""The spine: every part of a run, in the order in which a sample passes them.

     prompts ─► Feeder ─► ┌──────────── Store ────────────┐
                          │  who is ready, who may have   │
     EngineHost ◄─────────┤  it, how old is it            ├─────────► RewardWorker, ReferenceWorker
       ▲  RolloutWorker ─►│                               │◄───────── (columns appended)
       │                  └───────────────┬───────────────┘
       │                                  ▼  whole groups, in admission order
     WeightFollower ◄── WeightChannel ◄── ActorUpdate

EngineHost and RolloutWorker are in this process or in one of their own (`runtime.rollout_process`): nobody else sees a
difference.

Nobody calls the next one. What each one consumes, produces, waits for, and who lets it go on:

    part            consumes             produces                 waits for                     until
    Feeder          the prompt stream    groups of prompts        room under the bound          a commit or an update
    RolloutWorker   prompts              completions, one by one  a free place in the engine    a sequence ends
    RewardWorker    completions          rewards                  completions                   a sequence ends
    ReferenceWorker completions          reference log-probs      completions                   a sequence ends
    ActorUpdate     whole scored groups  policy versions          the groups of its step        a reward arrives
    WeightFollower  policy versions      what the engine serves   a publication                 a step ends
    Evaluator       served versions      accuracy                 a version to evaluate         an update
    Watchdog        what is under way    alarms                   something that takes too long nobody

There is a ReferenceWorker only where there is a KL term (`kl_coef`). With `placement: colocated` the learner also waits
until the engine has finished what it generates, and the engine for the weights that the learner then makes.

The graph is not written down anywhere: a stage gets a sample as soon as the columns that it needs are there. Another
scoring stage is one entry in `stages`, its columns in `store.schema`, and one worker in `Pipeline`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from asyncflow.config import Config
from asyncflow.data import PromptStream, tokenise
from asyncflow.engines.base import LearnerEngine, ScorerEngine
from asyncflow.engines.weights.channel import WeightChannel
from asyncflow.plan import Plan
from asyncflow.rundir import DATA, LEDGER
from asyncflow.store.events import Opened
from asyncflow.store.schema import Schema, Stage
from asyncflow.store.store import EmbeddedStore
from asyncflow.types import Int32s, PolicyVersion, Prompt, Recorder, Sampling, Timeline
from asyncflow.workers.actor_update import ActorUpdate
from asyncflow.workers.alarms import Alarms
from asyncflow.workers.attestation import Attestation
from asyncflow.workers.base import Heartbeat, Worker
from asyncflow.workers.evaluator import Evaluator
from asyncflow.workers.feeder import Feeder
from asyncflow.workers.reference import ReferenceWorker
from asyncflow.workers.reward import RewardWorker
from asyncflow.workers.side import RolloutSide
from asyncflow.workers.watchdog import Watchdog
from asyncflow.workers.weights import WeightFollower


class Pipeline:
    """One run, wired and not yet started. `workers` run until the store closes; who runs them is the runtime's matter.

    It begins where the store is: at version 0, or where a resumed run goes on. Each part says in `timeline`, under the
    name of its worker, when it computes and what it waits for. `place` makes the rollout side, with the prompt of its
    canary, where the runtime wants it. `after_step` is called with each version that was
    committed and published, `on_done` once, after the last step.
    """

    def __init__(
        self,
        plan: Plan,
        store: EmbeddedStore,
        *,
        place: Callable[[Stage, Heartbeat, Int32s | None], RolloutSide],
        learner: LearnerEngine,
        reference: ScorerEngine | None,
        recorder: Recorder,
        timeline: Timeline,
        after_step: Callable[[PolicyVersion], None],
        on_done: Callable[[], None],
    ) -> None:
        config = plan.config
        assert config.rollout.timeout is not None, "a plan derives it"
        schema = Schema(stages(config))
        takes_turns = config.placement == "colocated"
        self.store = store
        self.heartbeat = Heartbeat(store)

        def tokens(prompt: Prompt) -> Int32s:
            return tokenise(prompt, plan.tokenizer)

        # Prompts are admitted as groups, as far ahead as max_staleness allows.
        self.prompts = PromptStream(plan.problems.train, seed=config.seed, shuffle=config.data.shuffle)
        at = store.counts()
        self.prompts.skip(at.admitted // config.num_generations)
        self.feeder = Feeder(self.prompts, tokens, self.store, timeline)

        # The rollout engine completes them, in this process or in one of its own.
        canary = tokens(plan.problems.train[0]) if config.attestation.samples else None
        side = place(schema.stages["rollout"], self.heartbeat, canary)
        self.host, self.rollout, self.rollouts, fresh = side.host, side.worker, side.rollouts, side.fresh

        # The reward functions score them.
        alarms = Alarms(recorder)
        self.reward = RewardWorker(
            schema.stages["reward"], self.store, self.heartbeat, timeline, reward=plan.reward, alarms=alarms
        )

        # A frozen policy says how likely their tokens were before any training, where there is a KL term.
        self.scorer = reference
        self.reference = None
        if reference is not None:
            self.reference = ReferenceWorker(
                schema.stages["reference"],
                self.store,
                self.heartbeat,
                timeline,
                engine=reference,
                max_rows=config.train_batch_size,
                max_tokens=config.reference.micro_batch_tokens,
                cores=config.reference.cores,
                turn=self.host.turn_when_idle if takes_turns else nullcontext,
            )

        # The learner trains them and publishes new weights.
        self.channel = WeightChannel(keep=config.weights.keep)
        self.engine = learner
        self.attestation = Attestation(learner, fresh, config=config, recorder=recorder, alarms=alarms)
        self.learner = ActorUpdate(
            schema.stages["actor_update"],
            self.store,
            self.heartbeat,
            timeline,
            engine=self.engine,
            channel=self.channel,
            recorder=recorder,
            attestation=self.attestation,
            config=config,
            generated_tokens=lambda: side.rollouts.generated_tokens,
            after_step=after_step,
            on_done=on_done,
            take_turn=self.host.suspend if takes_turns else None,
        )
        self.learner.version = at.learner

        # The weights go back into the rollout engine; some versions are evaluated on problems that nobody trains.
        self.evaluator = Evaluator(
            self.host,
            plan.problems.eval,
            tokens,
            reward=plan.reward,
            sampling=Sampling(max_new_tokens=config.max_new_tokens, temperature=0.0),
            recorder=recorder,
            timeline=timeline,
            every=config.eval_every,
            since=at.learner.n,
        )
        self.weights = WeightFollower(
            self.host,
            self.channel,
            self.store,
            recorder,
            timeline,
            mode=config.weights.update,
            on_served=self.evaluator.served,
            fresh=fresh,
        )

        # Somebody looks on: what takes too long is named, given back, and in the end stops the run.
        self.watchdog = Watchdog(
            self.store,
            self.host,
            side.rollouts,
            self.learner,
            alarms,
            rollout_timeout=config.rollout.timeout,
            stall_timeout=config.stall_timeout,
            resting=lambda: any(worker.drained for worker in self.workers),
        )

    def interrupt(self) -> None:
        """End what workers wait for, once they have been told to stop."""
        self.heartbeat.stop()
        self.watchdog.stop()
        self.host.cancel()

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Everything that has a loop of its own, in data order."""
        return (
            self.heartbeat,
            self.feeder,
            self.rollout,
            self.reward,
            *((self.reference,) if self.reference is not None else ()),
            self.learner,
            self.weights,
            self.evaluator,
            self.watchdog,
        )


def stages(config: Config) -> tuple[Stage, ...]:
    """The stages of a run, in data order: what each needs and writes is all that the store has to know."""
    reference = Stage(name="reference", role="score", needs=("prompt_ids", "response_ids"), writes=("ref_logprobs",))
    scored = ("reward", *(reference.writes if config.kl_coef else ()))
    return (
        Stage(
            name="rollout",
            role="generate",
            needs=("prompt_ids",),
            writes=("response_ids", "rollout_logprobs", "token_versions", "response", "finish_reason"),
        ),
        Stage(
            name="reward",
            role="score",
            needs=("prompt", "prompt_columns", "response", "response_ids"),
            writes=("reward", "reward_parts"),
        ),
        *((reference,) if config.kl_coef else ()),
        Stage(
            name="actor_update",
            role="train",
            needs=("prompt_ids", "response_ids", "rollout_logprobs", "token_versions", "finish_reason", *scored),
            sampler=config.sampler,
        ),
    )


def open_store(plan: Plan, run_dir: Path) -> EmbeddedStore:
    """The store of a new run, under the terms to which it holds everybody. Raises LedgerError."""
    config = plan.config
    terms = Opened(
        train_batch_size=config.train_batch_size,
        num_generations=config.num_generations,
        max_staleness=config.max_staleness,
        last_version=config.steps,
        min_group=2,
        max_attempts=3,
        resumable=bool(config.checkpoint.every),
        late_samples=config.late_samples,
        group_timeout=config.group_timeout,
        max_rows=config.store.max_rows,
        max_bytes=config.store.max_bytes,
    )
    durability = config.store.durability or ("process" if terms.resumable else "memory")
    data = None if durability == "memory" else run_dir / DATA
    return EmbeddedStore.create(
        Schema(stages(config)), terms, ledger=run_dir / LEDGER, data=data, durability=durability
    )


def reopen_store(plan: Plan, run_dir: Path, step: int) -> EmbeddedStore:
    """The store of a run that goes on from a step that it had made, under the terms of today's plan.

    Raises LedgerError, IllegalTransition.
    """
    config = plan.config
    store = EmbeddedStore.reopen(
        Schema(stages(config)),
        ledger=run_dir / LEDGER,
        data=run_dir / DATA,
        step=step,
        durability=config.store.durability or "process",
    )
    store.amend(max_staleness=config.max_staleness, last_version=config.steps)
    return store
