"""One card's executor: an order in, result files and their score out, or an error by fault.

    run ─ parse ─ recipe ─ parts near ─ adapters on ─ compute ─ adapters off ─ checks ─ score
                             └── out of memory: free the card, once more ──┘

One thread runs orders (what it waits for is computed in a thread of the engine's own); any thread
may ask for `state`, and one other may `prefetch`. The same order gives the same bits cold, warm,
after any other order, with little memory left and in another process: deterministic algorithms, no
TF32, everything seeded, and a part that an order may have changed is thrown away.

Whatever isn't understood is the device's fault (`DeviceFault`), never the task's: `except
Exception` stands only here, at the top.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from time import monotonic
from typing import Final, TypeVar

import torch
from safetensors import SafetensorError

from cluster.core.errors import (
    Cancelled,
    ClusterError,
    DeviceFault,
    DeviceFaultKind,
    ModelUnavailable,
    ModelUnavailableKind,
)
from cluster.core.ports import CardUse, Computed, Order
from cluster.core.types import GpuClass, Score, Tier
from cluster.inference import adapters, canary, cuda, language, lora, own_settings, parts, prompts
from cluster.inference.determinism import make_deterministic
from cluster.inference.devices import Device
from cluster.inference.diffusion import Made, encode, make_images
from cluster.inference.finite import first_broken
from cluster.inference.llm_parameters import LLMParameters
from cluster.inference.orders import check_wanted, loaded_by_default, parsed
from cluster.inference.parameters import Parameters, SDParameters
from cluster.inference.parts import PartKey, PartSource
from cluster.inference.pipelines import FittingsShelf
from cluster.inference.pool import Counts, MeasuredBudget, Pool, fixed
from cluster.inference.recipes import (
    LANGUAGE_ROLE,
    LanguageRecipe,
    Recipe,
    language_recipe_for,
    recipe_for,
)
from cluster.inference.referee import Copied, copied_bare, judged
from cluster.inference.scoring import score_llm
from cluster.models.store import ModelStore

MOST_RECIPES: Final = 256
READ_AHEAD: Final = 8 * 2**20
Check = Callable[[], None]
OnStep = Callable[[int, int], None]
Files = tuple[tuple[str, bytes], ...]
AnyRecipe = TypeVar("AnyRecipe", Recipe, LanguageRecipe)


@dataclass(frozen=True, slots=True)
class EngineState:
    """A moment's view. `warm` holds pipeline keys, the other two base models' keys.

    `in_host_memory` names what needn't come from disk, the warm ones among it.
    """

    warm: frozenset[str] = frozenset()
    in_host_memory: frozenset[str] = frozenset()
    on_disk: frozenset[str] = frozenset()
    step: int = 0
    steps: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes for parts on the device and in host memory; CPU threads for torch.

    `device_bytes` None: as measured, on a simulated card 0.7 of its VRAM. `threads` None leaves
    torch's own choice; results depend on it. `loading_threads` are those that read models, where
    they are others: copies and roundings are the same by any number.
    """

    device_bytes: int | None = None
    host_bytes: int = 8 * 2**30
    threads: int | None = None
    loading_threads: int | None = None


