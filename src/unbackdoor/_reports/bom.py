"""The result of an audit as a CycloneDX 1.6 bill of materials: the model as a machine-learning component.

https://cyclonedx.org/docs/1.6/json/

It states which checks ran, what they covered and the operating point, also if nothing was found.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unbackdoor._errors import SENTENCE, UnbackdoorError, printable

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def check_installed() -> None:
    """Refuse to go on without the library that writes bills of materials.

    Raises:
        UnbackdoorError: it is not installed.
    """
    try:
        import cyclonedx  # noqa: F401
    except ImportError:
        raise UnbackdoorError(
            "`bom` needs cyclonedx-python-lib, which is not installed. Install unbackdoor[bom], or leave it out."
        ) from None


def weight_files(source: Path) -> tuple[Path, ...]:
    """Returns the files of a model's weights, whose hashes are in the bill; none for a name on the Hub."""
    if source.is_dir():
        files = (path for path in source.iterdir() if path.suffix in _WEIGHTS and path.is_file())
        return tuple(sorted(path for path in files if path.name != "trigger.safetensors"))
    return (source,) if source.is_file() else ()


def as_bom(content: dict[str, Any], weights: Sequence[Path]) -> str:
    """Returns the bill of materials, as JSON text.

    Args:
        content: of `audit.json`, with its `source`.
        weights: files of the model.
    """
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6

    files = [
        Component(
            name=printable(path.name),
            type=ComponentType.FILE,
            bom_ref=f"file-{number}",
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=_digest(path))],
        )
        for number, path in enumerate(weights)
    ]
    model = Component(
        name=printable(content["source"]["model"]),
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="model",
        description=printable(content["reason"], SENTENCE),
        properties=[Property(name=f"unbackdoor:audit:{name}", value=text) for name, text in _facts(content)],
        components=files,
    )
    bom = Bom()
    bom.metadata.component = model
    bom.metadata.tools.components.add(
        Component(name="unbackdoor", type=ComponentType.APPLICATION, version=content["versions"]["unbackdoor"])
    )
    for finding in content["findings"]:
        if finding["alarm"]:
            bom.vulnerabilities.add(_vulnerability(finding))
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


def _facts(content: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the checks, their coverage and the operating point, as names and values."""
    facts = [("verdict", content["verdict"]), ("reason", content["reason"]), ("seed", content["seed"])]
    facts += [(f"examples:{name}", number) for name, number in content["examples"].items()]
    facts.append(("unlabelled", content["unlabelled"]))
    calibration = content["calibration"]
    facts.append(("calibration", "none" if calibration is None else calibration["description"]))
    point = content["operating_point"]
    facts.append(("operating-point", content["operating_point_note"] if point is None else point))
    for entry in content["searched"]:
        facts.append((f"searched:{entry['detector']}:cannot-see", entry["cannot_see"]))
    for finding in content["findings"]:
        name = f"searched:{finding['detector']}"
        facts += [
            (f"{name}:alarm", finding["alarm"]),
            (f"{name}:target", finding["target"]),
            (f"{name}:moved", finding["moved"]),
            (f"{name}:p-value", finding["abnormality"]["p_value"]),
        ]
    facts += [(f"not-searched:{entry['detector']}", entry["reason"]) for entry in content["not_searched"]]
    return [(printable(name), _text(value)) for name, value in facts]


def _text(value: Any) -> str:
    return printable(value if isinstance(value, str) else json.dumps(value), SENTENCE)


def _vulnerability(finding: dict[str, Any]) -> Any:
    from cyclonedx.model.impact_analysis import ImpactAnalysisState
    from cyclonedx.model.vulnerability import BomTarget, Vulnerability, VulnerabilityAnalysis, VulnerabilitySource

    moved = finding["moved"]
    text = f"The detector {finding['detector']} found a shortcut to class {finding['target']['name']}"
    if moved is not None:
        text += f" that moves {moved['value']:.1%} of {moved['n']:,} unseen examples"
    return Vulnerability(
        id=printable(f"unbackdoor-{finding['detector']}-{finding['target']['number']}"),
        source=VulnerabilitySource(name="unbackdoor"),
        description=printable(f"{text} (p = {finding['abnormality']['p_value']:.3f}).", SENTENCE),
        affects=[BomTarget(ref="model")],
        analysis=VulnerabilityAnalysis(state=ImpactAnalysisState.IN_TRIAGE),
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
