"""Runs cases of the corpus one after the other in this process, and writes down what each of them did.

As `python runner.py MATERIAL FOLDER RESULTS NAME...`; on stdin, y is the answer to whatever may be asked. Seconds are
those of the processor, as other processes take theirs.
"""

import gc
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]


def run(case, material: Path, folder: Path) -> dict:
    """One case: its exit code, what it wrote, and what it left behind."""
    import logging

    from unbackdoor._cli.app import main

    place = folder / case.name.replace("/", "-")
    place.mkdir()
    os.chdir(place)
    arguments = case.build(place, material)
    before = {str(path) for path in place.rglob("*")}
    start = time.process_time()
    code = None
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        kept = os.dup(1), os.dup(2)
        sys.stdout.flush()
        sys.stderr.flush()
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding=case.console, errors="strict")
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            main([str(each) for each in arguments])
        except SystemExit as stopped:
            code = stopped.code
        except BaseException:
            code = "traceback"
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
            for each in kept:
                os.close(each)
            for stream in (sys.stdout, sys.stderr):
                stream.reconfigure(encoding="utf-8")
            logging.getLogger("unbackdoor").handlers = []
        reported = []
        for stream in (out, err):
            stream.seek(0)
            reported.append(stream.read().decode(case.console, errors="backslashreplace"))
    left = sorted({str(path) for path in place.rglob("*")} - before)
    found = {
        "name": case.name,
        "code": code,
        "out": reported[0],
        "err": reported[1],
        "left": left,
        "canary": (folder / "canary").exists(),
        "seconds": round(time.process_time() - start, 2),
        "peak": _peak(),
    }
    os.chdir(folder)
    shutil.rmtree(place, ignore_errors=True)
    return found


def _peak() -> int:
    """MiB that this process had at most. getrusage would count what the process had that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line[:5] == "VmHWM") // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    import corpus

    material, folder, results, names = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    import torch

    torch.set_num_threads(1)
    os.environ["CANARY"] = str(folder / "canary")
    cases = corpus.cases()
    gc.freeze()  # else it goes through all that was imported again and again
    with results.open("a") as file:
        for name in names:
            print(json.dumps({"name": name, "started": True}), file=file, flush=True)
            print(json.dumps(run(cases[name], material, folder)), file=file, flush=True)
