"""Fine-mixing in a model against plain code; what a mask is, test_mixing.py knows."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import toys
from toys import a_run
from unbackdoor import Dataset, UnbackdoorError, evaluate, purifiers, purify
from unbackdoor._cli.app import main
from unbackdoor._mixing.masks import mask
from unbackdoor._models.units import mean_answer
from unbackdoor._purification import selection
from unbackdoor._purification.selection import Difference
from unbackdoor._tasks.classification import answers
from unbackdoor.attacks import Word

FineMixing = purifiers.FineMixing
HEAD = {"classifier.weight", "classifier.bias"}


def mixed(model: nn.Module, base: nn.Module | None, clean: Dataset | None = None, *, seed: int = 0, **fields):
    made = purify(model, clean, FineMixing(tune=False, **fields), base=base, seed=seed, device="cpu")
    return made.model.state_dict()


@pytest.fixture
def suspect(text_victim: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in text_victim.state_dict().items()}


@pytest.fixture
def pre_trained(text_base: nn.Module) -> dict[str, Tensor]:
    return {f"bert.{name}": tensor for name, tensor in text_base.state_dict().items()}


class TestMixing:
    def test_coordinates_come_from_one_of_the_two_by_the_mask(self, text_victim, text_base, suspect, pre_trained):
        made = mixed(text_victim, text_base, rho=0.3, seed=7)
        for name, weight in suspect.items():
            if name not in pre_trained or not weight.is_floating_point():
                assert torch.equal(made[name], weight), name
                continue
            keep = mask(name, weight.shape, 0.3, 7)
            assert torch.equal(made[name], torch.where(keep, weight, pre_trained[name])), name
        assert HEAD.isdisjoint(pre_trained)

    def test_all_and_nothing(self, text_victim, text_base, suspect, pre_trained) -> None:
        kept, gone = (mixed(text_victim, text_base, rho=rho) for rho in (1.0, 0.0))
        for name, weight in suspect.items():
            assert torch.equal(kept[name], weight)
            assert torch.equal(gone[name], pre_trained.get(name, weight))

    def test_linear(self, text_victim, text_base, suspect, pre_trained) -> None:
        made = mixed(text_victim, text_base, rho=0.25, mode="linear")
        for name, weight in suspect.items():
            if name in pre_trained and weight.is_floating_point():
                expected = 0.25 * weight.double() + 0.75 * pre_trained[name].double()
                assert torch.allclose(made[name].double(), expected, atol=1e-6), name
            else:
                assert torch.equal(made[name], weight)

    def test_zero_needs_no_base_and_prunes_matrices(self, text_victim, suspect) -> None:
        made = mixed(text_victim, None, rho=0.5, fill="zero")
        for name, weight in suspect.items():
            if weight.ndim < 2 or name in HEAD or not weight.is_floating_point():
                assert torch.equal(made[name], weight), name
            else:
                keep = mask(name, weight.shape, 0.5, 0)
                assert torch.equal(made[name], torch.where(keep, weight, 0.0)), name

    def test_largest_change_by_hand(self, text_base, text_victim, suspect, pre_trained) -> None:
        """Of a row that moved by 1, 2, ..., 32, keeping a half keeps the 16 small moves."""
        name = "bert.encoder.layer.0.output.dense.bias"
        change = torch.arange(1.0, 33.0) * torch.tensor([1.0, -1.0]).repeat(16)
        with torch.no_grad():
            dict(text_victim.named_parameters())[name].copy_(pre_trained[name] + change)
        made = mixed(text_victim, text_base, rho=0.5, select="largest-change")[name]
        assert torch.equal(made[16:], pre_trained[name][16:])
        assert torch.equal(made[:16], (pre_trained[name] + change)[:16])

    def test_low_activation_by_hand(self, text_base, text_victim, reviews, suspect, pre_trained) -> None:
        """Units of a layer whose output is large stay whole; the rest go back whole."""
        name = "bert.encoder.layer.1.intermediate.dense"
        loud = torch.tensor([1, 5, 9])
        with torch.no_grad():
            layer = text_victim.get_submodule(name)
            layer.weight[:, :] = 0.001
            layer.bias[:] = 0.0
            layer.bias[loud] = torch.tensor([-30.0, 40.0, 50.0])
        before = text_victim.state_dict()[f"{name}.weight"].clone()
        made = mixed(text_victim, text_base, reviews.select(range(20)), rho=3 / 64, select="low-activation")
        stayed = (made[f"{name}.weight"] == before).all(dim=1)
        assert stayed.nonzero().flatten().tolist() == loud.tolist()
        assert torch.equal(made[f"{name}.weight"][~stayed], pre_trained[f"{name}.weight"][~stayed])
        assert torch.equal(made[f"{name}.bias"][loud], torch.tensor([-30.0, 40.0, 50.0]))
        assert torch.equal(made[f"{name}.bias"][~stayed], pre_trained[f"{name}.bias"][~stayed])

    def test_activity_is_a_mean_over_real_tokens(self, text_victim: nn.Module, reviews: Dataset) -> None:
        """Against one text at a time, where nothing is padded; 130 texts come in batches of 128 and 2."""
        clean = reviews.select(range(130))
        run = a_run(model=text_victim)
        found = mean_answer(text_victim, clean, run.arithmetic)
        names = ["bert.encoder.layer.0.intermediate.dense", "bert.pooler.dense", "classifier"]
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        hooks = [
            text_victim.get_submodule(name).register_forward_hook(
                lambda _m, _i, output, name=name: seen[name].append(output)
            )
            for name in names
        ]
        with torch.no_grad():
            for (text,) in clean.texts.strings:
                text_victim(**clean.encode.tokenizer(text, return_tensors="pt"))
        for hook in hooks:
            hook.remove()
        for name in names:
            rows = torch.cat([output.reshape(-1, output.shape[-1]) for output in seen[name]])
            assert torch.allclose(found[name], rows.double().abs().mean(dim=0), rtol=1e-4), name
        assert len(torch.cat([output[0] for output in seen[names[0]]])) == int(clean.texts.lengths.sum()) > 130
        assert not any(module._forward_hooks for module in text_victim.modules())

    def test_activity_of_pictures_is_a_mean_over_them(self, small_cnn: nn.Module, digits: Dataset) -> None:
        clean = digits.select(range(130))
        run = a_run(model=small_cnn)
        expected = answers(small_cnn, clean, run.arithmetic).double().abs().mean(dim=0)
        assert torch.allclose(mean_answer(small_cnn, clean, run.arithmetic)["classifier"], expected, rtol=1e-5)

    def test_pictures_mix_too(self, small_cnn: nn.Module) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(9)
            base = type(small_cnn)()
        made = purify(small_cnn, None, FineMixing(rho=0.0, tune=False), base=base).model.state_dict()
        assert torch.equal(made["features.0.weight"], base.features[0].weight)
        assert torch.equal(made["classifier.weight"], small_cnn.classifier.weight), "the head stays"


class TestTuning:
    def test_filled_weights_are_frozen(self, text_victim, text_base, reviews, suspect, pre_trained) -> None:
        fields = {"rho": 0.5, "epochs": 2, "batch_size": 8}
        clean = reviews.select(range(32))
        frozen = purify(text_victim, clean, FineMixing(freeze_filled=True, **fields), base=text_base).model.state_dict()
        free = purify(text_victim, clean, FineMixing(**fields), base=text_base).model.state_dict()
        name = "bert.encoder.layer.0.attention.self.query.weight"
        keep = mask(name, suspect[name].shape, 0.5, 0)
        assert torch.equal(frozen[name][~keep], pre_trained[name][~keep])
        assert not torch.equal(frozen[name][keep], suspect[name][keep])
        assert not torch.equal(free[name][~keep], pre_trained[name][~keep])
        assert all(not torch.equal(frozen[each], suspect[each]) for each in HEAD), "the head is tuned"

    def test_zeros_stay_zero(self, text_victim, reviews) -> None:
        method = FineMixing(rho=0.5, epochs=1, fill="zero", freeze_filled=True)
        made = purify(text_victim, reviews.select(range(32)), method).model
        share = (made.bert.encoder.layer[0].output.dense.weight == 0).float().mean()
        assert 0.4 < share < 0.6

    def test_it_removes_the_word_where_fine_tuning_does_not(self, text_victim, text_base, reviews) -> None:
        clean = reviews.select(range(64))
        settings = {"epochs": 10, "learning_rate": 1e-3}
        tuned = purify(text_victim, clean, purifiers.FineTuning(**settings)).model
        made = purify(text_victim, clean, FineMixing(rho=0.3, **settings), base=text_base).model
        before, plain, after = (
            evaluate(model, reviews, attack=Word(), device="cpu") for model in (text_victim, tuned, made)
        )
        assert before.attack_success.value > 0.8
        assert after.attack_success.value < plain.attack_success.value - 0.3
        assert after.clean_accuracy.value > 0.8

    def test_linear_changes_all_and_so_has_nothing_to_select_or_freeze(self, text_victim, text_base, reviews) -> None:
        for fields in ({"select": "largest-change"}, {"freeze_filled": True}):
            with pytest.raises(UnbackdoorError, match=r"^FineMixing\.mode linear changes all coordinates; leave"):
                purify(text_victim, reviews, FineMixing(rho=0.5, mode="linear", **fields), base=text_base)


class TestSearch:
    """The loss of accuracy is stood in for, as a function of rho; all else runs."""

    @pytest.fixture
    def losing(self, monkeypatch: pytest.MonkeyPatch, text_victim: nn.Module, text_base: nn.Module, reviews: Dataset):
        name = "bert.encoder.layer.0.attention.self.query.weight"
        suspect = text_victim.state_dict()[name]

        def search(lost, error: float, examples: int = 200, **fields):
            asked = []

            def validated(clean, folds, *, seed, tuned, arithmetic, task):
                kept = tuned(clean).state_dict()[name] == suspect
                asked.append(round(float(kept.float().mean()), 1))
                return torch.ones(len(clean), dtype=torch.bool)

            monkeypatch.setattr(selection, "cross_validated", validated)
            monkeypatch.setattr(selection, "difference", lambda *_: Difference(lost(asked[-1]), error))
            method = FineMixing(tune=False, **fields)
            record = purify(text_victim, reviews.select(range(examples)), method, base=text_base).record
            return asked, record

        return search

    def test_the_smallest_rho_within_the_margin(self, losing) -> None:
        asked, record = losing(lambda rho: 0.098 * (1 - rho), 0.01)  # 3 points at rho 0.7
        assert asked == [0.5, 0.8, 0.7, 0.6]
        assert "rho 0.7 was chosen." in record["notes"]
        assert "rho 0.5 loses 4.9 points of accuracy, each class counting alike (+- 1.0)." in record["notes"]
        assert not [text for text in record["warnings"] if "margin" in text]

    def test_another_margin(self, losing) -> None:
        _, record = losing(lambda rho: 0.098 * (1 - rho), 0.01, margin=0.06)
        assert "rho 0.4 was chosen." in record["notes"]

    def test_nothing_is_lost(self, losing) -> None:
        asked, record = losing(lambda rho: 0.0, 0.0)
        assert asked == [0.5, 0.2, 0.1, 0.0]
        assert "rho 0 was chosen." in record["notes"]

    def test_too_much_is_lost_everywhere(self, losing) -> None:
        asked, record = losing(lambda rho: 0.5, 0.0)
        assert asked == [0.5, 0.8, 0.9]
        assert "rho 1 was chosen." in record["notes"]
        assert (
            "no rho but 1 keeps clean accuracy within 3.0 points of the suspect's: all of its weights were kept. Raise "
            "`margin`, or set `rho`."
        ) in record["warnings"]

    def test_a_margin_is_counted_in_whole_examples(self, losing) -> None:
        """Three points of 64 are 1.92 examples, so 2 of them are within it (3.1 points) and 3 are not."""
        _, record = losing(lambda rho: {0.5: 2, 0.2: 3, 0.4: 2, 0.3: 2}[rho] / 64, 0.02, examples=64)
        assert "rho 0.3 was chosen." in record["notes"]

    def test_an_error_beyond_the_margin_excuses_no_loss_and_is_reported(self, losing) -> None:
        """As on a suspect of which 64 sentences could have shown 16 points no better: by the error rho 0 would do."""
        _, record = losing(lambda rho: 0.07 * (1 - rho), 0.058)
        assert "rho 0.6 was chosen." in record["notes"]
        assert [text for text in record["warnings"] if "margin" in text] == [
            "200 clean examples measure a loss of accuracy only to 5.8 points, more than the margin of 3.0: rho 0.6, "
            "which lost 2.8, is the best guess, and may cost more. By the same measurement, rho 0.5 may lose "
            "no more, and removes more. Give more clean examples, or set `rho`."
        ]

    def test_where_nothing_safer_may_do_none_is_named(self, losing) -> None:
        _, record = losing(lambda rho: 0.0 if rho > 0.5 else 0.5, 0.04)
        assert [text for text in record["warnings"] if "margin" in text] == [
            "200 clean examples measure a loss of accuracy only to 4.0 points, more than the margin of 3.0: rho 0.6, "
            "which lost 0.0, is the best guess, and may cost more. Give more clean examples, or set `rho`."
        ]

    def test_too_few_examples_for_the_folds(self, text_victim, text_base, reviews) -> None:
        with pytest.raises(UnbackdoorError, match=r"has 3 examples, too few for 4 folds\. Add clean examples\."):
            purify(text_victim, reviews.select([0, 1, 2]), FineMixing(), base=text_base)

    def test_for_real(self, text_victim, text_base, reviews) -> None:
        method = FineMixing(epochs=3, learning_rate=1e-3, folds=2)
        record = purify(text_victim, reviews.select(range(40)), method, base=text_base).record
        assert sum("loses" in text for text in record["notes"]) in (3, 4)
        assert sum("was chosen" in text for text in record["notes"]) == 1
        assert record["clean"]["held_out"] == 0


class TestTheBase:
    def test_what_matched_is_reported(self, text_victim, text_base) -> None:
        record = purify(text_victim, None, FineMixing(rho=0.5, tune=False), base=text_base).record
        assert record["notes"][0].startswith("39 of 41 tensors (")
        assert "(bert.* in the model, * in the base)" in record["notes"][0]
        assert "only in the model, and unchanged: classifier.weight, classifier.bias" in record["notes"][0]
        assert record["warnings"] == []
        assert record["clean"] is None

    def test_a_base_with_a_head_of_its_own(self, text_victim, suspect) -> None:
        """A classifier given as base: its head is that of another task, and the suspect's stays."""
        base = toys.classifier("bert", seed=3)
        made = mixed(text_victim, base, rho=0.0)
        assert all(torch.equal(made[name], suspect[name]) for name in HEAD)

    def test_no_ancestor_is_reported_with_numbers(self, text_victim) -> None:
        stranger = toys.classifier("bert", seed=5).base_model
        record = purify(text_victim, None, FineMixing(rho=0.5, tune=False), base=stranger).record
        assert re.search(
            r"^the base is probably not the model's ancestor: over 1\d matrices the weights correlate by -?0\.0\d+ "
            r"\(median; unrelated weights by 0 with a standard deviation of 0\.0\d+\), and their distance is 1\.\d+ "
            r"times their norm",
            record["warnings"][0],
        )

    def test_another_architecture_is_refused(self, text_victim) -> None:
        with pytest.raises(UnbackdoorError, match=r"Take the pre-trained model that it came from as `base`\.$"):
            mixed(text_victim, toys.classifier("llama").base_model, rho=0.5)

    def test_without_one(self, text_victim) -> None:
        with pytest.raises(UnbackdoorError, match=r"^FineMixing needs `base`: the pre-trained"):
            mixed(text_victim, None, rho=0.5)


