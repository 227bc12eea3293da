"""timm's models as plain modules.

timm needs torchvision, which must not be importable next to transformers here: its build for one kind of torch breaks
the import of the other. So both live in a folder of their own, and a process of its own reads them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SITE = Path(os.environ.get("UNBACKDOOR_TIMM_SITE", Path(__file__).parents[2] / ".venv" / "timm-site"))

# torchvision registers fake kernels for operators of its compiled half, which a plain build of torch does not load.
PREPARE = """
import torch
operators = torch.library.Library("torchvision", "DEF")
operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import timm
print("timm is imported", flush=True)
"""

SCRIPT = """
import json
import sys
from pathlib import Path

from unbackdoor import Dataset, ImageEncoder, purifiers, purify, save

torch.set_num_threads(1)
for name, options in json.loads(sys.argv[1]).items():
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=3, **options).eval()
    items = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8)
    encode = ImageEncoder(mean=(0.5,), std=(0.5,), channels=3)
    clean = Dataset(items=items, labels=torch.arange(24) % 3, encode=encode, name="pictures")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    result = purify(model, clean, purifiers.FST(epochs=1, batch_size=8))
    out = Path(name)
    out.mkdir()
    save(result.model, out)
    written = str(out / "model.safetensors")
    again = timm.create_model(name, pretrained=False, num_classes=3, checkpoint_path=written, **options)
    with torch.no_grad():
        same = torch.equal(again.eval()(encode(items)), result.model.eval()(encode(items)))
    kept = all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())
    found = {"head": result.record["head"], "timm reads the same": same, "the suspect is as it was": kept}
    (out / "found.json").write_text(json.dumps(found))
"""

MODELS = {"resnet10t": {}, "vit_tiny_patch16_224": {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what one process, which imports timm once, found for each model."""
    folder = tmp_path_factory.mktemp("timm")
    paths = os.pathsep.join([str(SITE), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, "-c", PREPARE + SCRIPT, json.dumps(MODELS)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if "timm is imported" not in ended.stdout:
        reason = (ended.stderr.strip().splitlines() or ["no reason given"])[-1]
        pytest.skip(f"timm cannot be imported from {SITE.name} ({reason}); make test installs it")
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.mark.parametrize(("name", "head"), [("resnet10t", "fc"), ("vit_tiny_patch16_224", "head")])
def test_a_timm_model_is_purified_and_read_by_timm(name: str, head: str, place: Path) -> None:
    found = json.loads((place / name / "found.json").read_text())
    assert found == {"head": head, "timm reads the same": True, "the suspect is as it was": True}
