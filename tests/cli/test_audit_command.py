"""`audit` on the command line: what it prints and writes, that its evidence repeats, exit codes, and bad input."""

import errno
import json
import os
import re
import shlex
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import jsonschema
import pytest
from safetensors.torch import save_file

from commands import Refusals, run
from pictures import write_pictures
from unbackdoor import Dataset, UnbackdoorError
from unbackdoor._artifacts.audit_record import AuditRecord, read_audit
from unbackdoor._cli.commands.audit import audit as audit_command
from unbackdoor._cli.options import AuditOptions
from unbackdoor._errors import IncompleteError
from unbackdoor._reports import evidence
from unbackdoor._reports.sarif import as_sarif

FACTORY = """
from torch import nn


class SmallCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        )
        self.classifier = nn.Linear(32 * 4 * 4, 10)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


def make():
    return SmallCNN()
"""
MODEL = ("model.safetensors", "--factory", "made.py:make", "--mean", "0.3", "--std", "0.37")


@pytest.fixture(scope="module")
def place(backdoored: tuple, digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backdoored model, its factory, and clean examples with and without labels."""
    folder = tmp_path_factory.mktemp("audit")
    save_file(backdoored[0].state_dict(), folder / "model.safetensors")
    (folder / "made.py").write_text(FACTORY)
    write_pictures(digits.select(range(1400, 1500)), folder / "clean.parquet")
    return folder


@dataclass(frozen=True)
class Audited:
    """The text that an audit printed, and its files."""

    folder: Path
    out: str
    record: dict


@pytest.fixture(scope="module")
def audited(place: Path) -> Audited:
    """The audit of the model by one detector, with all that it can write."""
    done = run(
        *("audit", *MODEL, "--clean", "clean.parquet", "--tests", "patch", "--out", "my audit"),
        *("--sarif", "my audit/audit.sarif", "--bom", "bom.json"),
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    return Audited(place, done.stdout, json.loads((place / "my audit/audit.json").read_text()))


class TestWhatIsPrinted:
    def test_the_verdict_comes_first_then_the_evidence_and_its_limits(self, audited: Audited) -> None:
        lines = audited.out.splitlines()
        record = audited.record
        assert lines[0] == f"{record['verdict']}: {record['reason']}"
        assert re.fullmatch(r"detector +class +moved \(95 %\) +random +size +p", lines[2])
        assert re.fullmatch(r"patch +\d +\d+\.\d% \(\d+ to \d+%, n = \d+\) +\d+\.\d% .* pixels of 64 +\S.*", lines[3])
        assert f"Operating point: {record['operating_point_note']}." in lines
        assert lines[-1].endswith("; open my audit/audit.html.")
        others = ", ".join(entry["detector"] for entry in record["not_searched"])
        assert f"Not searched by {others}: it was not asked for." in lines

    def test_the_printed_line_repeats_the_strongest_evidence(self, audited: Audited) -> None:
        line = audited.out.split("To repeat the strongest evidence:\n")[1].splitlines()[0]
        program, *words = shlex.split(line)
        assert program == "unbackdoor"
        done = run(*words, "--json", cwd=audited.folder)
        assert done.returncode == 0, done.stderr
        success, moved = json.loads(done.stdout)["attack_success"], audited.record["findings"][0]["moved"]
        assert (success["value"], success["n"]) == (moved["value"], moved["n"])
        assert moved["n"] > 30


class TestWhatIsWritten:
    def test_the_record_keeps_its_schema(self, audited: Audited) -> None:
        read = read_audit(audited.folder / "my audit/audit.json")
        assert read.model_dump(mode="json", exclude_unset=True) == audited.record
        jsonschema.validate(audited.record, AuditRecord.model_json_schema())
        finding = audited.record["findings"][0]
        assert len(finding["classes"]) == 10
        assert finding["target"] in [each["target"] for each in finding["classes"]]
        assert audited.record["source"] == {"model": "model.safetensors", "factory": "made.py:make"}
        assert audited.record["operating_point"] is None

    def test_the_record_lists_all_files(self, audited: Audited) -> None:
        folder = audited.folder / "my audit"
        there = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        assert audited.record["files"] == there
        place = f"evidence/patch-{audited.record['findings'][0]['target']['number']}"
        names = {"attack.json", "trigger.safetensors", "rows.json", "trigger.png", "clean-1.png", "triggered-1.png"}
        assert {f"{place}/{name}" for name in names} <= set(audited.record["findings"][0]["evidence"])
        assert {*audited.record["findings"][0]["evidence"], "audit.html", "audit.json", "audit.sarif"} == set(there)

    def test_what_is_no_record_of_an_audit_is_not_read(self, audited: Audited, tmp_path: Path) -> None:
        (tmp_path / "audit.json").write_text(json.dumps({**audited.record, "verdict": "clean"}))
        with pytest.raises(
            UnbackdoorError, match=r"is not an audit\.json that unbackdoor wrote \(AuditRecord\.verdict"
        ):
            read_audit(tmp_path / "audit.json")

    def test_the_page(self, audited: Audited) -> None:
        page = (audited.folder / "my audit/audit.html").read_text(encoding="utf-8")
        finding = audited.record["findings"][0]
        assert "http" not in page.replace('http-equiv="', "")
        assert page.count("data:image/png") == 1 + 3 * 5
        assert f"The strongest shortcut is to class “{finding['target']['name']}”" in page
        assert f"It cannot see: {audited.record['searched'][0]['cannot_see']}." in page
        assert "No rates of false alarms and of detections were measured for this configuration." in page
        assert audited.record["repeat"] in page.replace("&#39;", "'")


class TestOtherTools:
    def test_sarif(self, audited: Audited) -> None:
        log = json.loads((audited.folder / "my audit/audit.sarif").read_text())
        check_sarif(log)
        run_ = log["runs"][0]
        ids = ["patch", *(entry["detector"] for entry in audited.record["not_searched"])]
        judged = audited.record["verdict"] != "cannot-judge"
        assert [rule["id"] for rule in run_["tool"]["driver"]["rules"]] == [*ids, *([] if judged else ["cannot-judge"])]
        said = run_["invocations"][0]["toolExecutionNotifications"]
        alarms = [result["ruleId"] for result in run_["results"] if result["kind"] == "fail"]
        assert alarms == [each["detector"] for each in audited.record["findings"] if each["alarm"]]
        assert sorted([*alarms, *(each["associatedRule"]["id"] for each in said)]) == sorted(ids)
        assert said[-1]["message"]["text"] == "Not searched: it was not asked for."
        assert run_["properties"]["operating_point_note"] == audited.record["operating_point_note"]
        assert run_["artifacts"][0]["location"]["uri"] == "model.safetensors"

    def test_an_alarm_in_sarif_of_a_class_with_a_hostile_name(self, audited: Audited) -> None:
        finding = json.loads(json.dumps(audited.record["findings"][0]))
        finding |= {"alarm": True, "target": {"number": 3, "name": "[here](http://evil) {0} \\"}}
        finding["abnormality"] |= {"p_value": 0.02, "calibration": "49 clean models"}
        found = {**audited.record, "verdict": "shortcut-found", "findings": [finding]}
        log = json.loads(as_sarif(found))
        check_sarif(log)
        (result,) = log["runs"][0]["results"]
        assert (result["kind"], result["level"]) == ("fail", "warning")
        assert "to class \\[here\\](http://evil) {{0}} \\\\; its trigger moves" in result["message"]["text"]
        # GitHub knows an alert again by its fingerprint, and shows each result: one that is no alarm is none.
        mark = result["partialFingerprints"]["primaryLocationLineHash"]
        again, other = (json.loads(as_sarif(found | {"seed": 9}, path)) for path in (None, "models/other"))
        assert [
            each["runs"][0]["results"][0]["partialFingerprints"]["primaryLocationLineHash"] == mark
            for each in (again, other)
        ] == [True, False]
        assert other["runs"][0]["automationDetails"]["id"] == "unbackdoor/models/other/"
        quiet = {**found, "verdict": "nothing-found", "findings": [{**finding, "alarm": False, "looks_natural": True}]}
        log = json.loads(as_sarif(quiet))
        check_sarif(log)
        assert log["runs"][0]["results"] == []
        said = log["runs"][0]["invocations"][0]["toolExecutionNotifications"][0]["message"]["text"]
        assert said.startswith("No alarm. The strongest shortcut is to class")
        assert said.endswith("It looks like a feature of its class.")

    def test_an_audit_that_cannot_judge_is_no_empty_log(self, audited: Audited) -> None:
        lost = {**audited.record, "verdict": "cannot-judge", "reason": "Why.", "findings": [], "searched": []}
        log = json.loads(as_sarif(lost))
        check_sarif(log)
        (result,) = log["runs"][0]["results"]
        assert (result["ruleId"], result["kind"], result["message"]) == ("cannot-judge", "open", {"text": "Why."})

    def test_bill_of_materials(self, audited: Audited) -> None:
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator

        text = (audited.folder / "bom.json").read_text()
        assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
        bill = json.loads(text)
        model = bill["metadata"]["component"]
        assert (bill["specVersion"], model["type"]) == ("1.6", "machine-learning-model")
        facts = {entry["name"].removeprefix("unbackdoor:audit:"): entry["value"] for entry in model["properties"]}
        assert facts["verdict"] == audited.record["verdict"]
        assert facts["operating-point"] == audited.record["operating_point_note"]
        assert facts["searched:patch:cannot-see"] == audited.record["searched"][0]["cannot_see"]
        assert {name for name in facts if name.startswith("not-searched:")} == {
            f"not-searched:{entry['detector']}" for entry in audited.record["not_searched"]
        }
        assert model["components"][0]["hashes"][0]["content"] == _sha256(audited.folder / "model.safetensors")
        assert ("vulnerabilities" in bill) == audited.record["findings"][0]["alarm"]

    def test_a_bill_of_materials_of_an_alarm(self, audited: Audited) -> None:
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator

        from unbackdoor._reports.bom import as_bom

        finding = {**audited.record["findings"][0], "alarm": True}
        text = as_bom({**audited.record, "findings": [finding]}, [])
        assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
        (entry,) = json.loads(text)["vulnerabilities"]
        assert (entry["affects"], entry["analysis"]) == ([{"ref": "model"}], {"state": "in_triage"})

    def test_each_alarm_in_a_bill_of_materials_is_described_by_itself(self, audited: Audited) -> None:
        from unbackdoor._reports.bom import as_bom

        rare = {**audited.record["findings"][0], "alarm": True, "abnormality": {"p_value": 0.02}}
        sign = {**rare, "detector": "margin", "moved": None}
        text = as_bom({**audited.record, "findings": [rare, sign]}, [])
        texts = {entry["id"]: entry["description"] for entry in json.loads(text)["vulnerabilities"]}
        number, share = rare["target"]["number"], f"{rare['moved']['value']:.1%} of {rare['moved']['n']}"
        to_class = f"shortcut to class {rare['target']['name']}"
        assert texts == {
            f"unbackdoor-patch-{number}": f"The detector patch found a {to_class} that moves {share} unseen examples "
            "(p = 0.020).",
            f"unbackdoor-margin-{number}": f"The detector margin found a {to_class} (p = 0.020).",
        }


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_sarif(log: dict) -> None:
    """The rules of SARIF 2.1.0 for what the log has; the numbers are its sections. And what GitHub asks for besides.

    The official schema and Microsoft's SARIF Multitool (its rules `Sarif` and `Ghas`) were asked by hand.
    """
    assert set(log) == {"$schema", "version", "runs"}  # 3.13
    assert (log["version"], log["$schema"].endswith("sarif-2.1.0.json")) == ("2.1.0", True)
    (run_,) = log["runs"]
    parts = {"tool", "automationDetails", "invocations", "artifacts", "results", "properties"}
    assert set(run_) == parts  # 3.14
    driver = run_["tool"]["driver"]  # 3.18, 3.19
    assert set(driver) == {"name", "version", "rules"}
    ids = [rule["id"] for rule in driver["rules"]]
    assert len(set(ids)) == len(ids)
    for rule in driver["rules"]:  # 3.49; GitHub asks for `help`
        assert set(rule) == {"id", "shortDescription", "fullDescription", "help", "properties"}
        assert all(0 < len(rule[part]["text"]) < 1024 for part in ("shortDescription", "fullDescription", "help"))
    for result in run_["results"]:  # 3.27
        assert result["kind"] in ("fail", "open")
        assert result["level"] == ("warning" if result["kind"] == "fail" else "none")
        assert result["message"]["text"]
        assert ids[result["ruleIndex"]] == result["ruleId"]
        place = result["locations"][0]["physicalLocation"]
        assert place["region"] == {"startLine": 1}  # GitHub
        location = place["artifactLocation"]
        assert run_["artifacts"][location["index"]]["location"]["uri"] == location["uri"]
        assert re.fullmatch(r"[0-9a-f]{64}:1", result["partialFingerprints"]["primaryLocationLineHash"])
    (invocation,) = run_["invocations"]  # 3.20
    assert invocation["executionSuccessful"] is True
    for said in invocation["toolExecutionNotifications"]:  # 3.58
        assert said["level"] == "note"
        assert said["message"]["text"]
        assert ids[said["associatedRule"]["index"]] == said["associatedRule"]["id"]


class TestRowsOfEvaluate:
    @pytest.mark.parametrize("text", ["{}", "[]", "[true]", "[0.5]", "no json"])
    def test_what_is_not_a_list_of_rows(self, text: str, refused: Refusals, place: Path) -> None:
        (place / "rows.json").write_text(text)
        said = refused("evaluate", *MODEL, "--data", "clean.parquet", "--rows", "rows.json")
        assert said == ("--rows must be a file with a JSON list of row numbers, as an audit writes, got rows.json.")

    def test_rows_of_other_data(self, refused: Refusals, place: Path) -> None:
        (place / "rows.json").write_text("[3, 100]")
        said = refused("evaluate", *MODEL, "--data", "clean.parquet", "--rows", "rows.json")
        assert said == (
            "rows.json names rows 3 to 100, but clean.parquet has 100, from 0. Give the data that was audited."
        )


class TestBadInput:
    def test_no_examples(self, refused: Refusals) -> None:
        said = refused("audit", *MODEL)
        assert said == "audit needs --clean, labelled examples without a trigger, or at least --unlabelled ones."

    @pytest.mark.parametrize(
        ("tests", "message"),
        [
            ("pach", "There is no detector 'pach'. Did you mean 'patch'? See unbackdoor list detectors."),
            (" ,", "--tests must be names of detectors with commas between, got ' ,'."),
        ],
    )
    def test_an_unknown_detector(self, tests: str, message: str, refused: Refusals) -> None:
        assert refused("audit", *MODEL, "--clean", "clean.parquet", "--tests", tests) == message

    @pytest.mark.parametrize("option", ["--sarif", "--bom"])
    def test_files_that_cannot_be_written(self, option: str, refused: Refusals, place: Path) -> None:
        def say(path: str, *more: str) -> str:
            return refused("audit", *MODEL, "--clean", "clean.parquet", "--out", "new", option, path, *more)

        (place / "theirs.json").write_text("{}")
        assert say("theirs.json") == f"theirs.json exists. Use --overwrite, or another {option}."
        assert say("clean.parquet", "--overwrite") == f"clean.parquet is an input; {option} must be another file."
        assert say("") == f"{option} must be the name of a file, got an empty one."
        assert say(".") == f"{option} must be a file, got the folder .."
        expected = (
            f"made.py/x cannot be written ({place}/made.py is not a folder to write to). Choose another {option}."
        )
        assert say("made.py/x") == expected
        assert say("made.py") == f"made.py is an input; {option} must be another file."
        theirs = f"theirs.json was not written by unbackdoor. Choose another {option}."
        assert say("theirs.json", "--overwrite") == theirs

    def test_a_verdict_is_not_lost_with_what_cannot_be_written(
        self, audited: Audited, place: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A full disk is met after the work."""

        def full(*_) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.chdir(place)
        monkeypatch.setattr(evidence, "save_trigger", full)
        out = tmp_path / "full"
        with pytest.raises(
            IncompleteError, match=r"full could not be written: No space left on device\. Nothing of it"
        ):
            audit_command(
                MODEL[0],
                AuditOptions(
                    factory=MODEL[2],
                    mean="0.3",
                    std="0.37",
                    clean="clean.parquet",
                    tests="patch",
                    out=str(out),
                    sarif=str(tmp_path / "a.sarif"),
                ),
            )
        said = capsys.readouterr().out
        assert said.splitlines()[0] == audited.out.splitlines()[0]
        assert "To repeat" not in said
        assert [path.name for path in tmp_path.iterdir()] == ["a.sarif"]  # the alarm reaches other tools all the same

    def test_of_two_audits_into_one_folder_each_names_its_own_files(
        self, place: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The second one's command repeated the evidence of the first."""
        out, write = tmp_path / "audited", evidence.write_evidence

        def another_first(*arguments) -> list[str]:
            out.mkdir()
            (out / "audit.json").write_text("{}")
            return write(*arguments)

        monkeypatch.chdir(place)
        monkeypatch.setattr(evidence, "write_evidence", another_first)
        options = AuditOptions(factory=MODEL[2], mean="0.3", std="0.37", clean="clean.parquet", tests="patch")
        options = replace(options, out=str(out), sarif=str(tmp_path / "a.sarif"))
        with pytest.raises(IncompleteError, match=r"stays as it is\. The result is in .*audited-2\.$"):
            audit_command(MODEL[0], options)
        second = tmp_path / "audited-2"
        record = json.loads((second / "audit.json").read_text())
        repeat = capsys.readouterr().out.splitlines()[-1].strip()
        assert record["repeat"] == repeat
        words = shlex.split(repeat)
        for option in ("--attack", "--rows"):
            file = Path(words[words.index(option) + 1])
            assert file.is_file()
            assert file.is_relative_to(second)
        assert f"{second}/evidence/" in (second / "audit.html").read_text()
        assert f"{out}/evidence/" not in (second / "audit.html").read_text()
        assert (tmp_path / "a.sarif").is_file()
        assert [path.name for path in out.iterdir()] == ["audit.json"]

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            (
                ("--sarif", "one.json", "--bom", "./one.json"),
                "--sarif and --bom must be two files, got one.json for both.",
            ),
            (
                ("--out", "new", "--sarif", "new/audit.json"),
                "--sarif must be another name, got new/audit.json: the audit writes audit.json itself.",
            ),
            (
                ("--out", "new", "--bom", "new/evidence/b.json"),
                "--bom must be another name, got new/evidence/b.json: the audit writes evidence itself.",
            ),
            (("--out", "new", "--sarif", "new"), "--sarif must be another name, got new: --out is in its place."),
            (("--out", "new/deep", "--bom", "new"), "--bom must be another name, got new: --out is in its place."),
            (
                ("--sarif", "new/a.sarif", "--bom", "new"),
                "--bom must be another name, got new: --sarif is in its place.",
            ),
        ],
    )
    def test_files_in_the_place_of_others(self, files: tuple, message: str, refused: Refusals) -> None:
        assert refused("audit", *MODEL, "--clean", "clean.parquet", *files) == message

    def test_without_the_library_for_bills_of_materials(
        self, refused: Refusals, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(__import__("sys").modules, "cyclonedx", None)
        said = refused("audit", *MODEL, "--clean", "clean.parquet", "--bom", "b.json")
        assert said == (
            "--bom needs cyclonedx-python-lib, which is not installed. Install unbackdoor[bom], or leave it out."
        )

    @pytest.mark.parametrize("cells", [None, -1, ""], ids=["no column", "not published", "empty"])
    def test_examples_without_labels(self, cells: object, refused: Refusals, place: Path, tmp_path: Path) -> None:
        import pandas as pd

        examples = pd.read_parquet(place / "clean.parquet")
        examples = examples.drop(columns="label") if cells is None else examples.assign(label=cells)
        examples.to_parquet(tmp_path / "bare.parquet")
        said = refused("audit", *MODEL, "--clean", tmp_path / "bare.parquet")
        assert said.endswith(" An audit takes examples without labels as --unlabelled.")

    def test_a_folder_of_pictures_without_classes(self, refused: Refusals, audited: Audited, tmp_path: Path) -> None:
        shutil.copy(next(audited.folder.rglob("clean-1.png")), tmp_path)
        said = refused("audit", *MODEL, "--clean", tmp_path)
        assert said == (
            f"{tmp_path} has pictures but no sub-folders; an image folder has one per class, with its pictures. An "
            "audit takes examples without labels as --unlabelled."
        )

    def test_too_few_examples(self, refused: Refusals, place: Path, digits: Dataset, tmp_path: Path) -> None:
        few = write_pictures(digits.select(range(10)), tmp_path / "few.parquet")
        said = refused("audit", *MODEL, "--clean", few, "--out", "new")
        assert said.startswith("audit needs at least 2 clean examples of each class, one to search on and one to judge")

    def test_a_suspect_near_chance_and_overwrite(self, audited: Audited, place: Path) -> None:
        import torch

        from fixtures import SmallCNN

        with torch.random.fork_rng():
            torch.manual_seed(0)
            save_file(SmallCNN().state_dict(), place / "untrained.safetensors")
        shutil.copytree(place / "my audit", place / "again")
        (place / "again/mine.txt").write_text("mine")
        command = ("audit", "untrained.safetensors", *MODEL[1:], "--clean", "clean.parquet", "--out", "again")
        refused = run(*command, "--overwrite", cwd=place)
        assert (refused.returncode, "holds what audit.json does not list" in refused.stderr) == (2, True)
        (place / "again/mine.txt").unlink()
        done = run(*command, "--overwrite", "--json", "--fail-on-finding", cwd=place)
        assert done.returncode == 4
        said = done.stderr.splitlines()[-1]
        assert said == "The audit of untrained.safetensors cannot judge, as is said above."
        record = json.loads(done.stdout)
        assert (record["verdict"], record["findings"]) == ("cannot-judge", [])
        assert record["reason"].startswith("The suspect is near chance on clean.parquet (")
        assert record == json.loads((place / "again/audit.json").read_text())
        page = (place / "again/audit.html").read_text(encoding="utf-8")
        assert "There are no p-values: nothing was searched." in page
        assert "clean models of this kind" not in page
        assert sorted(os.listdir(place / "again")) == ["audit.html", "audit.json"]
