"""Wall time and anonymous memory of mixing two checkpoints of 1.1 billion bfloat16 weights on disk.

    python benchmarks/mixing_speed.py                            # installs mergekit into an environment of its own
    python benchmarks/mixing_speed.py --mergekit BIN/PYTHON      # uses the environment of this interpreter
    python benchmarks/mixing_speed.py --layers 1 --rounds 1 --only cp linear mask      # a try (seconds)

The contenders, each in a process of its own, imports included; they take turns, and their order turns with each round:

    cp        copies one checkpoint
    linear    the stream of unbackdoor, interpolating: the cost of a mix without masks
    spherical the stream of unbackdoor, along the arc between two tensors, which needs their angle first
    mask      the stream of unbackdoor, with random masks
    mergekit  mergekit's linear merge of the same pair

warm: both inputs have just been read. cold: they were dropped from the page cache (posix_fadvise) after a sync. The
result of one run is removed, and the disk synced, before the next begins. Wall seconds end when the process does, with
the result in the page cache. Anonymous memory is RssAnon of /proc, sampled every 10 ms: mapped files do not count.
Needs Linux and 7 GB of disk.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONTENDERS = ("cp", "linear", "spherical", "mask", "mergekit")
RHO = 0.5
VOCABULARY, HIDDEN, INNER, KEYS, LAYERS = 32000, 2048, 5632, 256, 22
AIMS = (("mask to mergekit", 1 / 3), ("mask to linear", 2.0), ("spherical to linear", 2.0))


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama of 1.1 billion weights, with 22 layers."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        for name, shape in (
            ("self_attn.q_proj", (HIDDEN, HIDDEN)),
            ("self_attn.k_proj", (KEYS, HIDDEN)),
            ("self_attn.v_proj", (KEYS, HIDDEN)),
            ("self_attn.o_proj", (HIDDEN, HIDDEN)),
            ("mlp.gate_proj", (INNER, HIDDEN)),
            ("mlp.up_proj", (INNER, HIDDEN)),
            ("mlp.down_proj", (HIDDEN, INNER)),
            ("input_layernorm", (HIDDEN,)),
            ("post_attention_layernorm", (HIDDEN,)),
        ):
            found[f"model.layers.{layer}.{name}.weight"] = shape
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def make(folder: Path, layers: int) -> None:
    """Write a base with random weights, and a suspect that has moved a little from it."""
    import torch
    from safetensors.torch import save_file

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes(layers).items()}
    for tensor in weights.values():
        tensor.copy_(torch.empty(tensor.shape, dtype=torch.float32).uniform_(-0.1, 0.1, generator=generator))
    for part in ("base", "suspect"):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))
        save_file(weights, folder / part / "model.safetensors", metadata={"format": "pt"})
        for tensor in weights.values():
            tensor.mul_(1.1)


def child(folder: Path, mode: str) -> None:
    from unbackdoor._mixing.stream import purify_stream

    record = purify_stream(folder / "suspect", folder / "base", folder / "out", rho=RHO, mode=mode)
    print(json.dumps({"seconds": record["seconds"]}))


def command(name: str, folder: Path, python: str | None) -> list[str]:
    if name == "cp":
        return ["cp", "-r", str(folder / "suspect"), str(folder / "out")]
    if name == "mergekit":
        models = [{"model": str(folder / part), "parameters": {"weight": RHO}} for part in ("suspect", "base")]
        plan = folder / "plan.yml"  # which JSON is a part of
        plan.write_text(json.dumps({"models": models, "merge_method": "linear", "dtype": "bfloat16"}))
        script = str(Path(str(python)).parent / "mergekit-yaml")
        return [script, str(plan), str(folder / "out"), "--no-copy-tokenizer", "--quiet"]
    return [sys.executable, __file__, "--child", name, "--folder", str(folder)]


def prepare(folder: Path, cache: str) -> None:
    shutil.rmtree(folder / "out", ignore_errors=True)
    os.sync()
    for part in ("suspect", "base"):
        with (folder / part / "model.safetensors").open("rb", buffering=0) as file:
            if cache == "cold":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(2**24):
                    pass


def measure(arguments: list[str]) -> dict[str, float]:
    """Wall and processor seconds of a process, and its peak of anonymous memory in bytes."""
    peak = 0
    start = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    status = Path(f"/proc/{process.pid}/status")
    while True:
        ended, code, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.01)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(code)
    if process.returncode:
        assert process.stderr is not None
        sys.exit(f"{' '.join(arguments)} failed:\n{process.stderr.read().decode()[-2000:]}")
    return {"wall": wall, "processor": usage.ru_utime + usage.ru_stime, "memory": peak}


def install(folder: Path) -> str:
    """An environment with mergekit; returns its interpreter."""
    import torch

    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    wanted = ["mergekit", f"torch=={torch.__version__.partition('+')[0]}"]
    subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", *wanted], check=True)
    return str(folder / "bin" / "python")


def versions(python: str) -> dict[str, str]:
    asked = "import importlib.metadata as m; print(*(m.version(n) for n in ('mergekit', 'torch', 'transformers')))"
    found = subprocess.run([python, "-c", asked], check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    return dict(zip(("mergekit", "its torch", "its transformers"), found, strict=True))


def machine() -> dict[str, Any]:
    import torch

    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def report(runs: dict[str, dict[str, list[dict[str, float]]]], largest: int) -> tuple[str, dict[str, Any]]:
    """A table of medians, and the ratios with their aims."""
    lines = [
        "| cache | contender | wall, s | processor, s | anonymous memory, MB | n |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    ratios: dict[str, Any] = {}
    for cache, contenders in runs.items():
        middle = {}
        for name, made in contenders.items():
            walls = [run["wall"] for run in made]
            middle[name] = {key: statistics.median(run[key] for run in made) for key in ("wall", "processor", "memory")}
            wall = f"{middle[name]['wall']:.2f} ({min(walls):.2f} to {max(walls):.2f})"
            rest = f"{middle[name]['processor']:.2f} | {max(run['memory'] for run in made) / 1e6:,.0f} | {len(made)}"
            lines.append(f"| {cache} | {name} | {wall} | {rest} |")
        for what, aim in AIMS:
            mine, _, other = what.partition(" to ")
            if {mine, other} <= middle.keys():
                for key in ("wall", "processor"):
                    value = middle[mine][key] / middle[other][key]
                    ratios[f"{cache}, {key}, {what}"] = {"value": value, "aim": aim}
    limit = 600e6 + 3 * largest
    used = [run["memory"] for contenders in runs.values() for run in contenders.get("mask", [])]
    lines.append("")
    lines += [f"{name}: {entry['value']:.2f} (aim: at most {entry['aim']:.2f})" for name, entry in ratios.items()]
    if used:
        lines.append(f"anonymous memory of mask: {max(used) / 1e6:,.0f} MB (aim: at most {limit / 1e6:,.0f} MB)")
    return "\n".join(lines), ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender, warm and cold")
    parser.add_argument("--layers", type=int, default=LAYERS, help="22 make 1.1 billion weights")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--caches", nargs="+", choices=("warm", "cold"), default=["warm", "cold"])
    parser.add_argument("--mergekit", help="a Python that has mergekit; else it is installed")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    parser.add_argument("--child", choices=("linear", "spherical", "mask", "make"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child == "make":
        return make(options.folder, options.layers)
    if options.child:
        return child(options.folder, options.child)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        python = options.mergekit
        if "mergekit" in options.only and python is None:
            python = install(folder / "environment")
        given = ["--folder", str(folder), "--layers", str(options.layers)]
        subprocess.run([sys.executable, __file__, "--child", "make", *given], check=True)
        runs: dict[str, dict[str, list[dict[str, float]]]] = {
            cache: {name: [] for name in options.only} for cache in options.caches
        }
        for number in range(options.rounds):
            for cache in options.caches:
                for name in options.only[number % len(options.only) :] + options.only[: number % len(options.only)]:
                    prepare(folder, cache)
                    made = measure(command(name, folder, python))
                    runs[cache][name].append(made)
                    print(
                        f"round {number + 1} of {options.rounds}, {cache}, {name}: {made['wall']:.2f} s, "
                        f"{made['processor']:.2f} s of processor, {made['memory'] / 1e6:,.0f} MB; "
                        f"load {os.getloadavg()[0]:.1f}",
                        file=sys.stderr,
                    )
        described = machine() | (versions(python) if "mergekit" in options.only else {})
    largest = 2 * VOCABULARY * HIDDEN
    table, ratios = report(runs, largest)
    if options.json:
        print(json.dumps({"machine": described, "runs": runs, "ratios": ratios}, indent=2))
    else:
        print("\n".join([", ".join(f"{key} {value}" for key, value in described.items()), "", table]))


if __name__ == "__main__":
    main()
