"""Which modules of a model have a weight that is read past their call.

An adapter runs when its host is called. Some models read a layer's weight without calling the layer: WavLM gives its
four projections to one function, Mamba multiplies by `dt_proj.weight`. An adapter there does nothing, and a merge then
changes the model in a way that the adapter never did.

Names cannot tell such layers, so a copy of the model runs once. It has the model's structure, but its tensors lie on
the meta device: they have shapes and no numbers. Its inputs are made from the model's config. While it runs, each read
of a weight is compared with the modules that are running.

Some models have no config, or one that does not say what they read. Then the model's own first forward pass is watched
in the same way (`noted`).
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftlab.core.forward import give_back
from peftlab.core.hooks import CHILD, base_modules, plain
from peftlab.core.parameters import Coded, step_aside
from peftlab.core.structure import structure_of

# A weight that a forward gives to a function as it is. In training, Mamba's fused kernels are called so.
PASSED = re.compile(r"(?<!isinstance)[(,=]\s*self\.(\w+)\.weight\b(?!\s*[.\[])")
# No tensor has a multiple of ROWS in front by chance: the lengths that follow are none.
ROWS, TOKENS, SOUND, FRAMES = 3, 5, 16_000, 3_001
KEPT = 128  # passes whose outcome is kept: sets of names; most by two structures, the model's and its copy's


class Calls(NamedTuple):
    """What one forward pass showed, by path.

    Attributes:
        called: modules that were called.
        past: modules whose weight was read while no module that has this weight was running.
        unreached: modules that were not called although they, modules in them, or others with their weight were used.
        without_rows: modules that were called with a tensor whose first dimension is not the batch's.
        asked: paths of parameters that were asked for while their module was not running, if only for their dtype.
        widths: the last dimension of what each module returned, or of the first of several tensors.
    """

    called: frozenset[str]
    past: frozenset[str]
    unreached: frozenset[str]
    without_rows: frozenset[str]
    asked: frozenset[str]
    widths: Mapping[str, int]


GUESSED = frozenset(
    {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}
)
Module = TypeVar("Module", bound=nn.Module)
SHOWN: dict[Hashable, Calls] = {}  # what a pass of a structure showed


def observed(root: nn.Module) -> Calls | None:
    """Run a copy of a transformers model on the meta device; None where no copy or no inputs can be made."""
    return observed_with(root)[0]


def observed_with(root: nn.Module) -> tuple[Calls | None, dict[str, Tensor]]:
    """Return what `observed` returns, and the inputs with which the copy came to its end."""
    try:
        plain_structure = structure_of(root, before_copy=True)
        for rows in (ROWS, 1):  # some models take one row only, a classifier without a padding token for one
            for inputs in made_inputs(root, rows):
                key = (plain_structure, pass_of(inputs, rows))
                calls = None if plain_structure is None else SHOWN.get(key)
                if calls is None:
                    calls = watched_once(meta_copy(root), inputs, rows)
                    if plain_structure is not None:
                        keep(key, calls)
                if calls is not None:
                    return calls, inputs
    except Exception:  # whatever a foreign model raises when it is copied or asked for its sizes
        return None, {}
    return None, {}


def watched_once(model: nn.Module, inputs: dict[str, Tensor], rows: int) -> Calls | None:
    """Return what `watch` shows; for a model that runs as one of the last ones did, what was shown then."""
    structure = structure_of(model)
    key = (structure, pass_of(inputs, rows))
    calls = None if structure is None else SHOWN.get(key)
    if calls is None:
        calls = watch(model, inputs, rows)
        if structure is not None:
            keep(key, calls)
    return calls


def pass_of(inputs: dict[str, Tensor], rows: int) -> Hashable:
    """Return what tells two passes of one model apart."""
    return tuple((name, value.shape, value.dtype) for name, value in inputs.items()), rows


def keep(key: Hashable, calls: Calls | None) -> None:
    """Remember what a pass showed, if it came to its end, and forget the oldest one where there are too many."""
    if calls is not None:
        while len(SHOWN) >= KEPT:
            SHOWN.pop(next(iter(SHOWN)), None)
        SHOWN[key] = calls


def passed_weights(root: nn.Module) -> set[str]:
    """Return the paths of modules whose weight their parent's `forward` gives to a function, as its source says."""
    paths = set()
    for path, module in root.named_modules():
        names = _passed(type(module).forward)
        paths |= {plain(f"{path}.{name}".lstrip(".")) for name in names if name in module._modules}
    return paths


