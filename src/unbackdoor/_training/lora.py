"""LoRA: small matrices of low rank next to the frozen linear layers of a model, by `peft`."""

import importlib.util
from typing import Any, cast

import torch
from torch import Tensor, nn

from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._models.adapters import own_output_
from unbackdoor._models.hugging_face import quiet_transformers


def adapted(model: nn.Module, *, rank: int, seed: int, alpha: int | None = None) -> Any:
    """Freeze a model and put trainable matrices next to all linear layers of its body; its head has none.

    A layer W then computes W x + alpha / rank * B A x. B starts at zero, so the model answers as before.

    Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang and Chen, "LoRA: Low-Rank Adaptation of Large Language Models",
    ICLR 2022, https://arxiv.org/abs/2106.09685

    Args:
        model: a model of transformers; its layers are changed in place.
        rank: rows of A and columns of B, at least 1.
        seed: seed of A.
        alpha: numerator of the scale; by default twice the rank.

    Returns:
        a `peft.PeftModel`, in the mode of the model.

    Raises:
        UnbackdoorError: peft is not installed, or cannot adapt the model.
    """
    check_peft()
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers.pytorch_utils import Conv1D

    everywhere = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)}
    body = set(cast(nn.Module, model.base_model).modules())
    generates = cast(Any, model).can_generate()
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=0.0,
        target_modules=sorted({name.rpartition(".")[2] for name, layer in everywhere.items() if layer in body}),
        exclude_modules=sorted(name for name, layer in everywhere.items() if layer not in body) or None,
        task_type=TaskType.CAUSAL_LM if generates else None,
    )
    training = model.training
    with torch.random.fork_rng(), quiet_transformers():  # peft asks transformers in an old way, and warns of Conv1D
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config).train(training)
        except ValueError as problem:  # such as of Mamba, whose kernels would pass over the matrices
            reason = printable(str(problem).split("\n")[0], 200).rstrip(".")
            raise UnbackdoorError(
                f"peft cannot put matrices of low rank into {type(model).__name__} ({reason}). Take a method that "
                "tunes all weights, such as fine-tuning; of an attack, `lora_rank=0`."
            ) from None


def merged(model: Any) -> nn.Module:
    """Add the matrices of an adapted model to its layers, and return the plain model, all of it trainable."""
    own_output_(model)
    with quiet_transformers():
        plain: nn.Module = model.merge_and_unload()
    return plain.requires_grad_(True)


def factors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns the change of each adapted layer as two factors, (outputs, rank) and (rank, inputs), by the layer's name.

    Their product is the change; the scale is in the first one. A model that is no LoRA adapter has none.
    """
    layers = {
        name: cast(Any, layer)
        for name, layer in model.named_modules()
        if "default" in getattr(layer, "lora_A", ()) and not getattr(layer, "use_dora", {}).get("default")
    }
    return {
        name: (
            layer.scaling["default"] * layer.lora_B["default"].weight.detach(),
            layer.lora_A["default"].weight.detach(),
        )
        for name, layer in layers.items()
    }


def check_peft() -> None:
    """Refuse to begin without peft.

    Raises:
        UnbackdoorError: it is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise UnbackdoorError('LoRA needs peft, which is not installed; get it with: pip install "unbackdoor[llm]"')
