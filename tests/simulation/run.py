"""One life of a store from one seed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from dataclasses import replace as changed

from asyncflow.store.events import Opened
from asyncflow.store.journal import Durability
from asyncflow.store.schema import Schema
from tests.test_table_model import JUDGE, LOOK, POLICIES, REWARD, ROLLOUT, SAMPLERS, TRAIN, Broken, insist

from .actors import Learner, crew
from .network import Parts, Server
from .world import World

MODES: tuple[Durability, ...] = ("process", "power")


@dataclass
class Outcome:
    seeds: int = 0
    faults: Counter[tuple[str, str]] = field(default_factory=Counter)
    operations: int = 0
    steps: int = 0
    events: int = 0
    over: int = 0
    """Lives that ended because a power cut took what was promised to nobody."""


def make(seed: int, parts: Parts | None = None) -> tuple[World, Server]:
    parts, world = parts or Parts(), World(seed)
    chance = random.Random(seed ^ 0x5EED)
    judge = chance.random() < 0.3
    of_run = (ROLLOUT, REWARD, *((JUDGE, LOOK) if judge else ()), TRAIN)
    schema = Schema([changed(stage, sampler=chance.choice(SAMPLERS)) for stage in of_run])
    size = chance.randint(1, 3)
    terms = Opened(
        train_batch_size=size * chance.randint(1, 3),
        num_generations=size,
        max_staleness=chance.choice([0, 1, 1, 2]),
        last_version=None,
        min_group=chance.randint(1, size),
        max_attempts=chance.choice([2, 3, 5]),
        resumable=chance.random() < 0.7,
        late_samples=chance.choice(POLICIES),
        group_timeout=chance.choice([None, None, 4.0]),
    )
    server = Server(world, schema, terms, MODES[seed % 2], parts, parts.disk(world))
    return world, server


def live(seed: int, parts: Parts | None = None, *, storm: float = 9.0, calm: float = 12.0) -> tuple[World, Server]:
    """So many seconds in which things go wrong, and so many in which nothing does. Raises Broken."""
    world, server = make(seed, parts)
    try:
        _live(world, server, storm, calm)
    except Broken as error:
        raise Broken(f"seed {seed}, {server.durability}: {error}\n" + "\n".join(world.log[-40:])) from error
    finally:
        world.end()
    return world, server


def _live(world: World, server: Server, storm: float, calm: float) -> None:
    server.begin()
    actors = crew(world, server, judge=JUDGE.name in server.schema.stages)
    for actor in actors:
        server.on_power_cut.append(actor.killed)
        actor.start()
    learner = next(actor for actor in actors if isinstance(actor, Learner))
    for _ in range(3):
        world.sleep(storm / 3)
        if not server.terms.resumable or server.broker is None or world.chance.random() < 0.5:
            continue
        # The run ends as a whole, and goes on from a checkpoint.
        world.faults["run ends", "and goes on from a checkpoint"] += 1
        for actor in actors:
            actor.killed()
        server.die()
        server.come_back(step=learner.saved[-1])
    world.calm = True
    if server.broker is not None and server.journal.failed is not None:
        server.die()
    world.sleep(calm / 2)
    before = server.steps
    world.wait(lambda: server.steps > before, calm * 4)
    if server.over is None:
        server.check()
        server.check_waiting()
        insist(server.steps > before, "when nothing goes wrong any more, the work goes on", server.broker is not None)


def live_all(seeds: Iterable[int], parts: Parts | None = None) -> Outcome:
    outcome = Outcome()
    for seed in seeds:
        world, server = live(seed, parts)
        outcome.seeds += 1
        outcome.faults += world.faults
        outcome.operations += server.calls
        outcome.steps += server.steps
        outcome.events += len(server.file.lines)
        outcome.over += server.over is not None
    return outcome
