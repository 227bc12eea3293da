"""Sign-elected merges on disk: those of memory to the last bit, and by hand."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import chats
from commands import run
from unbackdoor import UnbackdoorError, purify
from unbackdoor._mixing import masks
from unbackdoor._mixing.election import cut, mix_
from unbackdoor._mixing.merging import sign_elected
from unbackdoor._mixing.stream import purify_stream
from unbackdoor._models.loading import load
from unbackdoor.purifiers import FineMixing

Weights = dict[str, Tensor]
ROUNDED = 64  # changes are whole multiples of 1/64, so that many are equal


def save(folder: Path, weights: Weights, shards: int = 1) -> Path:
    folder.mkdir()
    config = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = {name: f"model-{number % shards + 1:05}-of-{shards:05}.safetensors" for number, name in enumerate(weights)}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in weights.items() if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def read(folder: Path) -> Weights:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def three(dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], wide: bool = False) -> tuple[Weights, ...]:
    """Suspect, proxy and base; the base has no head, and the suspect's is another one than the proxy's."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "bert.encoder.layer.0.dense.weight": (1100, 1000) if wide else (17, 16),
        "bert.encoder.layer.0.dense.bias": (16,),
        "bert.empty.weight": (0, 4),
    }
    base = {name: torch.randn(shape, generator=generator).to(dtypes[2]) for name, shape in shapes.items()}

    def moved(dtype: torch.dtype) -> Weights:
        steps = {name: torch.randint(-5, 6, shape, generator=generator) / ROUNDED for name, shape in shapes.items()}
        changed = {name: (base[name].double() + steps[name]).to(dtype) for name in shapes}
        return changed | {"classifier.weight": torch.randn(2, 16, generator=generator).to(dtype)}

    return moved(dtypes[0]), moved(dtypes[1]), base


FLOAT, HALF, BRAIN, DOUBLE = torch.float32, torch.float16, torch.bfloat16, torch.float64


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "dtypes",
    [(FLOAT, FLOAT, FLOAT), (BRAIN, BRAIN, BRAIN), (HALF, FLOAT, BRAIN), (DOUBLE, FLOAT, FLOAT)],
    ids=str,
)
def test_the_stream_gives_the_bits_of_memory(
    rho: float, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], tmp_path: Path
) -> None:
    suspect, proxy, base = three(dtypes)
    given = save(tmp_path / "suspect", suspect, shards=2), save(tmp_path / "base", base)
    other = save(tmp_path / "proxy", proxy)
    record = purify_stream(*given, tmp_path / "out", rho=rho, mode="sign-elected", proxy=other)
    found, exact = read(tmp_path / "out"), DOUBLE if dtypes[0] == DOUBLE else FLOAT
    assert torch.equal(found.pop("classifier.weight"), suspect["classifier.weight"])
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        wanted = sign_elected(base[name].to(exact), [suspect[name], proxy[name]], rho).to(dtypes[0])
        assert tensor.dtype == dtypes[0]
        assert torch.equal(tensor, wanted), name
    assert record["method"]["parameters"] == {"rho": rho, "mode": "sign-elected"}


def test_a_tensor_of_several_pieces_with_many_equal_numbers(tmp_path: Path) -> None:
    suspect, proxy, base = three((FLOAT, FLOAT, FLOAT), wide=True)
    name = "bert.encoder.layer.0.dense.weight"
    assert len(masks.chunks(base[name].numel())) == 2
    folders = [save(tmp_path / each, weights) for each, weights in (("s", suspect), ("p", proxy), ("b", base))]
    purify_stream(folders[0], folders[2], tmp_path / "out", rho=0.2, mode="sign-elected", proxy=folders[1])
    wanted = sign_elected(base[name], [suspect[name], proxy[name]], 0.2)
    assert torch.equal(read(tmp_path / "out")[name], wanted)


