"""The first-letter task: absorption on any language model whose vocabulary has words. Chapter `evaluation`.

Which letter a word begins with is a property with a known answer that a model must hold somewhere. For each letter:

    1  a probe on the activations at the word; the letter counts if its F1 on test words is above 0.6
    2  an L1 probe on the code, and logistic regressions on its k best latents
    3  the main latents: the first k that one more does not improve by 0.03 of F1
    4  the test words that begin with the letter, and on which the probe says so
    5  how much of the letter other latents write there (`absorption_fraction`)
    6  whether one other latent writes it while all main ones are silent (`full_absorption`)
    7  the mean over the letter's words; the score is the mean over letters

Words are met in one of two places. In the reference's *prompts* (ten words with their letters, then the word) the model
is busy with spelling. In *running text* it is not, and the letter competes with all else that the word means. The
letters of the embedded model are taught, so that the probe is no discovery there.

Blind to: why main latents are silent. Where no latent detects the letter well (``main_f1``), other latents that happen
to lean on the probe look like absorbers; an untrained SAE can score above a trained one, and belongs beside it.

Definitions: SAEBench (Karvonen et al. 2025, arXiv 2503.09532) and Chanin et al. 2024 (arXiv 2409.14507), read as code.
Differences: one prompt a word serves probes and absorption, where the reference draws two; its examples are train
words, and a prompt asks about several words, one after the other; capital and small letters of a word are on one side
of the split; SAEBench gives up below 20 letters, here the number of letters is returned; the sparse probe takes 16
steps an epoch where a small vocabulary makes fewer of 4,096 words. And the threshold of step 1: the weight of the
positives makes it so lenient at a logit of 0 that in few dimensions hardly a letter counts, although the letter is
there. A letter that does not count at 0 gets the threshold that is best on the train words, as in the original code,
and is judged by that; how many letters count at 0 is returned too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_lib.metrics.absorption import (
    SILENT,
    absorption_by_ablation,
    absorption_fraction,
    absorption_older,
    full_absorption,
)
from sae_lib.metrics.attribution import integrated_gradients
from sae_lib.metrics.main_latents import best_threshold, f1_score, feature_splits, k_sparse_probe, one_vs_rest
from sae_lib.metrics.words import ASKS, Place, places_in, prompts, some_of_each, vocabulary
from sae_lib.models import LanguageModel
from sae_lib.sae import SAE

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LEAST_F1 = 0.6
"""Of the ground-truth probe, for a letter to count."""
LEAST_STEPS = 16
"""Of the sparse probe in an epoch, whose batches hold 4,096 words if there are enough."""
MOST_LATENTS = 10
"""Most main latents of a letter."""
FREQUENT = 300
"""How many of the words in the texts are called frequent."""
ROWS_AT_ONCE = 64


class Letter(NamedTuple):
    """One letter on one SAE (steps 2 to 4).

    Attributes:
        number: which of the task's letters.
        rows: the test words that begin with it, and on which the ground-truth probe says so.
        main: its main latents.
        scores: of those words, by the k-sparse probe on the main latents.
        f1: of that probe, over all test words.
    """

    number: int
    rows: Int[Tensor, " words"]
    main: Int[Tensor, " m"]
    scores: Float[Tensor, " words"]
    f1: float


class Absorber(NamedTuple):
    """A latent that writes a letter while the letter's main latents are silent.

    Attributes:
        letter: which.
        main: the letter's best latent.
        latent: the one that stands in for it.
        share: of the letter's words, on how many it does.
    """

    letter: str
    main: int
    latent: int
    share: float


class FirstLetter:
    """The first-letter task on a model and a site: prepared once, then called on each SAE.

    Args:
        model: any language model.
        site: where the SAEs read.
        texts: running text in which words are met, strings or records; without texts, the reference's prompts with all
            alphabetic tokens of the vocabulary.
        words: ask about these only.
        seed: of the split into 80% train and 20% test words, the prompts, the places and the probes.

    Attributes:
        letters: those that count, in the alphabet's order.
        letters_at_zero: how many of them count at threshold 0.
        words: on how many test words (in texts, places) of these letters the probe is right.

    Raises:
        ValueError: if fewer than two letters count, there are no words, or a prompt does not fit the context.
    """

    def __init__(
        self,
        model: LanguageModel,
        site: str,
        texts: Iterable[Any] | None = None,
        words: Sequence[str] | None = None,
        seed: int = 0,
    ):
        self.model, self.site, self.seed, self.prompts = model, site, seed, texts is None
        generator = torch.Generator().manual_seed(seed)
        if self.prompts:
            candidates = vocabulary(model)
            known = {word.strip().lower() for word in candidates}
        else:
            candidates = places_in(model, texts)
            frequency = Counter(place.word for place in candidates)
            known = set(frequency)
        known = sorted(known if words is None else known & {word.strip().lower() for word in words})
        if len(known) < 2:
            raise ValueError(f"at least two words must be single tokens of {model.name!r}, got {len(known)}")
        order = torch.randperm(len(known), generator=generator).tolist()
        test = {known[number] for number in order[: max(1, len(known) // 5)]}
        train = set(known) - test
        if self.prompts:
            places = prompts(model, candidates, train, test, generator)
        else:
            places = some_of_each([place for place in candidates if place.word in train | test], generator)
        x = self._read(places)
        asked = torch.tensor([place.word in test for place in places])
        self.places = [place for place in places if place.word in test]
        self._x_train, self._x = x[~asked], x[asked]
        self._fit(*(initials([place for place in places if place.word in part]) for part in (train, test)))
        if not self.prompts:
            frequent = {word for word, _ in frequency.most_common(FREQUENT)}
            self._frequent = torch.tensor([place.word in frequent for place in self.places])

    @torch.no_grad()
    def _read(self, places: Sequence[Place]) -> Float[Tensor, "places d_in"]:
        """Activations at the words. A text is read once, however many of its words are asked for."""
        by_text: dict[int, list[int]] = {}
        for number, place in enumerate(places):
            by_text.setdefault(id(place.row), []).append(number)
        texts = sorted(by_text.values(), key=lambda numbers: len(places[numbers[0]].row))
        x = torch.empty(len(places), self.model.width(self.site), device=self.model.device)
        for start in tqdm(range(0, len(texts), ROWS_AT_ONCE), desc="words", leave=False, delay=2):
            part = texts[start : start + ROWS_AT_ONCE]
            tokens = self.model.pad([places[numbers[0]].row for numbers in part])
            for read, numbers in zip(self.model.activations(tokens, self.site).float(), part, strict=True):
                x[numbers] = read[[places[number].position + 1 for number in numbers]]  # BOS stands first
        return x

    def _fit(self, train: Bool[Tensor, "n 26"], test: Bool[Tensor, "words 26"]) -> None:
        """Step 1: the ground-truth probe, the letters that count, and the words on which it is right."""
        train, test = train.to(self._x.device), test.to(self._x.device)
        present = [n for n in range(26) if all(0 < part[:, n].sum() < len(part) for part in (train, test))]
        counting, thresholds, self.letters_at_zero = [], [], 0
        if present:
            probe = one_vs_rest(self._x_train, train[:, present], seed=self.seed)
            logits, logits_train = probe(self._x), probe(self._x_train)
            for c, n in enumerate(present):
                threshold = 0.0
                if f1_score(logits[:, c] >= threshold, test[:, n]) > LEAST_F1:
                    self.letters_at_zero += 1
                else:
                    threshold = best_threshold(logits_train[:, c], train[:, n])
                if f1_score(logits[:, c] >= threshold, test[:, n]) > LEAST_F1:
                    counting.append(c)
                    thresholds.append(threshold)
        if len(counting) < 2:
            raise ValueError(
                f"at least 2 letters must have a probe with an F1 above {LEAST_F1}, got {len(counting)} of the "
                f"{len(present)} that {len(train)} train and {len(test)} test words have: more words, or another site"
            )
        numbers = [present[c] for c in counting]
        self.letters = [LETTERS[n] for n in numbers]
        self._directions = probe.W.T[counting]
        self._train, self._truth = train[:, numbers], test[:, numbers]
        self._right = self._truth & (logits[:, counting] >= torch.tensor(thresholds, device=logits.device))
        self.words = int(self._right.sum())

    # On an SAE -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(self, sae: SAE) -> dict[str, float | int]:
        """How much of the letters the latents for letters leave to others.

        Returns:
            ``absorption_fraction``, ``absorption_full`` and ``absorption_older``, rates over words, and
            ``feature_splits``, main latents: means over letters, each with ``_sd``, the standard deviation over
            letters; ``main_f1``, mean F1 of the k-sparse probe on the main latents: where it is low they are weak
            detectors, and their silence is not absorption; ``letters``, of which ``letters_at_zero`` count at the
            reference's threshold, and ``words``, of how many. With texts, also fraction and full rate of the 300 words
            that are most ``_frequent`` in them and of the ``_rare`` others, of all letters' words together.
        """
        z = self._code(sae, self._x)
        per_letter, per_word = [], []
        for letter in self._main(sae, z):
            given = self._x[letter.rows], z[letter.rows], sae.W_dec, self._directions[letter.number], letter.main
            older = absorption_older(*given, letter.scores)
            rates = torch.stack([absorption_fraction(*given), full_absorption(*given).float(), older.float()], 1).cpu()
            per_word.append(rates)
            per_letter.append([*rates.mean(0).tolist(), len(letter.main), letter.f1])
        names = ("absorption_fraction", "absorption_full", "absorption_older", "feature_splits", "main_f1")
        means, spreads = torch.tensor(per_letter).mean(0).tolist(), torch.tensor(per_letter).std(0).tolist()
        report = {}
        for name, mean, spread in zip(names, means, spreads, strict=True):
            report |= {name: mean, f"{name}_sd": spread}
        if not self.prompts:
            words = self._right.cpu()
            frequent = torch.cat([self._frequent[words[:, number]] for number in range(len(self.letters))])
            for band, rows in {"frequent": frequent, "rare": ~frequent}.items():
                fraction, full, _ = torch.cat(per_word)[rows].mean(0).tolist()
                report |= {f"absorption_fraction_{band}": fraction, f"absorption_full_{band}": full}
        counts = {"letters": len(self.letters), "letters_at_zero": self.letters_at_zero, "words": self.words}
        return report | counts

    @torch.no_grad()
    def absorbers(self, sae: SAE) -> list[Absorber]:
        """Which latents stand in for main ones: the words of `full_absorption`, told apart by who writes the letter."""
        z, found = self._code(sae, self._x), []
        for letter in self._main(sae, z):
            given = self._x[letter.rows], z[letter.rows], sae.W_dec, self._directions[letter.number], letter.main
            absorbed = letter.rows[full_absorption(*given)]
            written = z[absorbed] * (sae.W_dec @ self._directions[letter.number])
            for latent, words in sorted(Counter(written.argmax(1).tolist()).items()):
                share = words / len(letter.rows)
                found.append(Absorber(self.letters[letter.number], int(letter.main[0]), latent, share))
        return found

    def by_ablation(self, sae: SAE, most: int = 200) -> dict[str, float | int]:
        """The original rate, which asks the model whether its answer depends on one other latent.

        Of each letter's words, those that the k-sparse probe misses while the main latents are silent are asked, up to
        `most` drawn by the seed; what `absorption_by_ablation` finds among them is scaled up to all of them. Needs
        prompts, since running text has no answer, and layers above the site that bring it there.

        Returns:
            ``absorption_by_ablation``, the mean over letters of absorbed words by words on which the probe is right;
            ``ablated``, how many words were asked.

        Raises:
            ValueError: if the task has texts, or the model's answer does not depend on the site.
        """
        if not self.prompts:
            raise ValueError("words must stand in prompts, which have an answer, got texts: FirstLetter without texts=")
        lines = self.model.encode([f"a{ASKS} {letter.upper()}" for letter in LETTERS])
        answers, question = [row[-1] for row in lines], len(lines[0]) - 1
        z, generator = self._code(sae, self._x), torch.Generator().manual_seed(self.seed)
        rates, ablated = [], 0
        for letter in self._main(sae, z):
            right = LETTERS.index(self.letters[letter.number])
            silent = z[letter.rows][:, letter.main].sum(1) < SILENT
            missed = letter.rows[silent & (letter.scores <= 0)]
            asked = missed[torch.randperm(len(missed), generator=generator)[:most].to(missed.device)]
            absorbed = 0
            for rows in asked.split(ROWS_AT_ONCE) if len(asked) else ():
                places = [self.places[row] for row in rows.tolist()]
                tokens = self.model.pad([place.row[: place.position + question] for place in places])
                order, last = torch.arange(len(places)), tokens.mask.sum(1) - 1
                where = torch.zeros_like(tokens.mask)
                where[order, [place.position + 1 for place in places]] = True

                def ahead(logits: Tensor, order=order, last=last, right=right) -> Tensor:
                    """The right letter's logit less the mean of the 25 others."""
                    letters = logits[order, last][:, answers]
                    return letters[:, right] - (letters.sum(1) - letters[:, right]) / 25

                effects = integrated_gradients(self.model, tokens, self.site, sae, ahead, where).dense()
                given = effects, z[rows], sae.W_dec, self._directions[letter.number], letter.main
                absorbed += int(absorption_by_ablation(*given).sum())
            ablated += len(asked)
            rates.append(absorbed / max(1, len(asked)) * len(missed) / len(letter.rows))
        return {"absorption_by_ablation": sum(rates) / len(rates), "ablated": ablated}

    @torch.no_grad()
    def _code(self, sae: SAE, x: Float[Tensor, "words d_in"]) -> Float[Tensor, "words d_sae"]:
        mode = sae.training
        try:
            return sae.eval().encode(x)
        finally:
            sae.train(mode)

    def _main(self, sae: SAE, z: Float[Tensor, "words d_sae"]) -> Iterator[Letter]:
        """Steps 2 to 4. Decoder norms are folded into the code, so that its scale is that of what latents write."""
        norms = sae.W_dec.detach().norm(dim=1)
        z_train, z = self._code(sae, self._x_train) * norms, z * norms
        batch_size = max(1, min(4096, len(z_train) // LEAST_STEPS))
        sparse = one_vs_rest(z_train, self._train, batch_size, weight_decay=1e-6, l1=0.01, seed=self.seed)
        for number in range(len(self.letters)):
            truth, probes = (self._train[:, number], self._truth[:, number]), []
            while len(probes) < MOST_LATENTS:
                k = len(probes) + 1
                probes.append(k_sparse_probe(z_train, truth[0], z, truth[1], sparse.W[:, number], k))
                if feature_splits([probe.f1 for probe in probes]) < k:
                    probes.pop()
                    break
            rows = self._right[:, number].nonzero()[:, 0]
            yield Letter(number, rows, probes[-1].latents, probes[-1].scores[rows], probes[-1].f1)


def initials(places: Sequence[Place]) -> Bool[Tensor, "places 26"]:
    """Which letter each word begins with."""
    numbers = torch.tensor([LETTERS.index(place.word[0]) for place in places])
    return numbers[:, None] == torch.arange(26)