class Engine:
    """`clock` is the machine's unix time, by which an order's deadline is judged. With `full_loras`
    a LoRA is put on wholly, whatever weight its task gives it.

    Raises `DeviceFault` for a card that torch can't compute on.
    """

    def __init__(
        self,
        device: Device,
        store: ModelStore,
        clock: Callable[[], float],
        limits: Limits = Limits(),  # noqa: B008 - frozen
        full_loras: bool = False,
    ) -> None:
        make_deterministic(limits.threads)
        self._device = device
        self._torch_device = torch.device(device.torch_device)
        if self._torch_device.type == "cuda":
            cuda.check(device)
        self.store = store
        self._clock = clock
        self._full_loras = full_loras
        self._loading_threads = limits.loading_threads
        self._measured: MeasuredBudget | None = None
        budget = fixed(limits.device_bytes or int(device.gpu_class.vram * 2**30 * 0.7))
        if limits.device_bytes is None and self._torch_device.type == "cuda":
            budget = self._measured = MeasuredBudget(self._torch_device)
        load = functools.partial(parts.load, device=self._torch_device)
        self._pool = Pool(load, self._torch_device, budget, limits.host_bytes)
        self._shelf = FittingsShelf()
        self._recipes: OrderedDict[str, Recipe | LanguageRecipe] = OrderedDict()
        self._encoder, self._thread = _one_thread("encode"), _one_thread("compute")
        self._state = EngineState(on_disk=store.on_disk())
        self._loaded = (0.0, Tier.DEVICE)
        self._has_run = False
        self._preloaded: dict[str, tuple[PartSource, ...]] = {}

    @property
    def gpu_class(self) -> GpuClass:
        return self._device.gpu_class

    @property
    def counts(self) -> Counts:
        """What the pool has moved so far."""
        return self._pool.counts

    def state(self) -> EngineState:
        return self._state

    def usage(self) -> CardUse:
        counts, where = self._pool.counts, self._pool.where()
        return CardUse(
            where.device_bytes,
            where.host_bytes,
            counts.loads,
            counts.returns,
            counts.left_device,
            counts.left_host,
            spoilt=counts.spoilt,
        )

    def run(self, order: Order, cancelled: Callable[[], bool], on_step: OnStep) -> Computed:
        """Compute one order; blocks. `on_step` gets (steps done, steps in all), after each step
        and again between the pieces of what is read, before the first step as (0, 0).

        Raises `TaskInvalid`, `TaskUnsupported`, `DeviceFault`, `ModelUnavailable`, `Cancelled` or
        `DeadlinePassed`, and nothing else.
        """
        began = monotonic()
        with self._faults_named():
            files, score = self._run(order, cancelled, on_step)
            ready_at, tier = self._loaded
            return Computed(score, files, monotonic() - began, max(0.0, ready_at - began), tier)

    def distrust(self) -> None:
        """Forget all that was read, the copies in host memory too. For the thread that runs orders.

        Nothing is lost of what no order has computed with yet: it has just been read.
        """
        if self._has_run:
            near = self._pool.where()
            self._discard(near.device | near.host)

    def preload(
        self, models: Sequence[str], look: Callable[[], None] = lambda: None
    ) -> tuple[str, ...]:
        """Bring these base models (`name[+variant]`) to the card, and keep them there for as long
        as their files stay as they are.

        What can't be had is left out; a line for the operator says why. `look` is called between
        the pieces of what is read; to give way to something else it raises `Cancelled`, which
        comes through.
        """
        problems: list[str] = []
        for model in models:
            try:
                with self._faults_named(), parts.looking(look):
                    needed = self._parts_of(loaded_by_default(model, self.store))
                    self._check_room_to_keep(needed)
                    self._hold({part.key: part for part in needed})
                    self._preloaded = {**self._preloaded, model: needed}
            except Cancelled:
                raise
            except ClusterError as error:
                problems.append(f"{model}: {error}")
        return tuple(problems)

    def _check_room_to_keep(self, more: Sequence[PartSource]) -> None:
        """What is kept never leaves, and so mustn't need the room that computing does."""
        self._keep_what_is_as_seen()
        kept = {part.key: part for each in (*self._preloaded.values(), more) for part in each}
        size, room = sum(part.device_size for part in kept.values()), self._pool.budget()
        if size > room:
            raise DeviceFault(
                DeviceFaultKind.OUT_OF_MEMORY,
                f"no room: with what is kept it takes {size / 2**30:.1f} GiB on the card, which has"
                f" {room / 2**30:.1f} for models",
            )

    @property
    def preloaded(self) -> frozenset[str]:
        """What `preload` has brought and is kept. Any thread may ask."""
        return frozenset(self._preloaded)

    def prefetch(self, order: Order, wanted: Callable[[], bool]) -> None:
        """Read an order's weights into host memory, while another thread computes.

        Reads the files through and does nothing else: what the libraries do as they load changes
        torch's defaults for all threads. The system's file cache keeps them until they are loaded.
        Raises what `run` would raise for models that aren't there, and `Cancelled`.
        """

        def look() -> None:
            if not wanted():
                raise Cancelled("not wanted any more")

        near = self._pool.where()
        with parts.looking(look):
            needed = self._parts_of(parsed(order))
        for part in needed:
            if part.key not in near.device | near.host:
                for file in part.files:
                    with file.open("rb", buffering=0) as stream:
                        while wanted() and stream.read(READ_AHEAD):
                            pass

    def _parts_of(self, params: Parameters) -> tuple[PartSource, ...]:
        if isinstance(params, LLMParameters):
            return (language_recipe_for(params, self.store).model,)
        return tuple(recipe_for(params, self.store).parts.values())

    # --- one order -------------------------------------------------------------------------------

    @contextmanager
    def _faults_named(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            fault = cuda.named(error, self._torch_device)
            if fault is error:
                raise
            raise fault from error
        finally:
            self._note(step=0, steps=0)

    def _run(
        self, order: Order, cancelled: Callable[[], bool], on_step: OnStep
    ) -> tuple[Files, Score]:
        params = parsed(order)

        def check() -> None:
            check_wanted(order.deadline, cancelled, self._clock)

        reached = (0, 0)

        def look() -> None:
            """Between the pieces of what is read: it goes on, as long as it is wanted."""
            on_step(*reached)
            check()

        self._prepare(order, look)

        def progress(step: int, steps: int) -> None:
            nonlocal reached
            reached = (step, steps)
            self._note(step=step, steps=steps)
            on_step(step, steps)
            check()

        def compute() -> tuple[Files, Score]:
            nonlocal reached
            reached = (0, 0)
            with parts.looking(look):
                if isinstance(params, LLMParameters):
                    return self._text(params, check, progress)
                return self._images(params, check, progress)

        made = None
        try:
            made = self._apart(compute)
        except Exception as error:
            if not cuda.is_out_of_memory(error):
                raise
        if made is None:  # out of the handler, which would keep the failed run's tensors alive
            self._pool.clear()
            self._preloaded = {}
            made = self._apart(compute)
        check()
        return made

    def _apart(self, compute: Callable[[], tuple[Files, Score]]) -> tuple[Files, Score]:
        """In a thread of the engine's own: another one from when memory ran short, because what
        cuDNN made do with then stays with the thread."""
        before = cuda.shortages(self._torch_device)
        try:
            return self._thread.submit(compute).result()
        finally:
            if cuda.shortages(self._torch_device) > before:
                self._thread.shutdown()
                self._thread = _one_thread("compute")

    def _text(self, params: LLMParameters, check: Check, progress: OnStep) -> tuple[Files, Score]:
        check()
        recipe = self._remember(language_recipe_for(params, self.store))
        with parts.disk(recipe.model.folder):
            language.refuse_code(recipe.model.folder)
            own_settings.refuse(recipe.model.folder)
            tokenizer = self._shelf.tokenizer(recipe.model.folder)
        model = self._bring(recipe.parts)[LANGUAGE_ROLE]
        self._note(step=0, steps=0)
        check()
        copied = functools.partial(copied_bare, recipe.parts)
        with self._bad_results_blamed(recipe, copied), self._workspace_measured():
            prompt, made = language.generate(model, tokenizer, params, progress)
        file = language.result_file(language.response(tokenizer, params, prompt, made))
        return ((language.FILE, file),), score_llm(file)

    def _images(self, params: SDParameters, check: Check, progress: OnStep) -> tuple[Files, Score]:
        check()
        prompts.check(params)
        recipe = self._remember(recipe_for(params, self.store))
        copied = functools.partial(adapters.copied, recipe, params, self._shelf, self._full_loras)
        with self._bad_results_blamed(recipe, copied):
            return self._images_of(recipe, params, check, progress)

    def _images_of(
        self, recipe: Recipe, params: SDParameters, check: Check, progress: OnStep
    ) -> tuple[Files, Score]:
        modules = self._bring(recipe.parts)
        self._note(step=0, steps=0)
        check()
        encoding: list[Future[tuple[bytes, bytes]]] = []

        def deliver(made: Made) -> None:
            """Files are written while the card goes on with the next image."""
            encoding.append(self._encoder.submit(encode, made, params))

        try:
            with (
                self._workspace_measured(),
                adapters.adapted(
                    recipe, params, self._shelf, self._full_loras, modules
                ) as pipeline,
            ):
                make_images(pipeline, params, progress, deliver)
        finally:
            self._throw_away_what_changed(recipe, modules)
        made = [future.result() for future in encoding]
        files = tuple((f"{index}.png", content) for index, (content, _) in enumerate(made))
        return files, Score(b"".join(hashed for _, hashed in made))

    def _bring(self, parts: Mapping[str, PartSource]) -> dict[str, torch.nn.Module]:
        """The pool's `hold`; when it was done, and from where the farthest part came."""
        loads, returns = self._pool.counts.loads, self._pool.counts.returns
        modules = self._hold(parts)
        tier = Tier.DEVICE
        if self._pool.counts.loads > loads:
            tier = Tier.DISK
        elif self._pool.counts.returns > returns:
            tier = Tier.HOST
        self._loaded = (monotonic(), tier)
        return modules

    def _hold(self, parts: Mapping[str, PartSource]) -> dict[str, torch.nn.Module]:
        self._keep_what_is_as_seen()
        # Of a weight that found no room as it was quantized the library says that it is missing.
        with self._loading(), cuda.shortage_raised(self._torch_device):
            return self._pool.hold(parts)

    def _keep_what_is_as_seen(self) -> None:
        self._preloaded = {
            name: needed
            for name, needed in self._preloaded.items()
            if all(part.is_as_seen() for part in needed)
        }
        self._pool.kept = {part.key for needed in self._preloaded.values() for part in needed}

    def _prepare(self, order: Order, look: Callable[[], None]) -> None:
        """A canary says nothing about the weights that tasks are computed with, its own model's
        aside: before it, all that is near the card is proven. Raises `DeviceFault`."""
        if order.task == canary.TASK:
            with self._loading():
                spoilt = self._pool.verify(look)
            if spoilt:
                self._discard(spoilt.keys())
                raise DeviceFault(DeviceFaultKind.MEMORY_CHANGED, "; ".join(spoilt.values()))
        if order.afresh:
            self.distrust()
        self._has_run = True

    @contextmanager
    def _loading(self) -> Iterator[None]:
        computing = torch.get_num_threads()
        torch.set_num_threads(self._loading_threads or computing)
        try:
            yield
        finally:
            torch.set_num_threads(computing)

    def _remember(self, recipe: AnyRecipe) -> AnyRecipe:
        self._recipes[recipe.key] = recipe
        self._recipes.move_to_end(recipe.key)
        while len(self._recipes) > MOST_RECIPES:
            self._recipes.popitem(last=False)
        return recipe

    def _throw_away_what_changed(
        self, recipe: Recipe, modules: Mapping[str, torch.nn.Module]
    ) -> None:
        changed = {
            recipe.parts[role].key for role, module in modules.items() if not lora.is_bare(module)
        } | self._pool.changed(recipe.parts)
        if changed:
            self._discard(changed)

    def _discard(self, keys: Set[PartKey]) -> None:
        self._pool.discard(keys)
        self._preloaded = {
            name: needed
            for name, needed in self._preloaded.items()
            if keys.isdisjoint(part.key for part in needed)
        }

    @contextmanager
    def _bad_results_blamed(
        self, recipe: Recipe | LanguageRecipe, copied: Copied
    ) -> Iterator[None]:
        """On the model where its weights hold no numbers: of such any card makes nothing; on nobody
        where the CPU makes nothing of the same either. Else its parts may be what has gone bad, the
        copies in host memory too: they go in any case."""
        try:
            yield
        except DeviceFault as fault:
            if fault.kind is not DeviceFaultKind.BAD_RESULT:
                raise
            self._discard(recipe.part_keys())
            try:
                broken = first_broken(recipe.weights(), parts.look)
            except (OSError, SafetensorError):  # it was read a moment ago: nothing is known of it
                raise fault from None
            if broken is None:
                raise judged(fault, copied, self._loading_threads) from fault
            line = f"{broken.parent.name}/{broken.name} holds what are no finite numbers: {fault}"
            raise ModelUnavailable(ModelUnavailableKind.DAMAGED, line) from fault

    @contextmanager
    def _workspace_measured(self) -> Iterator[None]:
        """Raises `ShortOfMemory` where the workspace wasn't to be had, whatever came of it."""
        with cuda.shortage_raised(self._torch_device):
            if self._measured is None:
                yield
                return
            torch.cuda.reset_peak_memory_stats(self._torch_device)
            before = torch.cuda.memory_allocated(self._torch_device)
            yield
        self._measured.computed(torch.cuda.max_memory_allocated(self._torch_device) - before)

    def _note(self, step: int, steps: int) -> None:
        """Replaces the whole state at once, so that another thread never sees half of it."""
        if step:
            self._state = replace(self._state, step=step, steps=steps)
            return
        near = self._pool.where()
        recipes = self._recipes.values()
        on_disk = self._state.on_disk
        with suppress(OSError):  # something is being moved there; it is looked at again
            on_disk = self.store.on_disk()
        self._state = EngineState(
            warm=frozenset(r.key for r in recipes if r.part_keys() <= near.device),
            in_host_memory=frozenset(
                r.base_key for r in recipes if r.base_part_keys() <= near.device | near.host
            ),
            on_disk=on_disk,
        )


def _one_thread(name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
