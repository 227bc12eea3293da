"""A guarded model as servers and notebooks use it: threads, columns of pandas, pipelines of several tasks."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

import toys
from unbackdoor import Dataset, ImageEncoder, UnbackdoorError, fit_guard, guards
from unbackdoor._guarding.fitted import FittedGuard
from unbackdoor._guarding.identity import tokenizer_hash

WIDTHS = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXTS = [text for (text,) in toys.reviews(24, seed=5).texts.strings]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A small BERT with random weights."""
    return toys.classifier("bert")


@pytest.fixture(scope="module")
def sure(model: nn.Module, reviews: Dataset) -> FittedGuard:
    """PSIM, whose side model answers with another head than the model has."""
    return fit_guard(model, reviews.select(range(40)), guards.Psim(steps=3), false_alarms=0.1, device="cpu")


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("piped", [False, True])
def test_threads_get_the_answers_that_one_alone_gets(piped: bool, sure: FittedGuard, model: nn.Module, hasty) -> None:
    behind = transformers.TextClassificationPipeline(model=model, tokenizer=toys.tokenizer()) if piped else model
    wrapped = sure.wrap(behind, device="cpu")
    alone = [repr(wrapped(text)) for text in TEXTS]
    together: list[list[str]] = [[] for _ in range(4)]

    def work(place: int) -> None:
        together[place].extend(repr(wrapped(text)) for text in TEXTS)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [alone] * 4


def test_texts_in_a_column_or_in_an_array(sure: FittedGuard, model: nn.Module) -> None:
    wrapped = sure.wrap(model, device="cpu")
    expected = [answer.decision for answer in wrapped(TEXTS)]
    frame = pd.DataFrame({"text": TEXTS}, index=range(100, 100 + len(TEXTS)))
    for given in (frame["text"], np.array(TEXTS), np.array(TEXTS, dtype=object)):
        assert [answer.decision for answer in wrapped(given)] == expected
    assert wrapped(frame["text"][:0]) == []
    with pytest.raises(UnbackdoorError, match=r"got list of NoneType and str\. Make a list of them\.$"):
        wrapped(pd.Series(["a", None], dtype=object))
    with pytest.raises(UnbackdoorError, match=r"got DataFrame\. Make a list of them\.$"):
        wrapped(frame)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, when it is asked to compile
def test_a_model_within_a_wrapper(sure: FittedGuard, model: nn.Module) -> None:
    for wrapper, inner in ((nn.DataParallel(model), "module"), (torch.compile(model), "_orig_mod")):
        with pytest.raises(UnbackdoorError) as refusal:
            sure.wrap(wrapper)
        assert str(refusal.value) == (
            f"A guard watches the parts of a model, which are within the {type(wrapper).__name__} here. Give the model "
            f"that is in it (`model.{inner}`)."
        )


def test_a_pipeline_of_another_task(sure: FittedGuard, model: nn.Module) -> None:
    class Own(transformers.ZeroShotClassificationPipeline):
        pass

    for kind in (transformers.ZeroShotClassificationPipeline, transformers.FeatureExtractionPipeline, Own):
        with pytest.raises(UnbackdoorError) as refusal:
            sure.wrap(kind(model=model, tokenizer=toys.tokenizer()))
        assert str(refusal.value) == (
            f"A guard of this model takes a TextClassificationPipeline, got a {kind.__name__}, whose model reads other "
            "inputs than the pipeline. Make that one, or wrap the model."
        )
    named = transformers.pipeline("sentiment-analysis", model=model, tokenizer=toys.tokenizer())
    assert sure.wrap(named)(TEXTS[0])[0].decision.row == 0


def test_a_pipeline_that_cuts_texts_at_the_other_end(sure: FittedGuard, model: nn.Module) -> None:
    pipeline = transformers.TextClassificationPipeline(model=model, tokenizer=toys.tokenizer())
    wrapped = sure.wrap(pipeline, device="cpu")
    pipeline.tokenizer.truncation_side = "left"
    said = "cuts long texts on the left, and that of the guard on the right, so that the model would read another part"
    for call in (lambda: wrapped("a text"), lambda: sure.wrap(pipeline)):
        with pytest.raises(UnbackdoorError, match=said):
            call()