@functools.lru_cache(1024)
def _passed(forward: Callable) -> frozenset[str]:
    try:
        return frozenset(PASSED.findall(inspect.getsource(forward)))
    except (OSError, TypeError):  # written in C, or typed into a session
        return frozenset()


def meta_copy(root: nn.Module) -> nn.Module:
    """Return a model of the same structure without numbers, hooks and adapters, ready to be evaluated."""
    return meta_copies(root, ())[0]


def meta_copies(root: nn.Module, parts: Sequence[Module]) -> tuple[nn.Module, list[Module]]:
    """Return the `meta_copy` of a model, and copies without numbers of parts that are to stand on it."""
    known: dict[int, Any] = {}
    for part in parts:
        for tensor in (*part.parameters(), *part.buffers()):
            empty = torch.empty_like(tensor, device="meta", requires_grad=False)
            trains = tensor.requires_grad
            known[id(tensor)] = nn.Parameter(empty, trains) if isinstance(tensor, nn.Parameter) else empty
    for module in root.modules():
        known[id(vars(module).get("_peftlab"))] = None
        if CHILD in module._modules:
            known[id(module._modules[CHILD])] = None
        if "_hf_hook" in vars(module) or "_orig_mod" in module._modules:
            raise TypeError("A module that is offloaded or compiled is not copied.")
        weight = module._parameters.get("weight")
        state = getattr(weight, "quant_state", None)
        if state is not None:
            bias = module._parameters.get("bias") is not None
            dtype = state.dtype if isinstance(state.dtype, torch.dtype) else None
            inside, outside = int(getattr(module, "in_features", 0)), int(getattr(module, "out_features", 0))
            known[id(module)] = nn.Linear(inside, outside, bias, device="meta", dtype=dtype)
            continue
        for parameter in module._parameters.values():
            if isinstance(parameter, Coded):
                state = parameter.quant_state
                empty = torch.empty(tuple(state.shape), dtype=state.dtype, device="meta")
                known[id(parameter)] = nn.Parameter(empty, False)
        for name, table in vars(module).items():
            if "_hooks" in name and isinstance(table, dict):  # copied one by one, they would take most of the time
                known[id(table)] = type(table)()
        own = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        for tensor in own:
            if isinstance(tensor, Tensor) and id(tensor) not in known:
                empty = torch.empty_like(tensor, device="meta", requires_grad=False)
                known[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    other: Any
    other, copies = copy.deepcopy((root, list(parts)), known)
    for module in other.modules():
        for child in [name for name, child in module._modules.items() if name == CHILD]:
            del module._modules[child]
        give_back(module)
        step_aside(module)
    if "flash" in str(getattr(getattr(other, "config", None), "_attn_implementation", "")):
        other.set_attn_implementation("sdpa")
    return other.eval(), copies


def made_inputs(root: nn.Module, rows: int) -> Iterator[dict[str, Tensor]]:
    """Yield inputs for a model's forward, without numbers, the likeliest first."""
    config, name = getattr(root, "config", None), getattr(root, "main_input_name", None)
    if config is None or name is None:
        return
    takes = inspect.signature(root.forward).parameters
    inner = [getattr(config, part, None) for part in ("vision_config", "encoder", "audio_config")]

    def setting(names: str, default: Any) -> Any:
        values = (getattr(c, field, None) for c in (config, *inner) if c is not None for field in names.split())
        return next((value for value in values if value is not None), default)

    def zeros(*shape: int, whole: bool = False) -> Tensor:
        return torch.zeros(shape, dtype=torch.long if whole else dtype, device="meta")

    dtype = next((p.dtype for p in root.parameters() if p.is_floating_point()), torch.float32)
    size = setting("image_size", 224)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    picture = zeros(rows, setting("num_channels", 3), height, width)
    bins = setting("num_mel_bins input_feat_per_channel feature_size", 80)
    frames = 2 * setting("max_source_positions", FRAMES // 2)
    shapes = {
        "input_ids": [zeros(rows, TOKENS, whole=True)],
        "pixel_values": [picture],
        "input_values": [zeros(rows, SOUND), zeros(rows, setting("max_length", 1024), bins)],
        "input_features": [zeros(rows, bins, frames), zeros(rows, FRAMES, bins)],
    }
    answer = {"decoder_input_ids": zeros(rows, TOKENS, whole=True)} if "decoder_input_ids" in takes else {}
    for tensor in shapes.get(name, ()):
        yield {name: tensor, **answer}
    if name == "input_ids" and "pixel_values" in takes:
        yield {name: shapes[name][0], "pixel_values": picture, **answer}
    if name == "pixel_values" and "input_ids" in takes:
        yield {name: picture, "input_ids": shapes["input_ids"][0]}


@contextmanager
def copied_pass(model: nn.Module) -> Iterator[tuple[dict[str, str], list[Any]]]:
    """Let a copy without numbers run inside the block, blocks of one structure once.

    A pass may draw numbers even when it is evaluated (for layers left out, say): the person's run does not see it.
    Yields what `skip_twins` returns, and a list of the operations whose answer was a guess.
    """
    twins = skip_twins({plain(path): module for path, module in model.named_modules()}, all_alike=True)
    reads = _ReadsWithoutNumbers({}, {}, set())
    with torch.random.fork_rng(devices=[]), _quiet(), reads, torch.enable_grad():
        yield twins, reads.guessed


@torch.no_grad()
def watch(model: nn.Module, inputs: dict[str, Tensor], rows: int) -> Calls | None:
    """Run a model whose numbers do not matter, and note which modules are called and which weights are read.

    Returns None for a pass that does not reach its end.
    """
    without_rows: set[str] = set()
    asked: set[str] = set()
    widths: dict[str, int] = {}
    modules = {plain(path): module for path, module in model.named_modules()}
    for path, module in modules.items():
        module.register_forward_pre_hook(_rows_of(path, rows, without_rows), with_kwargs=True)
        module.register_forward_hook(_width_of(path, widths))
    twins = skip_twins(modules)
    # A pass may draw numbers even when it is evaluated (for layers left out, say): the person's run does not see it.
    with torch.random.fork_rng(devices=[]), _quiet(), noted(model, _ReadsWithoutNumbers) as seen:
        for path, module in modules.items():
            if module._parameters:
                module.__dict__["_parameters"] = _Asked(module._parameters, path, seen.running, asked)
        try:
            model(**inputs)
        except Exception:
            return None
    for path, first in twins.items():
        if path in seen.called:
            for paths in (seen.called, seen.past, without_rows, asked):
                paths.update([path + name[len(first) :] for name in paths if name.startswith(first + ".")])
            widths |= {path + name[len(first) :]: w for name, w in widths.items() if name.startswith(first + ".")}
    called, past, unreached = frozenset(seen.called), frozenset(seen.past), seen.unreached()
    return Calls(called, past, unreached, frozenset(without_rows), frozenset(asked), widths)


class Seen:
    """What is noted while a model runs.

    Attributes:
        modules: the model's modules by path.
        running: how many calls of each module have begun and not ended.
        called, past: as in `Calls`.
        sharing: lists of the modules that have one weight.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = base_modules(model)
        sharing: dict[int, list[str]] = {}
        for path, module in self.modules.items():
            if module._parameters.get("weight") is not None:
                sharing.setdefault(id(module._parameters["weight"]), []).append(path)
        self.sharing = [paths for paths in sharing.values() if len(paths) > 1]
        self.running: dict[str, int] = dict.fromkeys(self.modules, 0)
        self.called: set[str] = set()
        self.past: set[str] = set()

    def unreached(self) -> frozenset[str]:
        """Return modules that were not called although they, modules in them, or others with their weight were used.

        A module that the pass left out is none of these: neither was it called, nor was its weight read.
        """
        used = self.called | self.past
        used |= {path for paths in self.sharing if not used.isdisjoint(paths) for path in paths}
        above = {path.rsplit(".", n)[0] for path in used for n in range(path.count(".") + 1)}
        lists = {path for path, module in self.modules.items() if type(module).forward is nn.Module.forward}
        return frozenset((used | above) - self.called - lists)


@contextmanager
def noted(model: nn.Module, reads: type[_Reads] | None = None) -> Iterator[Seen]:
    """Note which modules are called and which weights are read inside the block. Afterwards the hooks are gone."""
    seen = Seen(model)
    owners: dict[int, list[str]] = {}
    kept, handles = [], []  # a storage that is kept alive shares its address with no other
    for path, module in seen.modules.items():
        for parameter in module._parameters.values():
            storage = None if parameter is None else _storage(parameter)
            if storage is not None:
                kept.append(storage)
                owners.setdefault(storage._cdata, []).append(path)
        if not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_pre_hook(_counter(seen.running, path, 1, seen.called)))
            handles.append(module.register_forward_hook(_counter(seen.running, path, -1)))
    try:
        with (reads or _Reads)(owners, seen.running, seen.past):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def can_be_noted(model: nn.Module) -> bool:
    """Say whether a pass of this very model can be watched.

    It cannot be under `torch.compile`, in a replica of DataParallel, or where others gather its weights before use.
    """
    if hasattr(model, "_is_replica"):
        return False
    for module in model.modules():
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            return False
        for parameter in module._parameters.values():
            if parameter is not None and (hasattr(parameter, "ds_id") or hasattr(parameter, "placements")):
                return False  # of DeepSpeed, and of FSDP
    return True


def skip_twins(modules: dict[str, nn.Module], all_alike: bool = False) -> dict[str, str]:
    """Let only the first of several blocks of one structure run; the others return what it returned, to save time.

    Args:
        all_alike: skip only in lists of one structure. Elsewhere a block that is skipped would cut off what comes
            between it and the one that runs for it.

    Returns {path of a block that does not run: path of the one that runs for it}.
    """
    twins: dict[str, str] = {}
    for path, blocks in modules.items():
        if not isinstance(blocks, nn.ModuleList) or any(path.startswith(twin + ".") for twin in twins):
            continue
        if all_alike and len({_structure(block) for block in blocks}) > 1:
            continue
        first: dict[tuple, str] = {}
        for name, block in blocks.named_children():
            here = f"{path}.{name}".lstrip(".")
            twin = first.setdefault(_structure(block), here)
            if twin == here:
                block.register_forward_hook(_keep)
            else:
                twins[here] = twin
                block.forward = _Result(modules[twin])
    return twins


def _structure(block: nn.Module) -> tuple:
    shapes = {name: parameter.shape for name, parameter in block.named_parameters(remove_duplicate=False)}
    return tuple((name, type(module)) for name, module in block.named_modules()), tuple(shapes.items())


def _keep(block: nn.Module, _: Any, output: Any) -> None:
    block.__dict__["_output"] = output


class _Asked(dict[str, Any]):
    """A module's table of parameters that notes which are asked for while the module is not running."""

    def __init__(self, own: Mapping[str, Any], path: str, running: dict[str, int], asked: set[str]) -> None:
        super().__init__(own)
        self.path, self.running, self.asked = path, running, asked

    def __getitem__(self, name: str) -> Any:
        if not self.running[self.path]:
            self.asked.add(f"{self.path}.{name}".lstrip("."))
        return super().__getitem__(name)


class _Result:
    """A forward that returns what another block returned last."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self.block.__dict__["_output"]


def _counter(running: dict[str, int], path: str, step: int, called: set[str] | None = None) -> Any:
    def hook(*_: Any) -> None:
        running[path] += step
        if called is not None:
            called.add(path)

    return hook


def _rows_of(path: str, rows: int, without: set[str]) -> Any:
    def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
        first = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        if first is not None and (first.dim() == 0 or first.shape[0] % rows):
            without.add(path)

    return hook


def _width_of(path: str, widths: dict[str, int]) -> Any:
    def hook(_: nn.Module, __: tuple, output: Any) -> None:
        first = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
        if first is not None and first.dim():
            widths[path] = first.shape[-1]

    return hook


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a tensor of a foreign kind that has none
        return None


class _Reads(TorchDispatchMode):
    """Notes each weight that an operation reads while none of its owners is running."""

    def __init__(self, owners: dict[int, list[str]], running: dict[str, int], past: set[str]) -> None:
        super().__init__()
        self.owners, self.running, self.past = owners, running, past

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                storage = _storage(leaf)
                paths = None if storage is None else self.owners.get(storage._cdata)
                if paths is not None and not any(self.running[path] for path in paths):
                    self.past.update(paths)
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Return what the operation gives."""
        return func(*args, **kwargs)


class _ReadsWithoutNumbers(_Reads):
    """The same on the meta device. What a model asks of numbers that are not there gets an answer here."""

    def __init__(self, owners: dict[int, list[str]], running: dict[str, int], past: set[str]) -> None:
        super().__init__(owners, running, past)
        self.guessed: list[Any] = []

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if func in GUESSED:
            self.guessed.append(func)
        # Either answer lets the model go on.
        if func is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype is torch.bool or 1
        if func is torch.ops.aten.nonzero.default:
            return torch.empty(1, args[0].dim(), dtype=torch.long, device=args[0].device)
        if func is torch.ops.aten.equal.default:
            return True
        if func is torch.ops.aten._grouped_mm.default:  # all experts at once; on meta it takes bfloat16 alone
            return args[0].new_empty(args[0].shape[0], args[1].shape[-1])
        return func(*args, **kwargs)
