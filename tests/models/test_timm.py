"""timm's models as plain modules.

timm needs torchvision, which must not be importable next to transformers here: its build for one kind of torch breaks
the import of the other. So both live in a folder of their own, and a process of its own reads them.
"""

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
"""

SCRIPT = """
import json
import sys
from pathlib import Path

from unbackdoor import Dataset, ImageEncoder, purifiers, purify, save

name, options, out = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
torch.set_num_threads(1)
torch.manual_seed(0)
model = timm.create_model(name, pretrained=False, num_classes=3, **options).eval()
items = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8)
encode = ImageEncoder(mean=(0.5,), std=(0.5,), channels=3)
clean = Dataset(items=items, labels=torch.arange(24) % 3, encode=encode, name="pictures")
before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
result = purify(model, clean, purifiers.FST(epochs=1, batch_size=8))
assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())

out.mkdir()
save(result.model, out)
written = str(out / "model.safetensors")
again = timm.create_model(name, pretrained=False, num_classes=3, checkpoint_path=written, **options)
with torch.no_grad():
    assert torch.equal(again.eval()(encode(items)), result.model.eval()(encode(items)))
print(result.record["head"])
"""


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(SITE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def timm() -> None:
    tried = run(PREPARE)
    if tried.returncode != 0:
        reason = (tried.stderr.strip().splitlines() or ["no reason given"])[-1]
        pytest.skip(f"timm cannot be imported from {SITE.name} ({reason}); make test installs it")


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize(
    ("name", "options", "head"),
    [
        ("resnet10t", "{}", "fc"),
        ("vit_tiny_patch16_224", '{"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}', "head"),
    ],
)
def test_a_timm_model_is_purified_and_read_by_timm(name: str, options: str, head: str, tmp_path: Path) -> None:
    ended = run(PREPARE + SCRIPT, name, options, str(tmp_path / "out"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == head