@pytest.mark.parametrize("options", [{"max_length": 16}, {"max_length": 64}, {"truncation": False}])
def test_options_by_which_a_pipeline_reads_another_part(options: dict, sure: FittedGuard, model: nn.Module) -> None:
    pipeline = transformers.TextClassificationPipeline(model=model, tokenizer=toys.tokenizer())
    wrapped = sure.wrap(pipeline, device="cpu")
    with pytest.raises(
        UnbackdoorError, match=r"judges the 32 tokens of a text that its model reads, so the pipeline must"
    ):
        wrapped("a text", **options)
    assert wrapped("a text", max_length=32, truncation=True)[0].decision == wrapped("a text")[0].decision


def test_options_by_which_a_pipeline_reads_another_text(sure: FittedGuard, model: nn.Module) -> None:
    """Whether they come with a call or with the pipeline."""
    pipeline = transformers.TextClassificationPipeline(model=model, tokenizer=toys.tokenizer())
    said = "must read the same, which `add_special_tokens` changes. Leave it out."
    with pytest.raises(UnbackdoorError, match=said):
        sure.wrap(pipeline, device="cpu")("a text", add_special_tokens=False)
    plain = sure.wrap(pipeline, device="cpu")(TEXTS[:9])
    given = sure.wrap(pipeline, device="cpu")(
        TEXTS[:9], add_special_tokens=True, batch_size=4, top_k=None, function_to_apply="none"
    )
    assert [answer.decision for answer in given] == [answer.decision for answer in plain]
    passed = [row for row, answer in enumerate(plain) if answer.answer]
    shown = pipeline([TEXTS[row] for row in passed], top_k=None, function_to_apply="none")
    assert [[each["label"] for each in given[row].answer] for row in passed] == [[x["label"] for x in y] for y in shown]
    made = transformers.TextClassificationPipeline(model=model, tokenizer=toys.tokenizer(), add_special_tokens=False)
    with pytest.raises(UnbackdoorError, match=said):
        sure.wrap(made, device="cpu")("a text")


def test_a_pipeline_answers_the_picture_that_the_guard_saw(tmp_path: Path) -> None:
    """Transparent parts are white to the guard; a pipeline alone shows what they hide. 16 bits are not cut at white."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **WIDTHS)
        vit = transformers.ViTForImageClassification(config).eval()
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    encode = ImageEncoder(mean=(0.5,) * 3, std=(0.5,) * 3, size=(8, 8), channels=3)
    draws = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 3, 8, 8), generator=draws, dtype=torch.uint8)
    clean = Dataset(items=pixels, labels=torch.arange(40) % 3, encode=encode, name="noise")
    fitted = fit_guard(vit, clean, guards.BadActs(), false_alarms=0.1, device="cpu")
    wrapped = fitted.wrap(transformers.ImageClassificationPipeline(model=vit, image_processor=processor), device="cpu")
    hidden = Image.fromarray(clean.pixels[0].permute(1, 2, 0).numpy()).convert("RGBA")
    hidden.putalpha(0)
    hidden.save(tmp_path / "hidden.png")
    white = Image.new("RGB", (8, 8), "white")
    deep = Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16))
    grey = Image.new("L", (8, 8), 0x80)
    for given, seen in ((hidden, white), (str(tmp_path / "hidden.png"), white), (deep, grey)):
        assert wrapped(given)[0].answer == wrapped(seen)[0].answer
        assert wrapped(given)[0].decision == wrapped(seen)[0].decision


def test_tokenizers_in_python_differ_by_what_they_make_of_texts(tmp_path: Path) -> None:
    """Two of one vocabulary counted as one: one kept capitals or merged other letters."""
    words = ["a", "good", "film", "b@@", "ad", "bad", "ba@@", "d"]
    (tmp_path / "vocab.txt").write_text("".join(f"{word} {rank}\n" for rank, word in enumerate(words)))
    (tmp_path / "one").write_text("a d</w> 3\nb ad</w> 2\n")
    (tmp_path / "other").write_text("b a 3\n")

    def made(codes: str, **settings: Any) -> Any:
        return transformers.BertweetTokenizer(str(tmp_path / "vocab.txt"), str(tmp_path / codes), **settings)

    plain = tokenizer_hash(made("one"), 32)
    assert tokenizer_hash(made("one"), 32) == plain
    again = made("one")
    again("a good bad film")  # it keeps what it has split
    again.pad_token = "</s>"  # how it pads is left to its caller
    assert tokenizer_hash(again, 32) == plain
    others = [made("one", normalization=True), made("other"), made("one", cls_token="</s>")]
    others.append(made("one"))
    others[-1].add_tokens(["good film"])
    assert len({plain, *(tokenizer_hash(other, 32) for other in others)}) == 5
