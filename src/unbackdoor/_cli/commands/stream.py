"""`purify --stream`: mixing on disk, piece by piece."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from unbackdoor._cli.options import PurifyOptions
from unbackdoor._errors import SENTENCE, UnbackdoorError, printable
from unbackdoor._mixing.stream import purify_stream
from unbackdoor._models.adapters import is_adapter
from unbackdoor._models.directory import ModelDirectory
from unbackdoor._purification.method import Method
from unbackdoor._registry.entries import to_json
from unbackdoor._registry.purifiers import REGISTRY
from unbackdoor.purifiers.e_pur import EPUR
from unbackdoor.purifiers.fine_mixing import FineMixing

logger = logging.getLogger("unbackdoor")


def purify_on_disk(source: str, method: Method, options: PurifyOptions, command: str | None) -> None:
    """The `purify` command with --stream: mixing alone, on disk, as `purify_stream` does it."""
    steps: tuple[Any, ...] = getattr(method, "steps", (method,))
    mixing, before = steps[-1], list(steps[:-1])
    fits = (
        isinstance(mixing, FineMixing)
        and not mixing.needs_clean
        and mixing == FineMixing(rho=mixing.rho, mode=mixing.mode, tune=False)
    )
    if not fits or not (not before or (len(before) == 1 and isinstance(before[0], EPUR))):
        raise UnbackdoorError(
            "--stream mixes on disk and tunes nothing: it takes fine-mixing --rho R --no-tune, with or without e-pur "
            f"before it, got {method!r}."
        )
    if options.base is None:
        raise UnbackdoorError("--stream needs --base: the pre-trained model that the suspect came from.")
    used = {"base", "out", "seed", "stream", "overwrite", *(("proxy",) if mixing.mode == "sign-elected" else ())}
    for field in dataclasses.fields(options):
        if field.name not in used and getattr(options, field.name) != field.default:
            name = field.name.replace("_", "-")
            raise UnbackdoorError(f"--stream builds no model, so --{name} has no effect. Leave it out.")
    suspect: Any = source
    base: Any = options.base
    rows: dict[str, list[int]] = {}
    said: list[str] = []
    if is_adapter(Path(source)):
        if before:
            raise UnbackdoorError("--stream of an adapter takes fine-mixing alone: an adapter has no embeddings.")
    else:
        suspect, base = ModelDirectory.of(source, "MODEL"), ModelDirectory.of(options.base, "--base")
        if before:
            rows, sentence = before[0].rows_on_disk(suspect, base)
            said = [sentence]
    reset = any(rows.values())
    record = purify_stream(
        suspect,
        base,
        options.out,
        rho=mixing.rho,
        seed=options.seed,
        mode=mixing.mode,
        proxy=options.proxy,
        reset_rows=rows,
        notes=said if reset else (),
        warnings=() if reset else said,
        method={**to_json(method, REGISTRY), "repr": repr(method)},
        command=command,
        overwrite=options.overwrite,
        progress=True,
    )
    print(f"Wrote {printable(options.out, SENTENCE)} in {record['seconds']:.1f} s.")
