"""Calls of transformers: quiet, without the network, of bounded memory, and running no code that comes with a model."""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._inputs import reading
from unbackdoor._models.building import bounded
from unbackdoor._models.weight_files import WeightFiles

logger = logging.getLogger("unbackdoor")

# What transformers says of an implementation of attention that is not installed, or does not run on this processor.
_ATTENTION = re.compile(r"flash.?attention|flex.?attention|flash_attn", re.IGNORECASE)


# Fields of a config that change what a model returns besides its scores. Some models cannot run, and none can be saved,
# with some of them; `saving.save` writes them as they were.
PLAIN_OUTPUT = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}


def pretrained(
    auto: str,
    path: Path,
    weights: WeightFiles,
    trust_remote_code: bool,
    placement: Mapping[str, Any] | None = None,
    **changes: Any,
) -> tuple[Any, dict[str, Any]]:
    """Loads a model that returns its scores alone, and the report of transformers on weights that did not fit.

    Args:
        auto: name of the Auto class.
        path: path of a checked directory.
        weights: weights of the model.
        trust_remote_code: run Python files that come with the model.
        placement: of a model that lies in several places; see `offloading.placing`.
        changes: changed fields of the config.

    Raises:
        UnbackdoorError: the config describes no such model, or one that is many times larger than its weights.
    """
    import transformers

    from unbackdoor import archs

    archs.register()

    def read(**changes: Any) -> tuple[Any, dict[str, Any]]:
        model, report = getattr(transformers, auto).from_pretrained(
            str(path),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=not weights.pickled,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            **(placement or {}),
            **changes,
        )
        parts = [part for part in model.modules() if isinstance(part, transformers.PreTrainedModel)]
        for config in [part.config for part in parts]:  # those of an encoder and a decoder may be copies
            for field, plain in PLAIN_OUTPUT.items():
                setattr(config, field, plain)
        return model, report

    with quiet_transformers(), reading(path), bounded(path, weights.extent):
        try:
            try:
                return read(**changes)
            except (ImportError, ValueError) as problem:
                if not _ATTENTION.search(str(problem)):
                    raise
                logger.info("%s asks for attention that cannot run here; the plain product computes the same.", path)
                config = transformers.AutoConfig.from_pretrained(
                    str(path), trust_remote_code=trust_remote_code, local_files_only=True, **changes
                )
                config._attn_implementation = "eager"
                return read(config=config)
        except UnbackdoorError:
            raise
        except Exception as problem:  # a config decides what runs, so it may be wrong in any way
            if "trust_remote_code" in str(problem):
                raise own_code(path) from None
            if "`offload_folder`" in str(problem):
                raise UnbackdoorError(
                    f"{path} is larger than memory, and transformers joins some of its weights (experts) as it loads "
                    "them, so that they cannot stay on disk. Take a machine with more memory."
                ) from None
            reason = printable(str(problem).strip().split("\n")[0], 200).rstrip(".") or type(problem).__name__
            kinds = {
                "AutoModelForImageClassification": "an image classifier",
                "AutoModelForCausalLM": "a language model",
                "AutoModel": "a model",
            }
            raise UnbackdoorError(
                f"{path} is not {kinds.get(auto, 'a text classifier')} that transformers can load ({reason}). Check "
                "its config.json."
            ) from None


def own_code(path: Path) -> UnbackdoorError:
    """Returns the error for a model or a tokenizer that needs its own Python files."""
    return UnbackdoorError(
        f"{path} needs Python code of its own, which is not run. Pass `trust_remote_code=True` if you trust it."
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the loading bar and the report of transformers off stderr, and restore its settings."""
    from transformers.utils import logging as theirs

    level, bar = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(theirs.CRITICAL)
    theirs.disable_progress_bar()
    places = logging.getLogger("accelerate")
    before = places.level
    places.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # this program reports the problem of a model in one sentence
            yield
    finally:
        theirs.set_verbosity(level)
        places.setLevel(before)
        if bar:
            theirs.enable_progress_bar()