def test_the_numbers_that_stay_by_hand() -> None:
    first, second = torch.tensor([4.0, -3.0, 2.0, 3.0, 0.5]), torch.tensor([2.0, 3.0, -4.0, 0.1, -0.5])
    base = torch.ones(5)
    pieces = [slice(0, 2), slice(2, 4), slice(4, 5)]
    parts = [[each[piece] for piece in pieces] for each in (first, second)]
    cuts = cut(parts[0].__getitem__, range(3), 2), cut(parts[1].__getitem__, range(3), 2)
    # Two numbers of each change stay: 4 and the first of the two of size 3; then 3 and -4.
    assert [cuts[0].of(first[piece], index).tolist() for index, piece in enumerate(pieces)] == [[4, -3], [0, 0], [0]]
    assert [cuts[1].of(second[piece], index).tolist() for index, piece in enumerate(pieces)] == [[0, 3], [-4, 0], [0]]
    out = torch.empty(5)
    for index, piece in enumerate(pieces):
        mix_(out[piece], base[piece], [first[piece], second[piece]], cuts, index)
    assert out.tolist() == [5.0, 1.0, -3.0, 1.0, 1.0]  # -3 and 3 are of no sign in sum, so the base stays


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model and two that came from it, in bf16."""
    folder = tmp_path_factory.mktemp("place")
    for name, seed in (("base", None), ("suspect", 1), ("sibling", 2)):
        model = chats.language_model()
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        model.bfloat16().save_pretrained(folder / name)
        chats.tokenizer().save_pretrained(folder / name)
    return folder


def test_fine_mixing_gives_the_same_in_memory_and_by_the_command_line(place: Path) -> None:
    suspect, base, sibling = (load(place / name).model for name in ("suspect", "base", "sibling"))
    method = FineMixing(rho=0.4, mode="sign-elected", tune=False)
    memory: nn.Module = purify(suspect, None, method, base=base, proxy=sibling).model
    options = ("--base", "base", "--proxy", "sibling", "--mode", "sign-elected", "--rho", "0.4", "--no-tune")
    for more in ((), ("--stream",)):
        out = f"out{len(more)}"
        done = run("purify", "fine-mixing", "suspect", *options, *more, "--out", out, cwd=place)
        assert done.returncode == 0, done.stderr
        found = load(place / out).model.state_dict()
        assert all(torch.equal(tensor, found[name]) for name, tensor in memory.state_dict().items())
    assert not torch.equal(memory.state_dict()["model.embed_tokens.weight"], suspect.state_dict()["lm_head.weight"])


def test_what_does_not_fit_is_refused(place: Path, tmp_path: Path) -> None:
    given, out = (place / "suspect", place / "base"), tmp_path / "out"
    for options in ({"mode": "sign-elected"}, {"mode": "linear", "proxy": place / "sibling"}):
        with pytest.raises(UnbackdoorError, match=r"`mode=sign-elected` goes with `proxy`, the model whose changes"):
            purify_stream(*given, out, rho=0.5, **options)
    chats.language_model(layers=1).save_pretrained(tmp_path / "shallow")
    with pytest.raises(UnbackdoorError, match=r"^`proxy` .* lacks model\.layers\.1"):
        purify_stream(*given, out, rho=0.5, mode="sign-elected", proxy=tmp_path / "shallow")
    shallow, suspect, base = (load(place / name).model for name in ("sibling", "suspect", "base"))
    shallow.model.layers = shallow.model.layers[:1]
    method = FineMixing(rho=0.5, mode="sign-elected", tune=False)
    with pytest.raises(UnbackdoorError, match=r"^`proxy` lacks model\.layers\.1"):
        purify(suspect, None, method, base=base, proxy=shallow)
    chats.short_reader().save_pretrained(tmp_path / "other")
    with pytest.raises(UnbackdoorError, match=r"^`proxy` .*/other has other tensors than the suspect"):
        purify_stream(*given, out, rho=0.5, mode="sign-elected", proxy=tmp_path / "other")
    with pytest.raises(UnbackdoorError, match=r"^`proxy` is a GPT2LMHeadModel with other tensors than the suspect"):
        purify(suspect, None, method, base=base, proxy=chats.short_reader())
    with pytest.raises(UnbackdoorError, match="FineMixing needs `proxy`: a model for the same task"):
        purify(suspect, None, method, base=base)
    assert not out.exists()
