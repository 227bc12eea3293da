"""Causal language models of a checked directory, and what decoding needs to know about them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor._data.conversation_encoder import AnswerTokens, ConversationEncoder, Template
from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._models.arithmetic import choose
from unbackdoor._models.calling import device_of, embeddings, evaluating, logits
from unbackdoor._models.hugging_face import pretrained
from unbackdoor._models.offloading import check_fits, misfits, placing, rooms, spread_
from unbackdoor._models.recorded import recorded_encode
from unbackdoor._models.tokenizer import check_ids, check_rows, longest_of, positions_of, tokenizer_of
from unbackdoor._models.untrusted_weights import check_finite
from unbackdoor._models.weight_files import WeightFiles
from unbackdoor._models.weight_names import BUFFERS, check_fit

_MOST = 2**20  # tokens of a context, whatever a config says


def language_model(
    path: Path, weights: WeightFiles, trust_remote_code: bool = False, offload: str | None = None
) -> Any:
    """Loads the causal language model of a checked directory, in eval mode.

    Args:
        path: path of the directory.
        weights: its weights.
        trust_remote_code: run Python files that come with the model.
        offload: the device that will score it, or `auto`; what does not fit then lies elsewhere, see `offloading`.

    Raises:
        UnbackdoorError: the weights do not fit it, or are not all finite; or they do not fit into memory.
    """
    places = None if offload is None else rooms(weights, offload)
    placement = {} if places is None else placing(path, weights, places)
    if not placement:
        check_fits(path, weights)
    model, report = pretrained("AutoModelForCausalLM", path, weights, trust_remote_code, placement)
    differing = {(entry[0], tuple(entry[1]), tuple(entry[2])) for entry in report["mismatched_keys"]}
    shapes = sorted(differing | (set(misfits(model, weights)) if placement else set()))
    absent = set(report["missing_keys"]) - {entry[0] for entry in shapes}
    extra = {name for name in report["unexpected_keys"] if name.split(".")[-1] not in BUFFERS}
    check_fit(str(path), type(model).__name__, sorted(absent), sorted(extra), shapes)
    if placement:
        weights.check_finite()
        spread_(path, model)
    else:
        check_finite(model.state_dict(), str(path))
    return model.eval()


def conversation_encoder(
    path: Path,
    model: nn.Module,
    *,
    tokenizer: Any = None,
    template: Template | None = None,
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> ConversationEncoder:
    """Returns the encoder of a language model's directory.

    Args:
        path: the directory.
        model: loaded from it.
        tokenizer: instead of the directory's own.
        template: how prompts are rendered; None takes that of its record, else the tokenizer's chat template.
        max_length: tokens that prompt and answer may have; None takes the number in its record, else the model's most.
        trust_remote_code: run Python files that come with the tokenizer.

    Raises:
        UnbackdoorError: there is no tokenizer, it does not fit the model, or it has no chat template and none is given.
    """
    rows = embeddings(model).num_embeddings
    tokenizer = tokenizer_of(path, trust_remote_code, rows) if tokenizer is None else tokenizer
    check_rows(path, len(tokenizer), rows)
    check_ids(path, tokenizer, rows)
    most = int(min(longest_of(path, tokenizer), context_of(model)))
    if max_length is not None and max_length > most:
        raise UnbackdoorError(f"`max_length` must be at most {most:,}, which the model can read, got {max_length:,}.")
    recorded = recorded_encode(path)
    recorded = recorded if isinstance(recorded, dict) else {}
    before = recorded.get("max_length")
    if max_length is None:
        max_length = before if isinstance(before, int) and 4 <= before <= most else most
    if template is None:
        written = recorded.get("template")
        template = written if written in ("alpaca", "plain") else "chat"
    return ConversationEncoder(tokenizer=tokenizer, template=template, max_length=max_length, where=str(path))


def context_of(model: nn.Module) -> int:
    """Returns how many tokens a language model reads, prompt and answer together."""
    return min(*positions_of(model), _MOST, _MOST)


@torch.no_grad()
def check_causal(model: nn.Module, data: Dataset) -> None:
    """Refuse a model that cannot continue text: its answer to a token must not depend on the tokens behind it.

    Raises:
        UnbackdoorError: it is not a causal language model, cannot take the data, or answers with values that are not
            finite.
    """
    owner = type(model).__name__
    if not callable(getattr(model, "generate", None)):
        raise UnbackdoorError(
            f"{owner} does not continue text; a causal language model of transformers is expected. Take one, or data "
            "with labels for a classifier."
        )
    device = device_of(model)
    short = data.conversations.tokens.lengths.cpu().argsort(stable=True)[:2]
    inputs = data.conversation_encoder(data.conversations[short]).to(device)
    changed = AnswerTokens(dict(inputs), inputs.targets)
    last = inputs["attention_mask"].sum(dim=1) - 1
    rows = torch.arange(len(last), device=device)
    changed["input_ids"] = inputs["input_ids"].clone()
    changed["input_ids"][rows, last] = (inputs["input_ids"][rows, last] + 1) % embeddings(model).num_embeddings
    with evaluating(model), choose(model, device).placed(model) as placed:
        scores, others = _scores(placed, inputs), _scores(placed, changed)
        slack = 1e-4 if next(placed.parameters()).dtype.itemsize >= 4 else 1e-2  # rounding is all that may differ
    before = torch.arange(scores.shape[1], device=device) < last[:, None]
    if not torch.isfinite(scores[before]).all():
        raise UnbackdoorError(
            f"{owner} answers with values that are not finite, although its weights are. Check its config.json."
        )
    if not torch.allclose(scores[before], others[before], rtol=slack, atol=slack * float(scores[before].abs().max())):
        raise UnbackdoorError(
            f"{owner} looks at the tokens behind the one it predicts, so it cannot continue text. Take a causal "
            "language model."
        )


def _scores(model: nn.Module, inputs: AnswerTokens) -> Tensor:
    try:
        return logits(model, inputs).float()
    except UnbackdoorError:
        raise
    except Exception as problem:  # a user's own module may do anything
        reason = printable(" ".join(str(problem)[:1000].split()), 200) or type(problem).__name__
        raise UnbackdoorError(
            f"{type(model).__name__} cannot take prompts of {inputs.shape[1]} tokens ({reason}). Take the tokenizer "
            "that it was trained with, or lower `max_length`."
        ) from None