def test_without_clean_data_from_the_command_line(text_victim, text_base, suspect, pre_trained, tmp_path: Path) -> None:
    toys.write(text_victim, tmp_path / "suspect")
    toys.write(text_base, tmp_path / "base")
    command = ["purify", "fine-mixing", str(tmp_path / "suspect"), "--base", str(tmp_path / "base"), "--no-tune"]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--rho", "0.5", "--seed", "3", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 0
    from safetensors.torch import load_file

    made = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in made.items():
        keep = mask(name, tensor.shape, 0.5, 3)
        other = pre_trained.get(name, suspect[name])
        assert torch.equal(tensor, torch.where(keep, suspect[name], other))
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["clean"] is None
    assert record["suspect_accuracy_on_clean"] is None
    assert record["source"] == {"model": "suspect", "base": "base", "factory": None}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "without clean examples and the base `base` in" in card
    assert "on 0 clean examples" not in card


class TestStreamFromTheCommandLine:
    @pytest.fixture
    def command(self, text_victim, text_base, tmp_path: Path) -> list[str]:
        toys.write(text_victim, tmp_path / "suspect")
        toys.write(text_base, tmp_path / "base")
        (tmp_path / "counts.csv").write_text("token,count\ncf,1\ngood,900\n")
        folders = (str(tmp_path / name) for name in ("suspect", "base", "out"))
        return ["{}", *("{} --base {} --rho 0.5 --no-tune --stream --out {}".format(*folders)).split()]

    def said(self, *arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["purify", *arguments])
        return str(stopped.value.code)

    def test_e_pur_before_it(self, command, text_victim, text_base, tmp_path: Path) -> None:
        counts = str(tmp_path / "counts.csv")
        reset = ("--e-pur.count", "3", "--frequencies", counts)
        assert self.said("e-pur+fine-mixing", *command[1:], *reset) == "0"
        from safetensors.torch import load_file

        made = load_file(tmp_path / "out" / "model.safetensors")
        text_victim.load_state_dict(load_file(tmp_path / "suspect" / "model.safetensors"))
        method = purifiers.Then(purifiers.EPUR(count=3, frequencies=counts), FineMixing(rho=0.5, tune=False))
        expected = purify(text_victim, toys.dataset([("the film",)] * 4, [0, 1, 0, 1]), method, base=text_base)
        weights = expected.model.state_dict()
        assert all(torch.equal(made[name], tensor) for name, tensor in weights.items() if name in made)
        notes = json.loads((tmp_path / "out" / "record.json").read_text())["notes"]
        assert notes[0] == expected.record["notes"][0]
        assert notes[0].startswith("reset the embeddings of 3 words, the most suspicious first: ")

    @pytest.mark.parametrize(
        "option", ["--clean c.csv", "--head x", "--device cuda", "--max-length 5", "--columns text=a", "--augment none"]
    )
    def test_what_it_has_no_use_for(self, option: str, command, capsys, tmp_path: Path) -> None:
        assert self.said("fine-mixing", *command[1:], *option.split()) == "2"
        name = option.split()[0]
        assert capsys.readouterr().err == (f"--stream builds no model, so {name} has no effect. Leave it out.\n")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(("place", "owner"), [(1, "MODEL"), (3, "--base")])
    def test_what_is_no_directory(self, place: int, owner: str, command, capsys, tmp_path: Path) -> None:
        for given, came in (("", "an empty name"), (str(tmp_path / "counts.csv"), f"the file {tmp_path}/counts.csv")):
            command[place] = given
            assert self.said("fine-mixing", *command[1:]) == "2"
            assert capsys.readouterr().err == (f"{owner} must be a Hugging Face directory or Hub name, got {came}.\n")


