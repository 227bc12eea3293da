"""The written formats as JSON schemas: `python -m unbackdoor._artifacts.schemas docs/schemas` writes them."""

import json
import sys
from pathlib import Path

from pydantic import BaseModel

from unbackdoor._artifacts.adapter_bank import AdapterBank
from unbackdoor._artifacts.attack_record import AttackRecord
from unbackdoor._artifacts.audit_record import AuditRecord, EvidenceRows
from unbackdoor._artifacts.cell import Cell, Mark, Rows, VictimFiles
from unbackdoor._artifacts.guard_record import DecisionEntry, GuardRecord
from unbackdoor._artifacts.null_table import NullTable
from unbackdoor._artifacts.operating_point import OperatingPointTable
from unbackdoor._artifacts.record import DemoRecord, PurificationRecord, TrainingRecord, VictimRecord
from unbackdoor._artifacts.store_report import StoreReport
from unbackdoor._artifacts.stress_record import StressRecord

SCHEMAS: dict[str, type[BaseModel]] = {
    "record-of-purify": PurificationRecord,
    "record-of-attack": VictimRecord,
    "record-of-train": TrainingRecord,
    "record-of-demo": DemoRecord,
    "attack": AttackRecord,
    "stress": StressRecord,
    "audit": AuditRecord,
    "audit-rows": EvidenceRows,
    "guard": GuardRecord,
    "guard-decision": DecisionEntry,
    "store-cell": Cell,
    "store-rows": Rows,
    "store-victim": VictimFiles,
    "store": Mark,
    "store-report": StoreReport,
    "clean-models": NullTable,
    "operating-points": OperatingPointTable,
    "adapter-bank": AdapterBank,
}


def schema(name: str) -> str:
    """Returns the JSON schema of a format, as text."""
    return json.dumps(SCHEMAS[name].model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    for name in SCHEMAS:
        (folder / f"{name}.schema.json").write_text(schema(name), encoding="utf-8")
