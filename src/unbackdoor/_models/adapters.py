"""PEFT LoRA adapters: checked, put on their base, and written again as what they were."""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unbackdoor._errors import UnbackdoorError, few, printable
from unbackdoor._inputs import CONFIG, check_file, exists, read_json
from unbackdoor._models.arithmetic import HALF
from unbackdoor._models.hugging_face import quiet_transformers
from unbackdoor._models.lora_alphas import alphas
from unbackdoor._models.untrusted_weights import check_finite, check_safetensors
from unbackdoor._models.weight_files import WeightFiles

logger = logging.getLogger("unbackdoor")

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
# Only tensors are built from the pickle.
_CONVERSION = (
    'python -c "import torch, safetensors.torch as s; '
    f"s.save_file(torch.load('adapter_model.bin', 'cpu', weights_only=True), '{WEIGHTS_FILE}')\""
)
# The entries of a plain LoRA adapter's config; anything else in it must be empty or switched off.
_SAID = {
    *(
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "peft_version",
        "auto_mapping",
    ),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out", "use_rslora"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "init_lora_weights", "bias"),
    "modules_to_save",  # checked by itself
    *("megatron_core", "qalora_group_size"),  # have a value even where what they belong to is off
    "eva_config",  # says how the matrices began
}
# Ways to begin that leave the base as it is; others (pissa, olora, loftq, ...) also change it.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Adapters that add inputs or layers; there is nothing to add to the weights of the base.
_NOT_MERGED = (
    *("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT"),
    *("CARTRIDGE", "POLY", "SHADOW", "XLORA"),
)
# Entries of the config of a LoRA adapter that cannot be added to the weights of its base either, and what it does.
_SELECTIVE = {
    "alora_invocation_tokens": "acts behind certain tokens alone",
    "arrow_config": "chooses among other adapters for each token",
    "layer_replication": "repeats layers of its base",
}
_CAUSAL = re.compile("ForCausalLM|LMHeadModel")  # in the names of classes
_LARGEST = 4096  # of a rank
_LONGEST = 300  # characters of a layer's name
_MOST_CLASSES = 10_000
_NAMED_PARTS = ("A.default.weight", "B.default.weight")  # as they are called in a model
OUTPUTS = ("lm_head.", "embed_out.")  # that files leave out if they are the embeddings
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
_MAGNITUDE = ".lora_magnitude_vector"  # of a layer, behind its name: the lengths that DoRA trains
_HEADS = ("classifier", "score")  # that peft saves whole with an adapter of a text classifier
_CLASS_SCORES = ("classifier.weight", "score.weight", "classifier.out_proj.weight")  # have a row for each class


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter."""
    return exists(path / CONFIG_FILE)


def named_task(path: Path) -> str | None:
    """The task that an adapter's config names; None if its script named none, as many for language models do.

    Raises:
        UnbackdoorError: it is not one of a language model or of a text classifier.
    """
    config = read_json(path / CONFIG_FILE, CONFIG)
    task, mapping = config.get("task_type"), config.get("auto_mapping")
    of = mapping.get("base_model_class") if isinstance(mapping, dict) else None  # peft writes it without a task
    if task not in (None, "CAUSAL_LM", "SEQ_CLS") or (task is None and of and not _CAUSAL.search(str(of))):
        what = f"the task {printable(str(task))}" if task is not None else f"a model of the class {printable(str(of))}"
        raise UnbackdoorError(
            f"{path} is an adapter for {what}; only those for CAUSAL_LM and SEQ_CLS are supported. Merge it into "
            "its base (merge_and_unload of peft) and give the result."
        )
    return None if task is None else str(task)


def _of_classifier(config: Mapping[str, Any]) -> bool:
    return config.get("task_type") == "SEQ_CLS"


def class_count(path: Path) -> int | None:
    """The number of classes of a text classifier that a directory holds an adapter of; None for a language model.

    Raises:
        UnbackdoorError: the adapter of a classifier has no head, or a file is damaged.
    """
    if not _of_classifier(read_json(path / CONFIG_FILE, CONFIG)):
        return None
    head = _head(_weights(path))
    scores = next((head[name] for name in _CLASS_SCORES if name in head), None)
    if scores is None or scores.ndim != 2 or not 2 <= len(scores) <= _MOST_CLASSES:
        raise UnbackdoorError(
            f"{path} is an adapter of a classifier and must hold its head, of 2 to {_MOST_CLASSES:,} classes, as "
            "modules_to_save of peft does. Merge it into its classifier (merge_and_unload of peft) and give the result."
        )
    return len(scores)


class AdapterFiles(NamedTuple):
    """The files of an adapter that was checked, without its base.

    Args:
        path: the directory.
        config: the content of `adapter_config.json`.
        factors: for each layer A, (rank, inputs), and B, (outputs, rank).
        scales: for each layer the factor of B A.
    """

    path: Path
    config: Mapping[str, Any]
    factors: Mapping[str, tuple[Tensor, Tensor]]
    scales: Mapping[str, float]


def adapter_files(path: Path, base: WeightFiles | None = None) -> AdapterFiles:
    """Reads the files of an adapter.

    Args:
        path: its directory.
        base: the weights of the model below it; copies of these that peft stored with the adapter are left out.

    Raises:
        UnbackdoorError: the adapter is not a plain LoRA adapter, or a file is damaged.
    """
    named_task(path)
    config = read_json(path / CONFIG_FILE, CONFIG)
    _check_config(path, config)
    weights = _weights(path)
    if _of_classifier(config):
        raise UnbackdoorError(
            f"{path} is an adapter of a classifier, which also holds a head, and cannot be mixed on disk. Load it with "
            "`merge`."
        )
    whole = sorted(_whole(weights))
    if base is not None:
        whole = [name for name in whole if not _copied(name, weights.pop(name), base)]
    if whole:
        raise UnbackdoorError(
            f"{path} also holds whole weights ({few(whole)}), and cannot be mixed on disk"
            f"{' unless they are those of the base' if base is None else ', since they are not those of `base`'}. Mix "
            "it in memory (purify without `stream`), or merge it into its base (merge_and_unload of peft)."
        )
    names = sorted({_layer_of(path, key, tensor) for key, tensor in weights.items()})
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name in names:
        first, second = (weights.get(f"{_PREFIX}{name}.lora_{part}.weight") for part in "AB")
        if first is None or second is None or second.shape[1] != len(first) or not 0 < len(first) <= _LARGEST:
            raise UnbackdoorError(f"{path} has no pair of fitting matrices for {printable(name)}. Fetch it again.")
        factors[name] = first, second
    rooted = bool(config.get("use_rslora"))
    ranks = {name: len(first) for name, (first, _) in factors.items()}
    own = alphas(path, config, names)
    scales = {name: own[name] / (rank**0.5 if rooted else rank) for name, rank in ranks.items()}
    return AdapterFiles(path, config, factors, scales)


def write_adapter(folder: Path, config: Mapping[str, Any], factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Writes an adapter with a scale of 1 at every layer.

    Args:
        folder: an existing, empty directory.
        config: of an adapter of the same base; its ranks, scales and layers are replaced.
        factors: for each layer A, (rank, inputs), and B, (outputs, rank).
    """
    tensors = {
        f"{_PREFIX}{name}.lora_{part}.weight": factor.contiguous()
        for name, pair in factors.items()
        for part, factor in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    ranks = {f"^{name}$": len(first) for name, (first, _) in factors.items()}
    largest = max(ranks.values())
    changed = {
        **config,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": sorted(factors),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_rslora": False,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")


def needs_merging(path: Path) -> bool:
    """Whether the adapter in a directory is more than matrices of low rank (DoRA, biases): `merged` alone keeps it."""
    config = read_json(path / CONFIG_FILE, CONFIG)
    return bool(_besides(config))


def _besides(config: Mapping[str, Any]) -> str | None:
    """What an adapter has besides matrices of low rank, for a message; None if it has nothing that merging keeps."""
    if config.get("use_dora"):
        return "trains the lengths of weights (use_dora)"
    return f"also changes biases ({printable(config['bias'])})" if config.get("bias", "none") != "none" else None


def adapted_by(path: Path, base: nn.Module, *, merging: bool = False) -> Any:
    """Puts the adapter of a directory on its base.

    Args:
        path: a directory with `adapter_config.json` and `adapter_model.safetensors`.
        base: the language model that it was trained on, or a classifier of that body and with any head; it becomes part
            of the result.
        merging: whether the result will be `merged`, so that the adapter may be more than matrices of low rank.

    Returns:
        a `peft.PeftModel` in eval mode.

    Raises:
        UnbackdoorError: peft is not installed; the adapter is not a plain LoRA adapter, or does not fit the base.
    """
    config = read_json(path / CONFIG_FILE, CONFIG)
    _check_config(path, config, merging=merging)
    weights = _weights(path)
    head = _head(weights) if _of_classifier(config) else {}
    biases = _biases(path, weights, base) - _stored(head) if config.get("bias", "none") != "none" else set()
    for name in sorted(_whole(weights) - _stored(head) - biases):
        _check_copy(path, name, weights.pop(name), base)
    lengths = {name for name in weights if name.endswith(_MAGNITUDE)} if config.get("use_dora") else set()
    others = _stored(head) | biases | lengths
    layers = _layers(path, {name: each for name, each in weights.items() if name not in others}, base)
    _check_head(path, head, base)
    try:
        from peft import LoraConfig, TaskType, get_peft_model, set_peft_model_state_dict
    except ImportError:
        raise UnbackdoorError('An adapter needs peft; get it with: pip install "unbackdoor[llm]"') from None
    ranks = {name: int(weights[f"{_PREFIX}{name}.lora_A.weight"].shape[0]) for name in layers}
    settings = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=config.get("lora_alpha", 8),
        lora_dropout=0.0,
        target_modules=sorted(ranks),
        rank_pattern={f"^{name}$": rank for name, rank in ranks.items()},
        alpha_pattern={f"^{name}$": alpha for name, alpha in alphas(path, config, ranks).items()},
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        task_type=TaskType.SEQ_CLS if head else TaskType.CAUSAL_LM,
    )
    with quiet_transformers():
        model = get_peft_model(base, settings)
        _check_lengths(path, model, layers, {name: weights[name].shape for name in lengths})
        report = set_peft_model_state_dict(model, weights)
    left = list(report.unexpected_keys)
    if left:
        raise UnbackdoorError(f"{path} has tensors that its layers do not have ({few(left)}). Fetch it again.")
    if not any(all(weights[f"{_PREFIX}{name}.lora_{part}.weight"].any() for part in "AB") for name in layers):
        logger.warning(
            "%s changes nothing: one of the two matrices is zero at every layer. Its script probably saved it in a "
            "wrong way; ask its owner.",
            path,
        )
    dtype = weights[f"{_PREFIX}{layers[0]}.lora_A.weight"].dtype
    for name, parameter in model.named_parameters():
        if "lora_" in name and not merging:
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def merged(model: Any) -> nn.Module:
    """Adds the matrices of an adapter to the layers of its base, and returns the plain model.

    Args:
        model: as `adapted_by` returns it.
    """
    own_output_(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.dtype in HALF:
            parameter.data = parameter.data.float()  # as peft loads them: else their product would be rounded, too
    with quiet_transformers():
        plain: nn.Module = model.merge_and_unload()
    return plain.requires_grad_(True).eval()


def own_output_(model: Any) -> None:
    """Give an output layer with matrices weights of its own if its weights are also the embedding.

    Else merging would change the embedding as well. Other models stay as they are.

    Args:
        model: a `peft.PeftModel`, changed in place.
    """
    rows = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    for layer in (getattr(module, "base_layer", None) for module in model.modules()):
        if isinstance(layer, nn.Linear) and any(layer.weight is each for each in rows):
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=layer.weight.requires_grad)
            model.config.tie_word_embeddings = False


def carries_adapter(model: nn.Module) -> bool:
    """Whether a model is an adapter on its base: only the matrices of low rank are its own."""
    return hasattr(model, "peft_config")


def refuse_adapter(model: nn.Module, method: object, instead: str = "load it with `merge`") -> None:
    """Refuse an adapter if the result would not be an adapter of the same layers and ranks.

    Raises:
        UnbackdoorError: names the method, and what to do instead.
    """
    if carries_adapter(model):
        raise UnbackdoorError(
            f"{type(method).__name__} changes more weights than an adapter of low rank holds; {instead}."
        )


def _check_config(path: Path, config: Mapping[str, Any], *, merging: bool = False) -> None:
    """Refuse an adapter of another kind, or one with more than matrices of low rank (and, if it is merged, more)."""
    kind = config.get("peft_type")
    if kind is None:
        raise UnbackdoorError(
            f"{path / CONFIG_FILE} names no peft_type, so peft did not write it; adapters of mlx-lm, for one, have "
            "another form. Give one that peft wrote, or fuse it with its base (mlx_lm.fuse) and give the result."
        )
    if kind != "LORA":
        way_out = (
            "It cannot be added to the weights of its base; give the base itself, or a LoRA adapter."
            if kind in _NOT_MERGED
            else "Merge it into its base (merge_and_unload of peft) and give the result."
        )
        raise UnbackdoorError(f"{path} is an adapter of the kind {printable(kind)}; only LoRA is supported. {way_out}")
    selective = next((field for field in _SELECTIVE if config.get(field)), None)
    if selective is not None:
        raise UnbackdoorError(
            f"{path} is an adapter that {_SELECTIVE[selective]} ({selective}), so it cannot be added to the weights of "
            "its base; only plain LoRA is supported. Give the base itself, or a plain LoRA adapter."
        )
    whole = config.get("modules_to_save") or []
    if whole and not (_of_classifier(config) and set(map(str, whole)) <= set(_HEADS)):
        raise UnbackdoorError(
            f"{path} also replaces whole layers (modules_to_save: {printable(config['modules_to_save'])}), which an "
            "adapter of low rank cannot keep. Merge it into its base (merge_and_unload of peft) and give the result."
        )
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise UnbackdoorError(
            f"{path} must have bias as none, all or lora_only, got {printable(config['bias'])}. Fetch it again."
        )
    besides = _besides(config)
    if besides is not None and not merging:
        raise UnbackdoorError(
            f"{path} is an adapter that {besides}, which matrices of low rank do not keep. Load it with `merge`, which "
            "adds it to its base."
        )
    said = _SAID | {"use_dora"}  # checked above
    strange = sorted(name for name, entry in config.items() if name not in said and entry not in (None, False, {}, []))
    if config.get("init_lora_weights", True) not in _BEGINNINGS:
        strange.append("init_lora_weights")
    if strange:
        raise UnbackdoorError(
            f"{path} is not a plain LoRA adapter: its config sets {few(strange)}. Merge it into its base "
            "(merge_and_unload of peft) and give the result."
        )


def _weights(path: Path) -> dict[str, Tensor]:
    if not exists(path / WEIGHTS_FILE):
        if exists(path / "adapter_model.bin"):
            raise UnbackdoorError(
                f"{path} must have its weights in {WEIGHTS_FILE}; adapter_model.bin is a pickle, which is not opened. "
                f"Convert it, in that folder: {_CONVERSION}"
            )
        raise UnbackdoorError(
            f"{path} must have its weights in {WEIGHTS_FILE}; it is missing. Save the adapter again with "
            "save_pretrained of peft."
        )
    check_file(path / WEIGHTS_FILE)
    check_safetensors(path / WEIGHTS_FILE)
    weights = load_file(path / WEIGHTS_FILE)
    other = next((name for name, tensor in weights.items() if not tensor.is_floating_point()), None)
    if other is not None:
        raise UnbackdoorError(
            f"{path} must have real numbers in its tensors, got {printable(weights[other].dtype)} in "
            f"{printable(other)}. Fetch it again."
        )
    check_finite(weights, str(path))
    if not weights:
        raise UnbackdoorError(f"{path} has an adapter without a tensor. Fetch it again.")
    return weights


def _head(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a classifier's head among those of an adapter, by their names in the classifier."""
    names = {name: name.removeprefix(_PREFIX) for name in weights if name.startswith(_PREFIX)}
    return {
        own: weights[name] for name, own in names.items() if own.partition(".")[0] in _HEADS and ".lora_" not in own
    }


def _stored(head: Mapping[str, Tensor]) -> set[str]:
    return {f"{_PREFIX}{name}" for name in head}


def _whole(weights: Mapping[str, Tensor]) -> set[str]:
    """The names of tensors that stand for whole weights of the base, not for a change of low rank."""
    return {name for name in weights if ".lora_" not in name}


def _check_copy(path: Path, name: str, stored: Tensor, base: nn.Module) -> None:
    """Refuse whole weights that are not those of the base: peft stores copies, of the embeddings above all."""
    own = base.state_dict().get(name.removeprefix(_PREFIX).replace(".base_layer.", "."))
    if own is None or own.shape != stored.shape or not (_equal(stored, own) or _equal(own, stored)):
        raise UnbackdoorError(
            f"{path} also holds the whole {printable(name)}, which is not that of `base`: its script resized or "
            "trained it, and an adapter of low rank cannot keep that. Merge it into its base (merge_and_unload of "
            "peft) and give the result."
        )


def _biases(path: Path, weights: Mapping[str, Tensor], base: nn.Module) -> set[str]:
    """The names of the biases that an adapter stores, all of which the base has in the same shapes."""
    names, own = {name for name in _whole(weights) if name.endswith(".bias")}, base.state_dict()
    for name in sorted(names):
        theirs = own.get(name.removeprefix(_PREFIX).replace(".base_layer.", "."))
        if theirs is None or theirs.shape != weights[name].shape:
            raise UnbackdoorError(
                f"{path} does not fit `base`: {type(base).__name__} has no bias {printable(name)} of the shape "
                f"{tuple(weights[name].shape)}. Give the model that it was trained on."
            )
    return names


def _check_lengths(path: Path, model: nn.Module, layers: list[str], stored: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse an adapter by DoRA whose lengths are not those of its layers: peft would take the base's for missing ones.

    Args:
        path: its directory.
        model: what peft has put on the base.
        layers: names of its layers.
        stored: the shapes of the lengths in its files, by name.
    """
    own = {name: tuple(each.shape) for name, each in model.named_parameters() if f"{_MAGNITUDE}." in name}
    wanted = {f"{_PREFIX}{each}{_MAGNITUDE}": own.get(f"{_PREFIX}{each}{_MAGNITUDE}.default.weight") for each in layers}
    odd = sorted(name for name in {*wanted, *stored} if wanted.get(name) != stored.get(name)) if own or stored else []
    if odd:
        raise UnbackdoorError(
            f"{path} trains the lengths of weights (use_dora), but those of {few(odd)} are missing or of another "
            "shape. Fetch it again."
        )


def _copied(name: str, stored: Tensor, base: WeightFiles) -> bool:
    """Whether a tensor of an adapter is in the files of its base: by its name, or as embeddings that are the output."""
    own = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
    names = [own, own.partition(".")[2]]  # GPT-2 leaves a part out
    if own.startswith(OUTPUTS):
        names += [each for held in base.locations.values() for each in held if each.endswith(EMBEDDINGS)]
    for file, held in base.locations.items():
        for each in names:
            if each in held and held[each].shape == tuple(stored.shape):
                with safe_open(file, framework="pt") as opened:
                    theirs = opened.get_tensor(each)
                return _equal(stored, theirs) or _equal(theirs, stored)
    return False


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in the type of the first."""
    return bool((one == other.to(one.dtype)).all())


def _check_head(path: Path, head: Mapping[str, Tensor], base: nn.Module) -> None:
    """Refuse a head that is not that of the base's classifier, with all its weights."""
    own = {name: each.shape for name, each in base.state_dict().items() if name.partition(".")[0] in _HEADS}
    loaded = {name: each.shape for name, each in head.items()}
    differing = sorted(name for name in {*own, *loaded} if own.get(name) != loaded.get(name))
    if head and differing:
        raise UnbackdoorError(
            f"{path} does not fit `base`: its head and that of {type(base).__name__} differ in {few(differing)}. Give "
            "the model that it was trained on."
        )


def _layers(path: Path, weights: dict[str, Tensor], base: nn.Module) -> list[str]:
    """Returns the names of the layers that the adapter changes, all of which the base has with fitting shapes."""
    from transformers.pytorch_utils import Conv1D

    names = {_layer_of(path, key, tensor) for key, tensor in weights.items()}
    for name in sorted(names):
        first, second = (weights.get(f"{_PREFIX}{name}.lora_{part}.weight") for part in "AB")
        module: Any = _submodule(base, name)
        if first is None or second is None or not isinstance(module, nn.Linear | Conv1D):
            raise UnbackdoorError(
                f"{path} does not fit `base`: it changes {printable(name)}, which {type(base).__name__} does not have "
                "as a linear layer. Give the model that it was trained on."
            )
        outputs, inputs = module.weight.shape if isinstance(module, nn.Linear) else module.weight.T.shape
        if first.shape[1] != inputs or second.shape != (outputs, first.shape[0]) or len(first) > _LARGEST:
            raise UnbackdoorError(
                f"{path} does not fit `base`: {printable(name)} is {outputs} x {inputs} there, and the adapter has "
                f"{tuple(second.shape)} and {tuple(first.shape)}. Give the model that it was trained on."
            )
    return sorted(names)


def _layer_of(path: Path, key: str, tensor: Tensor) -> str:
    """The layer that a tensor of an adapter belongs to."""
    if tensor.numel() == 0:
        raise UnbackdoorError(
            f"{path} has the tensor {printable(key)} without a number in it, as scripts leave it that save a part of "
            "a model which several processes share. Ask its owner to gather the weights first."
        )
    layer, is_matrix, part = key.removeprefix(_PREFIX).rpartition(".lora_")
    named = key.startswith(_PREFIX) and len(layer) <= _LONGEST
    if is_matrix and (not named or part in _NAMED_PARTS):
        raise UnbackdoorError(
            f"{path} has the tensor {printable(key)}, which peft would leave out: it reads the names "
            f"{_PREFIX}LAYER.lora_A.weight and .lora_B.weight, of at most {_LONGEST} characters. Save the adapter "
            "again with save_pretrained of peft."
        )
    if not (named and is_matrix and part in ("A.weight", "B.weight") and tensor.ndim == 2):
        tied = (
            " If the base's output layer is its embeddings (tie_word_embeddings), give it a copy of its own first: "
            "peft would change both."
        )
        raise UnbackdoorError(
            f"{path} has the tensor {printable(key)}, which belongs to no linear layer. Merge it into its base "
            f"(merge_and_unload of peft) and give the result.{tied if part.startswith('embedding_') else ''}"
        )
    return layer


def _submodule(base: nn.Module, name: str) -> nn.Module | None:
    try:
        return base.get_submodule(name)
    except AttributeError:
        return None


def save_adapter(model: Any, folder: Path, *, source: Path | None) -> None:
    """Write the adapter of a `peft.PeftModel` without its base.

    Args:
        model: the model.
        folder: an existing, empty directory.
        source: the adapter's directory that it came from, whose config is kept if the ranks are the same.
    """
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if (
        source is not None
        and exists(source / CONFIG_FILE)
        and _shapes(tensors) == _shapes(load_file(source / WEIGHTS_FILE))
    ):
        (folder / CONFIG_FILE).write_bytes((source / CONFIG_FILE).read_bytes())
    else:
        model.peft_config["default"].save_pretrained(str(folder))


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if ".lora_" in name}