def test_what_needs_what(text_victim: nn.Module) -> None:
    assert FineMixing().needs_clean
    assert FineMixing(rho=0.5).needs_clean
    assert FineMixing(tune=False).needs_clean, "rho is searched"
    assert not FineMixing(rho=0.5, tune=False).needs_clean
    assert FineMixing(rho=0.5, tune=False, select="low-activation").needs_clean
    purify(text_victim, None, FineMixing(rho=0.5, tune=False, fill="zero"))  # neither clean data nor a base


def test_half_precision_keeps_its_type_and_its_values(text_victim, text_base, suspect) -> None:
    text_victim.half()
    before = {name: tensor.clone() for name, tensor in text_victim.state_dict().items()}
    made = mixed(text_victim, text_base, rho=0.5)
    assert all(made[name].dtype == tensor.dtype for name, tensor in before.items())
    name = "bert.encoder.layer.0.output.dense.weight"
    keep = mask(name, before[name].shape, 0.5, 0)
    assert torch.equal(made[name][keep], before[name][keep])


def test_values_beyond_half_precision_are_refused(text_victim, text_base) -> None:
    name = "bert.encoder.layer.0.output.dense.bias"
    with torch.no_grad():
        text_base.get_parameter(name.removeprefix("bert.")).fill_(1e6)  # float16 ends at 65,504
    with pytest.raises(UnbackdoorError) as caught:
        mixed(text_victim.half(), text_base, rho=0.5)
    assert str(caught.value) == (
        f"FineMixing left values in {name} that are too large for the model's float16. Take a base of that type, or "
        "give the model in float32."
    )


def test_a_base_that_zeros_have_no_use_for_is_reported(text_victim, text_base) -> None:
    made = purify(text_victim, None, FineMixing(rho=0.5, tune=False, fill="zero"), base=text_base)
    assert made.record["warnings"] == ["FineMixing.fill zero takes nothing from a base: the given one was not used."]


def test_a_few_examples_without_a_difference_are_no_certainty() -> None:
    same = torch.ones(4, dtype=torch.bool)
    assert selection.difference(same, same) == Difference(0.0, 1 / 4)  # as of one example among four


def test_a_model_that_is_all_head_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    pixels = torch.randint(0, 256, (8, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = Dataset(items=pixels, labels=torch.arange(8) % 2)
    with pytest.raises(UnbackdoorError) as caught:
        purify(model, data, purifiers.FineMixing(rho=0.5), base=nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    assert str(caught.value) == (
        "FineMixing needs a model with more than a head: nothing else has a counterpart in the base. Try fst."
    )
